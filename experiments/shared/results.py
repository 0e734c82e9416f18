"""Intervals, figures and result files of the experiments."""
import io
import math
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import sem, t

from model import as_json, write

ink = SimpleNamespace(  # Okabe and Ito 2008: for the colour-blind
    black="#000000", orange="#E69F00", sky="#56B4E9", green="#009E73", yellow="#F0E442",
    blue="#0072B2", red="#D55E00", pink="#CC79A7")


def over_seeds(values: Iterable[float]) -> tuple[float, float]:
    """One value per seed -> their mean, and half the width of its 95% interval (Student's t)."""
    x = np.array(list(values), dtype=float)
    half = t.ppf(0.975, len(x) - 1) * sem(x) if len(x) > 1 else math.nan
    return float(x.mean()), float(half)


def panels(rows: int, columns: int, width: float, height: float, **how) -> tuple:
    """Make a figure, width and height in inches -> figure, axes."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **how)


def lines(ax, seeds: list[dict], styles: dict[str, tuple], x: str, y: str, **axes) -> None:
    """Draw one line per seed through the rows that have y. styles: name of a list of rows -> line
    style, colour, label. A KL is drawn on a square-root scale."""
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


def save_results(cfg, name: str, found: dict[str, list], results, figure: Figure) -> None:
    """Print found (what -> one value per seed). Write NAME.png, then NAME.json, to cfg.out: `make
    experiments` takes the JSON file for "done"."""
    for what, values in found.items():
        print(what, "{:.3f} +- {:.3f}:".format(*over_seeds(values)), *np.round(values, 3))
    large, png = io.BytesIO(), io.BytesIO()
    figure.savefig(large, format="png", dpi=80)
    Image.open(large).convert("RGB").quantize(256).save(png, format="png")  # half the bytes
    write(cfg.out / f"{name}.png", png.getvalue())
    found = {what: {"mean, half interval": over_seeds(values), "seeds": [float(x) for x in values]}
             for what, values in found.items()}
    write(cfg.out / f"{name}.json", as_json({"found": found, "all": results}, indent=1))
    print(f"wrote {cfg.out / name}.json and .png")
