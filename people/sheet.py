"""sheet.html with the items in it: a page that can be mailed, and what comes back.

It needs a browser, loads nothing, sends nothing, and saves a file. What comes back is believed only
where it matches the sheet.
"""
import hashlib
import json
import re
import sys
from base64 import b64encode
from pathlib import Path

from model import UserError, jsonl, require, write
from people.answers import stage


def write_sheet(path: Path, kind: str, items: list[dict]) -> None:
    """One self-contained page. Raises UserError rather than replace a sheet of other items."""
    page = Path(__file__).with_name("sheet.html").read_text(encoding="utf-8")
    keys, question = stage.ASK[kind]
    sheet = {"kind": kind, "question": question, "answers": [*keys.items()], "items": items}
    sheet["hash"] = hashlib.sha256(json.dumps(sheet).encode()).hexdigest()[:16]
    require(not path.exists() or read_sheet(path)["hash"] == sheet["hash"],
            f"{path} is a sheet of other items, whose answers may still come back: choose another "
            "name")
    # only this very script and style may run, and nothing may be loaded from anywhere
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    data = json.dumps(sheet).replace("<", "\\u003c")  # no sample can end the element that holds it
    write(path, page.replace("POLICY", policy).replace("DATA", data))


def read_sheet(path: Path) -> dict:
    """What `write_sheet` wrote. Raises UserError if it is something else."""
    element = r'<script type="application/json" id="data">(.*?)</script>'
    try:
        page = path.read_text(encoding="utf-8")
        return json.loads(re.search(element, page, re.S)[1])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a sheet: `python -m people` writes one") from error


def fault(row, items: dict[str, dict], labels: list[str], file_of: dict[str, Path],
          path: Path) -> str:
    """What is wrong with an answer that came back, or ""."""
    try:
        item, label, name = items.get(row["id"]), row["label"], row["labeller"]
        float(row.get("seconds") or 0)
        if item is None:
            return "not an item of this sheet"
        if not item.items() <= row.items():
            return "altered text"
        if label not in labels:
            return f"label {label!r} is none of {', '.join(labels)}"
        if not stage.is_name(name):
            return f"labeller {name!r} is not a name"
        if file_of.setdefault(name, path) != path:
            return f"{name} already answered in {file_of[name]}"
        return ""
    except (ValueError, TypeError, KeyError, AttributeError):
        return "broken"


def returned(sheet: dict, files: list[Path]) -> tuple[dict[str, dict[str, dict]], int]:
    """Answers that came back, checked against the sheet -> labeller -> id -> row, and the number of
    lines left out, each of which is told on standard error."""
    items = {item["id"]: item for item in sheet["items"]}
    labels = [label for _, label in sheet["answers"]]
    people: dict[str, dict[str, dict]] = {}
    file_of: dict[str, Path] = {}
    wrong = 0
    for path in files:
        require(path.is_file(), f"{path} is missing: name the files that came back")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            why = fault(row, items, labels, file_of, path)
            if why:
                print(f"{path} line {number} left out: {why}", file=sys.stderr)
                wrong += 1
                continue
            answer = {"label": row["label"], "labeller": row["labeller"], "time": row.get("time"),
                      "seconds": float(row.get("seconds") or 0)}
            people.setdefault(row["labeller"], {})[row["id"]] = items[row["id"]] | answer
    return people, wrong


def collect(sheet: dict, files: list[Path], out: Path) -> int:
    """Add what came back, where it is new, to out/KIND-NAME.jsonl -> number of lines left out."""
    kind = sheet["kind"]
    people, wrong = returned(sheet, files)
    for name, rows in people.items():
        path = out / f"{kind}-{name}.jsonl"
        before = stage.read_answers(path)
        new = [row for key, row in rows.items() if before.get(key) != row["label"]]
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        write(path, kept + jsonl(new))
        minutes = sum(row["seconds"] for row in rows.values()) / 60
        labels = {key: row["label"] for key, row in rows.items()}
        print(f"{path}: {len(rows)} answers, {len(new)} of them new, {minutes:.1f} minutes;",
              stage.counts(labels, kind))
    return wrong
