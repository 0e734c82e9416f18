"""Stage 5: measure every checkpoint on fresh samples, and write the report.

    python 05_eval.py                    # 70 s: VADER positive 58.2 -> 98.8 %

Reads   out/*.safetensors, out/checkpoints/*.safetensors, out/04-happy.jsonl; if they are there,
        out/corpus.txt, prompts.json, curve.json, ratings.json (`python -m people rate anna`)
Writes  out/report.html (one self-contained page), out/report.json, out/plots/*.svg

Decisions a reader may question:
1. All policies draw with the same noise: sample 7 of each starts from the same random numbers, so
   one sees a text change as the KL grows. All give --n samples, and distinct-2 is
   always of 4,000 words, because it falls with their number.
2. Three judges. In the default run VADER made the labels, so judge and reward share their blind
   spots. AFINN and Pattern are lexicons of other makes that never taught. 04 reads none of them.
3. The reward and VADER are bounded and saturate; AFINN's sum of valences is not. What is compared
   decides who wins, so all are shown, in standard deviations of the base model's samples.
4. Best-of-n from the base model stands on the same axes, because it needs no training.
"""
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import chunked, kl_nats, load
from report import build_report
from report.made import made_by
from report.text import Corpus, correlation, judge, variety
from running import UserError, bootstrap, finish, mean_se, record, require, start, write
from running.stages import fingerprint, load_base_and_reward, load_policies, score_of
from running.text import decode_prompts, draw_prompts, read_prompts, words
from running.vader import POSITIVE

BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass
class Config:
    out: Path = Path("out")  # where all stages write
    seed: int = 0
    n: int = 1024            # samples of each policy
    n_best: int = 8192       # samples of the base model behind best-of-n
    show: int = 6            # samples of each checkpoint that the report shows


def check(cfg: Config) -> None:
    # over-optimisation is tested on every second sample, which needs two for a standard deviation
    require(min(cfg.n, cfg.n_best) >= 4, "--n and --n-best must be at least 4")
    require(0 < cfg.show <= 64, "--show must be 1 to 64")


# ---- Best of n -----------------------------------------------------------------------------------
def best_of_n_weights(N: int, n: int) -> np.ndarray:
    """(N,): the chance that the best of a random n of N samples is the one of rank i (1 = worst),
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
    """For each n: the mean of every figure (N,) over the best of n by proxy (N,), unbiased, with a
    bootstrap interval; and the variety of disjoint such samples where there are enough."""
    sizes = [n for n in BEST_OF if n <= len(proxy)]
    weights = np.stack([best_of_n_weights(len(proxy), n) for n in sizes])              # (sizes, N)
    values = np.stack(list(figures.values()), 1).astype(float)                         # (N, F)

    def means(rows):
        order = rows[np.argsort(proxy[rows], kind="stable")]
        return weights @ values[order]                                                 # (sizes, F)
    mean = means(np.arange(len(proxy)))
    low, high = bootstrap(means, len(proxy), resamples=200)
    rows = []
    for i, n in enumerate(sizes):
        row = {"n": n, "kl": best_of_n_kl(n)}
        for j, name in enumerate(figures):
            row |= {name: mean[i, j], f"{name}_interval": (low[i][j], high[i][j])}
        groups = np.arange(len(proxy) // n * n).reshape(-1, n)                         # (N // n, n)
        best = groups[np.arange(len(groups)), proxy[groups].argmax(1)]
        row |= variety([texts[k] for k in best])
        rows.append(row)
    return rows


# ---- Measuring one policy ------------------------------------------------------------------------
def draw_and_judge(model, reward_fn, tokenizer, prompt, length: int, seed: int) -> tuple:
    """One sample for each row of prompt (n, P) -> tokens (n, T), texts, and what judges say:
    name -> (n,). reward_fn: tokens (B, T), prompt (B, P) -> score (B,), p(happy) (B,)."""
    y, _ = model.generate(len(prompt), length, seed, prompts=prompt)                       # (n, T)
    proxy, p_happy = chunked(reward_fn, 256, y, prompt)                                    # (n,)
    texts = tokenizer.decode_batch(y.tolist())
    return y, texts, {"proxy": proxy.numpy(force=True), "p_happy": p_happy.numpy(force=True),
                      **judge(texts)}


@torch.no_grad()
def log_odds(reward_model, y, prompt) -> torch.Tensor:
    """log p(happy) - log p(sad) after each prefix of y (n, T), from the empty one on: (n, T + 1).
    Their differences are what each token does to the reward model."""
    longer = torch.cat((y, y[:, -1:]), 1)  # so that all of y stands before some token
    hidden = reward_model.hidden_before(longer, prompt)                             # (n, T + 1, D)
    head = reward_model.head[[reward_model.happy, reward_model.sad]].to(hidden.dtype).float()
    return hidden.float() @ (head[0] - head[1])


def pieces(tokenizer, tokens: list[int]) -> list[str]:
    """The text of each token, such that they join to the whole; of a character that several tokens
    make, the last one has it."""
    text = tokenizer.decode(tokens)
    ends = [len(tokenizer.decode(tokens[:t]).rstrip("\ufffd")) for t in range(len(tokens))]
    return [text[a:b] for a, b in zip(ends, ends[1:] + [len(text)])]


@torch.no_grad()
def measure(policy, reference, reward_model, reward_fn, tokenizer, corpus: Corpus | None, prompt,
            length: int, seed: int, show: int) -> dict:
    """All figures of one policy on fresh samples, one for each row of prompt (n, P); of the first
    `show` also what each token does to the reward model."""
    n = len(prompt)
    y, texts, judged = draw_and_judge(policy, reward_fn, tokenizer, prompt, length, seed)
    kl, k1, logp, entropy = kl_nats(policy, reference, y, prompt)
    nats_under_base = k1.mean().item() / length - logp.mean().item()
    each = {"kl": kl.numpy(force=True), "k1": k1.numpy(force=True), **judged,
            "positive": judged["vader"] >= POSITIVE, "negative": judged["vader"] <= -POSITIVE}
    row = {"n": n, "samples": texts[:64], "prompts": decode_prompts(tokenizer, prompt[:64]),
           "pieces": [pieces(tokenizer, tokens) for tokens in y[:show].tolist()],
           "log_odds": log_odds(reward_model, y[:show], prompt[:show]).double().tolist(),
           "words": Counter(word for text in texts for word in words(text)),
           "each": judged,
           "entropy": entropy.mean().item(), "base_perplexity": math.exp(nats_under_base),
           "duplicates": n - len(set(texts)), **variety(texts)}
    for name, x in each.items():
        row[name], row[f"{name}_se"] = mean_se(x)
    for name, x in judged.items():
        row[f"{name}_correlation"] = correlation(judged["proxy"], x)
    if corpus:
        runs = corpus.longest_runs(texts)
        row["copied_run_99"] = float(np.percentile(runs, 99))
        row["copied_run_max"] = int(runs.max())
    return row


def read_log(path: Path) -> list[dict]:
    """The rows of 04's log. Raises UserError if it is missing, damaged, or of one iteration."""
    require(path.exists(), f"{path} is missing: run 04_ppo.py first")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged: run 04_ppo.py again") from error
    require(len(rows) >= 2, f"{path} has no two iterations: run 04_ppo.py again")
    return rows


def read_ratings(path: Path, fingerprints: set[str]) -> list[dict]:
    """What `python -m people` wrote of blind ratings, if they are of these policies."""
    if not path.exists():
        return []
    ratings = json.loads(path.read_text())
    if not {*ratings["policies"].values()} <= fingerprints:
        print(f"{path} is of other policies: left out")
        return []
    return ratings["results"]


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__)
    check(cfg)
    reference, reward_model, tokenizer, about = load_base_and_reward(cfg.out, device, dtype)
    prompts = read_prompts(cfg.out / "prompts.json", "held_out") if about["prompted"] else None
    corpus_path = cfg.out / "corpus.txt"
    corpus = Corpus(corpus_path.read_text(encoding="utf-8")) if corpus_path.exists() else None

    # -- what there is to measure: the base model, the checkpoints, the final policies
    paths, logs = {}, {}
    for target in load_policies(cfg.out, about["inputs"]):
        checkpoints = sorted((cfg.out / "checkpoints").glob(f"{target}-kl-*.safetensors"))
        paths[target] = [cfg.out / "base.safetensors", *checkpoints,
                         cfg.out / f"policy-{target}.safetensors"]
        log = cfg.out / f"04-{target}.jsonl"
        logs[target] = read_log(log)
        logged = [(row["step"], row["kl"]) for row in logs[target]]
        for path in paths[target][1:]:
            header = load(path, "04_ppo.py")[2]
            require((header["step"], header["kl"]) in logged, f"{path} is not of the run that "
                    f"{log} tells of: run 04_ppo.py --target {target} again, to its end")

    # -- measure
    stream = cfg.seed << 32 | 5 << 24  # 04's rollouts have 4
    prompt = draw_prompts(prompts, cfg.n, stream).to(device)                               # (n, P)
    results, fingerprints = {}, set()
    bar = tqdm(total=sum(map(len, paths.values())), desc="evaluate")
    for target in paths:
        def reward_fn(y, prompt):
            log_p = reward_model.sentiment(y, prompt)                                  # (B, 2)
            return score_of(log_p, about["kind"], target), log_p[:, 0].exp()

        results[target] = []
        for path in paths[target]:
            policy = reference if path.stem == "base" else load(path, "04_ppo.py", device, dtype)[0]
            fingerprints.add(fingerprint(policy))
            row = measure(policy, reference, reward_model, reward_fn, tokenizer, corpus, prompt,
                          about["length"], stream, cfg.show)
            results[target].append({"name": path.stem, **row})
            tqdm.write("{name:>20}: KL {kl:5.2f} +- {kl_se:.2f}, proxy {proxy:.3f}, VADER "
                       "{vader:+.3f} +- {vader_se:.3f}, AFINN {afinn:+.2f} +- {afinn_se:.2f}, "
                       "positive {positive:.1%}, duplicates {duplicates}"
                       .format(name=path.stem, **row))
            bar.update()
        if target == "happy":
            many = draw_prompts(prompts, cfg.n_best, stream + 1).to(device)                # (N, P)
            _, texts, judged = draw_and_judge(
                reference, reward_fn, tokenizer, many, about["length"], stream + 1)
            judged["positive"] = judged["vader"] >= POSITIVE
            results["best_of_n"] = best_of_n(judged["proxy"], judged, texts)
    bar.close()

    # -- hand over to the report
    results |= {
        "seed": cfg.seed, "base_metrics": about["base_metrics"], "reward_model": about["metrics"],
        "calibration": about["calibration"], "ppo": logs["happy"],
        "ratings": read_ratings(cfg.out / "ratings.json", fingerprints),
        "made": made_by(cfg.out, record(cfg.out))}
    results = build_report(results, cfg.out)
    write(cfg.out / "report.json", json.dumps(results, indent=1))
    print("risen most, per 1,000 words:", ", ".join(
        "{word} {before:.1f} -> {after:.1f}".format(**row) for row in results["risen_words"]))
    print(results["summary"])
    print(results["preferred_because"])
    print("sqrt KL against optimizer steps: slope {slope:.4f}, R^2 {r2:.4f}"
          .format(**results["sqrt_kl_fit"]))
    finish(f"open {cfg.out / 'report.html'} in a browser", cfg.out)
