"""Training on samples of the base model that were drawn and scored once: imitation of the good ones
by likelihood, and DPO. Each loop yields, evenly spaced, whenever its policy is to be measured."""
import importlib

import numpy as np
import torch
import torch.nn.functional as F

from model import chunked

ev, stage = importlib.import_module("05_eval"), importlib.import_module("04_ppo")


def targets(score: np.ndarray, beta: float = 0.1) -> dict[str, np.ndarray]:
    """score (N,) of samples of the base model -> the weights (N,) by which each imitation draws."""
    best = np.zeros(len(score))
    best[np.argsort(score, kind="stable")] = ev.best_of_n_weights(len(score), 16)
    return {"best of 16": best, "filtered": 1.0 * (score >= np.quantile(score, 0.75)),
            "weighted": np.exp(score / beta)}


def figures_of(weights: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Of the distribution over samples of the base that the weights (N,) make: its KL, its mean."""
    share = weights / weights.sum()
    log_ratio = np.log(np.where(share > 0, share * len(share), 1))
    return {"kl": float(share @ log_ratio), "reward": float(share @ score)}


def dpo_loss(logp: torch.Tensor, logp_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """Log-probs (2, B) of the better and the worse completion of B pairs -> (B,) (Rafailov et al.
    2023, arXiv:2305.18290, eq. 7)."""
    better, worse = logp - logp_ref
    return -F.logsigmoid(beta * (better - worse))


def descend(optimizer, loss_of, batches: list[torch.Tensor], times: int):
    """A step of loss_of on each of the batches; yields `times` times."""
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()
        if step % max(len(batches) // times, 1) == 0:
            yield


def imitate(policy, y, weights: np.ndarray, steps: int, cfg, times: int = 3, lr: float = 0.05):
    """Likelihood of texts drawn from y (N, T) by weights (N,); cfg: 04's Config."""
    g = torch.Generator().manual_seed(cfg.seed)
    drawn = torch.multinomial(torch.tensor(weights), steps * cfg.minibatch, True, generator=g)
    optimizer = torch.optim.SGD(policy.parameters(), lr, cfg.momentum)
    yield from descend(optimizer, lambda b: -policy.logprob(y[b]).mean(),
                       drawn.to(y.device).split(cfg.minibatch), times)


def dpo(policy, reference, y, score, cfg, beta=0.1, lr=5e-5, epochs=3, times=6):
    """On the best and the worst by score (N,) of each eight of y (N, T); 128 pairs a step."""
    eight = score.view(-1, 8)
    rows = torch.arange(0, len(y), 8, device=y.device)
    pairs = y[torch.stack((rows + eight.argmax(1), rows + eight.argmin(1)))]       # (2, N / 8, T)
    logp_ref = chunked(reference.logprob, cfg.minibatch, pairs.flatten(0, 1)).sum(1).view(2, -1)

    def loss_of(b):
        logp = policy.logprob(pairs[:, b].flatten(0, 1)).sum(1).view(2, -1)        # (2, 128)
        return dpo_loss(logp, logp_ref[:, b], beta).mean()
    batches = list(stage.minibatches(len(rows), cfg.minibatch // 2, epochs, cfg.seed, y.device))
    yield from descend(torch.optim.Adam(policy.parameters(), lr), loss_of, batches, times)
