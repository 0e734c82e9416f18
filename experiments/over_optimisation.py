"""When does more reward stop being better?

    python -m experiments.over_optimisation   # after `make seeds`; two hours on one core

Claim: Let d be sqrt KL, where KL is the distance from the base model in nats. The true reward,
called gold, rises with d and then falls: as d (a - b d) in best-of-n and as d (a - b log d) in RL.
The fewer the labels, the sooner it falls (Gao et al. 2022, arXiv:2210.10760). An ensemble all but
prevents this if its reward is the minimum of its members, or their mean less their variance (Coste
et al. 2023, arXiv:2310.02743).

Design: Reward models learn from 100 to 20,000 of the machine's labels of whole samples, not parts,
all on one base model. Each size has five subsets. They are disjoint up to 3,000 labels; any two of
20,000 share 15,000. Gold is measured in standard deviations (sd) of the base model. The oracle is
VADER, the labeller. AFINN and Pattern are lexicons that no reward knows. Best-of-n follows each
reward up to n = 1,024, on 16,000 fresh samples. PPO follows the first subset of 300 and of 20,000
labels, and all five of 3,000, to 20 nats. It is judged on its own rollouts. We fit both forms to
the lower half of the KL and ask them for its end. The remedy: five models of 300 labels, each
standardised on the base model, act as one reward. Intervals come from a jackknife over fifths of
the samples, and over subsets too for best-of-n by single models.

Controls: The plain mean of the five; one model of the same 1,500 labels; best-of-n by the oracle;
PPO by 3,000 *shuffled* labels.

Predicted. I knew 04 up to 10 nats, and seed 0's AUC for 300, 1,600, 6,400 and 22,118 labels: 0.57,
0.70, 0.78 and 0.84. AUC is the chance that a positive text scores above a negative one.
1. From 100 to 20,000 labels, the AUC is 0.53, 0.57, 0.66, 0.74 and 0.83.
2. Best-of-n loses nothing: from n = 32 to 1,024, no size falls by 0.1 sd of VADER.
3. PPO with 300 labels peaks before 10 nats and then loses 0.2 sd of VADER. With 3,000 it stands
   still from 10 to 20 nats, within 0.1. With 20,000 it gains, by AFINN 0.5.
4. Best-of-n ends within 0.1 of its form, and PPO within 0.15 of the log form. d (a - b d) predicts
   0.3 too little, because it takes the saturation of a bounded judge for a fall.
5. At n = 1,024, minimum and mean less variance are 0.1 sd of VADER ahead of their members. The mean
   is as good, and one model of all their labels is 0.2 better. In PPO the minimum is 0.2 ahead at
   20 nats.
6. (Added when 1 to 5 were known, before it ran.) Shuffled labels move VADER by less than 0.2 sd.
7. (Of 04's present rates; 1 to 5 and 04's logs were known.) VADER's ends are within 0.15 of before,
   and its gains after 10 nats half of that. AFINN falls by 0.2 sd from its peak with 3,000 and with
   20,000 labels.
8. (Added when all of the above was known, before it ran.) With the second to the fifth subset of
   3,000 labels, AFINN ends at least 0.3 sd below its best in three of four, and VADER at least 0.05
   sd in two of four.

Found (seed 0):
1. Nearly right, but 20,000 labels do better.
2. Right. From n = 32 on, VADER gains on average with every size:

       labels          100             300             1,000           3,000           20,000
       AUC             0.55 +- 0.02    0.56 +- 0.02    0.64 +- 0.01    0.74 +- 0.01    0.88 +- 0.00
       VADER's gain    0.07 +- 0.26    0.15 +- 0.31    0.10 +- 0.22    0.21 +- 0.18    0.18 +- 0.02

3, 7. Half right. PPO with the first 3,000 labels over-optimises. From 15.6 to 20.4 nats AFINN falls
   from 2.65 to 1.88, and VADER from 1.26 to 1.16, while the reward stays at 0.61. With 300 labels
   AFINN falls from 1.49 to 1.21, and VADER stands still from 15 nats on. With 20,000 nothing falls:

       labels                        300              3,000            20,000
       VADER's gain after 10 nats    0.16 +- 0.07     0.14 +- 0.07     0.14 +- 0.06
       VADER at the end              0.90 +- 0.07     1.16 +- 0.02     1.26 +- 0.04
       AFINN at its best             1.49 +- 0.05     2.65 +- 0.13     2.96 +- 0.11
       AFINN at the end              1.21 +- 0.10     1.88 +- 0.15     2.89 +- 0.11
       VADER less log form (4)       -0.25 +- 0.10    -0.34 +- 0.12    -0.35 +- 0.11
       VADER less d (a - b d) (4)    -0.30 +- 0.15    -0.29 +- 0.17    -0.26 +- 0.18

4. Best-of-n: right but for 1,000 labels (-0.14 +- 0.18) and the oracle (+0.28 +- 0.04). PPO: wrong.
   Both forms predict too much (the last two rows above).
5. Right. VADER by best-of-n: members 0.44 +- 0.35, minimum 0.75 +- 0.29, mean less variance
   0.84 +- 0.42, mean 0.83 +- 0.42, one model of all their labels 0.99 +- 0.37. By PPO: one member
   0.90 +- 0.07, minimum 1.12 +- 0.02, mean less variance 1.12 +- 0.05. Both gain to the end.
6. Wrong. PPO by shuffled labels moves VADER by 0.65 +- 0.04, and best-of-n by -0.49 +- 0.64. By
   chance these labels still rank a little better than a coin (AUC 0.522), and PPO climbs that.
8. Wrong: one of four. Both judges fall with the first two subsets, and hardly or not at all with
   the other three, while no reward falls by 0.01. The five models rank alike (AUC 0.74 to 0.75):

       3,000 labels, set   1             2             3             4             5
       AFINN at its best   2.65 +- 0.13  2.17 +- 0.19  2.59 +- 0.14  3.06 +- 0.13  3.53 +- 0.11
       AFINN at the end    1.88 +- 0.15  1.68 +- 0.10  2.45 +- 0.16  3.02 +- 0.13  3.53 +- 0.11
       VADER at its best   1.26 +- 0.03  1.13 +- 0.02  1.16 +- 0.04  1.26 +- 0.02  1.26 +- 0.02
       VADER at the end    1.16 +- 0.02  1.03 +- 0.05  1.14 +- 0.04  1.23 +- 0.04  1.26 +- 0.02

Left out: A person's labels, comparisons, more than one run of PPO a reward, more shuffles.
Take away: With few labels, more reward can be worse, and the reward model's AUC does not tell when:
from 15 nats on, two judges fall with two of five sets of 3,000 labels. Five models as one reward,
or 20,000 labels, gain up to 20, in one run each.
What would change my mind: PPO with other random numbers, by which nothing falls with the first two.
"""
import copy
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from experiments.shared.ppo import ppo, stage
from experiments.shared.results import ink, lines, over_seeds, panels, save_results
from experiments.shared.runs import Config, load_run
from experiments.shared.simulated_people import targets
from model import chunked, start

ev, rm = importlib.import_module("05_eval"), importlib.import_module("03_reward_model")
NS = tuple(2 ** k for k in range(1, 11))
FIGURES = ("reward", "vader", "afinn", "pattern")
FORMS = {"d (a - b d)": lambda d: d, "d (a - b log d)": np.log}  # Gao et al. 2022: best-of-n, RL
FACTS = ("at the end", "added by the upper half", *(f"the end less {form}" for form in FORMS))
RULES = {"mean": lambda z: z.mean(0), "minimum": lambda z: z.amin(0),  # z (members, B) -> (B,)
         "less variance": lambda z: z.mean(0) - 0.5 * z.var(0, correction=0)}
COLOURS = {"100": ink.pink, "300": ink.red, "1000": ink.orange, "3000": ink.green,
           "20000": ink.blue, "VADER": ink.black, "shuffled": ink.sky}
REMEDIES = {"": ink.red, ", mean": ink.orange, ", minimum": ink.blue, ", less variance": ink.green,
            ", all five": ink.black}


# ---- Reward models -------------------------------------------------------------------------------
def subset(rows: list, i: int, n: int, seed: int) -> list:
    """Pick n of the rows. Subsets i = 0 to 4 are disjoint if n is at most a fifth of the rows."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[k] for k in np.roll(order, -(i * len(rows) // 5))[:n]]


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    """Deal the same labels to the same texts at random."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [row | {"label": rows[k]["label"]} for row, k in zip(rows, order)]


def learned(base, rows: list[dict], of: int):
    """Train the base model as 03 does, on these of `of` labels. Few rows get more passes."""
    model, cfg = copy.deepcopy(base), rm.Config()
    phase, = rm.phases_of([item | {"part": "train"} for item in rm.pool(rows, 1.0)], cfg)
    phase.epochs *= min(8, (of / len(rows)) ** 0.5)
    rm.train(model, phase, cfg)
    return model


def happy(models: list):
    """Return a function: tokens (B, T), prompt (B, P) -> log p(happy) by model, (B, models)."""
    return lambda y, prompt: torch.stack([m.sentiment(y, prompt)[:, 0].double() for m in models], 1)


# ---- A reward is followed ------------------------------------------------------------------------
# A line (6, K, F) holds the means of F figures (the score, then the judges) of K policies: first
# over all samples, then five times without one fifth of them.
@cache
def weights(N: int) -> np.ndarray:
    return np.stack([ev.best_of_n_weights(N, n) for n in NS])                        # (K, N)


def best_of_n(scores: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Return the line of best-of-n by one of S reward models, averaged over the S. scores: (S, N)
    of N samples; said: judges (N, F - 1). The i-th fifth is left out with the i-th model."""
    def line(scores, said):
        each = [np.column_stack((s, said))[np.argsort(s, kind="stable")] for s in scores]
        return weights(len(said)) @ np.mean(each, 0)
    fifth, parts = np.arange(len(said)) % 5, [line(scores, said)]
    for i in range(5):
        rest = np.delete(scores, i, 0) if len(scores) > 1 else scores
        parts.append(line(rest[:, fifth != i], said[fifth != i]))
    return np.stack(parts)


def climb(base, reward_fn, judged, length: int, cfg, kl_stop: float) -> tuple:
    """Run PPO on this reward, by cfg (04's Config) -> KL (K,) and the line of its rollouts. Both
    go from after the first update to just beyond kl_stop."""
    heard, kl, means, fifth = [], [], [], np.arange(cfg.batch) % 5

    def hear(y, prompt):
        score = reward_fn(y, prompt)
        heard.append(np.column_stack((score.numpy(force=True), judged(y))))
        return score.float()
    for row in ppo(copy.deepcopy(base), base, hear, length, cfg):
        said = np.concatenate(heard)[-cfg.batch:]  # ppo first scores others, to standardise by
        heard.clear()
        kl.append(row["kl"])
        means.append([said.mean(0)] + [said[fifth != i].mean(0) for i in range(5)])
        if row["kl"] > kl_stop:
            break
    return np.array(kl[1:]), np.stack(means[1:], 1)


# ---- What a line says ----------------------------------------------------------------------------
def jackknife(figure, lines: np.ndarray) -> np.ndarray:
    """Return five pseudo-values, whose mean and Student's interval are those of the figure (Tukey
    1958). figure: (K, F) -> array; lines: (6, K, F)."""
    whole, *less = [figure(line) for line in lines]
    return np.stack([5 * whole - 4 * x for x in less])


def fit(kl, gold, form) -> tuple[np.ndarray, np.ndarray]:
    """Fit one of FORMS to the lower half of the KL (K,) by least squares -> its a and b, and the
    gold (K,) that it predicts everywhere."""
    d, low = np.maximum(kl, 1e-12) ** 0.5, kl <= kl.max() / 2  # rounding can make a KL -1e-8
    terms = np.stack((d, -d * form(d)), 1)                                           # (K, 2)
    both = np.linalg.lstsq(terms[low], gold[low], rcond=None)[0]
    return both, terms @ both


def facts(kl: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Return the four FACTS of one judge."""
    said = [fit(kl, gold, form)[1][-1] for form in FORMS.values()]
    return gold[-1] - np.array([0, gold[kl <= kl.max() / 2][-1], *said])


def table(kl: np.ndarray, lines: np.ndarray) -> list[dict]:
    """List each policy's KL, its figures, and half of their intervals."""
    values = jackknife(lambda line: line, lines)                                     # (5, K, F)
    rows = [{"kl": x} for x in kl]
    for k, row in enumerate(rows):
        for f, name in enumerate(FIGURES):
            row[name], row[f"{name}_half"] = over_seeds(values[:, k, f])
    return rows


def findings(seed: dict) -> dict[str, list]:
    """Collect each reward model's AUC and, by VADER and AFINN, pseudo-values of a line's facts."""
    found = {f"AUC, {name}": x for name, x in seed["AUC"].items()}
    for arm, (kl, line) in seed["lines"].items():
        for j, who, n in ((1, "vader", 4), (2, "afinn", 2)):
            values = jackknife(lambda x: facts(kl, x[:, j]), line)[:, :n]            # (5, n)
            found |= {f"{who}, {arm}: {what}": x for what, x in zip(FACTS, values.T)}
    return found


# ---- The experiment ------------------------------------------------------------------------------
@dataclass
class Settings(Config):
    runs: tuple[Path, ...] = (Path("out-0"),)
    labels: tuple[int, ...] = (100, 300, 1000, 3000, 20_000)
    n: int = 16_000        # samples of the base model
    climbed: tuple[int, ...] = (300, 3000, 20_000)  # labels of the rewards that PPO follows
    together: int = 300    # labels of each of the five models that act as one reward
    control: int = 3000    # labels of the shuffled model, and of five that PPO follows one by one
    batch: int = 1024      # for PPO
    iterations: int = 64   # at most
    kl_stop: float = 20.0  # nats


def measure(cfg: Settings, run, device, dtype) -> dict:
    base, _, _, tokenizer, report = load_run(run, device, dtype)
    seed, length = report["seed"], report["length"]
    labels = [row | {"spans": ()} for row in rm.read_labels(run / "labels-vader.jsonl")]
    sets = {str(n): [subset(labels, i, n, seed) for i in range(5)] for n in cfg.labels}
    few = str(cfg.together)
    sets[f"{few}, all five"] = [sum(sets[few], [])]
    sets["shuffled"] = [shuffled(sets[str(cfg.control)][0], seed)]
    models = {k: [learned(base, rows, len(labels)) for rows in each] for k, each in sets.items()}

    def said(y):
        return np.stack([*ev.judge(tokenizer.decode_batch(y.tolist())).values()], 1)    # (N, 3)
    y, _ = base.generate(cfg.n, length, seed << 32 | 7 << 24)  # random numbers; 04 uses 3, 4
    judges = said(y)
    mean, sd = judges.mean(0), judges.std(0)
    pool = {name: chunked(happy(each), 256, y, y[:, :0]) for name, each in models.items()}

    # -- best of n
    kl, found = np.array([ev.best_of_n_kl(n) for n in NS]), {}
    scores = {"VADER": torch.from_numpy(judges[:, :1].T)}
    for name, x in pool.items():
        scores[name] = z = ((x - x.mean(0)) / x.std(0)).T                            # (members, N)
        if len(z) > 1:
            scores |= {f"{name}, {rule}": f(z)[None] for rule, f in RULES.items()}
    for name, z in scores.items():
        found[f"best of n, {name}"] = kl, best_of_n(z.numpy(force=True), (judges - mean) / sd)

    # -- PPO
    climbs = {str(n): (str(n), [0], "mean") for n in (*cfg.climbed, "shuffled")}
    climbs |= {f"{few}, {rule}": (few, range(5), rule) for rule in ("minimum", "less variance")}
    climbs |= {f"{cfg.control}, subset {i + 1}": (str(cfg.control), [i], "mean")
               for i in range(1, 5)}
    for arm, (name, members, rule) in climbs.items():
        each, x = happy([models[name][i] for i in members]), pool[name][:, list(members)]

        def reward_fn(y, prompt):
            return RULES[rule](((each(y, prompt) - x.mean(0)) / x.std(0)).T)
        found[f"PPO, {arm}"] = climb(
            base, reward_fn, lambda y: (said(y) - mean) / sd, length, stage.Config(
                seed=seed, batch=cfg.batch, max_batch=cfg.batch, kl_samples=cfg.batch // 8,
                reward_samples=2 * cfg.batch, max_iterations=cfg.iterations), cfg.kl_stop)
    truth, pool = targets(judges[:, 0]), {k: x.T.numpy(force=True) for k, x in pool.items()}
    return {"lines": found, "AUC": {k: [rm.auc(one, truth) for one in x] for k, x in pool.items()}}


def draw(seed: dict):
    fig, axes = panels(2, 3, 13, 8)
    tables = {arm: table(*line) for arm, line in seed["lines"].items()}
    shown = [({f"{how}, {name}": ("o-", colour, name) for name, colour in COLOURS.items()},
               f"{how} (dashes: {form} of the lower half)", FORMS[form])
              for how, form in zip(("best of n", "PPO"), FORMS)]
    # thin lines, without a legend ("_"): the other four subsets
    shown[1][0].update({f"PPO, 3000, subset {i}": ("-", ink.green, "_") for i in range(2, 6)})
    shown.append(({f"{how}, 300{rule}": (style, colour, how + (rule or ", one of five"))
                    for how, style in (("best of n", "s:"), ("PPO", "o-"))
                    for rule, colour in REMEDIES.items()}, "five models of 300 labels", None))
    for j, who in ((1, "vader"), (2, "afinn")):
        for ax, (styles, title, form) in zip(axes[j - 1], shown):
            ticks = (0.2, 1, 2, 4, 6) + (10, 15, 20) * ("best" not in title)
            lines(ax, [tables], styles, "kl", who, title=title, xticks=ticks, ylabel=f"{who}, sd")
            for i, arm in enumerate(arm for arm in styles if arm in tables and "subset" not in arm):
                (kl, line), end, colour = seed["lines"][arm], tables[arm][-1], styles[arm][1]
                beside = end["kl"] * (1.02 + 0.02 * (i % 5))
                ax.errorbar(beside, end[who], end[f"{who}_half"], color=colour)
                if form:
                    ax.plot(kl, fit(kl, line[0, :, j], form)[1], "--", color=colour, lw=1)
    axes[1, 0].legend(fontsize=8), axes[0, 2].legend(fontsize=7)
    return fig


if __name__ == "__main__":
    cfg, device, dtype = start(Settings, __doc__)
    seed, = [measure(cfg, run, device, dtype) for run in cfg.runs]
    results = {arm: {"policies": table(kl, x), "a, b of vader": [
        fit(kl, x[0, :, 1], form)[0].tolist() for form in FORMS.values()]}
               for arm, (kl, x) in seed["lines"].items()}
    save_results(cfg, "over_optimisation", findings(seed), results, draw(seed))
