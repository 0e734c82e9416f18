"""Stage 2: draw samples from the base model and have them labelled positive, negative or neutral.

    python 02_sample_label.py                       # 32 s: 58.7 % of the samples positive
    python 02_sample_label.py --labeller anna       # one key per sample, in the terminal
    python 02_sample_label.py --labeller anna --corpus-fraction 0.2
    python 02_sample_label.py --sheet friends.html                      # a page to mail, and what
    python 02_sample_label.py --sheet friends.html --merge a.jsonl b.jsonl     # came back

Reads   out/base.safetensors
Writes  out/samples.jsonl (id, source, text, tokens), out/labels-NAME.jsonl (the same and the label),
        out/labels-vader-pieces.jsonl; with --compare the same as out/comparisons-*.jsonl

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
7. A sheet is one page that holds its items, its script and nothing else: it can be mailed, opened from
   disk, and sends nothing anywhere. What comes back is believed only where it matches the sheet.
8. --pick uncertain shows people what the reward model cannot decide. Those samples are not like the
   others, so a share is still picked at random, and every row says how it was picked.
9. With --prompts the prompt is context: what is labelled, rewarded and counted in the KL is the
   completion. Two samples share a prompt, so that --compare compares completions of one prompt.
"""
import hashlib
import html
import importlib
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
import time
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import krippendorff
import numpy as np
import torch
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import UserError, draw_prompts, fingerprint, finish, load, read_prompts, start, write

SCRIPT = "02_sample_label.py"
reward_model = importlib.import_module("03_reward_model")
KEYS = {"p": "positive", "n": "negative", "0": "neutral", "s": "skip"}
BATCH = 1024  # samples drawn before they are written
COMPARE = {"l": "left", "t": "tie", "r": "right", "s": "skip"}
QUESTION = "Which feeling does the text express? Judge the feeling, not how good it is; neutral: neither, or both alike."


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
    ids = [f"{base[:8]}-{cfg.seed}-{cfg.length}{'p' * cfg.prompts}-{i}" for i in range(cfg.n - n_corpus)]
    if cfg.prompts:
        prompts = read_prompts(path.with_name("corpus.txt"), tokenizer)[0]
        prompts = draw_prompts(prompts, -(-cfg.n // 2), cfg.seed).repeat_interleave(2, 0)  # two of each, to compare
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
                numbers = torch.arange(done, done + count)
                given = prompts[numbers] if cfg.prompts else None
                new = model.generate(numbers, cfg.length, cfg.seed, prompts=given)[0].tolist()
            else:
                new = [tokens[p:p + cfg.length].tolist() for p in places[done - (cfg.n - n_corpus):].tolist()]
            source = "model" if done < cfg.n - n_corpus else "corpus"
            fresh = [{"id": ids[done + i], "source": source, "text": text, "tokens": t}
                     for i, (text, t) in enumerate(zip(tokenizer.decode_batch(new), new))]
            if source == "model" and cfg.prompts:
                for row, prompt in zip(fresh, ([t for t in x if t >= 0] for x in given.tolist())):
                    row |= {"prompt": tokenizer.decode(prompt), "prompt_tokens": prompt}
            file.write("".join(json.dumps(row) + "\n" for row in fresh))
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
    """Two items each, in a seeded order which also decides who stands on the left: ids "ID ID", text and
    tokens of both in lists. Those that have prompts are paired with the other one of the same prompt."""
    g = torch.Generator().manual_seed(seed)
    if "prompt" in items[0]:
        flips = torch.randint(2, (len(items) // 2,), generator=g).tolist()
        two = [(b, a) if flip else (a, b) for a, b, flip in zip(items[::2], items[1::2], flips)]
    else:
        order = torch.randperm(len(items), generator=g).tolist()
        two = [(items[i], items[j]) for i, j in zip(order[::2], order[1::2])]
    return [a | {"id": f"{a['id']} {b['id']}", "source": a["source"] if a["source"] == b["source"] else "mixed", "text": [a["text"], b["text"]], "tokens": [a["tokens"], b["tokens"]]}
            for a, b in two]


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


def current_labels(rows: list[dict]) -> dict[str, str]:
    """id -> label, in the order of labelling: the last line about an item counts, an undo removes it."""
    labels: dict[str, str] = {}
    for row in rows:
        labels.pop(row["id"], None)
        if row["label"] != "undo":
            labels[row["id"]] = row["label"]
    return labels


def is_name(name: str) -> bool:
    """Whether it can stand in a file name of its own, beside those of the machine."""
    return name.replace("-", "").isalnum() and name.lower() not in ("vader", "vader-pieces", "majority")


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


def show(item: dict, labels: dict[str, str], total: int, keys: dict[str, str]) -> None:
    counts = "  ".join(f"{v} {list(labels.values()).count(v)}" for v in keys.values())
    text = item["text"] if isinstance(item["text"], str) else "LEFT\n\n{}\n\nRIGHT\n\n{}".format(*item["text"])
    text = f"{item['prompt']}...\n{text}" if "prompt" in item else text
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    width = min(shutil.get_terminal_size().columns, 90) - 4
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
    print(f"\033[2J\033[H{len(labels) + 1} of {total}   {counts}\n")
    choices = "   ".join(f"{k} {v}" for k, v in keys.items())
    print("\n".join("    " + line for line in lines) + f"\n\n{choices}   u undo   q quit   ? help", flush=True)


def label_in_terminal(items: list[dict], path: Path, labeller: str, keys: dict[str, str] = KEYS) -> dict[str, str]:
    """Ask for one key per item and append each answer to `path` at once. -> id -> label."""
    need_terminal()
    drop_unfinished_line(path)
    labels = current_labels(read_jsonl(path)) if path.exists() else {}
    by_id = {item["id"]: item for item in items}
    with open(path, "a", encoding="utf-8") as file:
        def append(item, label):
            row = item | {"label": label, "labeller": labeller, "time": round(time.time())}
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

        queue = [item for item in reversed(items) if item["id"] not in labels]
        while queue:
            show(queue[-1], labels, len(labels) + len(queue), keys)
            key = read_key()
            if key in keys:
                item = queue.pop()
                append(item, keys[key])
                labels[item["id"]] = keys[key]
            elif key == "u" and labels and (last := list(labels)[-1]) in by_id:
                append(by_id[last], "undo")
                del labels[last]
                queue.append(by_id[last])
            elif key == "q":
                break
            elif key == "?":
                print("\nJudge the feeling that the text expresses, not how good it is. Neutral or tie: neither, "
                      "or both alike.\nEvery key is saved at once; quit whenever you like and run the "
                      "same command to go on.\nAny key returns.", flush=True)
                read_key()
    return labels


# ---- Sheets: the same items in a browser, on a friend's machine --------------------------------------
def write_sheet(path: Path, kind: str, title: str, question: str, answers: dict[str, str], items: list[dict]) -> str:
    """One self-contained page. items: {"id", "text": one text or two to compare, ...}, which come back with
    the answers; answers: key -> label; kind: how the returned files are called. -> the sheet's hash."""
    page = (Path(__file__).parent / "sheet.html").read_text(encoding="utf-8")
    sheet = {"kind": kind, "title": title, "question": question, "answers": [*answers.items()], "items": items}
    sheet["hash"] = hashlib.sha256(json.dumps(sheet).encode()).hexdigest()[:16]
    if path.exists() and read_sheet(path)["hash"] != sheet["hash"]:
        raise UserError(f"{path} is a sheet of other items, whose answers may still come back: choose another name")
    # only this very script and style may run, and nothing may be loaded from anywhere
    script, style = (b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1].encode()).digest()).decode()
                     for tag in ("script", "style"))
    policy = f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    data = json.dumps(sheet).replace("<", "\\u003c")  # no sample can end the element that holds it
    write(path, page.replace("POLICY", policy).replace("TITLE", html.escape(title)).replace("DATA", data))
    return sheet["hash"]


def read_sheet(path: Path) -> dict:
    """What `write_sheet` wrote. Raises UserError if it is something else."""
    try:
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
        return json.loads(data[1])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a sheet: write one with --sheet {path}") from error


def returned(sheet: dict, files: tuple[Path, ...]) -> tuple[dict[str, dict[str, dict]], int]:
    """Answers that came back, checked against the sheet -> labeller -> id -> row, and the number of lines
    left out, each of which is told on standard error."""
    items, labels = {item["id"]: item for item in sheet["items"]}, [label for _, label in sheet["answers"]]
    people: dict[str, dict[str, dict]] = {}
    file_of: dict[str, Path] = {}
    wrong = 0
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing: name the files that came back")
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                row = json.loads(line)
                key, label, name, seconds = str(row["id"]), row["label"], str(row["labeller"]), float(row.get("seconds") or 0)
            except (ValueError, TypeError, KeyError):
                row, key, label, name, seconds = {}, "", "", "", 0
            for bad, why in ((not row, "broken"), (key not in items, "not an item of this sheet"),
                             (any(row.get(k) != v for k, v in items.get(key, {}).items()), "altered text"),
                             (label not in labels, f"label {label!r} is none of {', '.join(labels)}"),
                             (not is_name(name), f"labeller {name!r} is not a name"),
                             (file_of.get(name, path) != path, f"{name} already answered in {file_of.get(name)}")):
                if bad:
                    print(f"{path} line {number} left out: {why}", file=sys.stderr)
                    wrong += 1
                    break
            else:
                file_of[name] = path
                people.setdefault(name, {})[key] = items[key] | {"label": label, "labeller": name, "time": row.get("time"),
                                                                 "seconds": seconds}
    return people, wrong


def append_new(path: Path, rows: dict[str, dict]) -> int:
    """Add to a file those answers that it does not have yet -> their number."""
    drop_unfinished_line(path)
    before = current_labels(read_jsonl(path)) if path.exists() else {}
    new = [row for key, row in rows.items() if before.get(key) != row["label"]]
    write(path, (path.read_text(encoding="utf-8") if path.exists() else "") + "".join(json.dumps(row) + "\n" for row in new))
    return len(new)


def agreement(people: dict[str, dict[str, str]], labels: list[str]) -> dict:
    """people: name -> id -> label. -> "kappa" of each pair on its common items (Cohen 1960), "alpha" over all
    (Krippendorff 2004, nominal), and "disputed": ids on which answers differ."""
    ids = sorted({i for given in people.values() for i in given})
    coded = np.array([[labels.index(given[i]) if i in given else np.nan for i in ids] for given in people.values()])
    kappa = {}
    for (a, x), (b, y) in itertools.combinations(people.items(), 2):
        if common := [i for i in x if i in y]:
            kappa[f"{a}, {b}"] = (reward_model.cohen_kappa([x[i] for i in common], [y[i] for i in common]), len(common))
    shared = (~np.isnan(coded)).sum(0) > 1
    varied = len(np.unique(coded[:, shared][~np.isnan(coded[:, shared])])) > 1
    alpha = krippendorff.alpha(coded, level_of_measurement="nominal") if varied else float("nan")
    return {"kappa": kappa, "alpha": alpha,
            "disputed": [i for i, column in zip(ids, coded.T) if len(np.unique(column[~np.isnan(column)])) > 1]}


def choose(items: list[dict], cfg: Config, device, dtype) -> list[dict]:
    """The items of a sheet, in random order, each with how it was picked. "uncertain": where the reward model in
    --out gives the two answers most nearly the same probability."""
    g = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(items), generator=g).tolist()[cfg.sheet_skip:]
    n = min(len(order), cfg.sheet_n)
    if cfg.pick == "random":
        return [items[i] | {"picked": "random"} for i in order[:n]]
    model, _, _ = load(cfg.out / "reward.safetensors", "03_reward_model.py")
    model.to(device).dtype = dtype
    p = reward_model.predict(model, torch.tensor([item["tokens"] for item in items], device=device))[:, 0]
    p = torch.from_numpy(p).exp()
    at_random = order[: round(n * cfg.random_share)]
    rest = {*order} - {*at_random}
    unsure = [i for i in (p - 0.5).abs().argsort().tolist() if i in rest][: n - len(at_random)]
    if unsure:
        print(f"{len(unsure)} items with p from {p[unsure].min():.2f} to {p[unsure].max():.2f}, {len(at_random)} at random")
    chosen = [(i, "random") for i in at_random] + [(i, "uncertain") for i in unsure]
    return [items[i] | {"picked": how} for i, how in (chosen[j] for j in torch.randperm(n, generator=g).tolist())]


def merge(cfg: Config) -> None:
    """Check what came back, add it to out/, and say how far people agree."""
    sheet = read_sheet(cfg.sheet)
    people, wrong = returned(sheet, cfg.merge)
    for name, rows in people.items():
        path = cfg.out / f"{sheet['kind']}-{name}.jsonl"
        new = append_new(path, rows)
        counts = {v: sum(row["label"] == v for row in rows.values()) for _, v in sheet["answers"]}
        print(f"{path}: {len(rows)} answers, {new} of them new;", ", ".join(f"{k} {v}" for k, v in counts.items()),
              f"; {sum(row['seconds'] for row in rows.values()) / 60:.1f} minutes")
    given = {name: {k: row["label"] for k, row in rows.items() if row["label"] != "skip"} for name, rows in people.items()}
    if len(given) > 1:
        found, texts = agreement(given, [v for _, v in sheet["answers"] if v != "skip"]), {i["id"]: i["text"] for i in sheet["items"]}
        for pair, (kappa, n) in found["kappa"].items():
            print(f"{pair}: Cohen's kappa {kappa:.2f} on {n} common items")
        print(f"Krippendorff's alpha over all: {found['alpha']:.2f}; answers differ on {len(found['disputed'])} items")
        for key in found["disputed"][:10]:
            print("---", ", ".join(f"{name} {labels[key]}" for name, labels in given.items() if key in labels))
            print(*([texts[key]] if isinstance(texts[key], str) else texts[key]), sep="\n-- or --\n")
    if wrong:
        raise UserError(f"{wrong} lines were left out, for the reasons above; the others are kept in {cfg.out}")
    finish("python 03_reward_model.py" + " --comparisons" * (sheet["kind"] == "comparisons"), cfg.out)


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    if not (0 <= cfg.corpus_fraction <= 1 and cfg.n > 0 and 0 <= cfg.pieces <= cfg.length
            and (cfg.labeller == "vader" or is_name(cfg.labeller))):
        raise UserError("--n must be positive, --corpus-fraction in [0, 1], --pieces in [0, --length], "
                        "--labeller letters and digits, and not the machine's name")
    if cfg.prompts and cfg.corpus_fraction:
        raise UserError("--prompts needs --corpus-fraction 0: only samples have prompts, so people would see which they are")
    if cfg.pick == "uncertain" and cfg.sheet_skip:
        raise UserError("--sheet-skip counts items in random order: it cannot go with --pick uncertain")
    if cfg.sheet_n < 1 or not 0 <= cfg.sheet_skip < cfg.n or not 0 <= cfg.random_share <= 1 or cfg.merge and not cfg.sheet:
        raise UserError("--sheet-n must be positive, --sheet-skip below --n, --random-share in [0, 1], and --merge needs "
                        "the --sheet that the answers belong to")
    if cfg.merge:
        merge(cfg)
        raise SystemExit
    if cfg.labeller != "vader":
        need_terminal()
    model, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py")
    model.to(device).dtype = dtype
    began = time.time()
    items = draw(cfg.out / "samples.jsonl", model, tokenizer, cfg, fingerprint(model))
    print(f"{len(items)} items in {time.time() - began:.1f} s")

    kind, keys, question = ("comparisons", COMPARE, "Which of the two is the happier? Tie: neither, or both alike.") \
        if cfg.compare else ("labels", KEYS, QUESTION)
    if cfg.compare:
        items = pair_up(items, cfg.seed)
    if cfg.sheet:
        chosen = choose(items, cfg, device, dtype)
        if not chosen:
            raise UserError(f"no items are left after --sheet-skip {cfg.sheet_skip}: there are {len(items)}")
        write_sheet(cfg.sheet, kind, "Shakespeare, by a machine: how does it feel?", question, keys, chosen)
        print(f"{cfg.sheet}: {len(chosen)} items. Mail it; whoever opens it answers in a browser and sends a file back.")
        finish(f"python {SCRIPT} --sheet {cfg.sheet} --merge FILE.jsonl ...", cfg.out)
        raise SystemExit

    path = cfg.out / f"{kind}-{cfg.labeller}.jsonl"
    if cfg.labeller == "vader":
        vader = SentimentIntensityAnalyzer()
        pieces = cut(items, cfg.pieces, tokenizer) if cfg.pieces else []
        for file, todo in ((path.with_name(f"{kind}-vader-pieces.jsonl"), pieces), (path, items)):
            rows = []
            for item in tqdm(todo, desc="label", mininterval=1):
                texts = item["text"] if cfg.compare else [item["text"]]
                label = vader_label(*(vader.polarity_scores(text)["compound"] for text in texts))
                rows.append(item | {"label": label, "labeller": "vader"})
            write(file, "".join(json.dumps(row) + "\n" for row in rows))
        labels = current_labels(rows)
    else:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
        labels = label_in_terminal([items[i] for i in order], path, cfg.labeller, keys)
    counts = {v: list(labels.values()).count(v) for v in keys.values()}
    print(f"{path}: {len(labels)} labels,", ", ".join(f"{k} {v}" for k, v in counts.items()))
    finish("python 03_reward_model.py" + " --comparisons" * cfg.compare, cfg.out)
