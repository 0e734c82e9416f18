"""The output head in Triton: log-prob and entropy, their gradients, and sampling, without logits.

    z = hidden W^T / tau     logp = z_target - LSE(z)     H = -sum_j p_j log p_j     p = softmax(z)

Eager PyTorch writes the logits in bf16 and three float32 copies of them: 16 bytes per logit
forward. It keeps most of this for the backward pass. Here a program takes BLOCK_M rows of hidden
and goes through the vocabulary tile by tile. It uses a tile of logits in registers, then drops it.

Each row keeps only the sums of an online softmax, plus one for the entropy. All are in base 2,
because exp2 is one instruction (z2 = z log2 e):

    m = max z2        l = sum 2^(z2 - m)        s = sum 2^(z2 - m) (z2 - m)
    LSE = (m + log2 l) ln 2                     H = (log2 l - s / l) ln 2

Both terms of H are positive, so nothing cancels. LSE - sum p z would subtract 50 from 50.01.
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
NEVER = tl.constexpr(-1e30)  # a missing logit; finite, so that 0 * NEVER is 0 and not NaN
TILE, SPLIT = 64, 8       # sampling: columns per tile, tiles per program; both affect what is drawn
CHUNK = 44 * 128          # rows per backward chunk: at D 384 a product has 44 x 3 tiles for 132 SMs


# ---- Pieces --------------------------------------------------------------------------------------
@triton.jit
def load_tile(rows, ok, first, D, WIDTH: tl.constexpr):
    """Load columns [first, first + WIDTH) of each row; rows (R,) points to their first elements."""
    d = first + tl.arange(0, WIDTH)
    return tl.load(rows[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def hidden_rows(hidden_ptr, n, T, h_b, h_t):
    """Pointers to rows n of hidden (B, T, D), by strides, so a slice along T needs no copy."""
    return hidden_ptr + (n // T).to(tl.int64) * h_b + (n % T).to(tl.int64) * h_t


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
def logits2(h0, h1, h_rows, h_ok, w_ptr, w_v, cols, V, D, scale2, D0: tl.constexpr,
            D1: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """One tile of hidden W^T log2(e) / tau, (rows, cols); NEVER in the columns beyond V."""
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
    return tl.where((cols < V)[None, :], z * scale2, NEVER)


@triton.jit
def fold(m, l, s, z2):
    """Rescale the running sums to the new maximum and add this tile to s. The caller adds it to l.
    -> m, l, s, and p = 2^(z2 - m). The new maximum multiplies each earlier term by 2^(m - m_new),
    and adds m - m_new to its z2 - m."""
    m_new = tl.maximum(m, tl.max(z2, 1))
    p = tl.exp2(z2 - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    s = (s + l * (m - m_new)) * rescale + tl.sum(p * (z2 - m_new[:, None]), 1)
    return m_new, l * rescale, s, p


# ---- Log-prob and entropy ------------------------------------------------------------------------
@triton.jit
def logprob_forward(hidden_ptr, w_ptr, target_ptr, logp_ptr, entropy_ptr, N, T, h_b, h_t, w_v, V, D,
                    scale2, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """Compute BLOCK_M of the N = B T rows. hidden (B, T, D) by strides, w (V, D), target (N,) ->
    logp and entropy (nats), (N,). Every row is summed in the same order for any N."""
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = n < N
    h_rows = hidden_rows(hidden_ptr, n, T, h_b, h_t)
    h0, h1 = load_resident(h_rows, ok, D, D0, D1)
    target = tl.load(target_ptr + n, mask=ok, other=-1)
    m = tl.full((BLOCK_M,), NEVER, ACC)
    l = tl.zeros((BLOCK_M,), ACC)
    s = tl.zeros((BLOCK_M,), ACC)
    z_target = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, V, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        z2 = logits2(h0, h1, h_rows, ok, w_ptr, w_v, cols, V, D, scale2, D0, D1, BLOCK_K, ACC)
        z_target += tl.sum(tl.where(cols[None, :] == target[:, None], z2, 0.0), 1)
        m, l, s, p = fold(m, l, s, z2)
        l += tl.sum(p, 1)
    lse2 = m + tl.log2(l)
    logp = tl.where(target >= 0, (z_target - lse2) * LN2, 0.0)
    logp = tl.where((target < -1) | (target >= V), float("nan"), logp)  # loud, without a sync
    tl.store(logp_ptr + n, logp, mask=ok)
    tl.store(entropy_ptr + n, tl.where(target >= 0, (tl.log2(l) - s / l) * LN2, 0.0), mask=ok)


@triton.jit
def gradient_of_logits(z2, lse2, entropy, cols, target, g, g_entropy, inv_tau,
                       ENTROPY: tl.constexpr):
    """One tile of dL/d(hidden W^T) from g = dL/dlogp, g_H = dL/dH; exactly 0 in columns beyond V:

        dL/dz_j = g (1[j = target] - p_j) - g_H p_j (log p_j + H)

    lse2 must come from exactly these logits. If they were rounded differently, p near 1 would be
    off by the difference, and 1 - p by many times its own size."""
    log2p = z2 - lse2[:, None]
    p = tl.exp2(log2p)
    dz = tl.where(cols[None, :] == target[:, None], g[:, None], 0.0) - g[:, None] * p
    if ENTROPY:
        dz -= g_entropy[:, None] * p * (log2p * LN2 + entropy[:, None])
    return dz * inv_tau


@triton.jit
def logprob_backward(target_ptr, g_ptr, g_entropy_ptr, dlogits_ptr, first, N, V, dlogits_n,
                     scale2, inv_tau, ENTROPY: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    """dlogits (chunk, dlogits_n) holds the logits of rows [first, first + chunk), rounded to its
    dtype. The first pass over them computes their own LSE and entropy; the second puts their
    gradient in their place, exactly 0 in the columns beyond V."""
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = first + r
    ok = n < N
    target = tl.load(target_ptr + n, mask=ok, other=-1)
    kept = ok & (target >= 0)
    g = tl.load(g_ptr + n, mask=kept, other=0.0)
    g_entropy = tl.load(g_entropy_ptr + n, mask=kept, other=0.0)     # unused without ENTROPY
    rows = dlogits_ptr + r.to(tl.int64) * dlogits_n
    m = tl.full((BLOCK_M,), NEVER, ACC)
    l = tl.zeros((BLOCK_M,), ACC)
    s = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, V, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        z2 = load_tile(rows, ok, start, dlogits_n, BLOCK_N).to(ACC) * scale2
        m, l, s, p = fold(m, l, s, tl.where((cols < V)[None, :], z2, NEVER))
        l += tl.sum(p, 1)
    lse2, entropy = m + tl.log2(l), (tl.log2(l) - s / l) * LN2
    for start in range(0, dlogits_n, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        z2 = load_tile(rows, ok, start, dlogits_n, BLOCK_N).to(ACC) * scale2
        z2 = tl.where((cols < V)[None, :], z2, NEVER)
        dz = gradient_of_logits(z2, lse2, entropy, cols, target, g, g_entropy, inv_tau, ENTROPY)
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


@triton.jit(do_not_specialize_on_alignment=["seed_ptr", "step_ptr"])
def sample_tiles(hidden_ptr, w_ptr, row_ptr, seed_ptr, step_ptr, m_ptr, l_ptr, s_ptr, z_ptr,
                 token_ptr, B, h_b, w_v, V, D, scale2, D0: tl.constexpr, D1: tl.constexpr,
                 TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):
    """Propose a token for BLOCK_M rows, from TILES tiles of the vocabulary -> m, l, s of the tiles,
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
    s = tl.zeros((BLOCK_M,), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    token = tl.zeros((BLOCK_M,), tl.int32)
    for tile in range(split * TILES, min((split + 1) * TILES, tl.cdiv(V, BLOCK_N))):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z2 = logits2(h0, h1, h_rows, ok, w_ptr, w_v, cols, V, D, scale2, D0, D1, BLOCK_K,
                     tl.float32)
        m, l, s, p = fold(m, l, s, z2)
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
    tl.store(s_ptr + at, s, mask=ok)
    tl.store(z_ptr + at, z, mask=ok)
    tl.store(token_ptr + at, token, mask=ok)


@triton.jit(do_not_specialize_on_alignment=["seed_ptr", "step_ptr"])
def sample_merge(m_ptr, l_ptr, s_ptr, z_ptr, token_ptr, row_ptr, seed_ptr, step_ptr, out_ptr,
                 logp_ptr, entropy_ptr, B, splits, TILES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Merge the splits' proposals in order, by the same reservoir -> token, logp, entropy."""
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = n < B
    row = tl.load(row_ptr + n, mask=ok, other=0).to(tl.uint32)
    seed, zero = tl.load(seed_ptr), row * 0
    step = zero + tl.load(step_ptr).to(tl.uint32)
    m = tl.full((BLOCK_M,), NEVER, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    s = tl.zeros((BLOCK_M,), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    token = tl.zeros((BLOCK_M,), tl.int32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * B + n
        m_j = tl.load(m_ptr + at, mask=ok, other=0.0)
        l_j = tl.load(l_ptr + at, mask=ok, other=1.0)
        s_j = tl.load(s_ptr + at, mask=ok, other=0.0)
        m_new = tl.maximum(m, m_j)
        old, new = tl.exp2(m - m_new), tl.exp2(m_j - m_new)
        s = (s + l * (m - m_new)) * old + (s_j + l_j * (m_j - m_new)) * new
        l = l * old + l_j * new
        m = m_new
        _, _, u2, _ = tl.philox(seed, row, step, zero + split * TILES, zero)
        accept = uniform(u2) * l < l_j * new
        z = tl.where(accept, tl.load(z_ptr + at, mask=ok, other=0.0), z)
        token = tl.where(accept, tl.load(token_ptr + at, mask=ok, other=0), token)
    tl.store(out_ptr + n, token.to(tl.int64), mask=ok)
    tl.store(logp_ptr + n, (z - m - tl.log2(l)) * LN2, mask=ok)
    tl.store(entropy_ptr + n, (tl.log2(l) - s / l) * LN2, mask=ok)


# ---- Configurations and launches -----------------------------------------------------------------
def config(D: int, dtype: torch.dtype) -> dict:
    """Tile shapes, from a fixed table instead of a search at run time. No register spills on sm_80
    and sm_90. Older GPUs and consumer cards get shapes that fit in 99 KB of shared memory."""
    if dtype.itemsize > 2:  # float32: three tensor-core products each, so smaller tiles
        return dict(D0=0, D1=0, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2)
    if D > (384 if hopper() else 256):  # streamed
        return dict(D0=0, D1=0, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    D0 = max(16, 1 << D.bit_length() - 1)
    D1 = max(16, triton.next_power_of_2(D - D0)) if D > D0 else 0
    # 1 tile of W in flight where, with 2, only one program would fit on a multiprocessor
    stages = 1 if hopper() and 192 < D0 + D1 <= 256 else 2
    BLOCK_M, warps = (128, 8) if hopper() else (64, 4)
    return dict(D0=D0, D1=D1, BLOCK_M=BLOCK_M, BLOCK_N=64, BLOCK_K=64, num_warps=warps,
                num_stages=stages)


class LinearLogprob(torch.autograd.Function):
    """hidden (B, T, D), weight (V, D), target (B, T) -> logp, entropy (B, T). The backward pass
    needs only the inputs and 4 bytes per row."""

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature):
        (B, T, D), V = hidden.shape, len(weight)
        acc = torch.promote_types(hidden.dtype, torch.float32)
        logp, entropy = (torch.empty(B, T, dtype=acc, device=hidden.device) for _ in range(2))
        c = config(D, hidden.dtype)
        logprob_forward[triton.cdiv(B * T, c["BLOCK_M"]),](
            hidden, weight, target, logp, entropy, B * T, T, *hidden.stride()[:2],
            weight.stride(0), V, D, LOG2E.value / temperature,
            ACC=tl.float64 if acc == torch.float64 else tl.float32, enable_fp_fusion=True, **c)
        ctx.save_for_backward(hidden, weight, target, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an unused output has gradient None
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_entropy):
        """Three products per chunk of rows: the logits again, then dlogits W and dlogits^T hidden.
        No atomics. Zero rows of W and zero columns of dlogits pad V to a multiple of 64, which
        aligns the rows in these products."""
        hidden, weight, target, entropy = ctx.saved_tensors
        (B, T, D), V, N = hidden.shape, len(weight), target.numel()
        g = torch.zeros_like(entropy) if g is None else g.contiguous()
        g_H = g if g_entropy is None else g_entropy.contiguous()
        rows = hidden.reshape(N, D)
        padded = triton.cdiv(V, 64) * 64
        weight = F.pad(weight, (0, 0, 0, padded - V))
        chunk = min(N, max(CHUNK, 2**24 // padded // 128 * 128))  # V = 2,048: 32 MB, within the L2
        buffer = torch.empty(chunk, padded, dtype=hidden.dtype, device=hidden.device)
        d_hidden = torch.empty(N, D, dtype=hidden.dtype, device=hidden.device)
        d_weight = torch.zeros(padded, D, dtype=entropy.dtype, device=hidden.device)
        scales = LOG2E.value / ctx.temperature, 1 / ctx.temperature
        options = dict(ENTROPY=g_entropy is not None, enable_fp_fusion=True,
                       ACC=tl.float64 if entropy.dtype == torch.float64 else tl.float32)
        for first in range(0, N, chunk):
            last = min(first + chunk, N)
            dlogits = buffer[: last - first]
            torch.mm(rows[first:last], weight.T, out=dlogits)
            logprob_backward[triton.cdiv(last - first, 16),](
                target, g, g_H, dlogits, first, last, V, padded, *scales, BLOCK_M=16, BLOCK_N=128,
                num_warps=4, **options)
            torch.mm(dlogits, weight, out=d_hidden[first:last])
            d_weight += dlogits.T @ rows[first:last]
        return d_hidden.view(B, T, D), d_weight[:V].to(weight.dtype), None, None


def linear_logprob(hidden, weight, target, temperature):
    """Like kernels.linear_logprob. A target outside [-1, V) gives NaN; the host need not wait."""
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    h = hidden if hidden.dim() == 3 else hidden.reshape(1, -1, hidden.size(-1))
    logp, entropy = LinearLogprob.apply(h, weight, target.reshape(h.shape[:2]).contiguous(),
                                        temperature)
    return logp.view(target.shape), entropy.view(target.shape)


def sample(hidden, weight, seed, row, step, temperature):
    """Shapes as in kernels.sample; seed and step are one-element integer tensors on the device."""
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    (B, D), V, device = hidden.shape, len(weight), hidden.device
    splits = triton.cdiv(triton.cdiv(V, TILE), SPLIT)
    m, l, s, z = torch.empty(4, splits, B, device=device)
    proposed = torch.empty(splits, B, dtype=torch.int32, device=device)
    token = torch.empty(B, dtype=torch.int64, device=device)
    logp, entropy = torch.empty(2, B, device=device)
    if B:
        c = config(D, hidden.dtype) | dict(BLOCK_N=TILE)
        sample_tiles[triton.cdiv(B, c["BLOCK_M"]) * splits,](
            hidden, weight, row, seed, step, m, l, s, z, proposed, B, hidden.stride(0),
            weight.stride(0), V, D, LOG2E.value / temperature, TILES=SPLIT, enable_fp_fusion=True,
            **c)
        sample_merge[triton.cdiv(B, 128),](
            m, l, s, z, proposed, row, seed, step, token, logp, entropy, B, splits, TILES=SPLIT,
            BLOCK_M=128, num_warps=4, enable_fp_fusion=True)
    return token, logp, entropy
