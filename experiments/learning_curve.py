"""How good is the reward model with fewer labels?

    python -m experiments.learning_curve   # after 02_sample_label.py; `python -m report` draws it

Train the last phase of 03 (a person's labels if there are any, else the machine's labels of whole
samples) on 300, 1,600, 6,400 and all of its labels. Each number of labels is tried three times:
from the base model, from the base model with a loss on the last token alone (03's --no-spans), and
after the phases before it. A bag of words stands beside: on these labels alone, and with the labels
of the phases before. Fewer labels get more passes. Everything else is the phase's own schedule. AUC
is measured on the same held-out samples. Writes out/curve.json.
"""
import copy
import importlib
from dataclasses import replace

import numpy as np

from model import as_json, finish, load, start, write

rm = importlib.import_module("03_reward_model")


def learning_curve(base, phases: list, test: list[dict], cfg, sizes=(300, 1600, 6400)) -> list:
    """-> for each number of labels, the AUC on `test` of three reward models, two bags of words."""
    *before, last = phases
    started = copy.deepcopy(base)
    for phase in before:
        rm.train(started, phase, cfg)
    known = [item for phase in before for item in phase.items]
    labelled = [item for item in last.items if item["part"] == "train"]
    target = np.array([item["target"] for item in test])
    curve = []
    for n in (*(n for n in sizes if n < len(labelled)), len(labelled)):
        few = replace(last, name=f"{n} labels", items=labelled[:n],
                      epochs=last.epochs * min(8, (len(labelled) / n) ** 0.5))
        row = {"labels": n,
               "bag_alone": rm.auc(rm.bag_of_words(few.items, test), target),
               "bag_after": rm.auc(rm.bag_of_words(known + few.items, test), target)}
        last_token = replace(few, items=[item | {"spans": ()} for item in few.items])
        for name, model, phase in (("last_token", base, last_token), ("alone", base, few),
                                   ("after", started, few)):
            model = copy.deepcopy(model)
            rm.train(model, phase, cfg)
            row[name] = rm.auc(rm.predict(model, test)[:, 0], target)
        print("AUC with {labels} labels: {alone:.3f} alone, {last_token:.3f} from the last token, "
              "{after:.3f} after the phases before; bag of words {bag_alone:.3f} and "
              "{bag_after:.3f}".format(**row), flush=True)
        curve.append(row)
    return curve


if __name__ == "__main__":
    cfg, device, dtype = start(rm.Config, __doc__, rm.ON_GPU)
    rm.check(cfg)
    base, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    items = rm.prepare(rm.read_all_labels(cfg, base, tokenizer), cfg, tokenizer)
    phases = rm.phases_of(items, cfg)
    people = phases[-1].cross_validated
    test = [item for item in items if item["part"] == "test" and (item["person"] or not people)]
    write(cfg.out / "curve.json", as_json(learning_curve(base, phases, test, cfg)))
    finish("python -m report")
