"""Can the reward model that she trains help a labeller who reads four words of each text?

    python -m experiments.recursive_reward_modelling    # after `make seeds`; 24 minutes on one core

Claim (Leike et al. 2018, arXiv:1811.07871): a reward model helps people to evaluate what they could
not alone, and so to train a better one; (Saunders et al. 2022, arXiv:2206.05802) shown a model's
critique, they find flaws they would have missed.
Design: VADER labels; the truth is what it feels about all words (36 on average), the label what it
feels about the four it reads. Round 0: the first four of 2,048 samples train a reward model, 03's
bag of words. In each of three more, on fresh samples, an assistant with the last model says which
four, and a new model learns from these labels alone. *Critique*: where the score changes most;
*flattery*: the happiest; *yes-man*: those for its own verdict; *liar*: against the truth. Controls:
random words; *from nothing*, critique of a model of shuffled labels; all words; critique and lies
by VADER's lexicon. Judged on 4,096 other samples: AUC, and gold, VADER (sd of the base) of the best
of 16, at most 1.84 nats away for all; then PPO. Six halves of three runs; PPO on three.
Predicted (known, half 0: labels of the first 4, 8, all words make AUC .62, .64, .78; 28 and 49 % of
4 and 8 words are not neutral): (1) Labels right (neutral: half): 58 % unaided; critique 64, 68, 70,
as the first 16 words; AUC .62, then .67, .70, .71. (2) From nothing is one round behind. (3)
Lexicon: 93 %, AUC .77, as all words. (4) Gold: .35 unaided, .6 critique, .8 all words. (5) Flattery
does not collapse, since words are true: 60 %, AUC .65, 85 % of happy words known, half of the sad.
(6) Yes-man learns nothing: AUC .62 to .64 in each round. (7) The liar loses track: 46 % right, so
the next model is upside down and its lies are true, 56 %, then below 50; by the lexicon 15 %, AUC
.25, gold -.8. (8) PPO says the same, at 1.84 nats with half the gold; at 6 nats .8 unaided, 1.1
critique. (9), after (1) to (8): the base model after 12,288 labels, AUC .64 unaided, .75 by the
last critique, .82 by all words; gold .5, .8, 1.0. (8), later, of 04's present rates: .7 and 1.0.
Found, +- half the 95 % interval: (1) 56 %; 69.5, 73.4, 73.6 +- .9 %, the first 16 words 73; AUC
.63, .71, .735, .740 +- .015. Yet it knows no more words: it has the sign of 79 +- 3 % of the happy,
73 +- 3 of the sad, unaided of 78 and 71, by the first 16 of 88 and 79. (2) So: 62, 70, 73 %; but 62
is more than by random words (56). (3) So: 90 %, .77. (4) .45 +- .05, .86 +- .06, .92 +- .04. (5)
So, and better: 69.5 %, .71, 84 and 50 +- 7 %; gold .81 +- .03. (6) Wrong: 68 %, .72 +- .02. (7) So:
42, 63.5, 45 %; AUC .50, .68, .53; lexicon 22 %, .34, -.54. (8) Unaided .23 +- .20, critique .44 +-
.14; at 6 nats .52 +- .35 and .84 +- .12, ahead on each run (.62, .83 with one learning rate). (9)
Unaided, less than predicted: .52, .77, .82 +- .02; gold .06 +- .06, .77 +- .08, .94 +- .03. Left
out: people; forged words; flaws that no four words show. Take away: an assistant that can only
point at true words helps even when it flatters, unless it points against a truth that it knows; it
never points at what it does not know. What would change my mind: critique that teaches new words.
"""
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from experiments import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Config, keep, over_seeds, plt
from experiments.labellers import (LEXICON, ev, fit, judged, known, labels, optimise, read, scores,
                                   transformer)
from experiments.overseers import targets
from experiments.reweight import at
from model import require, start

K = 4  # words that she reads
FIXED = {"first 4": ("first", K), "first 8": ("first", 8), "first 16": ("first", 16),
         "all words": ("first", 10**6), "random 4": ("random", K),
         "lexicon's critique": ("critique", K), "lexicon's lies": ("liar", K)}
AIDED = {"critique": "critique", "from nothing": "critique", "flattery": "flattery",
         "yes-man": "yes-man", "liar": "liar"}
LEARNED = {name: FIXED[name] for name in ("first 4", "all words")} | {"critique": ("critique", K)}
COLOURS = {"critique": BLUE, "from nothing": SKY, "flattery": ORANGE, "yes-man": PINK, "liar": RED,
           "first 4": BLACK, "first 16": "grey", "all words": GREEN}


@dataclass
class Settings(Config):
    n: int = 2048          # labels a round
    aided: int = 3         # rounds after the first


def measure(cfg: Settings, texts, gold: np.ndarray) -> tuple[dict, dict]:
    """texts, lists of words; gold (N,) -> arm -> a row for each round; arm -> its last model."""
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
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
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
    keep(cfg, "recursive_reward_modelling", findings(seeds, trained, learned),
         {"halves": seeds, "PPO": trained, "transformers": learned}, draw(seeds, trained))
