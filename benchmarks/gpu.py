"""All that a GPU has to show, in one command: what is right, then what is fast, part by part.

    make gpu                         # all parts; VENV= PYTHON=python3 where an environment is there
    make gpu PART=first              # or second: each fits ten minutes; or names: PART=warm,decode
    make gpu CORPUS=shakespeare.txt  # if the text does not lie where 01 looks
    make gpu DRY=1                   # rehearsal: on the CPU, in Triton's interpreter, at toy size
    python -m benchmarks.gpu --tables   # the table of gpu.json into docs/kernels.md

Each part is a process of its own with a time limit, so that one failure spoils nothing. Its log is
out-gpu/PART.log; its figures are in benchmarks/results/gpu.json as soon as it ends. `smoke` goes
first and decides for the others: a family of kernels that is wrong, or not the same in 50 launches,
is sent to PyTorch (TORCH_KERNELS), and the assembler that makes most families right is used
(TRITON_PTXAS_PATH; PTXAS=FILE offers one). The goals were set before anything had run on a GPU.
"""
import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out-gpu"
DRY = os.environ.get("DRY") == "1"
PARTS = {  # call, limit in seconds, function of gpu_parts and its arguments, {figure: goal}
    "smoke": ("first", 60, "all_smoke", {"families wrong": ("at most", 0)}),
    "values": ("first", 110, "values", {"tests failed": ("at most", 0)}),
    "pipeline": ("first", 150, "pipeline cold", {"five scripts, s": ("at most", 60)}),
    "warm": ("first", 80, "pipeline warm", {"five scripts, s": ("at most", 60)}),
    "profile": ("first", 40, "profile", {"decode step, us": ("at most", 385)}),
    "decode": ("first", 35, "peers decode", {"decode, of floor": ("at least", 0.35),
                                             "decode, times SDPA, whole cache": ("at least", 2)}),
    "sample": ("first", 35, "peers sample",
               {"sample, times Gumbel, torch.compile": ("at least", 1)}),
    "iteration": ("first", 30, "iteration", {"PPO iteration, ms": ("at most", 220)}),
    "memcheck": ("first", 50, "sanitizer memcheck all", {"errors": ("at most", 0)}),
    "racecheck": ("second", 60, "sanitizer racecheck logprob", {"errors": ("at most", 0)}),
    "variants": ("second", 130, "variants", {}),
    "attention": ("second", 90, "peers attention",
                  {"attention backward, times SDPA flash": ("at least", 1.3)}),
    "logprob": ("second", 90, "peers logprob",
                {"log-prob forward, times torch.compile": ("at least", 1.6)}),
    "rollout": ("second", 130, "rollout", {"times Hugging Face": ("at least", 3),
                                           "of sum floor": ("at least", 0.5)}),
    "sad": ("second", 60, "script 04_ppo.py --target sad", {"04_ppo.py, s": ("at most", 15)}),
}


# ---- The machine ---------------------------------------------------------------------------------
def missing() -> tuple[list[str], list[str]]:
    """What is not there, a line each: what nothing runs without, and what some part would want."""
    needed = re.findall(r"(?m)^([\w-]+)", (ROOT / "requirements.txt").read_text())
    first = [f"{name} is not installed: pip install {name}" for name in dict.fromkeys(needed)
             if name != "selenium"  # which drives a browser
             and not find_spec({"scikit-learn": "sklearn"}.get(name, name))]
    if DRY or not find_spec("torch"):
        return first, []
    import torch
    if not torch.cuda.is_available():
        return [*first, "torch sees no GPU: DRY=1 rehearses without one"], []
    texts = (os.environ.get("CORPUS", ""), ROOT / "data/shakespeare.txt",
             ROOT / "../shared/data/shakespeare.txt")
    wanted = {"pytest-xdist: the tests of values will not end in time": find_spec("xdist"),
              "transformers: no rollout to compare with": find_spec("transformers"),
              "compute-sanitizer: no memcheck, no racecheck": shutil.which("compute-sanitizer"),
              "the corpus, CORPUS=FILE: the shipped model is not timed": any(
                  map(os.path.isfile, texts))}
    return first, [line for line, there in wanted.items() if not there]


def versions() -> dict[str, str]:
    from benchmarks.kernels import versions_of_packages
    found = {"python": platform.python_version()} | versions_of_packages()
    if DRY:
        return found | {"GPU": "none: a rehearsal, whose figures mean nothing"}
    import torch
    from triton.backends.nvidia.compiler import get_ptxas
    major, minor = torch.cuda.get_device_capability()
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return found | {"GPU": torch.cuda.get_device_name(),
                    "driver": subprocess.check_output(ask, text=True).split("\n")[0],
                    "ptxas": get_ptxas(10 * major + minor).version}


# ---- Running and reporting -----------------------------------------------------------------------
def run(name: str, smoke: dict) -> dict:
    """One part, with all that it starts -> passed, seconds, figures, and why if it has failed."""
    _, limit, command, _ = PARTS[name]
    chosen = {key: value for key, value in smoke.items() if key.isupper() and value}
    env = os.environ | chosen | {"TRITON_CACHE_DIR": str(OUT / "triton")}
    if DRY:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    began, log = time.time(), OUT / f"{name}.log"
    with open(log, "w") as f:
        code, process = f"over {limit} s", subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_parts", *command.split()], cwd=ROOT, env=env,
            stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(limit)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a finished part has left behind
    last = (log.read_text().splitlines() or [""])[-1]
    said = {"figures": {}, "why": f"{code}: {last[:80]}"} if code else {"figures": json.loads(last)}
    return {"passed": code == 0, "seconds": time.time() - began} | said


def rows(name: str, result: dict) -> list[str]:
    """A line of the table for each goal of a part; of goal: above 1 it is reached."""
    lines = []
    for figure, (bound, goal) in (PARTS[name][3] or {"": ("", "")}).items():
        x = result["figures"].get(figure)
        said = f"{figure}: not measured" if figure else ""
        reached = not figure
        ratio = ""
        if x is not None:
            said = f"{figure}: {x:.4g}"
            reached = x >= goal if bound == "at least" else x <= goal
            ratio = f"{x / goal if bound == 'at least' else goal / x:.2f}" if x and goal else ""
        passed = "failed" if not result["passed"] else "yes" if reached else "missed"
        cells = (name, passed, f"{result['seconds']:.0f}", result.get("why", said),
                 f"{bound} {goal}".strip(), ratio)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(report: dict) -> str:
    return "\n".join([", ".join(f"{k} {v}" for k, v in report["versions"].items()), "",
                      "| part | passed | s | figure | goal | of goal |",
                      "|---|---|---|---|---|---|",
                      *(line for name, r in report["parts"].items() for line in rows(name, r))])


def fill_table(report: dict) -> None:
    page, marks = ROOT / "docs/kernels.md", r"(?s)(<!-- gpu -->\n).*(<!-- /gpu -->)"
    page.write_text(re.sub(marks, lambda m: f"{m[1]}{table(report)}\n{m[2]}", page.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="first,second", help="parts or calls, with commas")
    parser.add_argument("--tables", action="store_true", help="run nothing, fill the table")
    args = parser.parse_args()
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/local/cuda/bin"  # compute-sanitizer
    results = (OUT if DRY else ROOT / "benchmarks/results") / "gpu.json"
    report = json.loads(results.read_text()) if results.exists() else {"parts": {}}
    if args.tables:
        return fill_table(report) if report["parts"] else f"error: {results} is missing: make gpu"
    asked = args.part.split(",")
    if unknown := [x for x in asked if x not in PARTS and x not in ("first", "second")]:
        sys.exit(f"error: no such part: {', '.join(unknown)}; there are first, second, "
                 + ", ".join(PARTS))
    needed, wanted = missing()
    print(*(f"missing: {line}" for line in needed + wanted), sep="\n")
    if needed:
        return 2
    if report.get("versions") != versions():  # else of an earlier call, with all the same
        report = {"versions": versions(), "parts": {}}
    OUT.mkdir(exist_ok=True)
    chosen = [name for name in PARTS if name in asked or PARTS[name][0] in asked]
    for name in chosen:
        report["parts"][name] = run(name, report["parts"].get("smoke", {}).get("figures", {}))
        results.write_text(json.dumps(report, indent=1))
        print("\n".join(rows(name, report["parts"][name])), flush=True)
    print("\n" + table(report))
    return int(not all(report["parts"][name]["passed"] for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
