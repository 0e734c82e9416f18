"""Check whether the run of PPO was healthy. Each mark holds a measurement against a rule, and can
fail."""
import math

import numpy as np
from scipy.stats import linregress


def mark(name: str, healthy: str, rule: str, measured: str, ok: bool) -> dict:
    """Make one mark. healthy: what a healthy run looks like; rule: what `ok` checks; measured: the
    figures that were held against the rule."""
    return {"name": name, "healthy": healthy, "rule": rule, "measured": measured, "ok": bool(ok)}


def distance(run: list[dict]) -> dict:
    """Check that the policy moves away steadily, and that two measures of the KL agree. run: the
    rows of 04's log."""
    roots = [math.sqrt(max(row["kl"], 0)) for row in run]
    r2 = linregress([row["updates"] for row in run], roots).rvalue ** 2
    apart = [abs(row["kl"] - row["kl_k1"]) / math.hypot(row["kl_se"], row["kl_k1_se"])
             for row in run if row["kl_k1_se"] > 0]
    worst = max(apart, default=0)
    return mark("distance", "Is the distance under control? The square root of the KL should "
                "grow steadily, close to a straight line.",
                "R² of the line is at least 0.9, and the exact KL and its sampled estimate are "
                "never more than four standard errors apart",
                f"R² {r2:.3f}; at most {worst:.1f} standard errors apart", r2 >= 0.9 and worst <= 4)


def clipping(updates: list[dict]) -> dict:
    """Check that a few per cent of the ratios are clipped. updates: the rows of 04's log that
    describe an update."""
    full = max(row["lr"] for row in updates)
    shares = [100 * row["clip_fraction"] for row in updates if row["lr"] == full]
    mean = sum(shares) / len(shares)
    return mark("clip", "PPO takes the ratio of each token's new and old probability, and "
                "clips it if it is far from 1. A few per cent of clipped ratios are healthy: the "
                "steps are large enough to lead somewhere and small enough to trust. If fewer than "
                "1% are clipped, the batch doubles. Binding: where clipping sets the gradient to "
                "0. Dashed: 1% and 20%.",
                "the mean after warm-up is 1% to 20%",
                f"mean {mean:.1f}%, from {min(shares):.1f}% to {max(shares):.1f}%", 1 <= mean <= 20)


def advantage(updates: list[dict]) -> dict:
    """Check that rewards rise and become more alike. updates: as in `clipping`."""
    first, last = updates[0], updates[-1]
    return mark("advantage", "The advantage of a sample is how far its reward lies above the base "
                "model's mean, in standard deviations. The mean should rise and the spread should "
                "fall: most samples become good ones.",
                "the last mean is above the first, and the last spread is below the first",
                "mean {:.2f} to {:.2f}, spread {:.2f} to {:.2f}".format(
                    *(row[key] for key in ("adv_mean", "adv_std") for row in (first, last))),
                last["adv_mean"] > first["adv_mean"] and last["adv_std"] < first["adv_std"])


def entropy(run: list[dict]) -> dict:
    """Check that the policy does not collapse. run: the rows of 04's log."""
    values = np.array([row["entropy"] for row in run])
    steepest = float((1 - values[1:] / values[:-1]).max())
    kept = values[-1] / values[0]
    return mark("entropy", "Entropy measures how open the choice of the next token is. It should "
                "change gradually. A sudden fall is a collapse onto a few texts.",
                "no iteration takes away more than 10% of it, and at least half is left",
                f"at most {100 * max(steepest, 0):.1f}% in one iteration; {100 * kept:.0f}% left",
                steepest <= 0.1 and kept >= 0.5)


def marks(ppo: list[dict]) -> dict[str, dict]:
    """Make all marks from the rows of 04's log -> name -> mark."""
    updates = [row for row in ppo if "clip_fraction" in row]
    found = (distance(ppo), clipping(updates), advantage(updates), entropy(ppo))
    return {row["name"]: row for row in found}
