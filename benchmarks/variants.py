"""Labels or comparisons, unconditional or prompted: which reward model ranks better, which policy is happier?

    python -m benchmarks.variants             # 02 to 05 twelve times: more than an hour; a second call goes on

For each seed the same base model (01 of `python -m benchmarks.seeds`), then 16,384 labels of VADER, or as many
of its comparisons, of unconditional samples and of completions of prompts. Both reward models of a
kind are asked about the same fresh samples: AUC on VADER's label, and how often they prefer the sample that VADER
prefers. VADER's score at 5 and at 10 nats is read off the checkpoints on either side, linearly in sqrt KL.
Prints Markdown, mean and half the width of a 95 % t-interval over seeds; writes benchmarks/results/variants.json.
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
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import chunked, draw_prompts, fast_dtype, load, read_prompts

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
rm = importlib.import_module("03_reward_model")
label = importlib.import_module("02_sample_label")
T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t of that many seeds less one degrees of freedom, 97.5 %


@dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    n: int = 16_384    # labels, or comparisons
    fresh: int = 8192  # samples on which the reward models are compared


def run(out: Path, seed: int, n: int, comparisons: bool, prompts: bool) -> None:
    """02 to 05; what is there already is not made again."""
    flags = {"02_sample_label.py": ["--n", str(n * (1 + comparisons))] + ["--compare"] * comparisons + ["--prompts"] * prompts,
             "03_reward_model.py": ["--comparisons"] * comparisons, "04_ppo.py": [], "05_eval.py": []}
    made = (f"{'comparisons' if comparisons else 'labels'}-vader.jsonl", "reward.safetensors", "policy-happy.safetensors",
            "report.json")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("base.safetensors", "corpus.txt"):
        shutil.copy(ROOT / f"out-{seed}" / name, out)
    for (script, more), file in zip(flags.items(), made):
        if not (out / file).exists():
            subprocess.run([sys.executable, script, "--seed", str(seed), "--out", str(out), *more], cwd=ROOT, check=True)


@torch.no_grad()
def ranking(out: Path, fresh: int, prompts: bool, seed: int) -> dict[str, float]:
    """Of the reward model in `out`, on fresh samples of the base model."""
    on = DEVICE, fast_dtype(DEVICE)
    base, tokenizer, _ = load(out / "base.safetensors", "01_pretrain.py", *on)
    model, _, header = load(out / "reward.safetensors", "03_reward_model.py", *on)
    given = draw_prompts(read_prompts(out / "prompts.json", "held_out") if prompts else None, fresh // 2, seed)
    given = given.repeat_interleave(2, 0)  # the two samples of a pair continue one prompt
    y, _ = base.generate(fresh, header["length"], seed << 32 | 7 << 24, prompts=given)
    happy, sad = chunked(model.sentiment, 256, y, given.to(y.device)).numpy(force=True).T
    score, vader = happy - sad, SentimentIntensityAnalyzer()
    gold = np.array([vader.polarity_scores(t)["compound"] for t in tokenizer.decode_batch(y.tolist())])
    target = np.array([rm.TARGET[label.feeling(g)] for g in gold])
    a, b, p, q = gold[::2], gold[1::2], score[::2], score[1::2]
    return {"AUC": rm.auc(score, target), "pair accuracy, %": 100 * float(((a > b) == (p > q))[a != b].mean())}


def gold_at(out: Path, kl: float) -> float:
    """By interpolation in sqrt KL between checkpoints; the last one if none lies beyond."""
    rows = sorted(json.loads((out / "report.json").read_text())["happy"], key=lambda r: r["kl"])
    return float(np.interp(kl**0.5, [max(r["kl"], 0) ** 0.5 for r in rows], [r["vader"] for r in rows]))


if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    if len(cfg.seeds) not in T:
        sys.exit(f"error: two to {max(T)} seeds, for an interval")
    results = {}
    print("| samples | learned from | AUC | pair accuracy, % | gold at 5 nats | gold at 10 nats |\n|---|---|---|---|---|---|")
    for prompts in (False, True):
        for comparisons in (False, True):
            name = ("prompted" if prompts else "unconditional", "comparisons" if comparisons else "labels")
            found = []
            for seed in cfg.seeds:
                out = ROOT / f"out-{seed}" / "-".join(name)
                run(out, seed, cfg.n, comparisons, prompts)
                found.append(ranking(out, cfg.fresh, prompts, seed) | {f"gold at {kl} nats": gold_at(out, kl) for kl in (5, 10)})
            results[", ".join(name)] = found
            cells = []
            for key in found[0]:
                x, digits = np.array([r[key] for r in found]), 1 if "%" in key else 3
                cells.append(f"{x.mean():.{digits}f} ± {T[len(x)] * x.std(ddof=1) / len(x)**0.5:.{digits}f}")
            print(f"| {name[0]} | {cfg.n:,} {name[1]} | {' | '.join(cells)} |", flush=True)
    (ROOT / "benchmarks" / "results" / "variants.json").write_text(json.dumps(
        {"torch": torch.__version__, "seeds": cfg.seeds, "n": cfg.n, "runs": results}, indent=1))
