"""Checks the Triton kernels against independent float64 computations. tests/test_triton.py runs
this file: on a GPU if there is one, else in Triton's interpreter on the CPU (TRITON_INTERPRET=1).

The interpreter computes fp16, fp32 and fp64 faithfully, but not bf16. It cannot show races, or
problems with registers and shared memory: those need `tests.compile_only` and a GPU.

Negative controls break a kernel on purpose. The same check must catch it, or the check is blind.
"""
import importlib
import importlib.util
import itertools
import math
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import eager_attention, eager_logprob
from kernels import (
    attention,
    decode_attention,
    linear_logprob,
    rotate,
    sample,
    triton_attention,
    triton_elementwise,
    triton_head,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of error(), below
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def error(x, exact):
    """Relative error in the Frobenius norm. Any error is huge if the exact value is 0."""
    exact = exact.double()
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


@pytest.fixture(autouse=True)
def check_fences(monkeypatch):
    """Fill every buffer that a launcher allocates with NaN (or a huge integer) and put a fence on
    either side. This shows elements that no program writes, and writes outside the buffer."""
    fences = []

    def fenced(*shape, dtype=None, device=None):
        dtype = dtype or torch.float32
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        n, value = math.prod(shape), float("nan") if dtype.is_floating_point else 2**30
        whole = torch.full((n + 256,), value, dtype=dtype, device=device)
        whole[:128], whole[128 + n:] = 77, 77
        fences.append((whole, n))
        return whole[128:128 + n].view(shape)

    def check():
        intact = [(whole[:128] == 77).all() and (whole[128 + n:] == 77).all()
                  for whole, n in fences]
        fences.clear()
        assert all(intact), "written outside of a buffer"
    monkeypatch.setattr(torch, "empty", fenced)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: fenced(*x.shape, dtype=x.dtype, device=x.device))
    yield check
    check()


def random_angles(T, Dh, dtype):
    """cos and sin (T, 1, Dh) of random angles, the second half of sin negated."""
    angle = randn(T, 1, Dh // 2, seed=9)
    return tuple(torch.cat((a, sign * a), -1).to(dtype)
                 for a, sign in ((angle.cos(), 1), (angle.sin(), -1)))


def surrounded(x):
    """A copy of x with NaN before and after it, so that an unmasked read poisons the result."""
    whole = torch.full((x.numel() + 512,), float("nan"), dtype=x.dtype, device=x.device)
    whole[256:256 + x.numel()] = x.flatten()
    return whole[256:256 + x.numel()].view(x.shape)


# ---- Attention -----------------------------------------------------------------------------------
def attention64(q, k, v):
    """Softmax of float64 scores, with every key and value repeated for its group."""
    q, k, v = (x.double() for x in (q, k, v))
    T, group = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.size(3))
    s = s.masked_fill(
        torch.arange(T, device=s.device)[:, None] < torch.arange(T, device=s.device), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v).flatten(2)


def check_attention(B, T, H, Hkv, Dh, dtype=torch.float32, tile=None, kernels=triton_attention):
    """Forward and all gradients of strided views of one projection, with a random upstream one."""
    projection = surrounded(randn(B, T, H + 2 * Hkv, Dh, dtype=dtype, seed=T + Dh)).requires_grad_()
    q, k, v = projection.split([H, Hkv, Hkv], dim=2)
    upstream = randn(B, T, H * Dh, dtype=dtype, seed=1)
    # the interpreter has no registers to spill, so fp32 takes the GPU's tile for 16-bit types there
    tile = tile or kernels.backward_config(Dh, torch.float16 if INTERPRETED else dtype)
    with patch.object(kernels, "backward_config", lambda *_: tile):
        out = kernels.Attention.apply(q, k, v)
        grad, = torch.autograd.grad(out, projection, upstream)
    exact = attention64(q, k, v)
    exact_grad, = torch.autograd.grad(exact, projection, upstream.double())
    assert error(out, exact) < LIMIT[dtype] and error(grad, exact_grad) < 2 * LIMIT[dtype]


TIMES = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256]
HEADS = [(1, 1), (2, 2), (2, 1), (3, 1), (4, 2), (6, 1)]
WIDTHS = [16, 24, 32, 40, 48, 64, 80, 96, 128]


@pytest.mark.parametrize("case", range(17))
def test_attention_equals_float64(case):
    """A seeded table: every T, each with some head count, width and dtype."""
    rng = np.random.default_rng(case)
    H, Hkv = HEADS[rng.integers(len(HEADS))]
    Dh, dtype = WIDTHS[rng.integers(len(WIDTHS))], (torch.float32, torch.float16)[case // 2 % 2]
    check_attention(1 + case % 2 * (TIMES[case] < 128), TIMES[case], H, Hkv, Dh, dtype)


@pytest.mark.parametrize("tile", [(16, 4), (32, 4), (64, 4)])
@pytest.mark.parametrize("T", [1, 17, 64])
def test_any_tile_at_any_length(T, tile):
    check_attention(2, T, 4, 2, 24, torch.float32 if INTERPRETED else torch.float16, tile=tile)


@pytest.mark.skipif(not INTERPRETED, reason="float64 accumulators exist in the interpreter alone")
def test_attention_gradcheck(monkeypatch):
    monkeypatch.setattr(triton_attention, "backward_config", lambda *_: (16, 4))
    packed = randn(1, 18, 3, 2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(*x.unbind(2), backend="triton"), packed,
                                    fast_mode=True)
    q, k, v = (randn(1, 3, H, 3, dtype=torch.float64, seed=i).requires_grad_()
               for i, H in enumerate((2, 1, 1)))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, backend="triton"), (q, k, v))


@pytest.mark.parametrize("T, j", [(37, 16), (100, 64), (130, 65)])
def test_attention_never_looks_ahead(T, j):
    q, k, v = (randn(1, T, 2, 32, seed=i) for i in range(3))
    before = attention(q, k, v, backend="triton")
    k[:, j:], v[:, j:] = 9, 9
    after = attention(q, k, v, backend="triton")
    assert torch.equal(before[:, :j], after[:, :j]) and not torch.equal(before[:, j], after[:, j])


def test_a_sequence_does_not_depend_on_its_batch():
    q, k, v = (randn(5, 70, 2, 32, seed=i) for i in range(3))
    whole = attention(q, k, v, backend="triton")
    alone = attention(q[3:4], k[3:4], v[3:4], backend="triton")
    assert torch.equal(whole[3:4], alone)


def test_attention_of_extreme_scores_and_of_nothing():
    q, k, v = (randn(1, 20, 1, 16, seed=i, scale=s) for i, s in enumerate((100.0, 100.0, 1.0)))
    assert error(attention(q, k, v, backend="triton"), attention64(q, k, v)) < 1e-5
    for B, T in ((0, 8), (2, 0)):
        empty = randn(B, T, 3, 2, 16).requires_grad_()
        out = attention(*empty.unbind(2), backend="triton")
        out.sum().backward()
        assert out.shape == (B, T, 32) and empty.grad.shape == empty.shape


@pytest.mark.parametrize("H, Hkv, Dh", [(1, 1, 16), (6, 1, 32), (4, 2, 24), (3, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_step_equals_row_of_prefill(H, Hkv, Dh, dtype):
    """Unfilled slots hold NaN, so reading one shows. Slots other than pos must not change. The step
    rotates queries and keys itself; for the prefill they are rotated beforehand."""
    B, T = 3, 67
    q, k, v = (randn(B, T, n, Dh, dtype=dtype, seed=n + i) for i, n in enumerate((H, Hkv, Hkv)))
    angles = random_angles(T, Dh, dtype)
    turned = [rotate(x, *angles, backend="torch") for x in (q, k)]
    exact = attention64(*turned, v)
    caches = [torch.full((B, Hkv, T + 2, Dh), float("nan"), dtype=dtype, device=DEVICE)
              for _ in range(2)]
    for cache, x in zip(caches, (turned[1], v)):
        cache[:, :, :63] = x[:, :63].transpose(1, 2)
    for t in itertools.chain(range(3), range(63, T)):  # the first steps, and across a tile's edge
        pos = torch.tensor(t, device=DEVICE)
        row = decode_attention(q[:, t], k[:, t], v[:, t], *caches, pos, angles, backend="triton")
        assert error(row, exact[:, t]) < LIMIT[dtype]
        assert error(caches[0][:, :, t], turned[1][:, t]) < LIMIT[dtype]
    assert caches[0][:, :, T:].isnan().all()
    assert torch.equal(caches[1][:, :, :T], v.transpose(1, 2)) and caches[1][:, :, T:].isnan().all()


# ---- Log-prob ------------------------------------------------------------------------------------
def logprob64(hidden, weight, target):
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    return log_p.gather(-1, target.clamp_min(0)[..., None])[..., 0] * (target >= 0)


@pytest.fixture
def products_round_alike(monkeypatch):
    """On some CPUs, NumPy in the interpreter rounds a row by its place in the tile: replace it."""
    monkeypatch.setattr(
        np, "matmul", lambda a, b, **kw: np.einsum("...ij,...jk->...ik", a, b, **kw))


def check_logprob(N, D, V, scale=2.0, dtype=torch.float32, kernels=triton_head, config=None):
    """Takes targets at the edges of tiles, ignored targets, and a random upstream gradient. Logits
    have this standard deviation. Columns of dlogits beyond V must be exactly 0."""
    products = []

    def mm(a, b, out, mm=torch.mm):
        products.append((a[:, V:] == 0).all() if b.is_contiguous() else True)  # dlogits W only
        return mm(a, b, out=out)
    hidden = surrounded(randn(N, D, dtype=dtype)).requires_grad_()
    weight = surrounded(randn(V, D, dtype=dtype, seed=1, scale=scale / math.sqrt(D)))
    weight.requires_grad_()
    edges = torch.tensor([0, 63, 64, 127, 128, V - 1, -1, V - 2])
    target = edges[torch.randint(len(edges), (N,), generator=torch.Generator().manual_seed(0))]
    target = target.clamp_max(V - 1).to(DEVICE)
    config = config or kernels.config(D, torch.float16 if INTERPRETED else dtype)  # as in attention
    with patch.object(kernels, "config", lambda *_: dict(config)), patch.object(torch, "mm", mm):
        logp = kernels.linear_logprob(hidden, weight, target)
        g = randn(N, seed=1)
        grads = torch.autograd.grad((logp * g).sum(), (hidden, weight))
    exact_logp = logprob64(hidden, weight, target)
    exact = torch.autograd.grad((exact_logp * g).sum(), (hidden, weight))
    assert error(logp, exact_logp) < LIMIT[dtype] and logp.max() <= 1e-6
    assert all(error(a, b) < 4 * LIMIT[dtype] for a, b in zip(grads, exact))
    assert products and all(products)


@pytest.mark.parametrize("case", range(24))
def test_linear_logprob_equals_float64(case):
    rng = np.random.default_rng(case)
    V = [65, 127, 128, 129, 257, 1000][case % 6]
    D = [16, 24, 32, 64, 100, 192, 256, 384, 400, 520][rng.integers(10)]
    N, scale = [1, 15, 17, 129, 128][rng.integers(5)], [0.2, 0.7, 2.0, 4.0][rng.integers(4)]
    narrow = not INTERPRETED or case % 4 == 3 and D <= 384
    dtype = torch.float16 if narrow and scale <= 2 else torch.float32
    check_logprob(N, D, V, scale, dtype)


@pytest.mark.parametrize("V", [2048, 4093, 8193])
def test_linear_logprob_of_real_vocabularies(V):
    check_logprob(5, 32, V)


@pytest.mark.parametrize("D", [30, 256, 520])
def test_the_configuration_of_float32(D):
    check_logprob(38, D, 129, config=triton_head.config(D, torch.float32))


def test_backward_in_chunks(monkeypatch):
    """More rows than one chunk holds, to test the launcher's chunk arithmetic and int64 offsets."""
    monkeypatch.setattr(triton_head, "max",
                        lambda a, b: 24 if a == triton_head.CHUNK else max(a, b), raising=False)
    check_logprob(70, 32, 129)
    check_logprob(70, 520, 129)


@pytest.mark.parametrize("dtype, D, scale", [(torch.float32, 192, 4.0), (torch.float32, 192, 12.0),
                                             (torch.float16, 384, 8.0)])
def test_gradients_are_as_exact_as_eager_where_logits_are_large(dtype, D, scale):
    """At most three times the error of plain PyTorch. Guards against an LSE of other logits than
    the gradient's: different rounding costs nearly a digit where p is near 1."""
    hidden, weight = (randn(130, D, dtype=dtype, seed=i, scale=s).requires_grad_()
                      for i, s in enumerate((1.0, scale / math.sqrt(D))))
    target = torch.randint(130, (130,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    g = randn(130, seed=2)
    config = triton_head.config(D, torch.float16 if INTERPRETED else dtype)  # as in check_attention
    with patch.object(triton_head, "config", lambda *_: dict(config)):
        grads = [torch.autograd.grad((f(hidden, weight, target) * g).sum(), (hidden, weight))
                 for f in (triton_head.linear_logprob, eager_logprob, logprob64)]
    assert all(error(a, exact) <= 3 * error(b, exact) for a, b, exact in zip(*grads))


@pytest.mark.skipif(not INTERPRETED, reason="float64 accumulators exist in the interpreter alone")
@pytest.mark.parametrize("D0", [0, 16])
def test_linear_logprob_gradcheck(D0, monkeypatch):
    """Of hidden and weight, with an ignored target."""
    config = dict(D0=D0, D1=0, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_warps=4, num_stages=1)
    monkeypatch.setattr(triton_head, "config", lambda *_: dict(config))
    hidden, weight = (randn(n, 4, dtype=torch.float64, seed=n).requires_grad_() for n in (7, 21))
    target = torch.tensor([0, 4, 20, -1, 16, 15, 3])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, target, backend="triton"), (hidden, weight),
        fast_mode=True)


def test_probabilities_sum_to_one_and_gradients_of_logits_to_zero():
    V, D = 65, 32
    hidden, weight = randn(1, D).requires_grad_(), randn(V, D, seed=1)
    targets = torch.arange(V, device=DEVICE)
    logp = linear_logprob(hidden.expand(V, D), weight, targets, backend="triton")
    assert abs(logp.exp().sum().item() - 1) < 1e-5
    # a constant added to every logit changes nothing: the gradient along W = 1 must vanish
    ones = torch.cat((weight[:, :-1], torch.ones(V, 1, device=DEVICE)), 1)
    logp = linear_logprob(hidden, ones, targets[:1], backend="triton")
    grad, = torch.autograd.grad(logp.sum(), hidden)
    assert grad[0, -1].abs() < 1e-5 < grad[0, 0].abs()


def test_extreme_and_equal_logits():
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]], device=DEVICE)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 9.0]], device=DEVICE)
    logp = linear_logprob(hidden, weight, torch.tensor([0, 1, 2], device=DEVICE), backend="triton")
    assert (logp - torch.tensor([0, 0, -math.log(3)], device=DEVICE)).abs().max() < 1e-6


def test_a_row_does_not_depend_on_its_batch(products_round_alike):
    hidden, weight = randn(300, 64), randn(257, 64, seed=1)
    target = torch.arange(300, device=DEVICE) % 257
    whole = linear_logprob(hidden, weight, target, backend="triton")
    alone = linear_logprob(hidden[130:131], weight, target[130:131], backend="triton")
    assert torch.equal(whole[130:131], alone)


def test_targets_out_of_range_are_loud_and_no_rows_are_fine():
    hidden, weight = randn(3, 16), randn(65, 16, seed=1)
    logp = linear_logprob(hidden, weight, torch.tensor([65, -2, 3], device=DEVICE),
                          backend="triton")
    assert logp.isnan().tolist() == [True, True, False]
    none = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert linear_logprob(hidden[:0], weight, none, backend="triton").shape == (0,)


# ---- Sampling ------------------------------------------------------------------------------------
def philox_numpy(seed, row, step, stream):
    """Philox4x32-10 (Salmon et al. 2011) on arrays of rows -> four words each, uint64."""
    c = [row.astype(np.uint64), *(np.full(row.shape, x, np.uint64) for x in (step, stream, 0))]
    k0, k1, low = seed & 0xFFFFFFFF, seed >> 32, np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), p1 & low,
             (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def sample_numpy(logits, seed, row, step, tile=64, split=8):
    """The reservoir of triton_head.py's docstring, in float64, over whole rows of logits (B, V)."""
    B, V = logits.shape

    def u(word):
        u = (word.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
        return np.minimum(u, np.float32(1 - 2**-24)).astype(np.float64)
    chosen, total = np.zeros(B, int), np.zeros(B)
    p = np.exp(logits - logits.max(1, keepdims=True))
    for first in range(0, V, tile * split):
        token, mass, words = (np.zeros(B, int), np.zeros(B),
                              philox_numpy(seed, row, step, first // tile))
        for start in range(first, min(first + tile * split, V), tile):
            w = philox_numpy(seed, row, step, start // tile)
            cdf = p[:, start:start + tile].cumsum(1)
            pick = start + (cdf <= (u(w[0]) * cdf[:, -1])[:, None]).sum(1)
            mass += cdf[:, -1]
            token = np.where(u(w[1]) * mass < cdf[:, -1], pick, token)
        total += mass
        chosen = np.where(u(words[2]) * total < mass, token, chosen)
    return chosen


def draw(hidden, weight, seed, rows, step, kernels=triton_head):
    seed = torch.tensor(seed, dtype=torch.uint64, device=DEVICE)
    return kernels.sample(hidden, weight, seed, rows.to(DEVICE), torch.tensor(step, device=DEVICE))


def check_tokens(V, scale=0.3, kernels=triton_head, B=100, D=32):
    hidden, weight = randn(B, D, seed=V), surrounded(randn(V, D, seed=1, scale=scale))
    rows = torch.arange(B) * 7919 + 2**31
    config = kernels.config(D, torch.float16 if INTERPRETED else torch.float32)
    with patch.object(kernels, "config", lambda *_: dict(config)):
        token, logp = draw(hidden, weight, 2**40 + 3, rows, 5, kernels)
    logits = (hidden.double() @ weight.double().T).cpu().numpy()
    assert (token.cpu().numpy() == sample_numpy(logits, 2**40 + 3, rows.numpy(), 5)).all()
    assert error(logp, logprob64(hidden, weight, token)) < 1e-5


def test_the_largest_uniform_leaves_a_column_to_hit():
    """`uniform` needs (1 - 2^-24) x < x for all mantissas, so no draw is beyond the last column."""
    x = (np.arange(2**23, dtype=np.uint32) | np.uint32(127 << 23)).view(np.float32)  # all of [1, 2)
    assert (np.float32(1 - 2**-24) * x < x).all()


@pytest.mark.parametrize("V, scale, D", [(3, 0.3, 32), (64, 0.3, 24), (65, 0.6, 32),
                                         (513, 0.3, 400), (1100, 0.15, 384)])
def test_tokens_equal_the_numpy_reference(V, scale, D):
    """One tile, a partly filled one, several splits; rows held in one part, in two, and streamed; a
    seed beyond 32 bits and rows beyond 31."""
    check_tokens(V, scale, D=D)


def chi_square(tokens, p):
    n = len(tokens)
    return float(((tokens.cpu().bincount(minlength=len(p)) - n * p) ** 2 / (n * p)).sum())


def check_frequencies(kernels=triton_head, n=30_000, V=70):
    hidden, weight = randn(1, 16), randn(V, 16, seed=1, scale=0.3)
    # fewer, larger programs for the interpreter, which is slow
    config = kernels.config(16, torch.float32) | (dict(BLOCK_M=1024) if INTERPRETED else {})
    with patch.object(kernels, "config", lambda *_: dict(config)):
        tokens, _ = draw(hidden.expand(n, 16), weight, 5, torch.arange(n), 0, kernels)
    logits = (hidden.double() @ weight.double().T)[0].cpu()
    limit = V - 1 + 4 * math.sqrt(2 * (V - 1))  # mean + 4 standard deviations
    assert (chi_square(tokens, logits.softmax(-1)) < limit
            < chi_square(tokens, (logits / 1.15).softmax(-1)))


def test_frequencies_match_the_probabilities():
    """Chi-square over 30,000 draws. The same test must reject slightly flatter probabilities."""
    check_frequencies()


def test_a_draw_does_not_depend_on_its_place_in_the_batch(products_round_alike):
    hidden, weight = randn(200, 32), randn(600, 32, seed=1)
    whole = draw(hidden, weight, 9, torch.arange(200), 3)
    alone = draw(hidden[150:152], weight, 9, torch.arange(150, 152), 3)
    assert all(torch.equal(w[150:152], a) for w, a in zip(whole, alone))
    other_step = draw(hidden, weight, 9, torch.arange(200), 4)
    assert not torch.equal(whole[0], other_step[0])


def test_never_draws_the_impossible():
    weight, hidden = torch.eye(130, device=DEVICE) * 200, torch.eye(130, device=DEVICE)[[77] * 300]
    token, logp = draw(hidden, weight, 0, torch.arange(300), 0)
    assert (token == 77).all() and logp.abs().max() < 1e-6
    assert draw(hidden[:0], weight, 0, torch.arange(0), 0)[0].shape == (0,)


# ---- Squared ReLU and rotation -------------------------------------------------------------------
def check_elementwise(B, T, heads, Dh, dtype, kernels=triton_elementwise):
    """Values and gradients equal float64, for some heads of a wider projection. NaN stays NaN."""
    projection = surrounded(randn(B, T, heads + 2, Dh, dtype=dtype)).requires_grad_()
    x, upstream = projection[:, :, :heads], randn(B, T, heads, Dh, dtype=dtype, seed=1)
    cos, sin = random_angles(T, Dh, dtype)
    turn = torch.complex(cos.double(), sin.double())[..., :Dh // 2]  # of a - ib, for pairs (a, b)
    pairs = torch.complex(*x.double().split((Dh // 2, Dh // 2), -1)).conj() * turn
    for ours, exact in ((kernels.Rotate.apply(x, cos, sin),
                         torch.cat((pairs.real, -pairs.imag), -1)),
                        (kernels.SquaredReLU.apply(x), x.double().clamp_min(0) ** 2)):
        assert error(ours, exact) < LIMIT[dtype]
        grads = [torch.autograd.grad(y, projection, upstream.to(y.dtype))[0] for y in (ours, exact)]
        assert error(*grads) < LIMIT[dtype]
    assert kernels.SquaredReLU.apply(torch.full((3,), math.nan, device=DEVICE)).isnan().all()


@pytest.mark.parametrize("B, T, heads, Dh, dtype", [(3, 5, 7, 64, torch.float16),
                                                    (2, 9, 2, 24, torch.float32)])
def test_squared_relu_and_rotation_equal_float64(B, T, heads, Dh, dtype):
    check_elementwise(B, T, heads, Dh, dtype)


# ---- The model on the kernels --------------------------------------------------------------------
class NoHost(TorchDispatchMode):
    """Fails where PyTorch reads a tensor's value into Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, \
            "the host waits for the device"
        return func(*args, **kwargs or {})


def test_the_model_samples_and_learns_on_the_kernels(monkeypatch):
    """What the scripts do on a GPU: rollout by decode and sample, scoring, a gradient. The sampler
    and the training forward agree on log-probs, which equal the PyTorch path's, as do gradients."""
    from kernels.decoder import Decoder
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=90, context=6, n_layer=2, n_head=2, n_kv_head=1,
                          d_model=32)).to(DEVICE)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)

    def run():
        logp = model.logprob(y)
        logp.sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return logp.detach(), model.sentiment(y).detach(), grads
    for module in ("attention", "elementwise", "logprob", "sample"):
        monkeypatch.setattr(
            importlib.import_module(f"kernels.{module}"), "use_triton", lambda *_: True)
    y, sampled = model.generate(7, 6, seed=3, batch=4)
    again, _ = model.generate(torch.tensor([5, 6]), 6, seed=3)
    assert torch.equal(again, y[5:])  # the same in any batch
    decoder = Decoder(model, 7, 0, 6)
    none = y.new_empty(7, 0)
    with torch.no_grad():
        by_decoder, _ = decoder.draw(torch.arange(7, device=DEVICE), none, 6, 3)
    assert torch.equal(by_decoder, y)  # y: by the loop of GPT.draw, or on a GPU by a captured step
    assert (sampled - model.logprob(y)).abs().max() < 1e-5
    on_triton = run()
    with pytest.raises(AssertionError, match="host"), NoHost():
        y.sum().item()
    with NoHost():  # a CUDA graph and a busy GPU need this
        decoder.pos.zero_()
        with torch.no_grad():
            Decoder.step(decoder)
        run()
    for module in ("attention", "elementwise", "logprob", "sample"):
        monkeypatch.setattr(
            importlib.import_module(f"kernels.{module}"), "use_triton", lambda *_: False)
    assert all(error(a, b) < 1e-5 for a, b in zip(on_triton, run()))


class Launches(TorchDispatchMode):
    """Counts what a GPU would be told to run: every PyTorch operation that writes (views and empty
    tensors do not) and every Triton kernel, but not PyTorch operations in Triton's interpreter."""
    n = inside = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.n += not (self.inside or view or "empty" in str(func) or "_unsafe_view" in str(func))
        return func(*args, **kwargs or {})

    def around(self, run):
        def launch(*args, **kwargs):
            self.n, self.inside = self.n + 1, True
            run(*args, **kwargs)
            self.inside = False
        return launch


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
def test_a_decode_step_launches_72_kernels(monkeypatch):
    """With the six layers of the default on a GPU."""
    from triton.runtime.interpreter import GridExecutor

    from kernels.decoder import Decoder
    from model import GPT, GPTConfig
    monkeypatch.undo()  # remove the fences, which launch kernels too
    for module in ("attention", "elementwise", "sample"):
        monkeypatch.setattr(
            importlib.import_module(f"kernels.{module}"), "use_triton", lambda *_: True)
    decoder = Decoder(GPT(GPTConfig(90, 6, n_layer=6, n_head=2, n_kv_head=1, d_model=32)), 4, 0, 6)
    with torch.no_grad(), Launches() as launches:
        monkeypatch.setattr(GridExecutor, "__call__", launches.around(GridExecutor.__call__))
        decoder.step()
    assert launches.n == 72


# ---- Negative controls ---------------------------------------------------------------------------
def broken(module, old, new, tmp_path):
    """The module with `old` replaced by `new` in its source."""
    source = open(module.__file__, encoding="utf-8").read()
    assert old in source, f"{old!r} is no longer in {module.__name__}: this control tests nothing"
    path = tmp_path / f"{module.__name__.split('.')[1]}_broken.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("old, new, T", [
    ("rows[:, None] >= cols[None, :]", "rows[:, None] > cols[None, :] - 2", 17),   # mask off by one
    ("own[:, None] >= cols[None, :]", "own[:, None] > cols[None, :] - 2", 17),     # in backward
    ("rows[None, :] >= own[:, None]", "rows[None, :] > own[:, None] - 2", 17),     # its transpose
    ("acc * rescale[:, None], out", "acc, out", 130),                              # missing rescale
    ("+ h // group * k_h", "+ h * k_h * 0", 17),                                   # wrong head
    ("q_t, T, Dh, BLOCK_D)\n    m = ", "q_t + 1, T, Dh, BLOCK_D)\n    m = ", 17),  # wrong stride
    ("(dp - delta[:, None])", "(dp - tl.sum(p * dp, 1)[:, None])", 130),           # delta of a tile
    ("(dp_t - delta[None, :])", "(dp_t - tl.sum(p_t * dp_t, 0)[None, :])", 130),   # its transpose
    ("mask = (rows < end)[:, None]", "mask = (rows <= end)[:, None]", 17),         # writes outside
])
def test_a_broken_attention_is_caught(old, new, T, tmp_path, check_fences):
    kernels = broken(triton_attention, old, new, tmp_path)
    with pytest.raises(AssertionError):
        try:
            check_attention(2, T, 4, 2, 32, kernels=kernels)
        finally:
            check_fences()


@pytest.mark.parametrize("old, new", [
    ("m = tl.sum(q.to(ACC) * k_new", "m = 0 * tl.sum(q.to(ACC) * k_new"),             # no own score
    ("k, (slots < pos)[None, :],", "k, (slots <= pos)[None, :],"),                    # counts twice
    ("store_rows(k_cache_ptr, pos + one", "store_rows(k_cache_ptr, pos + 1 + one"),   # wrong slot
    ("cos_ptr += pos * Dh", "cos_ptr += pos"),                                        # wrong angle
    ("d + Dh // 2, d - Dh // 2)", "d + Dh // 2, d)"),                                 # wrong pair
])
def test_a_broken_decode_is_caught(old, new, tmp_path, monkeypatch):
    kernels = broken(triton_attention, old, new, tmp_path)
    monkeypatch.setattr(triton_attention, "decode_attention", kernels.decode_attention)
    with pytest.raises(AssertionError):
        test_decode_step_equals_row_of_prefill(4, 2, 24, torch.float32)


@pytest.mark.parametrize("old, new", [
    ("z * LOG2E, NEVER)", "z * LOG2E, 0.0)"),                          # mask of 0
    ("l * tl.exp2(m - m_new), tl", "l, tl"),                           # missing rescale
    ("z_target - m - tl.log2(l)", "z_target - m + tl.log2(l)"),        # wrong sign
    ("n.to(tl.int64) * h_n", "n.to(tl.int64) * (h_n - 1)"),            # wrong stride
    ("g[:, None], 0.0) - g[:, None] * p", "g[:, None], 0.0) - p"),     # g dropped from p
    ("kept = ok & (target >= 0)", "kept = ok"),                        # ignored rows count
    ("exp2(tl.where((cols < V)[None, :], z2, NEVER)", "exp2(z2"),      # padding has a gradient
    ("l, tl.where((cols < V)[None, :], z2, NEVER))", "l, z2)"),        # padding in the sum
])
def test_a_broken_logprob_is_caught(old, new, tmp_path):
    with pytest.raises(AssertionError):
        check_logprob(66, 32, 129, 4.0, kernels=broken(triton_head, old, new, tmp_path))


@pytest.mark.parametrize("old, new", [
    ("accept = uniform(u1) * l < total", "accept = uniform(u0) * l < total"),    # reused uniform
    ("accept = uniform(u2) * l < mass", "accept = uniform(u2) * l < l_j"),       # missing rescale
    ("cdf > (uniform(u0) * total)", "cdf > (uniform(u0))"),                      # not normalised
])
def test_a_broken_sampler_is_caught(old, new, tmp_path):
    kernels = broken(triton_head, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_tokens(1100, kernels=kernels)


@pytest.mark.parametrize("old, new", [
    ("(b * c - a * s)", "(b * c + a * s)"),                  # not a rotation
    ("ctx.saved_tensors, -1)", "ctx.saved_tensors, 1)"),     # turned on, not back
    ("(n % T)[:, None]", "(n * 0)[:, None]"),                # position 0 for all
    ("y = 2 * r * ", "y = r * "),                            # derivative without its 2
    ("tl.where(x < 0, 0.0, x)", "tl.where(x > 0, x, 0.0)"),  # hides a NaN
])
def test_a_broken_elementwise_kernel_is_caught(old, new, tmp_path):
    with pytest.raises(AssertionError):
        check_elementwise(2, 9, 2, 24, torch.float32,
                          broken(triton_elementwise, old, new, tmp_path))


# ---- On a GPU ------------------------------------------------------------------------------------
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T, Dh, H, Hkv", [
    (64, 64, 6, 6), (100, 64, 6, 6), (128, 64, 6, 2), (256, 64, 6, 6), (128, 32, 4, 4),
    (256, 32, 4, 4), (200, 128, 4, 2)])
def test_attention_is_as_exact_as_eager_in_the_same_dtype(T, Dh, H, Hkv, dtype):
    """FlashAttention's rule: at most twice the error of plain PyTorch, or thrice for gradients."""
    inputs = [randn(4, T, n, Dh, dtype=dtype, seed=i).requires_grad_()
              for i, n in enumerate((H, Hkv, Hkv))]
    upstream = randn(4, T, H * Dh, dtype=dtype, seed=9)
    outs = [f(*inputs) for f in (lambda *x: attention(*x, backend="triton"), eager_attention,
                                 attention64)]
    grads = [torch.autograd.grad(o, inputs, upstream.to(o.dtype)) for o in outs]
    assert error(outs[0], outs[2]) <= 2 * error(outs[1], outs[2]) + 1e-5
    for ours, theirs, exact in zip(*grads):
        assert error(ours, exact) <= 3 * error(theirs, exact) + 1e-5


@gpu
@pytest.mark.parametrize("H, Hkv, Dh", [(6, 6, 64), (6, 1, 64), (4, 2, 32), (4, 4, 128)])
def test_decode_in_bf16_is_as_exact_as_eager(H, Hkv, Dh):
    B, T = 64, 150
    q, k, v = (randn(B, T, n, Dh, dtype=torch.bfloat16, seed=i)
               for i, n in enumerate((H, Hkv, Hkv)))
    angles = random_angles(T, Dh, q.dtype)
    turned = [rotate(x, *angles, backend="torch") for x in (q, k)]
    caches = [x.transpose(1, 2).contiguous() for x in (turned[1], v)]
    exact, rows = attention64(*turned, v)[:, -1], []
    for backend in ("triton", "torch"):
        rows.append(decode_attention(q[:, -1], k[:, -1], v[:, -1], *caches, T - 1, angles,
                                     backend=backend))
    assert error(rows[0], exact) <= 2 * error(rows[1], exact) + 1e-5


@gpu
@pytest.mark.parametrize("D, V", [(256, 2048), (192, 4093), (384, 2049), (768, 50304)])
def test_bf16_samples_come_from_float64_probabilities(D, V):
    """Logits of bf16 inputs are exact to fp32 rounding: nearly all tokens equal the reference's."""
    hidden, weight = (randn(n, D, dtype=torch.bfloat16, seed=n, scale=s)
                      for n, s in ((512, 1.0), (V, D**-0.5)))
    rows = torch.arange(512)
    token, logp = draw(hidden, weight, 3, rows, 5)
    expected = sample_numpy((hidden.double() @ weight.double().T).cpu().numpy(), 3, rows.numpy(), 5)
    assert (token.cpu().numpy() == expected).mean() > 0.99
    assert error(logp, logprob64(hidden, weight, token)) < 1e-5


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D, V", [(256, 2048), (192, 4093), (384, 2049), (768, 50304)])
def test_logprob_is_as_exact_as_eager_in_the_same_dtype(D, V, dtype):
    hidden, weight = (randn(n, D, dtype=dtype, seed=n, scale=s).requires_grad_()
                      for n, s in ((1000, 1.0), (V, 2 / math.sqrt(D))))
    target = torch.randint(V, (1000,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    g = randn(1000, seed=1)
    outs = [f(hidden, weight, target)
            for f in (partial(linear_logprob, backend="triton"), eager_logprob, logprob64)]
    grads = [torch.autograd.grad((logp * g).sum(), (hidden, weight)) for logp in outs]
    ours, theirs, exact = outs
    assert error(ours, exact) <= 2 * error(theirs, exact) + 1e-5
    for ours, theirs, exact in zip(*grads):
        assert error(ours, exact) <= 3 * error(theirs, exact) + 1e-5


@gpu
@pytest.mark.parametrize("T", [17, 64, 65, 128])
def test_bf16_backward_of_the_preset_and_its_repeats(T):
    """Six query heads and one key-value head, 64 wide, in bf16. On Hopper, compilers gave wrong
    gradients for such kernels. Ours must be right, with the same bits 50 times."""
    check_attention(64, T, 6, 1, 64, torch.bfloat16)
    projection = randn(64, T, 8, 64, dtype=torch.bfloat16).requires_grad_()
    upstream = randn(64, T, 384, dtype=torch.bfloat16, seed=1)

    def gradient():
        out = triton_attention.Attention.apply(*projection.split([6, 1, 1], dim=2))
        return torch.autograd.grad(out, projection, upstream)[0]
    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(50))


@gpu
def test_repeated_launches_are_bitwise_equal():
    packed = randn(60, 128, 3, 6, 64, dtype=torch.bfloat16).requires_grad_()
    long = randn(8, 300, 3, 6, 64, dtype=torch.bfloat16).requires_grad_()
    hidden, weight = (randn(n, 256, dtype=torch.bfloat16, seed=n).requires_grad_()
                      for n in (20_000, 2048))
    target = torch.arange(20_000, device=DEVICE) % 2048

    def everything():
        outs = [attention(*packed.unbind(2), backend="triton"),
                attention(*long.unbind(2), backend="triton"),
                linear_logprob(hidden, weight, target, backend="triton")]
        loss = sum(o.float().square().sum() for o in outs)
        drawn = sample(hidden[:4096], weight, 1, target[:4096], 2, backend="triton")
        return [*outs, *torch.autograd.grad(loss, (packed, long, hidden, weight)), *drawn]
    first = everything()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, everything()))


@gpu
def test_more_than_65535_heads_and_more_than_2_to_31_elements():
    if torch.cuda.mem_get_info()[1] < 40e9:
        pytest.skip("needs 40 GB")
    B = 2**31 // (64 * 3 * 6 * 64) + 1000  # 30,127 sequences x 6 heads; 2.2e9 elements
    packed = torch.randn(B, 64, 3, 6, 64, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    out = attention(*packed.unbind(2), backend="triton")
    grad, = torch.autograd.grad(out, packed, torch.ones_like(out))
    last = packed[-2:].detach().clone().requires_grad_()
    alone = attention(*last.unbind(2), backend="triton")
    assert torch.equal(out[-2:], alone)
    assert torch.equal(grad[-2:], torch.autograd.grad(alone, last, torch.ones_like(alone))[0])


@gpu
def test_a_replayed_step_draws_what_a_launched_one_draws(monkeypatch):
    """The CUDA graph must draw the same, also after the weights have changed in place."""
    from kernels import decoder
    from model import GPT, GPTConfig
    monkeypatch.setattr(decoder, "decoders", {})
    model = GPT(GPTConfig(vocab_size=2051, context=32, n_layer=2, n_head=4, n_kv_head=1,
                          d_model=256)).to(DEVICE)
    model.dtype = torch.bfloat16
    for seed in (1, 2):
        torch.manual_seed(seed)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        replayed = model.generate(300, 32, seed)
        captured, = decoder.decoders.values()
        replay = captured.__dict__.pop("step")  # leaves the method, launched kernel by kernel
        launched = model.generate(300, 32, seed)
        captured.step = replay
        assert torch.equal(replayed[0], launched[0]) and torch.equal(replayed[1], launched[1])


@gpu
def test_no_host_synchronisation():
    """None of the four calls waits for the GPU, as a CUDA graph needs."""
    packed = randn(4, 64, 3, 6, 64, dtype=torch.bfloat16).requires_grad_()
    hidden, weight = (randn(n, 256, dtype=torch.bfloat16, seed=n).requires_grad_()
                      for n in (256, 2048))
    target, pos = torch.arange(256, device=DEVICE), torch.tensor(5, device=DEVICE)
    cache = randn(2, 4, 6, 64, 64, dtype=torch.bfloat16)
    angles = random_angles(64, 64, torch.bfloat16)

    def everything():
        attention(*packed.unbind(2), backend="triton").sum().backward()
        linear_logprob(hidden, weight, target, backend="triton").sum().backward()
        q, k, v = packed[:, 0].unbind(1)
        decode_attention(q, k, v, *cache, pos, angles, backend="triton")
        sample(hidden, weight, pos, target, pos, backend="triton")
    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
