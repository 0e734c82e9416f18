"""Simulated people: each feels like VADER, except that some words mean the opposite to her."""
import copy
import importlib
from collections import Counter

import numpy as np
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import words

FLIPPED = ("good", "love", "like", "well", "no", "great", "death", "fair", "true", "sweet")
label, rm = importlib.import_module("02_sample_label"), importlib.import_module("03_reward_model")


def person(flipped):
    """Return a function: texts -> VADER's compound scores (n,), with these words negated."""
    analyzer = SentimentIntensityAnalyzer()
    analyzer.lexicon |= {word: -analyzer.lexicon[word] for word in flipped}
    return lambda texts: np.array([analyzer.polarity_scores(text)["compound"] for text in texts])


def others(texts: list[str], n: int, seed: int) -> list[list[str]]:
    """Draw n lists of ten words of the lexicon. In each, every FLIPPED word is replaced by another
    word that is about as frequent in the texts: at most ten ranks away."""
    lexicon, rng = SentimentIntensityAnalyzer().lexicon, np.random.default_rng(seed)
    counts = Counter(word for text in texts for word in words(text) if word in lexicon)
    ranked = [word for word, _ in counts.most_common() if word not in FLIPPED]
    places = [sum(counts[word] > counts[flipped] for word in ranked) for flipped in FLIPPED]
    people = []
    for _ in range(n):
        chosen = []
        for place in places:
            near = [word for word in ranked[max(place - 10, 0):place + 10] if word not in chosen]
            chosen.append(str(rng.choice(near)))
        people.append(chosen)
    return people


def retrained(reward_model, y, texts: list[str], compound: np.ndarray):
    """Fine-tune a copy of the reward model on a person's labels, as 03 does. compound (n,): how she
    feels."""
    rows = [{"id": str(i), "text": text, "tokens": tokens, "source": "model", "labeller": "her",
             "label": label.feeling(feeling)}
            for i, (tokens, text, feeling) in enumerate(zip(y.tolist(), texts, compound))]
    stage = rm.Config()
    phase, = rm.phases_of([item | {"part": "train"} for item in rm.pool(rows, 0)], stage)
    model = copy.deepcopy(reward_model)
    rm.train(model, phase, stage)
    return model


def targets(compound: np.ndarray) -> np.ndarray:
    """Turn compound scores (n,) into 03's targets, (n,): 1 positive, 0.5 neutral, 0 negative."""
    return np.array([rm.TARGET[label.feeling(x)] for x in compound])
