"""Does a judge who sees only k words of a text learn the truth from two who argue over it?

    python -m experiments.debate         # after `make seeds`; three minutes on one core

Claim (Irving et al. 2018, arXiv:1805.00899): two agents reveal evidence in turn, one for the truth
and one against it. A judge who sees only this evidence is right more often than on random evidence:
88.9% instead of 59.4% on 6 pixels of MNIST. Debate helps less if the liar need not say beforehand
which lie is his.

Design: the texts are samples of the base models, labelled by VADER, as many of each label. We train
a judge on k random words of a text, one judge for each k. Then H, for the truth, and L, against it,
reveal words in turn. They can choose words but not forge them. Up to k = 4 we find the best play by
enumeration, so the judge's accuracy is how often the truth has a winning strategy.
For a judge who adds up words, the proof is short. Say H reveals m words. If she always reveals the
best one left, none of her m best words is missing in the end, whatever L does. The same holds for
L. So the value is that of her best and his best words together, in any order of turns.
Words are revealed by H alone, by L alone, by both with H first, or by both with L first. The
judges:
- logistic regression;
- *lexicon*: VADER's own valences are the weights;
- *misled*: its training sample has no happy text with any of eight happy words;
- *pairs*: a hidden layer, through which one word can change another's meaning;
- *three answers*: neutral too.
With two answers there is one lie, so naming it beforehand binds L to nothing. With three, either L
names his lie and the judge chooses between it and the truth, or L wins by any lie. The seeds are
five disjoint fifths of the samples of three runs.

Controls: random words; for three answers, random words with the worse of the two lies named.

Predicted (known from seed 0: on random words 59% at k = 6, on all words 80%):
1. Logistic: debate gives 70%, 74% and 76% at k = 2, 4 and 6.
2. At even k the order changes nothing. At k = 3 the extra word is worth 50 points.
3. Alone, H wins 99%, and so does L: a single adviser is worth a coin toss.
4. Misled: 2 points less on random words, 15 less in debate at k = 4.
5. Pairs: debate is within 2 points of logistic. At k = 4 the last speaker is ahead by 2 at most.
6. Three answers, k = 4: random words give 40%, a named lie 52%, debate 60%, any lie 50%. A neutral
   truth wins less than 30%, since no word shows that there is nothing to see.
7. Lexicon: random words give 66% at k = 6, debate 80%, 86% and 88%. L alone still wins 85% at
   k = 1.

Found (+- half the 95% interval over five seeds):
1.                  k = 2           k = 4           k = 6
   debate           67.7 +- 4.2%    72.2 +- 4.7%    75.2 +- 3.9%
   random words     54%             58%             60%
2. Right at even k. At k = 3 the judge is right in 87% if H has the extra word, in 50% if L has it.
3. Right: each wins 100%.
4. Misled loses 2.3 points on random words. In debate it loses 11.7, to 60.5 +- 1.7%, so a third of
   what debate gains is left.
5. Wrong: pairs has 77.5 +- 2.5% at k = 4. That is more than logistic on each seed, though on random
   words it is no better. The order changes nothing.
6. Random words give 43%, a named lie 51%, debate 56 +- 3%. Any lie gives 54 +- 3%, or 55% if L
   begins. Wrong about neutral truths: they win 47 +- 4%.
7. Random words give 60.3 +- 0.8%, no better than logistic. Debate gives 82 +- 3%, 88 +- 2% and
   89.6 +- 2.5% (k = 6), as much as all words do. L alone wins 81%.

Left out: people, forged evidence, arguments, a judge trained on debates.

Take away: two judges who are right on 57% of random words are right in 72% and 88% of debates.
Selected evidence finds what a judge does not know, and a test on random evidence does not show it.

What would change my mind: a judge chosen by her score on random words who is as good in debate as
the lexicon.
"""
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from experiments.shared.results import ink, over_seeds, panels, save_results
from experiments.shared.runs import Config, labelled
from model import start, words

ANSWERS = ("positive", "negative", "neutral")
LYING = ("good", "love", "like", "well", "great", "fair", "true", "sweet")
JUDGES = {"logistic": range(1, 7), "lexicon": range(1, 7), "misled": range(1, 7),
          "pairs": range(1, 5), "three answers": range(1, 5)}  # the values of k
ARMS = {"H alone": "HHHHHH", "L alone": "LLLLLL", "H first": "HLHLHL", "L first": "LHLHLH"}
COLOURS = dict(zip(("random words", *ARMS), (ink.black, ink.green, ink.red, ink.blue, ink.orange)))
ANY = ", any lie"  # L need not name his lie beforehand


def read(runs: tuple[Path, ...], seed: int) -> tuple:
    """Shuffle all samples that VADER labelled -> vocabulary; the distinct words of each text,
    (N, L), with 1 for a rare word and 0 for none; labels (N,), as indices of ANSWERS."""
    items = [item for run in runs for item in labelled(run)]
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
    """List all sets of k of n words, (C(n, k), k), in lexicographic order."""
    return np.array(list(combinations(range(n), k))).reshape(-1, k)


@cache
def above(n: int, k: int) -> np.ndarray:
    """Find for each of sets(n, k) the rows of sets(n, k + 1) that contain it, (C(n, k), n - k)."""
    parts = np.stack([np.delete(sets(n, k + 1), i, 1) for i in range(k + 1)], 1)   # (S, k + 1, k)
    digits = parts @ 64 ** np.arange(k)[::-1]
    return (digits.ravel().argsort(kind="stable") // (k + 1)).reshape(-1, n - k)


def value(lead: np.ndarray, n: int, order: str) -> float:
    """Work out best play: the truth's lead on each of sets(n, len(order)) -> its lead in the end.
    order: who reveals each word, as "HLHL"."""
    for k in reversed(range(len(order))):
        lead = lead[above(n, k)].max(1) if order[k] == "H" else lead[above(n, k)].min(1)
    return lead[0]


def additive_value(lead: np.ndarray, order: str) -> float:
    """Do the same where the lead is a sum over the words, (n,), with n >= len(order)."""
    lead, low = np.sort(lead), order.count("L")
    return lead[:low].sum() + lead[len(lead) - len(order) + low:].sum()


# ---- Judges --------------------------------------------------------------------------------------
class Judge(nn.Module):
    """Judge words (..., k), 0 for none -> logits (..., C): a sum over words, or a layer on top."""
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
    """Train on k random words of texts (N, L), with as many texts of each label (N,)."""
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


# ---- The experiment ------------------------------------------------------------------------------
@dataclass
class Settings(Config):
    seeds: int = 5            # disjoint parts of all samples
    test: int = 200           # test texts of each answer
    steps: int = 1000         # of Adam, 256 texts each


def right(lead):
    """Give 1 where the truth leads, 1/2 where the judge is undecided, 0 where a lie leads."""
    return (np.sign(lead) + 1) / 2


@torch.no_grad()
def leads(judge: Judge, revealed: torch.Tensor, truth: int) -> np.ndarray:
    """Show sets of words (S, k) to a judge -> the truth's lead over each lie, (S, C - 1)."""
    logits = judge(revealed).numpy()
    return logits[:, [truth]] - np.delete(logits, truth, 1)


def play(judge: Judge, text: torch.Tensor, truth: int, k: int) -> dict[str, float]:
    """Play each arm on the words (n,) of one text -> arm -> how often the judge is right."""
    n, additive = len(text), judge.head is None and len(judge.bias) == 2
    drawn = np.random.default_rng(0).permuted(np.tile(np.arange(n), (200, 1)), axis=1)[:, :k]
    lead = leads(judge, text[torch.tensor(drawn if additive else sets(n, k))], truth)
    won = {"random words": right(lead.min(1)).mean()}
    if additive:
        each = (judge.word(text) + judge.bias / k).detach().numpy()
        each = each[:, truth] - each[:, 1 - truth]
        return won | {arm: right(additive_value(each, order[:k])) for arm, order in ARMS.items()}
    for arm, order in ARMS.items():
        won[arm] = min(right(value(x, n, order[:k])) for x in lead.T)
        if len(lead.T) > 1:
            won[arm + ANY] = right(value(lead.min(1), n, order[:k]))
            won["random words, lie named"] = right(lead).mean(0).min()
    return won


def measure(cfg: Settings, texts, label, vocabulary: list[str]) -> dict[str, float]:
    """Train and test all judges on one seed's texts (N, L) and label (N,) -> what -> accuracy."""
    lexicon = SentimentIntensityAnalyzer().lexicon
    valence = torch.tensor([[lexicon.get(word, 0.0), 0.0] for word in vocabulary])
    lying = torch.tensor([i for i, word in enumerate(vocabulary) if word in LYING])
    held = torch.cat([(label == c).nonzero()[:cfg.test, 0] for c in range(3)])
    fit, found = torch.ones(len(label), dtype=torch.bool), {}
    fit[held] = False
    for name, ks in JUDGES.items():
        answers = 3 if name == "three answers" else 2
        rows, asked = fit & (label < answers), held[:answers * cfg.test]
        if name == "misled":
            rows &= (label != 0) | ~torch.isin(texts, lying).any(1)
        asked = [(texts[i][texts[i] > 0], label[i].item()) for i in asked]
        for k in (*ks, texts.shape[1]):
            judge = Judge(len(vocabulary), answers, hidden=16 if name == "pairs" else 0)
            if name == "lexicon":
                judge.word.weight.data = valence
            else:
                train(judge, texts[rows], label[rows], k, cfg.steps)
            if k not in ks:
                found[f"{name}: all words"] = np.mean(
                    [right(leads(judge, text[None], truth).min()) for text, truth in asked])
                continue
            each = [play(judge, text, truth, k) for text, truth in asked]
            for arm in each[0]:
                won = [game[arm] for game in each]
                found[f"{name}, k = {k}: {arm}"] = np.mean(won)
                if answers == 3 and k == ks[-1]:
                    found[f"{name}, k = {k}, neutral: {arm}"] = np.mean(won[-cfg.test:])
    return found


def draw(found: dict[str, list[float]]):
    fig, axes = panels(1, 5, 14, 4, sharey=True)
    for ax, (name, ks) in zip(axes, JUDGES.items()):
        for arm in (*COLOURS, "random words, lie named", *(arm + ANY for arm in ARMS)):
            colour = COLOURS[arm.split(",")[0]]
            if f"{name}, k = 1: {arm}" in found:
                mean, half = zip(*(over_seeds(found[f"{name}, k = {k}: {arm}"]) for k in ks))
                style = "o:" if "," in arm else "o-"
                ax.errorbar(ks, mean, half, fmt=style, ms=4, capsize=3, color=colour, label=arm)
        ax.axhline(np.mean(found[f"{name}: all words"]), color="grey", lw=1)
        ax.set(title=name, xlabel="k words", ylim=(-0.03, 1.03), xticks=ks)
    axes[0].set(ylabel="judge is right (grey: on all words)")
    fig.legend(*axes[4].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


if __name__ == "__main__":
    cfg, *_ = start(Settings, __doc__)
    vocabulary, texts, label = read(cfg.runs, cfg.seed)
    parts = zip(texts.chunk(cfg.seeds), label.chunk(cfg.seeds))
    seeds = [measure(cfg, *part, vocabulary) for part in tqdm(parts, total=cfg.seeds, desc="seeds")]
    found = {what: [round(float(seed[what]), 4) for seed in seeds] for what in seeds[0]}
    save_results(cfg, "debate", found, {"texts": len(label), "words": len(vocabulary)}, draw(found))
