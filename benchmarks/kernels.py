"""What the kernels cost, against what one would call instead.

    python -m benchmarks.kernels                  # tables, and benchmarks/results/kernels-<device>.json
    python -m benchmarks.kernels --shapes preset  # only at the shapes of the scripts' defaults on a GPU

On a GPU `ours` are the Triton kernels; on a CPU it is the PyTorch path, and the tables say so.

How it is measured: random inputs (zeros make a GPU faster), in rotation over enough memory that the
L2 cache holds none of them (not in the PPO iteration, which is as it is); all providers of a row in
turn, round after round, in one process; the median, and the first provider once more at the end,
which shows drift. On a GPU a wait is queued before each measurement, so that the host's launches are
hidden, and events are read on the device; `multinomial` and the PPO iteration make the host wait,
and show it. `of floor` is the time that the bytes or the arithmetic must take, by the copy bandwidth
and the 8192^3 product measured in the same run, divided by the time that ours took.

A provider that takes longer than PROVIDER_S to warm up (peers compile for each shape) is given up and
says so; one that hangs in a single call cannot be, and ends with the part of `make gpu` that it is in.
Peers that are not installed are left out: `pip install --no-deps liger-kernel cut-cross-entropy`.
"""
import json
import math
import platform
import signal
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

from kernels import attention, decode_attention, linear_logprob, sample

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16
ROOT = Path(__file__).parent.parent
PROVIDER_S = 25.0  # for the compilation and first calls of one provider at one shape, and for each measurement:
                   # less than any part of `make gpu` has, so that a slow peer does not cost it the others
SHAPES = {  # attention: B, T, heads, key-value heads of 64; decode: the same; log-prob: N, D, V; sample: B, D, V
    "gpu": {"attention": [(4096, T, h, h) for h in (4, 6, 12) for T in (64, 128, 256)],
            "decode": [(4096, T, H, Hkv) for H, Hkv in ((4, 4), (6, 6), (6, 2), (6, 1), (12, 12)) for T in (64, 128, 256)],
            "logprob": [(262_144 if V < 50_000 else 32_768, D, V) for D in (256, 384, 768) for V in (2048, 8192, 50_304)],
            "sample": [(4096, D, V) for D in (256, 384, 768) for V in (2048, 8192, 50_304)]},
    "cpu": {"attention": [(64, T, 3, 3) for T in (64, 128, 256)], "decode": [(1024, T, 3, 1) for T in (64, 128, 256)],
            "logprob": [(4096, 192, 4096), (4096, 256, 2048)], "sample": [(1024, 192, 4096)]},
    "preset": {"attention": [(4096, 64, 6, 6), (4096, 64, 6, 1)], "decode": [(4096, 64, 6, 1), (8192, 64, 6, 1)],
               "logprob": [(262_144, 256, 2048), (32_768, 384, 4093)], "sample": [(4096, 384, 4093)]},
    "toy": {"attention": [(2, 16, 2, 1)], "decode": [(2, 16, 2, 1)], "logprob": [(32, 32, 70)], "sample": [(8, 32, 70)]},
}


@dataclass
class Config:
    rounds: int = 15          # measurements of each provider, in turn
    out: Path | None = None   # instead of benchmarks/results/kernels-<device>[-<only>].json
    only: Literal["all", "attention", "decode", "logprob", "sample", "ppo"] = "all"
    shapes: Literal["all", "preset", "toy"] = "all"  # toy: a rehearsal, of which no figure means anything


# ---- Measuring -----------------------------------------------------------------------------------
def milliseconds(call, sets: int) -> float:
    """Of one call, averaged over one call with each input set."""
    if not GPU:
        began = time.perf_counter()
        for i in range(sets):
            call(i)
        return 1e3 * (time.perf_counter() - began) / sets
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(3_000_000 * sets)  # cycles, about 2 ms a call: the host runs ahead meanwhile
    begin.record()
    for i in range(sets):
        call(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / sets


def peak_megabytes(call) -> float | None:
    """Allocated by one call on top of what was there; on a CPU torch does not count."""
    if not GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def over_time(*_):
    raise TimeoutError("over its time limit")


def compare(calls: dict, sets: int, rounds: int, whole: dict | None = None) -> dict:
    """calls: provider -> function of the number of an input set. -> provider -> median and 20th and 80th
    percentile in ms and peak memory in MB (of the calls in `whole`, if given); or {"failed": why}."""
    signal.signal(signal.SIGALRM, over_time)
    results, times = {name: {} for name in calls}, {name: [] for name in calls}

    def attempt(name, f):
        signal.setitimer(signal.ITIMER_REAL, PROVIDER_S)
        try:
            return f()
        except Exception as error:  # a peer that cannot do this shape is a result as well
            text = str(error).strip().split("\n")[0]
            text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else text
            results[name] = {"failed": text[:80] or type(error).__name__}
            times.pop(name)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    for name, call in calls.items():
        attempt(name, lambda: [call(i) for i in range(sets)])  # compiles, allocates, warms up
        if name in times:
            results[name]["peak_mb"] = attempt(name, lambda: peak_megabytes((whole or calls)[name]))
        if GPU:
            torch.cuda.empty_cache()
    for i in range(rounds + 1):
        for name in list(times)[: 1 if i == rounds else None]:  # at the end the first once more
            ms = attempt(name, lambda: milliseconds(calls[name], sets))
            if ms is not None:
                times[name].append(ms)
    for name, ms in times.items():
        q = torch.tensor(ms[:rounds]).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
        results[name] |= {"ms": q[0], "ms_20": q[1], "ms_80": q[2]}
        if len(ms) > rounds:
            results[name]["drift"] = ms[-1] / q[0]
    return results


def ceilings(rounds: int, toy: bool = False) -> tuple[float, float]:
    """-> bytes/s of a copy (read and written), FLOP/s of a bf16 product, as this machine does them now."""
    n, side = (2**20, 64) if toy else (2**30, 8192) if GPU else (2**27, 2048)
    a, b = torch.randn(n // 2, device=DEVICE).to(DTYPE), torch.empty(n // 2, device=DEVICE, dtype=DTYPE)
    x, y = (torch.randn(side, side, device=DEVICE).to(DTYPE) for _ in range(2))
    r = compare({"copy": lambda i: b.copy_(a), "product": lambda i: x @ y}, 1, rounds)
    return 2 * n / r["copy"]["ms"] * 1e3, 2 * side**3 / r["product"]["ms"] * 1e3


def sets_for(megabytes: float) -> int:
    """How many input sets until the caches hold none of them (H200: 60 MB of L2)."""
    return max(1, min(16, math.ceil(150 / megabytes))) if GPU else 2


def compiled(f):
    return torch.compile(f, fullgraph=True, dynamic=False)


# ---- Attention -----------------------------------------------------------------------------------
def eager_attention(q, k, v):
    T, Dh = q.size(1), q.size(3)
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * Dh**-0.5
    s = s.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v).flatten(2)


def sdpa(backend, q, k, v):
    from torch.nn.attention import sdpa_kernel
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True,
                                             enable_gqa=q.size(2) > k.size(2))
    return out.transpose(1, 2).flatten(2)


def attention_providers(T):
    from torch.nn.attention import SDPBackend
    providers = {"ours": attention, "eager": eager_attention}
    for name, backend in (("SDPA flash", SDPBackend.FLASH_ATTENTION),
                          *((("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
                             ("SDPA efficient", SDPBackend.EFFICIENT_ATTENTION)) if GPU else ())):
        providers[name] = partial(sdpa, backend)
    if GPU:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE)
        flex = torch.compile(flex_attention, dynamic=False)
        providers["torch.compile"] = compiled(eager_attention)
        providers["FlexAttention"] = lambda q, k, v: flex(
            *(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=q.size(2) > k.size(2)).transpose(1, 2).flatten(2)
    return providers


def bench_attention(shapes, rounds, bandwidth, peak):
    for B, T, H, Hkv in shapes:
        d, elements = 64 * H, B * T * 64 * (H + Hkv)
        label = f"B {B:,} T {T} d {d}" + (f" heads {H}/{Hkv}" if H > Hkv else "")
        n = sets_for(B * T * d * 6 / 2**20)
        inputs = [[torch.randn(B, T, h, 64, device=DEVICE).to(DTYPE).requires_grad_() for h in (H, Hkv, Hkv)]
                  for _ in range(n)]
        upstream = torch.randn(B, T, d, device=DEVICE).to(DTYPE)
        providers = attention_providers(T)

        def forward(f, i):
            with torch.no_grad():
                f(*inputs[i])
        flop = 2 * B * T * T * d  # 4 without the mask
        yield (label, "attention forward", max(4 * elements / bandwidth, flop / peak),
               compare({k: partial(forward, f) for k, f in providers.items()}, n, rounds))

        graphs = {}

        def backward(name, i):
            if (name, i) not in graphs:
                graphs[name, i] = providers[name](*inputs[i])
            torch.autograd.grad(graphs[name, i], inputs[i], upstream, retain_graph=True)

        def both(f, i):
            torch.autograd.grad(f(*inputs[i]), inputs[i], upstream)
        yield (label, "attention backward", max((8 * elements - 2 * B * T * d) / bandwidth, 2.5 * flop / peak),
               compare({k: partial(backward, k) for k in providers}, n, rounds,
                       whole={k: partial(both, f) for k, f in providers.items()}))
        graphs.clear()
        if GPU:
            torch._dynamo.reset()


def bench_decode(shapes, rounds, bandwidth, peak):
    for B, T, H, Hkv in shapes:
        size = 4 * B * Hkv * T * 64
        n, pos = sets_for(size / 2**20), T - 1
        caches = [torch.randn(2, B, Hkv, T, 64, device=DEVICE).to(DTYPE) for _ in range(n)]
        q, k, v = (torch.randn(B, x, 64, device=DEVICE).to(DTYPE) for x in (H, Hkv, Hkv))
        at = torch.tensor(pos, device=DEVICE)

        def slices(i):
            caches[i][:, :, :, pos] = torch.stack((k, v))
            F.scaled_dot_product_attention(q[:, :, None], caches[i][0], caches[i][1], enable_gqa=H > Hkv)
        calls = {"ours": lambda i: decode_attention(q, k, v, *caches[i], at), "SDPA, whole cache": slices}
        if GPU:
            calls["masked products"] = lambda i: decode_attention(q, k, v, *caches[i], pos, backend="torch")
        with torch.no_grad():
            yield f"B {B:,} slot {pos} of {T} heads {H}/{Hkv}", "decode", size / bandwidth, compare(calls, n, rounds)


# ---- The output head -----------------------------------------------------------------------------
def eager_logprob(hidden, weight, target):
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def logprob_providers():
    providers = {"ours": linear_logprob, "eager": eager_logprob}
    if not GPU:
        return providers
    providers["torch.compile"] = compiled(eager_logprob)
    try:
        from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger
        if find_spec("cutlass"):
            providers["Liger"] = lambda h, w, t: liger.LigerFusedLinearScaledCrossEntropyFunction.apply(
                h, w, t, 1.0, -100, 1, True)
        else:  # on Hopper its own choice needs nvidia-cutlass-dsl
            providers["Liger, PyTorch fallback"] = lambda h, w, t: liger._FusedLinearPPOFallbackFunction.apply(
                h, w, t, 1.0, -100, True)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy
        for name, eps in (("CCE, no entropy", "high"), ("CCE, no entropy, no filter", None)):
            providers[name] = lambda h, w, t, eps=eps: (
                linear_cross_entropy(h, w, t, reduction="none", filter_eps=eps),)
    except ImportError:
        pass
    return providers


def bench_logprob(shapes, rounds, bandwidth, peak):
    for N, D, V in shapes:
        n = sets_for(N * D * 2 / 2**20)
        hidden = [torch.randn(N, D, device=DEVICE).to(DTYPE).requires_grad_() for _ in range(n)]
        weight = (torch.randn(V, D, device=DEVICE) / D**0.5).to(DTYPE).requires_grad_()
        target, g = torch.randint(V, (N,), device=DEVICE), torch.randn(N, device=DEVICE)
        providers = logprob_providers()

        def forward(f, i):
            with torch.no_grad():
                f(hidden[i], weight, target)

        def both(f, i):
            torch.autograd.grad((f(hidden[i], weight, target)[0] * g).sum(), (hidden[i], weight))
        flop = 2 * N * V * D
        for what, call, floor in (("forward", forward, flop / peak), ("forward + backward", both, 3 * flop / peak)):
            yield (f"N {N:,} D {D} V {V:,}", f"log-prob {what}", floor,
                   compare({k: partial(call, f) for k, f in providers.items()}, n, rounds))
        if GPU:
            torch._dynamo.reset()


def gumbel(hidden, weight):
    z = (hidden @ weight.T).float()
    token = (z - torch.empty_like(z).exponential_().log()).argmax(-1)
    log_p = z.log_softmax(-1)
    return token, log_p.gather(1, token[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def bench_sample(shapes, rounds, bandwidth, peak):
    for B, D, V in shapes:
        n = sets_for((B + V) * D * 2 / 2**20)
        hidden = [torch.randn(B, D, device=DEVICE).to(DTYPE) for _ in range(n)]
        weight = [(torch.randn(V, D, device=DEVICE) / D**0.5).to(DTYPE) for _ in range(n)]
        row, seed, step = torch.arange(B, device=DEVICE), *torch.zeros(2, dtype=torch.long, device=DEVICE)
        race = compiled(gumbel) if GPU else None
        calls = {"ours": lambda i: sample(hidden[i], weight[i], seed, row, step),
                 "product alone": lambda i: hidden[i] @ weight[i].T,
                 "Gumbel race": lambda i: gumbel(hidden[i], weight[i]),
                 "multinomial, token only": lambda i: (hidden[i] @ weight[i].T).float().softmax(-1).multinomial(1)}
        if race:
            calls["Gumbel, torch.compile"] = lambda i: race(hidden[i], weight[i])
        with torch.no_grad():
            yield f"B {B:,} D {D} V {V:,}", "sample", 2 * B * V * D / peak, compare(calls, n, rounds)
        if GPU:
            torch._dynamo.reset()


# ---- Their share of a PPO iteration ----------------------------------------------------------------
def ppo_share(rounds, toy) -> dict:
    """One iteration (rollout, scores, update) at the scripts' defaults on this device, and what its calls
    of each kernel cost alone."""
    from model import GPT, GPTConfig
    c = GPTConfig(4096, 128, 6, 6, 1, 384) if GPU else GPTConfig(4096, 128, 4, 3, 1, 192)
    batch, mb, T = (4096, 512, 64) if GPU else (512, 256, 64)
    if toy:
        c, batch, mb, T = GPTConfig(70, 8, 1, 2, 1, 32), 4, 2, 8
    model = GPT(c).to(DEVICE)
    model.dtype = DTYPE
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def iteration(i):
        y, _ = model.generate(batch, T, seed=0, batch=batch)
        with torch.no_grad():
            for b in y.split(mb):  # policy, reference, reward model: here one model plays all three
                model.logprob(b), model.logprob(b), model.sentiment(b)
        for b in y.split(mb):
            optimizer.zero_grad()
            model.logprob(b).mean().backward()
            optimizer.step()

    Dh = c.d_model // c.n_head
    qkv = [torch.randn(mb, T, h, Dh, device=DEVICE).to(DTYPE).requires_grad_()
           for h in (c.n_head, c.n_kv_head, c.n_kv_head)]
    out, upstream = attention(*qkv), torch.randn(mb, T, c.d_model, device=DEVICE).to(DTYPE)
    cache = torch.randn(2, batch, c.n_kv_head, T, Dh, device=DEVICE).to(DTYPE)
    new = [torch.randn(batch, h, Dh, device=DEVICE).to(DTYPE) for h in (c.n_head, c.n_kv_head, c.n_kv_head)]
    hidden = torch.randn(mb * T, c.d_model, device=DEVICE).to(DTYPE).requires_grad_()
    weight = torch.randn(model.n_text, c.d_model, device=DEVICE).to(DTYPE).requires_grad_()
    target = torch.randint(model.n_text, (mb * T,), device=DEVICE)
    last = hidden.detach()[:batch] if mb * T >= batch else hidden.detach().repeat(batch, 1)[:batch]
    row, pos, half = torch.arange(batch, device=DEVICE), *torch.tensor([0, T // 2], device=DEVICE)

    def no_grad(f):
        def call(i):
            with torch.no_grad():
                f()
        return call

    def head(i):
        torch.autograd.grad(linear_logprob(hidden, weight, target, entropy=False)[0].sum(), (hidden, weight))
    parts = len(range(0, batch, mb))
    calls = {
        "attention, forward": (4 * parts * c.n_layer,  # policy, reference, reward model, update
                               no_grad(lambda: attention(*qkv))),
        "attention, backward": (parts * c.n_layer,
                                lambda i: torch.autograd.grad(out, qkv, upstream, retain_graph=True)),
        "decode_attention": (T * c.n_layer, no_grad(lambda: decode_attention(*new, *cache, half))),
        "linear_logprob, forward": (2 * parts, no_grad(lambda: linear_logprob(hidden, weight, target, entropy=False))),
        "linear_logprob, forward + backward": (parts, head),
        "sample": (T, no_grad(lambda: sample(last, weight, pos, row, pos, entropy=False))),
    }
    r = compare({"whole iteration": iteration} | {k: call for k, (_, call) in calls.items()}, 1, max(3, rounds // 5))
    whole = r["whole iteration"]["ms"]
    return {"model": vars(c), "completions": batch, "minibatch": mb, "iteration_ms": whole,
            "kernels": {k: {"calls": n, "ms": r[k]["ms"], "share": n * r[k]["ms"] / whole}
                        for k, (n, _) in calls.items()}}


# ---- The run -------------------------------------------------------------------------------------
def row(result: dict, floor: float) -> list[str]:
    if "failed" in result["ours"]:
        return [result["ours"]["failed"], "-", "-", "-"]
    ours = result["ours"]["ms"]

    def cell(name, r):
        if "failed" in r:
            return f"{name}: {r['failed']}"
        memory = f", {r['peak_mb'] / result['ours']['peak_mb']:.1f}x memory" if r["peak_mb"] else ""
        return f"{name} {r['ms']:.3g} ({r['ms'] / ours:.2f}x{memory})"
    peak = result["ours"]["peak_mb"]
    return [f"{ours:.3g}", f"{100 * floor * 1e3 / ours:.0f} %", f"{peak:.0f}" if peak else "-",
            "; ".join(cell(k, r) for k, r in result.items() if k != "ours")]


def versions_of_packages() -> dict[str, str]:
    found = {}
    for package in ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(cfg: Config) -> None:
    if GPU:
        from torch._functorch import config as functorch
        functorch.donated_buffer = False  # so that a backward pass can be repeated
    device = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} threads, {platform.machine()}"
    versions = versions_of_packages()
    bandwidth, peak = ceilings(cfg.rounds, cfg.shapes == "toy")
    shapes = SHAPES[cfg.shapes if cfg.shapes != "all" else "gpu" if GPU else "cpu"]
    report = {"device": device, "ours": "Triton" if GPU else "PyTorch path: no GPU here", "versions": versions,
              "bandwidth_GB_s": bandwidth / 1e9, "product_TFLOP_s": peak / 1e12, "rows": []}
    name = "-".join(["kernels", device.replace(" ", "-").lower() if GPU else "cpu", *(x for x in (cfg.only, cfg.shapes) if x != "all")])
    path = cfg.out or ROOT / "benchmarks/results" / f"{name}.json"  # a part does not replace the whole
    print(f"{device}; " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print(f"`ours` is {report['ours']}. Copy {bandwidth / 1e9:,.0f} GB/s, bf16 product {peak / 1e12:,.2f} TFLOP/s.\n")
    print("| kernel | shape | ours, ms | of floor | peak MB | others, ms (times ours) |\n|---|---|---|---|---|---|")
    benches = {"attention": bench_attention, "decode": bench_decode, "logprob": bench_logprob, "sample": bench_sample}
    for name, bench in benches.items():
        for shape, kernel, floor, result in bench(shapes[name], cfg.rounds, bandwidth, peak) if cfg.only in ("all", name) else ():
            print(f"| {kernel} | {shape} | {' | '.join(row(result, floor))} |", flush=True)
            report["rows"].append({"kernel": kernel, "shape": shape, "floor_ms": 1e3 * floor, "providers": result})
            path.write_text(json.dumps(report, indent=1))
    if cfg.only not in ("all", "ppo"):
        return
    report["ppo"] = ppo = ppo_share(cfg.rounds, cfg.shapes == "toy")
    path.write_text(json.dumps(report, indent=1))
    print(f"\nOne PPO iteration of {ppo['completions']:,} completions: {ppo['iteration_ms']:,.0f} ms, of which\n")
    print("| kernel | calls | ms each | share |\n|---|---|---|---|")
    for name, r in ppo["kernels"].items():
        print(f"| {name} | {r['calls']} | {r['ms']:.3g} | {100 * r['share']:.1f} % |")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
