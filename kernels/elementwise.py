"""Squared ReLU and rotary rotation, each in one pass where PyTorch would need several.

    y = max(x, 0)^2                dy/dx = 2 max(x, 0)        (So et al. 2021, arXiv:2109.08668)
    y = R(angle) x, pair by pair   dL/dx = R(-angle) dL/dy    (Su et al. 2021, arXiv:2104.09864)

On a GPU each is one kernel each way (triton_elementwise.py) and keeps only its inputs.
"""
import torch
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton


class SquaredReLU(torch.autograd.Function):
    """Keeps one tensor, max(x, 0). Autograd would keep two and be slower on a CPU."""

    @staticmethod
    def forward(ctx, x):
        r = x.relu()
        ctx.save_for_backward(r)
        return r.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        r, = ctx.saved_tensors
        return (grad * r).mul_(2)


def squared_relu(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """x of any shape -> max(x, 0)^2. Differentiable."""
    if use_triton(backend, x, "elementwise"):
        from kernels.triton_elementwise import SquaredReLU as Fused
        with torch.cuda.device_of(x):
            return Fused.apply(x)
    return SquaredReLU.apply(x)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
           backend: str = "auto") -> torch.Tensor:
    """Rotary positions: turn each pair (x_i, x_{i + Dh/2}) by position * frequency_i. Then the dot
    product of two rotated vectors depends only on how far apart their positions are.
    x (..., T, heads, Dh), or (B, heads, Dh) at one position; cos, sin (T, 1, Dh) or (1, Dh), with
    the second half of sin negated. Differentiable in x. Raises ValueError if shapes do not fit."""
    positions = (x.size(-3), 1) if cos.dim() == 3 else (1,)
    if cos.shape != sin.shape or cos.shape != (*positions, x.size(-1)) or x.size(-1) % 2:
        raise ValueError(f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do "
                         "not fit")
    if use_triton(backend, x, "elementwise"):
        from kernels.triton_elementwise import Rotate
        with torch.cuda.device_of(x):
            return Rotate.apply(x, cos, sin)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)
