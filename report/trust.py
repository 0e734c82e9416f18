"""Show what the reward model sees, and whether it is still right about the policies' own samples.

We compare it with VADER, which made the labels of the default run.
"""
import importlib
import re

import numpy as np

rm = importlib.import_module("03_reward_model")
POSITIVE = importlib.import_module("05_eval").POSITIVE

STEPS = (0.5, 1, 1.5, 2)  # changes of the log-odds at which the colour of a token grows stronger


def shade(change: float) -> str:
    """Choose the class of a token in page.html: "up1" to "up4", "down1" to "down4", or ""."""
    strength = sum(abs(change) >= step for step in STEPS)
    return f"{'up' if change > 0 else 'down'}{strength}" if strength else ""


def opinions(p_happy: float, vader: float) -> dict:
    """Collect what the reward model and VADER say about one sample, and whether they disagree."""
    return {"p_happy": float(p_happy), "vader": float(vader),
            "disagree": bool((p_happy > 0.5 and vader <= -POSITIVE)
                             or (p_happy < 0.5 and vader >= POSITIVE))}


def without_blank_lines(pieces: list[str]) -> list[str]:
    """Remove empty lines, for which a page with six samples has no room. The number of pieces stays
    the same."""
    shown, at_start = [], True  # at_start: the next piece begins a line
    for piece in pieces:
        piece = re.sub(r"\n+", "\n", piece)
        shown.append(piece.removeprefix("\n") if at_start else piece)
        at_start = shown[-1].endswith("\n") if shown[-1] else at_start
    return shown


def shown_samples(row: dict) -> list[dict]:
    """Prepare the first samples of a row of 05_eval.py -> for each its prompt, and its tokens as
    (text, change of the log-odds, class)."""
    shown = []
    for i, (pieces, log_odds) in enumerate(zip(row["pieces"], row["log_odds"])):
        tokens = [(piece, float(change), shade(change))
                  for piece, change in zip(without_blank_lines(pieces), np.diff(log_odds))]
        shown.append({"prompt": row["prompts"][i], "tokens": tokens,
                      **opinions(row["each"]["p_happy"][i], row["each"]["vader"][i])})
    return shown


def labels(vader: np.ndarray) -> np.ndarray:
    """Turn VADER's compound scores into labels, by 02's thresholds: 1, 0.5 or 0."""
    return np.where(vader >= POSITIVE, 1.0, np.where(vader <= -POSITIVE, 0.0, 0.5))


def against_vader(row: dict) -> dict:
    """Measure how well p(happy) predicts VADER's labels of a policy's samples: AUC with its
    interval, calibration in ten bins, and the means of predictions and labels."""
    p, target = np.asarray(row["each"]["p_happy"]), labels(np.asarray(row["each"]["vader"]))
    return {"rm_auc": rm.auc(p, target),
            "rm_auc_interval": rm.interval(lambda i: rm.auc(p[i], target[i]), len(p), 200),
            "rm_calibration": rm.calibration(p, target),
            "rm_predicted": float(p.mean()), "rm_labelled": float(target.mean())}


def histogram(row: dict, bins: int = 20) -> list[float]:
    """Compute the fraction of a policy's samples in each of equal bins of p(happy)."""
    counts = np.histogram(row["each"]["p_happy"], bins, (0, 1))[0]
    return (counts / counts.sum()).tolist()
