"""Labels or comparisons, with or without prompts: which reward model ranks better?

    python -m experiments.labels_or_comparisons  # after `make seeds`; one core: two to three hours

All runs use the default settings, so all have VADER read 24,576 samples. It labels each of them, or
compares them in pairs, 12,288 of them. The samples have no prompt, or complete prompts. Labels
without prompts are the runs of `make seeds`. The other three kinds start from the base models of
these runs, nine runs for three seeds. A second call continues where the first one stopped.

Both reward models of a kind are asked about the same fresh samples: AUC against VADER's label, and
how often they prefer the sample that VADER prefers. VADER's mean score at 5 and 10 nats is read
off the checkpoints on either side, on a line in sqrt KL. Prints Markdown: mean and half the width
of the 95% interval over seeds. Writes out/experiments/labels_or_comparisons.json.
"""
import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from experiments.shared.results import over_seeds
from experiments.shared.simulated_people import person, targets
from model import as_json, chunked, draw_prompts, fast_dtype, load, program, read_prompts, write

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
rm = importlib.import_module("03_reward_model")


@dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    fresh: int = 8192  # samples on which the reward models are compared


def run(out: Path, seed: int, comparisons: bool, prompts: bool) -> None:
    """Run 02 to 05; what is there already is not made again."""
    kind = "comparisons" if comparisons else "labels"
    asked = ["--compare"] * comparisons + ["--prompts"] * prompts
    stages = (("02_sample_label.py", asked, f"{kind}-vader.jsonl"),
              ("03_reward_model.py", ["--comparisons"] * comparisons, "reward.safetensors"),
              ("04_ppo.py", [], "policy-happy.safetensors"),
              ("05_eval.py", [], "report.json"))
    out.mkdir(parents=True, exist_ok=True)
    for name in ("base.safetensors", "corpus.txt"):
        shutil.copy(ROOT / f"out-{seed}" / name, out)
    for script, flags, made in stages:
        if not (out / made).exists():
            command = [sys.executable, script, "--seed", str(seed), "--out", str(out), *flags]
            subprocess.run(command, cwd=ROOT, check=True)


@torch.no_grad()
def ranking(out: Path, fresh: int, prompts: bool, seed: int) -> dict[str, float]:
    """How well the reward model in `out` ranks fresh samples of the base model."""
    on = DEVICE, fast_dtype(DEVICE)
    base, tokenizer, _ = load(out / "base.safetensors", "01_pretrain.py", *on)
    model, _, header = load(out / "reward.safetensors", "03_reward_model.py", *on)
    held_out = None
    if prompts:
        held_out = read_prompts(out / "prompts.json", "held_out", base.n_text)
    # the two samples of a pair continue one prompt
    given = draw_prompts(held_out, fresh // 2, seed).repeat_interleave(2, 0)
    y, _ = base.generate(fresh, header["length"], seed << 32 | 7 << 24, prompts=given)
    happy, sad = chunked(model.sentiment, 256, y, given.to(y.device)).numpy(force=True).T
    score, gold = happy - sad, person(())(tokenizer.decode_batch(y.tolist()))
    a, b, p, q = gold[::2], gold[1::2], score[::2], score[1::2]
    return {"AUC": rm.auc(score, targets(gold)),
            "pair accuracy, %": 100 * float(((a > b) == (p > q))[a != b].mean())}


def gold_at(out: Path, kl: float) -> float:
    """VADER's mean score at this KL, on a line in sqrt KL between checkpoints; that of the last
    one if none lies beyond."""
    rows = sorted(json.loads((out / "report.json").read_text())["happy"], key=lambda r: r["kl"])
    d = [max(row["kl"], 0) ** 0.5 for row in rows]
    return float(np.interp(kl**0.5, d, [row["vader"] for row in rows]))


if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__, prog=program())
    if len(cfg.seeds) < 2:
        sys.exit("error: an interval needs two --seeds or more")
    results = {}
    print("| samples | learned from | AUC | pair accuracy, % | gold at 5 nats | gold at 10 nats |\n"
          "|---|---|---|---|---|---|")
    for prompts in (False, True):
        for comparisons in (False, True):
            name = ("prompted" if prompts else "unconditional",
                    "comparisons" if comparisons else "labels")
            found = []
            for seed in cfg.seeds:
                out = ROOT / f"out-{seed}"
                if prompts or comparisons:
                    out /= "-".join(name)
                    run(out, seed, comparisons, prompts)
                found.append(ranking(out, cfg.fresh, prompts, seed)
                             | {f"gold at {kl} nats": gold_at(out, kl) for kl in (5, 10)})
            results[", ".join(name)] = found
            cells = []
            for key in found[0]:
                mean, half = over_seeds(row[key] for row in found)
                digits = 1 if "%" in key else 3
                cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}")
            print(f"| {name[0]} | {name[1]} | {' | '.join(cells)} |", flush=True)
    write(Path("out/experiments/labels_or_comparisons.json"), as_json(
        {"torch": torch.__version__, "seeds": cfg.seeds, "runs": results}, indent=1))
