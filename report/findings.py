"""What the measured rows say: how far, which checkpoint, which words, and all that in a sentence.

The best checkpoint is the one of highest mean gold score. Over-optimisation starts at the first
later one whose gold is lower by more than two standard errors of the difference.
"""
import math

import numpy as np


def fit_line(x, y) -> tuple[float, float, float]:
    """Least squares y = slope x + intercept -> slope, intercept, R^2."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - residual.var() / np.var(y))


def risen_words(before: dict[str, int], after: dict[str, int], top: int = 12) -> list[dict]:
    """Word counts of two policies -> the words whose share rose most, per 1,000 words."""
    n_before, n_after = sum(before.values()), sum(after.values())
    rows = [{"word": word, "before": 1000 * before.get(word, 0) / n_before,
             "after": 1000 * n / n_after} for word, n in after.items()]
    return sorted(rows, key=lambda row: row["before"] - row["after"])[:top]


def over_optimisation(rows: list[dict], sign: int = 1) -> tuple[dict, dict | None]:
    """Rows by rising KL -> the row of highest sign * gold, and the first later row that is lower by
    more than two standard errors of the difference, or None."""
    best = max(rows, key=lambda r: sign * r["gold"])
    for row in rows[rows.index(best) + 1:]:
        if sign * (best["gold"] - row["gold"]) > 2 * math.hypot(best["gold_se"], row["gold_se"]):
            return best, row
    return best, None


def summary(rows: list[dict], best: dict, over: dict | None) -> str:
    """In words: what the run towards happy has come to."""
    first, last = rows[0], rows[-1]
    turn = "The gold score did not fall significantly: no over-optimisation within the KL budget."
    if over:
        turn = (f"Over-optimisation starts at {over['kl']:.2f} nats: the gold score falls while "
                "the reward rises.")
    return (f"VADER calls {first['positive']:.1%} of the base model's samples positive, and "
            f"{last['positive']:.1%} of the final policy's, {last['kl']:.2f} nats per completion "
            f"away; distinct-2 went from {first['distinct_2']:.3f} to {last['distinct_2']:.3f}. "
            f"Best checkpoint by gold score: {best['name']} ({best['kl']:.2f} nats). {turn}")


def conclusions(results: dict) -> dict:
    """results: what 05_eval.py measured, rows of each policy under "happy" and perhaps "sad"."""
    steps = [row["step"] for row in results["ppo"]]
    sqrt_kl = [math.sqrt(max(row["kl"], 0)) for row in results["ppo"]]
    slope, intercept, r2 = fit_line(steps, sqrt_kl)
    found = {"sqrt_kl_fit": {"slope": slope, "intercept": intercept, "r2": r2}}
    for target, sign in (("happy", 1), ("sad", -1)):
        if target in results:
            by_kl = sorted(results[target], key=lambda row: row["kl"])
            best, over = over_optimisation(by_kl, sign)
            found[f"best_{target}"] = best["name"]
            found[f"over_{target}"] = over["name"] if over else None
            if target == "happy":
                found["summary"] = summary(results["happy"], best, over)
    first, *_, last = results["happy"]
    return found | {"risen_words": risen_words(first["words"], last["words"])}
