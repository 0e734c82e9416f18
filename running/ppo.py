"""What 04 says and keeps of a run: figures for its log, checkpoints, the final policy, warnings."""
import copy
import math

import torch
from tqdm import tqdm

from model import save
from running.files import remove, require, settings_of
from running.processes import errors, gather, means
from running.script import Log

CROSSINGS = (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 20, 25, 30)  # nats
NEAR = 0.97  # of kl_stop: where a run may end
SHOWN = ("batch {batch}  KL {kl:.2f} +- {kl_se:.2f}  k1 {kl_k1:.2f}  score {score:.3f}  "
         "p {p_target:.3f}  entropy {entropy:.3f}  clipped {clip_fraction:.2%}")
DIVERGED = "diverged at iteration {step}: {why}; lower --lr and --head-lr"


def policy_figures(run, kl, k1, entropy, score, reward, kind: str) -> dict[str, float]:
    """Of the policy that drew these completions: how far the run is, means over the completions of
    all processes, and errors."""
    row = {"step": run.step, "batch": run.batch, "updates": run.updates}
    p = score.exp() if kind == "labels" else score.sigmoid()  # of a log-prob; of a log-odds
    row |= means(kl=kl, kl_k1=k1, score=score, p_target=p, reward=reward, entropy=entropy)
    return row | errors(kl=kl, kl_k1=k1) | {"score_std": gather(score).std().item()}


def update_figures(adv, stats: list[dict], lr: float) -> dict[str, float]:
    """Of an update by the advantage adv (B, T): means over its minibatches (of the clip fractions
    without the first, where every ratio is 1), and how far from 1 the ratios of the first were."""
    columns = {k: torch.stack([s[k] for s in stats]) for k in stats[0] if k != "ratio_off"}
    for k in ("clip_fraction", "clip_binding"):
        columns[k] = columns[k][1:] if len(stats) > 1 else columns[k]
    adv = gather(adv)
    return means(**columns) | {"ratio_off_first": stats[0]["ratio_off"].item(), "lr": lr,
                               "adv_mean": adv.mean().item(), "adv_std": adv.std().item()}


def show(row: dict, texts: list[str]) -> None:
    """On the screen, above the progress bar. Raises UserError if the update has ruined the
    policy."""
    assert row["ratio_off_first"] < 1e-5, "the ratio was not 1 before any update"
    tqdm.write(SHOWN.format(**row))
    for text in texts:
        tqdm.write(f"    {text!r}")
    clipped = f"{row['clip_fraction']:.0%} of the ratios were clipped"
    why = f"{clipped}, the loss is {row['loss']:.3g}"
    require(math.isfinite(row["loss"] + row["grad_norm"]) and row["clip_fraction"] < 0.5,
            DIVERGED.format(step=row["step"], why=why))
    if row["clip_fraction"] > 0.2:
        tqdm.write(f"warning: {clipped}: lower --lr and --head-lr")


def way_back(kl_before: float, kl_after: float, kl: float) -> float:
    """An update led from kl_before to kl_after: the share of it to take back so that the KL is
    `kl`, which lies in between. Along a line in the weights sqrt KL is nearly linear."""
    return (kl_after ** 0.5 - kl ** 0.5) / (kl_after ** 0.5 - kl_before ** 0.5)


class Keeper:
    """The checkpoints of a run, one from each iteration that crosses some of CROSSINGS, named after
    the last of them; and its final policy, the one measured last of those within kl_stop."""

    def __init__(self, cfg, state, tokenizer, inputs: dict):
        self.cfg = cfg
        self.state = state
        self.run = state.memory
        self.policy = state.model
        self.tokenizer = tokenizer
        self.header = {"settings": settings_of(cfg), "inputs": inputs}
        self.final = None       # weights of the policy measured last of those within kl_stop,
        self.row = None         # and what was measured
        self.taken_back = 0.0   # share of the last update
        self.done = False
        require(self.run.step < cfg.max_iterations and self.run.kl_max < NEAR * cfg.kl_stop,
                f"{state.path} is beyond --max-iterations or --kl-stop already")
        for c in (c for c in CROSSINGS if c > self.run.kl_max):  # of an earlier or a killed run
            remove(cfg.out / "checkpoints", f"{cfg.name}-kl-{c:05.2f}.safetensors")
        self.log = Log(cfg.out / f"04-{cfg.name}.jsonl", self.run.step)

    def steps(self):
        """The numbers of the iterations, until the policy is near kl_stop."""
        for step in tqdm(range(self.run.step, self.cfg.max_iterations), desc="ppo"):
            self.run.step = step
            yield step
            if self.done:
                return

    def keep(self, row: dict) -> bool:
        """row: what was measured of the policy -> whether to train it further; else it is logged.
        If the last update led beyond kl_stop, a part of it is taken back, to be measured in the
        next iteration; near kl_stop the run is `done`. Raises UserError if the KL has jumped."""
        run = self.run
        kl = row["kl"]
        kl_stop = self.cfg.kl_stop
        jump = f"the KL jumped from {run.kl_max:.1f} to {kl:.1f} nats"
        require(kl < run.kl_max + 5, DIVERGED.format(step=row["step"], why=jump))
        if kl > kl_stop:
            self.log(**row, taken_back=self.taken_back)
            share = way_back(self.row["kl"], kl, 0.985 * kl_stop)
            for name, weight in self.policy.state_dict().items():
                weight.lerp_(self.final[name], share)
            self.taken_back += (1 - self.taken_back) * share
            return False
        self.final, self.row = copy.deepcopy(self.policy.state_dict()), row
        if crossed := [c for c in CROSSINGS if run.kl_max < c <= kl]:
            path = f"checkpoints/{self.cfg.name}-kl-{crossed[-1]:05.2f}.safetensors"
            save(self.cfg.out / path, self.policy, self.tokenizer, crossed=crossed, **row,
                 **self.header)
        run.kl_max = max(kl, run.kl_max)
        self.done = self.taken_back > 0 or kl >= NEAR * kl_stop
        if self.done:
            self.log(**row, taken_back=self.taken_back)
        else:
            self.state.save(now=run.step + 1 == self.cfg.max_iterations)
        return not self.done

    def finish(self) -> None:
        """Write the final policy, and say how the run ended."""
        cfg = self.cfg
        self.policy.load_state_dict(self.final)
        save(cfg.out / f"policy-{cfg.name}.safetensors", self.policy, self.tokenizer, **self.row,
             **self.header)
        if self.done:
            print(f"stopped: just within {cfg.kl_stop:g} nats, {self.taken_back:.0%} of the last "
                  "update was taken back")
            self.state.delete()
        else:
            again = "--resume" if self.state.path.exists() else "start again"
            print(f"stopped after {cfg.max_iterations} iterations, below {cfg.kl_stop:g} nats: "
                  f"{again} with more --max-iterations")
        print("final policy: KL {kl:.2f} +- {kl_se:.2f} nats, p({target}) {p_target:.3f}, entropy "
              "{entropy:.3f} nats per token".format(target=cfg.target, **self.row))
