"""Write a page of items that can be mailed, and collect the answers that come back.

The page is sheet.html with the items in it. It needs only a browser, loads nothing, sends nothing,
and saves a file. We accept an answer only if it matches the sheet.
"""
import hashlib
import json
import re
import sys
from base64 import b64encode
from collections import Counter
from pathlib import Path

from model import (
    UserError,
    command,
    jsonl,
    latest,
    parse,
    read_lines,
    read_rows,
    require,
    time_of,
    write,
)
from people.answers import is_item, stage


def write_sheet(path: Path, kind: str, items: list[dict]) -> None:
    """Write one self-contained page. Raises UserError if `path` already holds something else."""
    page = Path(__file__).with_name("sheet.html").read_text(encoding="utf-8")
    keys, question = stage.ASK[kind]
    sheet = {"kind": kind, "question": question, "answers": [*keys.items()], "items": items}
    sheet["hash"] = hashlib.sha256(json.dumps(sheet).encode()).hexdigest()[:16]
    require(not path.exists() or read_sheet(path)["hash"] == sheet["hash"],
            f"{path} is a sheet of other items, whose answers may still come back: choose another "
            "name")
    # the browser may use only this script and style, and may load nothing
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    data = json.dumps(sheet).replace("<", "\\u003c")  # no sample can close the data element
    write(path, page.replace("POLICY", policy).replace("DATA", data))


def read_sheet(path: Path) -> dict:
    """Read what `write_sheet` wrote. Raises UserError if the file is something else."""
    element = r'<script type="application/json" id="data">(.*?)</script>'
    keys = {"hash", "kind", "question", "answers", "items"}
    other = (f"{path} is not a sheet: name the page first, then the answers. To make a page, run "
             f"{command('-m people sheet PAGE.html')}")
    require(path.is_file(), other)
    try:
        page = path.read_text(encoding="utf-8-sig")
        return parse(re.search(element, page, re.S)[1], lambda sheet: keys <= sheet.keys()
                     and sheet["kind"] in stage.ASK and all(map(is_item, sheet["items"]))
                     and all(key + label for key, label in sheet["answers"]))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(other) from error


def asks_about(sheet: dict, out: Path) -> bool:
    """Say whether a sheet asks about samples, pairs or ratings of the run in `out`."""
    first = sheet["items"][0]["id"]
    if sheet["kind"] == "ratings":
        return (out / f"key-{first.rpartition('-')[0]}.json").exists()
    path = out / ("pairs.jsonl" if sheet["kind"] == "comparisons" else "samples.jsonl")
    if not path.exists():
        return False
    known = {row["id"] for row in read_rows(path, "02_sample_label.py", is_item)}
    return any(item["id"] in known for item in sheet["items"])


def fault(row, items: dict[str, dict], labels: list[str]) -> str:
    """Say what is wrong with an answer that came back, or return "" if it is fine."""
    try:
        item, label, name = items.get(row["id"]), row["label"], row["labeller"]
        if item is None:
            return "not an item of this sheet"
        if not item.items() <= row.items():
            return "altered text"
        if label not in labels:
            return f"label {label!r} is none of {', '.join(labels)}"
        if not stage.is_name(name):
            return f"labeller {name!r} is not a name"
        return ""
    except (ValueError, TypeError, KeyError, AttributeError):
        return "broken"


def seconds_of(row: dict) -> float:
    """Read how long an answer took; 0 if the row does not say."""
    given = row.get("seconds")
    return float(given) if isinstance(given, int | float) and 0 <= given < 1e5 else 0.0


def returned(sheet: dict, files: list[Path]) -> tuple[dict[str, dict[str, dict]], int]:
    """Check the answers that came back against the sheet -> labeller -> id -> row, and the number
    of lines left out. Standard error says which lines, and why."""
    items = {item["id"]: item for item in sheet["items"]}
    labels = [label for _, label in sheet["answers"]]
    found, wrong = [], 0
    for path in files:
        require(path.is_file(), f"{path} is missing: name the files that came back")
        lines = read_lines(path)
        require(len(lines) > 0, f"there are no answers in {path}")
        require(lines[0][1].lstrip().startswith("{"), f"{path} is not the file that the page "
                "saves: that one has a JSON object on each line")
        for number, line in lines:
            try:
                row = parse(line, lambda row: isinstance(row, dict))
                why = fault(row, items, labels)
            except ValueError:
                why = "broken"
            if why:
                print(f"{path} line {number} left out: {why}", file=sys.stderr)
                wrong += 1
                continue
            found.append(items[row["id"]] | {"label": row["label"], "labeller": row["labeller"],
                                             "time": time_of(row), "seconds": seconds_of(row)})
    require(len(found) > 0, "no line is an answer to this page: is it another page's file?")
    given: dict[tuple, set] = {}
    for row in found:
        given.setdefault((row["labeller"].casefold(), row["id"]), set()).add(row["label"])
    for name, n in Counter(name for (name, _), labels in given.items() if len(labels) > 1).items():
        print(f"warning: {name} answered {n} items twice, differently: the later answer counts. "
              "Did two people choose one name?", file=sys.stderr)
    people: dict[str, dict[str, dict]] = {}
    for row in latest(found):
        people.setdefault(row["labeller"], {})[row["id"]] = row
    return people, wrong


def collect(sheet: dict, files: list[Path], out: Path) -> int:
    """Add the new answers to out/KIND-NAME.jsonl -> the number of lines left out. If an item has
    two answers, the later one counts."""
    kind = sheet["kind"]
    people, wrong = returned(sheet, files)
    for name, rows in people.items():
        path = stage.answer_file(out, kind, name)
        before = {row["id"]: row for row in stage.own_answers(path, kind, name)}
        differ = [row for key, row in rows.items()
                  if key not in before or row["label"] != before[key]["label"]]
        new = [row for row in differ if row["id"] not in before or not time_of(row)
               or time_of(row) >= time_of(before[row["id"]])]
        changed, old = sum(row["id"] in before for row in new), len(differ) - len(new)
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        write(path, kept + jsonl(new))
        minutes = sum(row["seconds"] for row in rows.values()) / 60
        labels = {key: row["label"] for key, row in rows.items()}
        print(f"{path}: {len(rows)} answers, {len(new)} of them new, {minutes:.1f} minutes;",
              stage.counts(labels, kind))
        if old:
            print(f"warning: {old} answers are older than those in {path}: left out",
                  file=sys.stderr)
        if changed:
            print(f"warning: {changed} of {name}'s answers replace earlier, different ones. Is it "
                  f"the same person? If not, delete the last {len(new)} lines of {path}",
                  file=sys.stderr)
    return wrong
