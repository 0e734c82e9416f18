"""Where the sentiment of a text stands at each of its prefixes, and what KL is spent there.

V(prefix) = E_0[p(happy) | prefix], the chance that the base model would end happy from here.
"""
import numpy as np
import torch

BLOCK = 8  # tokens
EDGES = (0, 0.25, 0.5, 0.75, 0.9, 1.001)  # of bins of V


def log_odds(reward_model, y: torch.Tensor) -> torch.Tensor:
    """y (n, T) -> log p(happy) / p(sad) before each block of its tokens, (n, T / 8)."""
    x = torch.cat((torch.full_like(y[:, :1], reward_model.bos), y[:, :-1]), 1)
    head = reward_model.head[reward_model.happy] - reward_model.head[reward_model.sad]
    return reward_model(x)[:, ::BLOCK].float() @ head


def logistic(s: np.ndarray, target: np.ndarray) -> np.ndarray:
    """s, target in [0, 1], both (n,) -> (intercept, slope) of the likeliest sigmoid, by Newton."""
    x, w = np.stack((np.ones_like(s), s), 1), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2)
        w += np.linalg.solve(hessian, x.T @ (target - p))
    return w


def expected(s: np.ndarray, fits) -> np.ndarray:
    """The sigmoids of logistic fits, one a column of s (n, k) -> (n, k)."""
    return np.stack([1 / (1 + np.exp(-a - b * x)) for x, (a, b) in zip(s.T, fits)], 1)


def posterior_kl(s: np.ndarray, target: np.ndarray) -> np.ndarray:
    """s (n, k): log-odds before each of k blocks; target (n,), in (0, 1], as pi* / pi_0 but scaled
    -> log V(next) / V of each block, (n, k), where V = E_0[target | s]. Weighted by the target its
    sum is KL(pi* || pi_0) of the n samples exactly, however rough V is."""
    v = expected(s, [logistic(x, target) for x in s.T])
    return np.diff(np.log(np.column_stack((v, target))), axis=1)


def block_kl(policy, reference, y: torch.Tensor) -> torch.Tensor:
    """y (n, T) -> exact KL(policy || reference) of each block given the text before, (n, T / 8)."""
    log_p, log_q = (torch.log_softmax((model.hidden_before(y) @ model.unembed().T).float(), -1)
                    for model in (policy, reference))
    return (log_p.exp() * (log_p - log_q)).sum(-1).unflatten(1, (-1, BLOCK)).sum(2)


def profile(kl: np.ndarray, v: np.ndarray, w: np.ndarray) -> dict:
    """KL of blocks and V before them (n, k), weights (n,) -> KL per token in multiples of its mean,
    by V and by position; and where V > .9 over where V < .5."""
    w = np.repeat(w[:, None], kl.shape[1], 1)
    mean, columns = (w * kl).sum() / w.sum(), np.indices(kl.shape)[1]

    def relative(where):
        return float((w * kl)[where].sum() / w[where].sum() / mean) if where.any() else np.nan
    bins = [(v >= low) & (v < high) for low, high in zip(EDGES, EDGES[1:])]
    return {"by V": [{"v": v[b].mean(), "share": w[b].sum() / w.sum(), "relative": relative(b)}
                     for b in bins if b.any()],
            "by token": [{"token": BLOCK * (k + 0.5), "relative": relative(columns == k)}
                         for k in range(kl.shape[1])],
            "settled over open": relative(v > 0.9) / relative(v < 0.5)}
