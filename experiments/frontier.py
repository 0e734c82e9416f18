"""How good could any policy be at this distance from the base model, and how near does PPO come?

    python -m experiments.frontier       # after `make seeds`; three minutes a seed on one core

Claim: RL with a penalty of beta a nat is variational inference of pi*_beta(x) = pi_0(x) exp(r(x) /
beta) / Z (Korbak et al. 2022, arXiv:2205.11275); no policy at its KL has a higher mean reward. With
r = log p(happy | x) and beta = 1 it is Bayes' posterior of a text given "happy"; the gap from it,
KL(pi || pi*_1) = log Z - E[r] + KL(pi || pi_0), is said to grow with every step of PPO.
Design: 16,384 samples of the base model. pi*_beta by weights exp(r / beta) over their sum, as far
as the effective samples, (sum w)^2 / sum w^2, are 200. Best of n; filtering at p(happy) > t, whose
KL is -log of the share kept; rejection, which keeps x with probability p(happy | x): the posterior
itself. 04's checkpoints, as 05 measured them. Control: does the gap grow with any change whatever?
That of best-of-n, and of policies a small part of the way from the base model to the final one, by
importance weights on the base's samples.
Predicted (known: seed 0's checkpoints and best-of-n, first estimates of the gap of .27 nats for the
base and 8.7 for the end): (1) the posterior is .2 nats away; the frontier has r = -.10 before .6
nats, PPO at seven or more, on each seed. (2) Best-of-n lies within .03 of the frontier's reward.
(3) Every checkpoint is farther from the posterior than the base, and than the one before. (4) The
control comes nearer: best-of-2 to less than .1, the first twentieth of PPO's way by about .02. (5)
By AFINN at equal KL this reward's frontier leads PPO up to 3 nats only; AFINN's own, everywhere.
Found, mean +- half the 95 % interval over three seeds: (1) the posterior is .148 +- .015 nats away.
r = -.10 costs .66 +- .11 nats at best, .70 +- .16 by best-of-n, .83 +- .13 by filtering, 6.0 +- 1.4
by PPO (5.8, 5.6, 6.7): nine times too much. (2) Best-of-n lies within .003. (3) So it is, 24
policies of 24: gaps of .23 +- .06 for the base, .58 +- .12 for the first, 9.4 +- .3 at the end. (4)
Best-of-2: .009 +- .002, nearly the posterior. A twentieth of PPO's way: nearer by .032 +- .006; a
fifth: farther by .05 +- .07. (5) Wrong in PPO's disfavour: it draws level with best-of-n at 2.2 to
3.1 nats. +1 sd of AFINN costs .47 +- .01 nats at best, 1.4 +- .2 by best-of-n, 1.7 +- .3 by PPO;
and at r = -.10 distinct-2 is .90 for all but PPO (.80 +- .02).
Left out: rewards that no sample of the base reaches; there best-of-n ends, at log n nats, and PPO
goes on. Take away: what a few samples of the base model reach, draw a few and choose; RL must earn
its KL elsewhere. What would change my mind: a policy within a nat of the frontier at r = -.10.
"""
import importlib
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from experiments import BLACK, BLUE, GREEN, RED, Config, keep, lines, load_run, plt
from experiments.ppo import part_way
from experiments.reweight import at, kept, small_step, tilt
from model import chunked, start

ev = importlib.import_module("05_eval")
INVERSE_BETAS = 2.0 ** np.arange(-3, 9.5, 0.5)
FILTERS, PARTS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98), (0.02, 0.05, 0.1, 0.2)
STYLES = {"frontier": ("-", BLACK, "best possible for this reward"),
          "AFINN's frontier": (":", BLACK, "best possible for AFINN"),
          "best_of_n": ("s--", BLUE, "best of n"), "filtering": ("^-.", GREEN, "filtering"),
          "ppo": ("o-", RED, "PPO")}


@dataclass
class Settings(Config):
    n: int = 16384            # samples of the base model
    n_part: int = 4096        # of which the control is measured


def frontier(score, figures: dict[str, np.ndarray], enough: float = 200) -> list[dict]:
    """The line that no policy can lie above; "kl", "log_z" and each figure with its interval."""
    def of(rows):
        kl, means, log_z, ess = tilt(score[rows], INVERSE_BETAS, values[rows])
        return np.column_stack((kl, log_z, means, ess))                          # (K, 3 + F)
    values, line = np.stack(list(figures.values()), 1), []                       # (N, F)
    rng, n = np.random.default_rng(0), len(score)
    resampled = [of(rng.integers(0, n, n)) for _ in range(200)]
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
    for inverse_beta, x, a, b in zip(INVERSE_BETAS, of(np.arange(len(score))), low, high):
        row = {"inverse_beta": inverse_beta, "ess": x[-1]}
        for j, name in enumerate(("kl", "log_z", *figures)):
            row |= {name: x[j], f"{name}_interval": (a[j], b[j])}
        line += [row] if x[-1] >= enough else []
    return line


def with_gap(row: dict, log_z: tuple[float, float]) -> dict:
    """And its KL to pi*_1; errors are added, wide enough whatever their correlation."""
    half = 1.96 * (row.get("kl_se", 0) + row["reward_se"] + log_z[1])
    return row | {"gap": log_z[0] - row["reward"] + row["kl"], "gap_half": half}


def measure(cfg: Settings, run, device, dtype) -> dict:
    reference, reward_fn, _, tokenizer, report = load_run(run, device, dtype)
    stream = report["seed"] << 32 | 7 << 24  # of random numbers; 04 has 3 and 4, 05 has 5
    y, _ = reference.generate(cfg.n, report["length"], stream)
    prompt, texts = y[:, :0], tokenizer.decode_batch(y.tolist())
    score = chunked(reward_fn, 256, y, prompt).double().numpy(force=True)
    afinn = ev.judge(texts)["afinn"]
    figures = {"reward": score, "afinn": (afinn - afinn.mean()) / afinn.std()}
    uniform = np.random.default_rng(report["seed"]).random(cfg.n)
    line, best = frontier(score, figures), ev.best_of_n(score, figures, texts)
    for row in line:
        drawn = uniform < np.exp((score - score.max()) * row["inverse_beta"])  # by rejection
        row |= ev.variety([text for text, taken in zip(texts, drawn) if taken])
    posterior, = (row for row in line if row["inverse_beta"] == 1)
    log_z = posterior["log_z"], np.ptp(posterior["log_z_interval"]) / 3.92
    for row in best:
        row["reward_se"] = np.ptp(row["reward_interval"]) / 3.92
    ppo = [kept(np.full(cfg.n, True), figures) | ev.variety(texts)]  # the base model
    for row in report["happy"][1:]:
        ppo.append({k: row[k] for k in ("kl", "kl_se", "distinct_2") if k in row} | {
            "reward": row["proxy"], "reward_se": row["proxy_se"],
            "afinn": (row["afinn"] - afinn.mean()) / afinn.std()})
    logp = []  # of the control
    for part in (0.0, *PARTS):
        policy = part_way(run, part, device)
        each = chunked(policy.logprob, 256, y[: cfg.n_part], prompt[: cfg.n_part])
        logp.append(each.double().sum(1).numpy(force=True))
    parts = [{"part": part} | small_step(x - logp[0], score[: cfg.n_part])
             for part, x in zip(PARTS, logp[1:])]
    return {"frontier": line, "AFINN's frontier": frontier(figures["afinn"], figures),
            "filtering": [kept(score > np.log(t), figures) for t in FILTERS],
            "best_of_n": [with_gap(row, log_z) for row in best],
            "rejection": kept(uniform < np.exp(score), figures), "parts": parts,
            "ppo": [with_gap(row, log_z) for row in ppo]}


def draw(seeds: list[dict]):
    fig, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    lines(axes[0, 0], seeds, STYLES, "kl", "reward", ylabel="mean log p(happy)", title="The reward")
    lines(axes[0, 1], seeds, STYLES, "kl", "afinn", ylabel="sd of the base", title="AFINN's mean")
    lines(axes[1, 0], seeds, STYLES, "kl", "gap", ylabel="KL(policy || posterior), nats",
          title="Away from the posterior (dotted: as far as the base is)", yscale="log")
    lines(axes[1, 1], seeds, STYLES, "reward", "distinct_2", title="Distinct-2 by the mean reward")
    axes[1, 0].axhline(seeds[0]["ppo"][0]["gap"], ls=":", color=RED)
    axes[0, 1].legend(fontsize=8)
    return fig


def findings(seeds: list[dict]) -> dict[str, list]:
    found = {f"{y} at {x} {value}, {name}": [at(s[name], x, value, y) for s in seeds]
             for x, value, y in (("inverse_beta", 1, "kl"), ("reward", -0.1, "distinct_2"),
                                 *(("reward", r, "kl") for r in (-0.4, -0.3, -0.2, -0.1)),
                                 ("afinn", 1, "kl"))
             for name in STYLES if x in seeds[0][name][0]}
    for line, i in (("ppo", 0), ("ppo", 1), ("ppo", -1), ("best_of_n", 1)):
        found[f"gap of {line}, {i}"] = [s[line][i]["gap"] for s in seeds]
    for i, part in enumerate(PARTS):
        found[f"nearer by, {part:.0%} of the way"] = [s["parts"][i]["nearer"] for s in seeds]
    return found


if __name__ == "__main__":
    cfg, device, dtype = start(Settings, __doc__)
    seeds = [measure(cfg, run, device, dtype) for run in tqdm(cfg.runs, desc="seeds")]
    keep(cfg, "frontier", findings(seeds), seeds, draw(seeds))
