"""Can a reward model help the labeller who trains it, if she reads four words of each text?

    python -m experiments.recursive_reward_modelling    # after `make seeds`; 34 minutes on one core

Claim: a reward model helps people to evaluate what they could not evaluate alone, and so to train a
better one (Leike et al. 2018, arXiv:1811.07871). Shown a model's critique, they find flaws they
would have missed (Saunders et al. 2022, arXiv:2206.05802).

Design: VADER plays the labeller. The truth is what VADER feels about all words of a text (36 on
average). Her label is what it feels about the four that she reads. In round 0 she reads the first
four words of 2,048 samples, and her labels train a reward model, 03's bag of words. In each of
three more rounds, on fresh samples, an assistant with the last model says which four words to read.
A new model learns from these labels alone. The assistants point at:
- *critique*: the words that change the score most;
- *flattery*: the happiest words;
- *yes-man*: the words for its own verdict;
- *liar*: the words against the truth.
We judge the models on 4,096 other samples. AUC is the chance that a happy text scores above a sad
one. Gold is VADER's score of the sample that a model likes best of 16, in standard deviations (sd)
of the base. This best of 16 is at most 1.84 nats (units of KL) from the base, whatever the model. A
word is known if the model has its sign right. Then comes PPO. We use six halves of three runs, and
for PPO three runs.

Controls: random words; *from nothing*, the critique of a model of shuffled labels; all words;
critique and lies by VADER's lexicon.

Predicted (known from half 0: labels of the first 4, 8 and all words give an AUC of 0.62, 0.64 and
0.78; 28% of labels of 4 words and 49% of 8 are not neutral):
1. Labels right (neutral counts half): 58% unaided; by critique 64%, 68% and 70%, like reading the
   first 16 words. AUC: 0.62, then 0.67, 0.70 and 0.71.
2. *From nothing* is one round behind.
3. Critique by the lexicon: 93%, with an AUC of 0.77, like all words.
4. Gold: 0.35 unaided, 0.6 by critique, 0.8 by all words.
5. Flattery does not collapse, since the words are true: 60%, AUC 0.65. The model knows 85% of the
   happy words and half of the sad.
6. The yes-man learns nothing: AUC 0.62 to 0.64 in each round.
7. The liar loses track. 46% are right, so the next model is upside down and its lies are true: 56%,
   then below 50%. Lies by the lexicon: 15%, AUC 0.25, gold -0.8.
8. PPO says the same, with half the gold at 1.84 nats. At 6 nats gold is 0.8 unaided and 1.1 by
   critique. Predicted later for 04's present learning rates: 0.7 and 1.0.
9. Predicted after 1 to 8, for the base model after 12,288 labels: AUC 0.64 unaided, 0.75 by the
   last critique, 0.82 by all words; gold 0.5, 0.8 and 1.0.

Found (+- half the 95% interval over six halves, in 8 and 9 over three runs):
1. Unaided 57%; by critique 70%, 72.5% and 74.2 +- 1.2%; by the first 16 words 74%. AUC: 0.62, then
   0.71, 0.73 and 0.75 +- 0.01. Yet the model after critique hardly knows more words:
               critique     unaided    first 16 words
   happy       80 +- 4%     76%        87%
   sad         72 +- 5%     71%        80%
2. Right: 61%, 69% and 72%. But 61% is more than by random words (57%).
3. Right: 90%, AUC 0.78.
4. Gold: 0.45 +- 0.07 unaided, 0.90 +- 0.03 by critique, 0.93 +- 0.02 by all words.
5. Right, and better: 71%, AUC 0.72, 85% of the happy words and 57 +- 8% of the sad; gold
   0.86 +- 0.04.
6. Wrong: 70%, AUC 0.73 +- 0.02.
7. Right: 43%, 62.5% and 44%; AUC 0.52, 0.67 and 0.54. Lies by the lexicon: 22%, AUC 0.34, gold
   -0.57.
8. At 1.84 nats gold is 0.32 +- 0.17 unaided and 0.43 +- 0.09 by critique. At 6 nats it is
   0.66 +- 0.27 and 0.88 +- 0.07, with critique ahead on each run.
9. Unaided is worse than predicted. AUC: 0.54, 0.79 and 0.84 +- 0.03. Gold: 0.13 +- 0.21,
   0.89 +- 0.05 and 1.01 +- 0.03.

Left out: people; forged words; flaws that no four words show.

Take away: an assistant that can only point at true words helps even when it flatters. The exception
is one that points against a truth that it knows. No assistant points at what it does not know.

What would change my mind: critique that teaches new words.
"""
import copy
import importlib
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from experiments.shared.ppo import ppo, stage
from experiments.shared.results import ink, over_seeds, panels, save_results
from experiments.shared.reweighting import at
from experiments.shared.runs import Config, labelled, load_run
from experiments.shared.simulated_people import rm, targets
from model import load, require, start, words

ev = importlib.import_module("05_eval")
vader = cache(SentimentIntensityAnalyzer)  # vader(): one shared analyzer; do not change it
LEXICON = vader().lexicon | {"": 0.0}
parts = cache(words)  # "heart-ache," -> heart, ache
K = 4  # words that the labeller reads
FIXED = {"first 4": ("first", K), "first 8": ("first", 8), "first 16": ("first", 16),
         "all words": ("first", 10**6), "random 4": ("random", K),
         "lexicon's critique": ("critique", K), "lexicon's lies": ("liar", K)}
AIDED = {"critique": "critique", "from nothing": "critique", "flattery": "flattery",
         "yes-man": "yes-man", "liar": "liar"}
LEARNED = {name: FIXED[name] for name in ("first 4", "all words")} | {"critique": ("critique", K)}
COLOURS = {"critique": ink.blue, "from nothing": ink.sky, "flattery": ink.orange,
           "yes-man": ink.pink, "liar": ink.red, "first 4": ink.black, "first 16": "grey",
           "all words": ink.green}


def compound(text: list[str]) -> float:
    """Ask VADER how it feels about these words alone, in [-1, 1]. All words of a text, split at
    whitespace, give exactly how it feels about the text."""
    return vader().polarity_scores(" ".join(text))["compound"]


def read(run) -> tuple[list[list[str]], list[list[int]], np.ndarray]:
    """Read a run's samples -> lists of words, lists of tokens, how VADER feels about each, (N,)."""
    rows = labelled(run)
    texts = [row["text"].split() for row in rows]
    return texts, [row["tokens"] for row in rows], np.array([compound(text) for text in texts])


# ---- The reward model ----------------------------------------------------------------------------
def fit(texts: list[list[str]], labels) -> dict[str, float]:
    """Fit 03's bag of words to labels in [0, 1] -> the log-odds of each word; "" has the bias."""
    names = ["", *dict.fromkeys(name for text in texts for word in text for name in parts(word))]
    rows = [{"text": " ".join(text), "target": label, "weight": 1.0}
            for text, label in zip(texts, labels)]
    odds = rm.bag_of_words(rows, [{"text": name} for name in names])
    return dict(zip(names, [odds[0].item(), *(odds[1:] - odds[0]).tolist()]))


def changes(model: dict[str, float], text: list[str]) -> np.ndarray:
    """Return by how much each word of the text changes its score, (n,)."""
    return np.array([sum(model.get(name, 0.0) for name in parts(word)) for word in text])


def scores(model: dict[str, float], texts: list[list[str]]) -> np.ndarray:
    """Return the log-odds that each text is happy, (N,)."""
    return np.array([model[""] + changes(model, text).sum() for text in texts])


def judged(score: np.ndarray, gold: np.ndarray) -> dict:
    """Judge a reward model by its scores (N,) of fresh texts -> AUC, and how VADER feels about its
    best of 16, and of any n, in standard deviations of gold (N,)."""
    ranked = ((gold - gold.mean()) / gold.std())[np.argsort(score, kind="stable")]
    best = {n: ev.best_of_n_weights(len(score), n) @ ranked
            for n in ev.BEST_OF if n <= len(score)}
    return {"AUC": rm.auc(score, targets(gold)), "gold": best[16], "best of n": best}


def known(model: dict[str, float], texts) -> dict:
    """Count how often the model has the right sign, for happy and for sad words of these texts."""
    counts, found = Counter(x for text in texts for word in text for x in parts(word)), {}
    for sign, feeling in ((1, "happy"), (-1, "sad")):
        names = [name for name in counts if LEXICON.get(name, 0.0) * sign > 0]
        right = [np.sign(model.get(name, 0.0)) * sign / 2 + 0.5 for name in names]
        found[f"{feeling} words known"] = np.average(right, weights=[counts[x] for x in names])
    return found


def optimise(model: dict[str, float], gold: np.ndarray, run, device, dtype, batch: int = 1536,
             kl_stop: float = 6.0) -> list[dict]:
    """Run PPO against this model's log p(happy) -> before each update KL, reward, and how VADER
    feels about the batch, in standard deviations of gold (N,)."""
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
    """Choose the k words that she reads -> their places, ascending; ties are broken at random.
    change (n,): `changes` by the assistant's model; truth: 1, 0 or -1; its verdict: 1 or -1."""
    wish = {"first": -np.arange(len(change)), "random": np.zeros(len(change)),
            "critique": np.abs(change), "flattery": change, "yes-man": verdict * change,
            "liar": -truth * change if truth else np.abs(change)}[aim]
    return np.sort(np.lexsort((rng.random(len(change)), -wish))[:k])


def labels(texts, target, aim: str, model: dict[str, float], k: int, rng) -> np.ndarray:
    """Label texts with an assistant that has this model -> her labels (N,). target (N,): the true
    ones; all in {0, 0.5, 1}. The assistant's verdict: does the text score above the average?"""
    score, felt = scores(model, texts), []
    for text, truth, verdict in zip(texts, 2 * target - 1, np.sign(score - score.mean())):
        places = pointed(aim, changes(model, text), truth, verdict, k, rng)
        felt.append(compound([text[i] for i in places]))
    return targets(np.array(felt))


def transformer(texts, tokens, gold: np.ndarray, n: int, rest: slice, aim: str, k: int,
                model: dict[str, float], run, device, dtype) -> dict:
    """Train the base model for an epoch of 03 on labels of the first n texts; judge it on rest."""
    given = labels(texts[:n], targets(gold[:n]), aim, model, k, np.random.default_rng(0))
    items = [{"tokens": y, "target": x, "weight": 1.0} for y, x in zip(tokens, [*given, *gold[n:]])]
    learner = load(run / "base.safetensors", "01_pretrain.py", device, dtype)[0]
    rm.train(learner, rm.Phase("samples", items[:n], 1.0), rm.Config())
    log_p = rm.predict(learner, items[rest])
    return judged(log_p[:, 0] - log_p[:, 1], gold[rest])


# ---- The experiment ------------------------------------------------------------------------------
@dataclass
class Settings(Config):
    n: int = 2048          # labels per round
    aided: int = 3         # rounds after the first


def measure(cfg: Settings, texts, gold: np.ndarray) -> tuple[dict, dict]:
    """Run all arms on texts, lists of words, with gold (N,) -> arm -> a row for each round; and arm
    -> its last model."""
    rng, target, rows, models = np.random.default_rng(cfg.seed), targets(gold), {}, {}
    rounds = [slice(t * cfg.n, (t + 1) * cfg.n) for t in range(cfg.aided + 1)]
    rest = slice(rounds[-1].stop, None)
    require(len(texts[rest]) >= 256, f"only {len(texts)} samples in half a run: lower --n")

    def ask(name, t, aim, knows, k=K):
        true = target[rounds[t]]
        given = labels(texts[rounds[t]], true, aim, knows, k, rng)
        models[name] = fit(texts[rounds[t]], given)
        rows.setdefault(name, []).append({
            "round": t, "label accuracy": 1 - np.abs(given - true)[true != 0.5].mean(),
            **judged(scores(models[name], texts[rest]), gold[rest]),
            **known(models[name], texts[rest])})
        return given

    given = ask("start", 0, "first", LEXICON)
    models["from nothing"] = fit(texts[rounds[0]], rng.permutation(given))
    for name, aim in AIDED.items():
        models.setdefault(name, models["start"])
        for t in range(1, cfg.aided + 1):
            ask(name, t, aim, models[name])
    for name, (aim, k) in FIXED.items():
        ask(name, cfg.aided, aim, LEXICON, k)
    return rows, models


def findings(seeds: list[dict], trained: list[dict], learned: list[dict]) -> dict[str, list]:
    found = {}
    for what in ("label accuracy", "AUC", "gold", "happy words known", "sad words known"):
        for name, rows in seeds[0].items():
            for i, row in enumerate(rows):
                found[f"{what}: {name}, round {row['round']}"] = [s[name][i][what] for s in seeds]
            if name != "critique":
                found[f"{what}: critique ahead of {name}"] = [
                    s["critique"][-1][what] - s[name][-1][what] for s in seeds]
    found |= {f"gold: PPO at {kl} nats, {name}": [at(s[name], "kl", kl, "gold") for s in trained]
              for kl in (1.84, 4, 6) for name in trained[0]}
    return found | {f"{what}: transformer, {name}": [s[name][what] for s in learned]
                    for what in ("AUC", "gold") for name in learned[0]}


def draw(seeds: list[dict], trained: list[dict]):
    fig, axes = panels(1, 3, 14, 4.5)
    for i, (name, colour) in enumerate(COLOURS.items()):
        each = [s[name] if name == "from nothing" else s["start"] + s[name] for s in seeds]
        style = {"color": colour, "ls": "--" if name in FIXED else "-"}
        for ax, what in zip(axes, ("label accuracy", "AUC")):
            mean, half = zip(*(over_seeds(row[what] for row in rows) for rows in zip(*each)))
            if name in FIXED:
                ax.axhline(mean[-1], **style, label=name)
            else:
                ax.errorbar([row["round"] + 0.04 * i for row in each[0]], mean, half, **style,
                            marker="o", ms=4, capsize=3, label=name)
        best = [list(rows[-1]["best of n"].values()) for rows in each]
        axes[2].plot([*map(ev.best_of_n_kl, each[0][-1]["best of n"])], np.mean(best, 0), **style)
        for rows in (s[name] for s in trained if name in s):
            axes[2].plot(*zip(*[(x["kl"], x["gold"]) for x in rows]), "o:", color=colour)
    axes[0].set(title="her labels that are right (neutral: half)", xlabel="round", xticks=range(4))
    axes[1].set(title="AUC of the reward model", xlabel="round", xticks=range(4))
    axes[2].set(title="gold, sd of the base: best of n; dotted: PPO", xlabel="KL, nats",
                xlim=(0, 6.2))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return fig


if __name__ == "__main__":
    cfg, device, dtype = start(Settings, __doc__)
    seeds, trained, learned = [], [], []
    for run in tqdm(cfg.runs, desc="runs"):
        texts, tokens, gold = read(run)
        half = len(texts) // 2
        for part in (slice(half), slice(half, None)):
            rows, models = measure(cfg, texts[part], gold[part])
            seeds.append(rows)
        trained.append({name: optimise(models[name], gold, run, device, dtype)
                        for name in ("first 4", "critique")})
        rest = slice(half + (cfg.aided + 1) * cfg.n, None)
        learned.append({name: transformer(texts, tokens, gold, half, rest, aim, k,
                                          models["critique"], run, device, dtype)
                        for name, (aim, k) in LEARNED.items()})
    save_results(cfg, "recursive_reward_modelling", findings(seeds, trained, learned),
         {"halves": seeds, "PPO": trained, "transformers": learned}, draw(seeds, trained))
