"""The output head in Triton: log-prob, its gradients, and sampling, without stored logits.

    z = hidden W^T        logp = z_target - LSE(z)        p = softmax(z)

Eager PyTorch writes the logits in bf16 and three float32 copies of them: 16 bytes per logit
forward. It keeps most of this for the backward pass. Here a program takes BLOCK_M rows of hidden
and goes through the vocabulary tile by tile. It uses a tile of logits in registers, then drops it.

Each row keeps only the two numbers of an online softmax. They are in base 2, because exp2 is one
instruction (z2 = z log2 e):

    m = max z2        l = sum 2^(z2 - m)        LSE = (m + log2 l) ln 2

z_target comes from the same tile that enters the sum, so logp <= 0 up to the last bit.

Where the time goes: with D = 256 a logit costs 512 FLOP in the product, and about 20 instructions
around it take as long again. Two programs on one multiprocessor can do both at once. For D <= 384
(256 before Hopper) the rows of hidden stay on chip. Otherwise a 128 x 64 tile of logits would read
96 KB for 0.7 us of product, twice what the L2 cache can deliver. For larger D we stream both.

Drawing a token costs two uniforms per row and tile, not one per logit. Each tile draws one of its
columns (inverse CDF). This column replaces the earlier choice with probability (mass of this tile)
/ (mass of all tiles so far): a reservoir. The factors telescope, so each column is chosen with its
own probability. Uniforms come from Philox4x32-10, key = seed, counter = (row, step, tile, 0). Words
0 and 1 are for the tile, and word 2 merges `SPLIT` tiles with the others. So a draw depends on
seed, row and step, and never on its neighbours.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.triton_attention import LOG2E, PRECISION, hopper

LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(-1e30)  # a missing logit; finite, because -inf less -inf would be NaN
TILE, SPLIT = 64, 8       # sampling: columns per tile, tiles per program; both affect what is drawn
CHUNK = 44 * 128          # rows per backward chunk: at D 384 a product has 44 x 3 tiles for 132 SMs


# ---- Pieces --------------------------------------------------------------------------------------
@triton.jit
def load_tile(rows, ok, first, D, WIDTH: tl.constexpr):
    """Load columns [first, first + WIDTH) of each row; rows (R,) points to their first elements."""
    d = first + tl.arange(0, WIDTH)
    return tl.load(rows[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_resident(h_rows, h_ok, D, D0: tl.constexpr, D1: tl.constexpr):
    """Load hidden rows as two tiles, D0 and D1 wide. Sides are powers of two, and 384 is not."""
    if D0 == 0:
        h0, h1 = h_rows, h_rows                                      # streamed instead
    else:
        h0 = load_tile(h_rows, h_ok, 0, D, D0)
        h1 = load_tile(h_rows, h_ok, D0, D, D1) if D1 > 0 else h0
    return h0, h1


@triton.jit
def logits2(h0, h1, h_rows, h_ok, w_ptr, w_v, cols, V, D, D0: tl.constexpr, D1: tl.constexpr,
            BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """One tile of hidden W^T log2(e), (rows, cols); NEVER in the columns beyond V."""
    w_rows = w_ptr + cols.to(tl.int64) * w_v
    if D0 > 0:
        w = load_tile(w_rows, cols < V, 0, D, D0)
        z = tl.dot(h0, tl.trans(w), out_dtype=ACC, input_precision=PRECISION)
        if D1 > 0:
            w = load_tile(w_rows, cols < V, D0, D, D1)
            z = tl.dot(h1, tl.trans(w), z, out_dtype=ACC, input_precision=PRECISION)
    else:
        z = tl.zeros((h_rows.shape[0], cols.shape[0]), ACC)
        for first in range(0, D, BLOCK_K):
            h = load_tile(h_rows, h_ok, first, D, BLOCK_K)
            w = load_tile(w_rows, cols < V, first, D, BLOCK_K)
            z = tl.dot(h, tl.trans(w), z, out_dtype=ACC, input_precision=PRECISION)
    return tl.where((cols < V)[None, :], z * LOG2E, NEVER)


@triton.jit
def fold(m, l, z2):
    """Rescale the running sum l to the new maximum -> m, l, and this tile's p = 2^(z2 - m), which
    the caller adds to l."""
    m_new = tl.maximum(m, tl.max(z2, 1))
    return m_new, l * tl.exp2(m - m_new), tl.exp2(z2 - m_new[:, None])


# ---- Log-prob ------------------------------------------------------------------------------------
@triton.jit
def logprob_forward(hidden_ptr, w_ptr, target_ptr, logp_ptr, N, h_n, w_v, V, D, D0: tl.constexpr,
                    D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """Compute BLOCK_M of the N rows. hidden (N, D) and w (V, D) by row strides, target (N,) -> logp
    (N,), nats. Every row is summed in the same order for any N."""
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = n < N
    h_rows = hidden_ptr + n.to(tl.int64) * h_n
    h0, h1 = load_resident(h_rows, ok, D, D0, D1)
    target = tl.load(target_ptr + n, mask=ok, other=-1)
    m = tl.full((BLOCK_M,), NEVER, ACC)
    l = tl.zeros((BLOCK_M,), ACC)
    z_target = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, V, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        z2 = logits2(h0, h1, h_rows, ok, w_ptr, w_v, cols, V, D, D0, D1, BLOCK_K, ACC)
        z_target += tl.sum(tl.where(cols[None, :] == target[:, None], z2, 0.0), 1)
        m, l, p = fold(m, l, z2)
        l += tl.sum(p, 1)
    logp = tl.where(target >= 0, (z_target - m - tl.log2(l)) * LN2, 0.0)
    logp = tl.where((target < -1) | (target >= V), float("nan"), logp)  # loud, without a sync
    tl.store(logp_ptr + n, logp, mask=ok)


@triton.jit
def logprob_backward(target_ptr, g_ptr, dlogits_ptr, first, N, V, dlogits_n, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    """dlogits (chunk, dlogits_n) holds the logits z of rows [first, first + chunk), rounded to its
    dtype. The first pass over them computes their LSE. The second puts their gradient in their
    place, exactly 0 in the columns beyond V. With g = dL/dlogp:

        dL/dz_j = g (1[j = target] - p_j)

    The LSE must come from exactly these logits. If they were rounded differently, p near 1 would be
    off by the difference, and 1 - p by many times its own size."""
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first + r
    ok = n < N
    target = tl.load(target_ptr + n, mask=ok, other=-1)
    kept = ok & (target >= 0)
    g = tl.load(g_ptr + n, mask=kept, other=0.0)
    rows = dlogits_ptr + r.to(tl.int64) * dlogits_n
    m = tl.full((BLOCK_M,), NEVER, ACC)
    l = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, V, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        z2 = load_tile(rows, ok, start, dlogits_n, BLOCK_N).to(ACC) * LOG2E
        m, l, p = fold(m, l, tl.where((cols < V)[None, :], z2, NEVER))
        l += tl.sum(p, 1)
    lse2 = m + tl.log2(l)
    for start in range(0, dlogits_n, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        z2 = load_tile(rows, ok, start, dlogits_n, BLOCK_N).to(ACC) * LOG2E
        p = tl.exp2(tl.where((cols < V)[None, :], z2, NEVER) - lse2[:, None])
        dz = tl.where(cols[None, :] == target[:, None], g[:, None], 0.0) - g[:, None] * p
        tl.store(rows[:, None] + cols[None, :], dz.to(dlogits_ptr.dtype.element_ty),
                 mask=ok[:, None] & (cols < dlogits_n)[None, :])


# ---- Sampling ------------------------------------------------------------------------------------
@triton.jit
def uniform(word):
    """Turn a 32-bit word into u = min((word + 1/2) 2^-32, 1 - 2^-24), in float32.

    (1 - 2^-24) total rounds to less than total for every float32, so a draw always hits a column.
    A float32 has 24 bits, so words are rounded to multiples of at most 2^8. For every c, P(u < c)
    is within 2^-25 of c, and within 2^-25 c of it where c < 1/2, so rare columns keep their odds.
    A tile has 63 inner boundaries, so the total variation of its draw is at most 63 x 2^-25 < 2e-6.
    Each acceptance adds at most 2^-25.
    """
    return tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)


# V = 1 would become a constant, and the compiler then spills registers
@triton.jit(do_not_specialize=["V"], do_not_specialize_on_alignment=["seed_ptr", "step_ptr"])
def sample_tiles(hidden_ptr, w_ptr, row_ptr, seed_ptr, step_ptr, m_ptr, l_ptr, z_ptr, token_ptr, B,
                 h_b, w_v, V, D, D0: tl.constexpr, D1: tl.constexpr, TILES: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Propose a token for BLOCK_M rows, from TILES tiles of the vocabulary -> m, l of the tiles,
    the token and its z2, each (splits, B). Few rows are drawn at once, so several programs share
    the vocabulary. seed and step are read from memory, so a CUDA graph can be replayed."""
    splits = tl.cdiv(tl.cdiv(V, BLOCK_N), TILES)
    split = tl.program_id(0) % splits
    n = tl.program_id(0) // splits * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = n < B
    h_rows = hidden_ptr + n.to(tl.int64) * h_b
    h0, h1 = load_resident(h_rows, ok, D, D0, D1)
    row = tl.load(row_ptr + n, mask=ok, other=0).to(tl.uint32)
    seed, zero = tl.load(seed_ptr), row * 0
    step = zero + tl.load(step_ptr).to(tl.uint32)
    m = tl.full((BLOCK_M,), NEVER, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    token = tl.zeros((BLOCK_M,), tl.int32)
    for tile in range(split * TILES, min((split + 1) * TILES, tl.cdiv(V, BLOCK_N))):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z2 = logits2(h0, h1, h_rows, ok, w_ptr, w_v, cols, V, D, D0, D1, BLOCK_K, tl.float32)
        m, l, p = fold(m, l, z2)
        u0, u1, _, _ = tl.philox(seed, row, step, zero + tile, zero)
        cdf = tl.cumsum(p, 1)
        total = tl.max(cdf, 1)  # not sum(p), which may round above
        hit = (cdf > (uniform(u0) * total)[:, None]) & (p > 0)
        last = tl.minimum(tile * BLOCK_N + BLOCK_N, V) - 1
        pick = tl.min(tl.where(hit, cols[None, :], last), 1)
        z_pick = tl.sum(tl.where(cols[None, :] == pick[:, None], z2, 0.0), 1)
        l += total
        accept = uniform(u1) * l < total  # always true in the first tile
        token, z = tl.where(accept, pick, token), tl.where(accept, z_pick, z)
    at = split.to(tl.int64) * B + n
    tl.store(m_ptr + at, m, mask=ok)
    tl.store(l_ptr + at, l, mask=ok)
    tl.store(z_ptr + at, z, mask=ok)
    tl.store(token_ptr + at, token, mask=ok)


@triton.jit(do_not_specialize_on_alignment=["seed_ptr", "step_ptr"])
def sample_merge(m_ptr, l_ptr, z_ptr, token_ptr, row_ptr, seed_ptr, step_ptr, out_ptr, logp_ptr, B,
                 splits, TILES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Merge the splits' proposals in order, by the same reservoir -> token, logp."""
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = n < B
    row = tl.load(row_ptr + n, mask=ok, other=0).to(tl.uint32)
    seed, zero = tl.load(seed_ptr), row * 0
    step = zero + tl.load(step_ptr).to(tl.uint32)
    m = tl.full((BLOCK_M,), NEVER, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    token = tl.zeros((BLOCK_M,), tl.int32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * B + n
        m_j = tl.load(m_ptr + at, mask=ok, other=0.0)
        l_j = tl.load(l_ptr + at, mask=ok, other=1.0)
        m_new = tl.maximum(m, m_j)
        mass = l_j * tl.exp2(m_j - m_new)
        l = l * tl.exp2(m - m_new) + mass
        m = m_new
        _, _, u2, _ = tl.philox(seed, row, step, zero + split * TILES, zero)
        accept = uniform(u2) * l < mass
        z = tl.where(accept, tl.load(z_ptr + at, mask=ok, other=0.0), z)
        token = tl.where(accept, tl.load(token_ptr + at, mask=ok, other=0), token)
    tl.store(out_ptr + n, token.to(tl.int64), mask=ok)
    tl.store(logp_ptr + n, (z - m - tl.log2(l)) * LN2, mask=ok)


# ---- Configurations and launches -----------------------------------------------------------------
def config(D: int, dtype: torch.dtype) -> dict:
    """Tile shapes, from a fixed table instead of a search at run time. No register spills on sm_80
    and sm_90. Older GPUs and consumer cards get shapes that fit in 99 KB of shared memory."""
    if dtype.itemsize > 2:  # float32: three tensor-core products each, so smaller tiles
        return dict(D0=0, D1=0, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2)
    if D > (384 if hopper() else 256):  # streamed
        return dict(D0=0, D1=0, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64 if hopper() else 32,
                    num_warps=8, num_stages=3)
    D0 = max(16, 1 << D.bit_length() - 1)
    D1 = max(16, triton.next_power_of_2(D - D0)) if D > D0 else 0
    # 1 tile of W in flight where, with 2, only one program would fit on a multiprocessor
    stages = 1 if hopper() and 192 < D0 + D1 <= 256 else 2
    BLOCK_M, warps = (128, 8) if hopper() else (64, 4)
    return dict(D0=D0, D1=D1, BLOCK_M=BLOCK_M, BLOCK_N=64, BLOCK_K=64, num_warps=warps,
                num_stages=stages)


class LinearLogprob(torch.autograd.Function):
    """hidden (N, D), weight (V, D), target (N,) -> logp (N,). The backward pass needs only the
    inputs."""

    @staticmethod
    def forward(ctx, hidden, weight, target):
        (N, D), V = hidden.shape, len(weight)
        acc = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(N, dtype=acc, device=hidden.device)
        c = config(D, hidden.dtype)
        logprob_forward[triton.cdiv(N, c["BLOCK_M"]),](
            hidden, weight, target, logp, N, hidden.stride(0), weight.stride(0), V, D,
            ACC=tl.float64 if acc == torch.float64 else tl.float32, enable_fp_fusion=True, **c)
        ctx.save_for_backward(hidden, weight, target)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        """Three products per chunk of rows: the logits again, then dlogits W and dlogits^T hidden.
        No atomics. Zero rows of W and zero columns of dlogits pad V to a multiple of 64, which
        aligns the rows in these products."""
        hidden, weight, target = ctx.saved_tensors
        (N, D), V, g = hidden.shape, len(weight), g.contiguous()
        padded = triton.cdiv(V, 64) * 64
        weight = F.pad(weight, (0, 0, 0, padded - V))
        chunk = min(N, max(CHUNK, 2**24 // padded // 128 * 128))  # V = 2,048: 32 MB, within the L2
        buffer = torch.empty(chunk, padded, dtype=hidden.dtype, device=hidden.device)
        d_hidden = torch.empty(N, D, dtype=hidden.dtype, device=hidden.device)
        d_weight = torch.zeros(padded, D, dtype=g.dtype, device=hidden.device)
        acc = tl.float64 if g.dtype == torch.float64 else tl.float32
        for first in range(0, N, chunk):
            last = min(first + chunk, N)
            dlogits = buffer[: last - first]
            torch.mm(hidden[first:last], weight.T, out=dlogits)
            logprob_backward[triton.cdiv(last - first, 16),](
                target, g, dlogits, first, last, V, padded, BLOCK_M=16, BLOCK_N=128, ACC=acc,
                num_warps=4, enable_fp_fusion=True)
            torch.mm(dlogits, weight, out=d_hidden[first:last])
            d_weight += dlogits.T @ hidden[first:last]
        return d_hidden, d_weight[:V].to(weight.dtype), None


def linear_logprob(hidden, weight, target):
    """hidden (N, D), weight (V, D), target (N,) -> logp (N,). A target outside [-1, V) gives NaN;
    the host need not wait."""
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    return LinearLogprob.apply(hidden, weight, target.contiguous())


def sample(hidden, weight, seed, row, step):
    """Shapes as in kernels.sample; seed and step are one-element integer tensors on the device."""
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    (B, D), V, device = hidden.shape, len(weight), hidden.device
    splits = triton.cdiv(triton.cdiv(V, TILE), SPLIT)
    m, l, z = torch.empty(3, splits, B, device=device)
    proposed = torch.empty(splits, B, dtype=torch.int32, device=device)
    token = torch.empty(B, dtype=torch.int64, device=device)
    logp = torch.empty(B, device=device)
    if B:
        c = config(D, hidden.dtype) | dict(BLOCK_N=TILE)
        sample_tiles[triton.cdiv(B, c["BLOCK_M"]) * splits,](
            hidden, weight, row, seed, step, m, l, z, proposed, B, hidden.stride(0),
            weight.stride(0), V, D, TILES=SPLIT, enable_fp_fusion=True, **c)
        sample_merge[triton.cdiv(B, 128),](
            m, l, z, proposed, row, seed, step, token, logp, B, splits, TILES=SPLIT, BLOCK_M=128,
            num_warps=4, enable_fp_fusion=True)
    return token, logp
