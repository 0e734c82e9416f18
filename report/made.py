"""All that made a run: versions, commit, machine, settings, inputs, seconds."""
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from running import read_tensors


def commit(root: Path) -> str:
    """Of the code in the folder `root`, if that is a git repository of its own."""
    command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always",
               "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except OSError:  # no git
        return "none"
    return done.stdout.strip() or "none"


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def made_by(out: Path, stages: dict[str, dict]) -> dict:
    """stages: script -> its settings and seconds, as out/stages.json has them."""
    inputs = {}
    for model in ("base", "reward", "policy-happy", "policy-sad"):
        path = out / f"{model}.safetensors"
        header = read_tensors(path)[1] if path.exists() else {}
        for name, value in header.get("inputs", {}).items():
            inputs[f"{model} made from {name}"] = value
    return {"versions": {"Python": platform.python_version(), "PyTorch": torch.__version__,
                         "NumPy": np.__version__, "system": platform.system(),
                         "processor": processor(), "threads": torch.get_num_threads(),
                         "commit": commit(Path(__file__).parent.parent)},
            "stages": stages, "inputs": inputs}
