"""VADER (Hutto & Gilbert 2014): its score of many texts, on more than two cores by as many
processes."""
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

POSITIVE = 0.05  # the compound score from which a text is positive; from -.05 down it is negative
CHUNK = 4096  # texts that one process scores: .1 to .4 s, and .1 s until it has started
PROCESS = """
import json, sys
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
score = SentimentIntensityAnalyzer().polarity_scores
json.dump([score(text)["compound"] for text in json.load(sys.stdin)], sys.stdout)
"""

vader = cache(SentimentIntensityAnalyzer)  # vader(): one for all, not to be changed


def score_here(texts: list[str]) -> list[float]:
    return [vader().polarity_scores(text)["compound"] for text in texts]


def score_elsewhere(texts: list[str]) -> list[float]:
    """By a new process, not a fork of this one: a fork of a process that has used a GPU breaks, and
    one that imports the script would wait for torch. Ctrl-C does not reach it: it ends by itself.
    """
    done = subprocess.run([sys.executable, "-c", PROCESS], input=json.dumps(texts), text=True,
                          stdout=subprocess.PIPE, check=True, start_new_session=True)
    return json.loads(done.stdout)


def compound_scores(texts: list[str], desc: str | None = None) -> list[float]:
    """VADER's compound score of each text, in [-1, 1]. desc: of a progress bar, None for none."""
    chunks = [texts[i:i + CHUNK] for i in range(0, len(texts), CHUNK)]
    cores, scores = torch.get_num_threads(), []
    with ThreadPoolExecutor(cores) as threads, tqdm(
            total=len(texts), desc=desc, mininterval=1, disable=desc is None) as bar:
        several = cores > 2 and len(chunks) > 1
        done = threads.map(score_elsewhere, chunks) if several else map(score_here, chunks)
        for part in done:
            scores += part
            bar.update(len(part))
    return scores


def vader_score(texts: list[str], target: str) -> torch.Tensor:
    """B texts -> (B,): log p(target) as if (1 + VADER's compound score) / 2 were p(happy)."""
    p_happy = torch.tensor([(1 + compound) / 2 for compound in compound_scores(texts)])
    return (p_happy if target == "happy" else 1 - p_happy).clamp_min(1e-4).log()
