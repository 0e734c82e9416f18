"""Stage 2: draw samples from the base model and have them labelled positive, negative or neutral.

    python 02_sample_label.py                       # 57 s: 59.0 % of the samples positive
    python 02_sample_label.py --labeller anna       # one key per sample, in the terminal
    python 02_sample_label.py --labeller anna --corpus-fraction 0.2

Reads   out/base.safetensors
Writes  out/samples.jsonl (id, source, text, tokens), out/labels-NAME.jsonl (the same and the label),
        out/labels-vader-pieces.jsonl

Decisions a reader may question:
1. Samples are unconditional, 64 tokens, temperature 1, nothing cut off: the distribution that PPO
   starts from and that every KL in this project is measured against.
2. The default labeller is VADER, a sentiment lexicon, so that the whole pipeline runs unattended.
   It stands in for a person, no more.
3. A person never sees where an item comes from, and its order is shuffled with the seed.
4. A label file is append-only and complete in itself: every line carries text and tokens, an undo is
   one more line, and the last line about an item counts. No later run can orphan or lose a label.
5. The machine also labels every sample cut into four pieces. A label of 64 tokens says little
   about which word it is due to; a label of 16 tokens says more, and the machine's cost nothing.
   03 trains on them first. People are never asked to do this.
6. The tokens are stored, not only the text: a sampled text need not encode to the same tokens.
"""
import json
import os
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import UserError, fingerprint, finish, load, start, write

SCRIPT = "02_sample_label.py"
KEYS = {"p": "positive", "n": "negative", "0": "neutral", "s": "skip"}
BATCH = 1024  # samples drawn before they are written
HELP = "p positive   n negative   0 neutral   s skip   u undo   q quit   ? help"


@dataclass
class Config:
    labeller: str = "vader"       # "vader", or your name: then you label in the terminal
    n: int = 24_576               # items
    length: int = 64              # tokens of an item
    corpus_fraction: float = 0.0  # share of items that are snippets of the corpus
    out: Path = Path("out")       # where all stages write
    pieces: int = 4               # pieces of each sample that the machine labels too; 0: none
    seed: int = 0
    resume: bool = False          # keep the samples that a killed run had drawn


ON_GPU = dict(n=32_768)


# ---- Samples -------------------------------------------------------------------------------------
def read_jsonl(path: Path) -> list[dict]:
    """Raises UserError that names the first broken line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["id"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} line {number} is broken ({line[:40]!r}): mend or delete it") from error
    return rows


def drop_unfinished_line(path: Path) -> None:
    """A kill in the middle of a write can leave a last line without its end: cut it off."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        print(f"{path}: dropping an unfinished last line")
        write(path, data[: data.rfind(b"\n") + 1])


def draw(path: Path, model, tokenizer, cfg: Config, base: str) -> list[dict]:
    """All items; those already in `path` are kept if cfg.resume, or if there is nothing to add."""
    n_corpus = round(cfg.n * cfg.corpus_fraction)
    ids = [f"{base[:8]}-{cfg.seed}-{cfg.length}-{i}" for i in range(cfg.n - n_corpus)]
    if n_corpus:
        corpus = path.with_name("corpus.txt")
        if not corpus.exists():
            raise UserError(f"{corpus} is missing (the shipped model comes without its corpus): "
                            "use --corpus-fraction 0, or run 01_pretrain.py with --corpus FILE")
        tokens = torch.tensor(tokenizer.encode(corpus.read_text(encoding="utf-8")).ids)
        g = torch.Generator().manual_seed(cfg.seed)
        places = torch.randperm(len(tokens) // cfg.length, generator=g)[:n_corpus] * cfg.length
        if len(places) < n_corpus:
            raise UserError(f"the corpus has only {len(places)} snippets: lower --corpus-fraction")
        ids += [f"corpus-{p}-{cfg.length}" for p in places.tolist()]

    drop_unfinished_line(path)
    rows = read_jsonl(path) if path.exists() else []
    same = [row["id"] for row in rows] == ids[: len(rows)]
    if len(rows) < len(ids):  # whole batches only, so that each is drawn in the shape it always has
        rows = rows[: len(rows) // BATCH * BATCH] if cfg.resume else []
    if not same:
        rows = []
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(ids), desc="sample") as bar:
        bar.update(len(rows))
        while len(rows) < len(ids):
            done = len(rows)
            if done < cfg.n - n_corpus:
                count = min(BATCH, cfg.n - n_corpus - done)
                new = model.generate(torch.arange(done, done + count), cfg.length, cfg.seed)[0].tolist()
            else:
                new = [tokens[p:p + cfg.length].tolist() for p in places[done - (cfg.n - n_corpus):].tolist()]
            source = "model" if done < cfg.n - n_corpus else "corpus"
            fresh = [{"id": ids[done + i], "source": source, "text": text, "tokens": t}
                     for i, (text, t) in enumerate(zip(tokenizer.decode_batch(new), new))]
            file.write("".join(json.dumps(row) + "\n" for row in fresh))
            file.flush()
            rows += fresh
            bar.update(len(fresh))
    return rows


# ---- Labelling -----------------------------------------------------------------------------------
def vader_label(compound: float) -> str:
    """VADER's own thresholds (Hutto & Gilbert 2014): |compound| < 0.05 is neutral."""
    return "positive" if compound >= 0.05 else "negative" if compound <= -0.05 else "neutral"


def cut(items: list[dict], pieces: int, tokenizer) -> list[dict]:
    """Each item in `pieces` equal parts, with the ids ID#0, ID#1, ..."""
    size = len(items[0]["tokens"]) // pieces
    parts = [(f"{item['id']}#{k}", item["tokens"][k * size:(k + 1) * size])
             for item in items for k in range(pieces)]
    texts = tokenizer.decode_batch([tokens for _, tokens in parts])
    return [{"id": i, "source": "piece", "text": text, "tokens": t} for (i, t), text in zip(parts, texts)]


def current_labels(rows: list[dict]) -> dict[str, str]:
    """id -> label, in the order of labelling: the last line about an item counts, an undo removes it."""
    labels: dict[str, str] = {}
    for row in rows:
        labels.pop(row["id"], None)
        if row["label"] != "undo":
            labels[row["id"]] = row["label"]
    return labels


def need_terminal() -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("this asks a person for keys and needs a terminal: run the command in one")


def read_key() -> str:
    """One key from the terminal, without Enter. Ctrl-C still interrupts; end of input is "q"."""
    import termios  # not on Windows
    import tty
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        return os.read(fd, 1).decode("utf-8", "replace").lower() or "q"
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def show(item: dict, labels: dict[str, str], total: int) -> None:
    counts = "  ".join(f"{v} {list(labels.values()).count(v)}" for v in KEYS.values())
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in item["text"])
    width = min(shutil.get_terminal_size().columns, 90) - 4
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
    print(f"\033[2J\033[H{len(labels) + 1} of {total}   {counts}\n")
    print("\n".join("    " + line for line in lines) + f"\n\n{HELP}", flush=True)


def label_in_terminal(items: list[dict], path: Path, labeller: str) -> dict[str, str]:
    """Ask for one key per item and append each answer to `path` at once. -> id -> label."""
    need_terminal()
    drop_unfinished_line(path)
    labels = current_labels(read_jsonl(path)) if path.exists() else {}
    by_id = {item["id"]: item for item in items}
    with open(path, "a", encoding="utf-8") as file:
        def append(item, label):
            row = {"id": item["id"], "label": label, "labeller": labeller, "source": item["source"],
                   "time": round(time.time()), "text": item["text"], "tokens": item["tokens"]}
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

        queue = [item for item in reversed(items) if item["id"] not in labels]
        while queue:
            show(queue[-1], labels, len(labels) + len(queue))
            key = read_key()
            if key in KEYS:
                item = queue.pop()
                append(item, KEYS[key])
                labels[item["id"]] = KEYS[key]
            elif key == "u" and labels and (last := list(labels)[-1]) in by_id:
                append(by_id[last], "undo")
                del labels[last]
                queue.append(by_id[last])
            elif key == "q":
                break
            elif key == "?":
                print("\nJudge the feeling that the text expresses, not how good it is. Neutral: neither, "
                      "or both alike.\nEvery key is saved at once; quit whenever you like and run the "
                      "same command to go on.\nAny key returns.", flush=True)
                read_key()
    return labels


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    if not (0 <= cfg.corpus_fraction <= 1 and cfg.n > 0 and 0 <= cfg.pieces <= cfg.length
            and cfg.labeller.replace("-", "").isalnum()):
        raise UserError("--n must be positive, --corpus-fraction in [0, 1], --pieces in [0, --length], "
                        "--labeller letters and digits")
    if cfg.labeller != "vader":
        need_terminal()
    model, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py")
    model.to(device).dtype = dtype
    began = time.time()
    items = draw(cfg.out / "samples.jsonl", model, tokenizer, cfg, fingerprint(model))
    print(f"{len(items)} items in {time.time() - began:.1f} s")

    path = cfg.out / f"labels-{cfg.labeller}.jsonl"
    if cfg.labeller == "vader":
        vader = SentimentIntensityAnalyzer()
        pieces = cut(items, cfg.pieces, tokenizer) if cfg.pieces else []
        for file, todo in ((path.with_name("labels-vader-pieces.jsonl"), pieces), (path, items)):
            rows = [item | {"label": vader_label(vader.polarity_scores(item["text"])["compound"]),
                            "labeller": "vader"} for item in tqdm(todo, desc="label", mininterval=1)]
            write(file, "".join(json.dumps(row) + "\n" for row in rows))
        labels = current_labels(rows)
    else:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
        labels = label_in_terminal([items[i] for i in order], path, cfg.labeller)
    counts = {v: list(labels.values()).count(v) for v in KEYS.values()}
    print(f"{path}: {len(labels)} labels,", ", ".join(f"{k} {v}" for k, v in counts.items()))
    finish("python 03_reward_model.py", cfg.out)
