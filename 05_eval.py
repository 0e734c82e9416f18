"""Stage 5: measure every checkpoint on fresh samples, and write the report.

    python 05_eval.py                    # 51 s: VADER positive 58.3 -> 96.8 %
    python 05_eval.py --rate anna        # rate 20 base and 20 final samples blind, in the terminal

Reads   out/*.safetensors, out/checkpoints/*.safetensors, the logs of the other stages
Writes  out/report.html (one self-contained page), out/report.json, out/plots/*.png, out/05.jsonl,
        out/ratings-NAME.jsonl, out/key-*.json (which arm a rated sample is of)

Decisions a reader may question:
1. All policies draw with the same noise: sample 7 of each starts from the same random numbers, so
   side by side one sees a text change as the KL grows.
2. The gold score is VADER's compound score. Neither training nor the stop rule reads it; but in the
   default run the labels came from VADER too, so gold and proxy share their blind spots.
3. The best checkpoint is the one of highest mean gold score. Over-optimisation starts at the first
   later one whose gold is lower by more than two standard errors of the difference.
4. Best-of-n from the base model stands on the same axes: it needs no training, and for the same
   reward it spends far less KL.
5. A blind rating is stored by its place in the shuffled order alone. Which model spoke is in a file of
   its own, out/key-*.json, and is read once all are rated.
"""
import base64
import hashlib
import html
import io
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jinja2 import Environment
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import (UserError, decode_prompts, draw_prompts, finish, fingerprint, load, read_prompts, score_of, start,
                   write)
from people import (ASK, ask_in_terminal, collect, fisher_power, is_name, jsonl, print_agreement, read_answers, unblind,
                    write_sheet)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

SCRIPT = "05_eval.py"


@dataclass
class Config:
    out: Path = Path("out")  # where all stages write
    seed: int = 0
    resume: bool = False     # keep the measurements of a killed run
    n: int = 1024            # samples of each checkpoint
    n_ends: int = 2048       # samples of the base and the final policy, and behind best-of-n
    show: int = 4            # samples of each checkpoint side by side in the report
    rate: str = ""           # your name: rate blind instead of measuring
    sheet: Path | None = None         # write a page FILE.html on which others rate blind, and measure nothing
    ratings: tuple[Path, ...] = ()    # answers to such a sheet that came back
    rate_n: int = 20         # samples of each arm to rate


# ---- Measures of text ----------------------------------------------------------------------------
def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:['’][a-z]+)*", text.lower())


def distinct(texts: list[str], n: int) -> float:
    """Distinct-n (Li et al. 2016): different word n-grams over all word n-grams of 512 samples."""
    grams = [g for t in texts[:512] for w in [words(t)] for g in zip(*(w[i:] for i in range(n)))]
    return len(set(grams)) / max(len(grams), 1)


def self_similarity(texts: list[str]) -> float:
    """Mean cosine between the word counts of two different samples, over 512 samples."""
    counts = [Counter(words(t)) for t in texts[:512]]
    column = {w: i for i, w in enumerate(dict.fromkeys(w for c in counts for w in c))}
    x = np.zeros((len(counts), len(column)), dtype=np.float32)
    for row, c in zip(x, counts):
        row[[column[w] for w in c]] = list(c.values())
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    n = len(x)
    return float((np.square(x.sum(0)).sum() - n) / (n * (n - 1)))


class Corpus:
    """The longest run of words that a text shares with the corpus, by hashes of its n-grams."""

    def __init__(self, text: str):
        self.id: dict[str, int] = {}
        self.words = np.array([self.id.setdefault(w, len(self.id) + 1) for w in words(text)], dtype=np.uint64)
        self.hashes = [np.zeros(0, np.uint64)]  # [n]: sorted hashes of all n-grams, made when asked for

    @staticmethod
    def grams(ids: np.ndarray, n: int) -> np.ndarray:
        h = np.zeros(max(len(ids) - n + 1, 0), dtype=np.uint64)
        for i in range(n):
            h = (h ^ ids[i:i + len(h)]) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
        return h

    def longest_runs(self, texts: list[str]) -> np.ndarray:
        """-> words in the longest copied run of each text."""
        longest, n = np.zeros(len(texts), int), 1
        ids = [np.array([self.id.get(w, 0) for w in words(t)], dtype=np.uint64) for t in texts]
        alive = list(range(len(texts)))
        while alive:
            if n == len(self.hashes):
                self.hashes.append(np.unique(self.grams(self.words, n)))
            known = self.hashes[n]
            grams = [self.grams(ids[i], n) for i in alive]
            flat = np.concatenate(grams)
            at = np.minimum(np.searchsorted(known, flat), max(len(known) - 1, 0))
            hit = known[at] == flat if len(known) else np.zeros(len(flat), bool)
            ends = np.cumsum([len(g) for g in grams])[:-1]
            alive = [i for i, part in zip(alive, np.split(hit, ends)) if part.any()]
            longest[alive] = n
            n += 1
        return longest


# ---- Statistics ----------------------------------------------------------------------------------
def mean_se(x) -> tuple[float, float]:
    x = np.asarray(x, dtype=np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


def best_of_n(proxy: np.ndarray, value: np.ndarray, n: int) -> float:
    """Expected `value` of the best of n by `proxy`, unbiased, from N >= n samples: the sample of
    rank i (1 = worst) is the best of a random subset with probability C(i-1, n-1) / C(N, n)
    (Nakano et al. 2021, arXiv:2112.09332, appendix I)."""
    N, order, lg = len(proxy), np.argsort(proxy, kind="stable"), math.lgamma
    weight = np.array([math.exp(lg(i) - lg(i - n + 1) - lg(n) - (lg(N + 1) - lg(n + 1) - lg(N - n + 1)))
                       if i >= n else 0.0 for i in range(1, N + 1)])
    return float(weight @ value[order])


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound on KL(best-of-n || base), nats (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def fit_line(x, y) -> tuple[float, float, float]:
    """Least squares y = slope x + intercept -> slope, intercept, R^2."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - residual.var() / np.var(y))


def risen_words(before: dict[str, int], after: dict[str, int], top: int = 12) -> list[dict]:
    """Word counts of two policies -> the words whose share of all words rose most, per 1,000 words."""
    share = [{w: 1000 * n / sum(c.values()) for w, n in c.items()} for c in (before, after)]
    rise = {w: share[1][w] - share[0].get(w, 0.0) for w in after}
    return [{"word": w, "before": share[0].get(w, 0.0), "after": share[1][w]}
            for w in sorted(rise, key=rise.get, reverse=True)[:top]]


def over_optimisation(rows: list[dict], sign: int = 1) -> tuple[dict, dict | None]:
    """Rows by rising KL -> the row of highest sign * gold, and the first later row that is lower by
    more than two standard errors of the difference, or None."""
    best = max(rows, key=lambda r: sign * r["gold"])
    for row in rows[rows.index(best) + 1:]:
        if sign * (best["gold"] - row["gold"]) > 2 * math.hypot(best["gold_se"], row["gold_se"]):
            return best, row
    return best, None


# ---- Measuring one policy ------------------------------------------------------------------------
@torch.no_grad()
def measure(policy, reference, score, tokenizer, corpus: Corpus | None, prompt, length: int, seed: int) -> dict:
    """All figures of one policy on fresh samples, one for each row of prompt; those of the base also give
    best-of-n. score: tokens (B, T) -> (B,)."""
    n = len(prompt)
    y, _ = policy.generate(n, length, seed, prompts=prompt)
    parts = [*zip(y.split(256), prompt.split(256))]
    logp, entropy = (torch.cat(x) for x in zip(*(policy.logprob(mb, p, entropy=True) for mb, p in parts)))
    logp_ref = torch.cat([reference.logprob(mb, p)[0] for mb, p in parts])
    proxy = torch.cat([score(mb) for mb in y.split(256)]).numpy(force=True)
    texts = tokenizer.decode_batch(y.tolist())
    vader = SentimentIntensityAnalyzer()
    gold = np.array([vader.polarity_scores(t)["compound"] for t in texts])
    row = {"n": n, "samples": texts[:64], "prompts": decode_prompts(tokenizer, prompt[:64]),
           "words": Counter(w for t in texts for w in words(t)), "entropy": entropy.mean().item(),
           "base_perplexity": math.exp(-logp_ref.mean().item()), "distinct_1": distinct(texts, 1),
           "distinct_2": distinct(texts, 2), "self_similarity": self_similarity(texts), "duplicates": n - len(set(texts))}
    for name, x in (("kl", (logp - logp_ref).double().sum(-1).numpy(force=True)), ("proxy", proxy),
                    ("gold", gold), ("positive", gold >= 0.05), ("negative", gold <= -0.05)):
        row[name], row[name + "_se"] = mean_se(x)
    if corpus:
        runs = corpus.longest_runs(texts)
        row |= {"copied_run_99": float(np.percentile(runs, 99)), "copied_run_max": int(runs.max())}
    if policy is reference:
        row["kl"] = row["kl_se"] = 0.0
        row["best_of_n"] = [{"n": k, "kl": best_of_n_kl(k), "proxy": best_of_n(proxy, proxy, k),
                             "gold": best_of_n(proxy, gold, k), "positive": best_of_n(proxy, gold >= 0.05, k)}
                            for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= n]
    return row


# ---- The report ----------------------------------------------------------------------------------
def plot(folder: Path, name: str, title: str, xlabel: str, ylabel: str, series, lines=(), log: str = "") -> str:
    """series: (style, label, x, y, y error or None); lines: heights of dotted lines; log: "x", "y" or
    "". Writes folder/name.png and returns it as an <img> of the page."""
    fig, ax = plt.subplots(figsize=(5.6, 3.7), dpi=110, layout="constrained")
    for style, label, x, y, error in series:
        ax.errorbar(x, y, error, fmt=style, label=label or None, capsize=2)
    for height in lines:
        ax.axhline(height, color="grey", ls=":")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log" if "x" in log else "linear",
           yscale="log" if "y" in log else "linear")
    ax.grid(alpha=0.3)
    if any(label for _, label, *_ in series):
        ax.legend(fontsize=8)
    png = io.BytesIO()
    fig.savefig(png, format="png")
    plt.close(fig)
    write(folder / f"{name}.png", png.getvalue())
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


def plots(folder: Path, report: dict, ppo: list[dict], bins: list[dict], curve: list[dict]) -> str:
    """All figures of the report, each also a file in `folder` -> HTML."""
    best, fit = report["happy"][0]["best_of_n"], report["sqrt_kl_fit"]
    towards = {t: sorted(report[t], key=lambda r: r["kl"]) for t in ("happy", "sad") if t in report}
    figures = []
    for key, title in (("proxy", "Reward model, of its target"), ("gold", "Gold: VADER compound score")):
        figures.append(plot(folder, f"{key}_by_kl", title, "sqrt KL(policy || base), sqrt nats", "mean ± 2 SE", [
            *((style, f"PPO, {target}", [math.sqrt(max(r["kl"], 0)) for r in rows], [r[key] for r in rows],
               [2 * r[key + "_se"] for r in rows]) for style, (target, rows) in zip(("o-", "v-"), towards.items())),
            ("s--", "best of n = 1 ... 256, happy", [math.sqrt(b["kl"]) for b in best],
             [b[key] for b in best], None)]))
    x = [r["step"] for r in ppo]
    figures.append(plot(folder, "kl", "Distance from the base model", "iteration", "sqrt nats per completion", [
        ("o", "measured", x, [math.sqrt(max(r["kl"], 0)) for r in ppo], None),
        ("-", "{slope:.2f} x iteration {intercept:+.2f}, R² = {r2:.3f}".format(**fit),
         x, [fit["slope"] * i + fit["intercept"] for i in x], None)]))
    updated = [r for r in ppo if "clip_fraction" in r]
    figures.append(plot(folder, "clip", "Ratios clipped (healthy: 1 to 20 %)", "iteration", "% of tokens", [
        (style, label, [r["step"] for r in updated], [100 * max(r[key], 1e-5) for r in updated], None)
        for style, label, key in (("o-", "outside the clip range", "clip_fraction"),
                                  ("s--", "clip binding", "clip_binding"))], lines=(1, 20), log="y"))
    figures.append(plot(folder, "entropy", "Entropy of the policy", "iteration", "nats per token",
                        [("o-", "", x, [r["entropy"] for r in ppo], None)]))
    figures.append(plot(
        folder, "calibration", "Calibration of the reward model, held out", "predicted", "labelled",
        [("o-", "", [b["predicted"] for b in bins], [b["target"] for b in bins], None),
         (":", "", [0, 1], [0, 1], None)]))
    if curve:
        figures.append(plot(folder, "curve", "Learning curve of the reward model", "labels", "held-out AUC", [
            (style, label, [c["labels"] for c in curve], [c[key] for c in curve], None)
            for style, label, key in (("o-", "reward model", "auc"),
                                      ("s--", "bag of words", "bag_of_words_auc"))], log="x"))
    return "".join(figures)


def render(report: dict, figures: str, show: int) -> str:
    """The page, from the template report.html."""
    page = Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return page.render(report=report, figures=figures, show=show)


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__)
    if (cfg.rate != "") + (cfg.sheet is not None) + bool(cfg.ratings) > 1:
        raise UserError("--rate, --sheet and --ratings are three different things to do: one at a time")
    if min(cfg.n, cfg.n_ends) < 2 or not 0 < cfg.show <= 64 or cfg.rate_n < 1 or cfg.rate and not is_name(cfg.rate):
        raise UserError("--n and --n-ends must be at least 2, --show 1 to 64, --rate-n at least 1, "
                        "--rate letters and digits")

    reference, tokenizer, base_header = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    reward_model, _, reward_header = load(cfg.out / "reward.safetensors", "03_reward_model.py", device, dtype)
    final, _, final_header = load(cfg.out / "policy-happy.safetensors", "04_ppo.py", device, dtype)
    inputs = {"base": fingerprint(reference), "reward_model": fingerprint(reward_model)}
    if reward_header["inputs"]["base"] != inputs["base"]:
        raise UserError(f"{cfg.out}/reward.safetensors was made from another base model: "
                        "run 03_reward_model.py again")
    if final_header["inputs"] != inputs:
        raise UserError(f"{cfg.out}/policy-happy.safetensors was made from another base model or reward model: "
                        "run 04_ppo.py again")
    policies = {"happy": final}
    if (path := cfg.out / "policy-sad.safetensors").exists():
        sad, _, header = load(path, "04_ppo.py", device, dtype)
        policies |= {"sad": sad} if header["inputs"] == inputs else {}
    kind, length, seed = reward_header.get("kind", "labels"), reward_header["length"], cfg.seed << 32 | 5 << 24
    prompts = read_prompts(cfg.out / "corpus.txt", tokenizer, held_out=True) if reward_header.get("prompted") else None

    # -- blind rating: what is shown names an item by its place alone; which arm spoke is in a file of its own
    current = {name: fingerprint(policy) for name, policy in policies.items()}
    if cfg.rate or cfg.sheet:
        arms = {"base": reference} | policies
        given, mixed = draw_prompts(prompts, cfg.rate_n, seed), []  # the same prompts for every arm
        for k, (arm, model) in enumerate(arms.items()):
            y, _ = model.generate(cfg.rate_n, length, seed + 1 + k, prompts=given)
            mixed += [(arm, {"prompt": p, "text": text} if p else {"text": text})
                      for p, text in zip(decode_prompts(tokenizer, given), tokenizer.decode_batch(y.tolist()))]
        # seeded by the policy too: one key tells nothing of another
        g = torch.Generator().manual_seed(int(current["happy"][:15], 16) ^ seed)
        order = torch.randperm(len(mixed), generator=g).tolist()
        series = hashlib.sha256(json.dumps([mixed[i] for i in order]).encode()).hexdigest()[:16]
        items = [{"id": f"{series}-{place}"} | mixed[i][1] for place, i in enumerate(order)]
        key = {"items": items, "arms": {item["id"]: mixed[i][0] for item, i in zip(items, order)},
               "policies": current}
        write(cfg.out / f"key-{series}.json", json.dumps(key))
        if cfg.sheet:
            write_sheet(cfg.sheet, "ratings", items)
            print(f"{cfg.sheet}: {len(items)} items of {len(arms)} arms. "
                  f"Keep {cfg.out}/key-{series}.json to yourself.")
            finish(f"python {SCRIPT} --ratings FILE.jsonl ...", cfg.out)
            raise SystemExit
        ask_in_terminal(items, cfg.out / f"ratings-{cfg.rate}.jsonl", cfg.rate, "ratings")
    keys = [json.loads(path.read_text()) for path in sorted(cfg.out.glob("key-*.json"))]
    keys = [key for key in keys if key["policies"].items() <= current.items()]
    if cfg.ratings:
        if not keys:
            raise UserError(f"{cfg.out}/key-*.json of the sheet is missing, or belongs to other policies: "
                            "it is written together with the sheet, by --sheet")
        sheet = {"kind": "ratings", "answers": [*ASK["ratings"][0].items()],
                 "items": [item for key in keys for item in key["items"]]}
        if wrong := collect(sheet, cfg.ratings, cfg.out)[1]:
            raise UserError(f"{wrong} lines were left out, for the reasons above; the others are kept: "
                            f"run {SCRIPT}")
    ratings = []
    for key in keys:
        given = {}
        for path in sorted(cfg.out.glob("ratings-*.jsonl")):
            answers = {k: v for k, v in read_answers(path).items() if k in key["arms"]}
            if len(answers) == len(key["arms"]):
                given[path.stem[8:]] = answers
            elif answers:
                print(f"{path}: {len(answers)} of {len(key['arms'])} rated; the key stays hidden until all are")
        ratings += unblind(key["arms"], given)
        print_agreement(given, key["items"])
    for r in ratings:
        print("{rater}: {feeling} {base} of {n} base, {other} of {n} {arm} samples; Fisher's exact test, "
              "one-sided: p = {p:.2g}; power if these are the true shares {power:.2f}".format(**r))
    if cfg.rate:
        for p, q in ((0.2, 0.6), (0.3, 0.6), (0.57, 0.93)):
            print(f"power of {cfg.rate_n} against {cfg.rate_n} if the shares are {p:.0%} and {q:.0%}: "
                  f"{fisher_power(p, q, cfg.rate_n):.2f}")
        finish(f"python {SCRIPT}", cfg.out)
        raise SystemExit

    # -- measure the base, every checkpoint and the final policies
    corpus_path, cache_path = cfg.out / "corpus.txt", cfg.out / "05.jsonl"
    corpus = Corpus(corpus_path.read_text(encoding="utf-8")) if corpus_path.exists() else None
    source, cache = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8], {}
    if cfg.resume and cache_path.exists():
        lines = (line for line in cache_path.read_text().splitlines() if line.endswith("}"))
        cache = {row["key"]: row for row in map(json.loads, lines)}
    write(cache_path, jsonl(cache.values()))
    rows = {target: [] for target in policies}
    jobs = [("happy", cfg.out / "base.safetensors")] + [
        (target, path) for target in policies for path in (
            *sorted((cfg.out / "checkpoints").glob(f"{target}-kl-*.safetensors")), cfg.out / f"policy-{target}.safetensors")]
    with open(cache_path, "a") as file:
        for target, path in tqdm(jobs, desc="evaluate"):
            policy = reference if path.stem == "base" else load(path, SCRIPT, device, dtype)[0]
            n = cfg.n if path.parent.name == "checkpoints" else cfg.n_ends
            key = f"{source} {fingerprint(policy)} {inputs['reward_model']} {target} {n} {seed}"
            if key not in cache:
                cache[key] = {"key": key, "name": path.stem, "target": target} | measure(
                    policy, reference, lambda y: score_of(reward_model.sentiment(y), kind, target), tokenizer, corpus,
                    draw_prompts(prompts, n, seed).to(device), length, seed)
                file.write(json.dumps(cache[key]) + "\n")
                file.flush()
            rows[target].append(cache[key])

    # -- the report
    ppo = [json.loads(x) for x in (cfg.out / "04-happy.jsonl").read_text().splitlines()]
    fit = fit_line([r["step"] for r in ppo], [math.sqrt(max(r["kl"], 0)) for r in ppo])
    report = {"seed": cfg.seed, "base_metrics": base_header["metrics"], "reward_model": reward_header["metrics"],
              "ratings": ratings, "sqrt_kl_fit": dict(zip(("slope", "intercept", "r2"), fit)), **rows}
    turns = {target: over_optimisation(sorted(rows[target], key=lambda r: r["kl"]), 1 if target == "happy" else -1)
             for target in rows}
    for target, (best, over) in turns.items():
        report[f"best_{target}"], report[f"over_{target}"] = best["name"], over and over["name"]
    best, over = turns["happy"]
    first, last = rows["happy"][0], rows["happy"][-1]
    report["risen_words"] = risen_words(first["words"], last["words"])
    report["summary"] = (
        f"VADER calls {first['positive']:.1%} of the base model's samples positive, and {last['positive']:.1%} of the "
        f"final policy's, {last['kl']:.2f} nats per completion away; distinct-2 went from {first['distinct_2']:.3f} to "
        f"{last['distinct_2']:.3f}. Best checkpoint by gold score: {best['name']} ({best['kl']:.2f} nats). "
        + (f"Over-optimisation starts at {over['kl']:.2f} nats: the gold score falls while the reward rises."
           if over else "The gold score did not fall significantly: no over-optimisation within the KL budget."))
    curve_path = cfg.out / "curve.json"
    figures = plots(cfg.out / "plots", report, ppo, reward_header["calibration"],
                    json.loads(curve_path.read_text()) if curve_path.exists() else [])
    public = report | {t: [{k: v for k, v in r.items() if k != "words"} for r in rows[t]] for t in rows}
    write(cfg.out / "report.json", json.dumps(public, indent=1))
    write(cfg.out / "report.html", render(report, figures, cfg.show))
    for r in (r for target_rows in rows.values() for r in target_rows):
        print("{name:>20}: KL {kl:5.2f} +- {kl_se:.2f}, proxy {proxy:.3f}, gold {gold:+.3f} +- {gold_se:.3f}, positive "
              "{positive:.1%}, distinct-2 {distinct_2:.3f}, duplicates {duplicates}".format(**r))
    print("risen most, per 1,000 words:",
          ", ".join("{word} {before:.1f} -> {after:.1f}".format(**r) for r in report["risen_words"]))
    print(f"{report['summary']}\nsqrt KL against iteration: slope {fit[0]:.3f}, R^2 {fit[2]:.4f}")
    finish(f"open {cfg.out / 'report.html'} in a browser", Path("out"))
