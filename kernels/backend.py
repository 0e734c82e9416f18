"""Choose between Triton and PyTorch for each call."""
import os
from functools import lru_cache
from importlib.util import find_spec

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FAMILIES = ("attention", "logprob", "sample", "decoder", "elementwise")


@lru_cache(maxsize=1)
def has_triton() -> bool:
    return find_spec("triton") is not None


@lru_cache
def has_bf16(device: torch.device) -> bool:
    """Whether this GPU multiplies bf16, as NVIDIA's do since Ampere. Triton refuses bf16 on older
    ones, so these get PyTorch in float32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def sent_to_torch() -> set[str]:
    """The kernel families that run PyTorch on a GPU, in case a kernel fails there. They come from
    the environment variable TORCH_KERNELS ("attention,sample", or "all"). Raises ValueError for any
    other name."""
    named = {name for name in os.environ.get("TORCH_KERNELS", "").split(",") if name}
    named = {*FAMILIES} if "all" in named else named
    if not named <= {*FAMILIES}:
        raise ValueError(f"TORCH_KERNELS={os.environ['TORCH_KERNELS']}: a list of "
                         f"{', '.join(FAMILIES)}, or all")
    return named


def live_path(device: torch.device) -> str:
    """Say in words which implementation calls get on this device."""
    if device.type == "cuda" and not has_bf16(device):
        return "PyTorch in float32: this GPU is older than Ampere"
    if device.type != "cuda" or not has_triton():
        return "PyTorch"
    on_torch = ", ".join(sorted(sent_to_torch()))
    return "Triton" + (f", PyTorch for {on_torch}" if on_torch else "")


def use_triton(backend: str, x: torch.Tensor, family: str) -> bool:
    """Whether a call runs Triton. "auto" picks it for 16 and 32-bit floats on a GPU, if Triton is
    installed and the family is not sent to PyTorch. "triton" and "torch" force the choice. For
    tests, set TRITON_INTERPRET=1 before Triton is imported: then "triton" runs on CPU tensors,
    slowly. Raises ValueError if the chosen backend cannot run."""
    if backend == "auto":
        on_gpu = has_bf16(x.device) and x.dtype in FLOATS and has_triton()
        return on_gpu and family not in sent_to_torch()
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend {backend!r}: "auto", "triton" or "torch"')
    runs = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and not (has_triton() and runs):
        raise ValueError(
            'backend "triton" needs Triton and tensors on a GPU, or TRITON_INTERPRET=1')
    return backend == "triton"
