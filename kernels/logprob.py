"""Log-probability of the target and entropy of the distribution, without storing the logits.

    z = hidden W^T / tau        logp = z_target - LSE(z)        H = -sum_j p_j log p_j

Eager PyTorch writes the (N, V) logits, their float copy and their log-softmax to memory and keeps
them for the backward pass. We compute `CHUNK` rows at a time and reduce them while they are in
cache. If a gradient is wanted, we keep the probabilities, in the dtype of `hidden`. That is 2 N V
bytes in 16 bits, or 134 MB for N = 16,384 and V = 4,096. With upstream gradients g = dL/dlogp and
g_H = dL/dH (`g_entropy`),

    dL/dz_j = g (1[j = target] - p_j) - g_H p_j (log p_j + H)

and the rest is two matrix products. The softmax is computed in float32 (float64 for float64 input).
On a GPU, triton_head.py computes the same without keeping the probabilities. Recomputing them takes
a third product. That pays on a GPU, but on a CPU it costs more than it saves.
"""
import torch
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton

CHUNK = 512  # rows; 512 x 4,096 float32 numbers are 8 MB


def softmax(hidden: torch.Tensor, weight: torch.Tensor,
            temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits z (N, V) = hidden @ weight.T / temperature, p (N, V) = softmax(z), at least float32,
    and LSE(z) (N,). LSE needs only each row's largest entry; log p would take a second pass."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden @ weight.T
    z = z if temperature == 1 else z.to(wide).div_(temperature)
    p = torch.softmax(z, -1, dtype=wide)
    return z, p, z.amax(-1).to(wide) - p.amax(-1).log()


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, want_entropy, keep):
        logp, entropy, kept = [], [], []
        for h, t in zip(hidden.split(CHUNK), target.split(CHUNK)):
            z, p, lse = softmax(h, weight, temperature)
            logp.append(z.gather(1, t.clamp_min(0)[:, None])[:, 0] - lse)
            if want_entropy:  # LSE - sum p z loses digits: 50 - 49.99 for an entropy of 0.01
                entropy.append(torch.special.entr(p).sum(-1))
            if keep:
                kept.append(p.to(hidden.dtype))
        ignored = target < 0
        logp = torch.cat(logp).masked_fill_(ignored, 0)
        entropy = torch.cat(entropy).masked_fill_(ignored, 0) if want_entropy else None
        ctx.save_for_backward(hidden, weight, target, logp, entropy, *kept)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an output that the loss does not use has gradient None
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_entropy):
        hidden, weight, target, logp, entropy, *kept = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=logp.dtype)
        scale = (target >= 0).to(logp.dtype) / ctx.temperature
        p_target = logp.exp()
        g = torch.zeros_like(logp) if g is None else g * scale
        factor = g
        if g_entropy is not None:
            g_entropy = g_entropy * scale
            factor = g + g_entropy * entropy
        # the target needs its unrounded probability: with p near 1, 1 - p would lose all digits
        at_target = g - p_target * factor
        if g_entropy is not None:
            at_target += g_entropy * torch.special.entr(p_target)
        for i, p in zip(range(0, len(hidden), CHUNK), kept):
            rows = slice(i, i + CHUNK)
            dz = torch.mul(p, -factor[rows, None], out=torch.empty_like(p))
            if g_entropy is not None:
                dz += torch.special.entr(p) * g_entropy[rows, None].to(p.dtype)
            columns = target[rows, None].clamp_min(0)
            dz.scatter_(1, columns, at_target[rows, None].to(p.dtype))
            torch.mm(dz, weight, out=d_hidden[rows])
            d_weight += dz.T @ hidden[rows]
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor,
                   temperature: float = 1.0, backend: str = "auto",
                   entropy: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob (nats) of target and entropy (nats) under softmax(hidden @ weight.T / temperature).

    hidden (..., D), weight (V, D), target (...) int64 in [0, V) or -1 = ignored (both results 0,
    no gradient) -> logp (...), entropy (...), at least float32. entropy=False returns None for it,
    and saves the work on a CPU. Differentiable in hidden and weight. On a GPU the forward pass
    takes a slice of hidden (B, T, D) along T without a copy. Raises ValueError if shapes do not fit
    or a target is outside [-1, V). On a GPU such a target gives a log-prob of NaN instead, because
    a check would make the host wait.
    """
    if hidden.shape[:-1] != target.shape or hidden.size(-1) != weight.size(-1) or \
            hidden.dtype != weight.dtype or not temperature > 0:
        raise ValueError(f"hidden {tuple(hidden.shape)} {hidden.dtype}, weight "
                         f"{tuple(weight.shape)} {weight.dtype}, target {tuple(target.shape)}, "
                         f"temperature {temperature} do not fit")
    if not target.numel():
        wide = torch.promote_types(hidden.dtype, torch.float32)
        empty = (hidden.sum(-1) + weight.sum() * 0).to(wide)
        return empty, empty if entropy else None
    if use_triton(backend, hidden, "logprob"):
        from kernels.triton_head import linear_logprob as fused
        with torch.cuda.device_of(hidden):
            logp, H = fused(hidden, weight, target, temperature)  # always computes both
        return logp, H if entropy else None
    if not -1 <= int(target.min()) <= int(target.max()) < len(weight):
        raise ValueError(f"targets {int(target.min())}..{int(target.max())}, V = {len(weight)}")
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    logp, H = LinearLogprob.apply(hidden.flatten(0, -2), weight, target.flatten(), temperature,
                                  entropy, keep)
    return logp.view(target.shape), H.view(target.shape) if entropy else None
