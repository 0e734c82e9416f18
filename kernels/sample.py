"""Draw one token per row from softmax(hidden W^T), with its log-prob.

Noise is counter-based: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") maps (seed, row, step) to a uniform number without any state. So sample 17 of seed 3 has
the same tokens in any batch, and a killed run can go on without a saved generator state.

The CPU path inverts the CDF with one uniform per row. A Gumbel race would need one per logit. The
Triton path (triton_head.py) needs one pass over the vocabulary and two uniforms per tile. It draws
different tokens from the same distribution.
"""
import torch

from kernels.backend import use_triton
from kernels.logprob import softmax

_M0, _M1, _W0, _W1, _LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox_uniform(seed: int, row: torch.Tensor, step: int) -> torch.Tensor:
    """Map row (B,), int64 in [0, 2^32), to float64 uniforms (B,) in (0, 1), 2^-32 apart.

    Philox4x32-10 with key = seed (64 bits), counter = (row, step, 0, 0); first output word.
    """
    def mul_hi_lo(m, x):  # the 64-bit product in 16-bit steps: int64 has no room for its top bit
        low, high = m * (x & 0xFFFF), m * (x >> 16)
        return high + (low >> 16) >> 16, (high << 16) + low & _LOW

    c0, c1 = row & _LOW, torch.full_like(row, step & _LOW)
    c2, c3 = torch.zeros_like(row), torch.zeros_like(row)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = mul_hi_lo(_M0, c0), mul_hi_lo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return (c0.double() + 0.5) * 2.0**-32


def sample(hidden: torch.Tensor, weight: torch.Tensor, seed: int | torch.Tensor, row: torch.Tensor,
           step: int | torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row. hidden (B, D), weight (V, D), row (B,) int64 global sample numbers;
    seed, step (position in the sample): integers, or one-element integer tensors on the GPU
    -> token (B,) int64 and its log-prob (B,), nats. No gradient. Raises ValueError if shapes do
    not fit."""
    if hidden.size(-1) != weight.size(-1) or row.shape != hidden.shape[:1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, row "
                         f"{tuple(row.shape)} do not fit")
    if use_triton(backend, hidden, "sample"):
        from kernels.triton_head import sample as fused
        if not torch.is_tensor(seed):
            seed = torch.tensor(seed, dtype=torch.uint64, device=hidden.device)
        step = torch.as_tensor(step, device=hidden.device)
        with torch.cuda.device_of(hidden):
            return fused(hidden, weight, seed, row.contiguous(), step)
    seed, step = int(seed), int(step)
    z, p, lse = softmax(hidden, weight)                             # (B, V), (B, V), (B,)
    cdf = p.cumsum_(-1)
    # scale by the last entry of the CDF, so that rounding never puts u beyond the end
    u = philox_uniform(seed, row, step).to(cdf.dtype) * cdf[:, -1]
    token = torch.searchsorted(cdf, u[:, None]).clamp_max_(len(weight) - 1)
    return token[:, 0], z.gather(1, token)[:, 0] - lse
