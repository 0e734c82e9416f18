"""Reward models of some of the labels, what judges say as each is followed, and forms of that.

A line: the means of F figures, of the score and then the judges, over K policies, (6, K, F): of all
samples, and without each fifth of them in turn.
"""
import copy
import importlib
from functools import cache

import numpy as np
import torch

from experiments import over_seeds
from experiments.ppo import ppo

ev, rm = importlib.import_module("05_eval"), importlib.import_module("03_reward_model")
NS = tuple(2 ** k for k in range(1, 11))
FIGURES = ("reward", "vader", "afinn", "pattern")
FORMS = {"d (a - b d)": lambda d: d, "d (a - b log d)": np.log}  # Gao et al. 2022: best-of-n, RL
FACTS = ("at the end", "added by the upper half", *(f"the end less {form}" for form in FORMS))
RULES = {"mean": lambda z: z.mean(0), "minimum": lambda z: z.amin(0),  # z (members, B) -> (B,)
         "less variance": lambda z: z.mean(0) - 0.5 * z.var(0, correction=0)}


def subset(rows: list, i: int, n: int, seed: int) -> list:
    """n of the rows; subsets i = 0 to 4 are disjoint as long as n is at most a fifth of them."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[k] for k in np.roll(order, -(i * len(rows) // 5))[:n]]


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    """The same texts, the same labels, but not to one another."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [row | {"label": rows[k]["label"]} for row, k in zip(rows, order)]


def learned(base, rows: list[dict], of: int):
    """The base model after 03's training on these of all labels, with more passes if few."""
    model, cfg = copy.deepcopy(base), rm.Config()
    phase, = rm.phases_of([item | {"part": "train"} for item in rm.pool(rows, 1.0)], cfg)
    phase.epochs *= min(8, (of / len(rows)) ** 0.5)
    rm.train(model, phase, cfg)
    return model


def happy(models: list):
    """-> function: tokens (B, T), prompt (B, P) -> each model's log p(happy), (B, models)."""
    return lambda y, prompt: torch.stack([m.sentiment(y, prompt)[:, 0].double() for m in models], 1)


@cache
def weights(N: int) -> np.ndarray:
    return np.stack([ev.best_of_n_weights(N, n) for n in NS])                        # (K, N)


def best_of_n(scores: np.ndarray, said: np.ndarray) -> np.ndarray:
    """scores (S, N) of N samples by S reward models, judges (N, F - 1) -> the line of the best of n
    by one of them, the mean over the S; the i-th model is left out with the i-th fifth."""
    def line(scores, said):
        each = [np.column_stack((s, said))[np.argsort(s, kind="stable")] for s in scores]
        return weights(len(said)) @ np.mean(each, 0)
    fifth, parts = np.arange(len(said)) % 5, [line(scores, said)]
    for i in range(5):
        rest = np.delete(scores, i, 0) if len(scores) > 1 else scores
        parts.append(line(rest[:, fifth != i], said[fifth != i]))
    return np.stack(parts)


def climb(base, reward_fn, judged, length: int, cfg, kl_stop: float) -> tuple:
    """PPO by this reward and cfg (04's Config) -> KL (K,) and the line of its rollouts, from after
    the first update to just beyond kl_stop."""
    heard, kl, means, fifth = [], [], [], np.arange(cfg.batch) % 5

    def hear(y, prompt):
        score = reward_fn(y, prompt)
        heard.append(np.column_stack((score.numpy(force=True), judged(y))))
        return score.float()
    for row in ppo(copy.deepcopy(base), base, hear, length, cfg):
        said = np.concatenate(heard)[-cfg.batch:]  # before them stands what ppo standardises by
        heard.clear()
        kl.append(row["kl"])
        means.append([said.mean(0)] + [said[fifth != i].mean(0) for i in range(5)])
        if row["kl"] > kl_stop:
            break
    return np.array(kl[1:]), np.stack(means[1:], 1)


def jackknife(figure, lines: np.ndarray) -> np.ndarray:
    """figure: (K, F) -> array; lines (6, K, F) -> five pseudo-values, whose mean and Student's
    interval are those of the figure (Tukey 1958)."""
    whole, *less = [figure(line) for line in lines]
    return np.stack([5 * whole - 4 * x for x in less])


def fit(kl, gold, form) -> tuple[np.ndarray, np.ndarray]:
    """One of FORMS, by least squares on the lower half of the KL (K,) -> its a and b, and what it
    says of gold (K,) everywhere."""
    d, low = np.maximum(kl, 1e-12) ** 0.5, kl <= kl.max() / 2  # rounding can give -1e-8
    terms = np.stack((d, -d * form(d)), 1)                                           # (K, 2)
    both = np.linalg.lstsq(terms[low], gold[low], rcond=None)[0]
    return both, terms @ both


def facts(kl: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """The four FACTS of one judge."""
    said = [fit(kl, gold, form)[1][-1] for form in FORMS.values()]
    return gold[-1] - np.array([0, gold[kl <= kl.max() / 2][-1], *said])


def table(kl: np.ndarray, lines: np.ndarray) -> list[dict]:
    """Of each policy: KL, figures, and half their intervals."""
    values = jackknife(lambda line: line, lines)                                     # (5, K, F)
    rows = [{"kl": x} for x in kl]
    for k, row in enumerate(rows):
        for f, name in enumerate(FIGURES):
            row[name], row[f"{name}_half"] = over_seeds(values[:, k, f])
    return rows


def findings(seed: dict) -> dict[str, list]:
    """AUC of each reward model; pseudo-values of the facts of each line, by VADER and AFINN."""
    found = {f"AUC, {name}": x for name, x in seed["AUC"].items()}
    for arm, (kl, line) in seed["lines"].items():
        for j, who, n in ((1, "vader", 4), (2, "afinn", 2)):
            values = jackknife(lambda x: facts(kl, x[:, j]), line)[:, :n]            # (5, n)
            found |= {f"{who}, {arm}: {what}": x for what, x in zip(FACTS, values.T)}
    return found
