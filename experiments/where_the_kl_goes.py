"""Why does PPO spend ten times the KL that its reward costs?

    python -m experiments.where_the_kl_goes        # after `make seeds`; 40 minutes on one core

Claim (to be tested): Best-of-n and the posterior pi_0(x) p(happy | x) / Z tilt a text where its
sentiment is still open. PPO has found one direction, and tilts every prefix alike, even where
nothing is left to win. The reason is that one gradient step changes all prefixes.

Design: V(prefix) = E_0[p(happy) | prefix] is how surely the base model ends happy from here. We
estimate it at every eighth token from 4,096 samples, by logistic regression on the reward model's
log-odds for the prefix.
(a) Fronts: the mean reward r = log p(happy) against KL, the distance from the base model in nats.
PPO with 04's settings goes to 6 nats. We compare it with policies that can only scale PPO's first
update; and with policies that can only add *one constant vector to the logits*, trained by PPO.
AFINN, a lexicon that the reward never saw, judges their ends.
(b) KL per token, by V at the start of its block of eight tokens, and by position. For policies it
is exact, on their own samples. For the posterior it is E*[log V(next) / V] on weighted samples,
which sums to its KL. The *ratio* is KL per token where V > 0.9 (settled) over that where V < 0.5
(open).
(c) A penalty of 0.1 a nat for 16 iterations: does it leave the front?
(d) Updates: cosines of updates three apart, and the share of their first principal direction.

Controls: For (b), the vector and the posterior.

Predicted when 04 used SGD with one rate for all layers (known then, of seed 0: weights between the
base model and the final policy lie on its front, and cosines are 0.1 to 0.2):
1. Scaling the first update is as good as PPO, within a fifth of its KL at r = -0.30.
2. At r = -0.40 the constant vector needs up to one and a half times PPO's KL.
3. The posterior's ratio is below 0.15, PPO's is 0.7 to 1.5.
4. The penalty ends near 2 nats, within 0.05 of PPO's reward there. Its ratio stays above 0.5.
5. Cosines are 0.1 to 0.3, and the first principal direction has 30 to 40%.
Predicted later, when the head had a faster rate:
6. PPO is just as blind: its ratio is 0.9 to 1.1.
7. The vector has no lead at -0.30 (within 0.2 nats). By AFINN at 6 nats it lies 0.2 sd (standard
   deviations of the base model) or more below.
8. The penalty is 0.05 above PPO's front at 2 nats on each seed, and its ratio is above 0.85.
9. Cosines are above 0.3.

Found with AdamW, 04's optimizer today (+- half the 95% interval over three seeds):
1, 2, 7. Wrong. The vector needs less than half of PPO's KL. The first update, scaled, needs twice:

       nats to reach     -0.40           -0.30           -0.20           -0.15
       PPO               1.9 +- 0.5      2.8 +- 0.4      4.1 +- 0.9      5.2 +- 0.3
       vector            0.7 +- 0.2      1.1 +- 0.4      1.9 +- 0.2      2.5 +- 0.2
       penalty           1.6 +- 0.1      2.2 +- 0.2
       first update      3.4 +- 0.8      7.5 +- 2.1

   By AFINN, too: at 6.3 nats the vector is at 2.7 +- 0.5 sd, at 5.8 nats PPO is at 1.5 +- 0.5.
3, 6. Right. The ratio is 1.00 +- 0.04 for PPO, 1.20 +- 0.10 for the vector, 0.00 +- 0.05 for the
   posterior, which spends 12 to 14 times its mean where V < 0.25.
4, 8. The penalty ends at 2.7 +- 0.2 nats, 0.09 +- 0.01 above PPO's reward there, on each seed. Its
   ratio is 0.99.
5, 9. Wrong: the cosines are 0.05 +- 0.01. The first principal direction has 25 +- 7%; of
   independent updates it would have 10%.

Left out: Larger models, prompts, how varied the vector's samples are.
Take away: PPO is blind to where a text's sentiment is still open. With AdamW most of each update is
noise, and the noise of 3 million parameters costs more KL than that of one vector on the logits.
What would change my mind: A run whose KL per token falls as V rises.
"""
import copy
import importlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from experiments.shared.ppo import ppo, stage
from experiments.shared.results import ink, lines, panels, save_results
from experiments.shared.reweighting import at
from experiments.shared.runs import Config, load_run
from model import GPT, chunked, kl_nats, start

ev = importlib.import_module("05_eval")

BLOCK = 8  # tokens
EDGES = (0, 0.25, 0.5, 0.75, 0.9, 1.001)  # edges of the bins of V
STYLES = {"PPO": ("o-", ink.red, "PPO, before 6 nats"),
          "PPO, 1 nat": ("o:", ink.pink, "PPO, beyond 1 nat"),
          "scaled": ("v--", ink.orange, "first update, scaled"),
          "vector": ("s--", ink.blue, "one vector"),
          "penalty": ("d-", ink.green, "PPO, penalty .1"),
          "posterior": ("-", ink.black, "posterior"),
          "sharper": ("--", ink.black, "posterior, beta 1/8")}


# ---- V and the KL of a block ---------------------------------------------------------------------
def log_odds(reward_model, y: torch.Tensor) -> torch.Tensor:
    """Return log p(happy) / p(sad) before each block of the tokens y (n, T): (n, T / 8)."""
    x = torch.cat((torch.full_like(y[:, :1], reward_model.bos), y[:, :-1]), 1)
    head = reward_model.head[reward_model.happy] - reward_model.head[reward_model.sad]
    return reward_model(x)[:, ::BLOCK].float() @ head


def logistic(s: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Fit the likeliest sigmoid of s to target in [0, 1], both (n,) -> (intercept, slope). A target
    of 0.7 is 0.7 of a yes and 0.3 of a no."""
    answer, weight = np.repeat((1, 0), len(s)), np.concatenate((target, 1 - target))
    x = np.tile(s, 2)[:, None].astype(float)
    fit = LogisticRegression(C=np.inf, tol=1e-8).fit(x, answer, weight)
    return np.append(fit.intercept_, fit.coef_)


def expected(s: np.ndarray, fits) -> np.ndarray:
    """Return the sigmoids of logistic fits, one for each column of s (n, k): (n, k)."""
    return np.stack([1 / (1 + np.exp(-a - b * x)) for x, (a, b) in zip(s.T, fits)], 1)


def posterior_kl(s: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return log V(next) / V of each block, (n, k), where V = E_0[target | s]. s (n, k): log-odds
    before each of k blocks; target (n,), in (0, 1]: pi* / pi_0 up to a factor. Weighted by the
    target, the sum is KL(pi* || pi_0) of the n samples exactly, however rough V is."""
    v = expected(s, [logistic(x, target) for x in s.T])
    return np.diff(np.log(np.column_stack((v, target))), axis=1)


def block_kl(policy, reference, y: torch.Tensor) -> torch.Tensor:
    """Return the exact KL(policy || reference) of each block of y (n, T), given the text before it:
    (n, T / 8)."""
    log_p, log_q = (torch.log_softmax((model.hidden_before(y) @ model.unembed().T).float(), -1)
                    for model in (policy, reference))
    return (log_p.exp() * (log_p - log_q)).sum(-1).unflatten(1, (-1, BLOCK)).sum(2)


def profile(kl: np.ndarray, v: np.ndarray, w: np.ndarray) -> dict:
    """Return KL per token in multiples of its mean, by V and by position; and where V > 0.9 over
    where V < 0.5. kl and v: KL of blocks and V before them, (n, k); w: weights (n,)."""
    w = np.repeat(w[:, None], kl.shape[1], 1)
    mean, columns = (w * kl).sum() / w.sum(), np.indices(kl.shape)[1]

    def relative(where):
        return float((w * kl)[where].sum() / w[where].sum() / mean) if where.any() else np.nan
    bins = [(v >= low) & (v < high) for low, high in zip(EDGES, EDGES[1:])]
    return {"by V": [{"v": v[b].mean(), "share": w[b].sum() / w.sum(), "relative": relative(b)}
                     for b in bins if b.any()],
            "by token": [{"token": BLOCK * (k + 0.5), "relative": relative(columns == k)}
                         for k in range(kl.shape[1])],
            "settled over open": relative(v > 0.9) / relative(v < 0.5)}


# ---- Updates -------------------------------------------------------------------------------------
def straightness(path: list[torch.Tensor]) -> dict[str, float]:
    """Measure how far k updates share one direction. path: the weights (P,) before each update."""
    steps = torch.stack([b - a for a, b in zip(path, path[1:])]).double()        # (k, P)
    share = torch.linalg.eigvalsh(steps @ steps.T)
    return {"cosine three apart": F.cosine_similarity(steps[:-3], steps[3:]).mean().item(),
            "first principal direction": (share[-1] / share.sum()).item(),
            "of independent updates": 1 / len(steps),
            "cosine of first and whole": F.cosine_similarity(steps[0], steps.sum(0), dim=0).item()}


class OneVector(GPT):
    """The base model, with one constant vector added to its logits before every token. The vector
    is the weight of a constant input, which is as long as a hidden state: sqrt D."""

    def __init__(self, base: GPT):
        super().__init__(base.config)
        self.load_state_dict(base.state_dict())
        self.requires_grad_(False).dtype = base.dtype
        self.vector = nn.Parameter(torch.zeros(self.n_text, 1))
        self.to(base.head.device)

    def extend(self, h):
        return torch.cat((h, torch.full_like(h[..., :1], self.config.d_model ** 0.5)), -1)

    def forward(self, x, last_only=False):
        return self.extend(super().forward(x, last_only))

    def step(self, *args):
        return self.extend(super().step(*args))

    def unembed(self):
        return torch.cat((super().unembed(), self.vector.to(self.dtype)), 1)


# ---- The experiment ------------------------------------------------------------------------------
@dataclass
class Settings(Config):
    n: int = 4096          # samples of the base model
    n_policy: int = 1024   # samples of each policy in (b)
    kl_stop: float = 6.0   # nats
    iterations: int = 24   # of PPO at most
    penalised: int = 16    # iterations for (c)
    batch: int = 1536


def measure(cfg: Settings, run, device, dtype) -> dict:
    reference, reward_fn, reward_model, tokenizer, report = load_run(run, device, dtype)
    seed, length, fronts, profiles = report["seed"], report["length"], {}, {}

    def draw(model, n):
        y, _ = model.generate(n, length, seed << 32 | 7 << 24)  # 04 uses 3 and 4, 05 uses 5
        s = chunked(lambda y: log_odds(reward_model, y), 256, y).numpy(force=True)
        score = chunked(reward_fn, 256, y, y[:, :0]).double().numpy(force=True)
        return y, s, score, ev.judge(tokenizer.decode_batch(y.tolist()))

    def train(name, policy, **changed):
        path, fronts[name] = [], []
        settings = {"seed": seed, "max_iterations": cfg.iterations, "batch": cfg.batch}
        for row in ppo(policy, reference, reward_fn, length, stage.Config(**settings | changed)):
            fronts[name].append({"kl": row["kl"], "reward": row["score"]})
            path.append(parameters_to_vector(policy.parameters()).detach())
            if row["kl"] > cfg.kl_stop:
                break
        return path

    def profile_and_judges(kl, s, said, w):
        in_sd = {who: (np.average(x, weights=w) - base_said[who].mean()) / base_said[who].std()
                 for who, x in said.items()}
        return profile(kl, expected(s, fits), w) | in_sd | {"kl": np.average(kl.sum(1), weights=w)}

    def profile_of(policy):
        y, s, _, said = draw(policy, cfg.n_policy)
        kl = chunked(lambda y: block_kl(policy, reference, y), 16, y).double().numpy(force=True)
        return profile_and_judges(kl, s, said, np.ones(len(y)))

    y, s, score, base_said = draw(reference, cfg.n)
    fits = [logistic(x, np.exp(score)) for x in s.T]
    for name, inverse_beta in (("posterior", 1), ("sharper", 8)):
        w = np.exp(inverse_beta * score)
        profiles[name] = profile_and_judges(posterior_kl(s, w), s, base_said, w)

    policy = copy.deepcopy(reference)
    path = train("PPO", policy)
    early = next((i for i, row in enumerate(fronts["PPO"]) if row["kl"] > 1), 1)
    for name, weights in (("PPO, 1 nat", path[early]), ("PPO", path[-2])):
        vector_to_parameters(weights, policy.parameters())
        profiles[name] = profile_of(policy)
    fronts["scaled"] = [{"kl": 0.0, "reward": score.mean()}]
    for times in (3, 6, 9, 12):
        vector_to_parameters(path[0] + times * (path[1] - path[0]), policy.parameters())
        y, _, each, _ = draw(policy, cfg.n_policy)
        kl = kl_nats(policy, reference, y[:512], y[:512, :0])[0].mean().item()
        fronts["scaled"].append({"kl": kl, "reward": each.mean()})
    for name, policy, changed in (
            ("vector", OneVector(reference), {"lr": 0.001, "max_batch": cfg.batch}),
            ("penalty", copy.deepcopy(reference), {
                "kl_coef": 0.1, "max_iterations": cfg.penalised})):
        train(name, policy, **changed)
        profiles[name] = profile_of(policy)
    return {"fronts": fronts, "profiles": profiles, "updates": straightness(path)}


def draw(seeds: list[dict]):
    fig, (front, by_v, by_token) = panels(1, 3, 13, 4.2)
    lines(front, [s["fronts"] for s in seeds], STYLES, "kl", "reward", xlim=(0, 10),
          title="mean log p(happy)")
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
             for r in (-0.40, -0.30, -0.20) for name in seeds[0]["fronts"]}
    found |= {f"{what}, {name}": [s["profiles"][name][what] for s in seeds]
              for what in ("settled over open", "kl", "vader", "afinn")
              for name in seeds[0]["profiles"]}
    found |= {what: [s["updates"][what] for s in seeds] for what in seeds[0]["updates"]}
    save_results(cfg, "where_the_kl_goes", found, seeds, draw(seeds))
