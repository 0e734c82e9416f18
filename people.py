"""Asking people: one key per item in the terminal, or a page that can be mailed and what comes back.

02 asks for labels and comparisons, 05 for blind ratings. An item is {"id", "text", ...}, its text one
text, or two to compare, and perhaps a "prompt" that they continue. An answer is the item with "label",
"labeller" and "time": one line of a file that only ever grows. An undo is one more line, and the last
line about an item counts, so that no later run can orphan or lose a label.

The page is sheet.html with the items in it. It can be opened from disk, loads nothing and sends
nothing. What comes back is believed only where it matches the sheet.
"""
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from base64 import b64encode
from collections import Counter
from pathlib import Path

import krippendorff
import numpy as np

from model import UserError, write

FEELING = ({"p": "positive", "n": "negative", "0": "neutral", "s": "skip"},
           "Which feeling does the text express? Judge the feeling, not how good it is; "
           "neutral: neither, or both alike.")
ASK = {"labels": FEELING, "ratings": FEELING,  # kind -> key -> label, and the question
       "comparisons": ({"l": "left", "t": "tie", "r": "right", "s": "skip"},
                       "Which of the two is the happier? Tie: neither, or both alike.")}


# ---- Files of answers ----------------------------------------------------------------------------
def texts(item: dict) -> list[str]:
    """The text of an item, or both of a comparison."""
    return [item["text"]] if isinstance(item["text"], str) else item["text"]


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_jsonl(path: Path, *needed: str) -> list[dict]:
    """Rows, [] if there is no file. A kill in the middle of a write can leave a last line without its end: it is
    cut off. Raises UserError that names the first broken line, or one without an id or what else is needed."""
    rows, data = [], path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        whole, _, last = data.rpartition(b"\n")
        try:
            json.loads(last)  # whole after all: an editor had saved it
            data += b"\n"
        except ValueError:
            print(f"{path}: dropping an unfinished last line")
            data = whole + b"\n" * bool(whole)
        write(path, data)
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        try:
            rows.append(json.loads(line))
            [rows[-1][key] for key in ("id", *needed)]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} line {number} is broken ({line[:40]!r}): mend or delete it") from error
    return rows


def read_answers(path: Path) -> dict[str, str]:
    """id -> label, in the order of labelling: the last line about an item counts, an undo removes it."""
    labels: dict[str, str] = {}
    for row in read_jsonl(path, "label"):
        labels.pop(row["id"], None)
        if row["label"] != "undo":
            labels[row["id"]] = row["label"]
    return labels


def counts(labels: dict[str, str], kind: str) -> str:
    given = Counter(labels.values())
    return ", ".join(f"{label} {given[label]}" for label in ASK[kind][0].values())


def is_name(name: str) -> bool:
    """Whether it can stand in a file name of its own, beside those of the machine."""
    return name.replace("-", "").isalnum() and name.lower() not in ("vader", "vader-pieces", "majority")


# ---- In the terminal -----------------------------------------------------------------------------
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


def as_text(item: dict) -> str:
    """What a person reads; control characters would reach the terminal."""
    text = "LEFT\n\n{}\n\nRIGHT\n\n{}".format(*item["text"]) if len(texts(item)) == 2 else item["text"]
    text = f"{item['prompt']}...\n{text}" if "prompt" in item else text
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def show(item: dict, labels: dict[str, str], total: int, kind: str) -> None:
    width = min(shutil.get_terminal_size().columns, 90) - 4
    lines = [part for line in as_text(item).split("\n") for part in textwrap.wrap(line, width) or [""]]
    print(f"\033[2J\033[H{len(labels) + 1} of {total}   {counts(labels, kind)}\n")
    choices = "   ".join(f"{k} {v}" for k, v in ASK[kind][0].items())
    print("\n".join("    " + line for line in lines) + f"\n\n{choices}   u undo   q quit   ? help", flush=True)


def ask_in_terminal(items: list[dict], path: Path, labeller: str, kind: str) -> dict[str, str]:
    """Ask for one key per item and append each answer to `path` at once. -> id -> label."""
    need_terminal()
    keys, question = ASK[kind]
    labels = read_answers(path)
    by_id = {item["id"]: item for item in items}
    with open(path, "a", encoding="utf-8") as file:
        def append(item, label):
            row = item | {"label": label, "labeller": labeller, "time": round(time.time())}
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

        queue = [item for item in reversed(items) if item["id"] not in labels]
        while queue:
            show(queue[-1], labels, len(labels) + len(queue), kind)
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
                print(f"\n{question}\nEvery key is saved at once; quit whenever you like and "
                      "run the same command to go on.\nAny key returns.", flush=True)
                read_key()
    return labels


# ---- On a sheet ----------------------------------------------------------------------------------
def write_sheet(path: Path, kind: str, items: list[dict]) -> None:
    """One self-contained page."""
    page, (keys, question) = Path(__file__).with_name("sheet.html").read_text(encoding="utf-8"), ASK[kind]
    sheet = {"kind": kind, "question": question, "answers": [*keys.items()], "items": items}
    sheet["hash"] = hashlib.sha256(json.dumps(sheet).encode()).hexdigest()[:16]
    if path.exists() and read_sheet(path)["hash"] != sheet["hash"]:
        raise UserError(f"{path} is a sheet of other items, whose answers may still come back: choose another name")
    # only this very script and style may run, and nothing may be loaded from anywhere
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        policy += f"; {tag}-src 'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    data = json.dumps(sheet).replace("<", "\\u003c")  # no sample can end the element that holds it
    write(path, page.replace("POLICY", policy).replace("DATA", data))


def read_sheet(path: Path) -> dict:
    """What `write_sheet` wrote. Raises UserError if it is something else."""
    try:
        page = path.read_text(encoding="utf-8")
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
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
                item, label, name = items.get(row["id"]), row["label"], row["labeller"]
                answer = {"label": label, "labeller": name, "time": row.get("time"), "seconds": float(row.get("seconds") or 0)}
                why = ("not an item of this sheet" if item is None else
                       "altered text" if not item.items() <= row.items() else
                       f"label {label!r} is none of {', '.join(labels)}" if label not in labels else
                       f"labeller {name!r} is not a name" if not is_name(name) else
                       f"{name} already answered in {file_of[name]}" if file_of.setdefault(name, path) != path else "")
            except (ValueError, TypeError, KeyError, AttributeError):
                why = "broken"
            if why:
                print(f"{path} line {number} left out: {why}", file=sys.stderr)
                wrong += 1
            else:
                people.setdefault(name, {})[item["id"]] = item | answer
    return people, wrong


def collect(sheet: dict, files: tuple[Path, ...], out: Path) -> tuple[dict[str, dict[str, str]], int]:
    """Add what came back, where it is new, to out/KIND-NAME.jsonl -> labeller -> id -> label, and the number of
    lines left out."""
    people, wrong = returned(sheet, files)
    labels = {name: {key: row["label"] for key, row in rows.items()} for name, rows in people.items()}
    for name, rows in people.items():
        path = out / f"{sheet['kind']}-{name}.jsonl"
        before = read_answers(path)
        new = [row for key, row in rows.items() if before.get(key) != row["label"]]
        write(path, (path.read_text(encoding="utf-8") if path.exists() else "") + jsonl(new))
        print(f"{path}: {len(rows)} answers, {len(new)} of them new, "
              f"{sum(row['seconds'] for row in rows.values()) / 60:.1f} minutes;", counts(labels[name], sheet["kind"]))
    return labels, wrong


# ---- Agreement -----------------------------------------------------------------------------------
def cohen_kappa(a: list[str], b: list[str]) -> float:
    """Agreement of two labellers on the same items beyond chance (Cohen 1960): (po - pe) / (1 - pe)."""
    n, ca, cb = len(a), Counter(a), Counter(b)
    observed = sum(x == y for x, y in zip(a, b)) / n
    expected = sum(ca[k] * cb[k] for k in ca) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else 1.0


def kappas(people: dict[str, dict[str, str]]) -> dict[str, tuple[float, int]]:
    """name -> id -> label. -> "NAME and NAME" -> Cohen's kappa on their common items, and how many these are."""
    found = {}
    for (a, x), (b, y) in itertools.combinations(sorted(people.items()), 2):
        if common := [i for i in x if i in y]:
            found[f"{a} and {b}"] = (cohen_kappa([x[i] for i in common], [y[i] for i in common]), len(common))
    return found


def agreement(people: dict[str, dict[str, str]]) -> dict:
    """people: name -> id -> label. -> "kappa" of each pair with the number of its common items, "alpha" over
    all (Krippendorff 2004, nominal), and "disputed": ids on which answers differ. A skipped item is no answer."""
    people = {name: {i: label for i, label in given.items() if label != "skip"} for name, given in people.items()}
    ids = sorted({i for given in people.values() for i in given})
    labels = sorted({label for given in people.values() for label in given.values()})
    coded = np.array([[labels.index(given[i]) if i in given else np.nan for i in ids] for given in people.values()])
    shared = (~np.isnan(coded)).sum(0) > 1
    varied = len(np.unique(coded[:, shared][~np.isnan(coded[:, shared])])) > 1
    alpha = krippendorff.alpha(coded, level_of_measurement="nominal") if varied else float("nan")
    return {"kappa": kappas(people), "alpha": alpha,
            "disputed": [i for i, column in zip(ids, coded.T) if len(np.unique(column[~np.isnan(column)])) > 1]}


def print_agreement(people: dict[str, dict[str, str]], items: list[dict]) -> None:
    if len(people) < 2:
        return
    found, by_id = agreement(people), {item["id"]: item for item in items}
    for pair, (kappa, n) in found["kappa"].items():
        print(f"{pair}: Cohen's kappa {kappa:.2f} on {n} common items")
    print(f"Krippendorff's alpha over all: {found['alpha']:.2f}; answers differ on {len(found['disputed'])} items")
    for key in found["disputed"][:10]:
        print("---", ", ".join(f"{name} {labels[key]}" for name, labels in people.items() if key in labels))
        print(as_text(by_id[key]))


# ---- Blind ratings -------------------------------------------------------------------------------
def fisher_exact(a: int, n: int, b: int, m: int) -> float:
    """One-sided p-value that b of m is a higher share than a of n by chance (Fisher 1935)."""
    total = a + b
    return sum(math.comb(m, k) * math.comb(n, total - k) for k in range(b, min(m, total) + 1)
               if total - k <= n) / math.comb(n + m, total)


def fisher_power(p: float, q: float, n: int, level: float = 0.05) -> float:
    """Chance that n against n ratings reach p < level when the true shares are p and q."""
    def binomial(k, p):
        return math.comb(n, k) * p**k * (1 - p) ** (n - k)
    return sum(binomial(a, p) * binomial(b, q) for a in range(n + 1) for b in range(n + 1)
               if fisher_exact(a, n, b, n) < level)


def unblind(arms: dict[str, str], given: dict[str, dict[str, str]]) -> list[dict]:
    """arms: id -> "base", "happy" or "sad"; given: rater -> id -> label. -> for each rater, and for the majority
    of several, how often each arm against the base expresses its feeling, with Fisher's test and its power."""
    if len(given) > 1:  # summing over raters would count one sample several times
        majority = {i: Counter(answers[i] for answers in given.values()).most_common(1)[0] for i in arms}
        given = given | {"majority": {i: label if 2 * n > len(given) else "none" for i, (label, n) in majority.items()}}
    results = []
    for rater, answers in given.items():
        for arm, feeling in (("happy", "positive"), ("sad", "negative")):
            n = sum(a == "base" for a in arms.values())
            base, other = (sum(answers[i] == feeling for i in arms if arms[i] == a) for a in ("base", arm))
            if arm in arms.values():
                results.append({"rater": rater, "arm": arm, "feeling": feeling, "base": base, "other": other, "n": n,
                                "p": fisher_exact(base, n, other, n), "power": fisher_power(base / n, other / n, n)})
    return results
