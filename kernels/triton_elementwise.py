"""Squared ReLU and rotation in Triton, with gradients. Each number is read and written once.

    y = r^2, r = max(x, 0)                       dL/dx = 2 r g
    (a', b') = (a c + b s, b c - a s)            (da, db) = (ga c - gb s, gb c + ga s)

where (a, b) = (x_i, x_{i + Dh/2}) and c, s are the cosine and sine of the pair's angle. The
gradient turns the other way. In PyTorch squared ReLU takes 2 passes each way, rotation 3 or more.
"""
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable


@triton.jit
def squared_relu(x_ptr, g_ptr, y_ptr, n, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    r = tl.where(x < 0, 0.0, x)  # not tl.maximum: it hides a NaN
    y = 2 * r * tl.load(g_ptr + i, mask=i < n, other=0.0).to(tl.float32) if BACKWARD else r * r
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def rotate(x_ptr, cos_ptr, sin_ptr, y_ptr, rows, T, heads, x_n, x_h, SIGN: tl.constexpr,
           HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Turn BLOCK rows (n, h) by SIGN times their angle. Token n is at position n % T.
    x (N, heads, 2 HALF) by strides, cos and sin (T, 2 HALF) -> y (N, heads, 2 HALF)."""
    r, i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    mask = (r < rows)[:, None] & (i < HALF)[None, :]
    n, h = r // heads, r % heads
    x = x_ptr + (n.to(tl.int64) * x_n + h * x_h)[:, None] + i[None, :]
    angle = (n % T)[:, None] * 2 * HALF + i[None, :]
    y = y_ptr + (r.to(tl.int64) * 2 * HALF)[:, None] + i[None, :]
    a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32) * SIGN
    tl.store(y, (a * c + b * s).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y + HALF, (b * c - a * s).to(y_ptr.dtype.element_ty), mask=mask)


def turned(x, cos, sin, sign):
    (heads, Dh), y = x.shape[-2:], torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = x.reshape(-1, heads, Dh) if x.stride(-1) == 1 else x.contiguous().view(-1, heads, Dh)
    half, rows = Dh // 2, len(x) * heads
    rotate[triton.cdiv(rows, 32),](
        x, cos, sin, y, rows, cos.numel() // Dh, heads, *x.stride()[:2], SIGN=sign, HALF=half,
        BLOCK_D=triton.next_power_of_2(half), BLOCK=32, num_warps=4, enable_fp_fusion=True)
    return y


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return turned(g, *ctx.saved_tensors, -1), None, None


class SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y = torch.empty_like(x)
        squared_relu[triton.cdiv(x.numel(), 1024),](x, x, y, x.numel(), BACKWARD=False, BLOCK=1024)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, = ctx.saved_tensors
        dx = torch.empty_like(x)
        squared_relu[triton.cdiv(x.numel(), 1024),](
            x, g.contiguous(), dx, x.numel(), BACKWARD=True, BLOCK=1024)
        return dx
