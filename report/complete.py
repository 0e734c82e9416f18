"""Print completions of a prompt by any checkpoint:

    python -m report.complete out/policy-happy.safetensors --prompt "ROMEO:" -n 3
"""
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tokenizers import Tokenizer
from tyro.conf import Positional, arg

from model import fast_dtype, load, program, require, steady


def encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the prompt's tokens. Raises UserError if a terminal with another encoding has garbled
    the prompt."""
    valid = prompt.encode(errors="ignore").decode() == prompt
    require(valid, "the prompt is not UTF-8: the terminal uses another encoding")
    return tokenizer.encode(prompt).ids


def complete(checkpoint: Positional[Path], prompt: str = "", length: int = 64, seed: int = 0,
             n: Annotated[int, arg(aliases=["-n"])] = 1) -> None:
    """Print n completions of the prompt, `length` tokens each. The same seed gives all checkpoints
    the same random numbers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, _ = load(checkpoint, "the script that writes it", device, fast_dtype(device))
    ids = torch.tensor([encoded(tokenizer, prompt)] * n)                     # (n, P)
    require(n > 0 and length > 0, "-n and --length must be positive")
    room = model.config.context - ids.size(1)
    require(room > 0, f"the prompt has {ids.size(1)} tokens, too many for this model: shorten it")
    require(length <= room, f"the model has learned {model.config.context} tokens: --length {room} "
                            "or less for this prompt")
    y, _ = model.generate(n, length, seed, prompts=ids.long())
    for text in tokenizer.decode_batch(y.tolist()):
        print(f"{prompt}{text}\n")


if __name__ == "__main__":
    steady()
    tyro.cli(complete, prog=program())
