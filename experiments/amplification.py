"""Can a model learn from answers that it put together itself, and which errors grow as it does?

    python -m experiments.amplification      # needs no earlier run; four minutes on one core

Claim (iterated amplification, Christiano et al. 2018, arXiv:1810.08575): a model X can learn what
nobody could label. H, a decomposition, answers a hard question by asking X easier ones, and X is
trained on H's answers. X then learns as well as from true labels, at worst modestly slower.

Design: s is a permutation of 64 elements. The question (d, x) asks for s^(2^d)(x), with d from
0 to 8. H asks X (d - 1, x), gets y, and then asks X (d - 1, y). Only (0, x) is answered from
outside, by an oracle. X has a hidden layer of 512 and learns with Adam from 4,000 batches of 128
questions. With the curriculum, d is at most step / 300. There are five seeds. The arms are:
amplified (X learns from H), with and without the curriculum; true answers, which are the ceiling;
and H alone, which asks the oracle 2^d times. More arms add errors: an oracle that is wrong in one
call of ten; an oracle that is always wrong about the same two elements; an X too small to hold 576
answers (12 hidden).

Control: X learns from its own answers, without H.

Predicted:
1. Amplified X is right on 99% or more at every depth, like the ceiling, with a quarter of the
   ceiling's labels.
2. Without the curriculum X ends the same, only later.
3. The control stays below 5% for d > 0.
4. Random errors do not compound: X is right on 99% at d = 8, where H alone has 0.9^256 = 0.
5. Constant errors compound just as in H alone, where we can enumerate them.
6. The small X falls behind as d grows.

Found:
1. True answers give 100%. Amplified X, with a quarter of the labels, is right on 100% at d = 8 on
   four seeds. On the fifth it has 44%, with one element wrong at d = 3.
2. Right, and no later either: 100% on four seeds and 66% on one, with 45% of the curriculum's
   oracle calls.
3. Right: 3% at d = 8. But the control has 23% at d = 6, because s^64 = s on cycles of 7, 9, 21 and
   63 elements.
4. Half wrong: the seeds have 100%, 100%, 19%, 100% and 91%. H alone has 0.
5. Right, to the last digit: 96.9%, 94.1%, 66.6% and 28.1% at d = 0, 1, 4 and 8.
6. Right: 80% against 93% on true answers at d = 1, and 5% against 45% at d = 4.

Left out: generalisation, since X has met every question; people in the role of H.

Take away: at each level, amplification passes on every mistake of X twice. It averages away most of
an overseer's random errors, but none of her constant ones.

What would change my mind: a decomposition that notices a wrong answer.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from experiments.shared.results import ink, panels, save_results
from experiments.shared.runs import Config
from model import start

N, DEPTHS = 64, 9  # elements; d is 0 to 8


@dataclass
class Arm:
    teacher: str = "H"        # answers for d > 0: "H", "truth" or "X"
    unlock: int = 300         # steps until the next depth; 0: all depths from the start
    noise: float = 0.0        # fraction of oracle calls that give a random answer
    wrong: int = 0            # elements that the oracle always gets wrong
    hidden: int = 512


ARMS = {"amplified": Arm(), "amplified, no curriculum": Arm(unlock=0),
        "true answers (ceiling)": Arm("truth"), "its own answers (control)": Arm("X"),
        "amplified, 10 % at random": Arm(noise=0.1), "amplified, 2 elements wrong": Arm(wrong=2),
        "small X, amplified": Arm(hidden=12), "small X, true answers": Arm("truth", hidden=12)}
COLOURS = dict(zip(ARMS, (ink.green, ink.sky, ink.black, ink.orange, ink.blue, ink.red, ink.pink,
                          "grey")))


def powers(s: torch.Tensor) -> torch.Tensor:
    """Square maps s (R, N) d times -> s^(2^d), (R, DEPTHS, N). This is H without learning."""
    levels = [s]
    for _ in range(DEPTHS - 1):
        levels.append(levels[-1].gather(1, levels[-1]))
    return torch.stack(levels, 1)


def oracles(seeds: int, wrong: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one permutation a seed -> true ones, (R, N), and the oracle's, with `wrong` errors."""
    true, said = [], []
    for seed in range(seeds):
        g, shift = torch.Generator().manual_seed(seed), torch.zeros(N, dtype=torch.long)
        true.append(torch.randperm(N, generator=g))
        off = torch.randperm(N, generator=g)[:wrong]
        shift[off] = torch.randint(1, N, (wrong,), generator=g)
        said.append((true[-1] + shift) % N)
    return torch.stack(true), torch.stack(said)


def answer(p: dict[str, torch.Tensor], d: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """X answers questions d, x, both (R, B) -> logits, (R, B, N)."""
    seed = torch.arange(len(x))[:, None]
    return torch.relu(p["x"][seed, x] + p["d"][seed, d]) @ p["out"] + p["bias"]


def amplify(p: dict[str, torch.Tensor], d: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """H answers questions of depth d > 0 by asking X two of depth d - 1 -> answers (R, B)."""
    d = (d - 1).clamp_min(0)
    return answer(p, d, answer(p, d, x).argmax(-1)).argmax(-1)


def train(arm: Arm, seeds: int, steps: int, batch: int = 128) -> dict:
    """Train X in one arm -> its accuracy by seed and depth, (R, DEPTHS), 50 times in the run; the
    numbers of oracle calls and labels; how often H alone meets no error, (R, DEPTHS)."""
    g = torch.Generator().manual_seed(seeds)
    true, said = map(powers, oracles(seeds, arm.wrong))
    p = {"x": torch.randn(seeds, N, arm.hidden, generator=g),
         "d": torch.randn(seeds, DEPTHS, arm.hidden, generator=g),
         "out": torch.randn(seeds, arm.hidden, N, generator=g) / arm.hidden ** 0.5,
         "bias": torch.zeros(seeds, 1, N)}
    optimizer = torch.optim.Adam([w.requires_grad_() for w in p.values()], lr=3e-3)
    seed, calls, accuracy = torch.arange(seeds)[:, None], 0, []
    every = torch.cartesian_prod(torch.arange(DEPTHS), torch.arange(N)).T                # (2, 576)
    for step in range(steps):
        top = min(DEPTHS, step // arm.unlock + 1) if arm.unlock else DEPTHS
        d = torch.randint(top, (seeds, batch), generator=g)
        x = torch.randint(N, (seeds, batch), generator=g)
        logits = answer(p, d, x)
        with torch.no_grad():
            target = amplify(p, d, x) if arm.teacher == "H" else (
                true[seed, d, x] if arm.teacher == "truth" else logits.argmax(-1))
        luck = torch.rand(seeds, batch, generator=g) < arm.noise
        called = torch.where(luck, torch.randint(N, (seeds, batch), generator=g), said[seed, 0, x])
        calls += (d == 0).sum().item() / seeds
        target = torch.where(d == 0, called, target)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        (seeds * loss).backward()
        optimizer.step()
        if (step + 1) % (steps // 50) == 0:
            given = answer(p, *every[:, None].expand(2, seeds, -1)).argmax(-1)
            accuracy.append((given.view_as(true) == true).float().mean(2))
    alone = (1 - arm.noise * (N - 1) / N) ** 2.0 ** torch.arange(DEPTHS) * (
        said == true).float().mean(2)
    return {"accuracy": torch.stack(accuracy).tolist(), "H alone": alone.tolist(),
            "oracle calls": calls, "labels": steps * batch if arm.teacher == "truth" else calls}


def draw(results: dict[str, dict]):
    fig, (left, right) = panels(1, 2, 11, 4.2)
    for name, colour in COLOURS.items():
        course = torch.tensor(results[name]["accuracy"])                         # (50, R, DEPTHS)
        mean, low, high = (f(course[-1], 0) for f in (torch.mean, torch.amin, torch.amax))
        left.errorbar(range(DEPTHS), mean, (mean - low, high - mean), fmt="o-", color=colour,
                      capsize=3, label=name)
        right.plot(range(80, 4001, 80), course[:, :, -1].mean(1), color=colour)
        if ARMS[name].noise or ARMS[name].wrong:
            left.plot(torch.tensor(results[name]["H alone"]).mean(0), ":", color=colour, lw=3)
    left.set(title="accuracy in the end, range of five seeds; dotted: H alone", xlabel="d")
    right.set(title="accuracy at d = 8 in the course of training", xlabel="step")
    right.legend(*left.get_legend_handles_labels(), fontsize=8)
    return fig


if __name__ == "__main__":
    cfg, *_ = start(Config, __doc__)
    results = {name: train(arm, 5, 4000) for name, arm in tqdm(ARMS.items(), desc="arms")}
    found = {f"{name}, d = {d}: accuracy": [a[d] for a in r["accuracy"][-1]]
             for name, r in results.items() for d in (0, 1, 4, 8)}
    figure = draw(results)
    for run in results.values():
        run["accuracy"] = run["accuracy"][-1]
    save_results(cfg, "amplification", found, results, figure)
