"""Causal attention in Triton: whole sequences forward and backward, and one new token.

At this project's lengths, attention does little arithmetic on many bytes: T / 4 FLOP per byte in
bf16. That is 16 to 64 for T = 64 to 256, and an H200 needs 184 to be busy. So each kernel below is
built around one question: which bytes must move at all? Per element of q, in 2-byte types:

    forward    read q, k, v, write out                                     8 B
               (materialised scores: 3 to 8 times that)
    backward   read q, k, v, out, dout, write dq, dk, dv                  16 B
               (FlashAttention-2, with its float32 dq accumulator: about 30 B)
    decode     read the filled slots of the cache once; all else is small

All kernels access the packed projection through strides, so nothing is transposed or copied.

A program is one instance of a kernel. It does not loop over the batch: `tl.program_id(0)` says
which (sequence, head, block of rows) it computes. A tile is a 2-D block of numbers that a program
holds in registers. `tl.load(pointers, mask)` fills one; `tl.dot` multiplies two on tensor cores.

The grid has one axis, because the others end at 65,535. Sequences are addressed in 64 bits. Scores
are in base 2: the factor c = log2(e) / sqrt(Dh) is one multiplication, and exp2 is one instruction
where exp is two. `lse2` is log2 of the softmax denominator, sum_j 2^(c s_j).
"""
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton import knobs
from triton.runtime import driver

LOG2E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("tf32x3")  # float32: three tensor-core products, exact to 1e-6


# ---- Tiles ---------------------------------------------------------------------------------------
@triton.jit
def load_rows(ptr, rows, stride, end, Dh: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the vectors at rows < end as a tile (len(rows), BLOCK_D), with zeros elsewhere. The
    sides of tiles are powers of two; masks cut them to the real T and Dh."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < end)[:, None] & (d < Dh)[None, :]
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, rows, stride, end, tile, Dh: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = (rows < end)[:, None] & (d < Dh)[None, :]
    tl.store(ptr + rows[:, None] * stride + d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def scores2(a, b, seen, SCALE: tl.constexpr, ACC: tl.constexpr):
    """c a b^T where `seen`, else -inf. `seen` also hides columns beyond T from all stored rows."""
    s = tl.dot(a, tl.trans(b), out_dtype=ACC, input_precision=PRECISION) * (SCALE * LOG2E)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def absorb(m, l, acc, s, v, ACC: tl.constexpr):
    """One step of the online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867), over a tile of
    scores s with the values v. m is the largest score so far, l = sum 2^(s_j - m), and acc = sum
    2^(s_j - m) v_j. If m rises, the sums so far are rescaled by 2^(m_old - m_new)."""
    m_new = tl.maximum(m, tl.max(s, 1))  # finite: every row sees a column before a hidden one
    rescale = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], out_dtype=ACC, input_precision=PRECISION)
    return m_new, l * rescale + tl.sum(p, 1), acc


# ---- Forward -------------------------------------------------------------------------------------
@triton.jit
def attention_forward(q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, q_b, q_t, q_h, k_b, k_t, k_h,
                      v_b, v_t, v_h, T, H, group, SCALE: tl.constexpr, Dh: tl.constexpr,
                      BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Compute BLOCK rows of one head. q (B, T, H, Dh), k and v (B, T, H / group, Dh) by strides
    (b, t, h); out (B, T, H, Dh), lse2 (B, H, T) contiguous."""
    blocks = tl.cdiv(T, BLOCK)
    head, i = tl.program_id(0) // blocks, tl.program_id(0) % blocks  # neighbours share k, v in L2
    b, h = (head // H).to(tl.int64), head % H
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h // group * k_h
    v_ptr += b * v_b + h // group * v_h
    rows = i * BLOCK + tl.arange(0, BLOCK)
    q = load_rows(q_ptr, rows, q_t, T, Dh, BLOCK_D)
    m = tl.full((BLOCK,), float("-inf"), ACC)
    l = tl.zeros((BLOCK,), ACC)
    acc = tl.zeros((BLOCK, BLOCK_D), ACC)
    for start in range(0, (i + 1) * BLOCK, BLOCK):                   # up to the diagonal
        cols = start + tl.arange(0, BLOCK)
        k = load_rows(k_ptr, cols, k_t, T, Dh, BLOCK_D)
        v = load_rows(v_ptr, cols, v_t, T, Dh, BLOCK_D)
        s = scores2(q, k, rows[:, None] >= cols[None, :], SCALE, ACC)
        m, l, acc = absorb(m, l, acc, s, v, ACC)
    store_rows(out_ptr + (b * T * H + h) * Dh, rows, H * Dh, T, acc / l[:, None], Dh, BLOCK_D)
    tl.store(lse2_ptr + head.to(tl.int64) * T + rows, m + tl.log2(l), mask=rows < T)


# ---- Backward ------------------------------------------------------------------------------------
# P = 2^(c q k^T - lse2), O = P V. With dO given:
# dV = P^T dO   dP = dO V^T   dS = P * (dP - delta)   dQ = dS K / sqrt(Dh)   dK = dS^T Q / sqrt(Dh)
# delta_i = sum_j P_ij dP_ij = dO_i . O_i   (softmax: shifting all scores of a row changes nothing)
# Where P^T or dS^T is the left factor, we compute the transposed tile itself, from s_t = k q^T. It
# takes no extra products, and avoids transposing tiles in registers: that gave wrong gradients on
# Hopper (flash-linear-attention issues 640, 826; triton issues 9433, 11781).
@triton.jit
def attention_backward(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse2_ptr, dq_ptr, dk_ptr, dv_ptr, q_b,
                       q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dq_b, dq_t, dq_h, dk_b, dk_t, dk_h,
                       dv_b, dv_t, dv_h, T, H, group, SCALE: tl.constexpr, Dh: tl.constexpr,
                       BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """The program of block i computes dq of its rows, in a loop over i + 1 tiles of columns. Then
    it takes the same positions as columns and computes dk and dv, in a loop over n - i tiles of
    rows. So all programs do the same work. There are no atomics, so every launch gives the same
    bits. do is (B, T, H, Dh)."""
    kv_heads, blocks = H // group, tl.cdiv(T, BLOCK)
    head, i = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, kv = (head // kv_heads).to(tl.int64), head % kv_heads
    k_ptr += b * k_b + kv * k_h
    v_ptr += b * v_b + kv * v_h
    own = i * BLOCK + tl.arange(0, BLOCK)

    for h in range(kv * group, (kv + 1) * group):
        q = load_rows(q_ptr + b * q_b + h * q_h, own, q_t, T, Dh, BLOCK_D)
        o = load_rows(o_ptr + (b * T * H + h) * Dh, own, H * Dh, T, Dh, BLOCK_D)
        do = load_rows(do_ptr + (b * T * H + h) * Dh, own, H * Dh, T, Dh, BLOCK_D)
        lse2 = tl.load(lse2_ptr + (b * H + h) * T + own, mask=own < T, other=float("inf"))
        delta = tl.sum(do.to(ACC) * o.to(ACC), 1)  # sum P dP would need the whole row
        dq = tl.zeros((BLOCK, BLOCK_D), ACC)
        for start in range(0, (i + 1) * BLOCK, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            k = load_rows(k_ptr, cols, k_t, T, Dh, BLOCK_D)
            v = load_rows(v_ptr, cols, v_t, T, Dh, BLOCK_D)
            s = scores2(q, k, own[:, None] >= cols[None, :], SCALE, ACC)
            p = tl.exp2(s - lse2[:, None])
            dp = tl.dot(do, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
            ds = (p * (dp - delta[:, None]) * SCALE).to(q.dtype)
            dq = tl.dot(ds, k, dq, out_dtype=ACC, input_precision=PRECISION)
        store_rows(dq_ptr + b * dq_b + h * dq_h, own, dq_t, T, dq, Dh, BLOCK_D)

    k = load_rows(k_ptr, own, k_t, T, Dh, BLOCK_D)
    v = load_rows(v_ptr, own, v_t, T, Dh, BLOCK_D)
    dk = tl.zeros((BLOCK, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK, BLOCK_D), ACC)
    for h in range(kv * group, (kv + 1) * group):
        for start in range(i * BLOCK, T, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            lse2 = tl.load(lse2_ptr + (b * H + h) * T + rows, mask=rows < T, other=float("inf"))
            q = load_rows(q_ptr + b * q_b + h * q_h, rows, q_t, T, Dh, BLOCK_D)
            s_t = scores2(k, q, rows[None, :] >= own[:, None], SCALE, ACC)
            p_t = tl.exp2(s_t - lse2[None, :])
            do = load_rows(do_ptr + (b * T * H + h) * Dh, rows, H * Dh, T, Dh, BLOCK_D)
            dv = tl.dot(p_t.to(do.dtype), do, dv, out_dtype=ACC, input_precision=PRECISION)
            o = load_rows(o_ptr + (b * T * H + h) * Dh, rows, H * Dh, T, Dh, BLOCK_D)
            delta = tl.sum(do.to(ACC) * o.to(ACC), 1)
            dp_t = tl.dot(v, tl.trans(do), out_dtype=ACC, input_precision=PRECISION)
            ds_t = (p_t * (dp_t - delta[None, :]) * SCALE).to(q.dtype)
            dk = tl.dot(ds_t, q, dk, out_dtype=ACC, input_precision=PRECISION)
    store_rows(dk_ptr + b * dk_b + kv * dk_h, own, dk_t, T, dk, Dh, BLOCK_D)
    store_rows(dv_ptr + b * dv_b + kv * dv_h, own, dv_t, T, dv, Dh, BLOCK_D)


# ---- One new token -------------------------------------------------------------------------------
@triton.jit
def load_rotated(ptr, rows, stride, end, cos_ptr, sin_ptr, Dh: tl.constexpr, BLOCK_D: tl.constexpr,
                 ACC: tl.constexpr):
    """Like load_rows, and turn the rows by the angles of one position, cos and sin (Dh,):
    y_i = x_i cos_i + x_(i +- Dh/2) sin_i, where the second half of sin is negated."""
    x = load_rows(ptr, rows, stride, end, Dh, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    other = tl.where(d < Dh // 2, d + Dh // 2, d - Dh // 2)
    mask = (rows < end)[:, None] & (d < Dh)[None, :]
    partner = tl.load(ptr + rows[:, None] * stride + other[None, :], mask=mask, other=0.0)
    cos = tl.load(cos_ptr + d, mask=d < Dh, other=0.0).to(ACC)[None, :]
    sin = tl.load(sin_ptr + d, mask=d < Dh, other=0.0).to(ACC)[None, :]
    return (x.to(ACC) * cos + partner.to(ACC) * sin).to(x.dtype)


@triton.jit(do_not_specialize_on_alignment=["pos_ptr"])  # it may point at any element of a range
def decode_forward(q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, pos_ptr, cos_ptr, sin_ptr,
                   out_ptr, q_b, q_h, k_b, k_h, v_b, v_h, kc_b, kc_h, vc_b, vc_h, T_max, kv_heads,
                   group, SCALE: tl.constexpr, Dh: tl.constexpr, BLOCK_G: tl.constexpr,
                   BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Compute all query heads of one (sequence, key-value head), with one read of its cache. First
    turn queries and key by row `pos` of cos and sin (T, Dh).

    The new key and value start the online softmax from registers, and are also stored to slot
    `pos`. So no program waits for another's store. `pos` is read from memory, so a captured CUDA
    graph can replay this launch at every step. The group is padded to the 16 rows of a tensor-core
    instruction. Padding moves no bytes, and this kernel spends its time moving bytes.
    """
    b, kv = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    pos = tl.load(pos_ptr).to(tl.int32)
    k_cache_ptr += b * kc_b + kv * kc_h
    v_cache_ptr += b * vc_b + kv * vc_h
    one = tl.arange(0, 1)
    cos_ptr += pos * Dh
    sin_ptr += pos * Dh
    k_new = load_rotated(k_ptr + b * k_b + kv * k_h, one, 0, 1, cos_ptr, sin_ptr, Dh, BLOCK_D, ACC)
    v_new = load_rows(v_ptr + b * v_b + kv * v_h, one, 0, 1, Dh, BLOCK_D)
    store_rows(k_cache_ptr, pos + one, Dh, T_max, k_new, Dh, BLOCK_D)
    store_rows(v_cache_ptr, pos + one, Dh, T_max, v_new, Dh, BLOCK_D)

    heads = tl.arange(0, BLOCK_G)
    q = load_rotated(q_ptr + b * q_b + kv * group * q_h, heads, q_h, group, cos_ptr, sin_ptr, Dh,
                     BLOCK_D, ACC)
    m = tl.sum(q.to(ACC) * k_new.to(ACC), 1) * (SCALE * LOG2E)
    l = tl.full((BLOCK_G,), 1, ACC)
    acc = tl.zeros((BLOCK_G, BLOCK_D), ACC) + v_new.to(ACC)
    for start in range(0, pos, BLOCK_T):
        slots = start + tl.arange(0, BLOCK_T)
        k = load_rows(k_cache_ptr, slots, Dh, pos, Dh, BLOCK_D)
        v = load_rows(v_cache_ptr, slots, Dh, pos, Dh, BLOCK_D)
        s = scores2(q, k, (slots < pos)[None, :], SCALE, ACC)
        m, l, acc = absorb(m, l, acc, s, v, ACC)
    out_ptr += (b * kv_heads + kv) * group * Dh
    store_rows(out_ptr, heads, Dh, group, acc / l[:, None], Dh, BLOCK_D)


# ---- Configurations and launches -----------------------------------------------------------------
FORWARD = DECODE = dict(num_warps=4, num_stages=2)


def hopper() -> bool:
    """Whether this GPU gives one program 227 KB of shared memory."""
    if knobs.runtime.interpret:
        return True
    target = driver.active.get_current_target()
    return target.backend == "cuda" and 90 <= target.arch < 120  # 120: consumer cards, 99 KB again


def backward_config(Dh: int, dtype: torch.dtype) -> tuple[int, int]:
    """-> side of a tile, warps. A fixed table, not a search at run time: the largest tiles without
    register spills on sm_80 and sm_90 (tests/compile_only.py checks). num_stages stays 1. With 2
    stages and a 128-wide tile in 4 warps, Triton 3.6 and later reportedly crash on Hopper in such a
    backward (triton issue 10573)."""
    BLOCK_D = max(16, triton.next_power_of_2(Dh))
    if dtype.itemsize > 2:  # float32: three products for one, and numbers twice the size
        return 16, max(4, BLOCK_D // 16)
    return (64, 4) if BLOCK_D <= 32 or BLOCK_D == 64 and hopper() else (32, BLOCK_D // 16)


def shared(Dh: int, dtype: torch.dtype) -> dict:
    """Arguments of every launch. FP fusion is explicit, because Triton's default changes."""
    return dict(SCALE=Dh**-0.5, Dh=Dh, BLOCK_D=max(16, triton.next_power_of_2(Dh)),
                ACC=tl.float64 if dtype == torch.float64 else tl.float32, enable_fp_fusion=True)


class Attention(torch.autograd.Function):
    """q (B, T, H, Dh), k and v (B, T, Hkv, Dh) -> (B, T, H Dh)."""

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        B, T, H, Dh = q.shape
        out = torch.empty(B, T, H * Dh, dtype=q.dtype, device=q.device)
        acc = torch.promote_types(q.dtype, torch.float32)
        lse2 = torch.empty(B, H, T, dtype=acc, device=q.device)
        block = min(64 if q.element_size() == 2 else 32, max(16, triton.next_power_of_2(T)))
        if q.numel():
            attention_forward[B * H * triton.cdiv(T, block),](
                q, k, v, out, lse2, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                T, H, H // k.size(2), BLOCK=block, **FORWARD, **shared(Dh, q.dtype))
        ctx.save_for_backward(q, k, v, lse2, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, lse2, out = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        B, T, H, Dh = q.shape
        strides = [s for x in (q, k, v, dq, dk, dv) for s in x.stride()[:3]]
        block, warps = backward_config(Dh, q.dtype)
        if q.numel():
            attention_backward[B * k.size(2) * triton.cdiv(T, block),](
                q, k, v, out, do.contiguous(), lse2, dq, dk, dv, *strides, T, H, H // k.size(2),
                BLOCK=block, num_warps=warps, num_stages=1, **shared(Dh, q.dtype))
        return dq, dk, dv


def decode_attention(q, k, v, k_cache, v_cache, pos, angles):
    """Shapes as in kernels.decode_attention; pos is a one-element integer tensor on the device."""
    (B, H, Dh), (Hkv, T_max) = q.shape, k_cache.shape[1:3]
    if k_cache.stride()[2:] != (Dh, 1) or v_cache.stride()[2:] != (Dh, 1):
        raise ValueError("each (Tmax, Dh) of a cache must be contiguous")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(B, H * Dh, dtype=q.dtype, device=q.device)
    if B:
        decode_forward[B * Hkv,](
            q, k, v, k_cache, v_cache, pos, *angles, out, *q.stride()[:2], *k.stride()[:2],
            *v.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2], T_max, Hkv, H // Hkv,
            BLOCK_G=max(16, triton.next_power_of_2(H // Hkv)),
            BLOCK_T=64 if q.element_size() == 2 else 16, **DECODE, **shared(Dh, q.dtype))
    return out
