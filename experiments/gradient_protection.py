"""Can a part of a network be out of the gradient's reach, and what can such a part say?

    python -m experiments.gradient_protection      # needs no earlier run; four minutes on one core

Claim (alignmentforum.org/posts/jh6dkqN2wd7fCRfB5, on gradient hacking): linear -> batch norm with
gamma 1e-5 and beta -.01 -> ReLU gives 0 on every input, so no gradient reaches it; it outlives
10,000 steps, L2 and a 10,000 times larger rate; sigmoids leak; and "only constant functions" can be
protected so. Why: of n values the standardised ones are at most sqrt(n - 1) (Samuelson 1968), so
with gamma sqrt(n - 1) < -beta every ReLU is shut, whatever x and the weights before it are.
Design: x, 256 points in [-3, 3] -> linear 1-16 -> ReLU -> [linear 16-16 -> batch norm -> ReLU] ->
linear 16-1, towards sin x, and towards cos x; float64, full batch, 10,000 steps of SGD, rate .01.
One arm changes one thing. Control: the same block open (gamma 1, beta 0), which must learn. Five
seeds. Protected: the loss's gradient in every parameter of the block is 0.0 at all 10,000 steps.
Hessian of loss + L2 in all parameters that train, before and after. Against "only constant":
*saturated* has gamma 1e8 and a sigmoid, which floating point rounds to exactly 0 or 1, with a
derivative of exactly 0; *bypass* adds the block's input to its output.
Predicted: (1) shut, larger rates (bias frozen), L2 on all parameters, Adam: protected to the end, 5
of 5; loss = the variance of y if the last bias b may move, mean of (y - b)^2 if not. L2 moves the
block (all shrinks alike) but never opens it. (2) Free bias: the top Hessian eigenvalue is 2, all
others 0: a flat minimum, no saddle. At rate 100 the free bias diverges and its NaN breaks the rest.
(3) Sigmoid and GELU leak and within 10,000 steps have learned more than half of the variance; their
Hessian has negative eigenvalues at the start. (4) L2 on beta alone opens the block. (5) The claim
is wrong as it stands: *saturated* stays protected, 5 of 5, and is no constant but a step function;
in *bypass* the network learns all it can, while the block keeps its weights and says nothing.
Found, both targets alike: (1) so. (2) So: eigenvalues 0 and 2, with L2 1e-2 .01 and 2.01. But the
diverging bias's NaN does not reach the block: a ReLU's gradient is masked, not multiplied. (3) So:
both explain 99.9 % of the variance, as the open control; lowest eigenvalues at first: -.44 or less.
(4) So: once beta has decayed to gamma's size, at step 6,200; 99.4 % or more in the end. (5) So:
*saturated* is protected, 5 of 5, and explains 97.5 +- .8 % of sin x and 95.8 +- 2.6 % of cos x.
Left out: minibatches (the bound holds for each), running statistics (an outlier of 1,000 sd opens
the block), noise in the weights, and how training should ever lead there.
Take away: protected is what no small change of its parameters changes: constants, but steps too.
What would change my mind: a protected block that outlives noise in its own parameters.
"""
import torch
import torch.nn.functional as F
from tqdm import tqdm

from experiments import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Config, keep, plt
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
SHOWN = {"open (control)": GREEN, "shut": RED, "shut, sigmoid": ORANGE, "shut, GELU": PINK,
         "shut, L2 .1 on beta alone": BLUE, "saturated sigmoid": BLACK, "shut, bypass": SKY}


def parameters(arm: dict, seeds: int) -> dict[str, torch.Tensor]:
    """Of `seeds` networks at once, each tensor (seeds, ...)."""
    def uniform(d_in, *shape):
        draws = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
        return (2 * torch.stack(draws) - 1) / d_in ** 0.5
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    ones = torch.ones(seeds, 1, H, dtype=torch.float64)
    return {"w1": uniform(1, 1, H), "b1": uniform(1, 1, H), "w2": uniform(H, H, H),
            "b2": uniform(H, 1, H), "w3": uniform(H, H, 1), "b3": uniform(H, 1, 1),
            "gamma": arm["gamma"] * ones, "beta": arm["beta"] * ones}


def network(p: dict[str, torch.Tensor], x: torch.Tensor, arm: dict):
    """x (N, 1) -> y (..., N, 1), the block (..., N, H); p may have a first dimension, of seeds."""
    h = F.relu(x @ p["w1"] + p["b1"])                                            # (..., N, H)
    z = h @ p["w2"] + p["b2"]
    centred = z - z.mean(-2, keepdim=True)
    z_hat = centred / (centred.square().mean(-2, keepdim=True) + 1e-5).sqrt()
    block = arm["act"](p["gamma"] * z_hat + p["beta"])
    return (block + h if arm["bypass"] else block) @ p["w3"] + p["b3"], block


def eigenvalues(p: dict, x, y, arm: dict) -> torch.Tensor:
    """Of the Hessian of loss + L2 / 2 |decayed|^2 of one network in all that trains, ascending."""
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
    """y (seeds, N, 1) -> of each network: its loss in the course of the run; the largest gradient
    that reached the block; its spread over x; the last output; the Hessian's extremes, twice."""
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
            reached = torch.maximum(reached, p[k].grad.abs().amax((1, 2)))  # nan stays nan
        if step % (steps // 100) == 0:
            losses.append(loss.tolist())
        optimizer.step()
    with torch.no_grad():
        out, block = network(p, x, arm)
    losses.append((out - y).square().mean((1, 2)).tolist())
    return {"loss": list(zip(*losses)), "reached": reached.tolist(), "out": out[..., 0].tolist(),
            "block_sd": block.std(1).amax(1).tolist(), "hessian": list(zip(before, extremes()))}


def draw(runs: dict[str, dict], x: torch.Tensor):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
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
    keep(cfg, "gradient_protection", found, runs, figure)
