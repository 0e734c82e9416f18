"""The operations where a language model spends its time, each behind one public function.

    attention         causal self-attention over whole sequences  (training and scoring)
    decode_attention  one new token against a KV cache            (rollouts)
    linear_logprob    hidden @ W.T -> log-prob of the target      (training and scoring)
    sample            hidden @ W.T -> a drawn token, its log-prob (rollouts)
    squared_relu      max(x, 0)^2                                 (the MLP)
    rotate            rotary positions                            (queries and keys)

With `backend="auto"`, the default, all run Triton kernels on a GPU and PyTorch elsewhere. The
kernels are in triton_attention.py, triton_head.py and triton_elementwise.py. decoder.py captures a
rollout step as a CUDA graph. `python -m benchmarks.kernels` times all against the alternatives.
"""
from kernels.attention import attention, decode_attention
from kernels.elementwise import rotate, squared_relu
from kernels.logprob import linear_logprob
from kernels.sample import sample

__all__ = ["attention", "decode_attention", "linear_logprob", "rotate", "sample", "squared_relu"]
