"""Causal attention: whole sequences (training, scoring) and one new token (rollouts).

    S = Q K^T / sqrt(Dh),   P = softmax(S where column <= row, else -inf),   O = P V

At T <= 256 the scores of one head stay in a CPU's cache. There a masked softmax between two batched
products beats `scaled_dot_product_attention` (SDPA), whose backward recomputes the scores in
blocks. Longer sequences go to SDPA, which never stores S. On a GPU both functions run the Triton
kernels in triton_attention.py.

Grouped-query heads (Ainslie et al. 2023, arXiv:2305.13245): H query heads share Hkv <= H key and
value heads. We stack the queries of one group along the time axis. So K and V are read once for
the whole group and never copied.
"""
from functools import lru_cache

import torch
import torch.nn.functional as F

from kernels.backend import use_triton
from kernels.elementwise import rotate

DENSE_UP_TO = 256  # longest T for which the (T, T) scores are materialised


@lru_cache(maxsize=8)
def causal_mask(T: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(T, T): 0 where column <= row, -inf above the diagonal. Added to the scores."""
    with torch.inference_mode(False):  # a cached inference tensor could not enter autograd later
        return torch.full((T, T), float("-inf"), dtype=dtype, device=device).triu(1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              backend: str = "auto") -> torch.Tensor:
    """Causal attention. q (B, T, H, Dh); k, v (B, T, Hkv, Dh), H % Hkv == 0 -> (B, T, H * Dh).

    q, k, v may be strided views of one projection. Differentiable. Vaswani et al. 2017,
    arXiv:1706.03762, section 3.2.1. Raises ValueError if shapes or dtypes do not fit, or if the
    backend is not available.
    """
    B, T, H, Dh = q.shape
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.size(3) != Dh or H % max(k.size(2), 1):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}")
    if use_triton(backend if Dh <= 128 else "torch", q, "attention"):  # wider heads are untested
        from kernels.triton_attention import Attention
        with torch.cuda.device_of(q):
            return Attention.apply(q, k, v)
    Hkv, G = k.size(2), H // k.size(2)
    if T > DENSE_UP_TO or q.is_cuda:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G > 1)
        return out.transpose(1, 2).reshape(B, T, H * Dh)
    q = q.view(B, T, Hkv, G, Dh).permute(0, 2, 3, 1, 4).reshape(B * Hkv, G * T, Dh)
    k, v = (x.transpose(1, 2).reshape(B * Hkv, T, Dh) for x in (k, v))
    mask = causal_mask(T, q.dtype, q.device).repeat(G, 1)           # (G T, T)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=Dh**-0.5)
    out = torch.bmm(scores.softmax(-1), v)                          # (B Hkv, G T, Dh)
    return out.view(B, H, T, Dh).transpose(1, 2).reshape(B, T, H * Dh)


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor,
                     v_cache: torch.Tensor, pos: int | torch.Tensor,
                     angles: tuple[torch.Tensor, torch.Tensor],
                     backend: str = "auto") -> torch.Tensor:
    """Compute attention for one new token per sequence, and append its key and value to the cache.

    q (B, H, Dh); k, v (B, Hkv, Dh); k_cache, v_cache (B, Hkv, Tmax, Dh) with slots [0, pos) filled;
    0 <= pos < Tmax; angles: cos and sin (T, 1, Dh) of all positions -> (B, H * Dh). Rotates q and k
    by the angles of `pos`, and writes slot `pos` of both caches in place. Equals row `pos` of
    `attention` over the whole rotated sequence. pos may be a one-element integer tensor on the GPU,
    so the host need not wait. No gradient. Raises ValueError if shapes do not fit.

    PyTorch path: the products run over the whole cache and a mask hides the slots after `pos`, so
    these must be finite. Slicing would halve the arithmetic. But the batched product would first
    copy both slices, which costs more than it saves.
    """
    (B, H, Dh), (Hkv, Tmax) = q.shape, k_cache.shape[1:3]
    if k_cache.shape != v_cache.shape or k_cache.shape != (B, Hkv, Tmax, Dh) or \
            k.shape != v.shape or k.shape != (B, Hkv, Dh) or H % Hkv:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, caches "
                         f"{tuple(k_cache.shape)}, {tuple(v_cache.shape)} do not fit")
    if use_triton(backend if Dh <= 128 else "torch", q, "attention"):
        from kernels.triton_attention import decode_attention as decode
        with torch.cuda.device_of(q):
            return decode(q, k, v, k_cache, v_cache, torch.as_tensor(pos, device=q.device), angles)
    pos = int(pos)
    q, k = (rotate(x, *(table[pos] for table in angles), backend="torch") for x in (q, k))
    k_cache[:, :, pos] = k
    v_cache[:, :, pos] = v
    keys, values = (x.reshape(B * Hkv, Tmax, Dh) for x in (k_cache, v_cache))
    mask = causal_mask(Tmax, q.dtype, q.device)[pos].expand(H // Hkv, Tmax)
    queries = q.reshape(B * Hkv, H // Hkv, Dh)
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=Dh**-0.5)
    return torch.bmm(scores.softmax(-1), values).view(B, H * Dh)
