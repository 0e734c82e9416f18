"""What methods are compared by: the figures that 05 measures of a policy, and what it cost."""
import importlib
import time
from itertools import product

import torch

from experiments.reweight import at
from model import load

ev = importlib.import_module("05_eval")
JUDGES = ("vader", "afinn", "pattern")
COLUMNS = ("kl", "reward", *JUDGES, "distinct_2", "entropy", "samples", "seconds")


def figures(row: dict, base: dict, **more) -> dict:
    """Of 05's rows for a policy and for the base model; judges in standard deviations of the
    latter's samples. more: added as it is."""
    kept = {k: row[k] for k in ("kl", "kl_se", "entropy", "distinct_2") if k in row}
    for judge in JUDGES:
        sd = base[f"{judge}_se"] * base["n"] ** 0.5
        kept[judge] = (row[judge] - base[judge]) / sd
    return kept | {"reward": row["proxy"]} | more


def meter(reference, reward_fn, reward_model, tokenizer, report: dict, n: int):
    """Of a finished run -> function: policy -> its figures on n samples, drawn as 05 drew its."""
    empty = torch.zeros(n, 0, dtype=torch.long, device=reference.head.device)

    def measured(policy, reference=reference, **more):
        row = ev.measure(policy, reference, reward_model, lambda *y: (reward_fn(*y),) * 2,
                         tokenizer, empty, report["length"], report["seed"] << 32 | 5 << 24,
                         show=1)
        return figures(row, report["happy"][0], **more)
    return measured


def shipped(run, report: dict) -> list[dict]:
    """04's checkpoints and final policy as 05 measured them; what 04 had drawn, and the seconds it
    had taken, by its log."""
    rows = []
    for row in report["happy"]:
        log, samples = [], 0
        if row["name"] != "base":
            path, = run.rglob(f"{row['name']}.safetensors")
            header = load(path, "04_ppo.py")[2]
            log = report["ppo"][: header["step"]]  # the iterations before it
            samples = header["settings"]["reward_samples"] + sum(x["batch"] for x in log)
        parts = ("s_rollout", "s_score", "s_update")
        rows.append(figures(row, report["happy"][0], samples=samples,
                            seconds=sum(x.get(part, 0.0) for x in log for part in parts)))
    return rows


def timed(loop):
    """What a loop yields, and the seconds spent in it so far, not in who asks for more."""
    seconds, clock = 0.0, time.perf_counter()
    for item in loop:
        seconds += time.perf_counter() - clock
        yield item, seconds
        clock = time.perf_counter()


def findings(seeds: list[dict], names) -> dict[str, list]:
    """Each column of each method at equal KL and at equal reward; of each penalty where it ended;
    of the imitations what they aimed at and what they reached."""
    found = {}
    places = [("kl", x) for x in (1, 2, 5, 9.5)] + [("reward", x) for x in (-0.3, -0.2, -0.1)]
    for (x, value), y, name in product(places, COLUMNS, names):
        if x != y:
            found[f"{y} at {x} {value}, {name}"] = [at(s[name], x, value, y) for s in seeds]
    for s, row in [(s, row) for s in seeds for row in s["penalty"]]:
        ahead = row["reward"] - at(s["PPO"], "kl", row["kl"], "reward")
        for what, value in (row | {"reward above PPO's": ahead}).items():
            if isinstance(value, float) and what != "beta":
                found.setdefault(f"{what}, penalty {row['beta']}", []).append(value)
    for name, x in product(seeds[0]["targets"], ("kl", "reward")):
        found[f"{x}, target of {name}"] = [s["targets"][name][x] for s in seeds]
        found[f"{x}, end of {name}"] = [s[name][-1][x] for s in seeds]
    found["KL at a = 1 over 05's"] = [s["between"][-1]["kl"] / s["PPO"][-1]["kl"] for s in seeds]
    return {what: x for what, each in found.items() if (x := [v for v in each if v == v])}
