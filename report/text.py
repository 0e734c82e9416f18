"""Measures of text: what judges say of it, how varied it is, how much of it is copied."""
import re
from collections import Counter

import numpy as np
from afinn import Afinn
from textblob.en import sentiment as pattern

from running.text import words
from running.vader import compound_scores

WORDS = 4000  # of which distinct-n is measured


class QuickAfinn(Afinn):
    """The same matches in a tenth of the time: at the start of a word the regular expression tries
    those of the 3,382 that have its first letter."""

    @staticmethod
    def regex_from_tokens(tokens, word_boundary=True, capture=True):
        rest = {}  # first letter -> what follows, the longest first
        for token in sorted(tokens, key=len, reverse=True):
            rest.setdefault(token[0], []).append(re.escape(token[1:]))
        groups = (f"{re.escape(letter)}(?:{'|'.join(ends)})" for letter, ends in rest.items())
        return rf"(\b(?:{'|'.join(groups)})\b)"


def judge(texts: list[str]) -> dict[str, np.ndarray]:
    """Judge -> score of each text. VADER's compound score and Pattern's polarity lie in [-1, 1],
    AFINN-165 (Nielsen 2011) is the sum of the valences, -5 to 5, of all words."""
    afinn = QuickAfinn()
    return {"vader": np.array(compound_scores(texts)),
            "afinn": np.array([afinn.score(text) for text in texts]),
            "pattern": np.array([pattern(text)[0] for text in texts])}


def distinct(texts: list[str], n: int, n_words: int = WORDS) -> float:
    """Distinct-n (Li et al. 2016): different word n-grams over all, of n_words words, because the
    ratio falls with their number; the mean over as many runs of n_words words as the texts have."""
    shares, grams, left = [], [], n_words
    for text in texts:
        sequence = words(text)[:left]
        left -= len(sequence)
        grams += [tuple(sequence[i:i + n]) for i in range(len(sequence) - n + 1)]
        if left == 0:
            shares.append(len(set(grams)) / len(grams))
            grams, left = [], n_words
    return float(np.mean(shares))


def self_similarity(texts: list[str]) -> float:
    """Mean cosine between the word counts of two different samples."""
    counts = [Counter(words(text)) for text in texts]
    vocabulary = dict.fromkeys(word for count in counts for word in count)
    column = {word: i for i, word in enumerate(vocabulary)}
    x = np.zeros((len(counts), len(column)), dtype=np.float32)             # (texts, words)
    for row, count in zip(x, counts):
        row[[column[word] for word in count]] = list(count.values())
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    n = len(x)
    return float((np.square(x.sum(0)).sum() - n) / (n * (n - 1)))


def variety(texts: list[str]) -> dict[str, float]:
    """-> distinct-1, distinct-2 and self-similarity; {} of texts with fewer than WORDS words."""
    if sum(len(words(text)) for text in texts) < WORDS:
        return {}
    return {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2),
            "self_similarity": self_similarity(texts[:512])}


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 if one does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


class Corpus:
    """The longest run of words that a text shares with the corpus, by hashes of its n-grams."""

    def __init__(self, text: str):
        self.id: dict[str, int] = {}
        ids = [self.id.setdefault(word, len(self.id) + 1) for word in words(text)]
        self.words = np.array(ids, dtype=np.uint64)
        self.hashes = [np.zeros(0, np.uint64)]  # [n]: of all n-grams, sorted, made when needed

    @staticmethod
    def grams(ids: np.ndarray, n: int) -> np.ndarray:
        h = np.zeros(max(len(ids) - n + 1, 0), dtype=np.uint64)
        for i in range(n):
            h = (h ^ ids[i:i + len(h)]) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
        return h

    def longest_runs(self, texts: list[str]) -> np.ndarray:
        """-> words in the longest copied run of each text."""
        ids = [np.array([self.id.get(word, 0) for word in words(text)], dtype=np.uint64)
               for text in texts]
        longest = np.zeros(len(texts), int)
        alive, n = list(range(len(texts))), 1   # texts that share a run of n - 1 words
        while alive:
            if n == len(self.hashes):
                self.hashes.append(np.unique(self.grams(self.words, n)))
            known = self.hashes[n]
            if len(known) == 0:
                break
            grams = [self.grams(ids[i], n) for i in alive]
            flat = np.concatenate(grams)
            place = np.searchsorted(known, flat).clip(max=len(known) - 1)
            ends = np.cumsum([len(g) for g in grams])[:-1]
            hits = np.split(known[place] == flat, ends)
            alive = [i for i, hit in zip(alive, hits) if hit.any()]
            longest[alive] = n
            n += 1
        return longest
