"""Stage 2: draw samples from the base model and have them labelled positive, negative or neutral.

    python 02_sample_label.py                       # 32 s: 58.7 % of the samples positive
    python 02_sample_label.py --labeller anna       # one key per sample, in the terminal
    python 02_sample_label.py --labeller anna --corpus-fraction 0.2
    python 02_sample_label.py --sheet friends.html                           # a page to mail, and
    python 02_sample_label.py --sheet friends.html --merge a.jsonl b.jsonl   # what came back

Reads   out/base.safetensors
Writes  out/samples.jsonl (id, source, text, tokens), out/labels-NAME.jsonl (the same and the label),
        out/labels-vader-pieces.jsonl; with --compare the same as out/comparisons-*.jsonl

Decisions a reader may question:
1. Samples are unconditional, 64 tokens, temperature 1, nothing cut off: the distribution that PPO
   starts from and that every KL in this project is measured against.
2. The default labeller is VADER, a sentiment lexicon, so that the whole pipeline runs unattended.
   It stands in for a person, no more.
3. A person never sees where an item comes from, and its order is shuffled with the seed.
4. The machine also labels every sample cut into four pieces. A label of 64 tokens says little
   about which word it is due to; a label of 16 tokens says more, and the machine's cost nothing.
   03 trains on them first. People are never asked to do this.
5. The tokens are stored, not only the text: a sampled text need not encode to the same tokens.
6. --pick uncertain shows people what the reward model cannot decide. Those samples are not like the
   others, so a share is still picked at random, and every row says how it was picked.
7. With --prompts the prompt is context: what is labelled, rewarded and counted in the KL is the
   completion. Two samples share a prompt, so that --compare compares completions of one prompt.
"""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import (UserError, decode_prompts, draw_prompts, fingerprint, finish, load, read_prompts, score_of, start,
                   write)
from people import (ask_in_terminal, collect, counts, is_name, jsonl, need_terminal, print_agreement, read_jsonl,
                    read_sheet, texts, write_sheet)

SCRIPT = "02_sample_label.py"
BATCH = 1024  # samples drawn before they are written


@dataclass
class Config:
    labeller: str = "vader"       # "vader", or your name: then you label in the terminal
    n: int = 24_576               # items
    length: int = 64              # tokens of an item
    prompts: bool = False         # each sample continues a speaker's first line of the training text
    corpus_fraction: float = 0.0  # share of items that are snippets of the corpus
    out: Path = Path("out")       # where all stages write
    pieces: int = 4               # pieces of each sample that the machine labels too; 0: none
    seed: int = 0
    resume: bool = False          # keep the samples that a killed run had drawn
    compare: bool = False         # label pairs of samples: which of two is the happier
    sheet: Path | None = None     # write a page FILE.html, to be labelled in any browser, and label nothing
    sheet_n: int = 300            # its items
    sheet_skip: int = 0           # items picked at random to leave out first: those on a friend's sheet
    pick: Literal["random", "uncertain"] = "random"  # uncertain: where the reward model is least sure
    random_share: float = 0.25    # then still picked at random: only these estimate an accuracy without bias
    merge: tuple[Path, ...] = ()  # answers to --sheet that came back: check them, and add them to --out


ON_GPU = dict(n=32_768)


# ---- Samples -------------------------------------------------------------------------------------
def draw(path: Path, model, tokenizer, cfg: Config, base: str) -> list[dict]:
    """All items; those already in `path` are kept if cfg.resume, or if there is nothing to add."""
    n_corpus, corpus = round(cfg.n * cfg.corpus_fraction), path.with_name("corpus.txt")
    n_model = cfg.n - n_corpus
    ids = [f"{base[:8]}-{cfg.seed}-{cfg.length}{'p' * cfg.prompts}-{i}" for i in range(n_model)]
    prompts = draw_prompts(read_prompts(corpus, tokenizer) if cfg.prompts else None, -(-cfg.n // 2), cfg.seed)
    prompts = prompts.repeat_interleave(2, 0)  # two samples of each, to compare
    if n_corpus:
        if not corpus.exists():
            raise UserError(f"{corpus} is missing (the shipped model comes without its corpus): "
                            "use --corpus-fraction 0, or run 01_pretrain.py with --corpus FILE")
        tokens = torch.tensor(tokenizer.encode(corpus.read_text(encoding="utf-8")).ids)
        g = torch.Generator().manual_seed(cfg.seed)
        places = torch.randperm(len(tokens) // cfg.length, generator=g)[:n_corpus] * cfg.length
        if len(places) < n_corpus:
            raise UserError(f"the corpus has only {len(places)} snippets: lower --corpus-fraction")
        ids += [f"corpus-{p}-{cfg.length}" for p in places.tolist()]

    rows = read_jsonl(path)
    same = [row["id"] for row in rows] == ids[: len(rows)]
    if len(rows) < len(ids):  # whole batches only, so that each is drawn in the shape it always has
        rows = rows[: len(rows) // BATCH * BATCH] if cfg.resume else []
    if not same:
        rows = []
    write(path, jsonl(rows))
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(ids), desc="sample") as bar:
        bar.update(len(rows))
        while len(rows) < len(ids):
            done = len(rows)
            if done < n_model:
                numbers = torch.arange(done, min(done + BATCH, n_model))
                new = model.generate(numbers, cfg.length, cfg.seed, prompts=prompts[numbers])[0].tolist()
            else:
                new = [tokens[p:p + cfg.length].tolist() for p in places[done - n_model:].tolist()]
            fresh = [{"id": ids[done + i], "source": "model" if done < n_model else "corpus", "text": text, "tokens": t}
                     for i, (text, t) in enumerate(zip(tokenizer.decode_batch(new), new))]
            if cfg.prompts:
                for row, prompt in zip(fresh, decode_prompts(tokenizer, prompts[numbers])):
                    row["prompt"] = prompt
            file.write(jsonl(fresh))
            file.flush()
            rows += fresh
            bar.update(len(fresh))
    return rows


# ---- Labelling -----------------------------------------------------------------------------------
def vader_label(*compound: float) -> str:
    """Of one text by VADER's own thresholds (Hutto & Gilbert 2014): |compound| < 0.05 is neutral; of two,
    which is the happier."""
    if len(compound) == 2:
        left, right = compound
        return "left" if left > right else "right" if right > left else "tie"
    compound, = compound
    return "positive" if compound >= 0.05 else "negative" if compound <= -0.05 else "neutral"


def pair_up(items: list[dict], seed: int) -> list[dict]:
    """Each item with the one drawn after it, of the same prompt if there are prompts; a seeded coin decides who
    stands on the left. -> ids "ID ID", text and tokens of both in lists."""
    flips = torch.randint(2, (len(items) // 2,), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = [(b, a) if flip else (a, b) for a, b, flip in zip(items[::2], items[1::2], flips)]
    return [a | {"id": f"{a['id']} {b['id']}", "text": [a["text"], b["text"]], "tokens": [a["tokens"], b["tokens"]],
                 "source": a["source"] if a["source"] == b["source"] else "mixed"} for a, b in pairs]


def cut(items: list[dict], pieces: int, tokenizer) -> list[dict]:
    """Each item, or both sides of a pair, in `pieces` equal parts, with the ids ID#0, ID#1, ..."""
    parts = []
    for item in items:
        sides = np.array(item["tokens"])                             # (length,), or (2, length) of a pair
        size = sides.shape[-1] // pieces
        parts += [(f"{item['id']}#{k}", sides[..., k * size:(k + 1) * size]) for k in range(pieces)]
    tokens = np.array([t for _, t in parts])
    texts = np.array(tokenizer.decode_batch(tokens.reshape(-1, tokens.shape[-1]).tolist()), dtype=object)
    return [{"id": i, "source": "piece", "text": text, "tokens": t.tolist()}
            for (i, t), text in zip(parts, texts.reshape(tokens.shape[:-1]).tolist())]


@torch.no_grad()
def choose(items: list[dict], cfg: Config, base: str, device, dtype) -> list[dict]:
    """The items of a sheet, in random order, each with how it was picked. "uncertain": where the reward
    model in --out, which must stem from `base`, gives the two answers most nearly the same probability."""
    g = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(items), generator=g).tolist()[cfg.sheet_skip:]
    n = min(len(order), cfg.sheet_n)
    if cfg.pick == "random":
        return [items[i] | {"picked": "random"} for i in order[:n]]
    model, _, header = load(cfg.out / "reward.safetensors", "03_reward_model.py", device, dtype)
    if header["inputs"]["base"] != base:
        raise UserError(f"{cfg.out}/reward.safetensors stems from another base model: run 03_reward_model.py again")
    tokens = torch.tensor([item["tokens"] for item in items], device=device)  # (N, T), or (N, 2, T) of pairs
    logit = torch.cat([score_of(model.sentiment(y), "comparisons", "happy") for y in tokens.flatten(0, -2).split(256)])
    if tokens.dim() == 3:
        logit = logit[::2] - logit[1::2]
    elif header.get("kind") == "comparisons":  # only differences mean anything: from the base model's mean
        logit -= header["normalisation"]["happy"]["mean"]
    p = logit.sigmoid().tolist()
    at_random = order[: round(n * cfg.random_share)]
    unsure = sorted(order[len(at_random):], key=lambda i: abs(p[i] - 0.5))[: n - len(at_random)]
    if unsure:
        sure = [p[i] for i in unsure]
        print(f"{len(unsure)} items with p from {min(sure):.2f} to {max(sure):.2f}, {len(at_random)} at random")
    chosen = ([items[i] | {"picked": "random"} for i in at_random]
              + [items[i] | {"picked": "uncertain"} for i in unsure])
    return [chosen[i] for i in torch.randperm(n, generator=g).tolist()]


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    for wrong, why in (
            (cfg.n < 1 + cfg.compare or cfg.sheet_n < 1, "--n and --sheet-n must be positive, --n 2 to --compare"),
            (not 0 <= cfg.corpus_fraction <= 1, "--corpus-fraction in [0, 1]"),
            (not 0 <= cfg.random_share <= 1, "--random-share in [0, 1]"),
            (not 0 <= cfg.pieces <= cfg.length, "--pieces must be in [0, --length]"),
            (cfg.labeller != "vader" and not is_name(cfg.labeller),
             "--labeller must be letters and digits, and not the machine's name"),
            (cfg.prompts and cfg.corpus_fraction,
             "--prompts needs --corpus-fraction 0: only samples have prompts, and people would see it"),
            (not cfg.sheet and (cfg.merge or cfg.sheet_skip or cfg.pick != "random"),
             "--merge, --sheet-skip and --pick are about a sheet: name it with --sheet"),
            (cfg.sheet_skip < 0 or cfg.sheet_skip and cfg.pick != "random",
             "--sheet-skip cannot be negative, and cannot go with --pick uncertain: it counts items in random order")):
        if wrong:
            raise UserError(why)
    if cfg.merge:
        sheet = read_sheet(cfg.sheet)
        people, wrong = collect(sheet, cfg.merge, cfg.out)
        print_agreement(people, sheet["items"])
        if wrong:
            raise UserError(f"{wrong} lines were left out, for the reasons above; {cfg.out} has the others")
        finish("python 03_reward_model.py" + " --comparisons" * (sheet["kind"] == "comparisons"), cfg.out)
        raise SystemExit
    if cfg.labeller != "vader" and not cfg.sheet:
        need_terminal()
    model, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    base = fingerprint(model)
    began = time.time()
    items = draw(cfg.out / "samples.jsonl", model, tokenizer, cfg, base)
    print(f"{len(items)} items in {time.time() - began:.1f} s")

    kind = "comparisons" if cfg.compare else "labels"
    if cfg.compare:
        items = pair_up(items, cfg.seed)
    if cfg.sheet:
        chosen = choose(items, cfg, base, device, dtype)
        if not chosen:
            raise UserError(f"no items are left after --sheet-skip {cfg.sheet_skip}: there are {len(items)}")
        write_sheet(cfg.sheet, kind, chosen)
        print(f"{cfg.sheet}: {len(chosen)} items. Mail it; a browser opens it and saves a file to send back.")
        finish(f"python {SCRIPT} --sheet {cfg.sheet} --merge FILE.jsonl ...", cfg.out)
        raise SystemExit

    path = cfg.out / f"{kind}-{cfg.labeller}.jsonl"
    if cfg.labeller == "vader":
        vader = SentimentIntensityAnalyzer()
        pieces = cut(items, cfg.pieces, tokenizer) if cfg.pieces else []
        for file, todo in ((path.with_name(f"{kind}-vader-pieces.jsonl"), pieces), (path, items)):
            rows = []
            for item in tqdm(todo, desc="label", mininterval=1):
                label = vader_label(*(vader.polarity_scores(text)["compound"] for text in texts(item)))
                rows.append(item | {"label": label, "labeller": "vader"})
            write(file, jsonl(rows))
        labels = {row["id"]: row["label"] for row in rows}
    else:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
        labels = ask_in_terminal([items[i] for i in order], path, cfg.labeller, kind)
    print(f"{path}: {len(labels)} labels,", counts(labels, kind))
    finish("python 03_reward_model.py" + " --comparisons" * cfg.compare, cfg.out)
