"""Can part of a network be out of the gradient's reach, and what can such a part output?

    python -m experiments.gradient_protection      # needs no earlier run; four minutes on one core

Claim (alignmentforum.org/posts/jh6dkqN2wd7fCRfB5, on gradient hacking): a linear layer, a batch
norm with gamma 1e-5 and beta -0.01, and a ReLU give 0 on every input. So no gradient reaches this
block. It survives 10,000 steps, L2 (decay of the weights) and a 10,000 times larger learning rate.
Sigmoids leak, and "only constant functions" can be protected this way. The reason: of n
standardised values, none is above sqrt(n - 1) (Samuelson 1968). So with gamma sqrt(n - 1) < -beta
every ReLU is shut, whatever x and the earlier weights are.

Design: x is 256 points in [-3, 3], and the network learns sin x or cos x:
    linear 1-16 -> ReLU -> [linear 16-16 -> batch norm -> ReLU] -> linear 16-1
Training is in float64 and full batch: 10,000 steps of SGD at rate 0.01, five seeds. Each arm
changes one thing. "Protected" means that in every parameter of the block the loss has a gradient of
0.0 at all 10,000 steps. Before and after training we compute the Hessian (all second derivatives)
of loss + L2 in all parameters that train. Two arms test "only constant". *Saturated* has gamma 1e8
and a sigmoid, which floating point rounds to exactly 0 or 1, with a derivative of exactly 0.
*Bypass* adds the block's input to its output.

Control: the same block open (gamma 1, beta 0), which must learn.

Predicted:
1. The shut block stays protected to the end, on 5 seeds of 5: as it is, with larger rates (last
   bias b frozen), with L2 on all parameters, and with Adam. The loss is the variance of y if b may
   move, and the mean of (y - b)^2 if not. L2 moves the block (all of it shrinks alike) but never
   opens it.
2. With b free, the top Hessian eigenvalue is 2 and all others are 0: a flat minimum, no saddle. At
   rate 100 the free b diverges, and its NaN breaks the rest.
3. Sigmoid and GELU leak. Within 10,000 steps they have learned more than half of the variance.
   Their Hessian has negative eigenvalues at the start.
4. L2 on beta alone opens the block.
5. The claim is wrong as it stands. *Saturated* stays protected, 5 of 5, and is not a constant but a
   step function. With *bypass* the network learns all it can, while the block keeps its weights and
   outputs nothing.

Found, the same for both targets (+- half the 95% interval over five seeds):
1. Right.
2. Right about the eigenvalues: 0 and 2, or 0.01 and 2.01 with an L2 of 1e-2. But the NaN of b does
   not reach the block, because a ReLU masks its gradient and does not multiply it.
3. Right: both explain 99.9% of the variance, like the open control. The lowest eigenvalues at the
   start are -0.44 or less.
4. Right: it opens once beta has decayed to the size of gamma, at step 6,200. In the end 99.4% or
   more is explained.
5. Right: *saturated* is protected, 5 of 5. It explains 97.5 +- 0.8% of sin x and 95.8 +- 2.6% of
   cos x.

Left out: minibatches (the bound holds for each), running statistics (an outlier of 1,000 sd opens
the block), noise in the weights, and how training could ever lead there.

Take away: a block is protected if no small change of its parameters changes its output. Constants
are protected, but step functions can be too.

What would change my mind: a protected block that survives noise in its own parameters.
"""
import torch
import torch.nn.functional as F
from tqdm import tqdm

from experiments.shared.results import ink, panels, save_results
from experiments.shared.runs import Config
from model import start

N, H, STEPS, SEEDS = 256, 16, 10_000, 5
BLOCK = ("w2", "b2", "gamma", "beta")
SHUT = {"gamma": 1e-5, "beta": -0.01, "act": F.relu, "optimizer": torch.optim.SGD, "lr": 0.01,
        "l2": 0.0, "decayed": ("w1", "b1", *BLOCK, "w3", "b3"), "frozen": (), "bypass": False}
ARMS = {
    "open (control)": SHUT | {"gamma": 1.0, "beta": 0.0},
    "shut": SHUT, "shut, Adam": SHUT | {"optimizer": torch.optim.Adam},
    "shut, last bias frozen": SHUT | {"frozen": ("b3",)},
    "shut, rate x 10,000, bias frozen": SHUT | {"lr": 100.0, "frozen": ("b3",)},
    "shut, rate x 10,000, bias free": SHUT | {"lr": 100.0},
    "shut, L2 1e-4": SHUT | {"l2": 1e-4}, "shut, L2 1e-2": SHUT | {"l2": 1e-2},
    "shut, L2 .1 on beta alone": SHUT | {"l2": 0.1, "decayed": ("beta",)},
    "shut, sigmoid": SHUT | {"act": torch.sigmoid}, "shut, GELU": SHUT | {"act": F.gelu},
    "saturated sigmoid": SHUT | {"gamma": 1e8, "beta": 0.0, "act": torch.sigmoid},
    "shut, bypass": SHUT | {"bypass": True}}
SHOWN = {"open (control)": ink.green, "shut": ink.red, "shut, sigmoid": ink.orange,
         "shut, GELU": ink.pink, "shut, L2 .1 on beta alone": ink.blue,
         "saturated sigmoid": ink.black, "shut, bypass": ink.sky}


def parameters(arm: dict, seeds: int) -> dict[str, torch.Tensor]:
    """Draw the parameters of `seeds` networks at once, each tensor (seeds, ...)."""
    def uniform(d_in, *shape):
        draws = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
        return (2 * torch.stack(draws) - 1) / d_in ** 0.5
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    ones = torch.ones(seeds, 1, H, dtype=torch.float64)
    return {"w1": uniform(1, 1, H), "b1": uniform(1, 1, H), "w2": uniform(H, H, H),
            "b2": uniform(H, 1, H), "w3": uniform(H, H, 1), "b3": uniform(H, 1, 1),
            "gamma": arm["gamma"] * ones, "beta": arm["beta"] * ones}


def network(p: dict[str, torch.Tensor], x: torch.Tensor, arm: dict):
    """Map x (N, 1) -> y (..., N, 1) and the block (..., N, H). p may have a first axis, seeds."""
    h = F.relu(x @ p["w1"] + p["b1"])                                            # (..., N, H)
    z = h @ p["w2"] + p["b2"]
    centred = z - z.mean(-2, keepdim=True)
    z_hat = centred / (centred.square().mean(-2, keepdim=True) + 1e-5).sqrt()
    block = arm["act"](p["gamma"] * z_hat + p["beta"])
    return (block + h if arm["bypass"] else block) @ p["w3"] + p["b3"], block


def eigenvalues(p: dict, x, y, arm: dict) -> torch.Tensor:
    """Compute the Hessian of one network's loss + L2 / 2 |decayed|^2 in all parameters that train
    -> its eigenvalues, ascending."""
    trains = {k: v.detach() for k, v in p.items() if k not in arm["frozen"]}

    def loss(flat):
        parts = flat.split([v.numel() for v in trains.values()])
        q = p | {k: part.view_as(v) for (k, v), part in zip(trains.items(), parts)}
        decay = sum(q[k].square().sum() for k in arm["decayed"])
        return (network(q, x, arm)[0] - y).square().mean() + arm["l2"] / 2 * decay
    flat = torch.cat([v.flatten() for v in trains.values()])
    hessian = torch.func.hessian(loss)(flat)
    return torch.linalg.eigvalsh(hessian) if hessian.isfinite().all() else flat * torch.nan


def train(arm: dict, x, y, steps: int) -> dict:
    """Train networks on y (seeds, N, 1) -> for each: losses; the largest gradient in the block; the
    spread of its output over x; the last output; the Hessian's extremes before and after."""
    p = {k: v.requires_grad_(k not in arm["frozen"]) for k, v in parameters(arm, len(y)).items()}
    optimizer = arm["optimizer"]([{"params": [v], "weight_decay": arm["l2"] * (k in arm["decayed"])}
                               for k, v in p.items() if v.requires_grad], lr=arm["lr"])

    def extremes():
        each = [eigenvalues({k: v[i] for k, v in p.items()}, x, y[i], arm) for i in range(len(y))]
        return [(e[0].item(), e[-1].item()) for e in each]
    before, reached, losses = extremes(), torch.zeros(len(y), dtype=torch.float64), []
    for step in range(steps):
        loss = (network(p, x, arm)[0] - y).square().mean((1, 2))                 # (seeds,)
        optimizer.zero_grad()
        loss.sum().backward()
        for k in BLOCK:
            reached = torch.maximum(reached, p[k].grad.abs().amax((1, 2)))  # NaN stays NaN
        if step % (steps // 100) == 0:
            losses.append(loss.tolist())
        optimizer.step()
    with torch.no_grad():
        out, block = network(p, x, arm)
    losses.append((out - y).square().mean((1, 2)).tolist())
    return {"loss": list(zip(*losses)), "reached": reached.tolist(), "out": out[..., 0].tolist(),
            "block_sd": block.std(1).amax(1).tolist(), "hessian": list(zip(before, extremes()))}


def draw(runs: dict[str, dict], x: torch.Tensor):
    fig, (left, right) = panels(1, 2, 11, 4.2)
    for name, colour in SHOWN.items():
        run = runs[f"{name}, sin"]
        left.plot(range(0, STEPS + 1, STEPS // 100), list(zip(*run["loss"])), color=colour, lw=1)
        right.plot(x, run["out"][0], color=colour, label=name)
    right.plot(x, x.sin(), ":", color="grey", lw=3)
    left.set(title="sin x: mean squared error of five seeds", xlabel="step", yscale="log")
    right.set(title="what seed 0 says in the end; dotted: sin x", xlabel="x")
    right.legend(fontsize=8)
    return fig


if __name__ == "__main__":
    cfg, *_ = start(Config, __doc__)
    x, runs, found = torch.linspace(-3, 3, N, dtype=torch.float64)[:, None], {}, {}
    for name, arm in tqdm(ARMS.items(), desc="arms"):
        for target, y in (("sin", x.sin()), ("cos", x.cos())):
            run = runs[f"{name}, {target}"] = train(arm, x, y.expand(SEEDS, N, 1), STEPS)
            found[f"{name}, {target}: largest gradient in the block"] = run["reached"]
            found[f"{name}, {target}: variance explained"] = [
                1 - loss[-1] / y.var(correction=0).item() for loss in run["loss"]]
    figure = draw(runs, x[:, 0])
    for run in runs.values():
        run.pop("out"), run.pop("loss")
    save_results(cfg, "gradient_protection", found, runs, figure)
