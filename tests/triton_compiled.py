"""Checks the compiled form of the kernels, in bf16, without a GPU. tests/test_triton.py runs it.

`ttsem` executes on a CPU what Triton compiles for an H100 or H200 (sm_90), and rounds as bf16 does.
It fills memory that nobody wrote with NaN. It reports accesses out of bounds, and two programs that
touch the same element, with the line of the kernel. It cannot show what LLVM and ptxas make of the
code, or how fast it is.

The rule is FlashAttention's: plain PyTorch in bf16 has some error against float64, and the kernel
may have at most twice that error. Heads, widths and lengths are the scripts' defaults on a GPU and
on a CPU, plus an odd one each. At the end, the checks must catch kernels broken on purpose.
"""
import math

import pytest
import torch

from benchmarks.kernels import eager_attention, eager_logprob
from kernels import (
    decode_attention,
    rotate,
    triton_attention,
    triton_elementwise,
    triton_head,
)
from tests.triton_values import (
    attention64,
    broken,
    draw,
    error,
    logprob64,
    randn,
    random_angles,
    sample_numpy,
)

BF16 = torch.bfloat16


def no_worse(ours, eager, exact) -> None:
    assert error(ours, exact) <= 2 * error(eager, exact) + 1e-5


# ---- Attention -----------------------------------------------------------------------------------
def check_attention(B, T, H, Hkv, Dh, kernels=triton_attention):
    projection = randn(B, T, H + 2 * Hkv, Dh, dtype=BF16, seed=T).requires_grad_()
    upstream = randn(B, T, H * Dh, dtype=BF16, seed=1)
    outs = [f(*projection.split([H, Hkv, Hkv], dim=2))
            for f in (kernels.Attention.apply, eager_attention, attention64)]
    grads = [torch.autograd.grad(out, projection, upstream.to(out.dtype))[0] for out in outs]
    no_worse(*outs)
    no_worse(*grads)


@pytest.mark.parametrize("T", [64, 65, 128])
@pytest.mark.parametrize("H, Hkv", [(6, 1), (3, 1)])
def test_attention_of_the_presets(T, H, Hkv):
    """04 trains at T 64, 03 at 65, 01 at 128."""
    check_attention(1, T, H, Hkv, 64)


@pytest.mark.parametrize("B, T, H, Hkv, Dh", [(2, 17, 4, 2, 24), (1, 150, 2, 2, 32)])
def test_attention_of_odd_shapes(B, T, H, Hkv, Dh):
    check_attention(B, T, H, Hkv, Dh)


def check_decode(H, Hkv, Dh, kernels=triton_attention):
    """At some positions. Slots not yet filled hold NaN."""
    B, T = 2, 66
    q, k, v = (randn(B, T, n, Dh, dtype=BF16, seed=n + i) for i, n in enumerate((H, Hkv, Hkv)))
    angles = random_angles(T, Dh, BF16)
    turned = [rotate(x, *angles, backend="torch") for x in (q, k)]
    exact, caches = attention64(*turned, v), []
    for x in (turned[1], v):
        caches.append(torch.full((B, Hkv, T + 2, Dh), math.nan, dtype=BF16, device=q.device))
        caches[-1][:, :, :T] = x.transpose(1, 2)
    for t in (0, 1, 63, 64, T - 1):
        pos = torch.tensor(t, device=q.device)
        to_come = torch.arange(t, T, device=q.device)
        empty = [cache.index_fill(2, to_come, math.nan) for cache in caches]
        ours = kernels.decode_attention(q[:, t], k[:, t], v[:, t], *empty, pos, angles)
        assert error(empty[0][:, :, t], caches[0][:, :, t]) < 1e-2
        assert torch.equal(empty[1][:, :, t], caches[1][:, :, t])
        assert all(cache[:, :, t + 1:].isnan().all() for cache in empty)
        eager = decode_attention(q[:, t], k[:, t], v[:, t],
                                 *(cache[:, :, :T].clone() for cache in caches), t, angles,
                                 backend="torch")
        no_worse(ours, eager, exact[:, t])


@pytest.mark.parametrize("H, Hkv, Dh", [(6, 1, 64), (3, 1, 64), (4, 2, 24)])
def test_decode(H, Hkv, Dh):
    check_decode(H, Hkv, Dh)


# ---- The head ------------------------------------------------------------------------------------
def check_logprob(N, D, V, kernels=triton_head):
    hidden, weight = (randn(n, D, dtype=BF16, seed=n, scale=s).requires_grad_()
                      for n, s in ((N, 1.0), (V, 2 / math.sqrt(D))))
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0)).to(hidden.device)
    outs = [f(hidden, weight, target) for f in (kernels.linear_logprob, eager_logprob, logprob64)]
    g = randn(N, seed=1)
    grads = [torch.autograd.grad((logp * g).sum(), (hidden, weight)) for logp in outs]
    for each in (outs, *zip(*grads)):
        no_worse(*each)


@pytest.mark.parametrize("N, D, V", [(70, 384, 1021), (70, 192, 1021), (33, 40, 129)])
def test_log_prob_and_both_gradients(N, D, V):
    check_logprob(N, D, V)


def check_tokens(B, D, V, kernels=triton_head):
    """The same tokens as the NumPy reference in float64; up to 1% may differ by rounding."""
    hidden, weight = (randn(n, D, dtype=BF16, seed=n, scale=s)
                      for n, s in ((B, 1.0), (V, D**-0.5)))
    rows = torch.arange(B)
    token, logp = draw(hidden, weight, 3, rows, 5, kernels)
    logits = (hidden.double() @ weight.double().T).cpu().numpy()
    assert (token.cpu().numpy() == sample_numpy(logits, 3, rows.numpy(), 5)).mean() >= 0.99
    assert error(logp, logprob64(hidden, weight, token)) < 1e-5


@pytest.mark.parametrize("B, D, V", [(128, 384, 1021), (128, 192, 1021), (100, 40, 65)])
def test_tokens(B, D, V):
    check_tokens(B, D, V)


# ---- Squared ReLU and rotation -------------------------------------------------------------------
def check_elementwise(B, T, heads, Dh, kernels=triton_elementwise):
    projection = randn(B, T, heads + 2, Dh, dtype=BF16).requires_grad_()
    x, upstream = projection[:, :, :heads], randn(B, T, heads, Dh, dtype=BF16, seed=1)
    cos, sin = random_angles(T, Dh, BF16)

    def turned(x, cos, sin):
        a, b = x.split(Dh // 2, -1)
        return x * cos + torch.cat((b, a), -1) * sin
    for ours, plain, more in ((kernels.Rotate.apply, turned, (cos, sin)),
                              (kernels.SquaredReLU.apply, lambda x: x.relu().square(), ())):
        outs = [ours(x, *more), plain(x, *more), plain(x.double(), *(y.double() for y in more))]
        no_worse(*outs)
        no_worse(*(torch.autograd.grad(out, projection, upstream.to(out.dtype))[0] for out in outs))


@pytest.mark.parametrize("B, T, heads, Dh", [(2, 64, 6, 64), (3, 5, 7, 24)])
def test_squared_relu_and_rotation(B, T, heads, Dh):
    check_elementwise(B, T, heads, Dh)


# ---- Broken on purpose ---------------------------------------------------------------------------
PLANTED = {
    "a mask off by one": (
        triton_attention, "rows[:, None] >= cols[None, :]", "rows[:, None] >= cols[None, :] - 1",
        lambda kernels: check_attention(1, 64, 3, 1, 64, kernels), "AssertionError", ""),
    "a store without its mask": (
        triton_attention, "mask = (rows < end)[:, None]", "mask = (rows < end + 999)[:, None]",
        lambda kernels: check_attention(1, 65, 3, 1, 64, kernels), "KernelFault", "past the end"),
    "two programs write one tile": (
        triton_elementwise, "tl.store(y_ptr + i,", "tl.store(y_ptr + i % BLOCK,",
        lambda kernels: check_elementwise(2, 64, 6, 64, kernels), "KernelFault", "program"),
    "a wrong token": (
        triton_head, "cdf > (uniform(u0) * total)", "cdf > (uniform(u0))",
        lambda kernels: check_tokens(128, 192, 1021, kernels), "AssertionError", ""),
    "an angle of the wrong position": (
        triton_attention, "cos_ptr += pos * Dh", "cos_ptr += pos",
        lambda kernels: check_decode(6, 1, 64, kernels), "AssertionError", "")}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_caught(planted, tmp_path):
    module, old, new, check, kind, told = PLANTED[planted]
    with pytest.raises((AssertionError, Exception)) as caught:  # ttsem runs as __main__
        check(broken(module, old, new, tmp_path))
    assert caught.type.__name__ == kind and told in str(caught.value)
