"""What the measured rows say: how far, which checkpoint, which words, and all that in a sentence.

The best checkpoint is the one of highest mean gold score. Over-optimisation starts at the first
later one whose gold is lower though its reward is not, by a rule with a known rate of false alarms.
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


def holm(p_values: list[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses are rejected, so that the chance of any false rejection is at most `level`
    (Holm 1979): the smallest of m p-values is held against level / m, the next against
    level / (m - 1), ..., up to the first that fails."""
    order = np.argsort(p_values, kind="stable")
    rejected = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def over_optimisation(rows: list[dict], sign: int = 1) -> tuple[dict, dict | None]:
    """rows by rising KL, each with "gold_each", the gold score of every sample (sample i of all
    policies has the same noise; at least 4), and "proxy", the mean reward -> the best row, and the
    first later one that is lower in gold though not in reward, or None.

    The best is the one of highest sign * gold on the samples of even number; the later rows are
    tested on those of odd number, by paired differences, one-sided, with Holm's correction. So a
    false alarm comes in at most 5 % of runs; of 1,000 simulated in tests/test_eval.py (12
    checkpoints, 1,024 samples, standard deviation .5, correlation .3)
    in 2.9 % where gold is flat; falls by .05, .075 and .1 at
    the last checkpoint are found in 36, 70 and 92 %.
    """
    n = min(len(row["gold_each"]) for row in rows)
    gold = sign * np.array([row["gold_each"][:n] for row in rows])                # (rows, n)
    best = int(gold[:, ::2].mean(1).argmax())
    later = range(best + 1, len(rows))
    p_values = []
    for k in later:
        fall = gold[best, 1::2] - gold[k, 1::2]
        error = fall.std(ddof=1) / math.sqrt(len(fall))
        p_values.append(0.5 * math.erfc(fall.mean() / max(error, 1e-12) / math.sqrt(2)))
    for k, lower in zip(later, holm(p_values)):
        if lower and rows[k]["proxy"] >= rows[best]["proxy"]:
            return rows[best], rows[k]
    return rows[best], None


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
