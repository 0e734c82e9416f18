"""Log-probability of the target and entropy of the distribution, without keeping the logits.

    z = hidden W^T / tau        logp = z_target - LSE(z)        H = -sum_j p_j log p_j

Eager PyTorch writes the (N, V) logits, their float copy and their log-softmax to memory and keeps
them for the backward pass: at N = 8,192 and V = 2,048 that is 168 MB to obtain 8,192 numbers.
Here `CHUNK` rows at a time are formed, reduced and dropped while they are in cache; the backward
pass forms them again. With upstream gradients g = dL/dlogp and h = dL/dH,

    dL/dz_j = g (1[j = target] - p_j) - h p_j (log p_j + H)

and the rest is two matrix products. The soft-max is taken in float32 (float64 for float64 input).
On a GPU the same mathematics is in triton_head.py, where the logits never leave the chip.
"""
import torch
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton

CHUNK = 512  # rows; 512 x 2,048 float32 logits are 4 MB


def log_softmax(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(hidden @ weight.T / temperature), (N, V), at least float32. One pass over each row
    while it is in cache; spelled out as max, subtract, exp, sum it is five over the whole matrix."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden @ weight.T
    return torch.log_softmax(z if temperature == 1 else z.to(wide).div_(temperature), -1, dtype=wide)


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature):
        logp, entropy = [], []
        for h, t in zip(hidden.split(CHUNK), target.split(CHUNK)):
            log_p = log_softmax(h, weight, temperature)             # (chunk, V)
            logp.append(log_p.gather(1, t.clamp_min(0)[:, None])[:, 0])
            # not LSE - sum p z, which cancels: two numbers of 50 for an entropy of 0.01
            entropy.append(-torch.linalg.vecdot(log_p.exp(), log_p))
        logp, entropy, ignored = torch.cat(logp), torch.cat(entropy), target < 0
        ctx.save_for_backward(hidden, weight, target, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an output that the loss does not use has gradient None
        return logp.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h):
        hidden, weight, target, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=entropy.dtype)
        kept = (target >= 0).to(entropy.dtype)
        g = kept * 0 if g is None else g * kept
        for i in range(0, len(hidden), CHUNK):
            rows = slice(i, i + CHUNK)
            log_p = log_softmax(hidden[rows], weight, ctx.temperature)
            if h is None:
                dz = log_p.exp_().mul_(-g[rows, None])
            else:
                factor = (log_p + entropy[rows, None]).mul_(-(h * kept)[rows, None]).sub_(g[rows, None])
                dz = log_p.exp_().mul_(factor)
            dz.scatter_add_(1, target[rows, None].clamp_min(0), g[rows, None])
            if ctx.temperature != 1:
                dz.div_(ctx.temperature)
            dz = dz.to(hidden.dtype)
            d_hidden[rows] = dz @ weight
            d_weight += dz.T @ hidden[rows]
        return d_hidden, d_weight.to(weight.dtype), None, None


def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor,
                   temperature: float = 1.0, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob (nats) of target and entropy (nats) under softmax(hidden @ weight.T / temperature).

    hidden (..., D), weight (V, D), target (...) int64 in [0, V) or -1 = ignored (both results 0,
    no gradient) -> logp (...), entropy (...), at least float32. Differentiable in hidden and
    weight. A slice of hidden (B, T, D) along T needs no copy on a GPU. Raises ValueError if shapes
    do not fit or a target is outside [-1, V); on a GPU, where looking would make the host wait,
    such a target gives a log-prob of NaN instead.
    """
    if hidden.shape[:-1] != target.shape or hidden.size(-1) != weight.size(-1) or \
            hidden.dtype != weight.dtype or not temperature > 0:
        raise ValueError(f"hidden {tuple(hidden.shape)} {hidden.dtype}, weight {tuple(weight.shape)} "
                         f"{weight.dtype}, target {tuple(target.shape)}, temperature {temperature} do not fit")
    if not target.numel():
        empty = (hidden.sum(-1) + weight.sum() * 0).to(torch.promote_types(hidden.dtype, torch.float32))
        return empty, empty
    if use_triton(backend, hidden):
        from kernels.triton_head import linear_logprob as fused
        return fused(hidden, weight, target, temperature)
    if not -1 <= int(target.min()) <= int(target.max()) < len(weight):
        raise ValueError(f"targets {int(target.min())}..{int(target.max())}, V = {len(weight)}")
    logp, entropy = LinearLogprob.apply(hidden.flatten(0, -2), weight, target.flatten(), temperature)
    return logp.view(target.shape), entropy.view(target.shape)
