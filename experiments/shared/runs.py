"""Finished runs of the five scripts, as experiments read them."""
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

from model import read_rows, require

ev = importlib.import_module("05_eval")


@dataclass
class Config:
    runs: tuple[Path, ...] = (Path("out-0"), Path("out-1"), Path("out-2"))  # of `make seeds`
    out: Path = Path("out/experiments")
    seed: int = 0


def load_run(run: Path, device, dtype) -> tuple:
    """Load a finished run -> base model, reward_fn, reward model, tokenizer, report.json of 05.
    reward_fn: tokens (B, T), prompt (B, P) -> log p(happy), (B,); for a model of comparisons, log
    p(happy) - log p(sad). Raises UserError if the run is not finished."""
    require((run / "report.json").exists(), f"{run} is not a finished run: run `make seeds`, or "
            "name finished runs with --runs")
    reference, reward_model, tokenizer, about = ev.load_run(run, device, dtype)
    require(not about["prompted"], f"{run} was made with prompts: these experiments have none")

    def reward_fn(y, prompt):
        log_p = reward_model.sentiment(y, prompt)                            # (B, 2)
        return log_p[:, 0] if about["kind"] == "labels" else log_p[:, 0] - log_p[:, 1]
    report = json.loads((run / "report.json").read_text()) | {"length": about["length"]}
    return reference, reward_fn, reward_model, tokenizer, report


def labelled(run: Path, spans: bool = False) -> list[dict]:
    """The texts of a run that VADER labelled; with spans, also the labels of their parts. Raises
    UserError if the file is missing."""
    path = run / "labels-vader.jsonl"
    require(path.exists(), f"{path} is missing: run `make seeds`, or name finished runs with "
            "--runs")
    rows = read_rows(path, "02_sample_label.py")
    return [row | {"spans": row.get("spans", ()) if spans else ()} for row in rows]
