"""Stage 5: measure all checkpoints on fresh samples, pick the best, find over-optimisation.

    python 05_eval.py                    # 86 s: VADER calls 56.8% -> 97.4% positive
    python -m report                     # then turns the results into a page, out/report.html

Reads   out/*.safetensors, out/checkpoints/*.safetensors, out/04-happy.jsonl; out/corpus.txt and
        prompts.json, if they are there
Writes  out/report.json

Decisions a reader may question:
1. All policies draw with the same random numbers: sample 7 of each starts from the same noise. So
   you can watch a text change as the KL (distance from the base model, in nats) grows.
2. Three lexicons judge the samples. By default VADER made the labels, so VADER and the reward share
   their blind spots. AFINN and Pattern are independent; they were never used for labels.
3. log p(happy) cannot exceed 0, and VADER cannot exceed 1, so both saturate. AFINN is a sum over
   words and does not. The choice of judge decides who wins, so we show all, in standard deviations
   of the base model's samples.
4. Best-of-n draws n samples of the base model and keeps the one with the highest reward. We plot it
   on the same axes, because it needs no training.
5. distinct-2 is the fraction of distinct word pairs. It falls with the number of words, so we
   always measure it on 4,000 words.
6. Of the checkpoints that keep 80% of the base model's distinct-2, we prefer the one that AFINN and
   Pattern like best. Over-optimisation starts at the first checkpoint that a judge finds worse
   than the best one before it, though the reward is not lower.
"""
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from afinn import Afinn
from scipy import stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize
from textblob.en import sentiment as pattern
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import (
    as_json,
    chunked,
    command,
    decode_prompts,
    draw_prompts,
    fingerprint,
    finish,
    kl_nats,
    load,
    only_writer,
    provenance,
    read_prompts,
    read_rows,
    require,
    start,
    words,
    write,
)

BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TARGETS = ("happy", "sad")
POSITIVE = 0.05  # VADER's own threshold
WORDS = 4000  # in which distinct-n is measured
JUDGES = {"vader": "VADER", "afinn": "AFINN", "pattern": "Pattern"}
OUTSIDE = ("afinn", "pattern")  # judges that did not make the labels


@dataclass
class Config:
    out: Path = Path("out")  # where all stages write
    seed: int = 0
    n: int = 1024            # samples per policy
    n_best: int = 8192       # base-model samples for best-of-n
    show: int = 6            # samples per checkpoint on the page


def check(cfg: Config) -> None:
    # over_optimisation takes a standard deviation of every second sample, so it needs two of them
    require(min(cfg.n, cfg.n_best) >= 4, "--n and --n-best must be at least 4")
    require(0 < cfg.show <= 64, "--show must be 1 to 64")


# ---- What there is to measure --------------------------------------------------------------------
def load_run(out: Path, device, dtype) -> tuple:
    """-> base model, reward model, tokenizer, the reward model's header. The header also gets
    "made_from" (the two models' fingerprints) and "base_metrics" (from 01). Raises UserError if a
    model is missing, or if the two do not belong together."""
    base, tokenizer, header = load(out / "base.safetensors", "01_pretrain.py", device, dtype)
    reward_model, _, about = load(out / "reward.safetensors", "03_reward_model.py", device, dtype)
    require("prompted" in about and "kind" in about, f"{out}/reward.safetensors is not a reward "
            f"model: run {command('03_reward_model.py')} again")
    about["base_metrics"] = header.get("metrics", {})
    about["made_from"] = {"base": fingerprint(base), "reward_model": fingerprint(reward_model)}
    same_base = about["inputs"]["base"] == about["made_from"]["base"]
    require(same_base, f"{out}/reward.safetensors was made from another base model: run "
                       f"{command('02_sample_label.py')} and {command('03_reward_model.py')} again")
    return base, reward_model, tokenizer, about


def find_policies(out: Path, target: str, made_from: dict) -> tuple[list[Path], list[dict]]:
    """-> the checkpoints of a run of 04 and its final policy, by rising KL; and its log's rows.
    ([], []) if there is no sad run. Raises UserError if a file is missing or from another run."""
    final, log = out / f"policy-{target}.safetensors", out / f"04-{target}.jsonl"
    again = f"run {command(f'04_ppo.py --target {target}')} again"
    if target == "sad" and not final.exists():
        return [], []
    last = load(final, f"04_ppo.py --target {target}")[2]
    if target == "sad" and last["inputs"] != made_from:
        print(f"{final} was made from other models: left out")
        return [], []
    require(last["inputs"] == made_from,
            f"{final} was made from another base model or reward model: {again}")
    numbers = ("step", "updates", "batch", "kl", "kl_se", "kl_k1", "kl_k1_se", "score", "entropy")
    rows = read_rows(log, f"04_ppo.py --target {target}", lambda row: all(
        isinstance(row[key], int | float) for key in numbers))
    require(len(rows) >= 2, f"{log} has fewer than two iterations: {again}")
    paths = []
    for path in sorted((out / "checkpoints").glob(
            f"{target}-kl-[0-9][0-9].[0-9][0-9].safetensors")) + [final]:
        header = load(path, f"04_ppo.py --target {target}")[2]
        require((header["step"], header["kl"]) in [(row["step"], row["kl"]) for row in rows],
                f"{path} does not belong to the run in {log}: {again}, and let it finish")
        if header["step"] < last["step"] or path == final:  # the final one may be a checkpoint too
            paths.append(path)
    return paths, rows


# ---- Judges, variety, copies ---------------------------------------------------------------------
class QuickAfinn(Afinn):
    """AFINN with the same matches in a tenth of the time: its regular expression tries only words
    that begin with the letter it sees, not all 3,382."""

    @staticmethod
    def regex_from_tokens(tokens, word_boundary=True, capture=True):
        rest = {}  # first letter -> what follows, the longest first
        for token in sorted(tokens, key=len, reverse=True):
            rest.setdefault(token[0], []).append(re.escape(token[1:]))
        groups = (f"{re.escape(letter)}(?:{'|'.join(ends)})" for letter, ends in rest.items())
        return rf"(\b(?:{'|'.join(groups)})\b)"


def judge(texts: list[str]) -> dict[str, np.ndarray]:
    """Judge -> score of each text. VADER's compound score and Pattern's polarity lie in [-1, 1];
    AFINN-165 (Nielsen 2011) is the sum of the valences, -5 to 5, of all words."""
    vader, afinn = SentimentIntensityAnalyzer(), QuickAfinn()
    found = {"vader": [vader.polarity_scores(text)["compound"] for text in texts],
             "afinn": [afinn.score(text) for text in texts],
             "pattern": [pattern(text)[0] for text in texts]}
    scores = {name: np.array(found.get(name), dtype=float) for name in JUDGES}
    for name, x in scores.items():
        require(x.shape == (len(texts),) and np.isfinite(x).all(),
                f"the judge {name!r} must give one finite number for each of {len(texts)} texts")
    return scores


def distinct(texts: list[str], n: int, n_words: int = WORDS) -> float:
    """Distinct-n (Li et al. 2016): the fraction of distinct word n-grams in n_words words. The mean
    over as many blocks of n_words words as the texts fill."""
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
    x = normalize(CountVectorizer(analyzer=words).fit_transform(texts).astype(float))
    n, total, own = len(texts), x.sum(0), x.multiply(x).sum()
    return float((np.square(total).sum() - own) / (n * (n - 1)))  # |sum of x|^2 = own + all pairs


def variety(texts: list[str]) -> dict[str, float]:
    """-> distinct-1, distinct-2 and self-similarity; {} if the texts have too few words."""
    if sum(len(words(text)) for text in texts) < WORDS:
        return {}
    return {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2),
            "self_similarity": self_similarity(texts[:512])}


def copied_runs(texts: list[str], corpus: str) -> np.ndarray:
    """For each text, the length in words of its longest run that is also in the corpus."""
    theirs, ours = words(corpus), [words(text) for text in texts]
    longest, n, alive = np.zeros(len(texts), int), 1, range(len(texts))
    while alive:  # the texts with a copied run of n - 1 words
        known = set(zip(*(theirs[i:] for i in range(n))))
        alive = [k for k in alive if not known.isdisjoint(zip(*(ours[k][i:] for i in range(n))))]
        longest[alive] = n
        n += 1
    return longest


# ---- Best of n -----------------------------------------------------------------------------------
def best_of_n_weights(N: int, n: int) -> np.ndarray:
    """(N,): the chance that the best of n random samples of N has rank i (1 = worst). It is
    C(i-1, n-1) / C(N, n) (Nakano et al. 2021, arXiv:2112.09332, appendix I)."""
    def log_binomial(m, k):
        return math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1)
    weights = np.zeros(N)
    for i in range(n, N + 1):
        weights[i - 1] = math.exp(log_binomial(i - 1, n - 1) - log_binomial(N, n))
    return weights


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound on KL(best-of-n || base), nats (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: np.ndarray, figures: dict[str, np.ndarray], texts: list[str]) -> list[dict]:
    """For each n, keep the best of n samples by proxy, the reward (N,). Every figure (N,) gets an
    unbiased mean and a 95% bootstrap interval. Variety comes from disjoint groups of n."""
    sizes = [n for n in BEST_OF if n <= len(proxy)]
    weights = np.stack([best_of_n_weights(len(proxy), n) for n in sizes])              # (sizes, N)
    values = np.stack(list(figures.values()), 1).astype(float)                         # (N, F)

    def means(rows):
        order = rows[np.argsort(proxy[rows], kind="stable")]
        return weights @ values[order]                                                 # (sizes, F)
    N, rng = len(proxy), np.random.default_rng(0)
    mean = means(np.arange(N))
    resampled = [means(rng.integers(0, N, N)) for _ in range(200)]
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
    rows = []
    for i, n in enumerate(sizes):
        row = {"n": n, "kl": best_of_n_kl(n)}
        for j, name in enumerate(figures):
            row |= {name: mean[i, j], f"{name}_interval": (low[i, j], high[i, j])}
        groups = np.arange(N // n * n).reshape(-1, n)                                  # (N // n, n)
        best = groups[np.arange(len(groups)), proxy[groups].argmax(1)]
        rows.append(row | variety([texts[k] for k in best]))
    return rows


# ---- Measuring one policy ------------------------------------------------------------------------
def draw_and_judge(model, reward_fn, tokenizer, prompt, length: int, seed: int) -> tuple:
    """One sample for each row of prompt (n, P) -> tokens (n, T), texts, and the scores of each
    text: name -> (n,). reward_fn: tokens (B, T), prompt (B, P) -> score (B,), p(happy) (B,)."""
    y, _ = model.generate(len(prompt), length, seed, prompts=prompt)                       # (n, T)
    proxy, p_happy = chunked(reward_fn, 256, y, prompt)                                    # (n,)
    texts = tokenizer.decode_batch(y.tolist())
    return y, texts, {"proxy": proxy.numpy(force=True), "p_happy": p_happy.numpy(force=True),
                      **judge(texts)}


@torch.no_grad()
def log_odds(reward_model, y, prompt) -> torch.Tensor:
    """log p(happy) - log p(sad) after each prefix of y (n, T), from the empty one on: (n, T + 1).
    The change from one prefix to the next is what that token does to the reward model."""
    hidden = reward_model.hidden_after(y, prompt)                                   # (n, T + 1, D)
    head = reward_model.head[[reward_model.happy, reward_model.sad]].to(hidden.dtype).float()
    return hidden.float() @ (head[0] - head[1])


def pieces(tokenizer, tokens: list[int]) -> list[str]:
    """The text of each token; joined, they give the whole text. If several tokens form one
    character, the last of them gets it."""
    text = tokenizer.decode(tokens)
    ends = [len(tokenizer.decode(tokens[:t]).rstrip("\ufffd")) for t in range(len(tokens))]
    return [text[a:b] for a, b in zip(ends, ends[1:] + [len(text)])]


@torch.no_grad()
def measure(policy, reference, reward_model, reward_fn, tokenizer, prompt, length: int, seed: int,
            show: int) -> dict:
    """All figures of one policy on fresh samples, one per row of prompt (n, P). For the first
    `show`, also what each token does to the reward model. NAME_se: standard error of NAME."""
    n = len(prompt)
    y, texts, judged = draw_and_judge(policy, reward_fn, tokenizer, prompt, length, seed)
    kl, k1, logp, entropy = kl_nats(policy, reference, y, prompt)
    nats_under_base = k1.mean().item() / length - logp.mean().item()
    figures = {"kl": kl.numpy(force=True), "k1": k1.numpy(force=True), **judged,
               "positive": judged["vader"] >= POSITIVE, "negative": judged["vader"] <= -POSITIVE}
    row = {"n": n, "texts": texts, "samples": texts[:64],
           "prompts": decode_prompts(tokenizer, prompt[:64]),
           "pieces": [pieces(tokenizer, tokens) for tokens in y[:show].tolist()],
           "log_odds": log_odds(reward_model, y[:show], prompt[:show]).double().tolist(),
           "each": {name: np.round(x.astype(float), 6).tolist() for name, x in judged.items()},
           "entropy": entropy.mean().item(), "base_perplexity": math.exp(nats_under_base),
           "duplicates": n - len(set(texts)), **variety(texts)}
    for name, x in figures.items():
        x = x.astype(float)
        row |= {name: float(x.mean()), f"{name}_se": float(stats.sem(x))}
    for name in JUDGES:  # Pearson's correlation with the reward; 0 if one does not vary
        x, proxy = judged[name], judged["proxy"]
        varies = x.std() > 0 and proxy.std() > 0
        row[f"{name}_correlation"] = float(np.corrcoef(proxy, x)[0, 1]) if varies else 0.0
    return row


# ---- Which is the best, and where did over-optimisation start? -----------------------------------
def standardise(rows: list[dict], base: dict) -> None:
    """Add NAME_sd to each row, for each judge and the reward ("proxy"): how far its mean has moved
    from the base model's mean. The unit is the standard deviation of the base model's samples. Also
    add the standard error or interval of the mean, in the same unit."""
    for name in ("proxy", *JUDGES):
        mean, std = base[name], max(base[f"{name}_se"] * math.sqrt(base["n"]), 1e-12)
        for row in rows:
            row[f"{name}_sd"] = (row[name] - mean) / std
            if f"{name}_se" in row:
                row[f"{name}_sd_se"] = row[f"{name}_se"] / std
            if f"{name}_interval" in row:
                row[f"{name}_sd_interval"] = [(x - mean) / std for x in row[f"{name}_interval"]]


def preferred(rows: list[dict], sign: int = 1, keep: float = 0.8) -> tuple[dict, str]:
    """rows by rising KL, the base model first -> the preferred one, and why. Among rows that keep
    the fraction `keep` of the base model's distinct-2, it is the one that the outside judges like
    best on average, in standard deviations. sign: -1 towards sad."""
    def liked(row):
        return sign * sum(row[f"{judge}_sd"] for judge in OUTSIDE) / len(OUTSIDE)

    def kept(row):
        return row.get("distinct_2", 0) / rows[0]["distinct_2"] if "distinct_2" in rows[0] else 1
    varied = [row for row in rows if kept(row) >= keep]
    row = max(varied, key=liked)
    variety = (f"{len(varied)} of {len(rows)} policies keep at least {keep:.0%} of the base "
               f"model's distinct-2; this one keeps {kept(row):.0%}. "
               if "distinct_2" in row else "")
    return row, (f"Preferred: {row['name']}, at {row['kl']:.2f} nats. {variety}Of these, AFINN and "
                 "Pattern, which never made labels, like it best: on average its mean is "
                 f"{sign * liked(row):+.2f} standard deviations of the base model's samples from "
                 f"the base model's (the reward's: {row['proxy_sd']:+.2f}).")


def holm(p_values, level: float = 0.05) -> list[bool]:
    """Which hypotheses to reject so that the chance of any false rejection is at most `level` (Holm
    1979). We compare the smallest of m p-values with level / m, the next with level / (m - 1), and
    so on, up to the first that fails."""
    order = np.argsort(p_values, kind="stable")
    rejected = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def over_optimisation(rows: list[dict], judge: str, sign: int = 1) -> tuple[dict, dict | None]:
    """rows by rising KL -> the row that the judge likes best, and the first later row that it finds
    worse though the reward is not lower, or None. A row has "each"[judge], the score of every
    sample, and "proxy", the mean reward. Sample i of all policies has the same noise.

    Even samples choose the best row. Odd samples test the later rows, by paired differences,
    one-sided, with Holm's correction at 5% divided by the number of judges. So at most 5% of runs
    give a false alarm, all judges together. We simulated 1,000 runs (tests/test_eval.py: 12
    checkpoints, 1,024 samples, standard deviation 0.5, correlation 0.3). One judge gives a false
    alarm in 0.8% where the score is flat; falls by 0.05, 0.075 and 0.1 at the last checkpoint are
    found in 22%, 56.5% and 87%.
    """
    score = sign * np.array([row["each"][judge] for row in rows])                 # (rows, n)
    best = int(score[:, ::2].mean(1).argmax())
    fall = score[best, 1::2] - score[best + 1:, 1::2]                             # (later, n / 2)
    error = np.maximum(fall.std(1, ddof=1) / math.sqrt(fall.shape[1]), 1e-12)
    lower = holm(stats.norm.sf(fall.mean(1) / error), 0.05 / len(JUDGES))
    for row, worse in zip(rows[best + 1:], lower):
        if worse and row["proxy"] >= rows[best]["proxy"]:
            return rows[best], row
    return rows[best], None


def risen_words(before: list[str], after: list[str]) -> list[dict]:
    """Texts of two policies -> the 12 words whose share rose most, per 1,000 words."""
    old, new = (Counter(words(" ".join(texts))) for texts in (before, after))
    rows = [{"word": word, "before": 1000 * old[word] / old.total(),
             "after": 1000 * n / new.total()} for word, n in new.items()]
    return sorted(rows, key=lambda row: row["before"] - row["after"])[:12]


def answers(rows: list[dict], target: str) -> dict:
    """rows of the policies towards target, the base model first -> the preferred one, and why; for
    each judge that falls, the best row and the first worse one. Adds NAME_sd to the rows."""
    sign = 1 if target == "happy" else -1
    standardise(rows, rows[0])
    by_kl = sorted(rows, key=lambda row: row["kl"])
    best, because = preferred(by_kl, sign)
    pairs = {judge: over_optimisation(by_kl, judge, sign) for judge in JUDGES}
    over = {judge: [a["name"], b["name"]] for judge, (a, b) in pairs.items() if b}
    return {f"preferred_{target}": best["name"], f"because_{target}": because,
            f"over_{target}": over}


def summary(rows: list[dict], over: dict[str, list[str]]) -> str:
    """How the run towards happy ended. over: as in `answers`."""
    first, last = rows[0], rows[-1]
    falls = [f"Over-optimisation starts at {worse}: {JUDGES[judge]} finds it worse than {best}, "
             "though its reward is not lower." for judge, (best, worse) in over.items()]
    moved = ", ".join(f"{name} {last[key + '_sd']:+.2f}"
                      for key, name in ({"proxy": "reward"} | JUDGES).items())
    return (f"VADER calls {first['positive']:.1%} of the base model's samples positive, and "
            f"{last['positive']:.1%} of the final policy's, {last['kl']:.2f} nats away. In "
            f"standard deviations of the base model's samples: {moved}. " + (" ".join(falls) or
            "No over-optimisation was found: no judge falls by more than chance."))


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__)
    check(cfg)
    only_writer(cfg.out / "report.json")
    reference, reward_model, tokenizer, about = load_run(cfg.out, device, dtype)
    prompts = None
    if about["prompted"]:
        prompts = read_prompts(cfg.out / "prompts.json", "held_out", reference.n_text)
    found = {target: find_policies(cfg.out, target, about["made_from"]) for target in TARGETS}
    targets = [target for target in TARGETS if found[target][0]]
    stream = cfg.seed << 32 | 5 << 24  # 5: not the random numbers of 04
    prompt = draw_prompts(prompts, cfg.n, stream).to(device)                               # (n, P)
    results = {"seed": cfg.seed, "base_metrics": about["base_metrics"], "ppo": found["happy"][1],
               "reward_model": about["metrics"], "calibration": about["calibration"]}

    # -- the base model, the checkpoints, the final policies; then best-of-n from the base model
    def reward_fn(y, prompt, target="happy"):
        log_p, i = reward_model.sentiment(y, prompt), TARGETS.index(target)            # (B, 2)
        score = log_p[:, i] if about["kind"] == "labels" else log_p[:, i] - log_p[:, 1 - i]
        return score, log_p[:, 0].exp()

    for target in targets:
        results[target] = []
        for path in tqdm([cfg.out / "base.safetensors", *found[target][0]], desc=target):
            policy, _, _ = load(path, f"04_ppo.py --target {target}", device, dtype)
            row = measure(policy, reference, reward_model, partial(reward_fn, target=target),
                          tokenizer, prompt, about["length"], stream, cfg.show)
            row |= {"name": path.stem, "fingerprint": fingerprint(policy)}
            results[target].append(row)
            tqdm.write("{name:>20}: KL {kl:5.2f} +- {kl_se:.2f}, score {proxy:.3f}, VADER "
                       "{vader:+.3f} +- {vader_se:.3f}, AFINN {afinn:+.2f} +- {afinn_se:.2f}, "
                       "positive {positive:.1%}, duplicates {duplicates}".format(**row))
    many = draw_prompts(prompts, cfg.n_best, stream + 1).to(device)                        # (N, P)
    _, texts, judged = draw_and_judge(
        reference, reward_fn, tokenizer, many, about["length"], stream + 1)
    judged["positive"] = judged["vader"] >= POSITIVE
    results["best_of_n"] = best_of_n(judged["proxy"], judged, texts)
    measured = results["happy"] + results.get("sad", [])
    path = cfg.out / "corpus.txt"
    if path.exists():
        every = [text for row in measured for text in row["texts"]]
        corpus = path.read_text(encoding="utf-8", errors="replace")
        runs = copied_runs(every, corpus).reshape(-1, cfg.n)
        for row, run in zip(measured, runs):
            row["copied_run_99"] = float(np.percentile(run, 99))
            row["copied_run_max"] = int(run.max())

    # -- conclusions
    for target in targets:
        results |= answers(results[target], target)
    first, last = results["happy"][0], results["happy"][-1]
    standardise(results["best_of_n"], first)
    fallen = risen_words(last["texts"], first["texts"])  # with before and after swapped
    line = stats.linregress([row["updates"] for row in results["ppo"]],
                            [math.sqrt(max(row["kl"], 0)) for row in results["ppo"]])
    results |= {
        "summary": summary(results["happy"], results["over_happy"]),
        "risen_words": risen_words(first["texts"], last["texts"]),
        "fallen_words": [row | {"before": row["after"], "after": row["before"]} for row in fallen],
        "sqrt_kl_fit": {"slope": line.slope, "intercept": line.intercept, "r2": line.rvalue ** 2}}
    for row in measured:
        del row["texts"]
    write(cfg.out / "report.json", as_json(results | provenance(cfg), indent=1))
    print("risen most, per 1,000 words:", ", ".join(
        "{word} {before:.1f} -> {after:.1f}".format(**row) for row in results["risen_words"]))
    print("sqrt KL against optimizer steps: slope {slope:.4f}, R^2 {r2:.4f}"
          .format(**results["sqrt_kl_fit"]))
    print(results["summary"])
    print(results["because_happy"])
    finish("python -m report")
