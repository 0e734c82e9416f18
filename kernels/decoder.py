"""The sampling loop of `GPT.draw` for a GPU: one step, captured as a CUDA graph and replayed.

A step of a small model is about a hundred kernels of a few microseconds, and launching them from
Python takes longer than running them. A CUDA graph launches all of them with one call, if no number
in a step comes from the host or goes to it. So a step reads position, seed and row numbers from GPU
memory and leaves tokens and log-probs there. The weights are copied into place before each rollout,
so one graph serves a whole run. On a CPU the tests run the same step without a graph.

`hidden` is `GPT.step` in fewer, larger kernels: with six layers 60 a step instead of 98. The kernel
that reads queries and keys also rotates them, products add to the residual stream directly, and
squared ReLU is one pass. So this file knows the model's layers. A decoder compares the two before
it draws. If you have changed the model, it falls back on the model's own `step`.
"""
import copy
import gc
from functools import partial

import torch
import torch.nn.functional as F

from kernels.attention import decode_attention
from kernels.backend import use_triton
from kernels.elementwise import squared_relu
from kernels.sample import sample


def can_capture(model) -> bool:
    """Whether `model` can be captured. PyTorch's paths cannot: the host reads the position."""
    on_triton = all(use_triton("auto", model.head, family)
                    for family in ("attention", "sample", "decoder"))
    return on_triton and model.config.d_model // model.config.n_head <= 128


decoders: dict = {}  # by shape: one decoder serves all models of that shape


def decoder_for(model, batch: int, longest_prompt: int, length: int) -> "Decoder":
    """A decoder for these shapes, loaded with the model's current weights."""
    shape = (*vars(model.config).values(), batch, longest_prompt, length, model.dtype,
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
        self.cos, self.sin = model.angles(T)
        self.cache = model.empty_cache(batch, T)
        self.prompt = torch.full((T, batch), -1, device=device)
        self.rows = torch.zeros(batch, dtype=torch.long, device=device)
        self.seed = torch.zeros(1, dtype=torch.uint64, device=device)
        self.pos = torch.zeros(1, dtype=torch.long, device=device)
        self.token = torch.zeros(batch, dtype=torch.long, device=device)
        self.tokens = torch.zeros(T, batch, dtype=torch.long, device=device)
        self.logps = torch.zeros(T, batch, device=device)
        self.known = self.knows_the_model()
        if not self.known:
            print("kernels/decoder.py does not know this model: its own step draws, more slowly")
        if can_capture(model):
            self.capture()

    @torch.no_grad()
    def knows_the_model(self) -> bool:
        """Whether `hidden` agrees with the model's own forward pass, up to rounding."""
        n, T = min(8, len(self.token)), len(self.tokens)
        x = torch.arange(n * T, device=self.token.device).view(n, T) % self.model.bos
        theirs = self.model(x).float()                                          # (n, T, D)
        off = []
        for t in range(min(T, 3)):
            self.token[:n] = x[:, t]
            self.pos.fill_(t)
            off.append((self.hidden()[:n].float() - theirs[:, t]).norm() / theirs[:, t].norm())
        return bool(max(off) < 0.05)

    def hidden(self) -> torch.Tensor:
        """The hidden state (B, D) of `token` at `pos`. Writes its keys and values to the cache."""
        c = self.model.config
        H, Hkv = c.n_head, c.n_kv_head
        norm = partial(F.layer_norm, normalized_shape=(c.d_model,))
        h = norm(self.model.embed(self.token))                                  # (B, D)
        for block, cache in zip(self.model.blocks, self.cache):
            qkv = F.linear(norm(h), block.attention.qkv.weight)
            q, k, v = qkv.unflatten(1, (H + 2 * Hkv, -1)).split((H, Hkv, Hkv), 1)  # (B, heads, Dh)
            y = decode_attention(q, k, v, *cache, self.pos, angles=(self.cos, self.sin))
            h.addmm_(y, block.attention.proj.weight.T)
            r = squared_relu(F.linear(norm(h), block.mlp.up.weight))            # (B, 4 D)
            h.addmm_(r, block.mlp.down.weight.T)
        return norm(h)

    def step(self) -> None:
        if self.known:
            h = self.hidden()                                                   # (B, D)
        else:
            cos, sin = (table.index_select(0, self.pos) for table in (self.cos, self.sin))
            h = self.model.step(self.token, cos, sin, self.cache, self.pos)
        weight = self.model.unembed()
        token, logp, _ = sample(h, weight, self.seed, self.rows, self.pos, entropy=False)
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
