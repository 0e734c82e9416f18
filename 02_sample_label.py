"""Stage 2: draw samples from the base model and have them labelled positive, negative or neutral.

    python 02_sample_label.py                       # 46 s: 58.7 % of the samples positive
    python 02_sample_label.py --labeller anna       # by you: one key per sample, in the terminal
    python 02_sample_label.py --compare             # pairs instead: which of two is the happier

`python -m people` has more for people: pages to mail to friends, and what comes back.

Reads   out/base.safetensors; out/corpus.txt for --prompts and --corpus-fraction
Writes  out/samples.jsonl (id, source, text, tokens), out/labels-NAME.jsonl (the same and a label),
        out/labels-vader-pieces.jsonl; with --compare out/pairs.jsonl and out/comparisons-*.jsonl;
        with --prompts out/prompts.json

Decisions a reader may question:
1. Samples are unconditional, 64 tokens, temperature 1, without top-k or top-p: the distribution
   that PPO starts from and that every KL in this project is measured against.
2. The default labeller is VADER, a sentiment lexicon, so that the whole pipeline runs unattended.
   It stands in for a person, no more.
3. A person never sees where an item comes from, and gets them in a random order.
4. The machine also labels every sample cut into four pieces. One label for 64 tokens hardly shows
   which word it is due to, one for 16 tokens does, and the machine's labels are free. 03 trains on
   them first. People are never asked to do this.
5. The tokens are stored, not only the text: a sampled text need not encode to the same tokens.
6. With --prompts the prompt is context: what is labelled, rewarded and counted in the KL is the
   completion. Two samples share a prompt, so that --compare compares completions of one prompt.
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import people
from model import GPT, load
from running import finish, require, start, write
from running.stages import fingerprint
from running.text import decode_prompts, draw_prompts, read_prompts, texts_of
from running.vader import POSITIVE, compound_scores


@dataclass
class Config:
    labeller: str = "vader"       # "vader", or your name: then you label in the terminal
    n: int = 24_576               # samples; --compare makes half as many pairs
    length: int = 64              # tokens of an item
    compare: bool = False         # label pairs of items: which of two is the happier
    prompts: bool = False         # each sample continues a speaker's first line in the corpus
    corpus_fraction: float = 0.0  # share of items that are snippets of the corpus
    pieces: int = 4               # pieces of each sample that the machine labels too; 0: none
    out: Path = Path("out")       # where all stages write
    seed: int = 0


ON_GPU = dict(n=32_768)


def check(cfg: Config) -> None:
    require(cfg.n >= 1 and cfg.length >= 1, "--n and --length must be positive")
    require(cfg.n >= 2 or not cfg.compare, "--compare needs --n 2 or more")
    require(0 <= cfg.corpus_fraction <= 1, "--corpus-fraction must be in [0, 1]")
    require(0 <= cfg.pieces <= cfg.length, "--pieces must be in [0, --length]")
    require(not (cfg.prompts and cfg.corpus_fraction),
            "--prompts needs --corpus-fraction 0: without a prompt a snippet would be known")
    if cfg.labeller != "vader":
        people.need_name(cfg.labeller)
        people.need_terminal()


# ---- Items to label ------------------------------------------------------------------------------
def draw_samples(model: GPT, tokenizer: Tokenizer, cfg: Config, n: int) -> list[dict]:
    """n samples of the model, with --prompts each with its prompt."""
    train_prompts = read_prompts(cfg.out / "prompts.json", "train") if cfg.prompts else None
    prompts = draw_prompts(train_prompts, -(-n // 2), cfg.seed).repeat_interleave(2, 0)[:n]
    prompted = "p" if cfg.prompts else ""
    name = f"{fingerprint(model)[:8]}-{cfg.seed}-{cfg.length}{prompted}"
    items = []
    for numbers in tqdm(torch.arange(n).split(1024), desc="sample"):
        y, _ = model.generate(numbers, cfg.length, cfg.seed, prompts=prompts[numbers])  # (1024, T)
        for number, tokens in zip(numbers.tolist(), y.tolist()):
            items.append({"id": f"{name}-{number}", "source": "model",
                          "text": tokenizer.decode(tokens), "tokens": tokens})
    if cfg.prompts:
        for item, prompt in zip(items, decode_prompts(tokenizer, prompts)):
            item["prompt"] = prompt
    return items


def need_corpus(corpus: Path, flag: str) -> None:
    require(corpus.exists(), f"{corpus} is missing (the shipped model comes without its corpus): "
                             f"run 01_pretrain.py with --corpus FILE, or leave out {flag}")


def draw_snippets(corpus: Path, tokenizer: Tokenizer, cfg: Config, n: int) -> list[dict]:
    """n snippets of the corpus, at different places. Raises UserError if there are not as many."""
    need_corpus(corpus, "--corpus-fraction")
    ids = tokenizer.encode(corpus.read_text(encoding="utf-8")).ids
    g = torch.Generator().manual_seed(cfg.seed)
    places = (torch.randperm(len(ids) // cfg.length, generator=g)[:n] * cfg.length).tolist()
    require(len(places) == n, f"{corpus} has {len(places)} snippets: lower --corpus-fraction")
    return [{"id": f"corpus-{p}-{cfg.length}", "source": "corpus", "tokens": ids[p:p + cfg.length],
             "text": tokenizer.decode(ids[p:p + cfg.length])} for p in places]


def find_prompts(part: str, text: str, tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """Every speaker's name ("Romeo:", or "ROMEO." as Project Gutenberg prints it) with the first
    line of the speech, of at most `longest` tokens, each once. Raises UserError if there are none.
    """
    names = (r"[A-Z][^\n:]{0,30}:", r"[A-Z][A-Z ,'’]{0,30}\.")
    found = [dict.fromkeys(re.findall(rf"^{name}\n[^\n]+\n", text, re.M)) for name in names]
    candidates = list(max(found, key=len))
    prompts = [e.ids for e in tokenizer.encode_batch(candidates) if len(e.ids) <= longest]
    require(len(prompts) > 0, f"the {part} text has no prompts: a speaker's name and a colon on a "
                              f"line, and the line after it, {longest} tokens at most")
    return prompts


def write_prompts(corpus: Path, tokenizer: Tokenizer, longest: int, path: Path) -> None:
    """Of the training text, and for 05 of the held-out last 5 % (as in 01)."""
    need_corpus(corpus, "--prompts")
    text = corpus.read_text(encoding="utf-8")
    cut = int(len(text) * 0.95)
    held_out = text[cut:].partition("\n")[2]
    write(path, json.dumps({"train": find_prompts("training", text[:cut], tokenizer, longest),
                            "held_out": find_prompts("held-out", held_out, tokenizer, longest)}))


def pair_up(items: list[dict], seed: int) -> list[dict]:
    """Items 0 and 1, 2 and 3, ..., of one prompt if there are prompts; a seeded coin decides who
    stands on the left. -> ids "ID ID", text and tokens of both in lists."""
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


# ---- Labelling by the machine --------------------------------------------------------------------
def feeling(compound: float) -> str:
    """The label of a text from its score, by VADER's own thresholds."""
    if abs(compound) < POSITIVE:
        return "neutral"
    return "positive" if compound > 0 else "negative"


def happier(left: float, right: float) -> str:
    """The label of two texts from their scores."""
    return "left" if left > right else "right" if right > left else "tie"


def cut_up(items: list[dict], pieces: int, tokenizer: Tokenizer) -> list[dict]:
    """Each item, or both sides of a pair, in `pieces` equal parts, with the ids ID#0, ID#1, ..."""
    parts = []
    for item in items:
        tokens = np.array(item["tokens"])                             # (length,), or (2, length)
        for k in range(pieces):
            size = tokens.shape[-1] // pieces
            part = tokens[..., k * size:(k + 1) * size].tolist()
            text = tokenizer.decode_batch(part) if tokens.ndim == 2 else tokenizer.decode(part)
            parts.append({"id": f"{item['id']}#{k}", "source": "piece", "text": text,
                          "tokens": part})
    return parts


def label_by_vader(items: list[dict], path: Path) -> list[str]:
    """Writes path: each item with its label."""
    scores = iter(compound_scores([text for item in items for text in texts_of(item)], "label"))
    labels = []
    for item in items:
        if isinstance(item["text"], str):
            labels.append(feeling(next(scores)))
        else:
            labels.append(happier(next(scores), next(scores)))
    rows = [item | {"label": label, "labeller": "vader"} for item, label in zip(items, labels)]
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return labels


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    check(cfg)
    model, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    require(cfg.length <= model.config.context,
            f"--length {cfg.length} is more than the {model.config.context} tokens the model has "
            "learned to read: lower it, or train with a larger --context")
    corpus = cfg.out / "corpus.txt"
    if cfg.prompts:
        longest = min(24, model.config.context - cfg.length)  # tokens; both fit the context
        write_prompts(corpus, tokenizer, longest, cfg.out / "prompts.json")

    n_corpus = round(cfg.n * cfg.corpus_fraction)
    items = draw_samples(model, tokenizer, cfg, cfg.n - n_corpus)
    if n_corpus:
        items += draw_snippets(corpus, tokenizer, cfg, n_corpus)
    write(cfg.out / "samples.jsonl", "".join(json.dumps(item) + "\n" for item in items))
    if cfg.compare:
        items = pair_up(items, cfg.seed)
        write(cfg.out / "pairs.jsonl", "".join(json.dumps(item) + "\n" for item in items))

    if cfg.labeller == "vader":
        kind = "comparisons" if cfg.compare else "labels"
        pieces = cut_up(items, cfg.pieces, tokenizer)
        label_by_vader(pieces, cfg.out / f"{kind}-vader-pieces.jsonl")
        labels = label_by_vader(items, cfg.out / f"{kind}-vader.jsonl")
        counts = ", ".join(f"{label} {n}" for label, n in Counter(labels).most_common())
        print(f"{cfg.out}/{kind}-vader.jsonl: {len(labels)} {kind}, {counts}")
    else:
        people.label(cfg.labeller, cfg.out, cfg.compare, cfg.seed)
    finish("python 03_reward_model.py" + (" --comparisons" if cfg.compare else ""), cfg.out)
