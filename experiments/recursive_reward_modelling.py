"""Can the reward model that she trains help a labeller who reads four words of each text?

    python -m experiments.recursive_reward_modelling    # after `make seeds`; half an hour

Claim (Leike et al. 2018, arXiv:1811.07871): a reward model helps people to evaluate what they could
not evaluate alone; from that they train a better one, and so on. Saunders et al. 2022
(arXiv:2206.05802): shown a model's critique, people find flaws that they would have missed.
Design: VADER is the labeller; the truth is what it feels about all words of a text (36 on average),
the label what it feels about the four that it reads. Round 0: the first four. On those labels of
2,048 samples a reward model is trained, 03's bag of words; in each of three more rounds, on fresh
samples, an assistant with the last model says which four words are read, and a new model learns
from these labels alone. *Critique*: the words at which the score changes most; *flattery*: the
happiest; *yes-man*: those for the model's own verdict; *liar*: those against the truth, which it
knows. Controls: random words; *from nothing*, the critique of a model that first learned shuffled
labels; all words; and the critique and the lies of one who knows VADER's lexicon. Judged on 4,096
samples that nobody labelled: AUC, and what VADER feels (sd of the base) about the best of 16, which
is 1.84 nats away whatever the reward; then PPO against the unaided and the aided model. Six halves
of the samples of three runs; PPO on three runs.
Predicted (known, half 0: labels of the first 4, 8, all words make AUC .62, .64, .78; 28 and 49 %
of 4 and 8 words are not neutral): (1) Label accuracy (neutral: half): 58 % unaided; critique 64,
68, 70 %, as good as the first 16 words; AUC .62, then .67, .70, .71. (2) From nothing is one round
behind. (3) Lexicon: 93 %, AUC .77, as good as all words. (4) Gold, best of 16: .35 unaided, .6 by
critique, .8 by all words. (5) Flattery does not collapse: words are true, and who points at happy
ones teaches which they are; accuracy 60 %, AUC .65, 85 % of happy words known, half of the sad.
(6) Yes-man: the labels agree with the model, which learns nothing: AUC .62 to .64 in each round.
(7) The liar loses track: 46 % right, so the next model is upside down and its lies are true, 56 %,
then below 50 again. With the lexicon: 15 %, AUC .25, gold -.8. (8) PPO says what best-of-16 says,
at 1.84 nats with half the gold; at 6 nats .8 unaided, 1.1 by critique. (9), after (1) to (8) were
found: a transformer, the base model after 12,288 labels, has an AUC of .64 unaided, .75 by critique
of the last bag of words, .82 by all words; gold, best of 16: .5, .8, 1.0.
"""
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from experiments import (BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, YELLOW, Config, keep,
                         over_seeds, plt)
from experiments.labellers import (LEXICON, fit, judged, known, labels, optimise, read, scores,
                                   transformer)
from experiments.overseers import targets
from experiments.reweight import at
from running import require, start

K = 4  # words that she reads
FIXED = {"first 4": ("first", K), "first 8": ("first", 8), "first 16": ("first", 16),
         "all words": ("first", 10**6), "random 4": ("random", K),
         "lexicon's critique": ("critique", K), "lexicon's lies": ("liar", K)}
AIDED = {"critique": "critique", "from nothing": "critique", "flattery": "flattery",
         "yes-man": "yes-man", "liar": "liar"}
COLOURS = {"critique": BLUE, "from nothing": SKY, "flattery": ORANGE, "yes-man": PINK, "liar": RED,
           "first 4": BLACK, "first 16": YELLOW, "all words": GREEN}


@dataclass
class Settings(Config):
    n: int = 2048          # labels a round
    aided: int = 3         # rounds after the first


def measure(cfg: Settings, texts, gold: np.ndarray) -> tuple[dict, dict]:
    """texts, lists of words; gold (N,), compound scores -> arm -> a row for each of its rounds; arm
    -> its last reward model."""
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
            "labels not neutral": (given != 0.5).mean(),
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


def students(cfg: Settings, texts, tokens, gold, model: dict, run, device, dtype) -> dict:
    """Transformers that learn from labels of the first half of a run: arm -> `judged` on the rest
    of its second half, of which the assistant has its model."""
    half, found, rng = len(texts) // 2, {}, np.random.default_rng(cfg.seed)
    rest = slice(half + (cfg.aided + 1) * cfg.n, None)
    for name, aim, k in (("first 4", "first", K), ("critique", "critique", K),
                         ("all words", "first", 10**6)):
        given = labels(texts[:half], targets(gold[:half]), aim, model, k, rng)
        odds = transformer(tokens[:half], given, tokens[rest], run, device, dtype)
        found[name] = judged(odds, gold[rest])
    return found


def findings(seeds: list[dict], trained: list[dict], learned: list[dict]) -> dict[str, list]:
    found = {}
    for what in ("label accuracy", "AUC", "gold", "happy words known", "sad words known"):
        for name, rows in seeds[0].items():
            for i, row in enumerate(rows):
                found[f"{what}: {name}, round {row['round']}"] = [s[name][i][what] for s in seeds]
            found[f"{what}: critique ahead of {name}"] = [s["critique"][-1][what]
                                                          - s[name][-1][what] for s in seeds]
    for name in learned[0]:
        for what in ("AUC", "gold"):
            found[f"{what}: transformer, {name}"] = [s[name][what] for s in learned]
    for kl in (1.84, 4, 6):
        for name in trained[0]:
            found[f"gold: PPO at {kl} nats, {name}"] = [at(s[name], "kl", kl, "gold")
                                                        for s in trained]
        found[f"gold: PPO at {kl} nats, critique ahead"] = [
            at(s["critique"], "kl", kl, "gold") - at(s["first 4"], "kl", kl, "gold")
            for s in trained]
    return found


def draw(seeds: list[dict], trained: list[dict]):
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for i, (name, colour) in enumerate(COLOURS.items()):
        style = {"color": colour, "ls": "-" if name in AIDED else "--"}
        each = [s[name] if name == "from nothing" else s["start"] + s[name] for s in seeds]
        for ax, what in zip(axes, ("label accuracy", "AUC")):
            mean, half = zip(*(over_seeds(row[what] for row in rows) for rows in zip(*each)))
            if name in FIXED:
                ax.axhline(mean[-1], **style, label=name)
            else:
                ax.errorbar([row["round"] + 0.04 * i for row in each[0]], mean, half, **style,
                            marker="o", ms=4, capsize=3, label=name)
        best = [rows[-1]["best of n"] for rows in each]
        gold = np.mean([[row["gold"] for row in line] for line in best], 0)
        axes[2].plot([row["kl"] for row in best[0]], gold, **style)
        for rows in (s[name] for s in trained if name in s):
            axes[2].plot(*zip(*[(row["kl"], row["gold"]) for row in rows]), "o:", color=colour)
    for ax, title in zip(axes, ("her labels that are right (neutral: half)", "AUC",
                                "gold, sd of the base: best of n; dotted: PPO")):
        ax.set(title=title, xlabel="round", xticks=range(4))
        ax.grid(alpha=0.3)
    axes[2].set(xlabel="KL, nats", xlim=(0, 6.2), xticks=range(7))
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
        learned.append(students(cfg, texts, tokens, gold, models["critique"], run, device, dtype))
    keep(cfg, "recursive_reward_modelling", findings(seeds, trained, learned),
         {"halves": seeds, "PPO": trained, "transformers": learned}, draw(seeds, trained))
