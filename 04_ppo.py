"""Stage 4: PPO against the reward model, from the base model to 10 nats away from it.

    python 04_ppo.py                     # 186 s: p(happy) .62 -> .96, 9.9 nats away
    python 04_ppo.py --target sad        # the negative twin: log p(sad), not -log p(happy)
    python 04_ppo.py --reward vader      # by the labeller itself; writes policy-happy-vader, ...

Maximise  E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)]  over the tokens of each batch, where
          rho = pi(token | text before it) / pi_old(token | text before it)  and, at every token,
          A   = (log p(happy | completion) - reward_zero) / reward_std.

Reads   out/base.safetensors, out/reward.safetensors; out/prompts.json if 03 learned from prompts
Writes  out/policy-happy.safetensors (just within 10 nats), out/04-happy.jsonl,
        out/checkpoints/happy-kl-*.safetensors (whenever .25, .5, 1, 1.5, 2, 3, ... is crossed)

Decisions a reader may question:
1. No value function, no GAE, no KL penalty (--kl-coef for comparison): the normalised reward is the
   advantage of every token. Clipping bounds each move away from pi_old; the end bounds the KL.
2. reward_zero and reward_std are constants of the base model's samples. Whitening each batch would
   blow noise up to unit variance once all are alike. The zero is a baseline: as E[grad log pi] = 0,
   it changes not the expected gradient, only its noise. It lies amid the scores of a run, a third
   of a deviation above the base model's mean.
3. A policy is measured before its update, on samples it has just drawn: its KL exact at each token
   (a sum over the vocabulary) of kl_samples of them, less noisy than mean log pi/pi_ref of all.
4. Old log-probs are the sampler's, for free, where they equal those of the training forward pass;
   else (bf16 on most GPUs) a pass of its own forms them. So the first minibatch has ratio 1.
5. SGD, not Adam, which divides by the size of a gradient that is noise for the most part.
6. The head learns 50 times as fast as the rest. With one rate for all, smaller batches and the zero
   at the mean (--lr .05 --head-lr .05 --warmup 30 --batch 2048 --recenter 0) a score of -.10 costs
   7.9 +- 1.0 nats, not 5.8 +- .8 (mean and sd of three seeds).
"""
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

from model import chunked, kl_nats
from running import (State, average_gradients, check_signs, finish, gather, require, share, start,
                     world)
from running.ppo import Keeper, policy_figures, show, update_figures
from running.stages import load_base_and_reward, score_of
from running.text import draw_prompts, read_prompts
from running.vader import vader_score


@dataclass
class Config:
    target: Literal["happy", "sad"] = "happy"
    reward: Literal["model", "vader"] = "model"  # "vader": the ceiling of any reward model
    out: Path = Path("out")   # where all stages write
    seed: int = 0
    resume: bool = False      # continue a killed run from its last saved state
    batch: int = 4096         # completions an iteration; doubled if hardly any ratio is clipped
    max_batch: int = 4096     # the doubling stops here
    minibatch: int = 256      # completions an optimizer step
    epochs: int = 1           # passes over each batch
    lr: float = 0.0012        # of all weights but the head's
    head_lr: float = 0.06     # the head's: decision 6
    momentum: float = 0.9
    warmup: int = 16          # optimizer steps of linear warm-up: the first gradients agree most
    clip: float = 0.2         # ratios are clipped to [1 - clip, 1 + clip]
    kl_coef: float = 0.0      # of a KL penalty, in units of log p(target)
    kl_stop: float = 10.0     # nats per completion
    max_iterations: int = 60
    save_s: float = 30        # seconds between saved states, for --resume
    reward_samples: int = 4096  # samples of the base model behind reward_zero and reward_std
    recenter: float = 0.35    # reward_zero lies so many reward_std above the base model's mean
    kl_samples: int = 512     # completions of an iteration on which the KL is computed

    @property
    def name(self):  # part of the name of every file that this run writes
        return self.target if self.reward == "model" else f"{self.target}-{self.reward}"


ON_GPU = dict(batch=8192, max_batch=8192, minibatch=512)


def check(cfg: Config) -> None:
    check_signs(cfg, positive="batch minibatch epochs warmup clip max_iterations",
                not_negative="lr head_lr momentum kl_coef")
    require(cfg.reward_samples > 1, "--reward-samples must be at least 2")
    require(cfg.kl_samples >= 2 * world()[1], "--kl-samples must be at least 2 a process")
    require(cfg.minibatch % world()[1] == 0, "--minibatch must divide among the processes")
    require(cfg.batch % cfg.minibatch == cfg.max_batch % cfg.minibatch == 0,
            "--batch and --max-batch must be multiples of --minibatch")
    require(cfg.batch <= cfg.max_batch, "--batch must not be larger than --max-batch")


# ---- The mathematics (the KL: `kl_nats` in model.py) ---------------------------------------------
def advantage(reward, logp, logp_ref, kl_coef: float, reward_std: float) -> torch.Tensor:
    """reward (B,), logp, logp_ref (B, T) -> advantage (B, T): the reward at every token; less, if
    kl_coef is not 0, the log-ratios from that token to the end, so that the gradient is that of
    E[score] - kl_coef KL(policy || reference), divided by reward_std as the reward was."""
    log_ratio_to_go = (logp - logp_ref).flip(1).cumsum(1).flip(1)            # (B, T)
    return reward[:, None] - kl_coef / reward_std * log_ratio_to_go


def ppo_loss(logp, logp_old, adv, clip: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7), mean over tokens.

    logp (with gradient), logp_old, adv: (B, T) -> loss, and measured over the tokens:
    clip_fraction: share of ratios outside [1 - clip, 1 + clip]; clip_binding: share where the
    clipped term is the smaller one, so that the gradient is zero; approx_kl: mean of
    (logp - logp_old)^2 / 2, nats per token; ratio_off: max |ratio - 1|.
    """
    ratio = (logp - logp_old).exp()
    plain = ratio * adv
    clipped = ratio.clamp(1 - clip, 1 + clip) * adv
    with torch.no_grad():
        stats = {"clip_fraction": ((ratio - 1).abs() > clip).float().mean(),
                 "clip_binding": (clipped < plain).float().mean(),
                 "approx_kl": 0.5 * (logp - logp_old).square().mean(),
                 "ratio_off": (ratio - 1).abs().max()}
    return -torch.minimum(plain, clipped).mean(), stats


def next_batch(clip_fractions: list[float], batch: int, max_batch: int) -> tuple[int, list[float]]:
    """If hardly any ratio is clipped the gradient is too noisy to lead anywhere: draw more samples.
    clip_fractions: of the iterations at this batch size, from that on which ends the warm-up. If on
    average over the last three fewer than 1 % of the ratios were outside the clip range, double it,
    up to max_batch -> batch, and the clip fractions at that size so far."""
    quiet = len(clip_fractions) >= 3 and sum(clip_fractions[-3:]) / 3 < 0.01
    if not quiet or batch == max_batch:
        return batch, clip_fractions
    return min(2 * batch, max_batch), []


def reward_constants(reward_fn, reference, prompts, length: int, cfg) -> tuple[float, float]:
    """reward_zero and reward_std, over n = cfg.reward_samples of the base model."""
    n, stream = cfg.reward_samples, (cfg.seed << 32) + (3 << 24)  # not the rollouts' random numbers
    prompt = draw_prompts(prompts, n, cfg.seed).to(reference.head.device)    # (n, P)
    y, _ = reference.generate(n, length, stream, prompts=prompt)             # (n, T)
    score = chunked(reward_fn, 256, y, prompt).double()                      # (n,)
    require(score.std() > 1e-3, "all samples get the same reward: label more samples")
    print(f"reward of the base model: {score.mean():.3f} +- {score.std():.3f}")
    return (score.mean() + cfg.recenter * score.std()).item(), score.std().item()


def sgd(policy, cfg: Config) -> torch.optim.SGD:
    """The optimizer: the head has a learning rate of its own."""
    body = [weight for name, weight in policy.named_parameters() if name != "head"]
    groups = [{"params": body, "peak_lr": cfg.lr},
              {"params": [policy.head], "peak_lr": cfg.head_lr}]
    return torch.optim.SGD(groups, cfg.lr, cfg.momentum)


def minibatches(n: int, size: int, epochs: int, seed: int, device):
    """The rows of each minibatch, (size,). The first epoch needs no shuffle: completions are
    independent as they come."""
    for epoch in range(epochs):
        g = torch.Generator().manual_seed(seed * 10 + epoch)
        order = torch.randperm(n, generator=g) if epoch else torch.arange(n)
        yield from order.to(device).split(size)


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    check(cfg)
    reference, reward_model, tokenizer, about = load_base_and_reward(cfg.out, device, dtype)
    prompts = read_prompts(cfg.out / "prompts.json", "train") if about["prompted"] else None
    kind = about["kind"] if cfg.reward == "model" else "labels"

    def reward_fn(y: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Completions y (B, T) after prompt (B, P) -> score (B,): log p(target), or any other."""
        if cfg.reward == "vader":
            return vader_score(tokenizer.decode_batch(y.tolist()), cfg.target).to(device)
        return score_of(reward_model.sentiment(y, prompt), kind, cfg.target)

    reward_zero, reward_std = reward_constants(reward_fn, reference, prompts, about["length"], cfg)
    policy = copy.deepcopy(reference)
    optimizer = sgd(policy, cfg)
    inputs = about["inputs"] | {"reward": f"{reward_zero:.2f} +- {reward_std:.2f}"}
    state = State(cfg, f"04-{cfg.name}", inputs, policy, (optimizer,),
                  step=0, batch=cfg.batch, updates=0, kl_max=0.0, clip_fractions=[])
    run = state.memory  # step, batch, ... clip_fractions; of a resumed run, as they were
    keeper = Keeper(cfg, state, tokenizer, about["inputs"])
    mb_size = cfg.minibatch // world()[1]  # each process has an equal part of every minibatch

    for step in keeper.steps():
        # 1. Rollout: the policy writes a batch of completions.
        seed = (cfg.seed << 32) + (4 << 24) + step  # 4: the rollouts' random numbers; 3: above
        mine = share(torch.arange(run.batch), cfg.minibatch)                 # (B,), their numbers
        prompt = draw_prompts(prompts, run.batch, seed)[mine].to(device)     # (B, P), P may be 0
        y, logp_old = policy.generate(mine, about["length"], seed, prompts=prompt)  # (B, T) each
        keeper.log.lap("s_rollout")

        # 2. Score: log p(target) of each, in standard deviations of the base model's samples.
        score = chunked(reward_fn, mb_size, y, prompt)                       # (B,)
        reward = (score - reward_zero) / reward_std                          # (B,)

        # 3. Measure this policy before it changes: how far has it moved from the reference?
        part = slice(cfg.kl_samples // world()[1])
        kl, k1, logp, entropy = kl_nats(policy, reference, y[part], prompt[part])
        if gather((logp_old[part] - logp).abs().max()[None]).max() > 5e-6:   # unequal: decision 4
            logp_old = chunked(policy.logprob, mb_size, y, prompt)
        row = policy_figures(run, kl, k1, entropy, score, reward, kind)
        keeper.log.lap("s_score")

        # 4. Keep a checkpoint at a crossing. Beyond kl_stop a part of the update is taken back, to
        #    be measured in the next iteration; just within it the run is done, and steps() ends.
        if not keeper.keep(row):
            continue

        # 5. Advantage: the reward of a completion, at each of its tokens (and no KL penalty).
        logp_ref = chunked(reference.logprob, mb_size, y, prompt) if cfg.kl_coef else logp_old
        adv = advantage(reward, logp_old, logp_ref, cfg.kl_coef, reward_std)     # (B, T)

        # 6. PPO epochs: make tokens of good completions likelier than those of bad ones.
        stats = []
        for b in minibatches(len(y), mb_size, cfg.epochs, cfg.seed * 1000 + step, device):
            logp = policy.logprob(y[b], prompt[b])                           # (mb_size, T)
            loss, stat = ppo_loss(logp, logp_old[b], adv[b], cfg.clip)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(policy)
            grad_norm = clip_grad_norm_(policy.parameters(), math.inf)       # measured only
            run.updates += 1
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * min(1.0, run.updates / cfg.warmup)
            optimizer.step()
            stats.append(stat | {"loss": loss.detach(), "grad_norm": grad_norm})
        keeper.log.lap("s_update")

        # 7. Log; double the batch if, after the warm-up, hardly any ratio was clipped.
        row |= update_figures(adv, stats, optimizer.param_groups[0]["lr"])
        keeper.log(**row)
        show(row, tokenizer.decode_batch(y[:3].tolist()) if step % 4 == 0 else [])
        if run.updates >= cfg.warmup:
            run.clip_fractions.append(row["clip_fraction"])
        run.batch, run.clip_fractions = next_batch(run.clip_fractions, run.batch, cfg.max_batch)

    keeper.finish()
    then = "python 05_eval.py" if cfg.reward == "model" else f"read {cfg.out}/04-{cfg.name}.jsonl"
    finish(then, cfg.out, state.earlier_s)
