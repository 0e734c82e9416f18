"""How good is the reward model with fewer labels?

    python -m benchmarks.learning_curve              # after 02_sample_label.py; the next 05 draws it

The last phase of 03 (a person's labels if there are any, else the machine's of whole samples), on 400,
1,600, 6,400 and all of them: once alone, from the base model, and once after the phases before it.
Few labels get more passes, as they would from anyone who has only them; all else is the phase's own
schedule. AUC on the same held-out samples. Writes out/curve.json.
"""
import copy
import importlib
import json
from dataclasses import replace

import numpy as np

from model import load
from running import finish, start, write

rm = importlib.import_module("03_reward_model")


def learning_curve(base, phases: list, cfg, sizes: tuple[int, ...] = (400, 1600, 6400)) -> list[dict]:
    """phases of items that have their part. -> for each number of labels the AUC of three models."""
    *before, last = phases
    started = copy.deepcopy(base)
    for phase in before:
        rm.train(started, phase, cfg)
    labelled = [item for item in last.items if item["part"] == "train"]
    val = [item for item in last.items if item["part"] == "val"]
    test = [item for item in last.items if item["part"] == "test"]
    tokens, _, _ = rm.tensors(test, base.head.device)
    target = np.array([item["target"] for item in test])
    curve = []
    for n in (*(n for n in sizes if n < len(labelled)), len(labelled)):
        few = replace(last, name=f"{n} labels", items=labelled[:n] + val,
                      epochs=last.epochs * min(8, (len(labelled) / n) ** 0.5))
        row = {"labels": n, "bag_of_words": rm.auc(rm.naive_bayes(labelled[:n], test), target)}
        for name, model in (("alone", base), ("after", started)):
            model = copy.deepcopy(model)
            rm.train(model, few, cfg)
            row[name] = rm.auc(rm.predict(model, tokens)[:, 0], target)
        print("AUC with {labels} labels: {alone:.3f} alone, {after:.3f} after the phases before, bag of "
              "words {bag_of_words:.3f}".format(**row), flush=True)
        curve.append(row)
    return curve


if __name__ == "__main__":
    cfg, device, dtype = start(rm.Config, __doc__, rm.ON_GPU)
    rm.check(cfg)
    base, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    items = rm.pool(rm.read_all_labels(cfg, base, tokenizer), cfg.machine_weight)
    for item, part in zip(items, rm.split(items, cfg.seed, cfg.test_share, cfg.val_share)):
        item["part"] = part
    write(cfg.out / "curve.json", json.dumps(learning_curve(base, rm.phases_of(items, cfg), cfg)))
    finish("python 05_eval.py", cfg.out)
