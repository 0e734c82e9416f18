"""Describe other policies by reweighting samples of the base model, without drawing from them."""
import numpy as np

INVERSE_BETAS = 2.0 ** np.arange(-3, 9.5, 0.5)


def tilt(score: np.ndarray, inverse_betas: np.ndarray, values: np.ndarray):
    """Describe the best policy at K inverse betas, base * exp(score / beta) / Z, by samples of the
    base: score (N,), values (N, F) -> KL from the base in nats, (K,); mean values, (K, F); log Z,
    (K,); effective samples, (K,)."""
    log_w = np.outer(score, inverse_betas)                                       # (N, K)
    w = np.exp(log_w - log_w.max(0))
    share = w / w.sum(0)
    log_z = log_w.max(0) + np.log(w.mean(0))
    return (share * log_w).sum(0) - log_z, share.T @ values, log_z, 1 / (share ** 2).sum(0)


def at(rows: list[dict], x: str, value: float, y: str) -> float:
    """Return y where the line through the rows that have y first reaches x = value, or nan."""
    rows = sorted((row for row in rows if y in row), key=lambda row: row["kl"])
    if not rows:
        return float("nan")
    reached = np.maximum.accumulate([row[x] for row in rows])
    return float(np.interp(value, reached, [row[y] for row in rows], left=np.nan, right=np.nan))
