"""Run all experiments without a result yet, each on one core, as many at once as there are cores.

    python -m experiments                # or `make experiments`; after a kill, run it again
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from experiments import ALL
from model import one_line

sys.excepthook = one_line
out = Path("out/experiments")
out.mkdir(parents=True, exist_ok=True)
at_once = 1 if torch.cuda.is_available() else os.cpu_count()
todo = [name for name in ALL if not (out / f"{name}.json").exists()]
running, failed = {}, []
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so `kill`, too, reaches `finally`

try:
    with tqdm(total=len(ALL), initial=len(ALL) - len(todo), desc="experiments") as bar:
        while todo or running:
            if todo and len(running) < at_once:
                name = todo.pop(0)
                with (out / f"{name}.log").open("w") as log:
                    running[name] = subprocess.Popen(
                        [sys.executable, "-m", f"experiments.{name}"], stdout=log, stderr=log,
                        env=os.environ | {"OMP_NUM_THREADS": "1"})
                continue
            time.sleep(0.5)
            for name in [name for name, child in running.items() if child.poll() is not None]:
                if running.pop(name).returncode:
                    failed.append(name)
                bar.write(f"{name}: see {out / name}.log")
                bar.update()
finally:
    for child in running.values():
        child.terminate()
        child.wait()
for name in failed:
    last = (out / f"{name}.log").read_text().strip().splitlines()[-1:]
    print(f"{name} failed:", *last, file=sys.stderr)
sys.exit(2 if failed else 0)
