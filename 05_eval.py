"""Stage 5: measure every checkpoint on fresh samples, and write the report.

    python 05_eval.py                    # 62 s: VADER positive 58.3 -> 96.8 %

Reads   out/*.safetensors, out/checkpoints/*.safetensors, out/04-happy.jsonl; if they are there,
        out/corpus.txt, prompts.json, curve.json, ratings.json (`python -m people rate anna`)
Writes  out/report.html (one self-contained page), out/report.json, out/plots/*.png

Decisions a reader may question:
1. All policies draw with the same noise: sample 7 of each starts from the same random numbers, so
   side by side one sees a text change as the KL grows.
2. The gold score is VADER's compound score. Neither 04 nor its stop rule reads it; but in the
   default run the labels came from VADER too, so gold and proxy share their blind spots.
3. Best-of-n from the base model stands on the same axes, because it needs no training.
"""
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import (GPT, chunked, decode_prompts, draw_prompts, fingerprint, load,
                   load_base_and_reward, load_policies, read_prompts, score_of)
from report import build_report
from running import UserError, finish, require, start, write


@dataclass
class Config:
    out: Path = Path("out")  # where all stages write
    seed: int = 0
    n: int = 1024            # samples of each checkpoint
    n_ends: int = 2048       # samples of the base and the final policies, and behind best-of-n
    show: int = 4            # samples of each checkpoint side by side in the report


def check(cfg: Config) -> None:
    # over-optimisation is tested on every second sample, which needs two for a standard deviation
    require(min(cfg.n, cfg.n_ends) >= 4, "--n and --n-ends must be at least 4")
    require(0 < cfg.show <= 64, "--show must be 1 to 64")


# ---- Measures of text ----------------------------------------------------------------------------
def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:['’][a-z]+)*", text.lower())


def distinct(texts: list[str], n: int) -> float:
    """Distinct-n (Li et al. 2016): different word n-grams over all word n-grams of 512 samples."""
    grams = []
    for text in texts[:512]:
        sequence = words(text)
        grams += [tuple(sequence[i:i + n]) for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def self_similarity(texts: list[str]) -> float:
    """Mean cosine between the word counts of two different samples, over 512 samples."""
    counts = [Counter(words(text)) for text in texts[:512]]
    vocabulary = dict.fromkeys(word for count in counts for word in count)
    column = {word: i for i, word in enumerate(vocabulary)}
    x = np.zeros((len(counts), len(column)), dtype=np.float32)             # (texts, words)
    for row, count in zip(x, counts):
        row[[column[word] for word in count]] = list(count.values())
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    n = len(x)
    return float((np.square(x.sum(0)).sum() - n) / (n * (n - 1)))


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


# ---- Statistics ----------------------------------------------------------------------------------
def mean_se(x) -> tuple[float, float]:
    x = np.asarray(x, dtype=np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


def log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def best_of_n(proxy: np.ndarray, value: np.ndarray, n: int) -> float:
    """Expected `value` of the best of n by `proxy`, unbiased, from N >= n samples: the sample of
    rank i (1 = worst) is the best of a random subset with probability C(i-1, n-1) / C(N, n)
    (Nakano et al. 2021, arXiv:2112.09332, appendix I)."""
    N = len(proxy)
    order = np.argsort(proxy, kind="stable")
    weight = np.zeros(N)
    for i in range(n, N + 1):
        weight[i - 1] = math.exp(log_binomial(i - 1, n - 1) - log_binomial(N, n))
    return float(weight @ value[order])


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound on KL(best-of-n || base), nats (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


# ---- Measuring one policy ------------------------------------------------------------------------
@torch.no_grad()
def measure(policy, reference, reward_fn, tokenizer, corpus: Corpus | None, prompt, length: int,
            seed: int) -> dict:
    """All figures of one policy on fresh samples, one for each row of prompt (n, P); those of the
    reference also give best-of-n. reward_fn: tokens (B, T) -> (B,)."""
    n = len(prompt)
    y, _ = policy.generate(n, length, seed, prompts=prompt)                                # (n, T)
    logp, entropy = chunked(policy.logprob_and_entropy, 256, y, prompt)
    logp_ref = chunked(reference.logprob, 256, y, prompt)
    proxy = chunked(reward_fn, 256, y).numpy(force=True)                                   # (n,)
    kl = (logp - logp_ref).double().sum(-1).numpy(force=True)                              # (n,)
    texts = tokenizer.decode_batch(y.tolist())
    vader = SentimentIntensityAnalyzer()
    gold = np.array([vader.polarity_scores(text)["compound"] for text in texts])           # (n,)

    row = {"n": n, "samples": texts[:64], "prompts": decode_prompts(tokenizer, prompt[:64]),
           "words": Counter(word for text in texts for word in words(text)),
           "gold_each": gold.tolist(),
           "entropy": entropy.mean().item(), "base_perplexity": math.exp(-logp_ref.mean().item()),
           "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2),
           "self_similarity": self_similarity(texts), "duplicates": n - len(set(texts))}
    each = {"kl": kl, "proxy": proxy, "gold": gold, "positive": gold >= 0.05,
            "negative": gold <= -0.05}
    for name, x in each.items():
        row[name], row[f"{name}_se"] = mean_se(x)
    if corpus:
        runs = corpus.longest_runs(texts)
        row["copied_run_99"] = float(np.percentile(runs, 99))
        row["copied_run_max"] = int(runs.max())
    if policy is reference:
        row["kl"] = row["kl_se"] = 0.0  # not what rounding leaves of it
        row["best_of_n"] = [{"n": k, "kl": best_of_n_kl(k), "proxy": best_of_n(proxy, proxy, k),
                             "gold": best_of_n(proxy, gold, k),
                             "positive": best_of_n(proxy, gold >= 0.05, k)}
                            for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= n]
    return row


def read_log(path: Path) -> list[dict]:
    """The rows of a JSON-lines log. Raises UserError if it is missing or damaged."""
    require(path.exists(), f"{path} is missing: run 04_ppo.py again")
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged: run 04_ppo.py again") from error


def read_ratings(out: Path, policies: dict[str, GPT]) -> list[dict]:
    """What `python -m people` wrote of blind ratings, if they are of these policies."""
    path = out / "ratings.json"
    if not path.exists():
        return []
    ratings = json.loads(path.read_text())
    current = {target: fingerprint(policy) for target, policy in policies.items()}
    if not ratings["policies"].items() <= current.items():
        print(f"{path} is of other policies: left out")
        return []
    return ratings["results"]


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__)
    check(cfg)
    reference, reward_model, tokenizer, about = load_base_and_reward(cfg.out, device, dtype)
    ppo = read_log(cfg.out / "04-happy.jsonl")
    prompts = read_prompts(cfg.out / "prompts.json", "held_out") if about["prompted"] else None
    corpus_path = cfg.out / "corpus.txt"
    corpus = Corpus(corpus_path.read_text(encoding="utf-8")) if corpus_path.exists() else None

    # -- what there is to measure: the base model, the checkpoints, the final policies
    policies = load_policies(cfg.out, about["inputs"])
    paths = {}
    for target in policies:
        checkpoints = sorted((cfg.out / "checkpoints").glob(f"{target}-kl-*.safetensors"))
        paths[target] = [*checkpoints, cfg.out / f"policy-{target}.safetensors"]
    paths["happy"].insert(0, cfg.out / "base.safetensors")

    # -- measure
    results = {}
    bar = tqdm(total=sum(map(len, paths.values())), desc="evaluate")
    for target in paths:
        def reward_fn(y):
            return score_of(reward_model.sentiment(y), about["kind"], target)

        results[target] = []
        for path in paths[target]:
            policy = reference if path.stem == "base" else load(path, "04_ppo.py", device, dtype)[0]
            n = cfg.n if path.parent.name == "checkpoints" else cfg.n_ends
            stream = cfg.seed << 32 | 5 << 24  # 04's rollouts have 4
            prompt = draw_prompts(prompts, n, stream).to(device)                           # (n, P)
            row = measure(policy, reference, reward_fn, tokenizer, corpus, prompt, about["length"],
                          stream)
            results[target].append({"name": path.stem, **row})
            tqdm.write("{name:>20}: KL {kl:5.2f} +- {kl_se:.2f}, proxy {proxy:.3f}, gold "
                       "{gold:+.3f} +- {gold_se:.3f}, positive {positive:.1%}, distinct-2 "
                       "{distinct_2:.3f}, duplicates {duplicates}".format(name=path.stem, **row))
            bar.update()
    bar.close()

    # -- hand over to the report
    results |= {
        "seed": cfg.seed, "base_metrics": about["base_metrics"], "reward_model": about["metrics"],
        "calibration": about["calibration"], "ppo": ppo, "ratings": read_ratings(cfg.out, policies)}
    results = build_report(results, cfg.out, cfg.show)
    write(cfg.out / "report.json", json.dumps(results, indent=1))
    print("risen most, per 1,000 words:", ", ".join(
        "{word} {before:.1f} -> {after:.1f}".format(**row) for row in results["risen_words"]))
    print(results["summary"])
    print("sqrt KL against iteration: slope {slope:.3f}, R^2 {r2:.4f}"
          .format(**results["sqrt_kl_fit"]))
    finish(f"open {cfg.out / 'report.html'} in a browser", Path("out"))  # names --out already
