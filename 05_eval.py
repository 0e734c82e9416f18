"""Stage 5: measure every checkpoint on fresh samples, and write the report.

    python 05_eval.py                    # RUNTIME
    python 05_eval.py --rate anna        # rate 20 base and 20 final samples blind, in the terminal

Reads   out/*.safetensors, out/checkpoints/*.safetensors, the logs of the other stages
Writes  out/report.html (one self-contained page), out/report.json, out/plots/*.png, out/05.jsonl,
        out/ratings-NAME.jsonl

Decisions a reader may question:
1. All policies draw with the same noise: sample 7 of each starts from the same random numbers, so
   side by side one sees a text change as the KL grows.
2. The gold score is VADER's compound score. Neither training nor the stop rule reads it; but in the
   default run the labels came from VADER too, so gold and proxy share their blind spots.
3. The best checkpoint is the one of highest mean gold score. Over-optimisation starts at the first
   later one whose gold is lower by more than two standard errors of the difference.
4. Best-of-n from the base model stands on the same axes: it needs no training, and for the same
   reward it spends far less KL.
5. A blind rating stores no source next to an answer: the key is drawn again from the seed at the end.
"""
import base64
import html
import io
import json
import math
import os
import re
import shutil
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import UserError, finish, fingerprint, load, start, write

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
    column = {w: i for i, w in enumerate({w for c in counts for w in c})}
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
        self.hashes = [np.zeros(0, np.uint64)]
        self.words = self.encode(text, grow=True)

    def encode(self, text: str, grow: bool = False) -> np.ndarray:
        if grow:
            return np.array([self.id.setdefault(w, len(self.id) + 1) for w in words(text)], dtype=np.uint64)
        return np.array([self.id.get(w, 0) for w in words(text)], dtype=np.uint64)

    @staticmethod
    def grams(ids: np.ndarray, n: int) -> np.ndarray:
        h = np.zeros(max(len(ids) - n + 1, 0), dtype=np.uint64)
        for i in range(n):
            h = (h ^ ids[i:i + len(h)]) * np.uint64(0x9E3779B97F4A7C15)
            h ^= h >> np.uint64(29)
        return h

    def longest_runs(self, texts: list[str]) -> np.ndarray:
        """-> words in the longest copied run of each text."""
        ids, longest, n = [self.encode(t) for t in texts], np.zeros(len(texts), int), 1
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


def fisher_exact(a: int, n: int, b: int, m: int) -> float:
    """One-sided p-value that b of m is a higher share than a of n by chance (Fisher 1935)."""
    total = a + b
    return sum(math.comb(m, k) * math.comb(n, total - k) for k in range(b, min(m, total) + 1)
               if total - k <= n) / math.comb(n + m, total)


def fisher_power(p: float, q: float, n: int, level: float = 0.05) -> float:
    """Chance that n against n ratings reach p < level when the true shares are p and q."""
    def binomial(k, p):
        return math.comb(n, k) * p**k * (1 - p) ** (n - k)
    return sum(binomial(a, p) * binomial(b, q) for a in range(n + 1) for b in range(n + 1)
               if fisher_exact(a, n, b, n) < level)


def fit_line(x, y) -> tuple[float, float, float]:
    """Least squares y = slope x + intercept -> slope, intercept, R^2."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - residual.var() / np.var(y))


def over_optimisation(rows: list[dict]) -> tuple[dict, dict | None]:
    """Rows by rising KL -> the row of highest gold score, and the first later row whose gold is
    lower by more than two standard errors of the difference, or None."""
    best = max(rows, key=lambda r: r["gold"])
    for row in rows[rows.index(best) + 1:]:
        if best["gold"] - row["gold"] > 2 * math.hypot(best["gold_se"], row["gold_se"]):
            return best, row
    return best, None


# ---- Measuring one policy ------------------------------------------------------------------------
@torch.no_grad()
def measure(policy, models, tokenizer, corpus: Corpus | None, n: int, seed: int, target: str) -> dict:
    """All figures of one policy on n fresh samples; those of the base also give best-of-n."""
    reference, reward_model, length = models
    y, _ = policy.generate(n, length, seed)
    logp, entropy = (torch.cat(p) for p in zip(*(policy.logprob(mb) for mb in y.split(256))))
    logp_ref = torch.cat([reference.logprob(mb)[0] for mb in y.split(256)])
    i = ("happy", "sad").index(target)
    proxy = torch.cat([reward_model.sentiment(mb)[:, i] for mb in y.split(256)]).numpy(force=True)
    texts = tokenizer.decode_batch(y.tolist())
    vader = SentimentIntensityAnalyzer()
    gold = np.array([vader.polarity_scores(t)["compound"] for t in texts])
    row = {"n": n, "target": target, "samples": texts[:64],
           "entropy": entropy.mean().item(), "base_perplexity": math.exp(-logp_ref.mean().item()),
           "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2),
           "self_similarity": self_similarity(texts), "duplicates": n - len(set(texts))}
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
CSS = """body{font:16px/1.5 Georgia,serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222;background:#fffdf8}
h1,h2{font-weight:normal;line-height:1.2}h2{margin-top:2em;border-bottom:1px solid #ccb}
table{border-collapse:collapse;font:13px/1.4 system-ui,sans-serif}td,th{padding:.25em .6em;text-align:right;
border-bottom:1px solid #e8e4d8}th{font-weight:600}td:first-child,th:first-child{text-align:left}
.wide{overflow-x:auto}.s td{text-align:left;vertical-align:top;min-width:210px;white-space:pre-wrap;
font:13px/1.35 Georgia,serif}.plots{display:flex;flex-wrap:wrap;gap:1em}.plots img{width:500px;max-width:100%}
.best{background:#eef6e4}.over{background:#fbe9e4}small{color:#776}"""


def table(columns: dict, rows: list[dict], mark=lambda row: "") -> str:
    """columns: title -> function of a row. Every cell is escaped."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join(f'<tr class="{mark(r)}">' + "".join(f"<td>{html.escape(f(r))}</td>" for f in columns.values())
                   + "</tr>" for r in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


class Plots:
    """Each figure is a file in out/plots and a data: URL in the page."""

    def __init__(self, folder: Path):
        self.folder, self.html = folder, ""

    def add(self, name: str, title: str, xlabel: str, ylabel: str, draw) -> None:
        fig, ax = plt.subplots(figsize=(5.6, 3.7), dpi=110, layout="constrained")
        draw(ax)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
        png = io.BytesIO()
        fig.savefig(png, format="png")
        plt.close(fig)
        write(self.folder / f"{name}.png", png.getvalue())
        data = base64.b64encode(png.getvalue()).decode()
        self.html += f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def draw_plots(plots: Plots, rows: list[dict], logs: dict, reward_header: dict, fit: tuple, curve: list) -> None:
    ppo, best_of = logs["04-happy"], rows[0]["best_of_n"]
    root = [math.sqrt(max(r["kl"], 0)) for r in rows]

    def frontier(key, label):
        def draw(ax):
            ax.errorbar(root, [r[key] for r in rows], [2 * r[key + "_se"] for r in rows], fmt="o-", label="PPO, +- 2 SE")
            ax.plot([math.sqrt(b["kl"]) for b in best_of], [b[key] for b in best_of], "s--", label="best of n = 1 ... 256")
        plots.add(f"{key}_by_kl", label, "sqrt KL(policy || base), sqrt nats", key, draw)

    frontier("proxy", "Reward model: log p(happy)")
    frontier("gold", "Gold: VADER compound score")

    def draw_kl(ax):
        steps = np.array([r["step"] for r in ppo])
        ax.errorbar(steps, [math.sqrt(max(r["kl"], 0)) for r in ppo], fmt="o", label="measured")
        ax.plot(steps, fit[0] * steps + fit[1], label=f"{fit[0]:.2f} x iteration {fit[1]:+.2f}, R^2 = {fit[2]:.3f}")
    plots.add("kl", "sqrt KL grows linearly", "iteration", "sqrt nats per completion", draw_kl)

    updated = [r for r in ppo if "clip_fraction" in r]

    def draw_clip(ax):
        ax.semilogy([r["step"] for r in updated], [100 * max(r["clip_fraction"], 1e-5) for r in updated], "o-", label="outside the clip range")
        ax.semilogy([r["step"] for r in updated], [100 * max(r["clip_binding"], 1e-5) for r in updated], "s--", label="clip binding")
        ax.axhline(1, color="grey", ls=":"), ax.axhline(20, color="grey", ls=":")
    plots.add("clip", "Share of ratios clipped (healthy: 1 to 20 %)", "iteration", "% of tokens", draw_clip)
    plots.add("entropy", "Entropy of the policy", "iteration", "nats per token",
              lambda ax: ax.plot([r["step"] for r in ppo], [r["entropy"] for r in ppo], "o-"))

    def draw_calibration(ax):
        bins = reward_header["calibration"]
        ax.plot([0, 1], [0, 1], color="grey", ls=":")
        ax.plot([b["predicted"] for b in bins], [b["target"] for b in bins], "o-")
    plots.add("calibration", "Reward model, held out", "predicted p(happy)", "labelled happy", draw_calibration)
    if curve:
        def draw_curve(ax):
            ax.semilogx([c["labels"] for c in curve], [c["auc"] for c in curve], "o-", label="reward model")
            ax.semilogx([c["labels"] for c in curve], [c["bag_of_words_auc"] for c in curve], "s--", label="bag of words")
        plots.add("curve", "Learning curve of the reward model", "labels", "held-out AUC", draw_curve)
    if logs["01"]:
        plots.add("pretrain", "Pretraining", "step", "nats per token",
                  lambda ax: ax.plot([r["step"] for r in logs["01"]], [r["nats_per_token"] for r in logs["01"]]))


def render(report: dict, plots: Plots, reward_header: dict, show: int) -> str:
    """The page. All text that a model or a file supplied goes through html.escape."""
    def pm(key, digits=2, scale=1):
        return lambda r: f"{scale * r[key]:.{digits}f} ± {scale * r[key + '_se']:.{digits}f}"

    def plain(key, digits=2):
        return lambda r: f"{r[key]:.{digits}f}" if key in r else "n/a"

    columns = {"policy": lambda r: r["name"], "KL, nats": pm("kl"), "proxy, log p": pm("proxy", 3),
               "gold": pm("gold", 3), "positive, %": pm("positive", 1, 100), "negative, %": pm("negative", 1, 100),
               "distinct-1": plain("distinct_1", 3), "distinct-2": plain("distinct_2", 3),
               "self-similarity": plain("self_similarity", 3), "duplicates": plain("duplicates", 0),
               "copied run, 99 % / max": lambda r: f"{r['copied_run_99']:.0f} / {r['copied_run_max']}" if "copied_run_99" in r else "n/a",
               "perplexity under base": plain("base_perplexity", 1), "entropy": plain("entropy")}
    parts = [f"<h1>Shakespeare, cheered up</h1><p>{html.escape(report['summary'])}</p>"]
    happy = report["happy"]
    first, last = happy[0], happy[-1]
    parts.append("<h2>Before and after</h2><div class='wide'><table class='s'><tr><th>base model</th>"
                 f"<th>policy at {last['kl']:.1f} nats</th></tr>" + "".join(
                     f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>"
                     for a, b in zip(first["samples"][:show], last["samples"][:show])) + "</table></div>")
    parts.append(f"<h2>What happened</h2><div class='plots'>{plots.html}</div>")
    for target in ("happy", "sad"):
        if target in report:
            best, over = report[f"best_{target}"], report[f"over_{target}"]
            parts.append(f"<h2>Checkpoints towards {target}</h2>" + table(
                columns, report[target], lambda r: "best" if r["name"] == best else "over" if r["name"] == over else ""))
            parts.append("<p><small>± one standard error. Proxy: the reward model's log p of its target. Gold: VADER's "
                         "compound score in [-1, 1]; in the default run it also made the labels. Green: highest gold"
                         + (", lowest for the sad twin" if target == "sad" else "") + "; red: gold lower than that by "
                         "more than 2 SE. Copied run: words in a row that stand in the corpus.</small></p>")
    parts.append("<h2>Best of n from the base model</h2>" + table(
        {"n": lambda r: str(r["n"]), "KL bound, nats": plain("kl"), "proxy, log p": plain("proxy", 3),
         "gold": plain("gold", 3), "positive, %": lambda r: f"{100 * r['positive']:.1f}"}, first["best_of_n"]))
    parts.append("<h2>The same random numbers, checkpoint by checkpoint</h2><div class='wide'><table class='s'><tr>"
                 + "".join(f"<th>{html.escape(r['name'])}<br>{r['kl']:.2f} nats</th>" for r in happy) + "</tr>"
                 + "".join("<tr>" + "".join(f"<td>{html.escape(r['samples'][i])}</td>" for r in happy) + "</tr>"
                           for i in range(show)) + "</table></div>")
    rm = [{"name": k} | m for k, m in reward_header["metrics"].items()]
    parts.append("<h2>Reward model, held-out samples</h2>" + table(
        {"source": lambda r: r["name"], "n": plain("n", 0),
         "accuracy [95 %]": lambda r: "{:.3f} [{:.3f}, {:.3f}]".format(r["accuracy"], *r["accuracy_interval"]),
         "AUC": plain("auc", 3), "AUC, bag of words": plain("bag_of_words_auc", 3), "NLL, nats": plain("nll", 3),
         "Brier": plain("brier", 3)}, rm))
    parts.append(f"<p><small>seed {report['seed']}, base model {html.escape(str(report['base_metrics']))}</small></p>")
    return ("<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
            "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
            f"<title>RLHF on Shakespeare</title><style>{CSS}</style><body>{''.join(parts)}</body></html>")


# ---- Blind rating --------------------------------------------------------------------------------
def read_key() -> str:
    """One key from the terminal, without Enter; end of input is "q"."""
    import termios  # not on Windows
    import tty
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        return os.read(fd, 1).decode("utf-8", "replace").lower() or "q"
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def rate(items: list[tuple[str, str]], path: Path) -> dict[str, str]:
    """items (id, text) in blind order; each answer is appended to `path` at once -> id -> answer."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("rating needs a terminal: run this command in one")
    answers: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            answers[json.loads(line)["id"]] = json.loads(line)["rating"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} line {number} is broken: mend or delete it") from error
    keys = {"p": "positive", "n": "negative", "0": "neutral"}
    with open(path, "a") as file:
        i = 0
        while i < len(items):
            key, text = items[i]
            if answers.get(key) in keys.values():
                i += 1
                continue
            width = min(shutil.get_terminal_size().columns, 90) - 4
            lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
            print(f"\033[2J\033[H{i + 1} of {len(items)}\n\n" + "\n".join("    " + x for x in lines)
                  + "\n\np positive   n negative   0 neutral   u undo   q quit (and go on later)", flush=True)
            pressed = read_key()
            if pressed == "q":
                break
            if pressed == "u" and i:
                i -= 1
                answers[items[i][0]] = "undo"
                file.write(json.dumps({"id": items[i][0], "rating": "undo"}) + "\n")
            elif pressed in keys:
                answers[key] = keys[pressed]
                file.write(json.dumps({"id": key, "rating": keys[pressed], "text": text}) + "\n")
            file.flush()
    return {k: a for k, a in answers.items() if a in keys.values()}


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    device, dtype = start(cfg)

    def ready(path, made_by):
        model, tokenizer, header = load(path, made_by)
        model.to(device).dtype = dtype
        return model, tokenizer, header

    reference, tokenizer, base_header = ready(cfg.out / "base.safetensors", "01_pretrain.py")
    reward_model, _, reward_header = ready(cfg.out / "reward.safetensors", "03_reward_model.py")
    final, _, final_header = ready(cfg.out / "policy-happy.safetensors", "04_ppo.py")
    base = fingerprint(reference)
    for name, header in (("reward", reward_header), ("policy-happy", final_header)):
        if header.get("base") != base:
            raise UserError(f"{cfg.out / name}.safetensors was made from another base model: run its script again")
    length, seed = reward_header["length"], cfg.seed << 32 | 5 << 24
    if final_header["settings"]["reward_model"] != fingerprint(reward_model):
        raise UserError(f"{cfg.out}/policy-happy.safetensors was trained with another reward model: run 04_ppo.py again")

    if cfg.rate:
        arms = {"base": reference, "final": final}
        items = [(f"{i}-{j}", text) for j, arm in enumerate(arms.values()) for i, text in enumerate(
            tokenizer.decode_batch(arm.generate(cfg.rate_n, length, seed + 1 + j)[0].tolist()))]
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
        answers = rate([items[i] for i in order], cfg.out / f"ratings-{cfg.rate}.jsonl")
        if len(answers) < len(items):
            print(f"{len(answers)} of {len(items)} rated; the key stays hidden. The same command goes on")
            finish(f"python {SCRIPT} --rate {cfg.rate}")
            raise SystemExit
        a, b = (sum(answers[k] == "positive" for k, _ in items if k.endswith(f"-{j}")) for j in range(2))
        print(f"positive: base {a} of {cfg.rate_n}, final {b} of {cfg.rate_n}; "
              f"Fisher's exact test, one-sided: p = {fisher_exact(a, cfg.rate_n, b, cfg.rate_n):.2g}")
        for p, q in ((0.2, 0.6), (0.3, 0.6), (0.57, 0.93)):
            print(f"power of {cfg.rate_n} against {cfg.rate_n} if the shares are {p:.0%} and {q:.0%}: "
                  f"{fisher_power(p, q, cfg.rate_n):.2f}")
        finish(f"python {SCRIPT}")
        raise SystemExit

    # -- measure the base, every checkpoint by rising KL, and the final policies
    corpus_path = cfg.out / "corpus.txt"
    corpus = Corpus(corpus_path.read_text(encoding="utf-8")) if corpus_path.exists() else None
    cache_path = cfg.out / "05.jsonl"
    cache = {}
    if cfg.resume and cache_path.exists():
        cache = {r["key"]: r for r in (json.loads(x) for x in cache_path.read_text().splitlines() if x.endswith("}"))}
    write(cache_path, "".join(json.dumps(r) + "\n" for r in cache.values()))
    targets = [t for t in ("happy", "sad") if (cfg.out / f"policy-{t}.safetensors").exists()]
    jobs = [(t, None) for t in targets[:1]] + [(t, path) for t in targets for path in (
        *sorted((cfg.out / "checkpoints").glob(f"{t}-kl-*.safetensors")), cfg.out / f"policy-{t}.safetensors")]
    rows, logs = {t: [] for t in targets}, {}
    with open(cache_path, "a") as file:
        for target, path in tqdm(jobs, desc="evaluate"):
            policy, _, header = ready(path, "04_ppo.py") if path else (reference, None, {"base": base})
            if header.get("base") != base:
                raise UserError(f"{path} was made from another base model: delete it, or run 04_ppo.py again")
            n = cfg.n_ends if path is None or path.name.startswith("policy") else cfg.n
            key = f"{fingerprint(policy)} {target} {n} {seed} {fingerprint(reward_model)}"
            if key not in cache:
                cache[key] = {"key": key} | measure(policy, (reference, reward_model, length), tokenizer,
                                                    corpus, n, seed, target)
                file.write(json.dumps(cache[key]) + "\n")
                file.flush()
            rows[target].append({"name": path.stem if path else "base", "step": header.get("step", 0)} | cache[key])
    for name in ("01", "04-happy"):
        path = cfg.out / f"{name}.jsonl"
        logs[name] = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []

    ppo = logs["04-happy"]
    fit = fit_line([r["step"] for r in ppo], [math.sqrt(max(r["kl"], 0)) for r in ppo])
    report = {"seed": cfg.seed, "base_metrics": base_header["metrics"], "reward_model": reward_header["metrics"],
              "sqrt_kl_fit": dict(zip(("slope", "intercept", "r2"), fit)), **rows}
    for t in targets:
        by_kl = sorted(rows[t], key=lambda r: r["kl"])
        signed = [r | {"gold": r["gold"] if t == "happy" else -r["gold"]} for r in by_kl]
        best, over = over_optimisation(signed)
        report[f"best_{t}"], report[f"over_{t}"] = best["name"], over and over["name"]
    best = next(r for r in rows["happy"] if r["name"] == report["best_happy"])
    over = next((r for r in rows["happy"] if r["name"] == report["over_happy"]), None)
    first, last = rows["happy"][0], rows["happy"][-1]
    report["summary"] = (
        f"VADER calls {first['positive']:.1%} of the base model's samples positive, and {last['positive']:.1%} of the "
        f"final policy's, {last['kl']:.2f} nats per completion away; distinct-2 went from {first['distinct_2']:.3f} to "
        f"{last['distinct_2']:.3f}. Best checkpoint by gold score: {best['name']} ({best['kl']:.2f} nats). "
        + (f"Over-optimisation starts at {over['kl']:.2f} nats: the gold score falls while the reward rises."
           if over else "The gold score did not fall significantly: no over-optimisation within the KL budget."))
    plots = Plots(cfg.out / "plots")
    curve_path = cfg.out / "curve.json"
    draw_plots(plots, rows["happy"], logs, reward_header, fit, json.loads(curve_path.read_text()) if curve_path.exists() else [])
    write(cfg.out / "report.json", json.dumps(report, indent=1))
    write(cfg.out / "report.html", render(report, plots, reward_header, cfg.show))
    for r in rows["happy"] + rows.get("sad", []):
        print(f"{r['name']:>20}: KL {r['kl']:5.2f} +- {r['kl_se']:.2f}, proxy {r['proxy']:.3f}, gold {r['gold']:+.3f} "
              f"+- {r['gold_se']:.3f}, positive {r['positive']:.1%}, distinct-2 {r['distinct_2']:.3f}, "
              f"duplicates {r['duplicates']}")
    print(report["summary"])
    print(f"sqrt KL against iteration: slope {fit[0]:.3f}, R^2 {fit[2]:.4f}")
    finish(f"open {cfg.out / 'report.html'}")
