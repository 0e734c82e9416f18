"""How good could any policy be at this distance from the base model, and how near does PPO come?

    python -m experiments.frontier       # after `make seeds`; three minutes a seed on one core

Claim: KL is the distance from the base model pi_0, in nats (log 2 nats are one bit). RL with a
penalty of beta a nat is variational inference of pi*_beta(x) = pi_0(x) exp(r(x) / beta) / Z, and no
policy at the same KL has a higher mean reward (Korbak et al. 2022, arXiv:2205.11275). With r =
log p(happy | x) and beta = 1 it is Bayes' posterior of a text given "happy". The gap from that,
KL(pi || pi*_1) = log Z - E[r] + KL(pi || pi_0), is said to grow with every step of PPO.

Design: We draw 16,384 samples of the base model. Weights exp(r / beta), divided by their sum, make
pi*_beta of them: the frontier. We follow it while the effective sample size, (sum w)^2 / sum w^2,
is at least 200. We compare it with
- best-of-n: draw n samples, keep the best;
- filtering: keep samples with p(happy) > t. The KL is -log of the fraction kept;
- rejection: keep x with probability p(happy | x), which draws from the posterior itself;
- PPO: 04's checkpoints, as 05 measured them.

Controls: Does the gap grow with any change at all? We measure it for best-of-n. We also measure it
for policies a small part of the way from the base model's weights to the final ones, by importance
weights on the base model's samples.

Predicted (known before: seed 0's checkpoints and best-of-n, and first estimates of the gap, 0.27
nats for the base model and 8.7 for the end):
1. The posterior is 0.2 nats away. On each seed, the frontier reaches r = -0.10 before 0.6 nats, and
   PPO at seven or more.
2. Best-of-n lies within 0.03 of the frontier's reward.
3. Every checkpoint is farther from the posterior than the base model, and than the one before it.
4. The controls come nearer: best-of-2 to less than 0.1 nats, a twentieth of PPO's way by about
   0.02.
5. By AFINN (a lexicon that the reward never saw) at equal KL, this reward's frontier leads PPO only
   up to 3 nats. AFINN's own frontier leads everywhere.

Found (mean +- half the 95% interval over three seeds):
1. The posterior is 0.20 +- 0.03 nats away. The nats needed to reach r = -0.10:

       at best         best-of-n       filtering       PPO
       0.51 +- 0.15    0.59 +- 0.07    0.63 +- 0.15    7.2 +- 2.8 (by seed: 6.3, 6.8, 8.5)

   PPO spends fourteen times too much.
2. Right: best-of-n lies within 0.013.
3. Right for 29 policies of 29. The gap is 0.39 +- 0.09 for the base model, 0.46 +- 0.14 for the
   first checkpoint, 9.3 +- 1.0 at the end.
4. Best-of-2 is 0.011 +- 0.009 away: nearly the posterior. A twentieth of PPO's way leads nearer, by
   0.039 +- 0.014. A fifth leads farther away, by 0.13 +- 0.06.
5. Wrong, and too kind to PPO: best-of-n leads it as far as it goes, to 4.5 nats. PPO has as much
   AFINN at 9.6 and 8.0 nats on two seeds, and nowhere on the third. One standard deviation (sd)
   more of AFINN costs 0.47 +- 0.02 nats at best, 1.16 +- 0.04 by best-of-n, 3.3 +- 1.0 by PPO. At
   r = -0.10, distinct-2 (the fraction of distinct word pairs) is 0.90 for all but PPO
   (0.81 +- 0.03).

Left out: Rewards that no sample of the base model reaches. There best-of-n ends, at log n nats, and
PPO goes on.
Take away: If a few samples of the base model reach your goal, draw a few and choose. RL must earn
its KL elsewhere.
What would change my mind: A policy with r = -0.10 within a nat of the frontier.
"""
import importlib
from dataclasses import dataclass

import numpy as np
from scipy.stats import sem
from tqdm import tqdm

from experiments.shared.ppo import part_way
from experiments.shared.results import ink, lines, panels, save_results
from experiments.shared.reweighting import INVERSE_BETAS, at, tilt
from experiments.shared.runs import Config, load_run
from model import chunked, start

ev = importlib.import_module("05_eval")
FILTERS, PARTS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98), (0.02, 0.05, 0.1, 0.2)
STYLES = {"frontier": ("-", ink.black, "best possible for this reward"),
          "AFINN's frontier": (":", ink.black, "best possible for AFINN"),
          "best_of_n": ("s--", ink.blue, "best of n"), "filtering": ("^-.", ink.green, "filtering"),
          "ppo": ("o-", ink.red, "PPO")}


@dataclass
class Settings(Config):
    n: int = 16384            # samples of the base model
    n_part: int = 4096        # those used for the control


def frontier(score, figures: dict[str, np.ndarray], enough: float = 200) -> list[dict]:
    """Trace the line that no policy can lie above: "kl", "log_z", each figure, their intervals."""
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


def kept(where: np.ndarray, figures: dict[str, np.ndarray]) -> dict:
    """Measure the samples kept by `where` (N,) bool: KL from all, each figure and its error."""
    row = {"share": float(where.mean()), "kl": float(-np.log(where.mean()))}
    for name, x in figures.items():
        row[name], row[f"{name}_se"] = float(x[where].mean()), float(sem(x[where]))
    return row


def small_step(log_ratio: np.ndarray, score: np.ndarray) -> dict:
    """Estimate the KL and the rise in mean score of a policy with log pi / pi_0 (N,) on samples of
    the base, by importance weights w. Knowing that w - 1 has mean 0 lowers the noise."""
    w = np.exp(log_ratio)
    kl, rise = w * log_ratio - (w - 1), (w - 1) * (score - score.mean())
    nearer = rise - kl
    return {"kl": kl.mean(), "rise": rise.mean(), "nearer": nearer.mean(),
            "nearer_half": 1.96 * sem(nearer)}


def with_gap(row: dict, log_z: tuple[float, float]) -> dict:
    """Add the KL to pi*_1. Summed errors are wide enough, whatever their correlation."""
    half = 1.96 * (row.get("kl_se", 0) + row["reward_se"] + log_z[1])
    return row | {"gap": log_z[0] - row["reward"] + row["kl"], "gap_half": half}


def measure(cfg: Settings, run, device, dtype) -> dict:
    reference, reward_fn, _, tokenizer, report = load_run(run, device, dtype)
    stream = report["seed"] << 32 | 7 << 24  # random numbers; 04 uses 3 and 4, 05 uses 5
    y, _ = reference.generate(cfg.n, report["length"], stream)
    prompt, texts = y[:, :0], tokenizer.decode_batch(y.tolist())
    score = chunked(reward_fn, 256, y, prompt).double().numpy(force=True)
    afinn = ev.judge(texts)["afinn"]
    figures = {"reward": score, "afinn": (afinn - afinn.mean()) / afinn.std()}
    uniform = np.random.default_rng(report["seed"]).random(cfg.n)
    line, best = frontier(score, figures), ev.best_of_n(score, figures, texts)
    for row in line:
        drawn = uniform < np.exp((score - score.max()) * row["inverse_beta"])  # rejection
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
    logp = []  # for the control
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
    fig, axes = panels(2, 2, 11, 8)
    lines(axes[0, 0], seeds, STYLES, "kl", "reward", ylabel="mean log p(happy)", title="The reward")
    lines(axes[0, 1], seeds, STYLES, "kl", "afinn", ylabel="sd of the base", title="AFINN's mean")
    lines(axes[1, 0], seeds, STYLES, "kl", "gap", ylabel="KL(policy || posterior), nats",
          title="Away from the posterior (dotted: as far as the base is)", yscale="log")
    lines(axes[1, 1], seeds, STYLES, "reward", "distinct_2", title="Distinct-2 by the mean reward")
    axes[1, 0].axhline(seeds[0]["ppo"][0]["gap"], ls=":", color=ink.red)
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
    save_results(cfg, "frontier", findings(seeds), seeds, draw(seeds))
