"""What samples of the base model say of other policies: by weights, without drawing from them."""
import numpy as np



def mean_se(x) -> tuple[float, float]:
    """x (n,) -> mean, and its standard error."""
    x = np.asarray(x, dtype=np.float64)
    return float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)


def tilt(score: np.ndarray, inverse_betas: np.ndarray, values: np.ndarray):
    """score (N,), values (N, F) of samples of the base -> of pi*_beta for K inverse betas: its KL
    from the base, nats, (K,); means of the values, (K, F); log Z (K,); effective samples (K,)."""
    log_w = np.outer(score, inverse_betas)                                       # (N, K)
    w = np.exp(log_w - log_w.max(0))
    share = w / w.sum(0)
    log_z = log_w.max(0) + np.log(w.mean(0))
    return (share * log_w).sum(0) - log_z, share.T @ values, log_z, 1 / (share ** 2).sum(0)


def kept(where: np.ndarray, figures: dict[str, np.ndarray]) -> dict:
    """Of the samples at `where` (N,) bool: KL from all of them, and each figure with its error."""
    row = {"share": float(where.mean()), "kl": float(-np.log(where.mean()))}
    for name, x in figures.items():
        row[name], row[f"{name}_se"] = mean_se(x[where])
    return row


def small_step(log_ratio: np.ndarray, score: np.ndarray) -> dict:
    """Of a policy with log pi / pi_0 (N,) on samples of the base: KL and rise of the mean score by
    importance weights w, with the known mean of w - 1, which is 0, against their noise."""
    w = np.exp(log_ratio)
    kl, rise = w * log_ratio - (w - 1), (w - 1) * (score - score.mean())
    nearer, se = mean_se(rise - kl)
    return {"kl": kl.mean(), "rise": rise.mean(), "nearer": nearer, "nearer_half": 1.96 * se}


def at(rows: list[dict], x: str, value: float, y: str) -> float:
    """y where x first has this value on the line through the rows that have y; nan if nowhere."""
    rows = sorted((row for row in rows if y in row), key=lambda row: row["kl"])
    if not rows:
        return float("nan")
    reached = np.maximum.accumulate([row[x] for row in rows])
    return float(np.interp(value, reached, [row[y] for row in rows], left=np.nan, right=np.nan))
