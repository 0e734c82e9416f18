"""Stage 4: PPO against the reward model, from the base model to 10 nats away from it.

    python 04_ppo.py                     # 130 s: p(happy) .63 -> .94, 9.1 nats away
    python 04_ppo.py --target sad        # the negative twin, by its own target

Reads   out/base.safetensors, out/reward.safetensors
Writes  out/policy-happy.safetensors (the last policy measured at or below 10 nats), out/04-happy.jsonl,
        out/checkpoints/happy-kl-*.safetensors (one at each crossing of .25, .5, 1, 1.5, 2, 3, ... 10)

Decisions a reader may question:
1. No value function, no GAE: the normalised reward is the advantage of every token.
2. The reward is log p(target), or the score of a reward model that learned from comparisons,
   normalised by two constants that 03 measured on the base model and nobody updates. Whitening each
   batch instead would blow noise up to unit variance once all samples are alike.
3. No KL penalty (--kl-coef for comparison): clipping and stopping are what bounds the KL.
4. The policy is measured before it is updated, on the samples it has just drawn. So KL, reward and
   entropy of a row belong to one policy and are unbiased, and a checkpoint's KL is its own.
5. Old log-probs are the sampler's, for free, if they equal those of the training forward pass on
   the completions where the KL needs both. Where they do not (bf16 on most GPUs), a pass of its own
   forms them. Either way the ratio on the first minibatch is 1, and that is asserted.
6. The reference model sees `kl_samples` completions of each iteration, not all: the exact KL at
   their prefixes has a smaller error than the usual sampled one (k1) on four times as many.
7. A reward model of prompted samples means prompts here as well, other ones in every iteration: loss,
   KL and reward are those of the completion. The checkpoint says so, there is no flag.
8. --target sad maximises log p(sad), which is bounded by 0. Flipping the sign of the happy reward
   would maximise -log p(happy), which is not bounded by anything.
"""
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from model import (Log, UserError, average_gradients, draw_prompts, fingerprint, finish, gather, load,
                   load_optimizers, read_prompts, resume_from, save, score_of, share, start, world, write)

SCRIPT = "04_ppo.py"
CROSSINGS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)  # nats


@dataclass
class Config:
    target: Literal["happy", "sad"] = "happy"
    out: Path = Path("out")     # where all stages write
    seed: int = 0
    resume: bool = False        # continue a killed run from its last saved state
    batch: int = 2048           # completions an iteration; doubled if the clip fraction stays below 1 %
    max_batch: int = 4096       # the doubling stops here
    minibatch: int = 256        # completions an optimizer step
    epochs: int = 1             # passes over each batch
    lr: float = 1e-4
    warmup: int = 10            # optimizer steps of linear warm-up: Adam's first steps are full-size
    adam_eps: float = 1e-5
    clip: float = 0.2           # ratios are clipped to [1 - clip, 1 + clip]
    kl_coef: float = 0.0        # per-token KL penalty (k1), in units of log p(target)
    kl_stop: float = 10.0       # nats per completion
    max_iterations: int = 60
    kl_samples: int = 512       # completions of an iteration on which the KL is computed, in whole minibatches
    save_every: int = 1         # iterations between the states that --resume continues from


ON_GPU = dict(batch=4096, max_batch=8192, minibatch=512, save_every=5)


# ---- The mathematics -----------------------------------------------------------------------------
def normalise(score: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """score (B,) of `score_of` -> reward (B,) in standard deviations of the base model."""
    return (score - mean) / std


def advantage(reward, logp, logp_ref, kl_coef: float, std: float) -> torch.Tensor:
    """reward (B,), logp and logp_ref (B, T) -> advantage (B, T): the reward at every token, less a
    k1 penalty if kl_coef is not 0. The reward was divided by std, so the coefficient is as well."""
    return reward[:, None] - kl_coef / std * (logp - logp_ref)


def ppo_loss(logp, logp_old, adv, clip: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7), mean over tokens.

    logp (with gradient), logp_old, adv: (B, T) -> loss, and measured over the tokens:
    clip_fraction: share of ratios outside [1 - clip, 1 + clip]; clip_binding: share where the
    clipped term is the smaller one, so that the gradient is zero; approx_kl: mean of
    (logp - logp_old)^2 / 2, nats per token; ratio_off: max |ratio - 1|.
    """
    ratio = (logp - logp_old).exp()
    plain, clipped = ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv
    with torch.no_grad():
        stats = {"clip_fraction": ((ratio - 1).abs() > clip).float().mean(),
                 "clip_binding": (clipped < plain).float().mean(),
                 "approx_kl": 0.5 * (logp - logp_old).square().mean(),
                 "ratio_off": (ratio - 1).abs().max()}
    return -torch.minimum(plain, clipped).mean(), stats


def mean_and_error(x: torch.Tensor) -> tuple[float, float]:
    """x (B,), one figure a completion -> its mean and the standard error of the mean."""
    return x.mean().item(), (x.std() / len(x) ** 0.5).item()


def kl_nats(y, hidden, weight, hidden_ref, weight_ref) -> tuple[torch.Tensor, ...]:
    """KL(policy || reference) of completions, nats, by two estimators whose expectations agree.

    y (B, T), sampled from the policy; hidden, hidden_ref (B, T, D); weight, weight_ref (V, D) ->
    exact (B,): at each sampled prefix the KL between the two next-token distributions, over the
    whole vocabulary, summed over the completion; k1 (B,): sum_t logp - logp_ref; and, of the
    policy, logp (B, T) and entropy (B, T).
    """
    parts = []
    for y, h, h_ref in zip(y.split(8), hidden.split(8), hidden_ref.split(8)):
        log_p, log_q = (torch.log_softmax(x @ w.T, -1, dtype=torch.float32)                  # (8, T, V)
                        for x, w in ((h, weight), (h_ref, weight_ref)))
        p, logp, logp_ref = log_p.exp(), *(x.gather(2, y[..., None])[..., 0] for x in (log_p, log_q))
        parts.append((torch.linalg.vecdot(p, log_p - log_q).double().sum(-1),
                      (logp - logp_ref).double().sum(-1), logp, -torch.linalg.vecdot(p, log_p)))
    return tuple(torch.cat(x) for x in zip(*parts))


def next_batch(clip_fractions: list[float], batch: int, max_batch: int) -> int:
    """The batch rule of the exercise: if on average over the last three iterations at this batch
    size fewer than 1 % of the ratios were outside the clip range, double it, up to max_batch."""
    quiet = len(clip_fractions) >= 3 and sum(clip_fractions[-3:]) / 3 < 0.01
    return min(2 * batch, max_batch) if quiet else batch


def divergence(kl: float, kl_before: float, clip_fraction: float, finite: bool) -> str | None:
    """What went wrong and what to change, or None."""
    if not finite:
        return "the loss or its gradient is not a number: lower --lr"
    if clip_fraction > 0.5:
        return f"{clip_fraction:.0%} of the ratios are clipped: lower --lr or --epochs, or raise --warmup"
    if kl - kl_before > 5:
        return (f"the KL jumped from {kl_before:.1f} to {kl:.1f} nats in one iteration: "
                "lower --lr or --max-batch")
    return None


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    if min(cfg.minibatch, cfg.batch, cfg.epochs, cfg.warmup, cfg.max_iterations, cfg.clip, cfg.save_every) <= 0:
        raise UserError("--minibatch, --batch, --epochs, --warmup, --max-iterations, --clip and --save-every "
                        "must be positive")
    if cfg.batch % cfg.minibatch or cfg.max_batch < cfg.batch or cfg.max_batch % cfg.minibatch:
        raise UserError("--batch and --max-batch must be multiples of --minibatch, and --batch the smaller")
    if cfg.kl_samples < cfg.minibatch:
        raise UserError("--kl-samples must not be smaller than --minibatch")
    base_path, reward_path = cfg.out / "base.safetensors", cfg.out / "reward.safetensors"
    state = cfg.out / f"04-{cfg.target}-state.safetensors"
    last = cfg.out / f"04-{cfg.target}-last.safetensors"
    reference, tokenizer, _ = load(base_path, "01_pretrain.py", device, dtype)
    reward_model, _, reward_header = load(reward_path, "03_reward_model.py", device, dtype)
    if reward_header.get("inputs", {}).get("base") != fingerprint(reference):
        raise UserError(f"{reward_path} was trained from another base model than {base_path}: "
                        "run 02_sample_label.py and 03_reward_model.py again")
    norm, length = reward_header["normalisation"][cfg.target], reward_header["length"]
    kind = reward_header.get("kind", "labels")
    prompts = read_prompts(cfg.out / "corpus.txt", tokenizer) if reward_header.get("prompted") else None
    settings = {k: v for k, v in asdict(cfg).items()
                if k not in ("out", "resume", "kl_stop", "max_iterations", "save_every")}
    inputs = {"base": fingerprint(reference), "reward_model": fingerprint(reward_model)}
    resumed = resume_from(state, SCRIPT, settings, inputs) if cfg.resume else None
    for old in () if world()[0] else (cfg.out / "checkpoints").glob(f"{cfg.target}-kl-*.safetensors"):
        if not resumed or load(old, SCRIPT)[2]["step"] >= resumed[2]["step"]:
            old.unlink()  # of an earlier run, or of iterations that are now made again
    policy = (resumed or load(base_path, SCRIPT))[0]
    policy.to(device).dtype = dtype
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), eps=cfg.adam_eps,
                                  weight_decay=0)
    first, batch, kl_before, clips, updates = 0, cfg.batch, 0.0, [], 0
    if resumed:
        load_optimizers(resumed[2], (optimizer,))
        first, batch, kl_before, clips, updates = (
            resumed[2][k] for k in ("step", "batch", "kl", "clip_fractions", "updates"))
    kl = kl_before
    log = Log(cfg.out / f"04-{cfg.target}.jsonl", first)
    print(f"{'iter':>4} {'batch':>5} {'KL +- SE':>13} {'k1':>6} {'score':>7} {'p':>5} {'entropy':>7} "
          f"{'clip %':>6} {'bind %':>6} {'kl old':>7} {'|grad|':>6} {'s':>4}")

    bar = tqdm(range(first, cfg.max_iterations), initial=first, total=cfg.max_iterations, desc="ppo")
    for iteration in bar:
        began = time.time()
        # 1 -- rollout
        mine, mb_size = share(torch.arange(batch), cfg.minibatch), cfg.minibatch // world()[1]
        seed = cfg.seed << 32 | 4 << 24 | iteration
        prompt = draw_prompts(prompts, batch, seed)[mine].to(device)  # (B, 0) without prompts
        y, logp_old = policy.generate(mine, length, seed, prompts=prompt)
        minibatches = [*zip(y.split(mb_size), prompt.split(mb_size))]
        y[0, 0].item()  # waits for a GPU, so that the next line tells the time of the rollout
        rolled = time.time()

        # 2 -- score
        with torch.no_grad():
            score = torch.cat([score_of(reward_model.sentiment(mb), kind, cfg.target) for mb in y.split(mb_size)])
            reward = normalise(score, norm["mean"], norm["std"])

            # 3 -- the KL to the reference, and whether the sampler's log-probs will do as the old ones
            exact, k1, logp, entropy = (torch.cat(x) for x in zip(*(
                kl_nats(mb, policy.before(mb, p), policy.unembed(), reference.before(mb, p), reference.unembed())
                for mb, p in minibatches[: -(-cfg.kl_samples // cfg.minibatch)])))
            (kl, kl_se), (kl_k1, kl_k1_se) = mean_and_error(gather(exact)), mean_and_error(gather(k1))
            sampler_off = gather((logp_old[: len(logp)] - logp).abs().max()[None]).max().item()
            if sampler_off > 5e-6:
                logp_old = torch.cat([policy.logprob(mb, p)[0] for mb, p in minibatches])            # (B, T)
            logp_ref = logp_old if not cfg.kl_coef else \
                torch.cat([reference.logprob(mb, p)[0] for mb, p in minibatches])
            scores, entropy = gather(score), gather(entropy)
        row = {"step": iteration, "batch": batch, "kl": kl, "kl_se": kl_se, "kl_k1": kl_k1,
               "kl_k1_se": kl_k1_se, "score": scores.mean().item(), "score_std": scores.std().item(),
               "p_target": (scores.exp() if kind == "labels" else scores.sigmoid()).mean().item(),
               "reward": gather(reward).mean().item(),
               "entropy": entropy.mean().item(), "updates": updates, "sampler_off": sampler_off}
        scored = time.time()

        # 7 and 8 come before the update: what was measured is the policy as it is now
        # 7 -- checkpoint at each crossing; one file serves all crossings of one iteration
        problem = divergence(kl, kl_before, 0.0, math.isfinite(kl))
        if problem:
            raise UserError(f"diverged at iteration {iteration}: {problem}; {last} is the last good policy")
        crossed = [c for c in CROSSINGS if kl_before < c <= kl]
        header = {k: row[k] for k in ("step", "kl", "kl_se", "kl_k1", "score", "p_target", "entropy")}
        header |= {"settings": settings, "inputs": inputs, "seed": cfg.seed, "target": cfg.target}
        if crossed:
            name = f"{cfg.target}-kl-{crossed[-1]:05.2f}.safetensors"
            save(cfg.out / "checkpoints" / name, policy, tokenizer, crossed=crossed, **header)
        if kl <= cfg.kl_stop:
            save(last, policy, tokenizer, **header)

        # 8 -- stop
        line = (f"{iteration:4d} {batch:5d} {kl:6.2f} +- {kl_se:4.2f} {kl_k1:6.2f} {row['score']:7.3f} "
                f"{row['p_target']:5.2f} {row['entropy']:7.3f}")
        bar.set_postfix(kl=f"{kl:.2f} of {cfg.kl_stop:g} nats", p=f"{row['p_target']:.2f}")
        if kl >= cfg.kl_stop:
            log(**row)
            tqdm.write(f"{line}\nstopped: {kl:.2f} nats is at or above {cfg.kl_stop:g}")
            break

        # 4 -- advantage
        adv = advantage(reward, logp_old, logp_ref, cfg.kl_coef, norm["std"])

        # 5 -- PPO epochs. The first needs no shuffle: rollouts are independent as they come. With several
        # processes each holds an equal part of every minibatch, and later epochs shuffle within it
        stats = []
        for epoch in range(cfg.epochs):
            g = torch.Generator().manual_seed((cfg.seed * 1000 + iteration) * 10 + epoch)
            order = torch.arange(len(y)) if epoch == 0 else torch.randperm(len(y), generator=g)
            for b in order.to(device).split(mb_size):  # in here nothing waits for the GPU
                logp = policy.logprob(y[b], prompt[b])[0]
                loss, s = ppo_loss(logp, logp_old[b], adv[b], cfg.clip)
                optimizer.zero_grad()
                loss.backward()
                average_gradients(policy)
                s["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), math.inf)
                updates += 1
                optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, updates / cfg.warmup)
                optimizer.step()
                stats.append(s | {"loss": loss.detach()})

        row |= {"ratio_off_first": stats[0]["ratio_off"].item(), "lr": optimizer.param_groups[0]["lr"]}
        if not row["ratio_off_first"] < 1e-5:
            raise AssertionError(f"max |ratio - 1| was {row['ratio_off_first']:.1e} before any update")

        # 6 -- log: means over all minibatches and epochs, and the clip fraction of the last epoch
        per_epoch = batch // cfg.minibatch
        for k in ("clip_fraction", "clip_binding", "approx_kl", "grad_norm", "loss"):
            row[k] = gather(torch.stack([s[k] for s in stats])).mean().item()
        last_epoch = gather(torch.stack([s["clip_fraction"] for s in stats[-per_epoch:]]))
        row["clip_fraction_last_epoch"] = last_epoch.mean().item()
        row |= {"s_rollout": rolled - began, "s_score": scored - rolled, "s_update": time.time() - scored}
        log(**row)
        tqdm.write(f"{line} {100 * row['clip_fraction']:6.2f} {100 * row['clip_binding']:6.2f} "
                   f"{row['approx_kl']:7.4f} {row['grad_norm']:6.2f} {time.time() - began:4.0f}")
        problem = divergence(kl, kl, row["clip_fraction"], math.isfinite(row["loss"] + row["grad_norm"]))
        if problem:
            raise UserError(f"diverged at iteration {iteration}: {problem}; {last} is the last good policy")
        clips.append(row["clip_fraction"])
        if row["clip_fraction"] > 0.2:
            tqdm.write("warning: more than 20 % of the ratios are outside the clip range: lower --lr")
        if (larger := next_batch(clips, batch, cfg.max_batch)) > batch:
            tqdm.write(f"batch rule: clip fraction below 1 % for three iterations, batch {batch} -> {larger}")
            batch, clips = larger, []
        kl_before = max(kl, kl_before)
        if (iteration + 1) % cfg.save_every == 0 or iteration + 1 == cfg.max_iterations:
            save(state, policy, tokenizer, (optimizer,), step=iteration + 1, batch=batch, kl=kl_before,
                 clip_fractions=clips, updates=updates, settings=settings, inputs=inputs)
    else:
        print(f"stopped after {cfg.max_iterations} iterations, below {cfg.kl_stop:g} nats: "
              "--resume with more --max-iterations goes on")

    _, _, header = load(last, SCRIPT)
    write(cfg.out / f"policy-{cfg.target}.safetensors", last.read_bytes())
    if kl >= cfg.kl_stop:
        state.unlink(missing_ok=True)
        last.unlink(missing_ok=True)
    print(f"final policy: KL {header['kl']:.2f} +- {header['kl_se']:.2f} nats, "
          f"p({cfg.target}) {header['p_target']:.3f}, entropy {header['entropy']:.3f} nats per token")
    finish("python 05_eval.py", cfg.out)
