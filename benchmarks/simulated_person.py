"""Do 300 labels of one person move the reward model towards that person?

    python -m benchmarks.simulated_person --out out-0        # a finished run; about 20 minutes

The person is simulated, so that it is known where it disagrees: it feels like VADER, except that
ten frequent words mean the opposite to it. It labels 300 samples; 03_reward_model.py runs all its
phases again, the person's last; the models before and after are then asked about fresh samples that
nobody has labelled. Then the last phase alone, several times: on 75 to 1,200 labels, and on 300 of
which a share is replaced by another label (what does disagreement do?). Writes
benchmarks/results/simulated_person.json.
"""
import importlib
import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import load, start
from people.answers import read_items

ROOT = Path(__file__).parent.parent
FLIPPED = ("good", "love", "like", "well", "no", "great", "death", "fair", "true", "sweet")
label = importlib.import_module("02_sample_label")
rm = importlib.import_module("03_reward_model")


@dataclass
class Config:
    out: Path = Path("out")  # a finished run
    n: int = 300             # labels of the person
    fresh: int = 8192        # samples to compare on
    labels: tuple[int, ...] = (75, 150, 300, 600, 1200)
    careless: tuple[float, ...] = (0.1, 0.2, 0.4)  # shares of n labels that become another one
    repeats: int = 3         # of each, with other items
    seed: int = 0


if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__)
    vader, person = SentimentIntensityAnalyzer(), SentimentIntensityAnalyzer()
    person.lexicon |= {w: -person.lexicon[w] for w in FLIPPED}

    def feels(who, text):
        return label.feeling(who.polarity_scores(text)["compound"])

    work = cfg.out / "simulated-person"
    work.mkdir(exist_ok=True)
    for name in ("base.safetensors", "labels-vader.jsonl", "labels-vader-pieces.jsonl"):
        shutil.copy(cfg.out / name, work)
    items = read_items(cfg.out, "labels", cfg.seed)[: cfg.n]
    (work / "labels-simulated.jsonl").write_text("".join(json.dumps(
        item | {"label": feels(person, item["text"]), "labeller": "simulated"}) + "\n" for item in items))
    subprocess.run([sys.executable, "03_reward_model.py", "--out", str(work), "--seed", str(cfg.seed)], cwd=ROOT, check=True)

    base, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    tokens, _ = base.generate(cfg.fresh, len(items[0]["tokens"]), seed=cfg.seed << 32 | 6 << 24)
    texts = tokenizer.decode_batch(tokens.tolist())
    target = np.array([rm.TARGET[feels(person, t)] for t in texts])
    asked = [{"tokens": y, "target": t, "weight": 1.0} for y, t in zip(tokens.tolist(), target)]
    differ = target != np.array([rm.TARGET[feels(vader, t)] for t in texts])
    result = {"labels": cfg.n, "fresh samples": cfg.fresh, "share on which person and VADER differ": float(differ.mean())}
    for name, path in (("before", cfg.out), ("after", work)):
        model = load(path / "reward.safetensors", "03_reward_model.py", device, dtype)[0]
        log_p = rm.predict(model, asked)
        for part, where in (("all", np.full(len(target), True)), ("where they differ", differ)):
            m = rm.measures(log_p[where], target[where])
            result[f"{name}, {part}"] = {k: m[k] for k in ("n", "auc", "accuracy", "accuracy_interval", "nll")}
    print(json.dumps(result, indent=1))

    stage = rm.Config(**(rm.ON_GPU if device.type == "cuda" else {}))
    result["last phase alone"] = []
    for n, careless in (*((n, 0.0) for n in cfg.labels), *((cfg.n, share) for share in cfg.careless)):
        aucs = []
        for repeat in range(cfg.repeats):
            rng, rows = random.Random(repeat), []
            for item in read_items(cfg.out, "labels", repeat)[:n]:
                true = feels(person, item["text"])
                others = [other for other in ("positive", "negative", "neutral") if other != true]
                given = rng.choice(others) if rng.random() < careless else true
                rows.append(item | {"label": given, "labeller": "simulated"})
            rated = rm.pool(rows, 0)
            phase, = rm.phases_of([item | {"part": "train"} for item in rated], stage)
            model, _, _ = load(cfg.out / "reward.safetensors", "03_reward_model.py", device, dtype)
            rm.train(model, phase, stage)
            aucs.append(rm.auc(rm.predict(model, asked)[:, 0], target))
        row = {"labels": n, "replaced": careless, "auc": float(np.mean(aucs)),
               "auc_sd": float(np.std(aucs, ddof=1)) if len(aucs) > 1 else 0.0}
        result["last phase alone"].append(row)
        print("{labels} labels, {replaced:.0%} replaced: AUC {auc:.3f} +- {auc_sd:.3f}".format(**row), flush=True)
    (ROOT / "benchmarks" / "results" / "simulated_person.json").write_text(json.dumps(
        result | {"torch": torch.__version__, "flipped words": FLIPPED}, indent=1))
