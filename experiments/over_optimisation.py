"""When does more reward stop being better?

    python -m experiments.over_optimisation   # after `make seeds`; about an hour on one core

Claim: the true reward R, gold, rises with d = sqrt KL and then falls, R = d (alpha - beta d) for
best-of-n and d (alpha - beta log d) for RL, the sooner the fewer the labels (Gao et al. 2022,
arXiv:2210.10760); the minimum of an ensemble, or its mean less its variance, all but prevents it
(Coste et al. 2023, arXiv:2310.02743).
Design: reward models from 100 to 20,000 of the machine's labels of whole samples (no pieces), five
subsets each (up to 3,000 disjoint; of 20,000 any two share 15,000 and more), on one base model; passes over them as in learning_curve.py.
Gold, in standard deviations of the base: VADER, the labeller itself as an oracle, and AFINN and
Pattern, which no reward knows. Best of n to 1,024 of 16,000 fresh samples; PPO from one subset of
300, 3,000 and 20,000 to 20 nats, judged on its own rollouts. Both forms are fitted to the lower
half of the KL and asked about its end. Remedy: the five models of 300 labels each, standardised on
the base, as one reward. Controls: their plain mean; one model of the same 1,500 labels; best-of-n
by the oracle. Intervals: jackknife, leaving out a subset and a fifth of the samples at a time; of
ensembles and PPO the samples alone.
Predicted (known: seed 0's AUC .57, .70, .78, .84 of 300, 1,600, 6,400, 22,118 labels; 04 to 10
nats): (1) AUC .53, .57, .66, .74, .83. (2) Best-of-n loses nothing: from n = 32 to 1,024 no size
falls by .1 sd of VADER. (3) PPO with 300 labels peaks before 10 nats and then loses .2 sd of VADER;
with 3,000 it stands still from 10 to 20 nats, within .1; with 20,000 it gains, by AFINN .5. (4) The
end of best-of-n is within .1 of its form; PPO's is within .15 of the log form, while d (alpha -
beta d), taking the saturation of a bounded judge for a fall, predicts .3 too little. (5) At n =
1,024 minimum and mean less variance are .1 sd of VADER ahead of their members, but the mean is as
good, and one model of all their labels .2 better; in PPO the minimum is .2 ahead at 20 nats.
Left out: labels by a person, comparisons, more than one base model and one run of PPO a reward.
"""
import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments import BLACK, BLUE, GREEN, ORANGE, PINK, RED, Config, keep, lines, load_run, plt
from experiments import over_seeds
from experiments.overseers import targets
from experiments.ppo import stage
from experiments.proxies import NS, RULES, best_of_n, climb, happy, jackknife, learned, rm, subset
from model import chunked
from report.text import judge
from running import auc, start

ev = importlib.import_module("05_eval")
FIGURES = ("reward", "vader", "afinn", "pattern")
FORMS = {"d (a - b d)": lambda d: d, "d (a - b log d)": np.log}
FACTS = ("at the end", "added by the upper half", *(f"the end less {form}" for form in FORMS))
STYLES = [{f"best of n, {name}": ("o-", colour, label) for name, colour, label in (
              ("100", PINK, "100 labels"), ("300", RED, "300"), ("1000", ORANGE, "1,000"),
              ("3000", GREEN, "3,000"), ("20000", BLUE, "20,000"), ("VADER", BLACK, "VADER"))},
          {f"PPO, {name}": ("o-", colour, None) for name, colour in (
              ("300", RED), ("3000", GREEN), ("20000", BLUE))},
          {f"{how}, 300{rule}": (style, colour, label if how == "best of n" else None)
           for how, style in (("best of n", "s--"), ("PPO", "o-")) for rule, colour, label in (
              ("", RED, "one of five"), (", mean", ORANGE, "their mean"),
              (", minimum", BLUE, "their minimum"), (", less variance", GREEN, "less variance"),
              (", all five", BLACK, "one model of all labels"))}]


@dataclass
class Settings(Config):
    runs: tuple[Path, ...] = (Path("out-0"),)
    labels: tuple[int, ...] = (100, 300, 1000, 3000, 20_000)
    n: int = 16_000        # samples of the base model
    climbed: tuple[int, ...] = (300, 3000, 20_000)  # by PPO
    together: int = 300    # labels of each of five models that PPO climbs as one
    batch: int = 1024      # of PPO
    iterations: int = 48   # at most
    kl_stop: float = 20.0  # nats


def fit(kl: np.ndarray, gold: np.ndarray, form) -> tuple[np.ndarray, np.ndarray]:
    """Least squares on the lower half of the KL -> (alpha, beta), and what they say of all (K,)."""
    d, low = kl ** 0.5, kl <= kl.max() / 2
    terms = np.stack((d, -d * form(d)), 1)                                           # (K, 2)
    both = np.linalg.lstsq(terms[low], gold[low], rcond=None)[0]
    return both, terms @ both


def facts(kl: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """The four FACTS of one judge."""
    said = [fit(kl, gold, form)[1][-1] for form in FORMS.values()]
    return gold[-1] - np.array([0, gold[kl <= kl.max() / 2][-1], *said])


def measure(cfg: Settings, run, device, dtype) -> dict:
    base, _, _, tokenizer, report = load_run(run, device, dtype)
    seed, length = report["seed"], report["length"]
    labels = rm.read_labels(run / "labels-vader.jsonl")
    sets = {str(n): [subset(labels, i, n, seed) for i in range(5)] for n in cfg.labels}
    few = str(cfg.together)
    sets[f"{few}, all five"] = [sum(sets[few], [])]
    models = {name: [learned(base, rows, len(labels)) for rows in each]
              for name, each in sets.items()}

    def said(y):
        return np.stack([*judge(tokenizer.decode_batch(y.tolist())).values()], 1)    # (N, 3)
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
    for name, members, rule in [(str(n), 1, "mean") for n in cfg.climbed] + [
            (few, 5, rule) for rule in ("minimum", "less variance")]:
        each, x = happy(models[name][:members]), pool[name][:, :members]

        def reward_fn(y, prompt):
            return RULES[rule](((each(y, prompt) - x.mean(0)) / x.std(0)).T)
        found[f"PPO, {name}" + f", {rule}" * (members > 1)] = climb(
            base, reward_fn, lambda y: (said(y) - mean) / sd, length, stage.Config(
                seed=seed, batch=cfg.batch, max_batch=cfg.batch, kl_samples=cfg.batch // 8,
                reward_samples=2 * cfg.batch, max_iterations=cfg.iterations), cfg.kl_stop)
    truth = targets(judges[:, 0])
    ranks = {name: [auc(z, truth) for z in pool[name].T.numpy(force=True)] for name in pool}
    return {"lines": found, "AUC": ranks}


def findings(seed: dict) -> dict[str, list]:
    found = {f"AUC, {name}": x for name, x in seed["AUC"].items()}
    for arm, (kl, line) in seed["lines"].items():
        for j, who, n in ((1, "vader", 4), (2, "afinn", 2)):
            values = jackknife(lambda curve: facts(kl, curve[:, j]), line)           # (5, 4)
            found |= {f"{who}, {arm}: {what}": x for what, x in zip(FACTS[:n], values.T)}
    return found


def rows(kl: np.ndarray, line: np.ndarray) -> list[dict]:
    """Of each policy: KL, figures, and half their intervals."""
    values = jackknife(lambda curve: curve, line)                                    # (5, K, F)
    return [{"kl": x} | {name: value for figure, y in zip(FIGURES, each.T)
                         for name, value in zip((figure, f"{figure}_half"), over_seeds(y))}
            for x, each in zip(kl, values.swapaxes(0, 1))]


def draw(seed: dict):
    fig, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    table = {arm: rows(*line) for arm, line in seed["lines"].items()}
    for j, who in ((1, "vader"), (2, "afinn")):
        for ax, styles, title, form in zip(axes[j - 1], STYLES, (
                "best of n (dashes: fitted below 3 nats)", "PPO (dashes: fitted below 10 nats)",
                "five models of 300 labels: best of n, PPO"), (*FORMS.values(), None)):
            lines(ax, [table], styles, "kl", who, title=title, ylabel=f"{who}, sd of the base",
                  xticks=(0.2, 1, 2, 3, 4.5, 6) if "below 3" in title else (0.5, 2, 5, 10, 15, 20))
            for arm in styles if form else ():
                if arm in seed["lines"]:
                    kl, line = seed["lines"][arm]
                    said = fit(kl, line[0, :, j], form)[1]
                    ax.plot(kl, said, "--", color=styles[arm][1], lw=1)
    axes[0, 0].legend(fontsize=8), axes[0, 2].legend(fontsize=8)
    return fig


if __name__ == "__main__":
    cfg, device, dtype = start(Settings, __doc__)
    seed, = [measure(cfg, run, device, dtype) for run in cfg.runs]
    results = {arm: {"rows": rows(*line), "fits": {who: {
        form: fit(line[0], line[1][0, :, j], f)[0].tolist() for form, f in FORMS.items()}
        for j, who in enumerate(FIGURES)}} for arm, line in seed["lines"].items()}
    keep(cfg, "over_optimisation", findings(seed), results, draw(seed))
