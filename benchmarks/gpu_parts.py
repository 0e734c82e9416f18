"""The parts of `make gpu`, each a function -> its figures by name, which raises if it has failed.

benchmarks/gpu.py says when each is run, for how long, and what its goal is. With DRY=1 they run on
the CPU, the kernels in Triton's interpreter, at toy size: no figure then means anything.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.gpu import DRY, OUT, ROOT
from benchmarks.kernels import ceilings, milliseconds
from kernels import attention, decode_attention, linear_logprob, rotate, sample, squared_relu
from model import GPTConfig, load
from model import UserError, require

TOY = {  # the scripts, and how small they are in a rehearsal
    "01_pretrain.py": "--vocab-size 300 --context 16 --n-layer 1 --n-head 2 --n-kv-head 1 "
                      "--d-model 32 --batch 8 --steps 20 --warmup 2 --measure-every 20 "
                      "--n-samples 8 --corpus README.md",
    "02_sample_label.py": "--n 256 --length 12 --pieces 1", "03_reward_model.py": "",
    "04_ppo.py": "--batch 16 --max-batch 16 --minibatch 8 --max-iterations 3 --kl-samples 8 "
                 "--reward-samples 16", "05_eval.py": "--n 16 --n-best 16"}
DEVICE = "cpu" if DRY else "cuda"
HALF = torch.float16 if DRY else torch.bfloat16  # which the interpreter does not have
FAMILIES = ("attention", "decode", "logprob", "sample", "elementwise")


def part(*arguments: str, prefix=(), env=None) -> subprocess.Popen:
    """A function of this file in a process of its own."""
    command = [*prefix, sys.executable, "-m", "benchmarks.gpu_parts", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env)


# ---- Are the kernels right? ----------------------------------------------------------------------
def inputs_and_call(family: str, sequences: int):
    """-> tensors, and a function of them and a backend, at the shapes of the scripts' defaults."""
    B, T, H, Dh, V, D = (2, 16, 2, 16, 70, 32) if DRY else (sequences, 64, 6, 64, 4093, 384)
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE)
    angle, pos = randn(T, 1, Dh // 2), torch.tensor(T - 2, device=DEVICE)
    angles = [torch.cat((angle.cos(), angle.cos()), -1), torch.cat((angle.sin(), -angle.sin()), -1)]
    rows = torch.arange(B * T, device=DEVICE)

    def draw(hidden, weight, backend):
        token, logp, _ = sample(hidden.to(HALF), weight.to(HALF), pos, rows, pos, backend="triton")
        if backend == "torch":
            logp, _ = linear_logprob(hidden, weight, token, backend="torch")
        return logp.detach()
    return {
        "attention": ([randn(B, T, h, Dh) for h in (H, 1, 1)],
                      lambda q, k, v, backend: attention(q, k, v, backend=backend)),
        "decode": ([randn(B, h, Dh) for h in (H, 1, 1)] + [randn(2, B, 1, T, Dh), *angles],
                   lambda q, k, v, cache, cos, sin, backend: decode_attention(
                       q, k, v, *cache.clone(), pos, backend=backend, angles=(cos, sin)).detach()),
        "logprob": ([randn(B * T, D), randn(V, D) * 2 * D**-0.5],
                    lambda h, w, backend: linear_logprob(h, w, rows * 37 % V, backend=backend)),
        "sample": ([randn(B * T, D), randn(V, D) * 2 * D**-0.5], draw),
        "elementwise": ([randn(B, T, H, Dh), *angles], lambda x, cos, sin, backend: (
            rotate(x, cos, sin, backend=backend), squared_relu(x, backend=backend))),
    }[family]


def smoke(family: str, sequences: int, repeats: int) -> float:
    """Results and gradients of one family in 16 bits: at most twice the error of PyTorch in the
    same dtype against float64, three times for gradients, and the same bits at each repeat ->
    error, as a share of what is allowed."""
    tensors, call = inputs_and_call(family, sequences)

    def computed(dtype, backend):
        given = [x.to(HALF).to(dtype).requires_grad_() for x in tensors]
        with torch.set_grad_enabled(family not in ("decode", "sample")):
            outs = call(*given, backend=backend)
        outs = [outs] if torch.is_tensor(outs) else list(outs)
        if not outs[0].requires_grad:
            return outs, []
        upstream = [torch.ones_like(o) + torch.arange(o.size(-1), device=DEVICE) % 7 for o in outs]
        grads = torch.autograd.grad(outs, given, upstream, allow_unused=True)
        return outs, [x for x in grads if x is not None]

    def error(x, exact):
        return ((x.double() - exact.double()).norm() / exact.double().norm()).item()
    ours, eager = computed(HALF, "triton"), computed(HALF, "torch")
    exact = computed(torch.float64, "torch")
    worst = max(error(a, x) / (limit * error(b, x) + 1e-4)
                for limit, *lists in zip((2, 3), ours, eager, exact) for a, b, x in zip(*lists))
    for _ in range(repeats):
        again = sum(computed(HALF, "triton"), [])
        require(all(map(torch.equal, again, sum(ours, []))), f"{family}: other bits in a repeat")
    require(worst <= 1, f"{family}: {worst:.2f} times the error that is allowed")
    return worst


def assemblers() -> dict[str, str]:
    """ptxas that differ in version: version -> path. First the one that Triton takes by itself."""
    if DRY:
        return {"": ""}
    from triton.backends.nvidia.compiler import get_ptxas
    major, minor = torch.cuda.get_device_capability()
    default = get_ptxas(10 * major + minor)
    others = [*Path(default.path).parent.glob("ptxas*"), os.environ.get("PTXAS"),
              shutil.which("ptxas")]
    found = {default.version: ""}
    for path in map(str, filter(None, others)):
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        found.setdefault(re.search(r"release (\d+\.\d+)", text)[1], path)
    return found


def all_smoke() -> dict:
    """Every family with every assembler, all at once, each in a process and cache of its own."""
    running, paths = {}, assemblers()
    for name, path in paths.items():
        for family in FAMILIES if not DRY else ("all",):
            env = os.environ | {"TRITON_CACHE_DIR": str(OUT / f"triton-{name}-{family}")}
            if path:
                env |= {"TRITON_PTXAS_PATH": path, "TRITON_PTXAS_BLACKWELL_PATH": path}
            running[name, family] = part("each_smoke", family, env=env)
    wrong = {name: [] for name in paths}
    for (name, family), process in running.items():
        wrong[name] += [family] if process.wait() else []
    best = min(wrong, key=lambda name: len(wrong[name]))
    to_torch = {"attention" if family == "decode" else family for family in wrong[best]}
    return {"families wrong": len(wrong[best]), "TORCH_KERNELS": ",".join(sorted(to_torch)),
            "TRITON_PTXAS_PATH": paths[best], "TRITON_PTXAS_BLACKWELL_PATH": paths[best],
            "ptxas": best, "wrong by ptxas": wrong}


def each_smoke(family: str, sequences: str = "512", repeats: str = "2" if DRY else "50") -> dict:
    return {name: smoke(name, int(sequences), int(repeats)) for name in FAMILIES
            if family in (name, "all")}


def values() -> dict:
    how = ["-k", "extreme"] if DRY else ["-n", "14"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *how]
    done = subprocess.run([*command, "tests/triton_values.py"], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)
    print(done.stdout)
    count = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    require(count.get("passed", 0) > 0, "no test has passed")
    return {"tests failed": count.get("failed", 0) + count.get("error", 0),
            "tests passed": count["passed"]}


def sanitizer(tool: str, family: str) -> dict:
    prefix = [] if DRY else ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    return {"errors": int(part("each_smoke", family, "32", "2", prefix=prefix).wait() != 0)}


# ---- The scripts ---------------------------------------------------------------------------------
def script(name: str, *arguments: str) -> dict:
    """Seconds of one script on the GPU; raises if it fails, runs elsewhere, or takes a minute."""
    began = time.time()
    command = [sys.executable, name, "--out", str(OUT / "run"), *arguments]
    done = subprocess.run(command + TOY[name].split() * DRY, cwd=ROOT, text=True, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout, flush=True)
    require(done.returncode == 0, f"{name} has failed: {done.stdout.strip().splitlines()[-1]}")
    require(f"device: {DEVICE}" in done.stdout, f"{name} did not run on {DEVICE}")
    return {f"{name}, s": time.time() - began}


def pipeline(cache: str) -> dict:
    """The five scripts as they come, on an empty Triton cache or the one they have left."""
    if DRY and cache == "warm":
        return {"five scripts, s": 0}  # nothing that has not just been rehearsed
    shutil.rmtree(OUT / "run", ignore_errors=True)
    if cache == "cold":
        shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)
    seconds = {}
    for name in TOY:
        corpus = os.environ.get("CORPUS") if name.startswith("01") else ""
        seconds |= script(name, *(["--corpus", corpus] if corpus else []))
        if name.startswith("01"):
            model, _, header = load(OUT / "run/base.safetensors", name)
            size = model.config.d_model
            require("settings" in header and size == (32 if DRY else 384),
                    f"d_model is {size}: not this machine's default model (no corpus? CORPUS=FILE)")
    return {"five scripts, s": sum(seconds.values())} | seconds


# ---- What is fast? -------------------------------------------------------------------------------
def bench(only: str) -> dict:
    """benchmarks.kernels at the preset's shapes -> its report."""
    path = OUT / f"kernels-{only}.json"
    size = ["--rounds", "1", "--shapes", "toy"] if DRY else ["--shapes", "preset"]
    subprocess.run([sys.executable, "-m", "benchmarks.kernels", "--only", only, "--out", str(path),
                    *size], cwd=ROOT, check=True)
    return json.loads(path.read_text())


def peers(family: str) -> dict:
    """At the first shape of each kernel: how near ours is to the floor, and how many times as long
    each peer takes, unless it has failed."""
    found = {}
    for row in reversed(bench(family)["rows"]):  # so that the first shape stays
        ours = row["providers"].pop("ours")
        require("ms" in ours, f"ours: {ours}")
        found[f"{row['kernel']}, of floor"] = row["floor_ms"] / ours["ms"]
        found |= {f"{row['kernel']}, times {peer}": theirs["ms"] / ours["ms"]
                  for peer, theirs in row["providers"].items() if "ms" in theirs}
    return found


def iteration() -> dict:
    ppo = bench("ppo")["ppo"]
    return {"PPO iteration, ms": ppo["iteration_ms"]} | {
        name: kernel["ms"] for name, kernel in ppo["kernels"].items()}


def preset():
    """benchmarks.speed, whose model is that of 01's defaults on this device."""
    from benchmarks import speed
    if DRY:
        speed.DEFAULT, speed.COMPLETIONS = GPTConfig(70, 16, 1, 2, 1, 32), 4
    require(speed.DEFAULT.d_model == (32 if DRY else 384), f"d_model is {speed.DEFAULT.d_model}")
    return speed


def rollout() -> dict:
    """Of 8,192 x 64 tokens, against Hugging Face; the sum floor: arithmetic, then the cache."""
    speed = preset()
    speed.COMPLETIONS = 4 if DRY else 8192
    seconds, tokens, flop, read = speed.rollout(1 if DRY else 3)
    bandwidth, peak = ceilings(3, DRY)
    theirs = seconds.get("Hugging Face generate, static cache")
    return {"times Hugging Face": theirs and theirs / seconds["ours"],
            "of sum floor": (flop / peak + read / bandwidth) / seconds["ours"],
            "tokens/s": tokens / seconds["ours"]} | {f"{k}, s": x for k, x in seconds.items()}


def profile() -> dict:
    """The 25 kernels that take longest in one decode step, one minibatch, one pretraining step."""
    speed = preset()
    model, n, length = speed.make(speed.DEFAULT), *((4, 8) if DRY else (4096, 64))
    y = model.generate(n, length, seed=0)[0]
    optimizer = torch.optim.Muon(model.blocks.parameters())

    def update(rows):
        model.logprob(rows).mean().backward()
        optimizer.step()
        model.zero_grad()
    work = {"rollout": lambda: model.generate(n, length, seed=0),
            "minibatch": lambda: update(y[:512]), "pretraining step": lambda: update(y[:256])}
    seconds, kinds = speed.medians(work, 3), torch.profiler.ProfilerActivity
    for name, call in work.items():
        with torch.profiler.profile(activities=[kinds.CPU if DRY else kinds.CUDA]) as profiler:
            call()
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25)
        print(f"\n{name}\n{table}", flush=True)
    return {"decode step, us": 1e6 * seconds["rollout"] / length} | {
        f"{name}, ms": 1e3 * s for name, s in seconds.items()}


def variants() -> dict:
    """Milliseconds of other tiles and forms than those that are built in, which come first."""
    from kernels import triton_attention, triton_head
    N, D, V = (16, 32, 70) if DRY else (32_768, 384, 4093)
    hidden, weight = (torch.randn(n, D, device=DEVICE).to(HALF).requires_grad_() for n in (N, V))
    target, base = torch.arange(N, device=DEVICE) % V, triton_head.config(D, HALF)
    q, k, v, cache = (x.to(HALF) for x in inputs_and_call("decode", 4096)[0][:4])
    pos = torch.tensor(cache.size(3) // 2, device=DEVICE)
    logprob = partial(linear_logprob, hidden, weight, target, backend="triton")
    draw = partial(sample, hidden[:4096], weight, pos, target[:4096], pos, backend="triton")
    calls = {"log-prob": torch.no_grad()(lambda i: logprob()), "sample": lambda i: draw(),
             "log-prob, forward and backward": lambda i: logprob()[0].sum().backward(),
             "decode": lambda i: decode_attention(q, k, v, *cache, pos, backend="triton")}
    tiles = ({}, dict(num_stages=1), dict(num_stages=3), dict(BLOCK_M=64, num_warps=4),
             dict(BLOCK_M=64, num_warps=4, num_stages=1))
    tries = [(what, triton_head, "config", lambda *_, c=base | x: dict(c), x)
             for what in ("log-prob", "sample") for x in tiles]
    tries += [("log-prob, forward and backward", triton_head, "RECOMPUTE_UP_TO", x, x)
              for x in (384, 0)]
    tries += [("decode", triton_attention, "DECODE", dict(num_warps=w, num_stages=s), (w, s))
              for w, s in ((4, 2), (4, 1), (2, 1), (2, 2), (1, 1))]
    found = {}
    for what, module, name, value, label in tries:
        try:
            with patch.object(module, name, value):
                calls[what](0)
                ms = min(milliseconds(calls[what], 1) for _ in range(1 if DRY else 15))
        except Exception as error:  # what does not fit this GPU is a result as well
            ms = None
            print(error)
        found[f"{what} {label}"] = ms
        print(f"{what} {label}: {ms} ms", flush=True)
    return {"variants that ran": sum(ms is not None for ms in found.values())} | found


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    try:
        print(json.dumps(globals()[name](*arguments)))
    except UserError as error:
        sys.exit(f"error: {error}")
