"""Judges who see k words of a text, and the best play of those who choose the words."""
import json
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model import require, words

ANSWERS = ("positive", "negative", "neutral")


def read(runs: tuple[Path, ...], seed: int) -> tuple:
    """All samples that VADER labelled, shuffled -> vocabulary; the different words of each text
    (N, L), 1 for a rare one, 0 for none; labels (N,), places in ANSWERS."""
    items = []
    for path in (run / "labels-vader.jsonl" for run in runs):
        require(path.exists(), f"{path} is missing: make seeds first, or name runs with --runs")
        items += map(json.loads, path.read_text().splitlines())
    items = [items[i] for i in np.random.default_rng(seed).permutation(len(items))]
    items = [item for item in items if len(set(words(item["text"]))) >= 6]
    each = [list(dict.fromkeys(words(item["text"]))) for item in items]
    counts = Counter(word for text in each for word in text)
    vocabulary = ["", "rare"] + [word for word, n in counts.items() if n >= 20]
    number, longest = {word: i for i, word in enumerate(vocabulary)}, max(map(len, each))
    texts = [[number.get(word, 1) for word in text] + [0] * (longest - len(text)) for text in each]
    return (vocabulary, torch.tensor(texts),
            torch.tensor([ANSWERS.index(item["label"]) for item in items]))


# ---- Best play -----------------------------------------------------------------------------------
@cache
def sets(n: int, k: int) -> np.ndarray:
    """All sets of k of n words, (C(n, k), k), in the order of their digits."""
    return np.array(list(combinations(range(n), k))).reshape(-1, k)


@cache
def above(n: int, k: int) -> np.ndarray:
    """For each of sets(n, k) the rows of sets(n, k + 1) that contain it, (C(n, k), n - k)."""
    parts = np.stack([np.delete(sets(n, k + 1), i, 1) for i in range(k + 1)], 1)   # (S, k + 1, k)
    digits = parts @ 64 ** np.arange(k)[::-1]
    return (digits.ravel().argsort(kind="stable") // (k + 1)).reshape(-1, n - k)


def value(lead: np.ndarray, n: int, order: str) -> float:
    """The truth's lead on each of sets(n, k) -> with best play; order: who reveals, as "HLHL"."""
    for k in reversed(range(len(order))):
        lead = lead[above(n, k)].max(1) if order[k] == "H" else lead[above(n, k)].min(1)
    return lead[0]


def additive_value(lead: np.ndarray, order: str) -> float:
    """The same where the lead is a sum over the words, (n,), n >= len(order)."""
    lead, low = np.sort(lead), order.count("L")
    return lead[:low].sum() + lead[len(lead) - len(order) + low:].sum()


# ---- Judges --------------------------------------------------------------------------------------
class Judge(nn.Module):
    """Words (..., k), 0 for none -> logits (..., C): a sum over words, or a layer on top of one."""
    def __init__(self, vocabulary: int, answers: int, hidden: int = 0):
        super().__init__()
        self.word = nn.Embedding(vocabulary, hidden or answers, padding_idx=0)
        self.word.weight.data *= 0.3 if hidden else 0
        self.bias = nn.Parameter(torch.zeros(hidden or answers))
        self.head = nn.Linear(hidden, answers) if hidden else None

    def forward(self, revealed):
        h = self.word(revealed).sum(-2) + self.bias
        return self.head(h.relu()) if self.head else h


def train(judge: Judge, texts, label, k: int, steps: int, batch: int = 256) -> None:
    """texts (N, L), label (N,): on k random words of texts of all answers alike."""
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2, weight_decay=1e-3)
    of = [(label == c).nonzero()[:, 0] for c in label.unique()]
    for step in range(steps):
        rows = torch.cat([each[torch.randint(len(each), (batch // len(of),))] for each in of])
        keys = torch.rand(len(rows), texts.shape[1]) * (texts[rows] > 0)
        loss = F.cross_entropy(judge(texts[rows].gather(1, keys.topk(k).indices)), label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
