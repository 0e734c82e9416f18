"""Read the items to ask about, and all answers so far."""
import importlib
from pathlib import Path

from model import read_rows, require

stage = importlib.import_module("02_sample_label")


def read_items(out: Path, kind: str, seed: int) -> list[dict]:
    """Read the samples or the pairs that 02 wrote, in a random order given by `seed`. Raises
    UserError if there are none."""
    require(0 <= seed < 2**31, "--seed must be in [0, 2^31)")
    name, flag = ("pairs", " --compare") if kind == "comparisons" else ("samples", "")
    items = read_rows(out / f"{name}.jsonl", f"02_sample_label.py{flag}",
                      lambda row: row["id"] and row["text"])
    return stage.shuffled(items, seed)


def answers_in(out: Path, kind: str) -> dict[str, dict[str, str]]:
    """Read all answers of one kind -> labeller -> id -> label."""
    found = {}
    for path in sorted(out.glob(f"{kind}-*.jsonl")):
        name = path.stem.removeprefix(f"{kind}-")
        if name != "vader-pieces":
            found[name] = stage.read_answers(path)
    return found
