"""Was the run healthy? Each mark has its rule and what was measured, and can fail."""
import math

import numpy as np
from scipy.stats import linregress


def mark(name: str, healthy: str, rule: str, measured: str, ok: bool) -> dict:
    """measured: the figures that the rule was held against."""
    return {"name": name, "healthy": healthy, "rule": rule, "measured": measured, "ok": bool(ok)}


def distance(run: list[dict]) -> dict:
    """run: the rows of 04's log whose policies some updates made."""
    roots = [math.sqrt(max(row["kl"], 0)) for row in run]
    r2 = linregress([row["updates"] for row in run], roots).rvalue ** 2
    apart = [abs(row["kl"] - row["kl_k1"]) / math.hypot(row["kl_se"], row["kl_k1_se"])
             for row in run if row["kl_k1_se"] > 0]
    worst = max(apart, default=0)
    return mark("distance", "The square root of the KL grows steadily, nearly in a straight line.",
                "R² of the line at least 0.9; the exact KL and its sampled estimate never more "
                "than four standard errors apart",
                f"R² {r2:.3f}; at most {worst:.1f} standard errors apart", r2 >= 0.9 and worst <= 4)


def clipping(updates: list[dict]) -> dict:
    """updates: the rows of 04's log with the figures of an update."""
    full = max(row["lr"] for row in updates)
    shares = [100 * row["clip_fraction"] for row in updates if row["lr"] == full]
    mean = sum(shares) / len(shares)
    return mark("clip", "A few per cent of the ratios leave the clip range: the steps are large "
                "enough to lead somewhere, and small enough to be trusted. If fewer do, the batch "
                "doubles. Binding: where the clip sets the gradient to 0. Broken: 1 and 20%.",
                "the mean after warm-up is 1 to 20%",
                f"mean {mean:.1f}%, from {min(shares):.1f}% to {max(shares):.1f}%", 1 <= mean <= 20)


def advantage(updates: list[dict]) -> dict:
    first, last = updates[0], updates[-1]
    return mark("advantage", "The mean rises and the spread falls, both in units of the "
                "base model: most samples become good ones.",
                "the last mean above the first; the last spread below the first",
                "mean {:.2f} to {:.2f}, spread {:.2f} to {:.2f}".format(
                    *(row[key] for key in ("adv_mean", "adv_std") for row in (first, last))),
                last["adv_mean"] > first["adv_mean"] and last["adv_std"] < first["adv_std"])


def entropy(run: list[dict]) -> dict:
    values = np.array([row["entropy"] for row in run])
    steepest = float((1 - values[1:] / values[:-1]).max())
    kept = values[-1] / values[0]
    return mark("entropy", "It changes gradually. A sudden fall is a collapse onto a few texts.",
                "no iteration takes more than 10% of it; at least half is left",
                f"at most {100 * max(steepest, 0):.1f}% in one iteration; {100 * kept:.0f}% left",
                steepest <= 0.1 and kept >= 0.5)


def marks(ppo: list[dict]) -> dict[str, dict]:
    """The rows of 04's log -> name -> mark."""
    updates = [row for row in ppo if "clip_fraction" in row]
    found = (distance(ppo), clipping(updates), advantage(updates), entropy(ppo))
    return {row["name"]: row for row in found}
