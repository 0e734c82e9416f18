"""How a script starts, logs, ends, and fails in one line instead of a traceback."""
import ctypes
import gc
import json
import os
import re
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from kernels.backend import live_path
from running.files import UserError, require, write
from running.processes import world


# ---- Failing -------------------------------------------------------------------------------------
def one_line(kind, error, trace) -> None:
    """sys.excepthook: what a user can mend is one line and exit code 2; a bug has its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        line = "interrupted: run the same command again (01 and 04: --resume goes on)"
    elif issubclass(kind, UserError):
        line = str(error)
    elif dist.is_initialized() and re.search("(?i)connection|peer|nccl", str(error)):
        line = "another process has ended; the same command with --resume goes on, also with fewer"
    elif issubclass(kind, OSError) and error.errno is not None:
        line = f"{error.filename or 'writing'}: {error.strerror}; make room or choose another --out"
    else:
        sys.stderr = sys.__stderr__
        return sys.__excepthook__(kind, error, trace)
    if world()[0] > 0 and issubclass(kind, (KeyboardInterrupt, UserError)):
        time.sleep(1)  # the first process says it, and torchrun ends all when one has ended
    else:
        sys.stdout.flush()
        print(f"\nerror: {line}", file=sys.__stderr__, flush=True)
    os._exit(2)


# ---- Starting, logging, ending -------------------------------------------------------------------
def start(Config: type, doc: str, on_gpu: dict | None = None) -> tuple:
    """Read the command line, choose device and dtype, seed torch, and print it all -> settings,
    device, dtype. `on_gpu`: the defaults that differ where there is a GPU."""
    sys.excepthook = one_line
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    defaults = Config(**(on_gpu or {})) if device.type == "cuda" else Config()
    cfg = tyro.cli(Config, description=doc, default=defaults)
    require(0 <= cfg.seed < 2**31, "--seed must be in [0, 2^31)")
    keep_freed_pages()
    gc.set_threshold(100_000)  # at 700, the default, reading rows is mostly a search for cycles
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if world()[0] > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.manual_seed(cfg.seed)
    dtype = fast_dtype(device)
    try:
        path = live_path(device)
    except ValueError as error:
        raise UserError(str(error)) from error
    print("settings:", ", ".join(f"{k} {v}" for k, v in asdict(cfg).items()))
    print(f"device: {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, "
          f"{world()[1]} processes, kernels: {path}", flush=True)
    start.time = time.time()
    start.cfg = cfg
    return cfg, device, dtype


def check_signs(cfg, positive: str, not_negative: str) -> None:
    """Names of settings, blanks between them. Raises UserError if one has a wrong sign."""
    for knob in positive.split():
        require(getattr(cfg, knob) > 0, f"--{knob.replace('_', '-')} must be positive")
    for knob in not_negative.split():
        require(getattr(cfg, knob) >= 0, f"--{knob.replace('_', '-')} must not be negative")


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast: GPUs, and CPUs with AMX or AVX512-BF16. Else float32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    fast = device.type == "cuda" or re.search(r"\b(amx_bf16|avx512_bf16)\b", flags)
    return torch.bfloat16 if fast else torch.float32


def keep_freed_pages() -> None:
    """Linux: do not return freed memory to the kernel, which would zero every page again."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):      # glibc
        libc.mallopt(-1, 2**31 - 1)   # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)           # M_MMAP_MAX


class Log:
    """One JSON line a step. Resuming at step n first drops what a killed run wrote from n on."""

    def __init__(self, path: Path, resume_at: int = 0):
        lines = path.read_text().splitlines() if resume_at and path.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        write(path, "".join(x + "\n" for x in whole if json.loads(x)["step"] < resume_at))
        self.file = open(os.devnull if world()[0] else path, "a", buffering=1)
        self.laps, self.since = {}, time.time()

    def lap(self, name: str) -> None:
        """The seconds since the last lap go into the next line, under this name."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.time()
        self.laps[name], self.since = now - self.since, now

    def __call__(self, **row):
        self.file.write(json.dumps(row | self.laps) + "\n")
        self.laps = {}


def record(out: Path, earlier_s: float = 0.0) -> dict:
    """Add this script's settings and seconds to out/stages.json -> those of all stages so far."""
    path = out / "stages.json"
    script = Path(sys.argv[0]).name
    settings = {k: v for k, v in asdict(start.cfg).items()
                if k not in ("corpus", "labels", "out", "resume")}  # the report tells no paths
    for knob in ("target", "reward"):  # several runs of 04 stand beside one another
        script += f" --{knob} {settings[knob]}" if knob in settings else ""
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # ValueError: damaged, and not worth a failed run
        known = {}
    seconds = earlier_s + time.time() - start.time
    known[script] = {"seconds": round(seconds, 1), "settings": settings}
    write(path, json.dumps(known, indent=1, default=str))
    return known


def finish(next_command: str, out: Path, earlier_s: float = 0.0) -> None:
    """Print what it took and what comes next. earlier_s: seconds of a run that this one resumed."""
    record(out, earlier_s)
    if dist.is_initialized():
        dist.destroy_process_group()
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    before = f" (before it was resumed {earlier_s:.0f} s)" if earlier_s else ""
    print(f"wall time {time.time() - start.time:.0f} s{before}, peak memory {peak:.2f} GiB")
    elsewhere = next_command.startswith("python") and str(out) != "out"
    print(f"next: {next_command}" + (f" --out {out}" if elsewhere else ""))
