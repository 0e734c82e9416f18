"""The transformer that all five stages share, its sampler, and its file format.

A decoder-only transformer (pre-norm, rotary positions, squared-ReLU MLP, no biases) of a size that
a laptop trains in minutes. Attention, log-probs and sampling come from kernels/.

The last three token ids are reserved: start or end of text, happy, sad. What is sampled is one of
the others, so no sample can ever contain one of them.

Shapes: B sequences, T tokens, D = d_model, H query heads, Hkv key and value heads, Dh = D / H.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer

from kernels import attention, decode_attention, linear_logprob, rotate, sample, squared_relu
from kernels.decoder import can_capture, decoder_for
from running import read_tensors, readable, write_tensors

RESERVED = ("<|text|>", "<|happy|>", "<|sad|>")


# ---- The transformer -----------------------------------------------------------------------------
@dataclass
class GPTConfig:
    vocab_size: int  # reserved tokens included
    context: int     # longest sequence it is trained on, tokens
    n_layer: int
    n_head: int
    n_kv_head: int   # key and value heads; each serves n_head / n_kv_head query heads
    d_model: int


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:])  # no learned scale: the next matrix can absorb it


class Linear(nn.Linear):
    """A linear map without bias. Weights stay in float32 for the optimizer; the product runs in
    the dtype of its input. Starts uniform with variance 1 / d_in, or at zero."""

    def __init__(self, d_in: int, d_out: int, zero: bool = False):
        super().__init__(d_in, d_out, bias=False)
        bound = 0.0 if zero else (3 / d_in) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head = c.n_head, c.n_kv_head
        d_head = c.d_model // c.n_head
        self.qkv = Linear(c.d_model, (c.n_head + 2 * c.n_kv_head) * d_head)
        self.proj = Linear(c.d_model, c.d_model, zero=True)  # a block adds nothing at the start

    def forward(self, x, cos, sin, cache=None, pos=0, last_only=False):
        """x (B, T, D) -> (B, T, D), each row attending to itself and the rows before it; or one new
        token x (B, D) at position `pos`, whose key and value are written into the cache of (k, v),
        attending to all there."""
        H, Hkv = self.n_head, self.n_kv_head
        qkv = self.qkv(x).unflatten(-1, (H + 2 * Hkv, -1))           # (B, T, H + 2 Hkv, Dh)
        qk, v = qkv.split((H + Hkv, Hkv), dim=-2)
        q, k = rotate(qk, cos, sin).split((H, Hkv), dim=-2)
        if cache is not None:
            y = decode_attention(q, k, v, *cache, pos)               # (B, D)
        else:
            y = attention(q, k, v)                                   # (B, T, D)
        if last_only:
            y = y[:, -1:]                                            # (B, 1, D)
        return self.proj(y)


class MLP(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.up = Linear(c.d_model, 4 * c.d_model)
        self.down = Linear(4 * c.d_model, c.d_model, zero=True)

    def forward(self, x):
        return self.down(squared_relu(self.up(x)))


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.attention = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, cache=None, pos=0, last_only=False):
        y = self.attention(norm(x), cos, sin, cache, pos, last_only)
        x = (x[:, -1:] if last_only else x) + y
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = c = config
        self.n_text = c.vocab_size - len(RESERVED)  # ids below this are text
        self.bos, self.happy, self.sad = range(self.n_text, c.vocab_size)
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        nn.init.normal_(self.embed.weight)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.head = nn.Parameter(torch.zeros(c.vocab_size, c.d_model))
        self.dtype = torch.float32  # of the activations; `fast_dtype` says what the machine likes

    def angles(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the rotary angles, each (T, 1, Dh), the second half of sin negative."""
        half = self.config.d_model // self.config.n_head // 2
        device = self.head.device
        frequency = 10_000.0 ** (-torch.arange(half, device=device) / half)
        angle = torch.outer(torch.arange(T, device=device), frequency)[:, None]
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        return torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)

    def forward(self, x: torch.Tensor, last_only: bool = False) -> torch.Tensor:
        """Token ids x (B, T) -> hidden states (B, T, D); row t depends on x[:, :t+1] alone.
        last_only: of the last position, (B, 1, D); projection and MLP of the last block run on it
        alone."""
        cos, sin = self.angles(x.size(1))
        h = norm(self.embed(x).to(self.dtype))                       # (B, T, D)
        for block in self.blocks[:-1]:
            h = block(h, cos, sin)
        h = self.blocks[-1](h, cos, sin, last_only=last_only)
        return norm(h)

    def unembed(self) -> torch.Tensor:
        """The rows of the output head that can be sampled: (n_text, D), in the compute dtype."""
        return self.head[: self.n_text].to(self.dtype)

    # ---- Scoring text that is there --------------------------------------------------------------
    def hidden_before(self, y: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Completions y (B, T) -> the hidden states (B, T, D) from which each of its tokens is
        predicted: those of the token before it. prompt (B, P) as in `lay_out`."""
        if prompt is None:
            prompt = y[:, :0]
        x, places = lay_out(y, prompt, self.bos)
        hidden = self(x[:, :-1])                                     # (B, P + T, D)
        if prompt.size(1) == 0:
            return hidden
        return hidden.gather(1, places[..., None].expand(-1, -1, hidden.size(-1)))

    def logprob(self, y: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Completions y (B, T) after prompt (B, P) -> log-prob of each token, (B, T), nats."""
        logp, _ = linear_logprob(self.hidden_before(y, prompt), self.unembed(), y, entropy=False)
        return logp

    def logprob_and_entropy(self, y: torch.Tensor, prompt: torch.Tensor | None = None):
        """The same, and the entropy of the distribution each token was drawn from, (B, T), nats."""
        return linear_logprob(self.hidden_before(y, prompt), self.unembed(), y)

    def sentiment(self, y: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Completions y (B, T) after prompt (B, P) -> (B, 2): log p(happy), log p(sad) after the
        last token of y, the soft-max restricted to the two. Only a reward model has learned to
        predict them."""
        if prompt is None:
            prompt = y[:, :0]
        x, places = lay_out(y, prompt, self.bos)
        if prompt.size(1) == 0:
            last = self(x, last_only=True)[:, 0]                     # (B, D)
        else:
            last = self(x)[torch.arange(len(y)), places[:, -1] + 1]  # (B, D)
        head = self.head[[self.happy, self.sad]].to(self.dtype)      # (2, D), rounded as on disk
        return (last.float() @ head.float().T).log_softmax(-1)

    # ---- Sampling --------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(self, n: int | torch.Tensor, length: int, seed: int, batch: int | None = None,
                 prompts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions at temperature 1 from the whole distribution: those numbered 0 to n - 1, or
        those whose numbers are listed in n; unconditional, or each after its row of prompts (n, P).

        -> tokens (n, length) int64, the sampler's log-probs (n, length) float32, nats. A completion
        depends on weights, seed, number and prompt, not on `batch`, which bounds the cache.
        """
        device = self.head.device
        numbers = n.to(device) if torch.is_tensor(n) else torch.arange(n, device=device)
        if prompts is None:
            prompts = numbers.new_empty(len(numbers), 0)
        batch = min(len(numbers), batch or (8192 if device.type == "cuda" else 1024))
        draw = self.draw
        if can_capture(self):  # on a GPU: the same loop, its step captured once as a CUDA graph
            draw = decoder_for(self, batch, prompts.size(1), length).draw
        tokens, logps = [], []
        for rows, prompt in zip(numbers.split(batch), prompts.to(device).split(batch)):
            token, logp = draw(rows, prompt, length, seed)           # (b, P + length) each
            places = places_of(prompt, length)                       # (b, length)
            tokens.append(token.gather(1, places))
            logps.append(logp.gather(1, places))
        return torch.cat(tokens), torch.cat(logps)

    def draw(self, numbers, prompt, length, seed):
        """One batch of `generate`, token by token -> all tokens after the start token and their
        log-probs, (B, P + length). While a row's prompt lasts, it replaces what is drawn, and the
        log-probs mean nothing."""
        B, P = prompt.shape
        cos, sin = self.angles(P + length)
        cache = self.empty_cache(B, P + length)
        weight = self.unembed()
        token = torch.full_like(numbers, self.bos)
        tokens, logps = [], []
        for t in range(P + length):
            h = self.step(token, cos[t], sin[t], cache, t)           # (B, D)
            token, logp, _ = sample(h, weight, seed, numbers, t, entropy=False)
            if t < P:
                token = torch.where(prompt[:, t] >= 0, prompt[:, t], token)
            tokens.append(token)
            logps.append(logp)
        return torch.stack(tokens, 1), torch.stack(logps, 1)

    def step(self, token, cos, sin, cache, pos):
        """One token a row (B,), which stands at position pos -> the hidden state (B, D) from which
        the next one is drawn. Its keys and values are appended to the cache."""
        h = norm(self.embed(token).to(self.dtype))
        for block, layer_cache in zip(self.blocks, cache):
            h = block(h, cos, sin, layer_cache, pos)
        return norm(h)

    def empty_cache(self, B: int, T: int) -> torch.Tensor:
        """Room for the keys and values of B sequences of T tokens."""
        c = self.config
        shape = (c.n_layer, 2, B, c.n_kv_head, T, c.d_model // c.n_head)
        return torch.zeros(shape, dtype=self.dtype, device=self.head.device)


def places_of(prompt: torch.Tensor, length: int) -> torch.Tensor:
    """prompt (B, P), padded with -1 at its end -> (B, length): for each token of its completion the
    column of what is read (start token, prompt, completion) from which it is predicted."""
    return (prompt >= 0).sum(1, keepdim=True) + torch.arange(length, device=prompt.device)


def lay_out(y: torch.Tensor, prompt: torch.Tensor, bos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Completions y (B, T), prompt (B, P) -> what the model reads, x (B, 1 + P + T), and the places
    (B, T) in x from which the tokens of y are predicted.

        prompt   p   p  -1                 a row whose prompt has two tokens, P = 3
        y        y0  y1  y2
        x        bos p   p   y0  y1  y2  y2    what is left over goes to the end, where a causal
        places           2   3   4             model cannot see it
    """
    start = torch.full_like(y[:, :1], bos)
    places = places_of(prompt, y.size(1))
    x = torch.cat((start, prompt.clamp_min(0), y), 1)
    return x.scatter(1, places + 1, y), places


@torch.no_grad()
def chunked(f, size: int, *tensors: torch.Tensor):
    """Apply f to `size` rows of the tensors at a time, without gradients, and concatenate its
    results, or each of several."""
    rows = zip(*[x.split(size) for x in tensors])
    results = [f(*row) for row in rows]
    if torch.is_tensor(results[0]):
        return torch.cat(results)
    return [torch.cat(parts) for parts in zip(*results)]


def kl_nats(policy: GPT, reference: GPT, y: torch.Tensor, prompt: torch.Tensor):
    """KL(policy || reference) of completions, nats, by two estimators of the same expectation.

    y (B, T), drawn from the policy, after prompt (B, P) ->
    exact (B,): sum_t sum_v p_t(v) log(p_t(v) / q_t(v)), v over the whole vocabulary, where p_t and
    q_t are the two models' next-token distributions before y_t;
    k1 (B,): sum_t log(p_t(y_t) / q_t(y_t)); log p_t(y_t) (B, T); entropy (B, T) of p_t.
    """
    def of_rows(y, hidden_p, hidden_q):
        log_p = torch.log_softmax(hidden_p @ weight_p.T, -1, dtype=torch.float32)    # (8, T, V)
        log_q = torch.log_softmax(hidden_q @ weight_q.T, -1, dtype=torch.float32)    # (8, T, V)
        p = log_p.exp()
        logp = log_p.gather(2, y[..., None])[..., 0]                                 # (8, T)
        logq = log_q.gather(2, y[..., None])[..., 0]                                 # (8, T)
        exact = torch.linalg.vecdot(p, log_p - log_q).double().sum(-1)               # (8,)
        k1 = (logp - logq).double().sum(-1)                                          # (8,)
        return exact, k1, logp, -torch.linalg.vecdot(p, log_p)
    weight_p, weight_q = policy.unembed(), reference.unembed()
    hidden_p = chunked(policy.hidden_before, 256, y, prompt)                         # (B, T, D)
    hidden_q = chunked(reference.hidden_before, 256, y, prompt)
    if y.is_cuda:  # float32 logits, as the kernels have them
        weight_p, weight_q = weight_p.float(), weight_q.float()
        hidden_p, hidden_q = hidden_p.float(), hidden_q.float()
    return chunked(of_rows, 8, y, hidden_p, hidden_q)  # 8: their logits stay in a CPU's cache


# ---- Files: safetensors with a JSON header -------------------------------------------------------
def save(path, model: GPT, tokenizer: Tokenizer, **header) -> None:
    """Weights, in the dtype they compute in, and all that a later stage needs: model config,
    tokenizer, and whatever JSON-able `header` adds."""
    weights = {k: v.to(model.dtype) for k, v in model.state_dict().items()}
    write_tensors(path, weights, **header, model=asdict(model.config),
                  tokenizer=tokenizer.to_str())


def load(path, made_by: str, device="cpu", dtype=torch.float32) -> tuple[GPT, Tokenizer, dict]:
    """-> model (float32 weights, activations in dtype), tokenizer, header. Raises UserError if the
    file is missing, truncated, or not ours."""
    with readable(path, made_by):
        weights, header = read_tensors(path)
        model = GPT(GPTConfig(**header["model"]))
        model.load_state_dict(weights)
        tokenizer = Tokenizer.from_str(header["tokenizer"])
    model.to(device).dtype = dtype
    return model, tokenizer, header


if __name__ == "__main__":  # python model.py out/policy-happy.safetensors --prompt "ROMEO:" -n 3
    from running.complete import main
    main()
