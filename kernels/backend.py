"""Which implementation a call gets."""
import os
from functools import lru_cache
from importlib.util import find_spec

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@lru_cache(maxsize=1)
def has_triton() -> bool:
    return find_spec("triton") is not None


def use_triton(backend: str, x: torch.Tensor) -> bool:
    """backend "auto": Triton for 16 and 32-bit floats on a GPU where Triton is installed, PyTorch
    elsewhere. "triton" and "torch" insist. TRITON_INTERPRET=1, set before Triton is imported, makes
    "triton" work on CPU tensors, slowly: for tests. Raises ValueError if that cannot be."""
    if backend == "auto":
        return x.is_cuda and x.dtype in FLOATS and has_triton()
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend {backend!r}: "auto", "triton" or "torch"')
    runs = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and not (has_triton() and runs):
        raise ValueError(
            'backend "triton" needs Triton and tensors on a GPU, or TRITON_INTERPRET=1')
    return backend == "triton"
