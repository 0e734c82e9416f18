"""What the stages hand to one another: which models stem from which."""
import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model import GPT, load
from running.files import require


def load_base_and_reward(out: Path, device, dtype) -> tuple[GPT, GPT, Tokenizer, dict]:
    """-> base model, reward model, tokenizer, and the reward model's header, whose "inputs" now
    name both, with "base_metrics". Raises UserError if one is missing, or the second stems from
    another base model."""
    base, tokenizer, base_header = load(out / "base.safetensors", "01_pretrain.py", device, dtype)
    reward_model, _, about = load(out / "reward.safetensors", "03_reward_model.py", device, dtype)
    made_from = about.get("inputs", {}).get("base")
    require(made_from == fingerprint(base), f"{out}/reward.safetensors stems from another base "
            "model: run 02_sample_label.py and 03_reward_model.py again")
    about["inputs"] = {"base": made_from, "reward_model": fingerprint(reward_model)}
    about["base_metrics"] = base_header.get("metrics", {})
    return base, reward_model, tokenizer, about


def load_policies(out: Path, inputs: dict, device="cpu", dtype=torch.float32) -> dict[str, GPT]:
    """-> "happy" and, if there is one, "sad" -> final policy, those that stem from `inputs` (of
    `load_base_and_reward`). Raises UserError if the happy one is missing or does not."""
    policies = {}
    for target in ("happy", "sad"):
        path = out / f"policy-{target}.safetensors"
        if target == "happy" or path.exists():
            policy, _, header = load(path, "04_ppo.py", device, dtype)
            if header.get("inputs") == inputs:
                policies[target] = policy
    require("happy" in policies, f"{out}/policy-happy.safetensors stems from another base model or "
                                 "reward model: run 04_ppo.py again")
    return policies


def score_of(log_p: torch.Tensor, kind: str, target: str) -> torch.Tensor:
    """log_p (B, 2) of `GPT.sentiment` -> score (B,): log p(target) if the reward model learned from
    "labels"; if from "comparisons", log p(happy) - log p(sad), negated for sad, of which only
    differences mean anything."""
    i = ("happy", "sad").index(target)
    return log_p[:, i] if kind == "labels" else log_p[:, i] - log_p[:, 1 - i]


def fingerprint(model: GPT) -> str:
    """Which weights these are: 16 hex digits of a SHA-256. Of a loaded model: `save` rounds."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().numpy(force=True).tobytes())
    return digest.hexdigest()[:16]
