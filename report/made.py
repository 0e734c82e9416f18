"""Collect what made a run and its page: versions, commit, date, machine, settings, seconds."""
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from model import command, fingerprint, load, read_json, require

SHIPPED = Path(__file__).parent.parent / "pretrained"  # a finished run, of seed 0
MODELS = ("base.safetensors", "reward.safetensors", "policy-happy.safetensors")


def commit(root: Path) -> str:
    """Name the commit of the code in `root`, or return "none" if that is no git repository."""
    describe = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always",
                "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=3,
                              errors="replace")
    except (OSError, subprocess.SubprocessError):  # no git, or a slow one
        return "none"
    return done.stdout.strip() or "none"


def processor() -> str:
    """Name the GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def is_shipped(base: str) -> bool:
    """Say whether a base model, known by its fingerprint, is the one in pretrained/."""
    path = SHIPPED / MODELS[0]
    return path.exists() and base == fingerprint(load(path, "git checkout pretrained")[0])


def made_by(out: Path, report: dict) -> dict:
    """Collect versions, and each stage's settings and seconds. report: what 05 wrote. 02's are
    in 02.json, those of 01, 03 and 04 in the headers of their models. Raises
    UserError if a final policy is not the one that 05 measured."""
    files = {"01_pretrain.py": "base", "03_reward_model.py": "reward", "04_ppo.py": "policy-happy",
             "04_ppo.py --target sad": "policy-sad"}
    stages, inputs = {"05_eval.py": report}, {}
    for script, model in files.items():
        path = out / f"{model}.safetensors"
        if path.exists():
            weights, _, header = load(path, script)
            rows = report.get(model.removeprefix("policy-"), [])  # of "happy" or "sad"
            require(not rows or rows[-1]["fingerprint"] == fingerprint(weights),
                    f"{path} is not the policy in {out}/report.json: run {command('05_eval.py')}")
            stages[script] = header
            for name, value in header.get("inputs", {}).items():
                inputs[f"{model} made from {name}"] = value
    if (out / "02.json").exists():
        stages["02_sample_label.py"] = read_json(out / "02.json", "02_sample_label.py",
                                                 lambda found: found["settings"].items())
    return {"versions": {"Python": platform.python_version(), "PyTorch": torch.__version__,
                         "NumPy": np.__version__, "system": platform.system(),
                         "processor": processor(), "threads": torch.get_num_threads(),
                         "commit": commit(Path(__file__).parent.parent),
                         "date": time.strftime("%Y-%m-%d")},
            "stages": {script: {"seconds": row.get("seconds", 0), "settings": row["settings"]}
                       for script, row in stages.items() if "settings" in row}, "inputs": inputs}
