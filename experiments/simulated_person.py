"""Do 300 labels of one person move the reward model towards that person?

    python -m experiments.simulated_person --out out-0     # a finished run; 35 minutes on one core

The person is simulated, so we know where it disagrees: it feels like VADER, except that ten
frequent words mean the opposite to it. It labels 300 samples. 03_reward_model.py then runs all its
phases again, the person's last. The models before and after are asked about fresh samples that
nobody has labelled.

Then the last phase runs alone, several times: on 75 to 1,200 labels, and on 300 labels of which a
share is replaced by another answer. Writes out/experiments/simulated_person.json.
"""
import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments.shared.simulated_people import FLIPPED, label, person, rm, targets
from model import as_json, jsonl, load, start, write
from people.answers import read_items

ROOT = Path(__file__).parent.parent
ANSWERS = ("positive", "negative", "neutral")


@dataclass
class Config:
    out: Path = Path("out")  # a finished run
    n: int = 300             # labels of the person
    fresh: int = 8192        # samples to compare on
    labels: tuple[int, ...] = (75, 150, 300, 600, 1200)
    careless: tuple[float, ...] = (0.1, 0.2, 0.4)  # shares of n labels that become another one
    repeats: int = 3         # of each, with other items
    seed: int = 0


def labelled(items: list[dict], feels, careless: float, seed: int) -> list[dict]:
    """The items with the answers of a person who feels so; a share `careless` is another answer."""
    rng, rows = random.Random(seed), []
    for item, compound in zip(items, feels([item["text"] for item in items])):
        answer = label.feeling(compound)
        if rng.random() < careless:
            answer = rng.choice([other for other in ANSWERS if other != answer])
        rows.append(item | {"label": answer, "labeller": "simulated"})
    return rows


if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__)
    vader, hers = person(()), person(FLIPPED)
    work = cfg.out / "simulated-person"
    work.mkdir(exist_ok=True)
    for name in ("base.safetensors", "labels-vader.jsonl"):
        shutil.copy(cfg.out / name, work)
    items = read_items(cfg.out, "labels", cfg.seed)[: cfg.n]
    write(work / "labels-simulated.jsonl", jsonl(labelled(items, hers, 0, cfg.seed)))
    subprocess.run([sys.executable, "03_reward_model.py", "--out", str(work.resolve()),
                    "--seed", str(cfg.seed)], cwd=ROOT, check=True)

    # Before and after, on fresh samples
    base, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    tokens, _ = base.generate(cfg.fresh, len(items[0]["tokens"]), seed=cfg.seed << 32 | 6 << 24)
    texts = tokenizer.decode_batch(tokens.tolist())
    target = targets(hers(texts))
    asked = [{"tokens": y, "target": t, "weight": 1.0} for y, t in zip(tokens.tolist(), target)]
    differ = target != targets(vader(texts))
    result = {"labels": cfg.n, "fresh samples": cfg.fresh,
              "share on which person and VADER differ": float(differ.mean())}
    for name, path in (("before", cfg.out), ("after", work)):
        model = load(path / "reward.safetensors", "03_reward_model.py", device, dtype)[0]
        log_p = rm.predict(model, asked)
        for part, where in (("all", np.full(len(target), True)), ("where they differ", differ)):
            found = rm.measures(log_p[where], target[where])
            result[f"{name}, {part}"] = {
                k: found[k] for k in ("n", "auc", "accuracy", "accuracy_interval", "nll")}
    print(json.dumps(result, indent=1))

    # The last phase alone: fewer labels, careless labels
    stage = rm.Config(**(rm.ON_GPU if device.type == "cuda" else {}))
    result["last phase alone"] = []
    for n, careless in (*((n, 0.0) for n in cfg.labels), *((cfg.n, x) for x in cfg.careless)):
        aucs = []
        for repeat in range(cfg.repeats):
            items = read_items(cfg.out, "labels", repeat)[:n]
            rated = rm.pool(labelled(items, hers, careless, repeat), 0)
            phase, = rm.phases_of([item | {"part": "train"} for item in rated], stage)
            model = load(cfg.out / "reward.safetensors", "03_reward_model.py", device, dtype)[0]
            rm.train(model, phase, stage)
            aucs.append(rm.auc(rm.predict(model, asked)[:, 0], target))
        row = {"labels": n, "replaced": careless, "auc": float(np.mean(aucs)),
               "auc_sd": float(np.std(aucs, ddof=1)) if len(aucs) > 1 else 0.0}
        result["last phase alone"].append(row)
        print("{labels} labels, {replaced:.0%} replaced: AUC {auc:.3f} +- {auc_sd:.3f}".format(
            **row), flush=True)
    write(Path("out/experiments/simulated_person.json"), as_json(
        result | {"torch": torch.__version__, "flipped words": FLIPPED}, indent=1))
