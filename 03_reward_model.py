"""Stage 3: fine-tune a copy of the base model into a reward model for sentiment.

    python 03_reward_model.py               # 103 s: AUC 0.947 against VADER, held-out samples
    python 03_reward_model.py --labels out/labels-vader*.jsonl  # only these label files
    python 03_reward_model.py --comparisons # from pairs: which of the two is happier?

Reads   out/base.safetensors, out/labels-*.jsonl (or comparisons-*.jsonl)
Writes  out/reward.safetensors, out/03.jsonl

Decisions a reader may question:
1. Sentiment is the next token. After a sample's last token the model predicts <|happy|> or <|sad|>,
   by a softmax over these two only. With one label per sample, only that position has a loss. A
   neutral label is the soft target (0.5, 0.5), so its cross-entropy is at least ln 2.
2. Each labelled prefix of a sample counts as a sample. A causal model reads all prefixes in one
   pass, so 16 labels cost as much as one. Each sign labels the text up to there (seed 0):

       an old Jack, 0  bounteous father; 0  which is dead, -  wherefore -  I a great power -
       service, sack -  and good Master +  flame, by +  cunning and no quarrel +
       to make me fight -  :now it -  stands upon thy kn -  ot! -  First Lord: -
       Excellent! you +  shall find of Sir +

   Where the label changes, the words since the previous label must be the reason. Training starts
   on quarters of samples, because a label of 4 to 16 tokens shows the reason best. (--no-spans
   follows the exercise to the letter: only the last token of a whole sample has a loss.)
3. With only a few hundred labels, a small reward model barely beats chance. So a person's labels
   fine-tune a model that first learned from the machine's, and replace the machine's labels of the
   same samples. (--no-machine-first: all at once.)
4. The embedding learns 300 times faster than the matrices, because sentiment is a property of
   words, and because the embedding's rows are large.
5. The last lines of output compare the model with a bag of words, which sees only word counts.
   VADER is nearly a sum over words, so a bag of words suits its labels and is hard to beat. A
   person's labels are no such sum. Still, do not conclude that the model understands what it reads.
6. We split by text, so no training sample has a duplicate in the test part. A person's labels are
   too few to hold out a tenth. We cross-validate them, then train on all of them.
7. Accuracy and AUC leave out neutral items, which have no right answer. AUC is the chance that a
   positive item scores above a negative one. NLL (negative log-likelihood), Brier score (squared
   error) and calibration count neutral as 0.5.
8. The model reads a prompted sample after its prompt, as people do, but quarters without it.
"""
import copy
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse, stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from tqdm import tqdm

from model import (
    GPT,
    UserError,
    check_numbers,
    chunked,
    command,
    files_of,
    fingerprint,
    finish,
    jsonl,
    last_of_each,
    latest,
    load,
    only_writer,
    pad,
    provenance,
    read_rows,
    require,
    save,
    start,
    words,
    write,
)

LABELS = {"positive": 1.0, "neutral": 0.5, "negative": 0.0}  # p(happy) that a label stands for
COMPARISONS = {"left": 1.0, "tie": 0.5, "right": 0.0}         # of a pair: p(left is happier)
TARGET = LABELS | COMPARISONS


@dataclass
class Config:
    labels: tuple[Path, ...] = ()  # label files; empty: every labels- or comparisons-*.jsonl
    comparisons: bool = False      # learn from pairs instead: every comparisons-*.jsonl
    machine_first: bool = True     # train on machine labels, then on people's; else on all at once
    spans: bool = True             # also learn from the machine's labels of parts of samples
    machine_weight: float = 0.2    # weight of a machine's label; a person's label has 1
    out: Path = Path("out")        # where all stages write
    seed: int = 0
    batch_tokens: int = 1024       # tokens per optimizer step
    quarter_epochs: float = 0.5    # passes over the quarters of samples that the machine labelled
    epochs: float = 1.0            # passes over the samples themselves
    person_epochs: float = 12.0    # passes over people's labels, which are few
    person_rate: float = 0.1       # with people's labels, lr and head_lr are multiplied by this
    lr: float = 3e-4               # learning rate of the matrices
    embed_lr: float = 0.1          # large, because the embedding's rows are large
    head_lr: float = 0.01
    warmup: int = 50               # steps of linear warm-up
    test_share: float = 0.1        # fraction held out to measure on, if no person labelled


ON_GPU = dict(batch_tokens=4096, lr=4.5e-4, embed_lr=0.15, head_lr=0.015)


def check(cfg: Config) -> None:
    check_numbers(cfg, positive=("batch_tokens", "quarter_epochs", "epochs", "person_epochs",
                                 "warmup", "test_share"),
                  not_negative=("lr", "embed_lr", "head_lr", "machine_weight", "person_rate"))
    require(cfg.test_share < 1, "--test-share must be below 1")
    for path in cfg.labels:
        require(path.is_file(), f"--labels {path} is not a file")


# ---- Labels --------------------------------------------------------------------------------------
def sides(rows: list[dict], key: str) -> list:
    """row["text"] or row["tokens"] of each row; a pair has two, left and right."""
    found = []
    for row in rows:
        found += [row[key]] if isinstance(row["text"], str) else row[key]
    return found


def right(row: dict) -> bool:
    """Whether a row holds what this stage needs. May raise ValueError, KeyError or TypeError."""
    texts, tokens = sides([row], "text"), sides([row], "tokens")
    names = [row["id"], row["labeller"], row["source"], row.get("prompt", ""), *texts]
    known = LABELS if isinstance(row["text"], str) else COMPARISONS
    if row["label"] not in (*known, "skip", "undo"):
        raise ValueError(f"label {row['label']!r} is not one of {', '.join(known)}, skip, undo")
    for first, end, label in row.get("spans", ()):
        if label not in known or not (type(first) is type(end) is int
                                      and 0 <= first < end <= len(tokens[0])):
            raise ValueError(f"span {[first, end, label]}")
    return (len(texts) == len(tokens) == (1 if isinstance(row["text"], str) else 2)
            and all(isinstance(name, str) for name in names)
            and all(side and all(type(t) is int and t >= 0 for t in side) for side in tokens))


def read_labels(path: Path) -> list[dict]:
    """The last row about each item in one label file; its label may be "undo" or "skip". Raises
    UserError if a line is bad, and names the line."""
    made_by = "02_sample_label.py" if path.stem.endswith("-vader") else ""
    rows = last_of_each(read_rows(path, made_by, right))
    for name in sorted({row["labeller"] for row in rows} if "-" in path.stem else ()):
        if not path.stem.partition("-")[2].casefold().startswith(name.casefold()):
            print(f"warning: {path} holds labels of {name}, and they count as {name}'s",
                  file=sys.stderr)
    return rows


def fits(row: dict, base: GPT, tokenizer) -> bool:
    """Whether the text of a row is that of its tokens."""
    tokens = sides([row], "tokens")
    known = max(map(max, tokens)) < base.n_text
    return known and tokenizer.decode_batch(tokens) == sides([row], "text")


def read_all_labels(cfg: Config, base: GPT, tokenizer) -> list[dict]:
    """Rows of all label files. Raises UserError if there are none, or if a file holds the other
    kind of labels or was made with another tokenizer."""
    kind = "comparisons" if cfg.comparisons else "labels"
    rows = []
    for path in cfg.labels or files_of(cfg.out, kind):
        new = read_labels(path)
        right_kind = all(isinstance(row["text"], str) != cfg.comparisons for row in new)
        change = "leave out" if cfg.comparisons else "use"
        require(right_kind, f"{path} does not hold {kind}: {change} --comparisons")
        other = [row["id"] for row in new if not fits(row, base, tokenizer)]
        if other:
            raise UserError(f"{path}: the text of {len(other)} of {len(new)} samples is not that "
                            f"of its tokens, first of {other[0]}: an editor changed it, or another "
                            f"tokenizer than that of {cfg.out}/base.safetensors made it. Mend "
                            "these lines, or move the file away")
        rows += new
    given = latest(rows)
    if len(given) < len(rows):
        print(f"{len(rows) - len(given)} labels are in another file too: the later one counts")
    rows = [row for row in given if row["label"] in TARGET]
    files = ", ".join(map(str, cfg.labels)) or f"{cfg.out}/{kind}-*.jsonl"
    script = "02_sample_label.py --compare" if cfg.comparisons else "02_sample_label.py"
    require(rows, f"there are no labels in {files}: run {command(script)} first")
    return rows


def pool(rows: list[dict], machine_weight: float) -> list[dict]:
    """One item per id: target = weighted mean of its labels, weight = sum of their weights. A
    person's label weighs 1, the machine's `machine_weight`."""
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
    """"train" or "test" for each item, by a seeded shuffle of the distinct texts. Texts that people
    labelled are shuffled separately, so both parts get both kinds. If a person labelled a
    text, the machine's items with this text are "unused"."""
    of_people = {str(item["text"]) for item in items if item["person"]}
    of_machine = {str(item["text"]) for item in items} - of_people
    g = torch.Generator().manual_seed(seed)
    part = {}
    for texts in (sorted(of_people), sorted(of_machine)):
        order = torch.randperm(len(texts), generator=g).tolist()
        n_test = math.ceil(test * len(texts))
        part |= {texts[i]: "test" if k < n_test else "train" for k, i in enumerate(order)}
    return ["unused" if not item["person"] and str(item["text"]) in of_people
            else part[str(item["text"])] for item in items]


def prepare(rows: list[dict], cfg: Config, tokenizer) -> list[dict]:
    """Turn the rows of all label files into items. Add "part", "quarters" (none if a person
    labelled the item) and, if there are prompts, "prompt_tokens". Raises UserError if only some
    items have prompts, or if they differ in length."""
    if cfg.machine_first:  # the machine has its own phases: a person's label replaces its label
        people = {row["id"] for row in rows if row["labeller"] != "vader"}
        rows = [row for row in rows if row["labeller"] != "vader" or row["id"] not in people]
    items = pool(rows, cfg.machine_weight)
    for item, part in zip(items, split(items, cfg.seed, cfg.test_share)):
        item["part"] = part
        item["spans"] = item.get("spans", ()) if cfg.spans and not item["person"] else ()
        item["quarters"] = quarters(item, tokenizer)
    lengths = {len(side) for side in sides(items, "tokens")}
    require(len(lengths) <= 1, "samples of several lengths: move the labels of one length away")
    prompted = [item for item in items if "prompt" in item]
    require(len(prompted) in (0, len(items)),
            f"{cfg.out}: samples with and without prompts: move the labels of one kind away")
    for item in prompted:
        item["prompt_tokens"] = tokenizer.encode(item["prompt"]).ids
    return items


def quarters(item: dict, tokenizer) -> list[dict]:
    """The quarters of a sample, as items of their own with the spans that start where they do."""
    spans, found = item.get("spans", ()), []
    starts = sorted({first for first, _, _ in spans})
    for first in starts if len(starts) > 1 else ():
        last = first + starts[1]
        inside = [(0, end - first, label) for begin, end, label in spans
                  if begin == first and end <= last]
        if not inside:
            continue
        tokens = [side[first:last] for side in sides([item], "tokens")]
        texts = tokenizer.decode_batch(tokens)
        if len(texts) == 1:  # not a pair
            (tokens,), (texts,) = tokens, texts
        found.append({"id": item["id"], "text": texts, "tokens": tokens, "spans": inside,
                      "target": TARGET[max(inside)[2]], "weight": item["weight"], "person": False})
    return found


@dataclass
class Phase:
    """What to train on, and how."""
    name: str
    items: list[dict]
    epochs: float
    rate: float = 1.0           # factor on lr and head_lr, not on embed_lr
    cooldown: bool = True       # rates fall linearly to 0
    cross_validated: bool = False  # measured in five folds, then trained on all of them


def phases_of(items: list[dict], cfg: Config) -> list[Phase]:
    """Split the training into up to three phases: quarters of the samples that the machine
    labelled, these samples whole, then what people labelled. Without machine_first, one phase has
    all samples. If people labelled any, no machine label is held out. The learning rates do not
    fall at the end of the quarters, because training goes on. Raises UserError if labels are too
    few or all the same."""
    person = [item for item in items if item["person"]]
    parts = ("train", "test") if person and cfg.machine_first else ("train",)
    train = [item for item in items if item["part"] in parts]
    machine = [item for item in train if not item["person"]]
    phases = [Phase("all", train, cfg.epochs)]
    if cfg.machine_first:
        short = [quarter for item in machine for quarter in item.get("quarters", ())]
        phases = [Phase("quarters", short, cfg.quarter_epochs, cooldown=False),
                  Phase("samples", machine, cfg.epochs),
                  Phase("people", person, cfg.person_epochs, cfg.person_rate, cross_validated=True)]
    phases = [phase for phase in phases if phase.items]
    require(len(phases) > 0, "no label is left to train on: label more, for example with "
            f"{command('-m people label NAME')}")
    for phase in phases[:-1]:
        if why := fault(phase):
            print(f"warning: {why}: these labels are left out", file=sys.stderr)
    phases = [phase for phase in phases[:-1] if not fault(phase)] + phases[-1:]
    require(not fault(phases[-1]), f"{fault(phases[-1])}: label more, for example with "
            f"{command('-m people label NAME')}")
    return phases


def fault(phase: Phase) -> str:
    """Why this phase cannot teach anything; "" if it can."""
    target = np.array([item["target"] for item in phase.items])
    clear = int((np.abs(target - 0.5) > 0.1).sum())
    if len(target) < 20:
        return f"only {len(target)} labels ({phase.name}), at least 20 are needed"
    if (target == target[0]).all():
        return f"all labels are the same ({phase.name})"
    if clear < 10:
        return (f"only {clear} of {len(target)} labels ({phase.name}) are not neutral, at least 10 "
                "are needed (VADER, which labels by default, reads English only)")
    return ""


# ---- Measures ------------------------------------------------------------------------------------
def auc(score: np.ndarray, target: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive item scores above a negative one, by
    ranks (Mann & Whitney 1947). nan if either kind is missing."""
    clear = np.abs(target - 0.5) > 0.1  # not neutral; a mean of labels can be nearly neutral
    happy = target[clear] > 0.5
    if np.isnan(score).any():
        return math.nan
    n, m = happy.sum(), (~happy).sum()
    ranks = stats.rankdata(score[clear])[happy]
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m)) if n and m else math.nan


def interval(figure: Callable, n: int, resamples: int = 1000) -> tuple[float, float]:
    """95% percentile bootstrap interval (Efron 1979) of figure(rows), where rows are n item numbers
    drawn with replacement. Leaves out resamples whose figure is nan."""
    rng = np.random.default_rng(0)
    values = [figure(rng.integers(0, n, n)) for _ in range(resamples)]
    known = [value for value in values if not math.isnan(value)] or [math.nan]
    return tuple(np.percentile(known, (2.5, 97.5)).tolist())


def calibration(p: np.ndarray, target: np.ndarray) -> list[dict]:
    """Ten bins of p(happy): how many items, mean prediction, mean target."""
    which = np.minimum((p * 10).astype(int), 9)
    return [{"n": int((which == b).sum()), "predicted": float(p[which == b].mean()),
             "target": float(target[which == b].mean())} for b in np.unique(which)]


def measures(log_p: np.ndarray, target: np.ndarray) -> dict:
    """log_p (N, 2), target (N,) in [0, 1] -> accuracy (with Wilson's 95% interval), AUC, negative
    log-likelihood (nats), Brier score."""
    p = np.exp(log_p[:, 0])
    clear = np.abs(target - 0.5) > 0.1
    right = ((p > 0.5) == (target > 0.5))[clear]
    found = stats.binomtest(int(right.sum()), max(len(right), 1)).proportion_ci(method="wilson")
    return {"n": len(target), "accuracy": float(right.mean()) if len(right) else math.nan,
            "accuracy_interval": tuple(found), "auc": auc(p, target),
            "auc_interval": interval(lambda i: auc(p[i], target[i]), len(p)),
            "nll": float(-(target * log_p[:, 0] + (1 - target) * log_p[:, 1]).mean()),
            "brier": float(((p - target) ** 2).mean())}


def bag_of_words(train: list[dict], test: list[dict]) -> np.ndarray:
    """The baseline to beat: logistic regression on word counts (for a pair, left minus right). Each
    word has a standard normal prior. -> log-odds of the first answer, (N,)."""
    if not any(map(words, sides(train, "text"))):
        return np.full(len(test), math.nan)  # no letters, no bag of words
    counter = CountVectorizer(analyzer=words).fit(sides(train, "text"))

    def counts(items):
        x = counter.transform(sides(items, "text"))
        return x if isinstance(items[0]["text"], str) else x[::2] - x[1::2]
    target, weight = np.array([[item["target"], item["weight"]] for item in train]).T
    weight = np.concatenate((weight * target, weight * (1 - target))) / weight.mean()
    x, answer = sparse.vstack([counts(train)] * 2), np.repeat((1, 0), len(train))
    fit = LogisticRegression(max_iter=1000).fit(x, answer, weight)
    return fit.decision_function(counts(test))


def cross_validate(fit: Callable, items: list[dict], seed: int) -> np.ndarray:
    """Split items into five folds; predict each from a fit to the other four -> (N, ...).
    fit(train, test) predicts test. Items with the same text are in the same fold."""
    texts = [str(item["text"]) for item in items]
    folds = list(GroupKFold(5, shuffle=True, random_state=seed).split(items, groups=texts))
    values = [fit([items[i] for i in rest], [items[i] for i in test]) for rest, test in folds]
    order = np.concatenate([test for _, test in folds])
    return np.concatenate(values)[np.argsort(order)]


# ---- Training ------------------------------------------------------------------------------------
def sentiment_loss(log_p: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy, nats. log_p (..., 2) of two answers; target (...) = p(first),
    weight (...)."""
    nll = -(target * log_p[..., 0] + (1 - target) * log_p[..., 1])
    return (weight * nll).sum() / weight.sum()


def log_probs(model: GPT, tokens: torch.Tensor, prompt: torch.Tensor,
              each: bool = False) -> torch.Tensor:
    """tokens (N, T) after prompt (N, P) -> (N, 2): log p(happy), log p(sad). Pairs (N, 2, T) that
    share a prompt -> (N, 2): log p(left is happier), log p(right is happier). each: for every
    prefix, (N, T, 2). A side's score is log p(happy) - log p(sad). The logit of a pair is
    the left score minus the right score (Bradley & Terry 1952)."""
    if tokens.dim() == 2:
        return model.sentiment(tokens, prompt, each)
    log_p = model.sentiment(tokens.flatten(0, 1), prompt.repeat_interleave(2, 0), each)
    happy, sad = log_p.unbind(-1)
    left, right = (happy - sad).unflatten(0, (-1, 2)).unbind(1)                    # (N,) or (N, T)
    return F.logsigmoid(torch.stack((left - right, right - left), -1))


def predict(model: GPT, items: list[dict]) -> np.ndarray:
    """-> log-probs (N, 2) of the two answers about each item."""
    tokens, prompt, _, _ = tensors(items, model.head.device)
    log_p = chunked(lambda y, prompt: log_probs(model, y, prompt), 256, tokens, prompt)
    return log_p.numpy(force=True)


def tensors(items: list[dict], device) -> tuple[torch.Tensor, ...]:
    """-> tokens (N, T), or (N, 2, T) for pairs; prompt (N, P), P may be 0; target, weight (N, T).
    Position t holds the label of the prefix that ends there. Weight 0 means no label: this is the
    exercise's mask. The labels of an item share its weight equally."""
    tokens = np.array([item["tokens"] for item in items])
    target, weight = np.zeros((2, len(items), tokens.shape[-1]), dtype=np.float32)
    for i, item in enumerate(items):
        for first, end, label in item.get("spans", ()):
            if first == 0:
                target[i, end - 1], weight[i, end - 1] = TARGET[label], 1
        target[i, -1], weight[i, -1] = item["target"], 1
        weight[i] *= item["weight"] / weight[i].sum()
    prompt = pad([item.get("prompt_tokens", []) for item in items])
    return tuple(x.to(device) for x in (torch.from_numpy(tokens), prompt,
                                        torch.from_numpy(target), torch.from_numpy(weight)))


def train(model: GPT, phase: Phase, cfg: Config, log: list | None = None) -> None:
    """Fine-tune the model, in place, on one phase. Adds a row for each step to log."""
    tokens, prompt, target, weight = tensors(phase.items, model.head.device)
    each = bool(weight[:, :-1].any())
    if not each:  # only whole samples have labels
        target, weight = target[:, -1], weight[:, -1]
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
        log_p = log_probs(model, tokens[b], prompt[b], each)        # (B, T, 2), or (B, 2)
        loss = sentiment_loss(log_p, target[b], weight[b])
        loss.backward()
        scale = min(1.0, (step + 1) / cfg.warmup)
        if phase.cooldown:
            scale *= 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if log is not None:
            log.append({"phase": phase.name, "step": len(log), "loss": loss.item(),
                        "lr_scale": scale})
    require(math.isfinite(loss.item()), "the loss is not a number: lower --lr and --embed-lr")


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    check(cfg)
    only_writer(cfg.out / "reward.safetensors")
    model, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    base = fingerprint(model)

    # -- labels: read, pool, split
    rows = read_all_labels(cfg, model, tokenizer)
    for labeller, n in Counter(row["labeller"] for row in rows).items():
        labels = Counter(row["label"] for row in rows if row["labeller"] == labeller)
        print(f"{labeller}: {n} labels,", ", ".join(f"{k} {v}" for k, v in labels.items()))
    items = prepare(rows, cfg, tokenizer)

    # -- train phase by phase, then predict items that were not trained on
    *before, last = phases_of(items, cfg)
    log = []
    for phase in before:
        train(model, phase, cfg, log)
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
        train(model, last, cfg, log)
    else:
        test = [item for item in items if item["part"] == "test"]
        train(model, last, cfg, log)
        log_p, bag = predict(model, test), baseline(last.items, test)

    # -- measure on these items, all and per source, next to the bag of words
    target, p = np.array([item["target"] for item in test]), np.exp(log_p[:, 0])
    metrics = {}
    for source in ("all", *sorted({item["source"] for item in test})):
        here = np.array([source in ("all", item["source"]) for item in test])
        t, ours, bags = target[here], p[here], bag[here]
        m = metrics[source] = measures(log_p[here], t)
        m["bag_of_words_auc"] = auc(bags, t)
        m["auc_lead_interval"] = interval(lambda i: auc(ours[i], t[i]) - auc(bags[i], t[i]), len(t))
        shown = {k: "[{:.3f}, {:.3f}]".format(*v) if "interval" in k else v for k, v in m.items()}
        print("{how}, {source}: n {n}, accuracy {accuracy:.3f} {accuracy_interval}, AUC {auc:.3f} "
              "{auc_interval}, bag of words {bag_of_words_auc:.3f}, lead {auc_lead_interval}, NLL "
              "{nll:.3f}, Brier {brier:.3f}".format(source=source, **shown, how=(
                  "cross-validated" if last.cross_validated else "held out")))
    nll = metrics["all"]["nll"]
    require(nll < 5, f"diverged: {nll:.3g} nats per label, where {math.log(2):.2f} is a guess; "
            "lower --lr, --embed-lr and --head-lr")
    table = calibration(p, target)
    answer = "the left is happier" if cfg.comparisons else "happy"
    print(f"calibration: p({answer}) predicted -> labelled (n):",
          ", ".join(f"{r['predicted']:.2f} -> {r['target']:.2f} ({r['n']})" for r in table))

    labelled = [(item["id"], item["target"], item["weight"]) for item in items]
    labels = hashlib.sha256(json.dumps(labelled).encode()).hexdigest()
    write(cfg.out / "03.jsonl", jsonl(log))
    save(cfg.out / "reward.safetensors", model, tokenizer, step=len(log),
         kind="comparisons" if cfg.comparisons else "labels", prompted="prompt" in items[0],
         length=np.shape(test[0]["tokens"])[-1], metrics=metrics, calibration=table,
         inputs={"base": base, "labels": labels}, **provenance(cfg))
    finish("python 04_ppo.py")
