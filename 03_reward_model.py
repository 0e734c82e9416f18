"""Stage 3: fine-tune a copy of the base model into a reward model for sentiment.

    python 03_reward_model.py               # 88 s: AUC .886 on held-out samples
    python 03_reward_model.py --labels out/labels-anna.jsonl out/labels-vader.jsonl
    python 03_reward_model.py --comparisons # from pairs: which is the happier
    python 03_reward_model.py --curve       # instead: AUC against number of labels

Reads   out/base.safetensors, out/labels-*.jsonl (or comparisons-*.jsonl)
Writes  out/reward.safetensors, out/03.jsonl, out/curve.json with --curve

Decisions a reader may question:
1. Sentiment is the next token: after the last token of a sample the model predicts <|happy|> or
   <|sad|>, logits restricted to the two. Loss on that position alone; a neutral label is the soft
   target (.5, .5), whose cross-entropy has its minimum at ln 2.
2. A few hundred labels leave a small model near chance on its own samples. So a person's labels
   fine-tune a model that was first trained on the machine's: on its pieces of 16 tokens, from which
   it learns what words mean, then on its samples (--no-machine-first: all samples at once).
3. The embedding learns a hundred times faster than the matrices: sentiment is a property of words,
   and its rows are long. One rate of 5e-4 for everything ends below the bag of words.
4. Train, validation and test parts are split by text: a duplicate never sits on both sides, and
   pieces of a sample stay on its side. Comparisons are split by pair: a sample is in one pair only.
5. The mean and standard deviation of the reward, towards happy and towards sad, over fresh samples of
   the base model are stored here once. 04 normalises with these constants and never updates them.
6. Accuracy and AUC compare positive with negative items; neutral ones have no right answer. NLL,
   Brier score and calibration count them as one half.
"""
import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (GPT, Log, UserError, average_gradients, draw_prompts, fingerprint, finish, gather, load,
                   load_optimizers, read_prompts, resume_from, save, score_of, start, world, write)
from people import kappas, texts

SCRIPT = "03_reward_model.py"
TARGET = {"positive": 1.0, "neutral": 0.5, "negative": 0.0,  # p(happy) that a label asks for
          "left": 1.0, "tie": 0.5, "right": 0.0}             # p(left is the happier) of a comparison


@dataclass
class Config:
    labels: tuple[Path, ...] = ()  # label files; empty: every labels-*.jsonl in --out
    comparisons: bool = False      # learn from pairs instead: every comparisons-*.jsonl
    machine_first: bool = True     # train on machine labels, then on people's; else on all at once
    machine_weight: float = 0.2    # of a machine's label where a person has labelled too, or pooled
    out: Path = Path("out")        # where all stages write
    seed: int = 0
    resume: bool = False           # continue a killed run from its last complete checkpoint
    batch_tokens: int = 1024       # tokens of an optimizer step
    piece_epochs: float = 1.0      # over the machine's labels of pieces
    epochs: float = 1.0            # over the machine's labels of samples
    person_epochs: float = 12.0    # over a person's, of which there are few; all of them, no early stopping
    person_rate: float = 0.03      # of lr and head_lr then: few labels should move words, not all else
    lr: float = 1e-3               # matrices
    embed_lr: float = 0.1          # rows of the embedding are long: a smaller rate moves no word
    head_lr: float = 0.01
    warmup: int = 50               # steps
    patience: int = 12             # early stopping: evaluations (4 an epoch) without improvement
    test_share: float = 0.1        # held out for the figures reported
    val_share: float = 0.05        # held out to stop early and to choose the best step
    norm_samples: int = 4096       # fresh samples of the base model behind mean and std
    curve: bool = False            # instead: the AUC of models trained on fewer labels


ON_GPU = dict(batch_tokens=4096, lr=1.5e-3, embed_lr=0.15, head_lr=0.015)


# ---- Labels --------------------------------------------------------------------------------------
def read_labels(path: Path) -> list[dict]:
    """Rows of one label file, the last line about an item counting; undone and skipped ones left
    out. Raises UserError that names the first bad line."""
    if not path.exists():
        raise UserError(f"{path} is missing: run 02_sample_label.py first")
    rows: dict[str, dict] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            key, label, *_ = (str(row[k]) for k in ("id", "label", "labeller", "source", "text"))
            tokens = np.array(row["tokens"], dtype=int)  # (length,), or (2, length) of a comparison
            if not tokens.size or tokens.min() < 0 or tokens.ndim != (1 if isinstance(row["text"], str) else 2):
                raise ValueError("tokens")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} line {number} is broken ({line[:40]!r}): mend or delete it") from error
        rows.pop(key, None)
        if label in TARGET:
            rows[key] = row
        elif label not in ("skip", "undo"):
            raise UserError(f"{path} line {number}: label {label!r} is not one of "
                            f"{', '.join(TARGET)}, skip, undo")
    return list(rows.values())


def pool(rows: list[dict], machine_weight: float) -> list[dict]:
    """One item per id: target = weighted mean of its labels, weight = their sum. A person's label
    counts 1, the machine's `machine_weight`."""
    items: dict[str, dict] = {}
    for row in rows:
        item = items.setdefault(row["id"], {**row, "sum": 0.0, "weight": 0.0, "person": False})
        w = machine_weight if row["labeller"] == "vader" else 1.0
        item["sum"] += w * TARGET[row["label"]]
        item["weight"] += w
        item["person"] |= row["labeller"] != "vader"
        if "picked" in row:
            item["picked"] = row["picked"]
    return [item | {"target": item["sum"] / item["weight"]} for item in items.values() if item["weight"]]


def split(items: list[dict], seed: int, test: float, val: float) -> list[str]:
    """"train", "val" or "test" for each item, by a seeded shuffle of the distinct texts: first of
    those that a person labelled, then of the others, so that both kinds are in every part. A piece
    goes where its sample goes."""
    text_of = {item["id"]: str(item["text"]) for item in items if item["source"] != "piece"}
    people = {str(item["text"]) for item in items if item["person"]}
    g, part = torch.Generator().manual_seed(seed), {}
    for group in (sorted(people), sorted({*text_of.values()} - people)):
        order = torch.randperm(len(group), generator=g).tolist()
        n_test, n_val = math.ceil(test * len(group)), math.ceil(val * len(group))
        part |= {group[i]: "test" if rank < n_test else "val" if rank < n_test + n_val else "train"
                 for rank, i in enumerate(order)}
    return [part.get(text_of.get(item["id"].split("#")[0]), "train") for item in items]


# ---- Measures ------------------------------------------------------------------------------------
def auc(score: np.ndarray, target: np.ndarray) -> float:
    """Chance that a positive item scores above a negative one, ties half; neutral items left out."""
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
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def measures(log_p: np.ndarray, target: np.ndarray) -> dict:
    """log_p (N, 2), target (N,) in [0, 1] -> accuracy with its 95 % interval, AUC, NLL (nats), Brier."""
    p, clear = np.exp(log_p[:, 0]), np.abs(target - 0.5) > 0.1
    right = int(((p > 0.5) == (target > 0.5))[clear].sum())
    return {"n": len(target), "accuracy": right / max(int(clear.sum()), 1),
            "accuracy_interval": wilson(right, int(clear.sum())), "auc": auc(p, target),
            "nll": float(-(target * log_p[:, 0] + (1 - target) * log_p[:, 1]).mean()),
            "brier": float(((p - target) ** 2).mean())}


def calibration(p: np.ndarray, target: np.ndarray) -> list[dict]:
    """Ten bins of p(happy): how many items, mean prediction, mean target."""
    which = np.minimum((p * 10).astype(int), 9)
    return [{"n": int((which == b).sum()), "predicted": float(p[which == b].mean()),
             "target": float(target[which == b].mean())} for b in range(10) if (which == b).any()]


def naive_bayes(train: list[dict], test: list[dict]) -> np.ndarray:
    """Bag-of-words baseline: multinomial naive Bayes with add-one smoothing -> log-odds of happy, or of the
    left side of a pair against the right."""
    happy, sad = Counter(), Counter()
    for item in train:
        for text, sign in zip(texts(item), (1, -1)):
            target = item["target"] if sign > 0 else 1 - item["target"]
            for word in text.lower().split():
                happy[word] += target
                sad[word] += 1 - target
    size = len(happy | sad)
    nh, ns = sum(happy.values()) + size, sum(sad.values()) + size
    return np.array([sum(sign * math.log((happy[w] + 1) / nh * ns / (sad[w] + 1)) for text, sign in zip(texts(item), (1, -1))
                         for w in text.lower().split()) for item in test])


# ---- Training ------------------------------------------------------------------------------------
def sentiment_loss(log_p: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy, nats. log_p (B, 2) of the two answers; target (B,) = p(the first)."""
    nll = -(target * log_p[:, 0] + (1 - target) * log_p[:, 1])
    return (weight * nll).sum() / weight.sum()


def log_probs(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """tokens (N, T) -> (N, 2): log p(happy), log p(sad). Pairs (N, 2, T) -> (N, 2): log p(the left is the
    happier), log p(the right is), by Bradley & Terry 1952: the difference of the two scores
    log p(happy) - log p(sad) is the logit."""
    if tokens.dim() == 2:
        return model.sentiment(tokens)
    happy, sad = model.sentiment(tokens.flatten(0, 1)).unbind(-1)
    left, right = (happy - sad).view(-1, 2).unbind(-1)
    return F.logsigmoid(torch.stack((left - right, right - left), -1))


@torch.no_grad()
def predict(model: GPT, tokens: torch.Tensor) -> np.ndarray:
    """`log_probs` in batches, as an array."""
    return torch.cat([log_probs(model, y) for y in tokens.split(256)]).numpy(force=True)


def tensors(items: list[dict], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (torch.tensor([i["tokens"] for i in items], device=device),
            torch.tensor([i["target"] for i in items], device=device),
            torch.tensor([i["weight"] for i in items], device=device))


def train(model: GPT, items: list[dict], epochs: float, cfg: Config, desc: str, log=None, keep=None,
          resumed: dict | None = None) -> GPT:
    """Fine-tune on the "train" part of items, with early stopping -> the model of the best NLL on
    their "val" part, or for a person's labels the last one. log(**row) gets one row a step;
    keep(model, optimizer, tensors, **header) is called at every evaluation; `resumed` is the header
    of what it saved."""
    device = model.head.device
    tokens, target, weight = tensors([i for i in items if i["part"] == "train"], device)
    val_tokens, val_target, _ = tensors([i for i in items if i["part"] == "val"], device)
    batch = max(1, cfg.batch_tokens // tokens[0].numel())
    per_epoch = math.ceil(len(tokens) / batch)
    steps, every = math.ceil(epochs * per_epoch), max(1, per_epoch // 4)
    rate = cfg.person_rate if desc == "people" else 1.0
    optimizer = torch.optim.AdamW([{"params": list(model.blocks.parameters()), "peak_lr": cfg.lr * rate},
                                   {"params": [model.embed.weight], "peak_lr": cfg.embed_lr},
                                   {"params": [model.head], "peak_lr": cfg.head_lr * rate}],
                                  betas=(0.9, 0.98), weight_decay=0)
    first, best, waited, best_weights = 0, math.inf, 0, {}
    if resumed:
        load_optimizers(resumed, (optimizer,))
        first, best, waited = (resumed[k] for k in ("step", "best", "waited"))
        best_weights = {k[5:]: v for k, v in resumed["tensors"].items() if k.startswith("best.")}
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=desc, mininterval=1)
    for step in bar:
        if waited > cfg.patience:
            break
        epoch, i = divmod(step, per_epoch)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(cfg.seed * 1000 + epoch))
        b = order[i * batch:(i + 1) * batch].to(device)
        rank, size = world() if len(b) >= world()[1] else (0, 1)  # too few to share: all compute the same
        mine = b[rank::size]
        loss = sentiment_loss(log_probs(model, tokens[mine]), target[mine], weight[mine])
        loss = loss * size * weight[mine].sum() / weight[b].sum()  # so that the mean over processes is theirs
        loss.backward()
        average_gradients(model)
        # linear to 0 over the whole phase; the pieces come before another phase and do not cool down
        scale = min(1.0, (step + 1) / cfg.warmup) * (1 if desc == "pieces" else 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        optimizer.step()
        optimizer.zero_grad()
        row = {"phase": desc, "step": step, "loss": gather(loss.detach()[None]).mean().item(), "lr_scale": scale}
        evaluate = (step + 1) % every == 0 or step + 1 == steps
        if evaluate:
            m = measures(predict(model, val_tokens), val_target.numpy(force=True))
            row |= {"val_nll": m["nll"], "val_auc": m["auc"]}
            bar.set_postfix(val_nll=f"{m['nll']:.3f}", val_auc=f"{m['auc']:.3f}")
            waited += 1
            if m["nll"] < best or desc == "people":  # few labels are no judge of when to stop: the schedule is
                best, waited = m["nll"], 0
                best_weights = {k: v.clone() for k, v in model.state_dict().items()}
        if log:
            log(**row)
        if evaluate and keep:
            keep(model, optimizer, {f"best.{k}": v for k, v in best_weights.items()},
                 step=step + 1, best=best, waited=waited)
    model.load_state_dict(best_weights)
    return model


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    if min(cfg.batch_tokens, cfg.piece_epochs, cfg.epochs, cfg.person_epochs, cfg.warmup,
           cfg.test_share, cfg.val_share, cfg.norm_samples) <= 0:
        raise UserError("--batch-tokens, the epochs, --warmup, the shares and --norm-samples must be positive")
    base_path, done = cfg.out / "base.safetensors", cfg.out / "reward.safetensors"
    state = cfg.out / "03-state.safetensors"

    base, tokenizer, _ = load(base_path, "01_pretrain.py", device, dtype)

    # -- labels: read, compare, pool, check, split
    kind = "comparisons" if cfg.comparisons else "labels"
    files = cfg.labels or tuple(sorted(cfg.out.glob(f"{kind}-*.jsonl")))
    rows = []
    for path in files:
        rows += (new := read_labels(path))
        if any(isinstance(row["text"], str) == cfg.comparisons for row in new):
            raise UserError(f"{path} does not hold {kind}: "
                            + ("leave out --comparisons" if cfg.comparisons else "use --comparisons"))
        sides = [side for row in new for side in zip(np.atleast_2d(row["tokens"]).tolist(), texts(row))]
        decoded = tokenizer.decode_batch([tokens for tokens, _ in sides])
        if any(max(tokens) >= base.n_text or text != again for (tokens, text), again in zip(sides, decoded)):
            raise UserError(f"{path} was made with another tokenizer than {base_path}: "
                            "label again with 02_sample_label.py, or move the file away")
    if all(row["source"] == "piece" for row in rows):
        raise UserError(f"there are no labels in {cfg.out}/{kind}-*.jsonl: run 02_sample_label.py first")
    by_labeller: dict[str, dict[str, str]] = {}
    for row in rows:
        by_labeller.setdefault(row["labeller"], {})[row["id"]] = row["label"]
    for name, labels in by_labeller.items():
        counts = Counter(labels.values())
        print(f"{name}: {len(labels)} labels,", ", ".join(f"{k} {v}" for k, v in counts.items()))
    for pair, (kappa, n) in kappas(by_labeller).items():
        print(f"{pair}: Cohen's kappa {kappa:.2f} on {n} common items")
    items = pool(rows, cfg.machine_weight)
    whole = [i for i in items if i["source"] != "piece"]
    prompted = "prompt" in whole[0]
    if any(("prompt" in i) != prompted for i in whole):
        raise UserError(f"{', '.join(map(str, files))}: samples with and without prompts: move one kind away")
    prompts = read_prompts(cfg.out / "corpus.txt", tokenizer) if prompted else None
    phases = [("pieces", [i for i in items if i["source"] == "piece"], cfg.piece_epochs),
              ("machine", [i for i in whole if not i["person"]], cfg.epochs),
              ("people", [i for i in whole if i["person"]], cfg.person_epochs)]
    phases = [p for p in phases if p[1]] if cfg.machine_first else [("all", whole, cfg.epochs)]
    for name, data, _ in phases:
        for wrong, why in ((len(data) < 20, f"only {len(data)} labels, at least 20 are needed"),
                           (len({i["target"] for i in data}) < 2, "all labels are the same"),
                           (len({np.shape(i["tokens"]) for i in data}) > 1, "samples of several lengths")):
            if wrong:
                raise UserError(f"{', '.join(map(str, files))} ({name}): {why}; "
                                "label more with 02_sample_label.py")
    for item, part in zip(items, split(items, cfg.seed, cfg.test_share, cfg.val_share)):
        item["part"] = part
    test = [i for i in phases[-1][1] if i["part"] == "test"]
    test_tokens, target = tensors(test, device)[0], np.array([i["target"] for i in test])

    if cfg.curve:  # the learning curve of the last phase's labels, and nothing else
        load(done, SCRIPT)
        labelled, curve = [i for i in phases[-1][1] if i["part"] == "train"], []
        val = [i for i in phases[-1][1] if i["part"] == "val"]
        for n in (*(n for n in (400, 1600, 6400) if n < len(labelled)), len(labelled)):
            # few labels get more passes, as they would from anyone who has only them
            epochs = 2 * min(8, (len(labelled) / n) ** 0.5)
            m = train(load(base_path, SCRIPT, device, dtype)[0], labelled[:n] + val, epochs, cfg, f"{n} labels")
            curve.append({"labels": n, "auc": auc(predict(m, test_tokens)[:, 0], target),
                          "bag_of_words_auc": auc(naive_bayes(labelled[:n], test), target)})
            print("AUC with {labels} labels: {auc:.3f} (bag of words {bag_of_words_auc:.3f})"
                  .format(**curve[-1]))
        write(cfg.out / "curve.json", json.dumps(curve))
        finish("python 05_eval.py", cfg.out)
        raise SystemExit

    # -- phases: the machine's labels first, then a person's
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("out", "labels", "resume", "curve")}
    inputs = {"base": fingerprint(base), "labels": hashlib.sha256(json.dumps(items).encode()).hexdigest()}
    resumed = resume_from(state, SCRIPT, settings, inputs) if cfg.resume else None
    model = (resumed or load(base_path, SCRIPT))[0]
    at_phase, offset = (resumed[2]["phase"], resumed[2]["offset"]) if resumed else (0, 0)
    model.to(device).dtype = dtype
    log = Log(cfg.out / "03.jsonl", offset + resumed[2]["step"] if resumed else 0)
    for number in range(at_phase, len(phases)):
        name, data, epochs = phases[number]
        model = train(
            model, data, epochs, cfg, name, lambda step, **row: log(step=offset + step, **row),
            lambda model, optimizer, weights, **header: save(
                state, model, tokenizer, (optimizer,), weights, phase=number, offset=offset, settings=settings,
                inputs=inputs, **header),
            resumed[2] if resumed and number == at_phase else None)
        offset += math.ceil(epochs * math.ceil(sum(i["part"] == "train" for i in data)
                                               / max(1, cfg.batch_tokens // np.size(data[0]["tokens"]))))

    # -- held-out figures, all and per source, against the bag of words
    log_p = predict(model, test_tokens)
    bag = naive_bayes([i for i in whole if i["part"] == "train"], test)
    metrics, picked = {}, ["picked at random"] * ({"random", "uncertain"} <= {i.get("picked") for i in test})
    for source in ("all", *sorted({i["source"] for i in test}), *picked):
        of = np.array([source in ("all", i["source"], f"picked at {i.get('picked')}") for i in test])
        m = metrics[source] = measures(log_p[of], target[of]) | {"bag_of_words_auc": auc(bag[of], target[of])}
        print("held out, {}: n {n}, accuracy {accuracy:.3f} [{:.3f}, {:.3f}], AUC {auc:.3f} (bag of words "
              "{bag_of_words_auc:.3f}), NLL {nll:.3f}, Brier {brier:.3f}".format(source, *m["accuracy_interval"], **m))
    table = calibration(np.exp(log_p[:, 0]), target)
    print(f"calibration: p({'the left is happier' if cfg.comparisons else 'happy'}) predicted -> labelled (n):",
          ", ".join(f"{r['predicted']:.2f} -> {r['target']:.2f} ({r['n']})" for r in table))

    # -- the constants that 04 normalises with
    length, norm = test_tokens.size(-1), {}
    fresh = base.generate(cfg.norm_samples, length, seed=cfg.seed << 32 | 3 << 24,
                          prompts=draw_prompts(prompts, cfg.norm_samples, cfg.seed))[0]
    sentiment = torch.from_numpy(predict(model, fresh))
    for target_name in ("happy", "sad"):
        scores = score_of(sentiment, kind, target_name)
        norm[target_name] = {"mean": scores.mean().item(), "std": scores.std().item()}
    if not all(v["std"] > 1e-3 for v in norm.values()):
        raise UserError("the reward model gives every sample the same score: label more samples")
    print(f"score on {cfg.norm_samples} fresh samples of the base model:",
          ", ".join(f"towards {t} {v['mean']:.3f} +- {v['std']:.3f}" for t, v in norm.items()))
    save(done, model, tokenizer, step=offset, kind=kind, prompted=prompted, length=length, normalisation=norm,
         metrics=metrics, calibration=table, settings=settings, inputs=inputs, seed=cfg.seed)
    state.unlink(missing_ok=True)
    finish("python 04_ppo.py", cfg.out)
