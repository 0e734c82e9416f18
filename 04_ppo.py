"""Stage 4: PPO trains the base model to please the reward model, within 10 nats of where it began.

    python 04_ppo.py                     # 139 s: p(happy) 0.62 -> 0.97, 9.7 nats away
    python 04_ppo.py --target sad        # towards sad: rewards log p(sad), not -log p(happy)
    python 04_ppo.py --reward vader      # VADER itself is the reward; writes policy-happy-vader

PPO (proximal policy optimisation) trains a copy of the base model, the policy pi. In each iteration
the policy writes a batch of completions (sampled texts), and the reward model scores them. Gradient
steps then maximise, on average over all tokens of the batch,

          min(rho A, clip(rho, 1 - eps, 1 + eps) A),  where eps is --clip,
    rho = pi(token | text before it) / pi_old(token | text before it),
    A   = (log p(happy | completion) - reward_mean) / reward_std, the same for all its tokens.

pi_old is the policy that wrote the batch. The ratio rho says how many times as likely pi makes a
token. The advantage A says by how many standard deviations the completion beats the base model's
average. If A > 0, the gradient raises rho; if A < 0, it lowers rho. Once rho is past 1 + eps, or
1 - eps, this token has no gradient any more, and only other tokens move rho. KL(policy || base
model), the mean of log(pi / base) over the policy's completions, says how far the policy has moved,
in nats (1 nat = 1.44 bits). The code calls the base model `reference`.

Reads   out/base.safetensors, out/reward.safetensors; out/prompts.json if 02 ran with --prompts
Writes  out/policy-happy.safetensors: the last policy whose KL was at most 10 nats
        out/checkpoints/happy-kl-*.safetensors: one whenever sqrt KL has grown by 0.25
        out/04-happy.jsonl: one row per iteration
        A new run renames the previous run's checkpoints and log to *.old.

Decisions a reader may question:
1. Every token gets the whole reward of its completion: no value function, no GAE. There is no KL
   penalty (--kl-coef adds one, to compare): clipping limits each iteration, and stopping at kl_stop
   bounds the KL.
2. We measure reward_mean and reward_std once, on samples of the base model. Dividing by each
   batch's deviation would amplify noise once all scores are alike.
3. We measure the KL on 256 completions of each new batch, before training on it. At each token we
   sum pi log(pi / reference) over the vocabulary: less noisy than log(pi / reference) of the drawn
   token alone.
4. The sampler also returns log-probs. We use them for pi_old if the training pass agrees with them
   on the first minibatch. Otherwise we recompute them; we expect that in bf16 on most GPUs. So rho
   starts at 1 in every iteration.
5. If fewer than 1% of ratios leave the clip range, the steps are too small, or cancel out as noise.
   So we double the batch, up to max_batch: more steps per iteration average the noise out.
"""
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from model import (
    Log,
    UserError,
    average_gradients,
    check_numbers,
    chunked,
    command,
    draw_prompts,
    fingerprint,
    finish,
    gather,
    kl_nats,
    load,
    my_rows,
    old_name,
    only_writer,
    provenance,
    read_prompts,
    remove,
    require,
    resume,
    save,
    save_state,
    stale,
    start,
    world,
)


@dataclass
class Config:
    target: Literal["happy", "sad"] = "happy"    # the feeling that the policy learns to express
    reward: Literal["model", "vader"] = "model"  # "vader": the lexicon that made the labels
    out: Path = Path("out")   # where all stages write
    seed: int = 0
    resume: bool = False      # continue a killed run from its last saved state
    batch: int = 1536         # completions per iteration
    max_batch: int = 12_288   # the batch doubles up to this while under 1% of ratios are clipped
    minibatch: int = 96       # completions per optimizer step
    epochs: int = 1           # passes over each batch
    lr: float = 1e-4          # AdamW's learning rate
    warmup: int = 32          # optimizer steps of linear warm-up
    clip: float = 0.2         # ratios are clipped to [1 - clip, 1 + clip]
    kl_coef: float = 0.0      # KL penalty: score subtracted per nat
    kl_stop: float = 10.0     # stop beyond this KL, nats per completion
    max_iterations: int = 60
    save_s: float = 30        # seconds between saved states, for --resume
    reward_samples: int = 4096  # base-model samples that reward_mean and reward_std come from
    kl_samples: int = 256     # completions per iteration on which we measure the KL

    @property
    def name(self):  # part of the name of every file that this run writes
        return self.target if self.reward == "model" else f"{self.target}-{self.reward}"


ON_GPU = dict(batch=8192, max_batch=65_536, minibatch=512)  # not tried yet


def check(cfg: Config) -> None:
    check_numbers(cfg, not_negative=("lr", "kl_coef"), positive=(
        "batch", "minibatch", "epochs", "warmup", "clip", "max_iterations"))
    require(cfg.kl_stop > 0, "--kl-stop must be positive")
    require(cfg.reward_samples > 1, "--reward-samples must be at least 2")
    require(cfg.kl_samples >= 2 * world()[1], "--kl-samples must be at least 2 a process")
    require(cfg.minibatch % world()[1] == 0, "--minibatch must be a multiple of the number "
            "of processes")
    require(cfg.batch % cfg.minibatch == cfg.max_batch % cfg.minibatch == 0,
            "--batch and --max-batch must be multiples of --minibatch")
    require(cfg.batch <= cfg.max_batch, "--batch must not be larger than --max-batch")


# ---- The mathematics (the KL is `kl_nats` in model.py) -------------------------------------------
def advantage(reward, logp, logp_ref, kl_coef: float, reward_std: float) -> torch.Tensor:
    """reward (B,), logp, logp_ref (B, T) -> advantage (B, T): each token gets the whole reward.

    With kl_coef, we subtract a multiple of logp - logp_ref, summed from this token to the end.
    This gives the gradient of E[score] - kl_coef KL(policy || reference), divided by reward_std.
    """
    log_ratio_to_go = (logp - logp_ref).flip(1).cumsum(1).flip(1)            # (B, T)
    return reward[:, None] - kl_coef / reward_std * log_ratio_to_go


def ppo_loss(logp, logp_old, adv, clip: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped objective (Schulman et al. 2017, arXiv:1707.06347, eq. 7), mean over tokens.

    logp (with gradient), logp_old, adv: (B, T) -> loss (the objective, negated), and statistics:
    clip_fraction   fraction of ratios outside [1 - clip, 1 + clip]
    clip_binding    fraction whose gradient is zero, because the clipped term is the smaller one
    approx_kl       mean of (logp - logp_old)^2 / 2: KL from pi_old, in nats per token
    ratio_off       max |ratio - 1|
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
    """Double the batch, up to max_batch, if fewer than 1% of ratios were clipped in the last three
    iterations: the steps are then too small, or cancel out. clip_fractions: one per iteration at
    this batch size, since warm-up ended. -> batch size, clip fractions at that size."""
    quiet = len(clip_fractions) >= 3 and sum(clip_fractions[-3:]) / 3 < 0.01
    if not quiet or batch == max_batch:
        return batch, clip_fractions
    return min(2 * batch, max_batch), []


def reward_constants(reward_fn, reference, prompts, length: int, cfg) -> tuple[float, float]:
    """reward_mean and reward_std, from cfg.reward_samples samples of the base model."""
    n, seed = cfg.reward_samples, (cfg.seed << 32) + (3 << 24)  # 3: other samples than rollouts'
    prompt = draw_prompts(prompts, n, cfg.seed).to(reference.head.device)    # (n, P)
    y, _ = reference.generate(n, length, seed, prompts=prompt)               # (n, T)
    score = chunked(reward_fn, 256, y, prompt).double()                      # (n,)
    bad = int((~score.isfinite()).sum())
    require(bad == 0, f"the reward is not finite for {bad:,} of {len(score):,} completions")
    require(score.std() > 1e-3, "all samples of the base model get the same reward, so there is "
            "nothing to learn: label more, or change reward_fn")
    print(f"reward of the base model: mean {score.mean():.3f}, deviation {score.std():.3f}")
    return score.mean().item(), score.std().item()


def scores_of(reward_fn):
    """Wrap reward_fn: convert what it returns to (B,) float32, or raise UserError."""
    def scores(y, prompt):
        score, expected = reward_fn(y, prompt), f"return one number for each, shape ({len(y)},)"
        try:
            found = torch.as_tensor(score, dtype=torch.float32, device=y.device)
        except (TypeError, ValueError, RuntimeError) as error:  # no numbers
            raise UserError(f"reward_fn returns {type(score).__name__} for {len(y)} completions: "
                            f"{expected}") from error
        require(found.shape == y.shape[:1], f"reward_fn returns shape {tuple(found.shape)} for "
                f"{len(y)} completions: {expected}")
        return found
    return scores


def vader_score(texts: list[str], target: str) -> torch.Tensor:
    """B texts -> (B,): log p(target), with (1 + VADER's compound score) / 2 as p(happy)."""
    vader = SentimentIntensityAnalyzer()
    p_happy = torch.tensor([(1 + vader.polarity_scores(t)["compound"]) / 2 for t in texts])
    return (p_happy if target == "happy" else 1 - p_happy).clamp_min(1e-4).log()


def minibatches(n: int, size: int, epochs: int, seed: int, device):
    """Yield the rows of each minibatch, (size,). The first epoch needs no shuffle, because
    completions are drawn independently."""
    for epoch in range(epochs):
        g = torch.Generator().manual_seed(seed * 10 + epoch)
        order = torch.randperm(n, generator=g) if epoch else torch.arange(n)
        yield from order.to(device).split(size)


# ---- Figures for the log: the same in all processes ----------------------------------------------
def mean(x: torch.Tensor) -> float:
    return gather(x).mean().item()


def standard_error(x: torch.Tensor) -> float:
    return gather(x).std().item() / (len(x) * world()[1]) ** 0.5


def now() -> float:
    """The time in seconds, once the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def show(row: dict, texts: list[str]) -> None:
    """Print a row and some samples. Raises UserError if the update has ruined the policy."""
    tqdm.write("batch {batch}  KL {kl:.2f} +- {kl_se:.2f}  k1 {kl_k1:.2f}  score {score:.3f}  "
               "p {p_target:.3f}  entropy {entropy:.3f}  clipped {clip_fraction:.2%}".format(**row))
    for text in texts:
        tqdm.write(f"    {text!r}")
    clipped = f"{row['clip_fraction']:.0%} of the ratios were clipped"
    require(math.isfinite(row["loss"]) and row["clip_fraction"] < 0.5, "diverged at iteration "
            f"{row['step']}: {clipped}, the loss is {row['loss']:.3g}; lower --lr")
    if row["clip_fraction"] > 0.2:
        tqdm.write(f"warning: {clipped}: lower --lr")


def begin(cfg: Config, path: Path, inputs: dict, policy, optimizer, **new) -> SimpleNamespace:
    """The run's state: new, or with --resume the saved one. Renames the checkpoints and the log of
    an old run to *.old."""
    saved = resume(path, cfg, inputs)
    whole = {"reward_mean", "reward_std", "optimizer", "policy", "rows", "batch"} <= saved.keys()
    require(not saved or whole, f"{path} was written by another version: start again without "
            "--resume")
    if saved and abs(saved["reward_mean"] - new["reward_mean"]) > 0.1 * new["reward_std"]:
        print("the reward has changed: starting from the beginning")
        saved = {}
    groups = optimizer.state_dict()["param_groups"][0].keys()
    if saved and saved["optimizer"]["param_groups"][0].keys() != groups:
        print("the optimizer has changed: starting from the beginning")
        saved = {}
    run = SimpleNamespace(**new | {
        "step": 0, "batch": cfg.batch, "updates": 0, "clip_fractions": [], "kl": 0.0, "kept": 0.0,
        "rows": [], "final": {}, "seconds": 0.0, "inputs": inputs, "policy": policy.state_dict(),
        "optimizer": optimizer.state_dict()} | saved)
    require(run.step < cfg.max_iterations and run.kl <= cfg.kl_stop,
            f"{path} has already reached --max-iterations or --kl-stop")
    with stale(path):
        policy.load_state_dict(run.policy)
        optimizer.load_state_dict(run.optimizer)
    logged = {row.get("checkpoint") for row in run.rows}
    found = (cfg.out / "checkpoints").glob(f"{cfg.name}-kl-[0-9][0-9].[0-9][0-9].safetensors")
    if old := [path for path in found if path.name not in logged and path.is_file()]:
        print(f"{len(old)} checkpoints that this run's log does not name are now .old")
    log = cfg.out / f"04-{cfg.name}.jsonl"
    if log.exists() and not saved:
        old.append(log)
    if world()[0] == 0:
        for path in old:
            path.rename(old_name(path))  # not deleted: this run may fail early
    return run


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    check(cfg)
    only_writer(cfg.out / f"policy-{cfg.name}.safetensors")
    reference, tokenizer, _ = load(cfg.out / "base.safetensors", "01_pretrain.py", device, dtype)
    path = cfg.out / "reward.safetensors"
    reward_model, _, about = load(path, "03_reward_model.py", device, dtype)
    inputs = {"base": fingerprint(reference), "reward_model": fingerprint(reward_model)}
    require("prompted" in about and "kind" in about, f"{path} is not a reward model: run "
            f"{command('03_reward_model.py')} again")
    require(about["inputs"]["base"] == inputs["base"], f"{path} was made from another base model: "
            f"run {command('02_sample_label.py')} and {command('03_reward_model.py')} again")
    prompts = None
    if about["prompted"]:
        prompts = read_prompts(cfg.out / "prompts.json", "train", reference.n_text)
    length, target = about["length"], ("happy", "sad").index(cfg.target)
    # pairs teach log p(happy) - log p(sad), not the two log-probs
    log_odds = about["kind"] == "comparisons" and cfg.reward == "model"

    def reward_fn(y: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Completions y (B, T) after prompt (B, P) -> score (B,). Return your own score here."""
        if cfg.reward == "vader":
            return vader_score(tokenizer.decode_batch(y.tolist()), cfg.target).to(device)
        log_p = reward_model.sentiment(y, prompt)                            # (B, 2): happy, sad
        if log_odds:
            return log_p[:, target] - log_p[:, 1 - target]
        return log_p[:, target]

    reward_fn = scores_of(reward_fn)
    reward_mean, reward_std = reward_constants(reward_fn, reference, prompts, length, cfg)
    policy = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, (0.9, 0.95), weight_decay=0,
                                  fused=True)
    state_path = cfg.out / f"04-{cfg.name}-state.pt"  # for --resume
    run = begin(cfg, state_path, inputs, policy, optimizer, reward_mean=reward_mean,
                reward_std=reward_std)
    log = Log(cfg.out / f"04-{cfg.name}.jsonl", run.rows)
    mb_size = cfg.minibatch // world()[1]  # each process takes an equal part of every minibatch
    saved = time.monotonic()

    for step in tqdm(range(run.step, cfg.max_iterations), desc="ppo"):
        # 1. Rollout: the policy writes a batch of completions, B of them in this process.
        began = now()
        seed = (cfg.seed << 32) + (4 << 24) + step  # 4: random numbers for rollouts only
        mine = my_rows(torch.arange(run.batch), cfg.minibatch)               # (B,), their numbers
        prompt = draw_prompts(prompts, run.batch, seed)[mine].to(device)     # (B, P), P may be 0
        y, logp_old = policy.generate(mine, length, seed, prompts=prompt)    # (B, T) each
        rolled_out = now()

        # 2. Score each completion; subtract reward_mean and divide by reward_std (decision 2).
        score = chunked(reward_fn, mb_size, y, prompt)                       # (B,)
        reward = (score - run.reward_mean) / run.reward_std                  # (B,)
        require(math.isfinite(mean(score)), f"the reward is not finite at iteration {step}")

        # 3. Measure this policy before it changes: how far has it moved from the reference?
        part = slice(cfg.kl_samples // world()[1])
        kl, k1, _, entropy = kl_nats(policy, reference, y[part], prompt[part])
        logp = chunked(policy.logprob, mb_size, y[:mb_size], prompt[:mb_size])
        if gather((logp_old[:mb_size] - logp).abs().max()[None]).max() > 5e-6:   # decision 4
            logp_old = chunked(policy.logprob, mb_size, y, prompt)
        row = {"step": step, "batch": run.batch, "updates": run.updates,
               "kl": mean(kl), "kl_se": standard_error(kl),                  # nats per completion
               "kl_k1": mean(k1), "kl_k1_se": standard_error(k1),            # the same KL, noisier
               "score": mean(score), "score_std": gather(score).std().item(),
               "reward": mean(reward), "entropy": mean(entropy),             # nats per token
               "p_target": mean(score.sigmoid() if log_odds else score.exp())}
        scored = now()

        # 4. Stop beyond kl_stop: the policy before this one is final. Otherwise save a state for
        #    --resume every save_s, and a checkpoint whenever sqrt KL has grown by 0.25.
        require(row["kl"] < run.kl + 5, f"diverged at iteration {step}: the KL jumped from "
                f"{run.kl:.1f} to {row['kl']:.1f} nats; lower --lr")
        if row["kl"] > cfg.kl_stop:
            require(run.final, f"the policy is {row['kl']:.2f} nats away before any update: raise "
                    "--kl-stop")
            log(**row)
            tqdm.write(f"stopped: {row['kl']:.2f} nats; the policy before this one is final")
            break
        run.kl, run.final, run.policy = row["kl"], dict(row), copy.deepcopy(policy.state_dict())
        if time.monotonic() - saved > cfg.save_s or step + 1 == cfg.max_iterations:
            run.step, run.optimizer, saved = step, optimizer.state_dict(), time.monotonic()
            save_state(state_path, cfg, vars(run))
        if run.kl >= (run.kept ** 0.5 + 0.25) ** 2:
            run.kept = run.kl
            row["checkpoint"] = f"{cfg.name}-kl-{run.kl:05.2f}.safetensors"
            save(cfg.out / "checkpoints" / row["checkpoint"], policy, tokenizer, **row,
                 inputs=inputs, **provenance(cfg, run.seconds))

        # 5. Advantage: each token gets its completion's reward, minus the KL penalty if any.
        logp_ref = chunked(reference.logprob, mb_size, y, prompt) if cfg.kl_coef else logp_old
        adv = advantage(reward, logp_old, logp_ref, cfg.kl_coef, run.reward_std)  # (B, T)

        # 6. Update, in minibatches: the tokens of good completions become likelier.
        stats = []
        for b in minibatches(len(y), mb_size, cfg.epochs, cfg.seed * 1000 + step, device):
            logp = policy.logprob(y[b], prompt[b])                           # (mb_size, T)
            loss, stat = ppo_loss(logp, logp_old[b], adv[b], cfg.clip)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(policy)
            grad_norm = clip_grad_norm_(policy.parameters(), math.inf)       # only measures
            run.updates += 1
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1.0, run.updates / cfg.warmup)
            optimizer.step()
            stats.append(stat | {"loss": loss.detach(), "grad_norm": grad_norm})

        # 7. Log. In the first minibatch every ratio is 1, so the clip fractions leave it out.
        assert stats[0]["ratio_off"] < 1e-5, "the ratio must be 1 before any update"
        for key in ("clip_fraction", "clip_binding", "approx_kl", "loss", "grad_norm"):
            used = stats[1:] if key.startswith("clip") and len(stats) > 1 else stats
            row[key] = mean(torch.stack([stat[key] for stat in used]))
        row |= {"ratio_off_first": stats[0]["ratio_off"].item(), "adv_mean": mean(adv),
                "adv_std": gather(adv).std().item(), "lr": optimizer.param_groups[0]["lr"],
                "s_rollout": rolled_out - began, "s_score": scored - rolled_out,
                "s_update": now() - scored}
        log(**row)
        show(row, tokenizer.decode_batch(y[:3].tolist()) if step % 4 == 0 else [])

        # 8. Double the batch if hardly any ratio was clipped.
        if run.updates >= cfg.warmup:
            run.clip_fractions.append(row["clip_fraction"])
        batch, run.clip_fractions = next_batch(run.clip_fractions, run.batch, cfg.max_batch)
        if batch > run.batch:
            tqdm.write(f"fewer than 1% of ratios were clipped: the batch doubles to {batch:,}")
            run.batch = batch

    policy.load_state_dict(run.policy)
    save(cfg.out / f"policy-{cfg.name}.safetensors", policy, tokenizer, **run.final, inputs=inputs,
         **provenance(cfg, run.seconds))
    if row["kl"] > cfg.kl_stop:
        remove(state_path)
    else:
        print(f"still below {cfg.kl_stop:g} nats: to continue, add --resume and raise "
              "--max-iterations")
    print("final policy: KL {kl:.2f} +- {kl_se:.2f} nats, p({target}) {p_target:.3f}, entropy "
          "{entropy:.3f} nats per token".format(target=cfg.target, **run.final))
    next_command = "python 05_eval.py" if cfg.reward == "model" else f"read {log.file.name}"
    if len(run.rows) == 1:  # 05 needs two
        next_command = "the same command with --resume and a larger --max-iterations"
    finish(next_command, run.seconds)
