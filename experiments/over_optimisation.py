"""When does more reward stop being better?

    python -m experiments.over_optimisation   # after `make seeds`; 39 minutes on one core

Claim: the true reward, gold, rises with d = sqrt KL and then falls, as d (a - b d) in best-of-n and
d (a - b log d) in RL, the sooner the fewer the labels (Gao et al. 2022, arXiv:2210.10760); taking
the minimum of an ensemble, or its mean less its variance, all but prevents it (Coste et al. 2023,
arXiv:2310.02743).
Design: reward models from 100 to 20,000 of the machine's labels of whole samples (no pieces), five
subsets each (disjoint up to 3,000; of 20,000 any two share 15,000), on one base model. Gold, in
standard deviations of the base: VADER, the labeller as an oracle; AFINN and Pattern, which no
reward knows. Best of n to 1,024, of 16,000 fresh samples; PPO by the first subset of 300, 3,000 and
20,000 to 20 nats, judged on its own rollouts. Both forms are fitted to the lower half of the KL and
asked about its end. Remedy: the five models of 300 labels, each standardised on the base, as one
reward. Controls: their plain mean; one model of the same 1,500 labels; best-of-n by the oracle; PPO
by 3,000 *shuffled* labels. Intervals: jackknife over fifths of the samples, of best-of-n by single
models over subsets too.
Predicted (known: seed 0's AUC .57, .70, .78, .84 of 300, 1,600, 6,400, 22,118 labels; 04 to 10
nats): (1) AUC .53, .57, .66, .74, .83. (2) Best-of-n loses nothing: from n = 32 to 1,024 no size
falls by .1 sd of VADER. (3) PPO with 300 labels peaks before 10 nats and then loses .2 sd of VADER;
with 3,000 it stands still from 10 to 20 nats, within .1; with 20,000 it gains, by AFINN .5. (4) The
end of best-of-n is within .1 of its form; PPO's is within .15 of the log form, while d (a - b d),
taking the saturation of a bounded judge for a fall, predicts .3 too little. (5) At n = 1,024
minimum and mean less variance are .1 sd of VADER ahead of their members, the mean is as good, and
one model of all their labels .2 better; in PPO the minimum is .2 ahead at 20 nats. (6) Later, known
(1) to (5), before it was run: shuffled labels move VADER by less than .2 sd. (7) Of 04's present
rates (known: (1) to (5), 04's logs): VADER's ends are within .15 of before, its gains after 10 nats
half of that; AFINN falls by .2 sd from its peak with 3,000 and with 20,000 labels.
Found: (1) .54 +- .02, .57 +- .03, .64 +- .02, .73 +- .00, .86 +- .01. (2) From n = 32 on VADER
gains .14 +- .32, .05 +- .14, .24 +- .06, .23 +- .14, .15 +- .10. (3, 7) Wrong: all gain after 10
nats, .29 +- .05, .21 +- .08, .26 +- .05, to 1.27 +- .02, 1.38 +- .01, 1.35 +- .01; AFINN rises to
the end, to 5.4 +- .4, 5.9 +- .2, 6.1 +- .3. (With one rate for all of 04's layers VADER's ends were
.94, 1.28, 1.34, and AFINN's with 3,000 labels fell from 3.2 to 2.9.) (4) Best-of-n: right but for
300 labels (-.15 +- .14) and the oracle (+.27 +- .05). PPO: wrong, -.45 +- .08, -.36 +- .10, -.34 +-
.24; d (a - b d) -.80, -.32, -.30. (5) Members .37 +- .26, minimum .71 +- .47, less variance .86 +-
.31, mean .87 +- .31, one model of all labels 1.17 +- .03. PPO: minimum 1.19 +- .05, less variance
1.07 +- .05, behind one member. (6) So: .03 +- .05, after 20.6 nats.
Left out: a person's labels, comparisons; one run of PPO a reward. Take away: few labels make each
nat worth less; hardly one below 20 does harm. What would change my mind: PPO that loses .2 sd of
VADER before 20 nats, on two subsets.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments import (BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Config, keep, lines,
                         load_run, plt)
from experiments.overseers import targets
from experiments.ppo import stage
from experiments.proxies import (FORMS, NS, RULES, best_of_n, climb, ev, findings, fit, happy,
                                 learned, rm, shuffled, subset, table)
from model import chunked, start

COLOURS = {"100": PINK, "300": RED, "1000": ORANGE, "3000": GREEN, "20000": BLUE, "VADER": BLACK,
           "shuffled": SKY}
REMEDIES = {"": RED, ", mean": ORANGE, ", minimum": BLUE, ", less variance": GREEN,
            ", all five": BLACK}


@dataclass
class Settings(Config):
    runs: tuple[Path, ...] = (Path("out-0"),)
    labels: tuple[int, ...] = (100, 300, 1000, 3000, 20_000)
    n: int = 16_000        # samples of the base model
    climbed: tuple[int, ...] = (300, 3000, 20_000)  # by PPO
    together: int = 300    # labels of each of five models that PPO climbs as one
    control: int = 3000    # labels of a model that has them shuffled
    batch: int = 1024      # of PPO
    iterations: int = 64   # at most
    kl_stop: float = 20.0  # nats


def measure(cfg: Settings, run, device, dtype) -> dict:
    base, _, _, tokenizer, report = load_run(run, device, dtype)
    seed, length = report["seed"], report["length"]
    labels = rm.read_labels(run / "labels-vader.jsonl")
    sets = {str(n): [subset(labels, i, n, seed) for i in range(5)] for n in cfg.labels}
    few = str(cfg.together)
    sets[f"{few}, all five"] = [sum(sets[few], [])]
    sets["shuffled"] = [shuffled(sets[str(cfg.control)][0], seed)]
    models = {k: [learned(base, rows, len(labels)) for rows in each] for k, each in sets.items()}

    def said(y):
        return np.stack([*ev.judge(tokenizer.decode_batch(y.tolist())).values()], 1)    # (N, 3)
    y, _ = base.generate(cfg.n, length, seed << 32 | 7 << 24)  # stream of random numbers; 04: 3, 4
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
    fig, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    tables = {arm: table(*line) for arm, line in seed["lines"].items()}
    panels = [({f"{how}, {name}": ("o-", colour, name) for name, colour in COLOURS.items()},
               f"{how} (dashes: {form} of the lower half)", FORMS[form])
              for how, form in zip(("best of n", "PPO"), FORMS)]
    panels.append(({f"{how}, 300{rule}": (style, colour, how + (rule or ", one of five"))
                    for how, style in (("best of n", "s:"), ("PPO", "o-"))
                    for rule, colour in REMEDIES.items()}, "five models of 300 labels", None))
    for j, who in ((1, "vader"), (2, "afinn")):
        for ax, (styles, title, form) in zip(axes[j - 1], panels):
            ticks = (0.2, 1, 2, 4, 6) + (10, 15, 20) * ("best" not in title)
            lines(ax, [tables], styles, "kl", who, title=title, xticks=ticks, ylabel=f"{who}, sd")
            for i, arm in enumerate(arm for arm in styles if arm in tables):
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
    keep(cfg, "over_optimisation", findings(seed), results, draw(seed))
