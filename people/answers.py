"""Items to ask about, and the files of answers."""
import json
from collections import Counter
from pathlib import Path

import torch

from running import UserError, require, write
from running.text import texts_of

FEELING = ({"p": "positive", "n": "negative", "0": "neutral", "s": "skip"},
           "Which feeling does the text express? Judge the feeling, not how good it is; "
           "neutral: neither, or both alike.")
ASK = {"labels": FEELING, "ratings": FEELING,  # kind -> key -> label, and the question
       "comparisons": ({"l": "left", "t": "tie", "r": "right", "s": "skip"},
                       "Which of the two is the happier? Tie: neither, or both alike.")}


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_text(item: dict) -> str:
    """What a person reads; control characters would reach the terminal."""
    text = item["text"]
    if len(texts_of(item)) == 2:
        text = "LEFT\n\n{}\n\nRIGHT\n\n{}".format(*text)
    if "prompt" in item:
        text = f"{item['prompt']}...\n{text}"
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def is_name(name: str) -> bool:
    """Whether it can stand in a file name of its own, beside those of the machine."""
    taken = ("vader", "vader-pieces", "majority")
    return name.replace("-", "").isalnum() and name.lower() not in taken


def need_name(name: str) -> None:
    require(is_name(name), f"{name!r} is not a labeller: a name has letters and digits, and is not "
                           "the machine's name")


def read_items(out: Path, kind: str, seed: int) -> list[dict]:
    """The samples that 02 drew, or its pairs, in the random order of `seed`. Raises UserError if
    there are none."""
    require(0 <= seed < 2**31, "--seed must be in [0, 2^31)")
    pairs = kind == "comparisons"
    path = out / ("pairs.jsonl" if pairs else "samples.jsonl")
    command = "02_sample_label.py --compare" if pairs else "02_sample_label.py"
    require(path.exists(), f"{path} is missing: run {command} first")
    items = read_jsonl(path, "text")
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]


def read_jsonl(path: Path, *needed: str) -> list[dict]:
    """Rows, [] if there is no file. A kill in the middle of a write can leave a last line without
    its end: it is cut off. Raises UserError that names the first broken line, or one without an id
    or what else is needed."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        whole, _, last = data.rpartition(b"\n")
        try:
            json.loads(last)  # whole after all: an editor had saved it
            data += b"\n"
        except ValueError:
            print(f"{path}: dropping an unfinished last line")
            data = whole + b"\n" * bool(whole)
        write(path, data)
    rows = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        try:
            row = json.loads(line)
            for key in ("id", *needed):
                row[key]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} line {number} is broken ({line[:40]!r}): mend or delete it") \
                from error
        rows.append(row)
    return rows


def read_answers(path: Path) -> dict[str, str]:
    """id -> label, in the order of labelling: the last line about an item counts, an undo removes
    it."""
    labels: dict[str, str] = {}
    for row in read_jsonl(path, "label"):
        labels.pop(row["id"], None)
        if row["label"] != "undo":
            labels[row["id"]] = row["label"]
    return labels


def counts(labels: dict[str, str], kind: str) -> str:
    given = Counter(labels.values())
    keys, _ = ASK[kind]
    return ", ".join(f"{label} {given[label]}" for label in keys.values())


def answers_in(out: Path, kind: str) -> dict[str, dict[str, str]]:
    """All answers of a kind -> labeller -> id -> label."""
    found = {}
    for path in sorted(out.glob(f"{kind}-*.jsonl")):
        name = path.stem.removeprefix(f"{kind}-")
        if name != "vader-pieces":
            found[name] = read_answers(path)
    return found
