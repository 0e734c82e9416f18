"""Stage 3: fine-tune a copy of the base model into a reward model for sentiment.

    python 03_reward_model.py               # 97 s: AUC .886 against VADER on held-out samples
    python 03_reward_model.py --labels out/labels-anna.jsonl out/labels-vader.jsonl
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
   and its rows have a large norm. One rate of 5e-4 for everything ends below the bag of words.
4. Train, validation and test parts are split by text: no sample has a duplicate on the other side,
   and its pieces stay on its side. Comparisons are split by pair: a sample is in one pair only.
5. Accuracy and AUC leave neutral items out, which have no right answer. NLL, Brier score and
   calibration count them as one half.
"""
import copy
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import GPT, chunked, fingerprint, load, save
from running import Log, UserError, finish, require, settings_of, start

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
    patience: int = 12             # early stopping: evaluations (4 an epoch) without improvement
    test_share: float = 0.1        # held out for the figures reported
    val_share: float = 0.05        # held out to stop early and to choose the best step


ON_GPU = dict(batch_tokens=4096, lr=1.5e-3, embed_lr=0.15, head_lr=0.015)


def check(cfg: Config) -> None:
    for knob in ("batch_tokens", "piece_epochs", "epochs", "person_epochs", "warmup", "test_share",
                 "val_share"):
        require(getattr(cfg, knob) > 0, f"--{knob.replace('_', '-')} must be positive")


# ---- Labels --------------------------------------------------------------------------------------
def read_labels(path: Path) -> list[dict]:
    """Rows of one label file, the last line about an item counting; undone and skipped ones left
    out. Raises UserError that names the first bad line."""
    require(path.exists(), f"{path} is missing: run 02_sample_label.py first")
    rows: dict[str, dict] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key, label, *_ = (str(row[k]) for k in ("id", "label", "labeller", "source", "text"))
            tokens = np.array(row["tokens"], dtype=int)  # (length,), or (2, length) of a comparison
            single = isinstance(row["text"], str)
            if not tokens.size or tokens.min() < 0 or tokens.ndim != (1 if single else 2):
                raise ValueError("tokens")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} line {number} is broken ({line[:40]!r}): mend or delete it") \
                from error
        rows.pop(key, None)
        if label in TARGET:
            rows[key] = row
        else:
            require(label in ("skip", "undo"), f"{path} line {number}: label {label!r} is not one "
                                               f"of {', '.join(TARGET)}, skip, undo")
    return list(rows.values())


def texts_of(item: dict) -> list[str]:
    """The text of an item, or both of a comparison."""
    return [item["text"]] if isinstance(item["text"], str) else item["text"]


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
        tokens = [side for row in new for side in np.atleast_2d(row["tokens"]).tolist()]
        texts = [side for row in new for side in texts_of(row)]
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


def split(items: list[dict], seed: int, test: float, val: float) -> list[str]:
    """"train", "val" or "test" for each item, by a seeded shuffle of the distinct texts: first of
    those that a person labelled, then of the others, so that both kinds are in every part. A piece
    goes where its sample goes."""
    text_of = {item["id"]: str(item["text"]) for item in items if item["source"] != "piece"}
    of_people = {str(item["text"]) for item in items if item["person"]}
    of_machine = {*text_of.values()} - of_people
    g = torch.Generator().manual_seed(seed)
    part = {}
    for texts in (sorted(of_people), sorted(of_machine)):
        order = torch.randperm(len(texts), generator=g).tolist()
        n_test, n_val = math.ceil(test * len(texts)), math.ceil(val * len(texts))
        parts = ["test"] * n_test + ["val"] * n_val + ["train"] * len(texts)  # more than needed
        part |= {texts[i]: name for i, name in zip(order, parts)}
    return [part.get(text_of.get(item["id"].split("#")[0]), "train") for item in items]


@dataclass
class Phase:
    """What to train on, and how."""
    name: str
    items: list[dict]
    epochs: float
    rate: float = 1.0         # times the rates of matrices and head, not of the embedding
    cooldown: bool = True     # rates fall linearly to 0
    early_stop: bool = True   # keep the weights of the best validation loss; else the last ones


def phases_of(items: list[dict], cfg: Config) -> list[Phase]:
    """The machine's pieces, its samples, and then what people labelled. The pieces do not cool
    down: the samples follow. A person's labels are too few to choose a step by.
    Raises UserError where labels are too few, all the same, or of several lengths."""
    pieces = [item for item in items if item["source"] == "piece"]
    whole = [item for item in items if item["source"] != "piece"]
    machine = [item for item in whole if not item["person"]]
    person = [item for item in whole if item["person"]]
    phases = [Phase("pieces", pieces, cfg.piece_epochs, cooldown=False),
              Phase("machine", machine, cfg.epochs),
              Phase("people", person, cfg.person_epochs, rate=cfg.person_rate, early_stop=False)]
    if not cfg.machine_first:
        phases = [Phase("all", whole, cfg.epochs)]
    phases = [phase for phase in phases if phase.items]
    for phase in phases:
        n, lengths = len(phase.items), {np.shape(item["tokens"]) for item in phase.items}
        targets = {item["target"] for item in phase.items}
        more = f"({phase.name}); label more with 02_sample_label.py"
        require(n >= 20, f"only {n} labels, at least 20 are needed {more}")
        require(len(targets) > 1, f"all labels are the same {more}")
        require(len(lengths) == 1, f"samples of several lengths {more}")
    return phases


# ---- Measures ------------------------------------------------------------------------------------
def auc(score: np.ndarray, target: np.ndarray) -> float:
    """Chance that a positive item scores above a negative one, ties half; neutral ones left out."""
    pos, neg = score[target > 0.6], score[target < 0.4]  # pooling moves a neutral off one half
    if not len(pos) or not len(neg):
        return float("nan")
    order = np.sort(neg)
    below = (np.searchsorted(order, pos, "left") + np.searchsorted(order, pos, "right")) / 2
    return float(below.mean() / len(neg))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not n:
        return float("nan"), float("nan")
    z, p = 1.96, successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def measures(log_p: np.ndarray, target: np.ndarray) -> dict:
    """log_p (N, 2), target (N,) in [0, 1] -> accuracy and 95 % interval, AUC, NLL (nats), Brier."""
    p = np.exp(log_p[:, 0])
    clear = np.abs(target - 0.5) > 0.1
    n_clear = int(clear.sum())
    right = int(((p > 0.5) == (target > 0.5))[clear].sum())
    return {"n": len(target), "accuracy": right / max(n_clear, 1),
            "accuracy_interval": wilson(right, n_clear), "auc": auc(p, target),
            "nll": float(-(target * log_p[:, 0] + (1 - target) * log_p[:, 1]).mean()),
            "brier": float(((p - target) ** 2).mean())}


def calibration(p: np.ndarray, target: np.ndarray) -> list[dict]:
    """Ten bins of p(happy): how many items, mean prediction, mean target."""
    which = np.minimum((p * 10).astype(int), 9)
    bins = []
    for b in range(10):
        here = which == b
        if here.any():
            bins.append({"n": int(here.sum()), "predicted": float(p[here].mean()),
                         "target": float(target[here].mean())})
    return bins


def words_of(item: dict) -> list[tuple[str, int]]:
    """(word, 1) for words of a text; of a pair, (word, 1) on the left, (word, -1) on the right."""
    return [(word, sign) for text, sign in zip(texts_of(item), (1, -1))
            for word in text.lower().split()]


def naive_bayes(train: list[dict], test: list[dict]) -> np.ndarray:
    """Bag-of-words baseline: multinomial naive Bayes with add-one smoothing -> log-odds of happy,
    or of the left side of a pair against the right."""
    happy, sad = Counter(), Counter()
    for item in train:
        for word, sign in words_of(item):
            target = item["target"] if sign > 0 else 1 - item["target"]
            happy[word] += target
            sad[word] += 1 - target
    size = len(happy | sad)
    n_happy, n_sad = sum(happy.values()) + size, sum(sad.values()) + size

    def log_odds(word):
        return math.log((happy[word] + 1) / n_happy * n_sad / (sad[word] + 1))
    return np.array([sum(sign * log_odds(word) for word, sign in words_of(item)) for item in test])


# ---- Training ------------------------------------------------------------------------------------
def sentiment_loss(log_p: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy, nats. log_p (B, 2) of two answers, target (B,) = p(first)."""
    nll = -(target * log_p[:, 0] + (1 - target) * log_p[:, 1])
    return (weight * nll).sum() / weight.sum()


def log_probs(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """tokens (N, T) -> (N, 2): log p(happy), log p(sad). Pairs (N, 2, T) -> (N, 2): log p(the left
    is the happier), log p(the right is), by Bradley & Terry 1952: the difference of the two scores
    log p(happy) - log p(sad) is the logit."""
    if tokens.dim() == 2:
        return model.sentiment(tokens)
    happy, sad = model.sentiment(tokens.flatten(0, 1)).unbind(-1)                  # (2 N,) each
    left, right = (happy - sad).view(-1, 2).unbind(-1)                             # (N,) each
    return F.logsigmoid(torch.stack((left - right, right - left), -1))


def predict(model: GPT, tokens: torch.Tensor) -> np.ndarray:
    """`log_probs` in batches, as an array (N, 2)."""
    return chunked(lambda y: log_probs(model, y), 256, tokens).numpy(force=True)


def tensors(items: list[dict], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> tokens (N, T), or (N, 2, T) of pairs; target (N,); weight (N,)."""
    return (torch.tensor([item["tokens"] for item in items], device=device),
            torch.tensor([item["target"] for item in items], device=device),
            torch.tensor([item["weight"] for item in items], device=device))


def train(model: GPT, phase: Phase, cfg: Config, log=None, first: int = 0) -> int:
    """Fine-tune model, in place, on the "train" part of the phase's items; the "val" part says
    which step was the best. log(step=first, ...), log(step=first + 1, ...), ... -> steps planned.
    """
    device = model.head.device
    tokens, target, weight = tensors([i for i in phase.items if i["part"] == "train"], device)
    val_tokens, val_target, _ = tensors([i for i in phase.items if i["part"] == "val"], device)
    batch = max(1, cfg.batch_tokens // tokens[0].numel())
    per_epoch = math.ceil(len(tokens) / batch)
    steps = math.ceil(phase.epochs * per_epoch)
    matrices = {"params": list(model.blocks.parameters()), "peak_lr": cfg.lr * phase.rate}
    embedding = {"params": [model.embed.weight], "peak_lr": cfg.embed_lr}
    head = {"params": [model.head], "peak_lr": cfg.head_lr * phase.rate}
    optimizer = torch.optim.AdamW([matrices, embedding, head], betas=(0.9, 0.98), weight_decay=0)
    best, waited = math.inf, 0
    bar = tqdm(range(steps), desc=phase.name, mininterval=1)
    for step in bar:
        epoch, i = divmod(step, per_epoch)
        g = torch.Generator().manual_seed(cfg.seed * 1000 + epoch)
        order = torch.randperm(len(tokens), generator=g)
        b = order[i * batch:(i + 1) * batch].to(device)
        loss = sentiment_loss(log_probs(model, tokens[b]), target[b], weight[b])
        loss.backward()
        scale = min(1.0, (step + 1) / cfg.warmup)
        if phase.cooldown:
            scale *= 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        optimizer.step()
        optimizer.zero_grad()
        row = {"phase": phase.name, "step": first + step, "loss": loss.item(), "lr_scale": scale}
        if (step + 1) % max(1, per_epoch // 4) == 0 or step + 1 == steps:
            m = measures(predict(model, val_tokens), val_target.numpy(force=True))
            row |= {"val_nll": m["nll"], "val_auc": m["auc"]}
            bar.set_postfix(val_nll=f"{m['nll']:.3f}", val_auc=f"{m['auc']:.3f}")
            waited += 1
            if m["nll"] < best:
                best, waited = m["nll"], 0
                best_weights = copy.deepcopy(model.state_dict())
        if log:
            log(**row)
        if phase.early_stop and waited > cfg.patience:
            break
    require(best < math.inf, "the validation loss is not a number: lower --lr and --embed-lr")
    if phase.early_stop:
        model.load_state_dict(best_weights)
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
    items = pool(rows, cfg.machine_weight)
    for item, part in zip(items, split(items, cfg.seed, cfg.test_share, cfg.val_share)):
        item["part"] = part
    phases = phases_of(items, cfg)
    whole = [item for item in items if item["source"] != "piece"]
    prompted = "prompt" in whole[0]
    require(all(("prompt" in item) == prompted for item in whole),
            f"{cfg.out}: samples with and without prompts: move the labels of one kind away")

    # -- training, phase after phase
    log = Log(cfg.out / "03.jsonl")
    steps = 0
    for phase in phases:
        steps += train(model, phase, cfg, log, first=steps)

    # -- held-out figures of the last phase, all and per source, against the bag of words
    test = [item for item in phases[-1].items if item["part"] == "test"]
    test_tokens, _, _ = tensors(test, device)
    target = np.array([item["target"] for item in test])
    log_p = predict(model, test_tokens)
    bag = naive_bayes([item for item in whole if item["part"] == "train"], test)
    metrics = {}
    for source in ("all", *sorted({item["source"] for item in test})):
        here = np.array([source in ("all", item["source"]) for item in test])
        m = measures(log_p[here], target[here]) | {"bag_of_words_auc": auc(bag[here], target[here])}
        metrics[source] = m
        low, high = m["accuracy_interval"]
        print(f"held out, {source}: n {m['n']}, accuracy {m['accuracy']:.3f} [{low:.3f}, "
              f"{high:.3f}], AUC {m['auc']:.3f} (bag of words {m['bag_of_words_auc']:.3f}), "
              f"NLL {m['nll']:.3f}, Brier {m['brier']:.3f}")
    table = calibration(np.exp(log_p[:, 0]), target)
    answer = "the left is happier" if cfg.comparisons else "happy"
    print(f"calibration: p({answer}) predicted -> labelled (n):",
          ", ".join(f"{r['predicted']:.2f} -> {r['target']:.2f} ({r['n']})" for r in table))

    labels = hashlib.sha256(json.dumps(items).encode()).hexdigest()
    save(cfg.out / "reward.safetensors", model, tokenizer, step=steps,
         kind="comparisons" if cfg.comparisons else "labels", prompted=prompted,
         length=test_tokens.size(-1), metrics=metrics, calibration=table,
         settings=settings_of(cfg), inputs={"base": base, "labels": labels})
    finish("python 04_ppo.py", cfg.out)
