"""Stage 3: fine-tune a copy of the base model into a reward model for sentiment.

    python 03_reward_model.py               # 122 s: AUC .886 against VADER on held-out samples
    python 03_reward_model.py --labels out/labels-vader*.jsonl  # of these, not of all labels
    python 03_reward_model.py --comparisons # from pairs: which is the happier

Reads   out/base.safetensors, out/labels-*.jsonl (or comparisons-*.jsonl)
Writes  out/reward.safetensors, out/03.jsonl

Decisions a reader may question:
1. Sentiment is the next token: after the last token of a sample the model predicts <|happy|> or
   <|sad|>, logits restricted to the two. Loss on that position alone; a neutral label is the soft
   target (.5, .5), whose cross-entropy has its minimum at ln 2.
2. A few hundred labels leave a small model near chance on its own samples. So a person's labels
   fine-tune a model that was first trained on the machine's (VADER's): on its pieces of 16 tokens,
   from which it learns what words mean, then on its samples (--no-machine-first: all samples at
   once, and no pieces).
3. The embedding learns a hundred times faster than the matrices: sentiment is a property of words,
   and its rows have a large norm. (VADER is itself a sum over words, and a bag of words fitted to
   its labels in seconds is ahead of this model: AUC .926 against .886.)
4. Training and test parts are split by text: no sample has a duplicate on the other side, and its
   pieces stay on its side. Comparisons are split by pair: a sample is in one pair only. A person's
   labels are too few to spare a tenth: they are cross-validated, and then all train the model.
5. Accuracy and AUC leave neutral items out, which have no right answer. NLL, Brier score and
   calibration count them as one half.
6. A sample that continues a prompt is read with it, as people read it; its pieces are not: all but
   the first begin in the middle.
"""
import copy
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.bag_of_words import bag_of_words
from model import GPT, chunked, load, save
from running import (Log, UserError, auc, auc_lead, bootstrap, calibration, check_signs, finish,
                     require, settings_of, start, wilson)
from running.stages import fingerprint
from running.text import pad, parse_labels, sides

TARGET = {"positive": 1.0, "neutral": 0.5, "negative": 0.0,  # p(happy) that a label asks for
          "left": 1.0, "tie": 0.5, "right": 0.0}             # p(left is happier), of a comparison


@dataclass
class Config:
    labels: tuple[Path, ...] = ()  # label files; empty: every labels- or comparisons-*.jsonl
    comparisons: bool = False      # learn from pairs instead: every comparisons-*.jsonl
    machine_first: bool = True     # train on machine labels, then on people's; else on all at once
    machine_weight: float = 0.2    # of a machine's label; a person's has 1
    out: Path = Path("out")        # where all stages write
    seed: int = 0
    batch_tokens: int = 1024       # tokens of an optimizer step
    piece_epochs: float = 1.0      # over the machine's labels of pieces
    epochs: float = 1.0            # over the machine's labels of samples
    person_epochs: float = 12.0    # over a person's, of which there are few
    person_rate: float = 0.03      # of lr and head_lr then: few labels should move words alone
    lr: float = 1e-3               # matrices
    embed_lr: float = 0.1          # its rows have a large norm: a smaller rate moves no word
    head_lr: float = 0.01
    warmup: int = 50               # steps
    test_share: float = 0.1        # held out for the figures reported, if no person's are there


ON_GPU = dict(batch_tokens=4096, lr=1.5e-3, embed_lr=0.15, head_lr=0.015)


def check(cfg: Config) -> None:
    check_signs(cfg, positive="batch_tokens piece_epochs epochs person_epochs warmup test_share",
                not_negative="lr embed_lr head_lr machine_weight person_rate")
    require(cfg.test_share < 1, "--test-share must be below 1")


# ---- Labels --------------------------------------------------------------------------------------
def read_labels(path: Path) -> list[dict]:
    """Rows of one label file, the last line about an item counting; undone and skipped ones left
    out. Raises UserError that names a bad line."""
    require(path.exists(), f"{path} is missing: run 02_sample_label.py first")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = parse_labels(lines)
    if found is None:
        number, line = next((n, x) for n, x in enumerate(lines, 1) if parse_labels([x]) is None)
        raise UserError(f"{path} line {number} is broken ({line[:40]!r}): mend or delete it")
    rows: dict[str, dict] = {}
    for number, row in enumerate(found, 1):
        key, label = row["id"], row["label"]
        rows.pop(key, None)
        if label in TARGET:
            rows[key] = row
        else:
            require(label in ("skip", "undo"), f"{path} line {number}: label {label!r} is not one "
                                               f"of {', '.join(TARGET)}, skip, undo")
    return list(rows.values())


def read_all_labels(cfg: Config, base: GPT, tokenizer) -> list[dict]:
    """Rows of all label files. Raises UserError if there are none, or of another kind or tokenizer.
    """
    kind = "comparisons" if cfg.comparisons else "labels"
    rows = []
    for path in cfg.labels or sorted(cfg.out.glob(f"{kind}-*.jsonl")):
        new = read_labels(path)
        right_kind = all(isinstance(row["text"], str) != cfg.comparisons for row in new)
        change = "leave out" if cfg.comparisons else "use"
        require(right_kind, f"{path} does not hold {kind}: {change} --comparisons")
        tokens, texts = sides(new)
        known = all(max(side) < base.n_text for side in tokens)
        require(known and tokenizer.decode_batch(tokens) == texts,
                f"{path} was made with another tokenizer than {cfg.out}/base.safetensors: label "
                "again with 02_sample_label.py, or move the file away")
        rows += new
    require(any(row["source"] != "piece" for row in rows),
            f"there are no labels in {cfg.out}/{kind}-*.jsonl: run 02_sample_label.py first")
    return rows


def pool(rows: list[dict], machine_weight: float) -> list[dict]:
    """One item per id: target = weighted mean of its labels, weight = their sum. A person's label
    counts 1, the machine's `machine_weight`."""
    items: dict[str, dict] = {}
    for row in rows:
        item = items.setdefault(row["id"], {**row, "sum": 0.0, "weight": 0.0, "person": False})
        weight = machine_weight if row["labeller"] == "vader" else 1.0
        item["sum"] += weight * TARGET[row["label"]]
        item["weight"] += weight
        item["person"] |= row["labeller"] != "vader"
    return [item | {"target": item["sum"] / item["weight"]}
            for item in items.values() if item["weight"] > 0]


def split(items: list[dict], seed: int, test: float) -> list[str]:
    """"train" or "test" for each item, by a seeded shuffle of the distinct texts: first of those
    that a person labelled, then of the others, so that both kinds are in both parts. A piece goes
    where its sample goes. What the machine labelled of a text that a person labelled too, the text
    itself or its pieces, is "unused"."""
    text_of = {item["id"]: str(item["text"]) for item in items if item["source"] != "piece"}
    of_people = {str(item["text"]) for item in items if item["person"]}
    of_machine = {*text_of.values()} - of_people
    g = torch.Generator().manual_seed(seed)
    part = {}
    for texts in (sorted(of_people), sorted(of_machine)):
        order = torch.randperm(len(texts), generator=g).tolist()
        n_test = math.ceil(test * len(texts))
        part |= {texts[i]: "test" if k < n_test else "train" for k, i in enumerate(order)}
    parts = []
    for item in items:
        text = text_of.get(item["id"].split("#")[0])
        unused = not item["person"] and text in of_people
        parts.append("unused" if unused else part.get(text, "train"))
    return parts


def prepare(rows: list[dict], cfg: Config, tokenizer) -> list[dict]:
    """Rows of all label files -> items, each with its "part" and, after a prompt, "prompt_tokens".
    Raises UserError if some have prompts and others not."""
    items = pool(rows, cfg.machine_weight)
    for item, part in zip(items, split(items, cfg.seed, cfg.test_share)):
        item["part"] = part
    whole = [item for item in items if item["source"] != "piece"]
    prompted = [item for item in whole if "prompt" in item]
    require(len(prompted) in (0, len(whole)),
            f"{cfg.out}: samples with and without prompts: move the labels of one kind away")
    for item in prompted:
        item["prompt_tokens"] = tokenizer.encode(item["prompt"]).ids
    return items


@dataclass
class Phase:
    """What to train on, and how."""
    name: str
    items: list[dict]
    epochs: float
    rate: float = 1.0           # times the rates of matrices and head, not of the embedding
    cooldown: bool = True       # rates fall linearly to 0
    cross_validated: bool = False  # measured in five folds, then trained on all of them


def phases_of(items: list[dict], cfg: Config) -> list[Phase]:
    """items with their "part" -> the machine's pieces, its samples, and then all that people
    labelled, for whose sake nothing of the machine's need be held out; or one phase of all samples.
    The pieces do not cool down: the samples follow.
    Raises UserError where labels are too few, all the same, or of several lengths."""
    whole = [item for item in items if item["source"] != "piece"]
    person = [item for item in whole if item["person"]]
    parts = ("train", "test") if person and cfg.machine_first else ("train",)
    train = [item for item in items if item["part"] in parts]
    pieces = [item for item in train if item["source"] == "piece"]
    samples = [item for item in train if item["source"] != "piece"]
    machine = [item for item in samples if not item["person"]]
    phases = [Phase("pieces", pieces, cfg.piece_epochs, cooldown=False),
              Phase("machine", machine, cfg.epochs),
              Phase("people", person, cfg.person_epochs, cfg.person_rate, cross_validated=True)]
    if not cfg.machine_first:
        phases = [Phase("all", samples, cfg.epochs)]
    phases = [phase for phase in phases if phase.items]
    require(len(phases) > 0, "no label is left to train on: label more with 02_sample_label.py")
    for phase in phases:
        n, lengths = len(phase.items), {len(side) for side in sides(phase.items)[0]}
        targets = {item["target"] for item in phase.items}
        more = f"({phase.name}); label more with 02_sample_label.py"
        require(n >= 20, f"only {n} labels, at least 20 are needed {more}")
        require(len(targets) > 1, f"all labels are the same {more}")
        require(len(lengths) == 1, f"samples of several lengths {more}")
    return phases


# ---- Measures ------------------------------------------------------------------------------------
def measures(log_p: np.ndarray, target: np.ndarray) -> dict:
    """log_p (N, 2), target (N,) in [0, 1] -> accuracy and AUC, each with its 95 % interval, NLL
    (nats), Brier score."""
    p = np.exp(log_p[:, 0])
    clear = np.abs(target - 0.5) > 0.1
    n_clear = int(clear.sum())
    right = int(((p > 0.5) == (target > 0.5))[clear].sum())
    return {"n": len(target), "accuracy": right / max(n_clear, 1),
            "accuracy_interval": wilson(right, n_clear), "auc": auc(p, target),
            "auc_interval": bootstrap(lambda i: auc(p[i], target[i]), len(p)),
            "nll": float(-(target * log_p[:, 0] + (1 - target) * log_p[:, 1]).mean()),
            "brier": float(((p - target) ** 2).mean())}


def cross_validate(fit: Callable, items: list[dict], seed: int, folds: int = 5) -> np.ndarray:
    """fit(train, test) -> a prediction for each item of test. -> one for each item, (N, ...), by a
    fit to the other folds; items of one text are in one fold."""
    texts = sorted({str(item["text"]) for item in items})
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    fold_of = {texts[i]: k % folds for k, i in enumerate(order)}
    fold = np.array([fold_of[str(item["text"])] for item in items])
    predicted = [None] * len(items)
    for k in range(folds):
        rest = [item for item, its in zip(items, fold) if its != k]
        held_out = np.flatnonzero(fold == k)
        if len(held_out):
            for i, value in zip(held_out, fit(rest, [items[i] for i in held_out])):
                predicted[i] = value
    return np.array(predicted)


# ---- Training ------------------------------------------------------------------------------------
def sentiment_loss(log_p: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy, nats. log_p (B, 2) of two answers, target (B,) = p(first)."""
    nll = -(target * log_p[:, 0] + (1 - target) * log_p[:, 1])
    return (weight * nll).sum() / weight.sum()


def log_probs(model: GPT, tokens: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """tokens (N, T) after prompt (N, P) -> (N, 2): log p(happy), log p(sad). Pairs (N, 2, T), both
    after one prompt -> (N, 2): log p(the left is the happier), log p(the right is), by Bradley &
    Terry 1952: the difference of the two scores log p(happy) - log p(sad) is the logit."""
    if tokens.dim() == 2:
        return model.sentiment(tokens, prompt)
    happy, sad = model.sentiment(tokens.flatten(0, 1), prompt.repeat_interleave(2, 0)).unbind(-1)
    left, right = (happy - sad).view(-1, 2).unbind(-1)                             # (N,) each
    return F.logsigmoid(torch.stack((left - right, right - left), -1))


def predict(model: GPT, items: list[dict]) -> np.ndarray:
    """-> log-probs (N, 2) of the two answers about each item."""
    tokens, prompt, _, _ = tensors(items, model.head.device)
    log_p = chunked(lambda y, prompt: log_probs(model, y, prompt), 256, tokens, prompt)
    return log_p.numpy(force=True)


def tensors(items: list[dict], device) -> tuple[torch.Tensor, ...]:
    """-> tokens (N, T), or (N, 2, T) of pairs; prompt (N, P), P may be 0; target, weight (N,)."""
    return (torch.tensor(np.array([item["tokens"] for item in items]), device=device),
            pad([item.get("prompt_tokens", []) for item in items]).to(device),
            torch.tensor([item["target"] for item in items], device=device),
            torch.tensor([item["weight"] for item in items], device=device))


def train(model: GPT, phase: Phase, cfg: Config, log=None, first: int = 0) -> int:
    """Fine-tune model, in place. log(step=first, ...), log(step=first + 1, ...), ... -> steps."""
    tokens, prompt, target, weight = tensors(phase.items, model.head.device)
    batch = max(1, cfg.batch_tokens // tokens[0].numel())
    per_epoch = math.ceil(len(tokens) / batch)
    steps = math.ceil(phase.epochs * per_epoch)
    matrices = {"params": list(model.blocks.parameters()), "peak_lr": cfg.lr * phase.rate}
    embedding = {"params": [model.embed.weight], "peak_lr": cfg.embed_lr}
    head = {"params": [model.head], "peak_lr": cfg.head_lr * phase.rate}
    optimizer = torch.optim.AdamW([matrices, embedding, head], betas=(0.9, 0.98), weight_decay=0)
    bar = tqdm(range(steps), desc=phase.name, mininterval=1)
    for step in bar:
        epoch, i = divmod(step, per_epoch)
        g = torch.Generator().manual_seed(cfg.seed * 1000 + epoch)
        order = torch.randperm(len(tokens), generator=g)
        b = order[i * batch:(i + 1) * batch].to(tokens.device)
        loss = sentiment_loss(log_probs(model, tokens[b], prompt[b]), target[b], weight[b])
        loss.backward()
        scale = min(1.0, (step + 1) / cfg.warmup)
        if phase.cooldown:
            scale *= 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if log:
            log(phase=phase.name, step=first + step, loss=loss.item(), lr_scale=scale)
    require(math.isfinite(loss.item()), "the loss is not a number: lower --lr and --embed-lr")
    return steps


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    check(cfg)
    model, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    base = fingerprint(model)

    # -- labels: read, pool, split
    rows = read_all_labels(cfg, model, tokenizer)
    for labeller, n in Counter(row["labeller"] for row in rows).items():
        labels = Counter(row["label"] for row in rows if row["labeller"] == labeller)
        print(f"{labeller}: {n} labels,", ", ".join(f"{k} {v}" for k, v in labels.items()))
    items = prepare(rows, cfg, tokenizer)
    whole = [item for item in items if item["source"] != "piece"]

    # -- training, phase after phase; and predictions of what was not trained on
    *before, last = phases_of(items, cfg)
    log = Log(cfg.out / "03.jsonl")
    steps = 0
    for phase in before:
        steps += train(model, phase, cfg, log, first=steps)
    known = [item for phase in before for item in phase.items]

    def reward_model(train_items, test):
        fitted = copy.deepcopy(model)
        train(fitted, replace(last, items=train_items), cfg)
        return predict(fitted, test)

    def baseline(train_items, test):
        return bag_of_words(known + train_items, test)

    if last.cross_validated:
        test = last.items
        log_p = cross_validate(reward_model, test, cfg.seed)                       # (N, 2)
        bag = cross_validate(baseline, test, cfg.seed)                             # (N,)
        steps += train(model, last, cfg, log, first=steps)
    else:
        test = [item for item in whole if item["part"] == "test"]
        steps += train(model, last, cfg, log, first=steps)
        log_p, bag = predict(model, test), baseline(last.items, test)

    # -- held-out figures, all and per source, against the bag of words
    target = np.array([item["target"] for item in test])
    p = np.exp(log_p[:, 0])
    metrics = {}
    for source in ("all", *sorted({item["source"] for item in test})):
        here = np.array([source in ("all", item["source"]) for item in test])
        m = metrics[source] = measures(log_p[here], target[here])
        m["bag_of_words_auc"] = auc(bag[here], target[here])
        m["auc_lead_interval"] = bootstrap(auc_lead(p[here], bag[here], target[here]), m["n"])
        print("{how}, {source}: n {n}, accuracy {accuracy:.3f} {accuracy_interval}, AUC {auc:.3f} "
              "{auc_interval}, bag of words {bag_of_words_auc:.3f}, lead {auc_lead_interval}, NLL "
              "{nll:.3f}, Brier {brier:.3f}".format(
                  how="cross-validated" if last.cross_validated else "held out", source=source,
                  **{k: "[{:.3f}, {:.3f}]".format(*v) if "interval" in k else v
                     for k, v in m.items()}))
    table = calibration(p, target)
    answer = "the left is happier" if cfg.comparisons else "happy"
    print(f"calibration: p({answer}) predicted -> labelled (n):",
          ", ".join(f"{r['predicted']:.2f} -> {r['target']:.2f} ({r['n']})" for r in table))

    labelled = [(item["id"], item["target"], item["weight"]) for item in items]
    labels = hashlib.sha256(json.dumps(labelled).encode()).hexdigest()
    save(cfg.out / "reward.safetensors", model, tokenizer, step=steps,
         kind="comparisons" if cfg.comparisons else "labels", prompted="prompt" in whole[0],
         length=np.shape(test[0]["tokens"])[-1], metrics=metrics, calibration=table,
         settings=settings_of(cfg), inputs={"base": base, "labels": labels})
    finish("python 04_ppo.py", cfg.out)
