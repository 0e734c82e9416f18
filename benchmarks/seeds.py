"""The README's results table: the five scripts with their defaults on three seeds.

    python -m benchmarks.seeds             # about three times `make`; writes out-0, out-1, out-2
    python -m benchmarks.seeds --collect   # only the table, from runs that are there

Writes benchmarks/results/seeds.json and prints the tables in Markdown. Speeds are those of the first
seed, so the other seeds may be run beside each other (one thread each), then collected.
"""
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from model import load
from scipy.stats import linregress

ROOT = Path(__file__).parent.parent
SCRIPTS = ("01_pretrain.py", "02_sample_label.py", "03_reward_model.py", "04_ppo.py", "05_eval.py")


@dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    collect: bool = False  # run nothing


def figures(out: Path) -> dict[str, float]:
    report = json.loads((out / "report.json").read_text())
    ppo = [json.loads(x) for x in (out / "04-happy.jsonl").read_text().splitlines()]
    base, final = report["happy"][0], report["happy"][-1]
    preferred, = (row for row in report["happy"] if row["name"] == report["preferred_happy"])
    best = {row["n"]: row for row in report["best_of_n"]}
    metrics = report["base_metrics"]
    reward = report["reward_model"].get("model", report["reward_model"]["all"])
    row = {
        "base: held-out bits per byte": metrics["bits_per_byte"],
        "base: held-out nats per token": metrics["nats_per_token"],
        "base: share of sampled words that are words of the corpus, %": 100 * metrics["real_word_share"],
        "reward model: AUC on held-out model samples": reward["auc"],
        "reward model: accuracy on held-out model samples, %": 100 * reward["accuracy"],
        "bag of words: AUC on the same": reward["bag_of_words_auc"],
        "AUC less that of the bag of words, low end of its 95 % interval": reward["auc_lead_interval"][0],
        "the same, high end": reward["auc_lead_interval"][1],
        "base: VADER positive, %": 100 * base["positive"],
        "final policy: VADER positive, %": 100 * final["positive"],
        "final policy: KL, nats per completion": final["kl"],
        "final policy: distinct-2 / base": final["distinct_2"] / base["distinct_2"],
        "final policy: duplicates among 1,024": final["duplicates"],
        "base: copied run, 99th percentile, words": base["copied_run_99"],
        "final policy: copied run, 99th percentile, words": final["copied_run_99"],
        "base: longest copied run, words": base["copied_run_max"],
        "final policy: longest copied run, words": final["copied_run_max"],
        "final policy: perplexity under the base / base's own": final["base_perplexity"] / base["base_perplexity"],
        "sqrt KL against optimizer steps: R^2": report["sqrt_kl_fit"]["r2"],
        "the same, until the score, mean log p(happy), reaches -.10": straight(ppo, -0.10),
        "KL at which 04's score, mean log p(happy), reaches -.10": kl_at(ppo, -0.10),
        "samples drawn by PPO": sum(row["batch"] for row in ppo),
        "checkpoints kept": sum("checkpoint" in row for row in ppo),
        "clip fraction, mean over iterations, %": 100 * float(np.mean([r["clip_fraction"] for r in ppo if "clip_fraction" in r])),
    }
    for name, policy in (("best of 4", best[4]), ("best of 64", best[64]), ("preferred policy", preferred),
                         ("final policy", final)):
        for key, judge in (("proxy", "reward"), ("vader", "VADER"), ("afinn", "AFINN"), ("pattern", "Pattern")):
            row[f"{name}: {judge}, standard deviations of the base"] = policy[f"{key}_sd"]
    row["best of 64: distinct-2 / base"] = best[64]["distinct_2"] / base["distinct_2"]
    row["preferred policy: distinct-2 / base"] = preferred["distinct_2"] / base["distinct_2"]
    row["preferred policy: KL, nats per completion"] = preferred["kl"]
    return row


def kl_at(ppo: list[dict], score: float) -> float:
    """KL where the score is first reached, linear between that policy and the one before; nan if none
    reaches it, or the first has it already."""
    i = next((i for i, row in enumerate(ppo) if row["score"] >= score), 0)
    if i == 0:
        return float("nan")
    a, b = ppo[i - 1], ppo[i]
    return a["kl"] + (score - a["score"]) / (b["score"] - a["score"]) * (b["kl"] - a["kl"])


def straight(ppo: list[dict], score: float) -> float:
    """R^2 of the line through sqrt KL against optimizer steps, up to the first policy that reaches the score."""
    until = next((i for i, row in enumerate(ppo) if row["score"] >= score), len(ppo)) + 1
    steps, kl = zip(*((row["updates"], max(row["kl"], 0)) for row in ppo[:until]))
    return linregress(steps, np.sqrt(kl)).rvalue ** 2


def speeds(out: Path) -> dict[str, float]:
    """Where the seconds of `make` go, and rates."""
    times = json.loads((out / "times.json").read_text())
    logs = {n: [json.loads(x) for x in (out / n).read_text().splitlines()] for n in ("01.jsonl", "04-happy.jsonl")}
    settings = load(out / "base.safetensors", "")[2]["settings"]
    rate = logs["01.jsonl"][-1]["tokens_per_s"]
    ppo = [r for r in logs["04-happy.jsonl"] if "s_update" in r]
    seconds = {"make, set-up excluded, minutes": sum(t for k, t in times.items() if "start-up" not in k) / 60}
    for script in SCRIPTS:
        seconds[f"{script}, s"] = times[f"{script}, s"]
        if script.startswith("01"):
            seconds["of which training steps"] = settings["steps"] * settings["batch"] * settings["context"] / rate
        if script.startswith("04"):
            seconds |= {f"of which {k}": sum(r.get(f"s_{k}", 0) for r in logs["04-happy.jsonl"]) for k in ("rollout", "score", "update")}
    seconds["Python and imports, in all five, s"] = sum(t for k, t in times.items() if "start-up" in k)
    return seconds | {
        "pretraining, tokens/s": rate,
        "rollout, tokens/s": float(np.median([64 * r["batch"] / r["s_rollout"] for r in ppo])),
        "PPO iteration of the first batch size, s": float(np.median([r["s_rollout"] + r["s_score"] + r["s_update"]
                                                                     for r in ppo if r["batch"] == ppo[0]["batch"]])),
    }


if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    for seed in cfg.seeds if not cfg.collect else ():
        out = ROOT / f"out-{seed}"
        file = out / "times.json"
        times = json.loads(file.read_text()) if file.exists() else {}  # of a benchmark that was stopped
        for script in (s for s in SCRIPTS if f"{s}, s" not in times):
            began = time.time()
            subprocess.run([sys.executable, script, "--seed", str(seed), "--out", str(out)], cwd=ROOT, check=True)
            times[f"{script}, s"], began = time.time() - began, time.time()
            subprocess.run([sys.executable, script, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            times[f"{script}, start-up, s"] = time.time() - began
            file.write_text(json.dumps(times))
    runs = [figures(ROOT / f"out-{seed}") for seed in cfg.seeds]
    cpu = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x] \
        if Path("/proc/cpuinfo").exists() else [platform.processor()]
    settings = {s: load(ROOT / f"out-{cfg.seeds[0]}" / f, s)[2]["settings"] for s, f in
                (("01", "base.safetensors"), ("03", "reward.safetensors"), ("04", "policy-happy.safetensors"))}
    (ROOT / "benchmarks" / "results" / "seeds.json").write_text(json.dumps(
        {"torch": torch.__version__, "cpu": cpu[0], "threads": torch.get_num_threads(), "seeds": cfg.seeds,
         "settings": settings, "runs": runs, "speeds of the first seed": (fast := speeds(ROOT / f"out-{cfg.seeds[0]}"))},
        indent=1))
    print(f"| figure | mean ± sd of seeds {', '.join(map(str, cfg.seeds))} |\n|---|---|")
    for name in runs[0]:
        x = np.array([r[name] for r in runs], dtype=float)
        digits = 0 if x.mean() >= 1000 else 1 if x.mean() >= 20 else 2 if x.mean() >= 2 else 3
        print(f"| {name} | {x.mean():,.{digits}f} ± {x.std(ddof=1) if len(x) > 1 else 0:,.{digits}f} |")
    print(f"\n| speed, seed {cfg.seeds[0]} | |\n|---|---|")
    for name, x in fast.items():
        print(f"| {name} | {x:,.{1 if x < 100 else 0}f} |")
