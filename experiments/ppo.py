"""PPO as one generator: the loop of 04_ppo.py without its plumbing, for experiments that vary it.
And the policies between the base model and 04's final one, and how straight a path is.

At 04's settings and in one process it gives 04's numbers bit for bit (tests/test_experiments.py).
"""
import importlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, chunked, kl_nats, load

stage = importlib.import_module("04_ppo")


def ppo(policy, reference, reward_fn, length: int, cfg, batch_mean: bool = False):
    """Trains the parameters of `policy` that need a gradient, in place. Yields, before each update
    by cfg (04's Config), what 04 logs of a policy, on the samples that it has just drawn.
    batch_mean: the baseline is the mean of the batch, not a constant; times n / (n - 1) that is
    RLOO, whose baseline is the mean of the other n - 1 samples."""
    zero, std = stage.reward_constants(reward_fn, reference, None, length, cfg)
    optimizer = torch.optim.SGD(stage.parameter_groups(policy, cfg), momentum=cfg.momentum)
    batch, clip_fractions, updates, n = cfg.batch, [], 0, cfg.kl_samples
    for step in range(cfg.max_iterations):
        # Rollout and score.
        y, logp_old = policy.generate(batch, length, cfg.seed << 32 | 4 << 24 | step)    # (B, T)
        prompt = y[:, :0]
        score = chunked(reward_fn, cfg.minibatch, y, prompt)                             # (B,)
        kl, _, _, entropy = kl_nats(policy, reference, y[:n], prompt[:n])
        first = slice(cfg.minibatch)
        logp = chunked(policy.logprob, cfg.minibatch, y[first], prompt[first])
        if (logp_old[first] - logp).abs().max() > 5e-6:
            logp_old = chunked(policy.logprob, cfg.minibatch, y, prompt)
        yield {"step": step, "batch": batch, "updates": updates,
               "kl": kl.mean().item(), "score": score.mean().item(),
               "entropy": entropy.mean().item()}

        # Advantage, and PPO epochs.
        logp_ref = logp_old
        if cfg.kl_coef:
            logp_ref = chunked(reference.logprob, cfg.minibatch, y, prompt)
        if batch_mean:
            zero = score.mean()
        adv = stage.advantage((score - zero) / std, logp_old, logp_ref, cfg.kl_coef, std)
        clipped = []
        for b in stage.minibatches(batch, cfg.minibatch, cfg.epochs, cfg.seed * 1000 + step,
                                   y.device):
            loss, stats = stage.ppo_loss(policy.logprob(y[b]), logp_old[b], adv[b], cfg.clip)
            optimizer.zero_grad()
            loss.backward()
            updates += 1
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * min(1.0, updates / cfg.warmup)
            optimizer.step()
            clipped.append(stats["clip_fraction"])
        if updates >= cfg.warmup:
            clip_fractions.append(torch.stack(clipped[1:] or clipped).mean().item())
        batch, clip_fractions = stage.next_batch(clip_fractions, batch, cfg.max_batch)


def part_way(run, part: float, device) -> GPT:
    """base + part * (final policy - base), weight by weight. In float32: bfloat16 would round the
    small parts away."""
    policy = load(run / "base.safetensors", "01_pretrain.py", device)[0]
    final = load(run / "policy-happy.safetensors", "04_ppo.py", device)[0].state_dict()
    for name, weight in policy.state_dict().items():
        weight.lerp_(final[name], part)
    return policy


def straightness(path: list[torch.Tensor]) -> dict[str, float]:
    """Weights (P,) before each update -> how much of one direction there is in the k updates."""
    steps = torch.stack([b - a for a, b in zip(path, path[1:])]).double()        # (k, P)
    share = torch.linalg.eigvalsh(steps @ steps.T)
    return {"cosine three apart": F.cosine_similarity(steps[:-3], steps[3:]).mean().item(),
            "first principal direction": (share[-1] / share.sum()).item(),
            "of independent updates": 1 / len(steps),
            "cosine of first and whole": F.cosine_similarity(steps[0], steps.sum(0), dim=0).item()}


class OneVector(GPT):
    """The base model, and one constant vector that is added to its logits before every token: the
    weight of a constant input, as long as a hidden state is, sqrt D."""

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
