"""Words, prompts as rows of token ids, and the lines of a label file."""
import json
import re
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from running.files import require


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:['’][a-z]+)*", text.lower())


def texts_of(item: dict) -> list[str]:
    """The text of an item, or both of a comparison."""
    return [item["text"]] if isinstance(item["text"], str) else item["text"]


def sides(rows: list[dict]) -> tuple[list[list[int]], list[str]]:
    """The tokens and the text of each row, and of a comparison those of both its sides."""
    tokens, texts = [], []
    for row in rows:
        tokens += [row["tokens"]] if isinstance(row["text"], str) else row["tokens"]
        texts += texts_of(row)
    return tokens, texts


def parse_labels(lines: list[str]) -> list[dict] | None:
    """JSON lines of a label file -> rows; None if one of them, any, is broken. All are looked at as
    columns: row by row that takes several times as long."""
    try:
        rows = [json.loads(line) for line in lines]
        names = [row[column] for column in ("id", "label", "labeller", "source") for row in rows]
        names += [row["prompt"] for row in rows if "prompt" in row]
        pairs = [row for row in rows if not isinstance(row["text"], str)]
        two = all(len(row["text"]) == len(row["tokens"]) == 2 for row in pairs)
        tokens, texts = sides(rows)
        ids = [*chain.from_iterable(tokens)]
    except (ValueError, TypeError, KeyError):
        return None
    strings = {*map(type, names), *map(type, texts)} <= {str}
    right = all(tokens) and {*map(type, ids)} <= {int} and min(ids, default=0) >= 0
    return rows if strings and two and right else None


def read_prompts(path: Path, part: str) -> torch.Tensor:
    """Prompts that 02 --prompts found in the "train" or "held_out" part of the corpus -> (n, P)."""
    require(path.exists(), f"{path} is missing: run 02_sample_label.py --prompts first")
    return pad(json.loads(path.read_text())[part])


def pad(prompts: list[list[int]]) -> torch.Tensor:
    """Prompts of several lengths -> (n, P), padded with -1 at the end."""
    longest = max(map(len, prompts))
    rows = np.array([row + [-1] * (longest - len(row)) for row in prompts], dtype=np.int64)
    return torch.from_numpy(rows)  # torch.tensor takes as long for empty rows as for full ones


def draw_prompts(prompts: torch.Tensor | None, n: int, seed: int) -> torch.Tensor:
    """n rows of prompts at random, with replacement; (n, 0) if there are none."""
    if prompts is None:
        return torch.empty(n, 0, dtype=torch.long)
    return prompts[torch.randint(len(prompts), (n,), generator=torch.Generator().manual_seed(seed))]


def decode_prompts(tokenizer: Tokenizer, prompts: torch.Tensor) -> list[str]:
    return tokenizer.decode_batch([[t for t in row if t >= 0] for row in prompts.tolist()])
