"""One key per item in the terminal, each answer on the disk before the next question."""
import json
import os
import shutil
import sys
import textwrap
import time
from pathlib import Path

from people.agreement import print_agreement
from people.answers import ASK, answers_in, as_text, counts, need_name, read_answers, read_items
from running import require


def label(name: str, out: Path, compare: bool, seed: int) -> None:
    """Ask `name` about the samples in `out`, or about its pairs; then say how far others agree."""
    need_name(name)
    kind = "comparisons" if compare else "labels"
    items = read_items(out, kind, seed)
    path = out / f"{kind}-{name}.jsonl"
    labels = ask(items, path, name, kind)
    print(f"\n{path}: {len(labels)} of {len(items)},", counts(labels, kind))
    print_agreement(answers_in(out, kind), items)


def need_terminal() -> None:
    require(sys.stdin.isatty() and sys.stdout.isatty(),
            "this asks a person for keys and needs a terminal: run the command in one")


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


def show(item: dict, labels: dict[str, str], total: int, kind: str) -> None:
    """Clear the screen and put the item, the keys and the progress on it."""
    width = min(shutil.get_terminal_size().columns, 90) - 4
    keys, _ = ASK[kind]
    choices = "   ".join(f"{key} {label}" for key, label in keys.items())
    print(f"\033[2J\033[H{len(labels) + 1} of {total}   {counts(labels, kind)}\n")
    for line in as_text(item).split("\n"):
        for part in textwrap.wrap(line, width) or [""]:
            print("    " + part)
    print(f"\n{choices}   u undo   q quit   ? help", flush=True)


def ask(items: list[dict], path: Path, labeller: str, kind: str) -> dict[str, str]:
    """Ask for one key per item and append each answer to `path` at once. -> id -> label."""
    need_terminal()
    keys, question = ASK[kind]
    labels = read_answers(path)
    by_id = {item["id"]: item for item in items}
    queue = [item for item in reversed(items) if item["id"] not in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        while queue:
            show(queue[-1], labels, len(labels) + len(queue), kind)
            key = read_key()
            last = list(labels)[-1] if labels else None
            if key in keys:
                item = queue.pop()
                append(file, item, keys[key], labeller)
                labels[item["id"]] = keys[key]
            elif key == "u" and last in by_id:
                append(file, by_id[last], "undo", labeller)
                del labels[last]
                queue.append(by_id[last])
            elif key == "q":
                break
            elif key == "?":
                print(f"\n{question}\nEvery key is saved at once; quit whenever you like and "
                      "run the same command to go on.\nAny key returns.", flush=True)
                read_key()
    return labels


def append(file, item: dict, label: str, labeller: str) -> None:
    row = item | {"label": label, "labeller": labeller, "time": round(time.time())}
    file.write(json.dumps(row) + "\n")
    file.flush()
    os.fsync(file.fileno())
