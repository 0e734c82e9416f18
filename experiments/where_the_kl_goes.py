"""Why does PPO spend ten times the KL that its reward costs?

    python -m experiments.where_the_kl_goes        # after `make seeds`; half an hour on one core

Claim, to be tested: best-of-n and the posterior pi_0(x) p(happy | x) / Z tilt a text where its
sentiment is still open; PPO has found one direction that tilts every prefix alike, also where
nothing is left to win, because one gradient step changes all prefixes.
Design: V(prefix) = E_0[p(happy) | prefix] at every eighth token, by logistic regression on the
reward model's log-odds for the prefix, from 4,096 samples of the base. (a) Fronts of reward against
KL: PPO with ONE_RATE for all layers, to 6 nats; policies that can only scale its first update; that
can only add *one constant vector to the logits*, by PPO. (b) KL per token by V at the start of its
block, and by position: of policies exactly, on their own samples; of the posterior E*[log V(next) /
V], on weighted samples of the base, which sums to its KL exactly. (c) A penalty of .1 a nat for 20
iterations (seed 0 alone, for time): does it leave the front? (d) Updates: cosines three iterations
apart (farther than momentum reaches), and the share of their first principal direction (of k
independent ones: 1 / k). Controls for (b): the vector, which cannot but tilt every prefix alike,
and the posterior.
Predicted (known, of seed 0: weights between base and final policy lie on PPO's front; rounded
cosines of .1 to .2): (1) scaling the first update is as good as PPO, within a fifth of its KL at r
= -.30. (2) The constant vector needs at r = -.40 up to one and a half times PPO's KL: most of what
PPO does is such a vector. (3) KL per token where V > .9, over that where V < .5: the posterior's is
below .15, PPO's .7 to 1.5. (4) The penalty ends near 2 nats, on PPO's front within .05 of its
reward; its ratio stays above .5. (5) Cosines .1 to .3; first principal direction 30 to 40 %.
Found, +- half the 95 % interval over three seeds: (1) wrong: at r = -.30 5.0 +- 1.5 nats, PPO 2.2
+- .3. (2) Too modest: the vector is better than PPO, 1.1 +- .6 nats against 1.3 +- .3 at -.40, 1.8
+- .6 against 2.2 +- .3 at -.30, 3.5 +- .6 against 3.8 +- .6 at -.20; on eight of nine. (3) So: the
posterior's is -.07 +- .19 (V is an estimate), PPO's .98 +- .02 at 1 nat, .97 +- .02 at 6; per token
the posterior spends ten times its mean where V < .25. (4) Half: it ends at 2.0 nats, but with a
reward .10 above PPO's front; its ratio is .92. (5) Cosines .21 +- .02, share 44 +- 7 %, for
independent updates 12 %.
Left out: larger models, prompts, other judges. Take away: of this reward PPO of 3.1 million
parameters gets no more than 4,093 numbers added to all logits: both say what it likes, needed or
not. What would change my mind: a run whose KL per token falls as V rises.
"""
import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from experiments import BLACK, BLUE, GREEN, ORANGE, PINK, RED, Config, keep, lines, load_run, plt
from experiments.ppo import ONE_RATE, OneVector, ppo, stage
from experiments.prefixes import block_kl, expected, log_odds, logistic, posterior_kl, profile
from experiments.reweight import at
from model import chunked, kl_nats
from running import start

STYLES = {"PPO": ("o-", RED, "PPO, 6 nats"), "PPO, 1 nat": ("o:", PINK, "PPO, 1 nat"),
          "scaled": ("v--", ORANGE, "first update, scaled"), "vector": ("s--", BLUE, "one vector"),
          "penalty": ("d-", GREEN, "PPO, penalty .1"), "posterior": ("-", BLACK, "posterior"),
          "sharper": ("--", BLACK, "posterior, beta 1/8")}


@dataclass
class Settings(Config):
    n: int = 4096          # samples of the base model
    n_policy: int = 1024   # of each policy in (b)
    kl_stop: float = 6.0   # nats
    iterations: int = 12   # of PPO, at most
    penalised: int = 20    # iterations of (c)
    batch: int = 2048


def straightness(path: list[torch.Tensor]) -> dict[str, float]:
    """Weights (P,) before each update -> how much of one direction there is in the k updates."""
    steps = torch.stack([b - a for a, b in zip(path, path[1:])]).double()        # (k, P)
    share = torch.linalg.eigvalsh(steps @ steps.T)
    return {"cosine three apart": F.cosine_similarity(steps[:-3], steps[3:]).mean().item(),
            "first principal direction": (share[-1] / share.sum()).item(),
            "of independent updates": 1 / len(steps),
            "cosine of first and whole": F.cosine_similarity(steps[0], steps.sum(0), dim=0).item()}


def measure(cfg: Settings, run, device, dtype) -> dict:
    reference, reward_fn, reward_model, _, report = load_run(run, device, dtype)
    seed, length, fronts, profiles = report["seed"], report["length"], {}, {}

    def draw(model, n):
        y, _ = model.generate(n, length, seed << 32 | 7 << 24)  # 04 has 3 and 4, 05 has 5
        s = chunked(lambda y: log_odds(reward_model, y), 256, y).numpy(force=True)
        return y, s, chunked(reward_fn, 256, y, y[:, :0]).double().numpy(force=True)

    def train(name, policy, **changed):
        path, fronts[name] = [], []
        settings = ONE_RATE | {"seed": seed, "max_iterations": cfg.iterations, "batch": cfg.batch}
        for row in ppo(policy, reference, reward_fn, length, stage.Config(**settings | changed)):
            fronts[name].append({"kl": row["kl"], "reward": row["score"]})
            path.append(parameters_to_vector(policy.parameters()).detach())
            if row["kl"] > cfg.kl_stop:
                break
        return path

    def profile_of(policy):
        y, s, _ = draw(policy, cfg.n_policy)
        kl = chunked(lambda y: block_kl(policy, reference, y), 16, y).double().numpy(force=True)
        return profile(kl, expected(s, fits), np.ones(len(y)))

    y, s, score = draw(reference, cfg.n)
    fits = [logistic(x, np.exp(score)) for x in s.T]
    for name, inverse_beta in (("posterior", 1), ("sharper", 8)):
        w = np.exp(inverse_beta * score)
        profiles[name] = profile(posterior_kl(s, w), expected(s, fits), w)

    policy = copy.deepcopy(reference)
    path = train("PPO", policy)
    early = next((i for i, row in enumerate(fronts["PPO"]) if row["kl"] > 1), 1)
    for name, weights in (("PPO, 1 nat", path[early]), ("PPO", path[-2])):
        vector_to_parameters(weights, policy.parameters())
        profiles[name] = profile_of(policy)
    fronts["scaled"] = [{"kl": 0.0, "reward": score.mean()}]
    for scale in (2, 4, 6, 8):
        vector_to_parameters(path[0] + scale * (path[1] - path[0]), policy.parameters())
        y, _, each = draw(policy, cfg.n_policy)
        kl = kl_nats(policy, reference, y[:512], y[:512, :0])[0].mean().item()
        fronts["scaled"].append({"kl": kl, "reward": each.mean()})
    vector = OneVector(reference)
    train("vector", vector, max_batch=cfg.batch)
    profiles["vector"] = profile_of(vector)
    if seed == 0:
        policy = copy.deepcopy(reference)
        train("penalty", policy, kl_coef=0.1, max_batch=cfg.batch, max_iterations=cfg.penalised)
        profiles["penalty"] = profile_of(policy)
    return {"fronts": fronts, "profiles": profiles, "updates": straightness(path)}


def draw(seeds: list[dict]):
    fig, (front, by_v, by_token) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    lines(front, [s["fronts"] for s in seeds], STYLES, "kl", "reward", title="mean log p(happy)")
    for ax, key, x in ((by_v, "by V", "v"), (by_token, "by token", "token")):
        each = [{name: p[key] for name, p in s["profiles"].items()} for s in seeds]
        lines(ax, each, STYLES, x, "relative", title="KL per token over its mean")
    by_v.set(xlabel="V: how surely the base would end happy from here")
    by_token.set(xlabel="token", ylim=(0, None))
    front.legend(fontsize=8), by_v.legend(fontsize=8)
    return fig


if __name__ == "__main__":
    cfg, device, dtype = start(Settings, __doc__)
    seeds = [measure(cfg, run, device, dtype) for run in tqdm(cfg.runs, desc="seeds")]
    found = {f"KL at reward {r}, {name}": [at(s["fronts"][name], "reward", r, "kl") for s in seeds]
             for r in (-0.40, -0.30, -0.20) for name in ("PPO", "scaled", "vector")}
    for name in seeds[0]["profiles"]:
        found[f"settled over open, {name}"] = [s["profiles"][name]["settled over open"]
                                               for s in seeds if name in s["profiles"]]
    found |= {what: [s["updates"][what] for s in seeds] for what in seeds[0]["updates"]}
    keep(cfg, "where_the_kl_goes", found, seeds, draw(seeds))
