"""PPO as one generator: the loop of 04_ppo.py without its plumbing, for experiments that vary it.

At 04's settings and in one process, the loop gives 04's numbers bit for bit
(tests/test_experiments.py). `part_way` makes policies between the base model and 04's final one.
"""
import importlib

import torch

from model import GPT, chunked, kl_nats, load

stage = importlib.import_module("04_ppo")


# Each turns a batch's scores (B,) into rewards. mean, std: of the base model's scores.
def constant(score, mean, std):
    return (score - mean) / std


def batch_mean(score, mean, std):
    """Subtract the batch's mean. This is (n - 1) / n times the advantage of RLOO, whose baseline is
    the mean of the other n - 1 samples (Ahmadian et al. 2024, arXiv:2402.14740)."""
    return (score - score.mean()) / std


def adamw(policy, cfg):
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], cfg.lr,
                             (0.9, 0.95), weight_decay=0, fused=True)


def ppo(policy, reference, reward_fn, length: int, cfg, rewards=constant, optimizer_of=adamw):
    """Train the parameters of `policy` that require a gradient, in place, by cfg (04's Config).

    Before each update it yields some of what 04 logs of a policy, on samples that the policy has
    just drawn. After the update it adds the clip fraction to that row. rewards: one of the above.
    optimizer_of: policy, cfg -> the optimizer, with its full learning rates."""
    mean, std = stage.reward_constants(reward_fn, reference, None, length, cfg)
    optimizer = optimizer_of(policy, cfg)
    full_rates = [group["lr"] for group in optimizer.param_groups]
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
        row = {"step": step, "batch": batch, "updates": updates,
               "kl": kl.mean().item(), "score": score.mean().item(),
               "entropy": entropy.mean().item()}
        yield row

        # Advantage, and PPO epochs.
        logp_ref = logp_old
        if cfg.kl_coef:
            logp_ref = chunked(reference.logprob, cfg.minibatch, y, prompt)
        adv = stage.advantage(rewards(score, mean, std), logp_old, logp_ref, cfg.kl_coef, std)
        clipped = []
        for b in stage.minibatches(batch, cfg.minibatch, cfg.epochs, cfg.seed * 1000 + step,
                                   y.device):
            loss, stats = stage.ppo_loss(policy.logprob(y[b]), logp_old[b], adv[b], cfg.clip)
            optimizer.zero_grad()
            loss.backward()
            updates += 1
            for group, lr in zip(optimizer.param_groups, full_rates):
                group["lr"] = lr * min(1.0, updates / cfg.warmup)
            optimizer.step()
            clipped.append(stats["clip_fraction"])
        row["clip_fraction"] = torch.stack(clipped[1:] or clipped).mean().item()
        if updates >= cfg.warmup:
            clip_fractions.append(row["clip_fraction"])
        batch, clip_fractions = stage.next_batch(clip_fractions, batch, cfg.max_batch)


def part_way(run, part: float, device) -> GPT:
    """Return base + part * (final policy - base), weight by weight. It is in float32, because
    bfloat16 would round small parts away."""
    policy = load(run / "base.safetensors", "01_pretrain.py", device)[0]
    final = load(run / "policy-happy.safetensors", "04_ppo.py", device)[0].state_dict()
    for name, weight in policy.state_dict().items():
        weight.lerp_(final[name], part)
    return policy
