"""Stage 4: PPO against the reward model, from the base model to 10 nats away from it.

    python 04_ppo.py                     # 137 s: p(happy) .63 -> .94, 9.9 nats away
    python 04_ppo.py --target sad        # the negative twin, by its own target

Maximise  E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)]  over the tokens of each batch, where
          rho = pi(token | text before it) / pi_old(token | text before it)  and, at every token,
          A   = (log p(happy | completion) - reward_mean) / reward_std.

Reads   out/base.safetensors, out/reward.safetensors; out/prompts.json if 03 learned from prompts
Writes  out/policy-happy.safetensors (just within 10 nats), out/04-happy.jsonl,
        out/checkpoints/happy-kl-*.safetensors (one at each crossing of .25, .5, 1, 1.5, ... 9)

Decisions a reader may question:
1. No value function, no GAE, no KL penalty (--kl-coef for comparison): the normalised reward is the
   advantage of every token; clipping bounds each move away from pi_old, and stopping the KL.
2. reward_mean and reward_std are constants of the base model. Whitening each batch instead would
   blow noise up to unit variance once all samples are alike.
3. The policy is measured before it is updated, on the samples it has just drawn: KL, reward and
   entropy of a row belong to one policy and are unbiased, and a checkpoint's KL is its own.
4. KL and entropy are those of `kl_samples` completions, not of all: the exact KL at their prefixes
   has a smaller error than the usual sampled one, k1 = sum log pi - log pi_ref, on four times as
   many.
5. Old log-probs are the sampler's, for free, where they equal those of the training forward pass;
   else (bf16 on most GPUs) a pass of its own forms them. So the first minibatch has ratio 1.
6. SGD, not Adam. As the mean advantage grows, gradients are more and more noise (what all samples
   have in common cancels on average, not in a minibatch); Adam divides by it, and slows down.
7. If the last update leads beyond 10 nats, a part of it is taken back, so that final policies are
   all 9.7 to 10 nats away and can be compared.
8. --target sad maximises log p(sad), which is bounded by 0. Flipping the sign of the happy reward
   would maximise -log p(happy), which is not bounded by anything.
"""
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from model import chunked, draw_prompts, kl_nats, load_base_and_reward, read_prompts, save, score_of
from running import (Log, State, average_gradients, errors, finish, gather, means, remove, require,
                     settings_of, share, start, world)

CROSSINGS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)  # nats
NEAR = 0.97  # of kl_stop: where a run may end
SHOWN = ("batch {batch}  KL {kl:.2f} +- {kl_se:.2f}  k1 {kl_k1:.2f}  score {score:.3f}  "
         "p {p_target:.3f}  entropy {entropy:.3f}  clipped {clip_fraction:.2%}")
SAVED = "The state before is saved: see --resume"


@dataclass
class Config:
    target: Literal["happy", "sad"] = "happy"
    out: Path = Path("out")   # where all stages write
    seed: int = 0
    resume: bool = False      # continue a killed run from its last saved state
    batch: int = 2048         # completions an iteration; doubled if hardly any ratio is clipped
    max_batch: int = 4096     # the doubling stops here
    minibatch: int = 256      # completions an optimizer step
    epochs: int = 1           # passes over each batch
    lr: float = 0.05
    momentum: float = 0.9
    warmup: int = 30          # optimizer steps of linear warm-up: the first ones lead farthest
    clip: float = 0.2         # ratios are clipped to [1 - clip, 1 + clip]
    kl_coef: float = 0.0      # of a KL penalty (k1), in units of log p(target)
    kl_stop: float = 10.0     # nats per completion
    max_iterations: int = 60
    reward_samples: int = 4096  # samples of the base model behind reward_mean and reward_std
    kl_samples: int = 512     # completions of an iteration on which the KL is computed


ON_GPU = dict(batch=4096, max_batch=8192, minibatch=512)


def check(cfg: Config) -> None:
    for knob in ("batch", "minibatch", "epochs", "warmup", "clip", "max_iterations"):
        require(getattr(cfg, knob) > 0, f"--{knob.replace('_', '-')} must be positive")
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
    clip_fractions: of the iterations at this batch size. If on average over the last three fewer
    than 1 % of the ratios were outside the clip range, double it, up to max_batch -> batch, and the
    clip fractions at that size so far."""
    quiet = len(clip_fractions) >= 3 and sum(clip_fractions[-3:]) / 3 < 0.01
    if not quiet or batch == max_batch:
        return batch, clip_fractions
    return min(2 * batch, max_batch), []


def reward_constants(reward_fn, reference, prompts, length: int, n: int, seed: int):
    """reward_mean and reward_std, over n samples of the base model."""
    stream = seed << 32 | 3 << 24  # of random numbers; the rollouts have 4, 05 has 5
    prompt = draw_prompts(prompts, n, seed).to(reference.head.device)        # (n, P)
    y, _ = reference.generate(n, length, stream, prompts=prompt)             # (n, T)
    score = chunked(reward_fn, 256, y, prompt).double()                      # (n,)
    require(score.std() > 1e-3, "all samples get the same reward: label more samples")
    print(f"reward of the base model: {score.mean():.3f} +- {score.std():.3f}")
    return score.mean().item(), score.std().item()


def way_back(kl_before: float, kl_after: float, kl: float) -> float:
    """An update led from kl_before to kl_after: the share of it to take back so that the KL is
    `kl`, which lies in between. Along a line in the weights sqrt KL is nearly linear."""
    return (kl_after ** 0.5 - kl ** 0.5) / (kl_after ** 0.5 - kl_before ** 0.5)


def minibatches(n: int, size: int, epochs: int, seed: int, device):
    """The rows of each minibatch, (size,). The first epoch needs no shuffle: completions are
    independent as they come."""
    for epoch in range(epochs):
        g = torch.Generator().manual_seed(seed * 10 + epoch)
        order = torch.randperm(n, generator=g) if epoch else torch.arange(n)
        yield from order.to(device).split(size)


# ---- What the log says ---------------------------------------------------------------------------
def policy_figures(kl, k1, entropy, score, reward, kind: str) -> dict[str, float]:
    """Of the policy that drew these completions: means over those of all processes, and errors."""
    p = score.exp() if kind == "labels" else score.sigmoid()  # of a log-prob; of a log-odds
    row = means(kl=kl, kl_k1=k1, score=score, p_target=p, reward=reward, entropy=entropy)
    return row | errors(kl=kl, kl_k1=k1) | {"score_std": gather(score).std().item()}


def update_figures(adv, stats: list[dict]) -> dict[str, float]:
    """Of an update by the advantage adv (B, T): means over its minibatches (of the clip fractions
    without the first, where every ratio is 1), and how far from 1 the ratios of the first were."""
    columns = {k: torch.stack([s[k] for s in stats]) for k in stats[0] if k != "ratio_off"}
    for k in ("clip_fraction", "clip_binding"):
        columns[k] = columns[k][1:] if len(stats) > 1 else columns[k]
    adv = gather(adv)
    return means(**columns) | {"ratio_off_first": stats[0]["ratio_off"].item(),
                               "adv_mean": adv.mean().item(), "adv_std": adv.std().item()}


def check_policy(row: dict, kl_max: float) -> None:
    """Raises UserError if the KL has jumped from kl_max, the largest so far."""
    require(row["kl"] < kl_max + 5, f"diverged at iteration {row['step']}: the KL jumped from "
            f"{kl_max:.1f} to {row['kl']:.1f} nats; lower --lr. {SAVED}")


def check_update(row: dict) -> None:
    """Raises UserError if the update has ruined the policy."""
    assert row["ratio_off_first"] < 1e-5, "the ratio was not 1 before any update"
    clipped = f"{row['clip_fraction']:.0%} of the ratios were clipped"
    require(math.isfinite(row["loss"] + row["grad_norm"]) and row["clip_fraction"] < 0.5,
            f"diverged at iteration {row['step']}: {clipped}, the loss is {row['loss']:.3g}; "
            f"lower --lr. {SAVED}")
    if row["clip_fraction"] > 0.2:
        tqdm.write(f"warning: {clipped}: lower --lr")


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    check(cfg)
    reference, reward_model, tokenizer, about = load_base_and_reward(cfg.out, device, dtype)
    prompts = read_prompts(cfg.out / "prompts.json", "train") if about["prompted"] else None

    def reward_fn(y: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Completions y (B, T) after prompt (B, P) -> score (B,), log p(target). Any other function
        may stand here: `tokenizer.decode_batch(y.tolist())` are the texts."""
        return score_of(reward_model.sentiment(y, prompt), about["kind"], cfg.target)

    reward_mean, reward_std = reward_constants(
        reward_fn, reference, prompts, about["length"], cfg.reward_samples, cfg.seed)
    policy = copy.deepcopy(reference)
    optimizer = torch.optim.SGD(policy.parameters(), cfg.lr, cfg.momentum)
    inputs = about["inputs"] | {"reward": f"{reward_mean:.2f} +- {reward_std:.2f}"}
    state = State(cfg, f"04-{cfg.target}", inputs, policy, (optimizer,),
                  step=0, batch=cfg.batch, updates=0, kl_max=0.0, clip_fractions=[])
    run = state.memory  # what a resumed run must know, besides the weights
    require(run.step < cfg.max_iterations and run.kl_max < NEAR * cfg.kl_stop,
            f"{state.path} is beyond --max-iterations or --kl-stop already")
    if run.step == 0:
        remove(cfg.out / "checkpoints", f"{cfg.target}-kl-*.safetensors")  # of an earlier run
    log = Log(cfg.out / f"04-{cfg.target}.jsonl", run.step)
    mb_size = cfg.minibatch // world()[1]  # each process has an equal part of every minibatch
    n_kl = cfg.kl_samples // world()[1]
    made_from = {"settings": settings_of(cfg), "inputs": about["inputs"]}

    final, final_row = None, None  # the policy measured last of those within kl_stop
    taken_back, done = 0.0, False
    for step in tqdm(range(run.step, cfg.max_iterations), desc="ppo"):
        # 1. Rollout: the policy writes a batch of completions.
        seed = cfg.seed << 32 | 4 << 24 | step
        mine = share(torch.arange(run.batch), cfg.minibatch)                 # (B,), their numbers
        prompt = draw_prompts(prompts, run.batch, seed)[mine].to(device)     # (B, P), P may be 0
        y, logp_old = policy.generate(mine, about["length"], seed, prompts=prompt)  # (B, T) each
        log.lap("s_rollout")

        # 2. Score: log p(target) of each, in standard deviations of the base model's samples.
        score = chunked(reward_fn, mb_size, y, prompt)                       # (B,)
        reward = (score - reward_mean) / reward_std                          # (B,)

        # 3. Measure this policy before it changes: how far has it moved from the reference?
        kl, k1, logp, entropy = kl_nats(policy, reference, y[:n_kl], prompt[:n_kl])
        if gather((logp_old[:n_kl] - logp).abs().max()[None]).max() > 5e-6:  # rounded otherwise
            logp_old = chunked(policy.logprob, mb_size, y, prompt)
        row = {"step": step, "batch": run.batch, "updates": run.updates} | policy_figures(
            kl, k1, entropy, score, reward, about["kind"])
        log.lap("s_score")

        # 4. Keep a checkpoint at each crossing of the KL. End just within 10 nats: if an update led
        # beyond, take a part of it back; the next iteration measures what that gives, and ends.
        check_policy(row, run.kl_max)
        if row["kl"] > cfg.kl_stop and not taken_back:
            log(**row)
            taken_back = way_back(final_row["kl"], row["kl"], 0.985 * cfg.kl_stop)
            for name, weight in policy.state_dict().items():
                weight.lerp_(final[name], taken_back)
            continue
        if row["kl"] <= cfg.kl_stop:
            final, final_row = copy.deepcopy(policy.state_dict()), row
        if crossed := [c for c in CROSSINGS if run.kl_max < c <= row["kl"]]:
            path = cfg.out / "checkpoints" / f"{cfg.target}-kl-{crossed[-1]:05.2f}.safetensors"
            save(path, policy, tokenizer, crossed=crossed, **row, **made_from)
        run.kl_max = max(row["kl"], run.kl_max)
        if done := taken_back > 0 or row["kl"] >= NEAR * cfg.kl_stop:
            log(**row, taken_back=taken_back)
            break
        state.save(step=step)

        # 5. Advantage: the reward of a completion, at each of its tokens.
        logp_ref = logp_old  # for a penalty of 0
        if cfg.kl_coef:
            logp_ref = chunked(reference.logprob, mb_size, y, prompt)            # (B, T)
        adv = advantage(reward, logp_old, logp_ref, cfg.kl_coef, reward_std)     # (B, T)

        # 6. PPO epochs: make the tokens of good completions likelier than those of bad ones, until
        # the clip range is left.
        stats = []
        for b in minibatches(len(y), mb_size, cfg.epochs, cfg.seed * 1000 + step, device):
            logp = policy.logprob(y[b], prompt[b])                           # (mb_size, T)
            loss, stat = ppo_loss(logp, logp_old[b], adv[b], cfg.clip)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(policy)
            stat["grad_norm"] = clip_grad_norm_(policy.parameters(), math.inf)  # measured only
            run.updates += 1
            optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, run.updates / cfg.warmup)
            optimizer.step()
            stats.append(stat | {"loss": loss.detach()})
        log.lap("s_update")

        # 7. Log; double the batch if hardly any ratio was clipped.
        row = row | update_figures(adv, stats) | {"lr": optimizer.param_groups[0]["lr"]}
        log(**row)
        tqdm.write(SHOWN.format(**row))
        if step % 4 == 0:
            for text in tokenizer.decode_batch(y[:3].tolist()):
                tqdm.write(f"    {text!r}")
        check_update(row)
        run.batch, run.clip_fractions = next_batch(
            run.clip_fractions + [row["clip_fraction"]], run.batch, cfg.max_batch)

    policy.load_state_dict(final)
    save(cfg.out / f"policy-{cfg.target}.safetensors", policy, tokenizer, **final_row, **made_from)
    if done:
        print(f"stopped: just within {cfg.kl_stop:g} nats, {taken_back:.0%} of the last update was "
              "taken back")
        state.delete()
    else:
        print(f"stopped after {cfg.max_iterations} iterations, below {cfg.kl_stop:g} nats: "
              "--resume with more --max-iterations goes on")
    print("final policy: KL {kl:.2f} +- {kl_se:.2f} nats, p({target}) {p_target:.3f}, entropy "
          "{entropy:.3f} nats per token".format(target=cfg.target, **final_row))
    finish("python 05_eval.py", cfg.out)
