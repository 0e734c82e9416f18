"""Means, shares, AUC, their errors, and calibration."""
import math
from collections.abc import Callable

import numpy as np


def mean_se(x) -> tuple[float, float]:
    """x (n,) -> mean, and its standard error."""
    x = np.asarray(x, dtype=np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not n:
        return float("nan"), float("nan")
    z, p = 1.96, successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def newcombe(a: int, n: int, b: int, m: int) -> tuple[float, float]:
    """95 % interval of the difference b / m - a / n of two shares (Newcombe 1998, Statistics in
    Medicine 17:873, method 10)."""
    if not n or not m:
        return float("nan"), float("nan")
    (low_a, high_a), (low_b, high_b) = wilson(a, n), wilson(b, m)
    p, q = a / n, b / m
    return (q - p - math.hypot(q - low_b, high_a - p), q - p + math.hypot(high_b - q, p - low_a))


def bootstrap(figure: Callable, n: int, resamples: int = 1000) -> tuple:
    """95 % percentile interval (Efron 1979) of figure(rows), a number or an array; rows (n,): the
    indices of n items drawn with replacement -> (low, high), each a number or nested lists, as
    figure gives. Resamples on which it is nan are left out."""
    rng = np.random.default_rng(0)
    values = np.array([figure(rng.integers(0, n, n)) for _ in range(resamples)])
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values, (2.5, 97.5), axis=0)
    return low.tolist(), high.tolist()


def auc(score: np.ndarray, target: np.ndarray) -> float:
    """Chance that a positive item scores above a negative one, ties half; neutral ones left out."""
    pos, neg = score[target > 0.6], score[target < 0.4]  # pooling moves a neutral off one half
    if not len(pos) or not len(neg):
        return float("nan")
    order = np.sort(neg)
    below = (np.searchsorted(order, pos, "left") + np.searchsorted(order, pos, "right")) / 2
    return float(below.mean() / len(neg))


def auc_lead(score: np.ndarray, other: np.ndarray, target: np.ndarray) -> Callable:
    """-> the function that gives, on some rows, how far the AUC of one score is above another's."""
    return lambda rows: auc(score[rows], target[rows]) - auc(other[rows], target[rows])


def calibration(p: np.ndarray, target: np.ndarray) -> list[dict]:
    """Ten bins of p(happy): how many items, mean prediction, mean target."""
    which = np.minimum((p * 10).astype(int), 9)
    bins = []
    for b in range(10):
        here = which == b
        if here.any():
            bins.append({"n": int(here.sum()), "predicted": float(p[here].mean()),
                         "target": float(target[here].mean())})
    return bins
