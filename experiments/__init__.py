"""One question a file, each with its prediction, its result and its figure: docs/experiments.md.

    make experiments                     # all that have no result yet; or one of them:
    python -m experiments.frontier       # writes out/experiments/frontier.json and .png

What two of them need and no stage has is here and in the modules that are no experiment.
"""
import importlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from model import require, write

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

ev = importlib.import_module("05_eval")

ALL = ("frontier", "goodhart", "methods", "where_the_kl_goes", "over_optimisation",
       "recursive_reward_modelling", "weak_to_strong", "amplification", "debate",
       "gradient_protection")
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (  # Okabe and Ito 2008: for the colour-blind
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
STUDENT_T = {1: math.nan, 2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # 97.5 %, of n values


@dataclass
class Config:
    runs: tuple[Path, ...] = (Path("out-0"), Path("out-1"), Path("out-2"))  # of `make seeds`
    out: Path = Path("out/experiments")
    seed: int = 0


def load_run(run: Path, device, dtype) -> tuple:
    """A finished run -> base model, reward_fn (tokens (B, T), prompt (B, P) -> log p(happy) (B,)),
    reward model, tokenizer, what 05 reported. Raises UserError if it is not finished."""
    require((run / "report.json").exists(), f"{run} is not a finished run: make seeds first, or "
            "name those that are with --runs")
    reference, reward_model, tokenizer, about = ev.load_run(run, device, dtype)
    require(not about["prompted"], f"{run} was made with prompts: these experiments have none")

    def reward_fn(y, prompt):
        log_p = reward_model.sentiment(y, prompt)                            # (B, 2)
        return log_p[:, 0] if about["kind"] == "labels" else log_p[:, 0] - log_p[:, 1]
    report = json.loads((run / "report.json").read_text()) | {"length": about["length"]}
    return reference, reward_fn, reward_model, tokenizer, report


def over_seeds(values: Iterable[float]) -> tuple[float, float]:
    """One value a seed -> their mean, and half its 95 % interval (Student)."""
    x = np.array(list(values), dtype=float)
    spread = x.std(ddof=1) if len(x) > 1 else math.nan
    return float(x.mean()), float(STUDENT_T[len(x)] * spread / len(x) ** 0.5)


def lines(ax, seeds: list[dict], styles: dict[str, tuple], x: str, y: str, **axes) -> None:
    """styles: name of a list of rows -> style, colour, label; one line a seed, where rows have y.
    A KL lies on a scale of roots."""
    for name, (style, colour, label) in styles.items():
        for i, seed in enumerate(seeds):
            rows = [row for row in seed.get(name, ()) if y in row]
            ax.plot([row[x] for row in rows], [row[y] for row in rows], style, color=colour, ms=4,
                    lw=1, label=label if rows and i == 0 else None)
    if x == "kl":
        ax.set_xscale("function", functions=(np.sqrt, np.square))
        ax.set(xlabel="KL(policy || base), nats", xlim=(0, None),
               xticks=(0.1, 0.5, 1, 2, 4, 6, 8, 10))
    ax.set(**axes)
    ax.grid(alpha=0.3)


def keep(cfg, name: str, found: dict[str, list], results, figure) -> None:
    """found: what -> one value a seed, printed. Writes out/experiments/NAME.png, then NAME.json, by
    which `make experiments` knows it done."""
    for what, values in found.items():
        print(what, "{:.3f} +- {:.3f}:".format(*over_seeds(values)), *np.round(values, 3))
    large, png = io.BytesIO(), io.BytesIO()
    figure.savefig(large, format="png", dpi=80)
    plt.close(figure)
    Image.open(large).convert("RGB").quantize(256).save(png, format="png")  # half the bytes
    write(cfg.out / f"{name}.png", png.getvalue())
    found = {what: {"mean, half interval": over_seeds(values), "seeds": [float(x) for x in values]}
             for what, values in found.items()}
    write(cfg.out / f"{name}.json", json.dumps({"found": found, "all": results}, indent=1))
    print(f"wrote {cfg.out / name}.json and .png")
