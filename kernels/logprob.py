"""Log-probability of a target token, without storing the logits.

    z = hidden W^T        logp = z_target - LSE(z)        p = softmax(z)

Eager PyTorch writes the (N, V) logits, their float copy and their log-softmax to memory and keeps
them for the backward pass. We compute `CHUNK` rows at a time and reduce them while they are in
cache. If a gradient is wanted, we keep the probabilities, in the dtype of `hidden`. That is 2 N V
bytes in 16 bits, or 134 MB for N = 16,384 and V = 4,096. With the upstream gradient g = dL/dlogp,

    dL/dz_j = g (1[j = target] - p_j)

and the rest is two matrix products. The softmax is computed in float32 (float64 for float64 input).
On a GPU, triton_head.py computes the same without keeping the probabilities. Recomputing them takes
a third product. That pays on a GPU, but on a CPU it costs more than it saves.
"""
import torch
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton

CHUNK = 512  # rows; 512 x 4,096 float32 numbers are 8 MB


def softmax(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits z (N, V) = hidden @ weight.T, p (N, V) = softmax(z), at least float32, and LSE(z)
    (N,). LSE needs only each row's largest entry; log p would take a second pass."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden @ weight.T
    p = torch.softmax(z, -1, dtype=wide)
    return z, p, z.amax(-1).to(wide) - p.amax(-1).log()


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, keep):
        logp, kept = [], []
        for h, t in zip(hidden.split(CHUNK), target.split(CHUNK)):
            z, p, lse = softmax(h, weight)
            logp.append(z.gather(1, t.clamp_min(0)[:, None])[:, 0] - lse)
            if keep:
                kept.append(p.to(hidden.dtype))
        logp = torch.cat(logp).masked_fill_(target < 0, 0)
        ctx.save_for_backward(hidden, weight, target, logp, *kept)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        hidden, weight, target, logp, *kept = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=logp.dtype)
        g = g.masked_fill(target < 0, 0)
        # the target needs its unrounded probability: with p near 1, 1 - p would lose all digits
        at_target = g - g * logp.exp()
        for i, p in zip(range(0, len(hidden), CHUNK), kept):
            rows = slice(i, i + CHUNK)
            dz = torch.mul(p, -g[rows, None], out=torch.empty_like(p))
            columns = target[rows, None].clamp_min(0)
            dz.scatter_(1, columns, at_target[rows, None].to(p.dtype))
            torch.mm(dz, weight, out=d_hidden[rows])
            d_weight += dz.T @ hidden[rows]
        return d_hidden, d_weight.to(weight.dtype), None, None


def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor,
                   backend: str = "auto") -> torch.Tensor:
    """Log-prob of each target under softmax(hidden @ weight.T), in nats.

    hidden (..., D), weight (V, D), target (...) int64 in [0, V), or -1 = ignored (result 0, no
    gradient) -> logp (...), at least float32. Differentiable in hidden and weight. Raises
    ValueError if shapes do not fit or a target is outside [-1, V). On a GPU such a target gives
    NaN instead, because a check would make the host wait.
    """
    if hidden.shape[:-1] != target.shape or hidden.size(-1) != weight.size(-1) or \
            hidden.dtype != weight.dtype:
        raise ValueError(f"hidden {tuple(hidden.shape)} {hidden.dtype}, weight "
                         f"{tuple(weight.shape)} {weight.dtype}, target {tuple(target.shape)} do "
                         "not fit")
    rows, targets = hidden.flatten(0, -2), target.flatten()                          # (N, D), (N,)
    if not len(rows):
        return hidden.sum(-1).to(torch.promote_types(hidden.dtype, torch.float32))
    if use_triton(backend, hidden, "logprob"):
        from kernels.triton_head import linear_logprob as fused
        with torch.cuda.device_of(hidden):
            return fused(rows, weight, targets).view(target.shape)
    if not -1 <= int(target.min()) <= int(target.max()) < len(weight):
        raise ValueError(f"targets {int(target.min())}..{int(target.max())}, V = {len(weight)}")
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearLogprob.apply(rows, weight, targets, keep).view(target.shape)
