"""All experiments that have no result yet, one after the other.

    python -m experiments                # `make experiments`; a killed one goes on with the next
"""
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from experiments import ALL

for name in tqdm(ALL, desc="experiments"):
    if Path("out/experiments", f"{name}.json").exists():
        tqdm.write(f"{name}: there already")
    elif subprocess.run([sys.executable, "-m", f"experiments.{name}"]).returncode:
        sys.exit(2)
