"""Time our kernels against the alternatives, at shapes like those of the scripts.

    python -m benchmarks.kernels                # tables, and benchmarks/results/kernels-DEVICE.json
    python -m benchmarks.kernels --only sample  # one kernel, or "ppo": an iteration of PPO
    python -m benchmarks.kernels --toy          # does it run? The figures mean nothing

On a GPU, `ours` is the Triton kernel. On a CPU it is the PyTorch path, and the tables say so.

How it is measured: inputs are random (zeros make a GPU faster). All functions of a row take turns,
round after round, in one process, and the median counts. We first compare ours with plain PyTorch,
so a wrong kernel is never timed. We skip a peer whose first call takes longer than SLOW_S. On a
GPU, Triton's `do_bench` clears the L2 cache before each call and reads the time on the device. The
floor is the least time that the bytes or the arithmetic can take, at the rates of a copy and of a
large product in the same run. `of floor` is the floor divided by our time. The last table times a
training step, a rollout and an iteration of PPO, on a GPU also with `TORCH_KERNELS=all`.

Peers that are not installed are left out: `pip install --no-deps liger-kernel cut-cross-entropy`.
"""
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

from kernels import attention, decode_attention, linear_logprob, rotate, sample
from model import GPT, GPTConfig

GPU = torch.cuda.is_available()
DEVICE, DTYPE = "cuda" if GPU else "cpu", torch.bfloat16
ROOT = Path(__file__).parent.parent
# Shapes like those of 01 to 04 on this device. A completion has 64 tokens. The reward model reads
# 65, pretraining 128. Attention and decode: batch, T, heads, key-value heads (each 64 wide).
# Log-prob: rows, D, V. Sample: batch, D, V.
if GPU:
    MODEL, BATCH, MINIBATCH = GPTConfig(4096, 128, 6, 6, 1, 384), 8192, 512
else:
    MODEL, BATCH, MINIBATCH = GPTConfig(4096, 128, 4, 3, 1, 192), 4096, 256
HEADS, D, V = (MODEL.n_head, MODEL.n_kv_head), MODEL.d_model, MODEL.vocab_size - 3
DRAWN = 8192 if GPU else 1024  # completions at a time, in GPT.generate
SLOW_S = 20.0
SHAPES = {
    "attention": [(n * MINIBATCH // 256, T, *HEADS) for n, T in ((256, 64), (256, 65), (64, 128))],
    "decode": [(DRAWN, T, *HEADS) for T in (64, 128)],
    "logprob": [(MINIBATCH * 64, D, V)],
    "sample": [(DRAWN, D, V)]}
TOY = {"attention": [(2, 16, 2, 1)], "decode": [(2, 16, 2, 1)], "logprob": [(32, 32, 70)],
       "sample": [(8, 32, 70)]}


@dataclass
class Config:
    rounds: int = 15  # measurements of each provider, in turn
    only: Literal["all", "attention", "decode", "logprob", "sample", "ppo"] = "all"
    toy: bool = False  # tiny shapes, one round, no file


# ---- Measuring -----------------------------------------------------------------------------------
def milliseconds(call) -> float:
    """The time of one call."""
    if GPU:
        from triton.testing import do_bench
        return do_bench(call, warmup=2, rep=20, return_mode="median")
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def must_agree(ours, eager) -> None:
    """Raises AssertionError if ours differs from plain PyTorch by more than bf16 rounding."""
    for a, b in zip(ours, eager):
        off = ((a.float() - b.float()).norm() / b.float().norm()).item()
        assert off < 0.03, f"wrong values: ours is off by {off:.1%} of plain PyTorch's"


def compare(calls: dict, rounds: int) -> dict:
    """Time functions, by provider -> by provider: median, 20th and 80th percentile in ms, or why it
    failed."""
    results, times = {name: {} for name in calls}, {name: [] for name in calls}

    def attempt(name, f):
        try:
            return f()
        except Exception as error:  # that a peer cannot do this shape is a result too
            text = str(error).strip().split("\n")[0][:80] or type(error).__name__
            oom = isinstance(error, torch.OutOfMemoryError)
            results[name] = {"failed": "out of memory" if oom else text}
            times.pop(name)
    for name, call in calls.items():
        began = time.perf_counter()
        attempt(name, call)  # compiles, allocates, warms up
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        if name in times and name != "ours" and time.perf_counter() - began > SLOW_S:
            results[name] = {"failed": f"given up after {time.perf_counter() - began:.0f} s"}
            times.pop(name)
    for _ in range(rounds):
        for name in list(times):
            ms = attempt(name, lambda: milliseconds(calls[name]))
            if ms is not None:
                times[name].append(ms)
    for name, ms in times.items():
        q = torch.tensor(ms).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
        results[name] |= {"ms": q[0], "ms_20": q[1], "ms_80": q[2]}
    return results


def ceilings(rounds: int, toy: bool = False) -> tuple[float, float]:
    """Measure this machine -> bytes/s of a copy (read and written), FLOP/s of a bf16 product."""
    n, side = (2**20, 64) if toy else (2**30, 8192) if GPU else (2**27, 2048)
    a, b = (torch.randn(n // 2, device=DEVICE).to(DTYPE) for _ in range(2))
    x, y = (torch.randn(side, side, device=DEVICE).to(DTYPE) for _ in range(2))
    r = compare({"copy": lambda: b.copy_(a), "product": lambda: x @ y}, rounds)
    return 2 * n / r["copy"]["ms"] * 1e3, 2 * side**3 / r["product"]["ms"] * 1e3


def randn(*shape, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE).requires_grad_(grad)


def compiled(f):
    return torch.compile(f, fullgraph=True, dynamic=False)


# ---- Attention -----------------------------------------------------------------------------------
def eager_attention(q, k, v):
    T, Dh = q.size(1), q.size(3)
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * Dh**-0.5
    s = s.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v).flatten(2)


def attention_providers(T):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend, q, k, v):
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)),
                                                 is_causal=True, enable_gqa=q.size(2) > k.size(2))
        return out.transpose(1, 2).flatten(2)
    providers = {"ours": attention, "eager": eager_attention,
                 "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION)}
    if GPU:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE)
        flex = torch.compile(flex_attention, dynamic=False)
        providers |= {"SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
                      "SDPA efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
                      "torch.compile": compiled(eager_attention),
                      "FlexAttention": lambda q, k, v: flex(
                          *(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask,
                          enable_gqa=q.size(2) > k.size(2)).transpose(1, 2).flatten(2)}
    return providers


def bench_attention(shapes, rounds, bandwidth, peak):
    for B, T, H, Hkv in shapes:
        d, elements = 64 * H, B * T * 64 * (H + Hkv)
        label, flop = f"B {B:,} T {T} d {d} heads {H}/{Hkv}", 2 * B * T * T * d  # 4 without a mask
        qkv = [randn(B, T, h, 64, grad=True) for h in (H, Hkv, Hkv)]
        upstream, providers, outputs = randn(B, T, d), attention_providers(T), {}
        both = [f(*qkv) for f in (attention, eager_attention)]
        must_agree(*([out, *torch.autograd.grad(out, qkv, upstream)] for out in both))

        def backward(name, f):
            if name not in outputs:
                outputs[name] = f(*qkv)
            torch.autograd.grad(outputs[name], qkv, upstream, retain_graph=True)
        calls = {name: torch.no_grad()(partial(f, *qkv)) for name, f in providers.items()}
        yield (label, "attention forward", max(4 * elements / bandwidth, flop / peak),
               compare(calls, rounds))
        calls = {name: partial(backward, name, f) for name, f in providers.items()}
        floor = max((8 * elements - 2 * B * T * d) / bandwidth, 2.5 * flop / peak)
        yield label, "attention backward", floor, compare(calls, rounds)


def bench_decode(shapes, rounds, bandwidth, peak):
    for B, T, H, Hkv in shapes:
        size, pos = 4 * B * Hkv * T * 64, T - 1
        cache, at = randn(2, B, Hkv, T, 64), torch.tensor(pos, device=DEVICE)
        q, k, v = (randn(B, x, 64) for x in (H, Hkv, Hkv))
        angles = randn(T, 1, 64), randn(T, 1, 64)

        def slices():
            turned, key = (rotate(x, *(table[pos] for table in angles)) for x in (q, k))
            cache[:, :, :, pos] = torch.stack((key, v))
            F.scaled_dot_product_attention(turned[:, :, None], *cache, enable_gqa=H > Hkv)
        must_agree(*([decode_attention(q, k, v, *cache, at, angles, backend=backend)]
                     for backend in ("auto", "torch")))
        calls = {"ours": lambda: decode_attention(q, k, v, *cache, at, angles),
                 "SDPA, whole cache": slices}
        if GPU:
            calls["masked products"] = lambda: decode_attention(q, k, v, *cache, pos, angles,
                                                                backend="torch")
        calls = {name: torch.no_grad()(call) for name, call in calls.items()}
        yield (f"B {B:,} slot {pos} of {T} heads {H}/{Hkv}", "decode", size / bandwidth,
               compare(calls, rounds))


# ---- The output head -----------------------------------------------------------------------------
def eager_logprob(hidden, weight, target):
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(1, target[:, None])[:, 0]


def logprob_providers():
    providers = {"ours": linear_logprob, "eager": eager_logprob}
    if not GPU:
        return providers
    providers["torch.compile"] = compiled(eager_logprob)
    if find_spec("liger_kernel"):
        from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger
        if find_spec("cutlass"):
            providers["Liger"] = liger.LigerFusedLinearScaledCrossEntropyFunction.apply
        else:  # on Hopper its own choice needs nvidia-cutlass-dsl
            providers["Liger, PyTorch fallback"] = lambda h, w, t: (
                liger._FusedLinearPPOFallbackFunction.apply(h, w, t, 1.0, -100, False))
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce
        providers["CCE"] = partial(cce, reduction="none", filter_eps="high")
    return providers


def bench_logprob(shapes, rounds, bandwidth, peak):
    for N, D, V in shapes:
        hidden, weight = randn(N, D, grad=True), (randn(V, D) / D**0.5).requires_grad_()
        target, g = torch.randint(V, (N,), device=DEVICE), torch.randn(N, device=DEVICE)

        def both(f):
            torch.autograd.grad((f(hidden, weight, target) * g).sum(), (hidden, weight))
        label, floor = f"N {N:,} D {D} V {V:,}", 2 * N * V * D / peak
        providers = logprob_providers()
        outs = [f(hidden, weight, target) for f in (linear_logprob, eager_logprob)]
        must_agree(*([logp, *torch.autograd.grad((logp * g).sum(), (hidden, weight))]
                     for logp in outs))
        calls = {k: torch.no_grad()(partial(f, hidden, weight, target))
                 for k, f in providers.items()}
        yield label, "log-prob forward", floor, compare(calls, rounds)
        calls = {k: partial(both, f) for k, f in providers.items()}
        yield label, "log-prob forward + backward", 3 * floor, compare(calls, rounds)


def gumbel(hidden, weight):
    z = (hidden @ weight.T).float()
    token = (z - torch.empty_like(z).exponential_().log()).argmax(-1)
    return token, z.log_softmax(-1).gather(1, token[:, None])[:, 0]


def bench_sample(shapes, rounds, bandwidth, peak):
    for B, D, V in shapes:
        hidden, weight = (randn(x, D) / D**0.25 for x in (B, V))
        row, zero = torch.arange(B, device=DEVICE), torch.tensor(0, device=DEVICE)
        token, logp = sample(hidden, weight, zero, row, zero)
        must_agree([logp], [eager_logprob(hidden, weight, token)])
        calls = {"ours": lambda: sample(hidden, weight, zero, row, zero),
                 "product alone": lambda: hidden @ weight.T,
                 "Gumbel race": lambda: gumbel(hidden, weight),
                 "multinomial, token only": lambda: (
                     (hidden @ weight.T).float().softmax(-1).multinomial(1))}
        if GPU:
            calls["Gumbel, torch.compile"] = partial(compiled(gumbel), hidden, weight)
        calls = {name: torch.no_grad()(call) for name, call in calls.items()}
        yield f"B {B:,} D {D} V {V:,}", "sample", 2 * B * V * D / peak, compare(calls, rounds)


# ---- What they are part of -----------------------------------------------------------------------
def whole(rounds: int, toy: bool) -> dict:
    """Time a training step of 01, and a rollout and an iteration of 04 (rollout, scores, update)
    at such shapes -> milliseconds. On a GPU, with our kernels and without."""
    c, batch, minibatch, T = MODEL, BATCH, MINIBATCH, 64
    if toy:
        c, batch, minibatch, T = GPTConfig(70, 8, 1, 2, 1, 32), 4, 2, 8
    model = GPT(c).to(DEVICE)
    model.dtype = DTYPE
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    text = torch.randint(model.n_text, (minibatch // 4 or 1, c.context), device=DEVICE)

    def update(y):
        optimizer.zero_grad()
        model.logprob(y).mean().backward()
        optimizer.step()

    def rollout():
        return model.generate(batch, T, seed=0)[0]

    def iteration():
        y = rollout()
        with torch.no_grad():
            for b in y.split(minibatch):  # one model plays policy, reference and reward model
                model.logprob(b), model.logprob(b), model.sentiment(b)
        for b in y.split(minibatch):
            update(b)

    def without(call):
        os.environ["TORCH_KERNELS"] = "all"
        try:
            call()
        finally:
            del os.environ["TORCH_KERNELS"]
    found = {}
    for name, call in (("training step", partial(update, text)), ("rollout", rollout),
                       ("PPO iteration", iteration)):
        calls = {"ours": call} | ({"without our kernels": partial(without, call)} if GPU else {})
        found[name] = compare(calls, max(1, rounds // 5))
    return found


# ---- The run -------------------------------------------------------------------------------------
def cells(result: dict, floor: float) -> list[str]:
    """A row of the table."""
    if "failed" in result["ours"]:
        return [result["ours"]["failed"], "-", "-"]
    ours = result.pop("ours")["ms"]
    others = [f"{name}: {r['failed']}" if "failed" in r else
              f"{name} {r['ms']:.3g} ({r['ms'] / ours:.2f}x)" for name, r in result.items()]
    return [f"{ours:.3g}", f"{100 * floor * 1e3 / ours:.0f}%", "; ".join(others)]


def main(cfg: Config) -> None:
    threads = f"{torch.get_num_threads()} threads, {platform.machine()}"
    device = torch.cuda.get_device_name() if GPU else threads
    if GPU:
        from torch._functorch import config as functorch
        functorch.donated_buffer = False  # lets a backward pass be repeated
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
    versions = {name: version(name) for name in packages if find_spec(name.replace("-", "_"))}
    rounds, shapes = (1, TOY) if cfg.toy else (cfg.rounds, SHAPES)
    bandwidth, peak = ceilings(rounds, cfg.toy)
    report = {"device": device, "ours": "Triton" if GPU else "PyTorch path: no GPU here",
              "versions": versions, "bandwidth_GB_s": bandwidth / 1e9,
              "product_TFLOP_s": peak / 1e12, "rows": []}
    name = "-".join(["kernels", device.replace(" ", "-").lower() if GPU else "cpu",
                     *([cfg.only] if cfg.only != "all" else [])])
    path = ROOT / "benchmarks/results" / f"{name}.json"  # a part does not replace the whole
    print(f"{device}; " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(f"`ours` is {report['ours']}. Copy {bandwidth / 1e9:,.0f} GB/s, bf16 product "
          f"{peak / 1e12:,.2f} TFLOP/s.\n")
    print("| kernel | shape | ours, ms | of floor | others, ms (ours is 1x) |\n" + "|---" * 5 + "|")
    benches = {"attention": bench_attention, "decode": bench_decode, "logprob": bench_logprob,
               "sample": bench_sample}
    for name, bench in benches.items():
        chosen = shapes[name] if cfg.only in ("all", name) else ()
        rows = bench(chosen, rounds, bandwidth, peak)
        for shape, kernel, floor, result in rows:
            print(f"| {kernel} | {shape} | {' | '.join(cells({**result}, floor))} |", flush=True)
            report["rows"].append({"kernel": kernel, "shape": shape, "floor_ms": 1e3 * floor,
                                   "providers": result})
    if cfg.only in ("all", "ppo"):
        report["whole"] = whole(rounds, cfg.toy)
        print("\n| whole | ms | without our kernels, ms |\n|---|---|---|")
        for name, r in report["whole"].items():
            times = [r.get(k, {}).get("ms") for k in ("ours", "without our kernels")]
            print(f"| {name} |", " | ".join(f"{ms:,.0f}" if ms else "-" for ms in times), "|")
    if not cfg.toy:
        path.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
