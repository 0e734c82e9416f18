"""The sampling loop of `GPT.draw` for a GPU: one step, captured as a CUDA graph and replayed.

A step of a small model is about a hundred kernels of a few microseconds. Launching them from Python
takes longer than running them. A CUDA graph launches all of them with one call, if no number in a
step comes from the host or goes to it. So a step reads position, seed and row numbers from GPU
memory and leaves tokens and log-probs there. We copy the weights into place before each rollout, so
one graph serves a whole run. On a CPU the tests run the same step without a graph.

This file holds the buffers and the graph. It captures the model's own `step`, so a changed model is
sampled correctly too.
"""
import copy
import gc

import torch

from kernels.backend import use_triton
from kernels.sample import sample


def can_capture(model) -> bool:
    """Whether `model` can be captured. PyTorch's paths cannot: the host reads the position."""
    on_triton = all(use_triton("auto", model.head, family)
                    for family in ("attention", "sample", "decoder"))
    return on_triton and model.config.d_model // model.config.n_head <= 128


decoders: dict = {}  # by shape: one decoder serves all models of that shape


def decoder_for(model, batch: int, longest_prompt: int, length: int) -> "Decoder":
    """A decoder for these shapes, loaded with the model's current weights."""
    shape = (type(model), *vars(model.config).values(), batch, longest_prompt, length, model.dtype,
             model.head.device)
    if shape not in decoders:
        if len(decoders) == 2:  # keep at most two: each holds a KV cache
            decoders.pop(next(iter(decoders)))
        decoders[shape] = Decoder(model, batch, longest_prompt, length)
    decoder = decoders[shape]
    torch._foreach_copy_(list(decoder.model.parameters()), list(model.parameters()))
    return decoder


class Decoder:
    """The buffers of a rollout, and a step that draws the next token of every row."""

    def __init__(self, model, batch: int, longest_prompt: int, length: int):
        T, device = longest_prompt + length, model.head.device
        self.model = copy.deepcopy(model).to(model.dtype)
        self.angles = model.angles(T)
        self.cache = model.empty_cache(batch, T)
        self.prompt = torch.full((T, batch), -1, device=device)
        self.rows = torch.zeros(batch, dtype=torch.long, device=device)
        self.seed = torch.zeros(1, dtype=torch.uint64, device=device)
        self.pos = torch.zeros(1, dtype=torch.long, device=device)
        self.token = torch.zeros(batch, dtype=torch.long, device=device)
        self.tokens = torch.zeros(T, batch, dtype=torch.long, device=device)
        self.logps = torch.zeros(T, batch, device=device)
        if can_capture(model):
            self.capture()

    def step(self) -> None:
        h = self.model.step(self.token, self.angles, self.cache, self.pos)      # (B, D)
        weight = self.model.unembed()
        token, logp = sample(h, weight, self.seed, self.rows, self.pos)
        given = self.prompt.index_select(0, self.pos)[0]
        token = torch.where(given >= 0, given, token)
        self.token.copy_(token)
        self.tokens.index_copy_(0, self.pos, token[None])
        self.logps.index_copy_(0, self.pos, logp[None])
        self.pos += 1

    def capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()  # compile the kernels first: a capture cannot
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        gc.disable()     # collecting a kernel would unload its module and abort the capture
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.step()
        finally:
            gc.enable()
        self.step = graph.replay

    def draw(self, numbers: torch.Tensor, prompt: torch.Tensor, length: int,
             seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `GPT.draw`, for at most `batch` rows. Spare rows are drawn too, then dropped."""
        B, P = prompt.shape
        self.rows[:B] = numbers
        self.prompt[:P, :B] = prompt.T
        self.seed.copy_(torch.tensor([seed], dtype=torch.uint64))
        self.token.fill_(self.model.bos)
        self.pos.zero_()
        for _ in range(P + length):
            self.step()
        return self.tokens.T[:B].clone(), self.logps.T[:B].clone()
