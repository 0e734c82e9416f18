"""Which of eight methods gets most for its KL, its samples and its seconds?

    python -m experiments.methods        # after `make seeds`; 62 minutes on one core

Claim (to be tested): For the same reward, RL spends more KL (the distance from the base model, in
nats) than best-of-n does (Gao et al. 2022, arXiv:2210.10760). Fits to a Boltzmann target or to
selected samples should not. The authors warn that KL does not measure optimisation across methods.
So we also plot the judges against the reward.

Design: The reward r is log p(happy). 05's `measure` takes each policy's figures from 1,024
samples, with exact KLs, along its way (the penalty's only at its end). Three methods use RL, one
its result:
- *PPO*: 04's checkpoints, as 05 measured them.
- *batch mean*: subtracts the mean of the batch, not a constant (RLOO).
- *penalty*: 16 iterations with a penalty of beta a nat. beta is 0.1 on each seed. To save time,
  0.03, 0.3 and 1 run on seed 0 only.
- *between*: weights between the base model's and 04's final ones.
Four use 8,192 samples of the base model and no RL:
- *best of 16*, *filtered*, *weighted*: the imitations. They maximise the likelihood of texts drawn
  as best-of-16 draws them, or from the best quarter, or by exp(r / 0.1), whose optimum is that of
  penalty 0.1. They take 36 steps of 256 texts by SGD at 0.05.
- *DPO*: learns from the best and the worst of every 8. Its beta is 0.1. It uses Adam at 5e-5, three
  passes, 128 pairs a step.

Controls: The best possible line; best-of-n, which trains nothing; *between* at the end of its way
(a = 1), which is 04's policy.

Predicted. I knew of seed 0 that penalty 0.1 ends at 2 nats, 0.10 above PPO's front (its curve of
reward against KL), and that *between* lies on that front. From choosing rates, on 512 samples, I
knew that best of 16 has -0.40 at 1.0 nats and -0.35 at 1.6, and DPO at other rates -0.38 at 2.0 and
-0.20 at 5.5. PPO has -0.42, -0.34, -0.32 and -0.15 there. That PPO had one rate for all layers, as
04 had then.
1. Batch mean and between are within 0.03 of PPO's reward at 1, 2 and 5 nats.
2. The imitations are within 0.05 of PPO at 1 nat, and 0.03 or more below it at 2. They get less
   than two thirds of what their targets gain. None reaches 5 nats.
3. DPO is 0.03 to 0.10 below PPO at 2 and 5 nats, and passes 9.5.
4. Penalty 0.1 is above PPO at its KL by 0.05 or more on each seed, 0.03 and 0.3 by 0.02 or more.
5. At r = -0.30, AFINN (a lexicon that the reward never saw) follows the KL. Imitations and DPO are
   0.05 sd (standard deviations of the base model) above PPO; penalty and best-of-n as much below.
6. Imitations have 0.03 more entropy a token than PPO at 1 nat. DPO has as much less at 2.
7. DPO reaches r = -0.30 after fewer samples and seconds than batch mean.

Found (+- half the 95% interval over three seeds):
1. Right. The mean reward:

       at            1 nat            2 nats           5 nats
       PPO           -0.50 +- 0.03    -0.35 +- 0.06    -0.15 +- 0.04
       batch mean    -0.53 +- 0.07    -0.37 +- 0.04    -0.16 +- 0.03
       between       -0.49 +- 0.11    -0.38 +- 0.12    -0.17 +- 0.05

2. Half right. Best of 16 has -0.51 +- 0.04 at 1 nat. It ends at 1.9 nats with -0.35 +- 0.10, level
   with PPO there. It gets 59% of what its target gains, filtered 46%, weighted 41%.
3. A little worse than predicted: DPO is 0.09 below PPO at 2 nats, 0.11 at 5, and it ends at 8.5.
4. Right for 0.1, which is above by 0.08 +- 0.05, at 2.9 nats. On seed 0, 0.3 is above by 0.06, 1 by
   0.08, and 0.03 not at all.
5. Half right. DPO is 0.05 above PPO (0.92 +- 0.05 against 0.87 +- 0.03) and best-of-n far below
   (0.41 +- 0.07). The penalty is not (0.86, seed 0), and no imitation gets so far.
6. Right, by 0.05 and 0.06.
7. Right: 8,192 samples against 10,400 +- 1,100, and fewer seconds on each seed.

Left out: Other rates, sizes and prompts. PPO's seconds are of other processes than the rest.
Take away: Of the methods that train, a KL penalty wastes least and DPO most. What any of them has
at 1 nat, best-of-n has before 0.2.
What would change my mind: A fit that gets two thirds of its target's gain.
"""
import copy
import importlib
import time
from dataclasses import dataclass, replace
from itertools import islice, product

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from experiments.shared.ppo import batch_mean, constant, part_way, ppo, stage
from experiments.shared.results import ink, lines, panels, save_results
from experiments.shared.reweighting import INVERSE_BETAS, at, tilt
from experiments.shared.runs import Config, load_run
from model import chunked, load, start

ev = importlib.import_module("05_eval")

JUDGES = ("vader", "afinn", "pattern")
COLUMNS = ("kl", "reward", *JUDGES, "distinct_2", "entropy", "samples", "seconds")
STYLES = {"best possible": ("-", ink.black, "best possible"),
          "best-of-n": (":", ink.black, "best-of-n, untrained"), "PPO": ("o-", ink.red, "PPO (04)"),
          "batch mean": ("s-", ink.pink, "batch mean"), "penalty": ("D", ink.green, "KL penalty"),
          "between": ("*--", ink.yellow, "weights between"),
          "best of 16": ("^--", ink.blue, "best of 16"),
          "filtered": ("v--", ink.sky, "filtered"), "weighted": ("<--", ink.orange, "weighted"),
          "DPO": ("x-.", ink.black, "DPO")}


# ---- Training without RL -------------------------------------------------------------------------
def targets(score: np.ndarray, beta: float = 0.1) -> dict[str, np.ndarray]:
    """Return the weights (N,) by which each imitation draws samples of the base with score (N,)."""
    best = np.zeros(len(score))
    best[np.argsort(score, kind="stable")] = ev.best_of_n_weights(len(score), 16)
    return {"best of 16": best, "filtered": 1.0 * (score >= np.quantile(score, 0.75)),
            "weighted": np.exp(score / beta)}


def figures_of(weights: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Return the KL and the mean score of the samples of the base, weighted by weights (N,)."""
    share = weights / weights.sum()
    log_ratio = np.log(np.where(share > 0, share * len(share), 1))
    return {"kl": float(share @ log_ratio), "reward": float(share @ score)}


def dpo_loss(logp: torch.Tensor, logp_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the DPO loss of B pairs, (B,) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).
    logp, logp_ref (2, B): log-probs of the better and the worse completion."""
    better, worse = logp - logp_ref
    return -F.logsigmoid(beta * (better - worse))


def descend(optimizer, loss_of, batches: list[torch.Tensor], times: int):
    """Take one step on loss_of(batch) for each batch. Yields `times` times, evenly spaced."""
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()
        if step % max(len(batches) // times, 1) == 0:
            yield


def imitate(policy, y, weights: np.ndarray, steps: int, cfg, times: int = 3, lr: float = 0.05,
            texts: int = 256):
    """Maximise the likelihood of texts drawn from y (N, T) by weights (N,), so many a step."""
    g = torch.Generator().manual_seed(cfg.seed)
    drawn = torch.multinomial(torch.tensor(weights), steps * texts, True, generator=g)
    optimizer = torch.optim.SGD(policy.parameters(), lr, momentum=0.9)
    yield from descend(optimizer, lambda b: -policy.logprob(y[b]).mean(),
                       drawn.to(y.device).split(texts), times)


def dpo(policy, reference, y, score, cfg, beta=0.1, lr=5e-5, epochs=3, times=6, size=128):
    """Learn from the best and the worst, by score (N,), of each eight of y (N, T), `size` pairs a
    step."""
    eight = score.view(-1, 8)
    rows = torch.arange(0, len(y), 8, device=y.device)
    pairs = y[torch.stack((rows + eight.argmax(1), rows + eight.argmin(1)))]       # (2, N / 8, T)
    logp_ref = chunked(reference.logprob, cfg.minibatch, pairs.flatten(0, 1)).sum(1).view(2, -1)

    def loss_of(b):
        logp = policy.logprob(pairs[:, b].flatten(0, 1)).sum(1).view(2, -1)        # (2, 128)
        return dpo_loss(logp, logp_ref[:, b], beta).mean()
    batches = list(stage.minibatches(len(rows), size, epochs, cfg.seed, y.device))
    yield from descend(torch.optim.Adam(policy.parameters(), lr), loss_of, batches, times)


# ---- What a method cost --------------------------------------------------------------------------
def figures(row: dict, base: dict, **more) -> dict:
    """Pick a policy's figures from 05's row. Judges are in standard deviations of the base model,
    whose row is base. more: added as it is."""
    kept = {k: row[k] for k in ("kl", "kl_se", "entropy", "distinct_2") if k in row}
    for judge in JUDGES:
        sd = base[f"{judge}_se"] * base["n"] ** 0.5
        kept[judge] = (row[judge] - base[judge]) / sd
    return kept | {"reward": row["proxy"]} | more


def meter(reference, reward_fn, reward_model, tokenizer, report: dict, n: int):
    """Return a function: policy -> its figures on n samples, drawn as 05 drew its own."""
    empty = torch.zeros(n, 0, dtype=torch.long, device=reference.head.device)

    def measured(policy, reference=reference, **more):
        row = ev.measure(policy, reference, reward_model, lambda *y: (reward_fn(*y),) * 2,
                         tokenizer, empty, report["length"], report["seed"] << 32 | 5 << 24,
                         show=1)
        return figures(row, report["happy"][0], **more)
    return measured


def shipped(run, report: dict) -> list[dict]:
    """List 04's checkpoints and final policy as 05 measured them, with the samples that 04 had
    drawn by then and the seconds that it had taken, by its log."""
    rows = []
    for row in report["happy"]:
        log, samples = [], 0
        if row["name"] != "base":
            path, = run.rglob(f"{row['name']}.safetensors")
            header = load(path, "04_ppo.py")[2]
            log = report["ppo"][: header["step"]]  # the iterations before it
            samples = header["settings"]["reward_samples"] + sum(x["batch"] for x in log)
        parts = ("s_rollout", "s_score", "s_update")
        rows.append(figures(row, report["happy"][0], samples=samples,
                            seconds=sum(x.get(part, 0.0) for x in log for part in parts)))
    return rows


def timed(loop):
    """Yield each item of a loop, and the seconds spent in the loop so far, not in its caller."""
    seconds, clock = 0.0, time.perf_counter()
    for item in loop:
        seconds += time.perf_counter() - clock
        yield item, seconds
        clock = time.perf_counter()


def findings(seeds: list[dict], names) -> dict[str, list]:
    """Compare all columns of all methods at equal KL and at equal reward. Add where each penalty
    ended, and what the imitations aimed at and reached."""
    found = {}
    places = [("kl", x) for x in (1, 2, 5, 9.5)] + [("reward", x) for x in (-0.3, -0.2, -0.1)]
    for (x, value), y, name in product(places, COLUMNS, names):
        if x != y:
            found[f"{y} at {x} {value}, {name}"] = [at(s[name], x, value, y) for s in seeds]
    penalties = [(s["PPO"], row) for s in seeds for row in s["penalty"]]
    for ppo_rows, row in penalties:
        ahead = row["reward"] - at(ppo_rows, "kl", row["kl"], "reward")
        for what, value in (row | {"reward above PPO's": ahead}).items():
            if isinstance(value, float) and what != "beta":
                found.setdefault(f"{what}, penalty {row['beta']}", []).append(value)
    for name, x in product(seeds[0]["targets"], ("kl", "reward")):
        found[f"{x}, target of {name}"] = [s["targets"][name][x] for s in seeds]
        found[f"{x}, end of {name}"] = [s[name][-1][x] for s in seeds]
    found["KL at a = 1 over 05's"] = [s["between"][-1]["kl"] / s["PPO"][-1]["kl"] for s in seeds]
    return {what: x for what, each in found.items() if (x := [v for v in each if v == v])}


# ---- The experiment ------------------------------------------------------------------------------
@dataclass
class Settings(Config):
    n: int = 8192          # samples of the base model
    n_policy: int = 1024   # samples of each policy
    batch: int = 1536      # for batch mean and penalty
    kl_stop: float = 9.5   # nats, for batch mean
    penalised: int = 16    # iterations with a penalty
    betas: tuple[float, ...] = (0.1, 0.03, 0.3, 1.0)  # the first on all seeds, the rest on seed 0
    steps: int = 36        # for the imitations


def measure(cfg: Settings, run, device, dtype) -> dict:
    models = reference, reward_fn, *_, report = load_run(run, device, dtype)
    seed, length, base = report["seed"], report["length"], report["happy"][0]
    measured = meter(*models, cfg.n_policy)
    rows = {name: [figures(base, base, samples=0, seconds=0.0)] for name in STYLES}
    rows |= {"PPO": shipped(run, report), "penalty": []}
    rows["best-of-n"] = [figures(row, base) for row in report["best_of_n"]]
    unmoved = part_way(run, 0, device)
    for part in (0.3, 0.45, 0.7, 1.0):
        rows["between"].append(measured(part_way(run, part, device), unmoved, part=part))

    # RL
    settings = stage.Config(seed=seed, batch=cfg.batch)

    def reinforced(rewards=constant, kl_coef=0.0):
        policy, samples = copy.deepcopy(reference), settings.reward_samples
        loop = ppo(policy, reference, reward_fn, length, replace(settings, kl_coef=kl_coef),
                   rewards)
        for row, seconds in timed(loop):
            yield policy, row["kl"], {"samples": samples, "seconds": seconds}
            samples += row["batch"]
    for policy, kl, cost in reinforced(batch_mean):
        done = kl > cfg.kl_stop
        if done or kl > 1.3 * rows["batch mean"][-1]["kl"]:
            rows["batch mean"].append(measured(policy, **cost))
        if done:
            break
    for beta in cfg.betas if seed == 0 else cfg.betas[:1]:
        path = list(islice(reinforced(kl_coef=beta), cfg.penalised + 1))
        policy, _, cost = path[-1]
        rows["penalty"].append(measured(policy, beta=beta, path=[kl for _, kl, _ in path], **cost))

    # Without RL
    clock = time.perf_counter()
    y, _ = reference.generate(cfg.n, length, seed << 32 | 7 << 24)  # 04 uses 3 and 4, 05 uses 5
    scores = chunked(reward_fn, 256, y, y[:, :0])
    drawn, score = time.perf_counter() - clock, scores.double().numpy(force=True)
    weights = targets(score)
    for name in (*weights, "DPO"):
        policy = copy.deepcopy(reference)
        loop = (dpo(policy, reference, y, scores, settings) if name == "DPO" else
                imitate(policy, y, weights[name], cfg.steps, settings))
        for _, seconds in timed(loop):
            rows[name].append(measured(policy, samples=cfg.n, seconds=drawn + seconds))
    kl, reward, _, ess = tilt(score, INVERSE_BETAS, score[:, None])
    rows["best possible"] = [{"kl": a, "reward": b} for a, b, c in zip(kl, reward[:, 0], ess)
                             if c > 200]
    return rows | {"targets": {name: figures_of(w, score) for name, w in weights.items()}}


def draw(seeds: list[dict]):
    fig, axes = panels(2, 2, 12, 9)
    for ax, x, y, title in zip(axes.flat, ("kl", "kl", "reward", "reward"),
                               ("reward", "afinn", "afinn", "distinct_2"),
                               ("mean log p(happy)", "AFINN, sd of the base",
                                "AFINN by mean log p(happy)", "Distinct-2 by mean log p(happy)")):
        lines(ax, seeds, STYLES, x, y, title=title)
    axes[0, 1].legend(fontsize=8)
    return fig


if __name__ == "__main__":
    cfg, device, dtype = start(Settings, __doc__)
    seeds = [measure(cfg, run, device, dtype) for run in tqdm(cfg.runs, desc="seeds")]
    save_results(cfg, "methods", findings(seeds, STYLES), seeds, draw(seeds))
