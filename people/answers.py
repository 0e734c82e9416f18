"""Read the items to ask about, and all answers so far."""
import importlib
from pathlib import Path

from model import files_of, latest, read_rows, require, set_out

stage = importlib.import_module("02_sample_label")


def read_items(out: Path, kind: str, seed: int) -> list[dict]:
    """Read the samples or the pairs that 02 wrote, in a random order given by `seed`. Raises
    UserError if there are none."""
    require(0 <= seed < 2**31, "--seed must be in [0, 2^31)")
    set_out(out)
    name, flag = ("pairs", " --compare") if kind == "comparisons" else ("samples", "")
    items = read_rows(out / f"{name}.jsonl", f"02_sample_label.py{flag}", is_item)
    return stage.shuffled(items, seed)


def is_item(row: dict) -> bool:
    """Say whether a row has an id, and one text or two. May raise KeyError or TypeError."""
    texts = [row["text"]] if isinstance(row["text"], str) else row["text"]
    return (len(texts) == (1 if isinstance(row["text"], str) else 2)
            and all(isinstance(x, str) for x in (row["id"], row.get("prompt", ""), *texts)))


def answers_in(out: Path, kind: str) -> dict[str, dict[str, str]]:
    """Read all answers of one kind -> labeller -> id -> label. If a file has a copy, the later
    answer to an item counts."""
    rows = []
    for path in files_of(out, kind):
        name = path.stem.removeprefix(f"{kind}-")
        rows += [{"labeller": name} | row for row in stage.read_answers(path, kind)]
    people: dict[str, list[dict]] = {}
    for row in latest(rows):
        people.setdefault(str(row["labeller"]), []).append(row)
    return {name: stage.labels_of(given) for name, given in people.items()}
