"""Stage 2: draw samples from the base model and label them positive, negative or neutral.

    python 02_sample_label.py                       # 77 s: 59.4% of the samples are positive
    python 02_sample_label.py --labeller anna       # you label: one key per sample, in the terminal
    python 02_sample_label.py --compare             # pairs instead: which of the two is happier?

`python -m people` also makes pages to mail to friends, and collects their answers.

Reads   out/base.safetensors; out/corpus.txt for --prompts and --corpus-fraction
Writes  out/samples.jsonl (id, source, text, tokens), out/02.json (settings, seconds)
        out/labels-NAME.jsonl (the same and a label; VADER's file also has labels of spans)
        --compare: out/pairs.jsonl, out/comparisons-NAME.jsonl; --prompts: out/prompts.json

Decisions a reader may question:
1. Samples have 64 tokens and no prompt. We draw at temperature 1, without top-k or top-p. PPO
   starts from this distribution, and every KL in this project measures the distance from it.
2. The default labeller is VADER, a sentiment lexicon ("the machine" below). So the whole pipeline
   runs by itself. VADER only stands in for a person.
3. A person never sees where an item comes from. Items come in a random order.
4. The machine also labels many spans, parts of a sample (see `spans_of`). One label for 64 tokens
   hardly shows which word caused it. Labels of growing prefixes do, and the machine's are free.
   People label whole samples only.
5. We store tokens as well as text, because encoding a sampled text may give other tokens.
6. With --prompts the prompt is context: only the completion is labelled, rewarded and counted in
   the KL. Two samples share each prompt, so that --compare compares completions of one prompt.
"""
import os
import re
import select
import shutil
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import (
    GPT,
    as_json,
    command,
    decode_prompts,
    draw_prompts,
    fingerprint,
    finish,
    jsonl,
    last_of_each,
    load,
    old_name,
    only_writer,
    provenance,
    read_lines,
    read_prompts,
    read_rows,
    require,
    start,
    words,
    write,
)

POSITIVE = 0.05  # VADER's own threshold: positive from here up, negative from -0.05 down
COMMON = frozenset(words("the and to of a i in that is my you it not with his be for this me your"))
FEELING = ({"p": "positive", "n": "negative", "0": "neutral", "s": "skip"},
           "Which feeling does the text express? Judge the feeling, not how good it is; "
           "neutral: neither, or both alike.")
ASK = {"labels": FEELING, "ratings": FEELING,  # kind of answers -> labels by key, and the question
       "comparisons": ({"l": "left", "t": "tie", "r": "right", "s": "skip"},
                       "Which of the two is happier? Tie: neither, or both alike.")}


@dataclass
class Config:
    labeller: str = "vader"       # "vader", or your name: then you label in the terminal
    n: int = 24_576               # samples; --compare makes half as many pairs
    length: int = 64              # tokens per sample
    compare: bool = False         # label pairs: which of the two is happier?
    prompts: bool = False         # each sample continues a speaker's first line in the corpus
    corpus_fraction: float = 0.0  # fraction of items that are snippets of the corpus
    out: Path = Path("out")       # where all stages write
    seed: int = 0


ON_GPU = dict(n=32_768)


def check(cfg: Config) -> None:
    require(cfg.n >= 1 and cfg.length >= 1, "--n and --length must be positive")
    require(cfg.n >= 2 or not cfg.compare, "--compare needs --n 2 or more")
    require(0 <= cfg.corpus_fraction <= 1, "--corpus-fraction must be in [0, 1]")
    require(not (cfg.prompts and cfg.corpus_fraction),
            "--prompts needs --corpus-fraction 0: a snippet has no prompt, which gives it away")
    if cfg.labeller != "vader":
        need_person(cfg.labeller)


# ---- Items to label ------------------------------------------------------------------------------
def draw_samples(model: GPT, tokenizer: Tokenizer, cfg: Config, n: int) -> list[dict]:
    """Draw n samples from the model; with --prompts, each continues a prompt."""
    train_prompts = None
    if cfg.prompts:
        train_prompts = read_prompts(cfg.out / "prompts.json", "train", model.n_text)
    prompts = draw_prompts(train_prompts, (n + 1) // 2, cfg.seed).repeat_interleave(2, 0)[:n]
    name = f"{fingerprint(model)[:8]}-{cfg.seed}-{cfg.length}{'p' if cfg.prompts else ''}"
    y = torch.cat([model.generate(rows, cfg.length, cfg.seed, prompts=prompts[rows])[0]
                   for rows in tqdm(torch.arange(n).split(1024), desc="sample")])           # (n, T)
    items = [{"id": f"{name}-{i}", "source": "model", "text": tokenizer.decode(tokens),
              "tokens": tokens} for i, tokens in enumerate(y.tolist())]
    if cfg.prompts:
        for item, prompt in zip(items, decode_prompts(tokenizer, prompts)):
            item["prompt"] = prompt
    return items


def read_corpus(corpus: Path, flag: str) -> str:
    require(corpus.exists(), f"{corpus} is missing (the shipped model comes without its corpus): "
                             f"run {command('01_pretrain.py --corpus FILE')}, or leave out {flag}")
    return corpus.read_text(encoding="utf-8", errors="replace")


def draw_snippets(corpus: Path, tokenizer: Tokenizer, cfg: Config, n: int) -> list[dict]:
    """n snippets from different places of the corpus. Raises UserError if it is too short."""
    ids = tokenizer.encode(read_corpus(corpus, "--corpus-fraction")).ids
    g = torch.Generator().manual_seed(cfg.seed)
    places = (torch.randperm(len(ids) // cfg.length, generator=g)[:n] * cfg.length).tolist()
    require(len(places) == n, f"{corpus} has only {len(places)} snippets: lower --corpus-fraction")
    return [{"id": f"corpus-{p}-{cfg.length}", "source": "corpus", "tokens": ids[p:p + cfg.length],
             "text": tokenizer.decode(ids[p:p + cfg.length])} for p in places]


def find_prompts(part: str, text: str, tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """Every speaker's name ("Romeo:", or "ROMEO." in Project Gutenberg) with the first line of the
    speech, each once, up to `longest` tokens. Raises UserError if there are none."""
    names = (r"[A-Z][^\n:]{0,30}:", r"[A-Z][A-Z ,'’]{0,30}\.")
    found = [dict.fromkeys(re.findall(rf"^{name}\n[^\n]+\n", text, re.M)) for name in names]
    candidates = list(max(found, key=len))
    prompts = [e.ids for e in tokenizer.encode_batch(candidates) if len(e.ids) <= longest]
    require(len(prompts) > 0, f"the {part} text has no prompts: a speaker's name with a colon or a "
                              f"full stop on a line, and a line after it; {longest} tokens at most")
    return prompts


def write_prompts(corpus: Path, tokenizer: Tokenizer, longest: int, path: Path) -> None:
    """Find prompts in the training text and, for 05, in the held-out last 5% (as in 01)."""
    text = read_corpus(corpus, "--prompts")
    cut = int(len(text) * 0.95)
    held_out = text[cut:].partition("\n")[2]
    write(path, as_json({"train": find_prompts("training", text[:cut], tokenizer, longest),
                         "held_out": find_prompts("held-out", held_out, tokenizer, longest)}))


def pair_up(items: list[dict], seed: int) -> list[dict]:
    """Pair items 0 and 1, 2 and 3, and so on; if there are prompts, each pair shares one. A seeded
    coin decides which goes left. A pair has the id "ID ID", and lists of texts and tokens."""
    g = torch.Generator().manual_seed(seed)
    flips = torch.randint(2, (len(items) // 2,), generator=g).tolist()
    pairs = []
    for first, second, flip in zip(items[::2], items[1::2], flips):
        left, right = (second, first) if flip else (first, second)
        source = left["source"] if left["source"] == right["source"] else "mixed"
        pairs.append(left | {"id": f"{left['id']} {right['id']}", "source": source,
                             "text": [left["text"], right["text"]],
                             "tokens": [left["tokens"], right["tokens"]]})
    return pairs


def shuffled(items: list[dict], seed: int) -> list[dict]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]


# ---- Labelling by the machine --------------------------------------------------------------------
def feeling(compound: float) -> str:
    """VADER's compound score of a text, in [-1, 1] -> its label."""
    if abs(compound) < POSITIVE:
        return "neutral"
    return "positive" if compound > 0 else "negative"


def happier(left: float, right: float) -> str:
    """The scores of two texts -> the label of the pair."""
    return "left" if left > right else "right" if right > left else "tie"


def spans_of(length: int) -> list[tuple[int, int]]:
    """The parts of a sample that the machine labels besides the whole, as (start, end) in tokens.
    They are prefixes of the sample and prefixes of each quarter, in steps of 4 tokens.

        0               16              32              48              64
        |---+---+---+---+---+---+---+---+---+---+---+---+---+---+---+---|   15 prefixes of a sample
        |---+---+---+---|---+---+---+---|---+---+---+---|---+---+---+---|   4 of each quarter
    """
    quarter = max(length // 4, 1)
    of_sample = {(0, end) for end in range(length - 4, 0, -4)}
    of_quarters = {(start, end) for start in range(0, length - quarter + 1, quarter)
                   for end in range(start + quarter, start, -4)}
    return sorted(of_sample | of_quarters)


def english(items: list[dict]) -> float:
    """The fraction of words in these texts that are common English words."""
    texts = [text for item in items for text in np.ravel(item["text"])]
    spoken = [word for text in texts for word in words(str(text))]
    return sum(word in COMMON for word in spoken) / max(len(spoken), 1)


def label_by_vader(items: list[dict], path: Path, tokenizer: Tokenizer) -> list[str]:
    """Label items and spans with VADER (Hutto & Gilbert 2014); write `path`. -> items' labels."""
    vader, rows = SentimentIntensityAnalyzer(), []
    spans = spans_of(np.shape(items[0]["tokens"])[-1])

    def label(texts) -> str:  # of one text, or of a pair's two
        scores = [vader.polarity_scores(text)["compound"] for text in texts]
        return feeling(*scores) if len(scores) == 1 else happier(*scores)
    for item in tqdm(items, desc="label", mininterval=1):
        sides = np.atleast_2d(item["tokens"]).tolist()                # one list of tokens, or two
        parts = zip(*(tokenizer.decode_batch([side[i:j] for i, j in spans]) for side in sides))
        texts = [item["text"]] if isinstance(item["text"], str) else item["text"]
        rows.append(item | {"label": label(texts), "labeller": "vader",
                            "spans": [[i, j, label(t)] for (i, j), t in zip(spans, parts)]})
    write(path, jsonl(rows))
    return [row["label"] for row in rows]


# ---- Labelling by a person: one key per item, each answer on disk before the next question -------
def is_name(name: str) -> bool:
    """Whether a labeller's name can be part of a file name and is not the machine's."""
    return name.replace("-", "").isalnum() and name.lower() not in ("vader", "majority")


def need_person(name: str) -> None:
    """Raises UserError if `name` is not a labeller's name, or if there is no terminal."""
    require(is_name(name), f"{name!r} is not a labeller: a name has letters, digits and hyphens, "
                           "and is not vader or majority")
    require(sys.stdin.isatty() and sys.stdout.isatty(),
            "this asks a person for keys and needs a terminal: run the command in one")


def read_answers(path: Path, kind: str = "labels") -> list[dict]:
    """The last row about each item, in the order of labelling; its label may be "undo". Drops a
    last line that a kill has cut off. Raises UserError if a line is bad, and names the line."""
    if not path.exists() or not path.stat().st_size:
        return []
    known = {*ASK[kind][0].values(), "undo"}

    def right(row):
        return isinstance(row["id"], str) and row["label"] in known
    return last_of_each(read_rows(path, "", right, skip_last=is_cut(path)))


def is_cut(path: Path) -> bool:
    """Whether a kill has cut off the last line of a file, a JSON object."""
    lines = read_lines(path)
    open_end = path.read_bytes()[-1:] not in (b"\n", b"\r", b"\0")
    last = lines[-1][1].strip("\0 \t") if lines else ""
    return open_end and last.startswith("{") and not last.endswith("}")


def own_answers(path: Path, kind: str, labeller: str) -> list[dict]:
    """Lock a labeller's file, write it again as plain UTF-8 lines if an editor saved it otherwise,
    and return read_answers. Raises UserError if it holds answers of somebody else."""
    only_writer(path)
    rows = read_answers(path, kind)
    others = {str(row.get("labeller", labeller)) for row in rows}
    others = {name for name in others if name.casefold() != labeller.casefold()}
    require(not others, f"{path} holds answers of {', '.join(sorted(others))}: rename it after "
                        "them, or answer under another name")
    data = path.read_bytes() if path.exists() else b""
    lines = [line for _, line in read_lines(path)] if data else []
    if data and is_cut(path):
        print(f"{path}: dropping an unfinished last line")
        lines.pop()
    whole = "".join(f"{line}\n" for line in lines).encode()
    if whole != data:
        write(old_name(path), data)
        write(path, whole)
    return rows


def answer_file(out: Path, kind: str, labeller: str) -> Path:
    """The file of a labeller's answers. "Anna" and "anna" are one person."""
    path = out / f"{kind}-{labeller}.jsonl"
    same = [p for p in out.glob(f"{kind}-*.jsonl") if p.name.casefold() == path.name.casefold()]
    return path if path in same or not same else same[0]


def labels_of(rows: list[dict]) -> dict[str, str]:
    """id -> label, without undone answers."""
    return {row["id"]: row["label"] for row in rows if row["label"] != "undo"}


def counts(labels: dict[str, str], kind: str) -> str:
    given = Counter(labels.values())
    return ", ".join(f"{label} {given[label]}" for label in ASK[kind][0].values())


def as_text(item: dict) -> str:
    """What a person reads. Control characters must not reach the terminal."""
    text = item["text"]
    if not isinstance(text, str):
        text = "LEFT\n\n{}\n\nRIGHT\n\n{}".format(*text)
    if "prompt" in item:
        text = f"{item['prompt']}...\n{text}"
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def read_key() -> str:
    """Wait for one key, without Enter. An arrow key gives Escape and two letters. Ctrl-C still
    interrupts. The end of input gives "q"."""
    import termios  # not on Windows
    import tty
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        key = os.read(fd, 1)
        if key == b"\x1b" and select.select([fd], [], [], 0.01)[0]:
            key += os.read(fd, 2)
        return key.decode("utf-8", "replace").lower() or "q"
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def append(path: Path, rows: list[dict], item: dict, label: str, labeller: str) -> None:
    """Add an answer to `rows` and to the file. If somebody deleted the file, write all rows."""
    rows.append(item | {"label": label, "labeller": labeller, "time": round(time.time())})
    if not path.exists():
        return write(path, jsonl(rows))
    with open(path, "a", encoding="utf-8") as file:
        file.write(jsonl(rows[-1:]))
        file.flush()
        os.fsync(file.fileno())


def ask(items: list[dict], path: Path, labeller: str, kind: str) -> dict[str, str]:
    """Ask for one key per item and append each answer to `path` at once. Returns id -> label."""
    need_person(labeller)
    keys, question = ASK[kind]
    choices = "   ".join(f"{key} {label}" for key, label in keys.items())
    rows = own_answers(path, kind, labeller)
    by_id = {item["id"]: item for item in items}
    labels = {i: label for i, label in labels_of(rows).items() if i in by_id}
    queue = [item for item in reversed(items) if item["id"] not in labels]
    width = max(20, min(shutil.get_terminal_size().columns, 90))
    while queue:
        total = len(labels) + len(queue)
        print(f"\033[2J\033[H{len(labels) + 1} of {total}   {counts(labels, kind)}\n")
        for line in as_text(queue[-1]).split("\n"):
            print(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="    "))
        print(f"\n{choices}   u undo   q quit   ? help", flush=True)
        key = read_key()
        last = list(labels)[-1] if labels else None
        if key in keys:
            append(path, rows, queue[-1], keys[key], labeller)
            labels[queue.pop()["id"]] = keys[key]
        elif key == "u" and last:
            append(path, rows, by_id[last], "undo", labeller)
            del labels[last]
            queue.append(by_id[last])
        elif key == "q":
            break
        elif key == "?":
            print(f"\n{question}\nEvery key is saved at once; quit whenever you like and "
                  "run the same command to go on.\nAny key returns.", flush=True)
            read_key()
    print(f"\n{path}: {len(labels)} of {len(items)},", counts(labels, kind))
    return labels


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    check(cfg)
    only_writer(cfg.out / "samples.jsonl")
    model, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    require(cfg.length <= model.config.context,
            f"--length {cfg.length} is more than the {model.config.context} tokens the model has "
            "learned to read: lower it, or train with a larger --context")
    kind = "comparisons" if cfg.compare else "labels"
    path = answer_file(cfg.out, kind, cfg.labeller)
    if cfg.labeller != "vader":
        own_answers(path, kind, cfg.labeller)  # raises before anything is overwritten
    corpus = cfg.out / "corpus.txt"
    if cfg.prompts:
        longest = min(24, model.config.context - cfg.length)  # tokens; prompt and sample must fit
        require(longest > 0, f"--length {cfg.length} leaves no room for a prompt: lower it")
        write_prompts(corpus, tokenizer, longest, cfg.out / "prompts.json")

    n_corpus = round(cfg.n * cfg.corpus_fraction)
    items = draw_samples(model, tokenizer, cfg, cfg.n - n_corpus)
    if n_corpus:
        items += draw_snippets(corpus, tokenizer, cfg, n_corpus)
    write(cfg.out / "samples.jsonl", jsonl(items))
    if cfg.compare:
        items = pair_up(items, cfg.seed)
        write(cfg.out / "pairs.jsonl", jsonl(items))

    if cfg.labeller == "vader":
        labels = Counter(label_by_vader(items, path, tokenizer)).most_common()
        print(f"{path}: {len(items)} {kind},", ", ".join(f"{k} {v}" for k, v in labels))
        if (share := english(items[:1000])) < 0.1:
            print(f"warning: VADER reads English, but only {share:.1%} of the words of these texts "
                  "are common English ones. Its labels are noise here: label the texts yourself, "
                  f"{command('-m people label NAME')}", file=sys.stderr)
    else:
        ask(shuffled(items, cfg.seed), path, cfg.labeller, kind)
    write(cfg.out / "02.json", as_json(provenance(cfg)))
    finish(f"python 03_reward_model.py{' --comparisons' if cfg.compare else ''}")
