"""A labeller who reads k words of a text, assistants that say which, and what is learned of it."""
import copy
import importlib
import json
from collections import Counter
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from experiments import load_run
from experiments.overseers import rm, targets
from experiments.ppo import ppo, stage
from model import load, require, words

ev = importlib.import_module("05_eval")
vader = cache(SentimentIntensityAnalyzer)  # vader(): one for all, not to be changed
LEXICON = vader().lexicon | {"": 0.0}
parts = cache(words)  # "heart-ache," -> heart, ache


def compound(text: list[str]) -> float:
    """How VADER feels about these words alone, in [-1, 1]. Of all words of a text, split at
    whitespace: exactly how it feels about the text."""
    return vader().polarity_scores(" ".join(text))["compound"]


def read(run) -> tuple[list[list[str]], list[list[int]], np.ndarray]:
    """The samples of a run, as lists of words and of tokens; how VADER feels about each, (N,)."""
    path = run / "labels-vader.jsonl"
    require(path.exists(), f"{path} is missing: make seeds first, or name runs with --runs")
    rows = list(map(json.loads, path.read_text().splitlines()))
    texts = [row["text"].split() for row in rows]
    return texts, [row["tokens"] for row in rows], np.array([compound(text) for text in texts])


# ---- The reward model ----------------------------------------------------------------------------
def fit(texts: list[list[str]], labels) -> dict[str, float]:
    """Labels in [0, 1] -> 03's baseline: the log-odds of each word, and the bias, of ""."""
    names = ["", *dict.fromkeys(name for text in texts for word in text for name in parts(word))]
    rows = [{"text": " ".join(text), "target": label, "weight": 1.0}
            for text, label in zip(texts, labels)]
    odds = rm.bag_of_words(rows, [{"text": name} for name in names])
    return dict(zip(names, [odds[0].item(), *(odds[1:] - odds[0]).tolist()]))


def changes(model: dict[str, float], text: list[str]) -> np.ndarray:
    """(n,): by how much each word of the text changes its score."""
    return np.array([sum(model.get(name, 0.0) for name in parts(word)) for word in text])


def scores(model: dict[str, float], texts: list[list[str]]) -> np.ndarray:
    """(N,): the log-odds that each text is happy."""
    return np.array([model[""] + changes(model, text).sum() for text in texts])


def judged(score: np.ndarray, gold: np.ndarray) -> dict:
    """Of a reward model's scores (N,) of fresh texts: AUC; and how VADER feels about the best of 16
    by it, and of any n, in standard deviations of gold (N,)."""
    ranked = ((gold - gold.mean()) / gold.std())[np.argsort(score, kind="stable")]
    best = {n: ev.best_of_n_weights(len(score), n) @ ranked
            for n in ev.BEST_OF if n <= len(score)}
    return {"AUC": rm.auc(score, targets(gold)), "gold": best[16], "best of n": best}


def known(model: dict[str, float], texts) -> dict:
    """Of the words in these texts that VADER feels about: of how many the model has the sign."""
    counts, found = Counter(x for text in texts for word in text for x in parts(word)), {}
    for sign, feeling in ((1, "happy"), (-1, "sad")):
        names = [name for name in counts if LEXICON.get(name, 0.0) * sign > 0]
        right = [np.sign(model.get(name, 0.0)) * sign / 2 + 0.5 for name in names]
        found[f"{feeling} words known"] = np.average(right, weights=[counts[x] for x in names])
    return found


def optimise(model: dict[str, float], gold: np.ndarray, run, device, dtype, batch: int = 2048,
             kl_stop: float = 6.0) -> list[dict]:
    """PPO against log p(happy) by this model -> before each update KL, reward, and how VADER feels
    about the batch, in standard deviations of gold (N,)."""
    reference, _, _, tokenizer, report = load_run(run, device, dtype)
    felt, rows = [], []

    def reward_fn(y, prompt):
        texts = [text.split() for text in tokenizer.decode_batch(y.tolist())]
        felt.extend(map(compound, texts))
        return F.logsigmoid(torch.tensor(scores(model, texts), device=y.device)).float()
    settings = stage.Config(seed=report["seed"], batch=batch, max_batch=batch)
    for row in ppo(copy.deepcopy(reference), reference, reward_fn, report["length"], settings):
        rows.append({"kl": row["kl"], "reward": row["score"],
                     "gold": (np.mean(felt[-batch:]) - gold.mean()) / gold.std()})
        if row["kl"] > kl_stop:
            break
    return rows


# ---- The labeller and her assistants -------------------------------------------------------------
def pointed(aim: str, change: np.ndarray, truth: float, verdict: float, k: int, rng) -> np.ndarray:
    """The places, ascending, of the k words that she is to read; ties at random. change (n,) as the
    assistant sees it; truth: 1, 0 or -1; verdict: 1 or -1, the assistant's own."""
    wish = {"first": -np.arange(len(change)), "random": np.zeros(len(change)),
            "critique": np.abs(change), "flattery": change, "yes-man": verdict * change,
            "liar": -truth * change if truth else np.abs(change)}[aim]
    return np.sort(np.lexsort((rng.random(len(change)), -wish))[:k])


def labels(texts, target, aim: str, model: dict[str, float], k: int, rng) -> np.ndarray:
    """Her labels (N,) with an assistant that has this model; its verdict is whether a text scores
    above the average. target (N,): the true labels; all in {0, .5, 1}."""
    score, felt = scores(model, texts), []
    for text, truth, verdict in zip(texts, 2 * target - 1, np.sign(score - score.mean())):
        places = pointed(aim, changes(model, text), truth, verdict, k, rng)
        felt.append(compound([text[i] for i in places]))
    return targets(np.array(felt))


def transformer(texts, tokens, gold: np.ndarray, n: int, rest: slice, aim: str, k: int,
                model: dict[str, float], run, device, dtype) -> dict:
    """The base model after an epoch of 03 on labels of the first n texts, `judged` on the rest."""
    given = labels(texts[:n], targets(gold[:n]), aim, model, k, np.random.default_rng(0))
    items = [{"tokens": y, "target": x, "weight": 1.0} for y, x in zip(tokens, [*given, *gold[n:]])]
    learner = load(run / "base.safetensors", "01_pretrain.py", device, dtype)[0]
    rm.train(learner, rm.Phase("samples", items[:n], 1.0), rm.Config())
    log_p = rm.predict(learner, items[rest])
    return judged(log_p[:, 0] - log_p[:, 1], gold[rest])
