"""Words, and prompts as rows of token ids."""
import json
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer

from running.files import require


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:['’][a-z]+)*", text.lower())


def texts_of(item: dict) -> list[str]:
    """The text of an item, or both of a comparison."""
    return [item["text"]] if isinstance(item["text"], str) else item["text"]


def read_prompts(path: Path, part: str) -> torch.Tensor:
    """Prompts that 02 --prompts found in the "train" or "held_out" part of the corpus -> (n, P)."""
    require(path.exists(), f"{path} is missing: run 02_sample_label.py --prompts first")
    return pad(json.loads(path.read_text())[part])


def pad(prompts: list[list[int]]) -> torch.Tensor:
    """Prompts of several lengths -> (n, P), padded with -1 at the end."""
    longest = max(map(len, prompts))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in prompts], dtype=torch.long)


def draw_prompts(prompts: torch.Tensor | None, n: int, seed: int) -> torch.Tensor:
    """n rows of prompts at random, with replacement; (n, 0) if there are none."""
    if prompts is None:
        return torch.empty(n, 0, dtype=torch.long)
    return prompts[torch.randint(len(prompts), (n,), generator=torch.Generator().manual_seed(seed))]


def decode_prompts(tokenizer: Tokenizer, prompts: torch.Tensor) -> list[str]:
    return tokenizer.decode_batch([[t for t in row if t >= 0] for row in prompts.tolist()])
