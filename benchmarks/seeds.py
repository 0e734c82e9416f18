"""Make README's table of results: run the five scripts with their defaults on three seeds.

    python -m benchmarks.seeds             # about three times `make`; writes out-0, out-1, out-2
    python -m benchmarks.seeds --collect   # only the tables, from finished runs
    python -m benchmarks.seeds --seeds 0 1 2 3 4 5   # a column for every three seeds

Writes benchmarks/results/seeds.json and prints the tables in Markdown. The speeds come from the
first seed. You can run the other seeds side by side (one thread each), then collect them.
"""
import importlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.stats import linregress

from model import as_json, load, write
from report.made import processor

rm = importlib.import_module("03_reward_model")
ROOT = Path(__file__).parent.parent
SCRIPTS = ("01_pretrain.py", "02_sample_label.py", "03_reward_model.py", "04_ppo.py", "05_eval.py")
MADE = {"01": "base.safetensors", "03": "reward.safetensors", "04": "policy-happy.safetensors"}
SD = "standard deviations of the base"


@dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    collect: bool = False  # run nothing


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(out: Path) -> dict[str, float]:
    report, ppo = json.loads((out / "report.json").read_text()), rows_of(out / "04-happy.jsonl")
    base, final = report["happy"][0], report["happy"][-1]
    preferred, = (row for row in report["happy"] if row["name"] == report["preferred_happy"])
    best = {row["n"]: row for row in report["best_of_n"]}
    metrics = report["base_metrics"]
    reward = report["reward_model"].get("model", report["reward_model"]["all"])
    clipped = [row["clip_fraction"] for row in ppo if row.get("lr") == ppo[-2]["lr"]]
    fair, lead = fair_bag_of_words(out)
    found = {
        "base: held-out bits per byte": metrics["bits_per_byte"],
        "base: held-out nats per token": metrics["nats_per_token"],
        "base: share of sampled words that are words of the corpus, %":
            100 * metrics["real_word_share"],
        "reward model: AUC on held-out model samples": reward["auc"],
        "reward model: accuracy on held-out model samples, %": 100 * reward["accuracy"],
        "reward model: Brier score": reward["brier"],
        "reward model: nats per label": reward["nll"],
        "bag of words, learned from samples and quarters: AUC": reward["bag_of_words_auc"],
        "bag of words, learned from the very same spans: AUC": fair,
        "AUC lead over the latter, low end of its 95% interval": lead[0],
        "the same, high end": lead[1],
        "base: VADER positive, %": 100 * base["positive"],
        "final policy: VADER positive, %": 100 * final["positive"],
        "final policy: KL, nats per completion": final["kl"],
        "final policy: distinct-2 / base": final["distinct_2"] / base["distinct_2"],
        "final policy: duplicates among 1,024": final["duplicates"],
        "base: copied run, 99th percentile, words": base["copied_run_99"],
        "final policy: copied run, 99th percentile, words": final["copied_run_99"],
        "base: longest copied run, words": base["copied_run_max"],
        "final policy: longest copied run, words": final["copied_run_max"],
        "final policy: perplexity under the base / base's own":
            final["base_perplexity"] / base["base_perplexity"],
        "sqrt KL against optimizer steps: R^2": report["sqrt_kl_fit"]["r2"],
        "the same, until the score, mean log p(happy), reaches -0.10": straight(ppo, -0.10),
        "KL at which 04's score, mean log p(happy), reaches -0.10": kl_at(ppo, -0.10),
        "samples drawn by PPO": sum(row["batch"] for row in ppo),
        "checkpoints kept": sum("checkpoint" in row for row in ppo),
        "clip fraction, mean after warm-up, %": 100 * float(np.mean(clipped))}
    policies = {"best of 4": best[4], "best of 64": best[64], "preferred policy": preferred,
                "final policy": final}
    judges = {"proxy": "reward", "vader": "VADER", "afinn": "AFINN", "pattern": "Pattern"}
    found |= {f"{name}: {judge}, {SD}": policy[f"{key}_sd"]
              for name, policy in policies.items() for key, judge in judges.items()}
    return found | {
        "best of 64: distinct-2 / base": best[64]["distinct_2"] / base["distinct_2"],
        "preferred policy: distinct-2 / base": preferred["distinct_2"] / base["distinct_2"],
        "preferred policy: KL, nats per completion": preferred["kl"]}


def fair_bag_of_words(out: Path) -> tuple[float, tuple[float, float]]:
    """Train a bag of words on everything that the reward model learns from. -> its AUC on the same
    held-out samples, and the 95% interval of the reward model's lead (paired bootstrap)."""
    model, tokenizer, header = load(out / MADE["03"], "03_reward_model.py")
    cfg = rm.Config(out=out, seed=header["settings"]["seed"])
    items = rm.prepare(rm.read_all_labels(cfg, model, tokenizer), cfg, tokenizer)
    learned = [(item["tokens"][first:end], rm.TARGET[label])
               for item in items if item["part"] == "train"
               for first, end, label in (*item["spans"], (0, None, item["label"]))]
    texts = tokenizer.decode_batch([tokens for tokens, _ in learned])
    train = [{"text": text, "target": target, "weight": 1.0}
             for text, (_, target) in zip(texts, learned)]
    test = [item for item in items if item["part"] == "test"]
    target = np.array([item["target"] for item in test])
    ours, bag = rm.predict(model, test)[:, 0], rm.bag_of_words(train, test)
    return rm.auc(bag, target), rm.interval(
        lambda i: rm.auc(ours[i], target[i]) - rm.auc(bag[i], target[i]), len(test))


def kl_at(ppo: list[dict], score: float) -> float:
    """The KL where the score is first reached, interpolated from the policy before. nan if no
    policy reaches it, or if the first one already does."""
    i = next((i for i, row in enumerate(ppo) if row["score"] >= score), 0)
    if i == 0:
        return float("nan")
    a, b = ppo[i - 1], ppo[i]
    return a["kl"] + (score - a["score"]) / (b["score"] - a["score"]) * (b["kl"] - a["kl"])


def straight(ppo: list[dict], score: float) -> float:
    """R^2 of sqrt KL against optimizer steps, up to the first policy that reaches the score."""
    until = next((i for i, row in enumerate(ppo) if row["score"] >= score), len(ppo)) + 1
    steps, kl = zip(*((row["updates"], max(row["kl"], 0)) for row in ppo[:until]))
    return linregress(steps, np.sqrt(kl)).rvalue ** 2


def speeds(out: Path) -> dict[str, float]:
    """Where the seconds of `make` go, and rates."""
    times = json.loads((out / "times.json").read_text())
    ppo, settings = rows_of(out / "04-happy.jsonl"), settings_of(out, "01")
    rate = rows_of(out / "01.jsonl")[-1]["tokens_per_s"]
    start_up = sum(s for what, s in times.items() if "start-up" in what)
    found = {"make, set-up excluded, minutes": (sum(times.values()) - start_up) / 60}
    for script in SCRIPTS:
        found[f"{script}, s"] = times[f"{script}, s"]
        if script.startswith("01"):
            tokens = settings["steps"] * settings["batch"] * settings["context"]
            found["of which training steps"] = tokens / rate
        if script.startswith("04"):
            found |= {f"of which {k}": sum(row.get(f"s_{k}", 0) for row in ppo)
                      for k in ("rollout", "score", "update")}
    ppo = [row for row in ppo if "s_update" in row]
    whole = [sum(row[f"s_{k}"] for k in ("rollout", "score", "update"))
             for row in ppo if row["batch"] == ppo[0]["batch"]]
    return found | {
        "Python and imports, in all five, s": start_up,
        "pretraining, tokens/s": rate,
        "rollout, tokens/s": float(np.median([64 * r["batch"] / r["s_rollout"] for r in ppo])),
        "PPO iteration of the first batch size, s": float(np.median(whole))}


def settings_of(out: Path, stage: str) -> dict:
    return load(out / MADE[stage], stage)[2]["settings"]


def run(seed: int, out: Path) -> None:
    """Run and time the five scripts. Skips those that are in
    out/times.json already: delete that file after a change of the code."""
    file = out / "times.json"
    times = json.loads(file.read_text()) if file.exists() else {}
    for script in (s for s in SCRIPTS if f"{s}, s" not in times):
        began = time.time()
        subprocess.run([sys.executable, script, "--seed", str(seed), "--out", str(out)], cwd=ROOT,
                       check=True)
        times[f"{script}, s"], began = time.time() - began, time.time()
        subprocess.run([sys.executable, script, "--help"], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
        times[f"{script}, start-up, s"] = time.time() - began
        write(file, as_json(times))


if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    outs = [ROOT / f"out-{seed}" for seed in cfg.seeds]
    for seed, out in zip(cfg.seeds, outs) if not cfg.collect else ():
        run(seed, out)
    runs, fast = [figures(out) for out in outs], speeds(outs[0])
    write(ROOT / "benchmarks/results/seeds.json", as_json(
        {"torch": torch.__version__, "cpu": processor(), "threads": torch.get_num_threads(),
         "seeds": cfg.seeds, "settings": {stage: settings_of(outs[0], stage) for stage in MADE},
         "runs": runs, "speeds of the first seed": fast}, indent=1))
    threes = [runs[i:i + 3] for i in range(0, len(runs), 3)]
    names = [", ".join(map(str, cfg.seeds[i:i + 3])) for i in range(0, len(runs), 3)]
    print(f"| mean ± sd of seeds | {' | '.join(names)} |\n|{'---|' * (1 + len(threes))}")
    for name in runs[0]:
        cells = []
        for three in threes:
            x = np.array([run[name] for run in three], dtype=float)
            digits = 0 if x.mean() >= 1000 else 1 if x.mean() >= 20 else 2 if x.mean() >= 2 else 3
            sd = x.std(ddof=1) if len(x) > 1 else 0
            cells.append(f"{x.mean():,.{digits}f} ± {sd:,.{digits}f}")
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n| speed, seed {cfg.seeds[0]} | |\n|---|---|")
    for name, x in fast.items():
        print(f"| {name} | {x:,.{1 if x < 100 else 0}f} |")
