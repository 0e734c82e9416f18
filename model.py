"""The transformer that all five stages share, its sampler, and its file format.

A decoder-only transformer (pre-norm, rotary positions, squared-ReLU MLP, no biases) of a size that
a laptop trains in minutes. Attention, log-probs and sampling come from kernels/; everything else
is below: position encoding, block, model, cached sampling, `save` and `load`, and at the end the
few lines every script needs to start, to log and to fail in one line instead of a traceback.

The last three token ids are reserved: start or end of text, happy, sad. The policy is a
distribution over the others, so no sample can ever contain one of them.
"""
import copy
import ctypes
import gc
import hashlib
import json
import os
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from tokenizers import Tokenizer

from kernels import attention, decode_attention, linear_logprob, sample
from kernels.backend import use_triton

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


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position encoding (Su et al. 2021, arXiv:2104.09864): each pair (x_i, x_{i + Dh/2}) turned
    by position * frequency_i. x (..., H, Dh); cos, sin (..., 1, Dh) from `GPT.angles`. The dot product
    of two rotated vectors depends on their positions only through the distance between them."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:])  # no learned scale: the next matrix can absorb it


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2 (So et al. 2021, arXiv:2109.08668). Its derivative is 2 relu(x): by saying so, the
    backward pass needs one tensor and no mask: autograd's own version is slow on a CPU."""

    @staticmethod
    def forward(ctx, x):
        r = x.relu()
        ctx.save_for_backward(r)
        return r.square()

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)


class Linear(nn.Linear):
    """A linear map without bias. Weights stay in float32 for the optimizer; the product runs in
    the dtype of its input. Starts uniform with variance 1 / in_features, or at zero."""

    def __init__(self, d_in: int, d_out: int, zero: bool = False):
        super().__init__(d_in, d_out, bias=False)
        bound = 0.0 if zero else (3 / d_in) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.heads = (c.n_head, c.n_kv_head, c.n_kv_head)
        self.qkv = Linear(c.d_model, sum(self.heads) * c.d_model // c.n_head)
        self.proj = Linear(c.d_model, c.d_model, zero=True)  # zero: at the start each block
        self.up = Linear(c.d_model, 4 * c.d_model)           # passes its input on unchanged
        self.down = Linear(4 * c.d_model, c.d_model, zero=True)

    def forward(self, x, cos, sin, cache=None, pos=0, last_only=False):
        """x (B, T, D), or (B, D) for one new token at position `pos` with its (k, v) cache.
        last_only: return the last position alone, (B, 1, D), and compute no more than it needs."""
        H, Hkv, _ = self.heads
        qk, v = self.qkv(norm(x)).unflatten(-1, (H + 2 * Hkv, -1)).split((H + Hkv, Hkv), dim=-2)
        q, k = rotate(qk, cos, sin).split((H, Hkv), dim=-2)  # (..., heads, Dh)
        y = attention(q, k, v) if cache is None else decode_attention(q, k, v, *cache, pos)
        if last_only:
            x, y = x[:, -1:], y[:, -1:]
        x = x + self.proj(y)
        return x + self.down(SquaredReLU.apply(self.up(norm(x))))


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
        self.decoder = None         # made by the first rollout

    def angles(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the rotary angles, each (T, 1, Dh), the second half of sin negative."""
        half = self.config.d_model // self.config.n_head // 2
        frequency = 10_000.0 ** (-torch.arange(half, device=self.head.device) / half)
        angle = torch.outer(torch.arange(T, device=self.head.device), frequency)[:, None]
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        return torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)

    def forward(self, x: torch.Tensor, last_only: bool = False) -> torch.Tensor:
        """Token ids x (B, T) -> hidden states (B, T, D), or of the last position alone (B, 1, D).
        Causal: row t depends on x[:, :t+1]."""
        h = norm(self.embed(x).to(self.dtype))
        cos, sin = self.angles(x.size(1))
        for block in self.blocks[:-1]:
            h = block(h, cos, sin)
        return norm(self.blocks[-1](h, cos, sin, last_only=last_only))

    def unembed(self) -> torch.Tensor:
        """The rows of the output head that can be sampled: (n_text, D), in the compute dtype."""
        return self.head[: self.n_text].to(self.dtype)

    def after(self, y: torch.Tensor, prompt: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Completions y (B, T), each after its prompt (B, P), padded with -1 at its end; P may be 0, or prompt
        None -> what the model reads, (B, 1 + P + T): start token, prompt, completion, and padding at the end,
        which a causal model cannot see; and the places (B, T) in it from which the tokens of y are predicted."""
        start, prompt = torch.full_like(y[:, :1], self.bos), y[:, :0] if prompt is None else prompt
        places = (prompt >= 0).sum(1, keepdim=True) + torch.arange(y.size(1), device=y.device)
        return torch.cat((start, prompt.clamp_min(0), y), 1).scatter(1, places + 1, y), places

    def before(self, y: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Completions y (B, T), prompt as in `after` -> the hidden state (B, T, D) from which each token of
        y is predicted."""
        x, places = self.after(y, prompt)
        hidden = self(x[:, :-1])
        if hidden.shape[:2] == y.shape:
            return hidden
        return hidden.gather(1, places[..., None].expand(-1, -1, hidden.size(-1)))

    def logprob(self, y: torch.Tensor, prompt: torch.Tensor | None = None,
                entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Completions y (B, T), prompt as in `after` -> log-prob of every token of y, and if asked for the
        entropy of the distribution it was drawn from, both (B, T), nats."""
        return linear_logprob(self.before(y, prompt), self.unembed(), y, entropy=entropy)

    def sentiment(self, y: torch.Tensor) -> torch.Tensor:
        """Completions y (B, T) -> (B, 2): log p(happy), log p(sad) after the last token of y, the
        soft-max restricted to the two. Only a reward model has learned to predict them."""
        last = self(self.after(y, None)[0], last_only=True)[:, 0]
        head = self.head[[self.happy, self.sad]].to(self.dtype)  # as `save` rounds it
        return (last.float() @ head.float().T).log_softmax(-1)

    @torch.no_grad()
    def generate(self, n: int | torch.Tensor, length: int, seed: int, batch: int | None = None,
                 prompts: torch.Tensor | None = None):
        """Completions at temperature 1 from the whole distribution: those numbered 0 to n - 1, or those
        whose numbers are listed in n; unconditional, or each after its row of prompts (as in `after`).

        -> tokens (n, length) int64, the sampler's log-probs (n, length) float32, nats. A completion is
        determined by seed, number and prompt alone, not by `batch`, which only bounds the cache.
        """
        device = self.head.device
        numbers = n.to(device) if torch.is_tensor(n) else torch.arange(n, device=device)
        if prompts is None:
            prompts = numbers.new_empty(len(numbers), 0)
        count = -(-len(numbers) // (batch or (8192 if device.type == "cuda" else 1024)))
        parts = [*zip(numbers.chunk(count), prompts.to(device).chunk(count))]
        made_for = (len(parts[0][0]), prompts.size(1), length, self.dtype, device)
        if not self.decoder or self.decoder.made_for != made_for:
            self.decoder = None  # not to be copied along with the weights
            self.decoder = Decoder(self, *made_for[:3])
        return tuple(torch.cat(x) for x in zip(*(self.decoder.draw(self, *part, seed) for part in parts)))


def score_of(log_p: torch.Tensor, kind: str, target: str) -> torch.Tensor:
    """log_p (B, 2) of `GPT.sentiment` -> score (B,): log p(target) if the reward model learned from "labels"; if
    from "comparisons", log p(happy) - log p(sad), negated for sad, of which only differences mean anything."""
    i = ("happy", "sad").index(target)
    return log_p[:, i] if kind == "labels" else log_p[:, i] - log_p[:, 1 - i]


class Decoder:
    """The buffers of a rollout, and one step that draws the next token of every completion in them.

    Nothing in a step comes from the host or goes to it: position, seed and row numbers are read, and
    tokens and log-probs left, in the device's memory. So on a GPU one step is captured once, as a CUDA
    graph, and replayed for every token of every later rollout; new weights are copied into its own.
    All rows stand at the same position: while a row's prompt lasts its tokens are taken instead of drawn.
    """

    def __init__(self, model: GPT, batch: int, longest_prompt: int, length: int):
        c, device = model.config, model.head.device
        self.made_for = (batch, longest_prompt, length, model.dtype, device)
        self.length, length = length, longest_prompt + length
        self.model = copy.deepcopy(model).to(model.dtype)
        self.cos, self.sin = model.angles(length)
        shape = (c.n_layer, 2, batch, c.n_kv_head, length, c.d_model // c.n_head)
        self.cache = torch.zeros(shape, dtype=model.dtype, device=device)
        self.rows, self.token = torch.zeros(2, batch, dtype=torch.long, device=device)
        self.prompts = torch.full((length, batch), -1, device=device) if longest_prompt else None
        self.tokens = torch.zeros(length, batch, dtype=torch.long, device=device)
        self.logps = torch.zeros(length, batch, device=device)
        self.seed = torch.zeros(1, dtype=torch.uint64, device=device)
        self.pos = torch.zeros(1, dtype=torch.long, device=device)
        if use_triton("auto", self.cache) and shape[-1] <= 128:  # PyTorch's path reads pos on the host
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step()  # compiles the kernels, which a capture must not
            torch.cuda.current_stream().wait_stream(side)
            gc.disable()     # a collected kernel would unload its module, and end the capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.step()
            gc.enable()
            self.step = graph.replay

    def step(self) -> None:
        cos, sin = self.cos.index_select(0, self.pos), self.sin.index_select(0, self.pos)
        h = norm(self.model.embed(self.token))                   # (B, D)
        for block, kv in zip(self.model.blocks, self.cache):
            h = block(h, cos, sin, kv, self.pos)
        token, logp, _ = sample(norm(h), self.model.unembed(), self.seed, self.rows, self.pos, entropy=False)
        if self.prompts is not None:
            given = self.prompts.index_select(0, self.pos)[0]
            token = torch.where(given >= 0, given, token)
        self.token.copy_(token)
        self.tokens.index_copy_(0, self.pos, token[None])
        self.logps.index_copy_(0, self.pos, logp[None])
        self.pos += 1

    def draw(self, model: GPT, rows: torch.Tensor, prompts: torch.Tensor,
             seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """rows (n,), the numbers of at most `batch` completions, prompts (n, P) -> tokens, log-probs (n, length)."""
        torch._foreach_copy_(list(self.model.parameters()), list(model.parameters()))
        self.rows[: len(rows)] = rows
        if self.prompts is not None:
            self.prompts[: prompts.size(1), : len(rows)] = prompts.T
        self.seed.copy_(torch.tensor([seed], dtype=torch.uint64))
        self.token.fill_(self.model.bos)
        self.pos.zero_()
        for _ in range(len(self.tokens)):
            self.step()
        places = (prompts >= 0).sum(1, keepdim=True) + torch.arange(self.length, device=rows.device)     # (n, length)
        return tuple(x.T[: len(rows)].gather(1, places) for x in (self.tokens, self.logps))


def read_prompts(corpus: Path, tokenizer: Tokenizer, held_out: bool = False, longest: int = 24) -> torch.Tensor:
    """Prompts: every speaker's name ("Romeo:", or "ROMEO." as Project Gutenberg prints it) with the first line of
    the speech, of at most `longest` tokens, from the training text or the held-out last 5 % of it -> (n, longest),
    each once, padded with -1 at its end. Raises UserError if the corpus is not there or has none."""
    if not corpus.exists():
        raise UserError(f"{corpus} is missing (the shipped model comes without its corpus): run 01_pretrain.py "
                        "with --corpus FILE, or draw samples without --prompts in 02_sample_label.py")
    text = corpus.read_text(encoding="utf-8")
    cut = int(len(text) * 0.95)  # as in 01
    part = text[cut:].partition("\n")[2] if held_out else text[:cut]
    found = max((dict.fromkeys(re.findall(rf"^{name}\n[^\n]+\n", part, re.M))
                 for name in (r"[A-Z][^\n:]{0,30}:", r"[A-Z][A-Z ,'’]{0,30}\.")), key=len)
    rows = [e.ids for e in tokenizer.encode_batch(list(found)) if len(e.ids) <= longest]
    if not rows:
        raise UserError(f"{corpus} has no prompts: a speaker's name and a colon on a line, and the line after it")
    return torch.tensor([ids + [-1] * (longest - len(ids)) for ids in rows])


def draw_prompts(prompts: torch.Tensor | None, n: int, seed: int) -> torch.Tensor:
    """n rows of prompts at random, or (n, 0) if there are none."""
    if prompts is None:
        return torch.empty(n, 0, dtype=torch.long)
    return prompts[torch.randint(len(prompts), (n,), generator=torch.Generator().manual_seed(seed))]


def decode_prompts(tokenizer: Tokenizer, prompts: torch.Tensor) -> list[str]:
    return tokenizer.decode_batch([[t for t in row if t >= 0] for row in prompts.tolist()])


# ---- Several processes: torchrun starts them, each takes its share of every minibatch ------------
def world() -> tuple[int, int]:
    """The number of this process, and how many there are: (0, 1) unless torchrun started it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(numbers: torch.Tensor, minibatch: int) -> torch.Tensor:
    """The part of `numbers` (N,) that is this process's: an equal slice of each minibatch, so that N
    processes make the same updates as one. Raises UserError if it does not divide."""
    rank, size = world()
    if minibatch % size or len(numbers) % minibatch:
        raise UserError(f"a minibatch of {minibatch} does not divide among {size} processes")
    return numbers.view(-1, size, minibatch // size)[:, rank].flatten()


def gather(x: torch.Tensor) -> torch.Tensor:
    """x (n, ...), of the same shape in each process -> (size n, ...), all of them, the same everywhere:
    what is computed from it, and decided by it, is the same everywhere."""
    if world()[1] == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def average_gradients(model: nn.Module) -> None:
    """Mean over the processes, in one message."""
    if world()[1] == 1:
        return
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat / world()[1]).split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


# ---- Files: safetensors with a JSON header -------------------------------------------------------
class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


def write(path: Path, data: bytes | str) -> None:
    """Write to a temporary name, then rename: `path` holds the old or the new content, whole. Of
    several processes the first writes, and the others return when it has."""
    if world()[0]:
        return dist.barrier()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    if world()[1] > 1:
        dist.barrier()


def save(path, model: GPT, tokenizer: Tokenizer, optimizers=(), tensors=None, **header) -> None:
    """Weights, in the dtype they compute in (float32 with optimizers, to continue from), and all
    that a later stage needs: model config, tokenizer, and whatever JSON-able `header` adds."""
    dtype = torch.float32 if optimizers else model.dtype
    data = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()} | (tensors or {})
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            data |= {f"optimizer.{i}.{j}.{k}": v.contiguous() for k, v in state.items()}
    header |= {"model": asdict(model.config), "tokenizer": tokenizer.to_str()}
    write(path, safetensors_bytes(data, metadata={"rlhf-shakespeare": json.dumps(header)}))


def load(path, made_by: str, device="cpu", dtype=torch.float32) -> tuple[GPT, Tokenizer, dict]:
    """-> model (float32 weights, activations in dtype), tokenizer, header; header["tensors"] holds what else
    the file has.
    Raises UserError if it is missing (run `made_by`), truncated, or not one of ours."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run {made_by} first")
    try:
        with safe_open(path, "pt") as f:
            header = json.loads((f.metadata() or {})["rlhf-shakespeare"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        model = GPT(GPTConfig(**header["model"]))
        tokenizer = Tokenizer.from_str(header["tokenizer"])
        model.load_state_dict({k: tensors.pop(k) for k in model.state_dict()})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        what = "is truncated or damaged" if isinstance(error, SafetensorError) else \
            "was not written by this project"
        raise UserError(f"{path} {what}: delete it and run {made_by} again") from error
    model.to(device).dtype = dtype
    return model, tokenizer, header | {"tensors": tensors}


def load_optimizers(header: dict, optimizers) -> None:
    """Give `optimizers`, built over the parameters of a loaded model, the state saved with it."""
    for i, optimizer in enumerate(optimizers):
        state: dict = {}
        for name, tensor in header["tensors"].items():
            if name.startswith(f"optimizer.{i}."):
                j, key = name.split(".")[2:]
                state.setdefault(int(j), {})[key] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def resume_from(path, made_by: str, settings: dict, inputs: dict) -> tuple[GPT, Tokenizer, dict] | None:
    """What `load` returns, or None if there is nothing to resume or it stems from other inputs.
    Raises UserError if it was written with other settings: continuing would mix the two."""
    if not Path(path).exists():
        print("nothing to resume: starting from the beginning")
        return None
    model, tokenizer, header = load(path, made_by)
    if header["inputs"] != inputs:
        print(f"{path} stems from other inputs: starting from the beginning")
        return None
    if differ := [k for k, v in settings.items() if header["settings"].get(k) != v]:
        raise UserError(f"{path} was written with another {', '.join(differ)}: use the same "
                        "settings, or delete it to start anew")
    print(f"resuming at step {header['step']}")
    return model, tokenizer, header


def fingerprint(model: GPT) -> str:
    """Which weights these are: 16 hex digits of a SHA-256, the same before and after `save`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().numpy(force=True).tobytes())
    return digest.hexdigest()[:16]


# ---- Starting, logging, ending a script ----------------------------------------------------------
def report(kind, error, trace) -> None:
    """sys.excepthook: what the user can mend is one line and exit code 2; a bug keeps its traceback."""
    quiet, sys.stderr = world()[0] and issubclass(kind, (KeyboardInterrupt, UserError)), sys.__stderr__
    if quiet:  # the first process says it; torchrun ends all when one has ended
        time.sleep(1)
        os._exit(2)
    if dist.is_initialized() and issubclass(kind, RuntimeError) and re.search("(?i)connection|peer|nccl", str(error)):
        line = "another process of this run has ended; the same command with --resume goes on, also with fewer"
    elif issubclass(kind, KeyboardInterrupt):
        line = "interrupted: the same command with --resume goes on from the last saved state"
    elif issubclass(kind, UserError):
        line = str(error)
    elif issubclass(kind, OSError) and error.errno is not None:
        line = f"{error.filename or 'writing'}: {error.strerror}; make room or choose another --out"
    else:
        return sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    print(f"\nerror: {line}" if sys.stderr.isatty() else f"error: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast: GPUs, and CPUs with AMX or AVX512-BF16. Else float32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if device.type == "cpu" and cpuinfo.exists() else ""
    fast = device.type == "cuda" or re.search(r"\b(amx_bf16|avx512_bf16)\b", flags)
    return torch.bfloat16 if fast else torch.float32


def keep_freed_pages() -> None:
    """Linux: do not return freed memory to the kernel, which would zero every page again."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-1, 2**31 - 1), libc.mallopt(-4, 0)  # M_TRIM_THRESHOLD, M_MMAP_MAX


def start(Config: type, doc: str, on_gpu: dict | None = None) -> tuple:
    """Read the command line, choose device and dtype, print the settings, seed torch. -> Config, device,
    dtype. `on_gpu`: the defaults that differ where there is a GPU."""
    sys.excepthook = report
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    defaults = Config(**(on_gpu or {})) if device.type == "cuda" else Config()
    settings = tyro.cli(Config, description=doc, default=defaults)
    if not 0 <= settings.seed < 2**31:
        raise UserError("--seed must be in [0, 2^31)")
    keep_freed_pages()
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if world()[0]:
            sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.manual_seed(settings.seed)
    dtype = fast_dtype(device)
    start.time = time.time()
    print("settings:", ", ".join(f"{k} {v}" for k, v in asdict(settings).items()))
    print(f"device: {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads"
          + (f", {world()[1]} processes" if world()[1] > 1 else ""), flush=True)
    return settings, device, dtype


def finish(next_command: str, out: Path) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"wall time {time.time() - start.time:.0f} s, peak memory {peak:.2f} GiB")
    print(f"next: {next_command}" + (f" --out {out}" if str(out) != "out" else ""))


class Log:
    """One JSON line per step. Resuming at step n first drops what a killed run wrote from n on."""

    def __init__(self, path: Path, resume_at: int = 0):
        kept = []
        if resume_at and path.exists():
            lines = (line for line in path.read_text().splitlines() if line.endswith("}"))
            kept = [line for line in lines if json.loads(line)["step"] < resume_at]
        write(path, "".join(line + "\n" for line in kept))
        self.file = open(os.devnull if world()[0] else path, "a", buffering=1)

    def __call__(self, **row):
        self.file.write(json.dumps(row) + "\n")
