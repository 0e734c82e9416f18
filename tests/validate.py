"""Launches one kernel once, in 16 bits, for the validator of ttsem.

The validator checks that no pass of Triton's compiler changes what the kernel computes. KERNEL
names the kernel; docs/kernels.md has the command.
"""
import os

import torch

from kernels import triton_attention, triton_elementwise, triton_head


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float16, device="cpu")


def backward_of(T: int) -> None:
    """attention_backward, 6 query heads and one key-value head, without the forward's launch."""
    q, k, v = (randn(1, T, heads, 64) for heads in (6, 1, 1))
    out, lse2 = randn(1, T, 384), torch.zeros(1, 6, T, device="cpu")
    context = type("", (), {"saved_tensors": (q, k, v, lse2, out)})
    triton_attention.Attention.backward.__wrapped__(context, randn(1, T, 384))


def head_backward() -> None:
    hidden, weight = randn(32, 64), randn(129, 64)
    target = torch.zeros(32, dtype=torch.long, device="cpu")
    context = type("", (), {"saved_tensors": (hidden, weight, target)})
    triton_head.LinearLogprob.backward.__wrapped__(context, torch.ones(32))


KERNELS = {
    "attention_forward": lambda: triton_attention.Attention.apply(
        *(randn(1, 64, heads, 64) for heads in (6, 1, 1))),
    "attention_backward_64": lambda: backward_of(64),
    "attention_backward_128": lambda: backward_of(128),
    "decode": lambda: triton_attention.decode_attention(
        *(randn(2, heads, 64) for heads in (6, 1, 1)), randn(2, 1, 66, 64), randn(2, 1, 66, 64),
        torch.tensor(65, device="cpu"), (randn(66, 1, 64), randn(66, 1, 64))),
    "logprob_forward": lambda: triton_head.linear_logprob(
        randn(32, 192), randn(129, 192), torch.zeros(32, dtype=torch.long, device="cpu")),
    "logprob_backward": head_backward,
    "sample": lambda: triton_head.sample(
        randn(32, 192), randn(129, 192), torch.tensor(3, dtype=torch.uint64), torch.arange(32),
        torch.tensor(5)),
    "squared_relu": lambda: triton_elementwise.SquaredReLU.apply(randn(2, 64, 384))}


def main() -> None:
    torch.manual_seed(0)
    KERNELS[os.environ["KERNEL"]]()
