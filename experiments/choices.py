"""What is each choice in 04_ppo.py worth, and is that more than noise?

    python -m experiments.choices        # after `make seeds`; 90 minutes on one core

Claim (to be tested): PPO's implementation details decide how well it does (Engstrom et al. 2020,
arXiv:2005.12729; Huang et al. 2024, arXiv:2403.17031).

Design: Each arm but the last is 04 with one choice changed, on three seeds, until the mean reward
log p(happy) reaches -0.10. We read off what it has cost by then: KL, the distance from the base
model in nats; samples of the policy; and variety. We also read off what outside judges say at that
reward. The arms:
- *batch mean*: the baseline is the batch's mean (RLOO), not the base model's;
- *batch mean and deviation*: rewards are also divided by the batch's deviation (GRPO);
- *batches of 1,024*, *of 4,096*: 16 minibatches each, as 04 has: of 64 and of 256;
- *two epochs* over each batch;
- *SGD*: 04's settings of an earlier version, which were tuned by hand: SGD with momentum, a head
  fifty times as fast as the rest, batches of 4,096, a baseline 0.35 deviations above the mean.

Controls: *permuted*: each sample gets the reward of another one. *Noise*: 04 again, with other CPU
kernels. They round otherwise, so within a few iterations the samples are others.

Predicted. I knew six seeds of 04 (7.4 +- 0.2 and 7.0 +- 0.2 nats at -0.10, mean +- sd), seeds 0 and
1 with batches of 2,048 (5.8 and 6.6 nats), and SGD against another reward model (7.0 nats where
AdamW had 7.3).
1. Noise moves the KL at -0.10 by 0.5 nats or more between the three CPU settings, on at least one
   seed.
2. Batch mean, and batch mean and deviation, are within 0.5 nats of 04: AdamW divides by the size of
   the gradient anyway. The mean of three seeds does not tell them from 04.
3. Batches of 1,024 need a nat more than 04 and a quarter fewer samples. Batches of 4,096 need a nat
   less and twice the samples.
4. Two epochs need a third fewer samples at about the same KL. They clip twice as much.
5. SGD is a nat ahead in KL, with 1.7 times the samples, a clip fraction below 1%, and the
   straightest sqrt KL.
6. Permuted rewards lead 1 to 3 nats away in 16 iterations, and the mean reward moves by less than
   0.03.
7. At a reward of -0.10 no arm's AFINN is more than 0.3 sd (standard deviations of the base model)
   away from 04's, and no arm's distinct-2 (the fraction of distinct word pairs) more than 0.03.

Found (+- half the 95% interval over three seeds; KL and samples less 04's by the same seed):

                                at -0.10: KL      samples             clip fraction    R2
       04                       7.2 +- 1.2        15,800 +- 4,100     2.5%             0.971
       batch mean               -0.3 +- 1.2       -6,200 +- 2,900     4.7%             0.996
       batch mean and deviation -0.7 +- 1.3       -6,300 +- 3,300     5.0%             0.996
       batches of 1,024         +0.4 +- 2.4       -4,700 +- 7,200     2.8%             0.974
       batches of 4,096         -1.4 +- 1.6       +18,600 +- 2,700    2.0%             0.975
       two epochs               -0.7 +- 1.2       -200 +- 1,900       4.4%             0.970
       SGD                      -2.3 +- 1.1       +8,900 +- 5,100     0.8%             0.998

1. Right on two seeds: the KL at -0.10 ranges over 0.4, 0.8 and 1.4 nats. At -0.30 it ranges over
   0.1, 0.1 and 0.3.
2. Right but for the deviation's 0.7 nats, on the mean of three seeds. What we did not predict: both
   need 40% fewer samples.
3. Wrong for 1,024: neither difference is clear. Right for 4,096, but the KL's interval includes 0.
4. Wrong: as many samples, at about the same KL. Right: they clip 1.8 times as much.
5. Too modest: SGD is 2.3 nats ahead. It is ahead at every reward: by 1.2 +- 0.1 nats at -0.30, 1.4
   +- 0.6 at -0.20. It is the only arm whose lead in KL excludes 0 everywhere. The rest is right.
6. Wrong: it leads 3.9, 4.0 and 6.5 nats away, and the mean reward moves by 0.09, 0.00 and -0.03.
7. Right for AFINN on the mean of three seeds. Two epochs keep more variety, by 0.05 +- 0.02.

Left out: each part of SGD's settings alone; a batch mean with SGD; other learning rates.
Take away: in KL, most choices are worth less than rounding. A baseline from the batch saves
samples, and large batches cost twice as many. SGD, with all that was tuned with it, saves KL. A
reason may be that AdamW takes full steps in directions of noise, as permuted rewards show.
What would change my mind: the same three seeds on another machine with another order of the arms.
"""
import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy.stats import linregress
from tqdm import tqdm

from experiments.shared.ppo import adamw, batch_mean, constant, ppo, stage
from experiments.shared.results import ink, over_seeds, panels, save_results
from experiments.shared.reweighting import at
from experiments.shared.runs import Config, ev, load_run
from model import start

JUDGES = ("vader", "afinn", "pattern")
COSTS = ("kl", "samples", *JUDGES, "distinct_2")


def batch_mean_and_deviation(score, mean, std):
    return (score - score.mean()) / score.std()


def zero_higher(score, mean, std):
    return constant(score, mean, std) - 0.35


def permuted(score, mean, std):
    g = torch.Generator().manual_seed(len(score))
    return constant(score, mean, std)[torch.randperm(len(score), generator=g).to(score.device)]


def sgd(policy, cfg):
    rest = [p for p in policy.parameters() if p is not policy.head]
    return torch.optim.SGD([{"params": rest, "lr": 0.0012}, {"params": [policy.head], "lr": 0.06}],
                           momentum=0.9)


# name -> what differs in 04's Config, its rewards and optimizer, colour
ARMS = {"04": ({}, constant, adamw, ink.red),
        "batch mean": ({}, batch_mean, adamw, ink.pink),
        "batch mean and deviation": ({}, batch_mean_and_deviation, adamw, ink.orange),
        "batches of 1,024": ({"batch": 1024, "minibatch": 64}, constant, adamw, ink.sky),
        "batches of 4,096": ({"batch": 4096, "minibatch": 256}, constant, adamw, ink.blue),
        "two epochs": ({"epochs": 2}, constant, adamw, ink.green),
        "SGD": ({"batch": 4096, "max_batch": 4096, "minibatch": 256, "warmup": 16}, zero_higher,
                sgd, ink.black),
        "permuted": ({"max_iterations": 17}, permuted, adamw, "grey")}


@dataclass
class Settings(Config):
    arms: tuple[str, ...] = tuple(ARMS)
    noise: tuple[str, ...] = ("ATEN_CPU_CAPABILITY=avx2", "ATEN_CPU_CAPABILITY=default")
    reward: float = -0.10  # each arm but "permuted" ends when its mean reward reaches this
    judged: int = 1024     # samples of each rollout that the judges read



def climb(cfg: Settings, arm: str, run, device, dtype) -> list[dict]:
    """Train by one arm -> its policies, with the samples drawn by then and the judges' means in
    standard deviations of the base model, which is the first of them."""
    changed, rewards, optimizer, _ = ARMS[arm]
    reference, reward_fn, _, tokenizer, report = load_run(run, device, dtype)
    settings = stage.Config(seed=report["seed"], **changed)
    heard, rows, samples = [], [], 0

    def hear(y, prompt):
        heard.append(y)
        return reward_fn(y, prompt)
    for row in ppo(copy.deepcopy(reference), reference, hear, report["length"], settings, rewards,
                   optimizer):
        texts = tokenizer.decode_batch(torch.cat(heard)[-row["batch"]:][:cfg.judged].tolist())
        heard.clear()  # ppo scores samples of the base model first, to standardise by
        said = ev.judge(texts)
        if not rows:
            base = {who: (x.mean(), x.std()) for who, x in said.items()}
        row |= {who: (x.mean() - base[who][0]) / base[who][1] for who, x in said.items()}
        row |= {"samples": samples} | ev.variety(texts)
        samples += row["batch"]
        rows.append(row)
        if row["score"] >= cfg.reward and arm != "permuted":
            break
    return rows


def elsewhere(cfg: Settings, setting: str, run) -> list[dict]:
    """Train by 04 in a process of its own, with this variable of the environment."""
    variable, value = setting.split("=")
    with TemporaryDirectory() as out:
        subprocess.run([sys.executable, "-m", "experiments.choices", "--runs", str(run), "--out",
                        out, "--reward", str(cfg.reward), "--arms", "04", "--noise"], check=True,
                       stdout=subprocess.DEVNULL, env=os.environ | {variable: value})
        return json.loads((Path(out) / "choices.json").read_text())["all"][0]["04"]


def worth(rows: list[dict]) -> dict[str, float]:
    """What a run has cost, and what it has reached, by each of three rewards."""
    late = [row["clip_fraction"] for row in rows[:-1] if row["updates"] >= stage.Config.warmup]
    steps, kl = zip(*((row["updates"], max(row["kl"], 0)) for row in rows))
    found = {"clip fraction, %": 100 * float(np.mean(late)) if late else np.nan,
             "R2 of sqrt KL": linregress(steps, np.sqrt(kl)).rvalue ** 2,
             "reward at the end": rows[-1]["score"], "KL at the end": rows[-1]["kl"]}
    return found | {f"{what} at {r}": at(rows, "score", r, what)
                    for r in (-0.3, -0.2, -0.1) for what in COSTS}


def measure(cfg: Settings, run, device, dtype) -> dict[str, list[dict]]:
    """Train every arm -> its policies by name; those of the control by its setting."""
    return ({arm: climb(cfg, arm, run, device, dtype) for arm in tqdm(cfg.arms, desc=str(run))}
            | {setting: elsewhere(cfg, setting, run) for setting in cfg.noise})


def findings(cfg: Settings, seeds: list[dict]) -> dict[str, list[float]]:
    """Collect each arm's figures, less 04's by the same seed too, and the range over the noise."""
    found, same = {}, ("04", *cfg.noise)
    each = [{arm: worth(rows) for arm, rows in seed.items()} for seed in seeds]
    for arm in each[0]:
        for what in each[0][arm]:
            found[f"{what}, {arm}"] = [seed[arm][what] for seed in each]
            if arm != "04":
                found[f"{what}, {arm}, less 04"] = [
                    seed[arm][what] - seed["04"][what] for seed in each]
    for what in each[0]["04"]:
        found[f"{what}, range over {len(same)} CPU settings"] = [
            float(np.ptp([seed[arm][what] for arm in same])) for seed in each]
    return found


def draw(cfg: Settings, seeds: list[dict]):
    """Draw what each arm needs by the last reward, less 04's: means, intervals, seeds as dots. The
    grey band reaches as far as any run of other CPU kernels is from 04's."""
    fig, axes = panels(1, 3, 13, 4.5, sharey=True)
    names = [arm for arm in cfg.arms if arm not in ("04", "permuted")]
    for ax, what, title in zip(axes, ("kl", "samples", "afinn"), (
            "KL, nats", "samples", "AFINN, sd of the base")):
        def less(arm):
            return [worth(seed[arm])[f"{what} at -0.1"] - worth(seed["04"])[f"{what} at -0.1"]
                    for seed in seeds]
        for i, arm in enumerate(names):
            x, colour = less(arm), ARMS[arm][-1]
            mean, half = over_seeds(x)
            ax.errorbar(mean, i, xerr=half, fmt="o", color=colour, capsize=3)
            ax.plot(x, [i - 0.2] * len(x), ".", color=colour)
        if far := max((abs(x) for arm in cfg.noise for x in less(arm)), default=0):
            ax.axvspan(-far, far, color="grey", alpha=0.2)
        ax.axvline(0, color=ink.red)
        ax.set(yticks=range(len(names)), yticklabels=names, title=f"{title} at -0.10, less 04's")
        ax.grid(alpha=0.3)
    return fig


if __name__ == "__main__":
    cfg, device, dtype = start(Settings, __doc__)
    seeds = [measure(cfg, run, device, dtype) for run in cfg.runs]
    save_results(cfg, "choices", findings(cfg, seeds), seeds, draw(cfg, seeds))
