"""Compile every Triton kernel for a GPU, without needing one, and check the machine code.

    python -m tests.compile_only 80       (or 90; prints a table, exit code 1 if a check fails)

The last line names Triton and the assembler. TRITON_PTXAS_PATH chooses another assembler. (Triton
3.9 brings a newer one for sm_90 than for sm_80. Triton 3.6 has an older one for both.)

The launch code of kernels/ runs unchanged, on CPU tensors. We give Triton a driver that only names
a target. So it specialises and compiles exactly as at run time (alignment, divisibility by 16), but
launches nothing. Then `cuobjdump`, which comes with Triton, shows what ptxas produced.

Each kernel must pass these checks:

- It spills no registers and uses no stack.
- Its shared memory stays within the limit of one program.
- Its products run on tensor cores (wgmma on sm_90 if a tile has the 64 rows it needs).
- Its loads and stores have 16 bytes if rows are aligned.
"""
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # bytes per program (80: as 86, 89)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
COLUMNS = (f"{'sm':>3} {'case':34} {'kernel':29} {'regs':>4} {'stack':>5} {'smem':>7} {'warps':>5} "
           f"{'mma':>4} ")


class Target:
    """Answers what Triton asks a driver before a launch."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device=None):
        return 0


def compile_instead_of_launching(compiled: list) -> None:
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only


def inspect(kernel) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage, sass = (subprocess.run([CUOBJDUMP, flag, f.name], capture_output=True, text=True,
                                      check=True).stdout
                       for flag in ("--dump-resource-usage", "--dump-sass"))
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}

    def count(pattern):
        return len(re.findall(pattern, sass))
    return found | {"SHARED": kernel.metadata.shared, "WARPS": kernel.metadata.num_warps,
                    "HGMMA": count(r"HGMMA"), "HMMA": count(r"HMMA"),
                    "VECTOR_LOAD": count(r"LD(G|GSTS)\S*\.128"),
                    "VECTOR_STORE": count(r"STG\S*\.128")}


# products of tiles and stored tiles in each kernel's source: each takes an instruction or more
PRODUCTS = {"attention_forward": 2, "attention_backward": 7, "decode_forward": 2,
            "logprob_forward": 1, "sample_tiles": 1}
STORED = {"attention_forward": 1, "attention_backward": 3, "logprob_backward": 1}


def problems(arch: int, name: str, aligned: bool, r: dict) -> list[str]:
    """Say in words what is wrong with one compiled kernel; [] if nothing is."""
    products, tiles = r["HGMMA"] + r["HMMA"], STORED.get(name, 0)
    return [text for wrong, text in (
        (r["STACK"] or r["LOCAL"], f"spills: {r['STACK']} bytes of stack"),
        (r["SHARED"] > SHARED[arch],
         f"{r['SHARED']} bytes of shared memory, {SHARED[arch]} allowed"),
        (products < PRODUCTS.get(name, 0), f"{products} tensor-core instructions for "
         f"{PRODUCTS.get(name)} products"),
        (aligned and name != "sample_merge" and not r["VECTOR_LOAD"], "no 16-byte load"),
        (aligned and r["VECTOR_STORE"] < tiles,
         f"{r['VECTOR_STORE']} 16-byte stores for {tiles} tiles"),
    ) if wrong]


def attention_cases(dtype, shapes):
    from kernels.attention import attention, decode_attention
    for T, Dh, H, Hkv in shapes:
        packed = torch.zeros(2, T, H + 2 * Hkv, Dh, dtype=dtype, requires_grad=True)
        q, k, v = packed.split([H, Hkv, Hkv], dim=2)
        cache = torch.zeros(2, 2, Hkv, T, Dh, dtype=dtype)

        def call():
            attention(q, k, v, backend="triton").sum().backward()
            with torch.no_grad():
                decode_attention(q[:, 0], k[:, 0], v[:, 0], *cache, 0, (cache[0, 0, 0],) * 2,
                                 backend="triton")
        yield f"{str(dtype)[6:]} T={T} Dh={Dh} H={H}/{Hkv}", Dh % 16 == 0 and Dh >= 32, call


def elementwise_cases(dtype, shapes):
    from kernels.elementwise import rotate, squared_relu
    for T, heads, Dh in shapes:
        x = torch.zeros(2, T, heads, Dh, dtype=dtype, requires_grad=True)

        def call():
            (rotate(x[:, :, 1:], *x[:, 0, :1]).sum() + squared_relu(x).sum()).backward()
        yield f"{str(dtype)[6:]} T={T} Dh={Dh} H={heads}", Dh % 32 == 0, call


def head_cases(dtype, shapes):
    from kernels.logprob import linear_logprob
    from kernels.sample import sample
    for D, V in shapes:
        hidden = torch.zeros(2, 64, D, dtype=dtype, requires_grad=True)
        weight = torch.zeros(V, D, dtype=dtype, requires_grad=True)
        target = torch.zeros(2, 64, dtype=torch.long)

        def call():
            linear_logprob(hidden, weight, target, backend="triton").sum().backward()
            with torch.no_grad():
                sample(hidden[0], weight, 0, target[0], 0, backend="triton")
        yield f"{str(dtype)[6:]} D={D} V={V}", D % 16 == 0, call


def main(arch: int) -> int:
    driver.set_active(Target(arch))
    # let CPU tensors pass for GPU ones
    sys.modules["kernels.backend"] = type(sys)("kernels.backend")
    sys.modules["kernels.backend"].use_triton = lambda *_: True
    compiled: list = []
    compile_instead_of_launching(compiled)
    cases = itertools.chain(
        attention_cases(torch.bfloat16, [
            (64, 64, 6, 6), (64, 64, 6, 2), (128, 64, 6, 6), (128, 64, 6, 1), (256, 64, 6, 6),
            (256, 64, 6, 2), (16, 16, 2, 2), (128, 32, 4, 4), (128, 32, 4, 2), (256, 32, 4, 4),
            (64, 128, 4, 4), (256, 128, 4, 4), (256, 128, 4, 2), (64, 48, 4, 4), (1, 64, 1, 1)]),
        attention_cases(torch.float16, [(64, 64, 6, 6)]),
        attention_cases(torch.float32, [(32, 64, 3, 3), (64, 64, 3, 1), (16, 128, 2, 2),
                                        (256, 128, 4, 2)]),
        head_cases(torch.bfloat16, [(256, 2048), (192, 4093), (384, 2048), (384, 4093),
                                    (768, 50304), (24, 65), (64, 1)]),
        head_cases(torch.float32, [(256, 2048)]),
        elementwise_cases(torch.bfloat16, [(64, 8, 64), (1, 3, 24)]))
    print(COLUMNS)
    seen, failures = set(), 0
    for label, aligned, call in cases:
        call()
        for name, kernel in compiled:
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            r = inspect(kernel)
            wrong = problems(arch, name, aligned, r)
            failures += bool(wrong)
            mma = "wgmma" if r["HGMMA"] else "mma" if r["HMMA"] else "-"
            print(f"{arch:3} {label:34} {name:29} {r['REG']:4} {r['STACK']:5} {r['SHARED']:7} "
                  f"{r['WARPS']:5} {mma:>5} {'; '.join(wrong)}", flush=True)
        compiled.clear()
    print(f"{len(seen)} kernels compiled for sm_{arch} by Triton {triton.__version__} and ptxas "
          f"{get_ptxas(arch).version}, {failures} with a problem")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
