"""What all five stages share: the transformer, its sampler, the KL, and how a stage runs.

A decoder-only transformer (pre-norm, rotary positions, squared-ReLU MLP, no biases), small enough
to train on a laptop in minutes. Attention, log-probs and sampling come from kernels/.

The last three token ids are reserved: start of text, happy, sad. The sampler never draws
them, so no sample contains a reserved token.

Shapes: B sequences, T tokens, D = d_model, H query heads, Hkv key and value heads, Dh = D / H.
A prompt (B, P) is padded with -1 at its end. Without prompts, P is 0.
"""
import codecs
import ctypes
import errno
import gc
import hashlib
import io
import json
import math
import os
import re
import resource
import shlex
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from tokenizers import Tokenizer

from kernels import attention, decode_attention, linear_logprob, rotate, sample, squared_relu
from kernels.backend import has_bf16, live_path
from kernels.decoder import can_capture, decoder_for

RESERVED = ("<|text|>", "<|happy|>", "<|sad|>")
ELSEWHERE = ""  # " --out FOLDER" unless FOLDER is out: commands in messages end with it
LOCKS: dict[Path, FileLock] = {}  # on the files that this process writes
BEGAN = time.monotonic()  # when this process had imported its libraries


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
    """A linear map without bias. The optimizer sees float32 weights; the product runs in the dtype
    of its input. Weights start uniform with variance 1 / d_in, or at zero."""

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
        self.proj = Linear(c.d_model, c.d_model, zero=True)  # zero: an untrained block adds nothing

    def forward(self, x, cos, sin, cache=None, pos=0, last_only=False):
        """x (B, T, D) -> (B, T, D): each position attends to itself and to those before it.
        Or, with a cache, one new token x (B, D) at position `pos` -> (B, D): we add its key and
        value to the cache, and it attends to everything there."""
        H, Hkv = self.n_head, self.n_kv_head
        qkv = self.qkv(x).unflatten(-1, (H + 2 * Hkv, -1))           # (B, T, H + 2 Hkv, Dh)
        qk, v = qkv.split((H + Hkv, Hkv), dim=-2)
        if cache is None:
            q, k = rotate(qk, cos, sin).split((H, Hkv), dim=-2)
            y = attention(q, k, v)
        else:  # decode_attention rotates q and k itself
            q, k = qk.split((H, Hkv), dim=-2)
            y = decode_attention(q, k, v, *cache, pos, (cos, sin))
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
        self.dtype = torch.float32  # of the activations; `fast_dtype` picks it for a machine

    def angles(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the rotary angles (Su et al. 2021, section 3.4), each (T, 1, Dh); the
        second half of sin is negated."""
        half = self.config.d_model // self.config.n_head // 2
        device = self.head.device
        frequency = 10_000.0 ** (-torch.arange(half, device=device) / half)
        angle = torch.outer(torch.arange(T, device=device), frequency)[:, None]
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        return torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)

    def forward(self, x: torch.Tensor, last_only: bool = False) -> torch.Tensor:
        """Token ids x (B, T) -> hidden states (B, T, D); position t depends on x[:, :t+1] only.
        last_only: return only the last position (B, 1, D). The last block's projection and MLP then
        skip the others."""
        cos, sin = self.angles(x.size(1))
        h = norm(self.embed(x).to(self.dtype))                       # (B, T, D)
        for block in self.blocks[:-1]:
            h = block(h, cos, sin)
        h = self.blocks[-1](h, cos, sin, last_only=last_only)
        return norm(h)

    def unembed(self) -> torch.Tensor:
        """The head's rows for tokens of text: (n_text, D), in the dtype of the activations."""
        return self.head[: self.n_text].to(self.dtype)

    # ---- Scoring a given text --------------------------------------------------------------------
    def hidden_before(self, y: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Completions y (B, T) after prompt (B, P) -> (B, T, D): for each token of y, the
        hidden state that predicts it, one position earlier."""
        x, places = lay_out(y, prompt, self.bos)
        hidden = self(x[:, :-1])                                     # (B, P + T, D)
        if hidden.size(1) == y.size(1):                              # no prompts
            return hidden
        return hidden.gather(1, places[..., None].expand(-1, -1, hidden.size(-1)))

    def hidden_after(self, y: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """The hidden state after each prefix of y (B, T), from the empty one on: (B, T + 1, D)."""
        return self.hidden_before(torch.cat((y, y[:, -1:]), 1), prompt)  # the copy is not read

    def logprob(self, y: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Completions y (B, T) after prompt (B, P) -> log-prob of each token of y, (B, T), nats."""
        return linear_logprob(self.hidden_before(y, prompt), self.unembed(), y)

    def sentiment(self, y: torch.Tensor, prompt: torch.Tensor | None = None,
                  each: bool = False) -> torch.Tensor:
        """Completions y (B, T) after prompt (B, P) -> (B, 2): log p(happy), log p(sad) of the next
        token after y, by a softmax over these two only. each: after every token of y, (B, T, 2).
        Only a reward model has learned to predict these two."""
        if each:
            hidden = self.hidden_after(y, prompt)[:, 1:]             # (B, T, D)
        elif prompt is None or prompt.size(1) == 0:
            x, _ = lay_out(y, prompt, self.bos)
            hidden = self(x, last_only=True)[:, 0]                   # (B, D)
        else:
            hidden = self.hidden_after(y, prompt)[:, -1]
        head = self.head[[self.happy, self.sad]].to(self.dtype)      # (2, D), rounded as on disk
        return (hidden.float() @ head.float().T).log_softmax(-1)

    # ---- Sampling --------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(self, n: int | torch.Tensor, length: int, seed: int, batch: int | None = None,
                 prompts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw n completions at temperature 1, or those whose numbers are in the tensor n. With
        prompts (n, P), each continues its own. -> tokens (n, length) int64, and their
        log-probs (n, length) float32, nats. A completion depends on weights, seed, number and
        prompt, but not on `batch`, which limits memory."""
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
        log-probs, (B, P + length) each. Where a row still has prompt tokens, they replace the drawn
        ones, and the log-probs mean nothing."""
        B, P = prompt.shape
        angles = self.angles(P + length)
        cache = self.empty_cache(B, P + length)
        weight = self.unembed()
        token = torch.full_like(numbers, self.bos)
        tokens, logps = [], []
        for t in range(P + length):
            h = self.step(token, angles, cache, t)                   # (B, D)
            token, logp = sample(h, weight, seed, numbers, t)
            if t < P:
                token = torch.where(prompt[:, t] >= 0, prompt[:, t], token)
            tokens.append(token)
            logps.append(logp)
        return torch.stack(tokens, 1), torch.stack(logps, 1)

    def step(self, token, angles, cache, pos):
        """One token per row (B,) at position pos -> the hidden state (B, D) that predicts the next
        one. Appends the token's keys and values to the cache. angles: for all positions. On a GPU,
        pos may be a tensor, so that kernels/decoder.py can capture this step."""
        h = norm(self.embed(token).to(self.dtype))
        for block, layer_cache in zip(self.blocks, cache):
            h = block(h, *angles, layer_cache, pos)
        return norm(h)

    def empty_cache(self, B: int, T: int) -> torch.Tensor:
        """Room for the keys and values of B sequences of T tokens."""
        c = self.config
        shape = (c.n_layer, 2, B, c.n_kv_head, T, c.d_model // c.n_head)
        return torch.zeros(shape, dtype=self.dtype, device=self.head.device)


def places_of(prompt: torch.Tensor, length: int) -> torch.Tensor:
    """prompt (B, P) -> (B, length): the input position from which each completion token is
    predicted. The input is start token, prompt, completion."""
    return (prompt >= 0).sum(1, keepdim=True) + torch.arange(length, device=prompt.device)


def lay_out(y: torch.Tensor, prompt: torch.Tensor | None, bos: int):
    """Completions y (B, T), prompt (B, P) or None -> the input x (B, 1 + P + T), and the positions
    (B, T) in x that predict the tokens of y.

        prompt   p   p  -1                     a row whose prompt has two tokens, P = 3
        y        y0  y1  y2
        x        bos p   p   y0  y1  y2  y2    the padding ends up last, where a causal model
        places           2   3   4             cannot see it
    """
    prompt = y[:, :0] if prompt is None else prompt
    start = torch.full_like(y[:, :1], bos)
    places = places_of(prompt, y.size(1))
    x = torch.cat((start, prompt.clamp_min(0), y), 1)
    return x.scatter(1, places + 1, y), places


def pad(prompts: list[list[int]]) -> torch.Tensor:
    """Token ids of several prompts -> (n, P), padded with -1 at the end."""
    longest = max(map(len, prompts))
    rows = np.array([row + [-1] * (longest - len(row)) for row in prompts], dtype=np.int64)
    return torch.from_numpy(rows)  # torch.tensor is slow for many empty rows


def read_prompts(path: Path, part: str, n_text: int) -> torch.Tensor:
    """The prompts (n, P) that 02 --prompts found in the "train" or "held_out" part of the corpus,
    as token ids below n_text. Raises UserError if the file is missing or damaged."""
    made_by = "02_sample_label.py --prompts"
    return pad(read_json(path, made_by, lambda found: len(found[part]) > 0 and all(
        type(t) is int and 0 <= t < n_text for row in found[part] for t in row))[part])


def draw_prompts(prompts: torch.Tensor | None, n: int, seed: int) -> torch.Tensor:
    """n random rows of prompts, with replacement; (n, 0) if prompts is None."""
    if prompts is None:
        return torch.empty(n, 0, dtype=torch.long)
    return prompts[torch.randint(len(prompts), (n,), generator=torch.Generator().manual_seed(seed))]


def decode_prompts(tokenizer: Tokenizer, prompts: torch.Tensor) -> list[str]:
    """prompts (n, P) -> their texts."""
    return tokenizer.decode_batch([[t for t in row if t >= 0] for row in prompts.tolist()])


@torch.no_grad()
def chunked(f, size: int, *tensors: torch.Tensor):
    """Apply f to `size` rows of the tensors at a time, without gradients, and concatenate its
    results. f may return one tensor or several."""
    results = [f(*rows) for rows in zip(*[x.split(size) for x in tensors])]
    if torch.is_tensor(results[0]):
        return torch.cat(results)
    return [torch.cat(parts) for parts in zip(*results)]


def kl_nats(policy: GPT, reference: GPT, y: torch.Tensor, prompt: torch.Tensor):
    """KL(policy || reference) per completion, nats, by two estimators of the same expectation.

    KL, the Kullback-Leibler divergence, says how far the policy has moved from the reference. Let
    the policy draw y (B, T) after prompt (B, P). At token y_t, the policy's distribution over the
    vocabulary is p_t, and the reference's is q_t.

    -> exact (B,): sum_t sum_v p_t(v) log(p_t(v) / q_t(v)), v over the whole vocabulary;
       k1 (B,): sum_t log(p_t(y_t) / q_t(y_t)), which is noisier;
       log p_t(y_t) (B, T); entropy of p_t (B, T). All in nats.
    """
    weight_p, weight_q = policy.unembed(), reference.unembed()
    hidden_p = chunked(policy.hidden_before, 256, y, prompt)                         # (B, T, D)
    hidden_q = chunked(reference.hidden_before, 256, y, prompt)
    if y.is_cuda:  # float32 logits, as in the kernels
        weight_p, weight_q = weight_p.float(), weight_q.float()
        hidden_p, hidden_q = hidden_p.float(), hidden_q.float()

    def of_rows(y, hidden_p, hidden_q):
        log_p = torch.log_softmax(hidden_p @ weight_p.T, -1, dtype=torch.float32)    # (8, T, V)
        log_q = torch.log_softmax(hidden_q @ weight_q.T, -1, dtype=torch.float32)    # (8, T, V)
        p = log_p.exp()
        logp = log_p.gather(2, y[..., None])[..., 0]                                 # (8, T)
        logq = log_q.gather(2, y[..., None])[..., 0]                                 # (8, T)
        exact = torch.linalg.vecdot(p, log_p - log_q).double().sum(-1)               # (8,)
        k1 = (logp - logq).double().sum(-1)                                          # (8,)
        return exact, k1, logp, -torch.linalg.vecdot(p, log_p)
    return chunked(of_rows, 8, y, hidden_p, hidden_q)  # 8: their logits fit a CPU's cache


# ---- Files: safetensors with a JSON header -------------------------------------------------------
def save(path: Path, model: GPT, tokenizer: Tokenizer, **header) -> None:
    """Write one file with all that a later stage needs: the weights, rounded to the dtype they
    compute in, and a JSON header with the model's config, the tokenizer, and `header`."""
    header |= {"model": asdict(model.config), "tokenizer": tokenizer.to_str()}
    weights = {k: v.to(model.dtype).contiguous() for k, v in model.state_dict().items()}
    write(path, safetensors_bytes(weights, metadata={"rlhf-shakespeare": as_json(header)}))


def load(path: Path, made_by: str, device="cpu", dtype=torch.float32) -> tuple:
    """-> model (float32 weights, activations in dtype), tokenizer, header. made_by: the script that
    writes the file. Raises UserError if it is missing, damaged, or not written by `save`."""
    require(path.exists(), f"{path} is missing: run {command(made_by)} first")
    require(not path.is_dir(), f"{path} is a folder: name a .safetensors file in it")
    require(path.suffix != ".pt", f"{path} is the state of an unfinished run, not a model: run the "
            "script that wrote it again, with --resume")
    with open(path, "rb"):
        pass  # an unreadable file raises here: it is not a damaged one
    try:
        with safe_open(path, "pt") as f:
            weights = {name: f.get_tensor(name) for name in f.keys()}
            header = json.loads(f.metadata()["rlhf-shakespeare"])
        model = GPT(GPTConfig(**header["model"]))
        model.load_state_dict(weights)
        tokenizer = Tokenizer.from_str(header["tokenizer"])
    except Exception as error:  # safetensors, json, torch and tokenizers each raise their own
        raise UserError(f"{path} is truncated or damaged, or another version wrote it "
                        f"({first_line(error)}): run {command(made_by)} again") from error
    finite = all(weight.isfinite().all() for weight in weights.values())
    require(finite, f"{path} holds weights that are not finite: run {command(made_by)} again")
    model.to(device).dtype = dtype
    return model, tokenizer, header


def fingerprint(model: GPT) -> str:
    """Identifies the weights of a loaded model: 16 hex digits of their SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().numpy(force=True).tobytes())
    return digest.hexdigest()[:16]


# ---- How a stage runs. Nothing below is about RLHF: skip it at first reading. --------------------
class UserError(Exception):
    """A mistake that the user can mend. It prints one line and exits with code 2."""


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(otherwise)


def command(line: str) -> str:
    """A command for a message, ready to paste: a script or -m MODULE with this run's folder. Any
    other line stays as it is."""
    return f"python {line}{ELSEWHERE}" if ".py" in line or line.startswith("-m ") else line


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def one_line(kind, error, trace) -> None:
    """sys.excepthook: a user's mistake is one line and exit code 2; a bug gets its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        error = "interrupted: run the same command again (01 and 04: add --resume to continue)"
    elif issubclass(kind, MemoryError | torch.OutOfMemoryError) or "can't allocate" in str(error):
        error = "out of memory: lower the batch sizes"
    elif issubclass(kind, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        error = f"{error.filename or 'writing'}: {error.strerror}{'; make room' if full else ''}"
    elif not issubclass(kind, UserError):
        sys.stderr = sys.__stderr__
        return sys.__excepthook__(kind, error, trace)
    if world()[0] == 0:
        sys.stdout.flush()
        print(f"\nerror: {error}", file=Steady(sys.__stderr__), flush=True)
    else:
        time.sleep(1)  # the first process prints it; torchrun stops the others
    os._exit(2)


class Steady:
    """An output stream that never crashes a run. It replaces characters that it cannot print, and
    drops output that nobody reads (a closed pipe, no terminal)."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")
        self.stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()


def steady() -> None:
    """For every program here: a user's mistake prints one line, and output never crashes a run."""
    sys.excepthook = one_line
    if not isinstance(sys.stdout, Steady):
        sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)


def program() -> str:
    """How this process was started: python 04_ppo.py, or python -m report."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"


def start(Config: type, doc: str, on_gpu: dict | None = None) -> tuple:
    """Read the command line, choose device and dtype, seed torch -> settings, device, dtype.
    on_gpu: the defaults that differ on a GPU."""
    steady()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    defaults = Config(**(on_gpu or {})) if device.type == "cuda" else Config()
    cfg = tyro.cli(Config, description=doc, default=defaults, prog=program())
    require(0 <= cfg.seed < 2**31, "--seed must be in [0, 2^31)")
    set_out(getattr(cfg, "out", Path("out")))
    keep_freed_pages()
    gc.set_threshold(100_000)  # at the default, 700, reading rows is mostly garbage collection
    if dist.is_torchelastic_launched():  # by torchrun; a scheduler may set RANK too
        if int(os.environ["RANK"]) > 0:  # only the first process prints
            sys.stdout = sys.stderr = Steady(None)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    torch.manual_seed(cfg.seed)
    dtype = fast_dtype(device)
    try:
        kernels = live_path(device)
    except ValueError as error:  # TORCH_KERNELS names an unknown family
        raise UserError(str(error)) from error
    print("settings:", ", ".join(f"{k} {v}" for k, v in asdict(cfg).items()))
    print(f"device: {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, "
          f"{world()[1]} processes, kernels: {kernels}", flush=True)
    return cfg, device, dtype


def set_out(out: Path) -> None:
    """From now on, commands in messages name this folder. Raises UserError if it is a file."""
    global ELSEWHERE
    require(not out.is_file(), f"--out {out} is a file: name a folder")
    ELSEWHERE = "" if str(out) == "out" else f" --out {shlex.quote(str(out))}"


def check_numbers(cfg, positive: tuple = (), not_negative: tuple = ()) -> None:
    """Raises UserError if one of these settings is out of range, or not finite."""
    for name in (*positive, *not_negative):
        value, flag = getattr(cfg, name), f"--{name.replace('_', '-')}"
        require(math.isfinite(value), f"{flag} must be finite")
        require(value > 0 or name not in positive, f"{flag} must be positive")
        require(value >= 0, f"{flag} must not be negative")


def only_writer(path: Path) -> None:
    """Lock `path` until this process ends. Raises UserError if another process has locked it."""
    path = path.absolute()
    if world()[0] > 0 or path in LOCKS:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process is writing {path}: wait until it ends") from None
    except NotImplementedError:
        return  # a file system without locks
    LOCKS[path] = lock


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast: GPUs since Ampere, and CPUs with AMX or AVX512-BF16. Else
    float32."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    on_cpu = device.type == "cpu" and re.search(r"\b(amx_bf16|avx512_bf16)\b", flags)
    return torch.bfloat16 if on_cpu or has_bf16(device) else torch.float32


def keep_freed_pages() -> None:
    """On Linux, keep freed memory in the process, or the kernel zeroes every page again."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):      # glibc
        libc.mallopt(-1, 2**31 - 1)   # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)           # M_MMAP_MAX


def finish(next_command: str, earlier_s: float = 0.0) -> None:
    """Print the cost and the next stage's command. earlier_s: seconds spent before --resume."""
    by_torchrun = dist.is_initialized()
    if by_torchrun:
        dist.destroy_process_group()
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    before = f" (before it was resumed {earlier_s:.0f} s)" if earlier_s else ""
    print(f"wall time {time.monotonic() - BEGAN:.0f} s{before}, peak memory {peak:.2f} GiB")
    print(f"next: {next_command}{ELSEWHERE * next_command.startswith('python')}")
    if by_torchrun:  # a thread of torch's sometimes aborts a process that ends the usual way
        sys.stdout.flush()
        os._exit(0)


# ---- Several processes, started by torchrun, act as one; with one process this is the identity ---
def world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_rows(numbers: torch.Tensor, minibatch: int) -> torch.Tensor:
    """This process's part of `numbers` (N,): an equal slice of each minibatch. So several processes
    make the same updates as one."""
    rank, size = world()
    return numbers.view(-1, size, minibatch // size)[:, rank].flatten()


def gather(x: torch.Tensor) -> torch.Tensor:
    """Join x (n, ...) of all processes: (size n, ...). So all processes decide alike."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(world()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def average_gradients(model: nn.Module) -> None:
    if dist.is_initialized():
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world()[1]


# ---- Rows, states and other files: whole or not at all -------------------------------------------
def write(path: Path, data: bytes | str) -> None:
    """Write to a temporary name, then rename. Only the first of several processes does."""
    if world()[0] > 0:
        return
    path = Path(os.path.realpath(path))  # a link stays a link
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


def old_name(path: Path) -> Path:
    """The first name that is free: NAME.old, NAME.old2, NAME.old3 and so on. So nothing is lost."""
    name, n = path.with_name(f"{path.name}.old"), 1
    while name.exists():
        n += 1
        name = path.with_name(f"{path.name}.old{n}")
    return name


def remove(path: Path) -> None:
    if world()[0] == 0:
        path.unlink(missing_ok=True)


def words(text: str) -> list[str]:
    """Lower-case words of any script, with apostrophes inside."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())


def as_json(x, **how) -> str:
    """Strict JSON, which any reader accepts: null for NaN and infinity."""
    def finite(x):
        if isinstance(x, dict):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(finite(x), allow_nan=False, **how)


def jsonl(rows) -> str:
    return "".join(as_json(row) + "\n" for row in rows)


def decode(data: bytes, name: str) -> str:
    """Bytes -> text with plain newlines and no byte-order mark. Raises UserError if it is neither
    UTF-8, nor UTF-16 with a mark."""
    utf16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
                        "save it as UTF-8, or choose another file") from error
    inside = text.rstrip("\0")  # a crash can pad a file with NULs
    other = inside.count("\0") > (0 if utf16 else len(inside) / 10)
    require(not other, f"{name} is not UTF-8 but looks like UTF-16 or UTF-32: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers. Any editor may have saved
    it: UTF-8 or UTF-16, with or without a byte-order mark, any line ends."""
    require(path.is_file() or path.is_fifo(), f"{path} is not a file")
    lines = decode(path.read_bytes(), str(path)).split("\n")  # nothing else ends a line of JSON
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip(" \t\0")]


def number(text: str) -> int | float:
    """A number in JSON. Some programs write 12.0 for 12."""
    x = float(text)
    return int(x) if x.is_integer() and abs(x) < 2**53 else x


def parse(text: str, right=lambda value: True):
    """JSON -> its value. Raises ValueError if it is broken, or right(value) is false or raises."""
    try:
        value = json.loads(text, parse_float=number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return checked(value, right)


def checked(value, right):
    """The value. Raises ValueError if right(value) is false or raises."""
    try:
        good = right(value)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(first_line(error)) from error
    if not good:
        raise ValueError("a value is missing or of the wrong kind")
    return value


def read_rows(path: Path, made_by: str, right=lambda row: True, skip_last=False) -> list[dict]:
    """Rows of a JSON Lines file. Raises UserError if the file is missing, or if a line is
    broken or right(row) is false or raises; it names the line. made_by: the script that writes the
    file; "" if a person does. skip_last: leave out the last line."""
    require(path.exists() or not made_by, f"{path} is missing: run {command(made_by)} first")
    rows = []
    for number, line in read_lines(path)[:-1 if skip_last else None]:
        try:
            row = parse(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            row = {key: value for key, value in row.items() if value is not None}
            rows.append(checked(row, right))
        except ValueError as error:
            again = f", or run {command(made_by)} again" if made_by else ""
            raise UserError(f"{path} line {number} is broken ({line[:40]!r}, {error}): mend or "
                            f"delete that line{again}") from error
    return rows


def read_json(path: Path, made_by: str, right=lambda value: True):
    """The value in a JSON file. Raises UserError if the file is missing or damaged, or if
    right(value) is false or raises."""
    require(path.exists(), f"{path} is missing: run {command(made_by)} first")
    try:
        return parse(path.read_text(encoding="utf-8-sig", errors="replace"), right)
    except ValueError as error:
        raise UserError(f"{path} is damaged, or another version wrote it ({error}): "
                        f"run {command(made_by)} again") from error


def last_of_each(rows: list[dict]) -> list[dict]:
    """The last row about each item, in the order in which these were written."""
    last = {row["id"]: i for i, row in enumerate(rows)}
    return [rows[i] for i in sorted(last.values())]


def latest(rows: list[dict]) -> list[dict]:
    """Answers from several files -> one per labeller and item: the one with the latest "time" or,
    if times are equal, the last one. So a file and its copy count once. Names in lower case."""
    found: dict[tuple, dict] = {}
    for row in rows:
        name = str(row.get("labeller")).casefold()  # "Anna" and "anna" are one person
        key = name, row["id"]
        if key not in found or time_of(row) >= time_of(found[key]):
            found[key] = row | {"labeller": name}
    return list(found.values())


def time_of(row: dict) -> float:
    """When an answer was given, in seconds, but not in the future; 0 if the row does not say."""
    try:
        given = float(row.get("time"))
    except (TypeError, ValueError):
        return 0
    given = given / 1000 if given > 1e11 else given  # some programs count milliseconds
    return min(given, time.time()) if given > 0 else 0


def files_of(out: Path, kind: str) -> list[Path]:
    """The files KIND-NAME.jsonl in `out`. Warns of files whose names are nearly like this."""
    found = sorted(path for path in out.glob(f"{kind}-*.jsonl") if path.is_file())
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        near = re.search(rf"{kind[:-1]}.*(json|csv|tsv|txt|xls)", path.name, re.I)
        ours = re.fullmatch(rf"{kind}\.json|\..*|.*\.(tmp|old\d*)", path.name)
        if near and not ours and path not in found:
            print(f"warning: {path} is not read: only files named {kind}-NAME.jsonl are",
                  file=sys.stderr)
    return found


class Log:
    """Writes each row as a line of JSON to a file, and to `rows`, which may come from a state."""

    def __init__(self, path: Path, rows: list[dict]):
        write(path, jsonl(rows))
        self.rows = rows
        self.file = open(os.devnull if world()[0] else path, "a", 1, encoding="utf-8")

    def __call__(self, **row) -> None:
        self.rows.append(row)
        self.file.write(as_json(row) + "\n")


def provenance(cfg, earlier_s: float = 0.0) -> dict:
    """How a file was made: settings (without paths and --resume), seconds, version of PyTorch."""
    paths = ("corpus", "labels", "out", "resume")
    return {"settings": {k: v for k, v in asdict(cfg).items() if k not in paths},
            "seconds": earlier_s + time.monotonic() - BEGAN, "torch": str(torch.__version__)}


def save_state(path: Path, cfg, state: dict) -> None:
    """Save what --resume continues from: a dict of plain types and tensors."""
    buffer = io.BytesIO()
    torch.save(state | provenance(cfg, state["seconds"]), buffer)
    write(path, buffer.getvalue())


@contextmanager
def stale(path: Path):
    """Raises UserError if a state fails to load because another version wrote it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} was written by another version ({first_line(error)}): start again "
                        "without --resume") from error


def resume(path: Path, cfg, inputs: dict) -> dict:
    """What `save_state` wrote, or {} if this run starts from the beginning. Raises UserError if the
    file is damaged, or if a setting has changed that must not. inputs: what the run starts from."""
    if not cfg.resume:
        if path.exists():
            print(f"removing {path}: without --resume, this run starts from the beginning")
        remove(path)
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    except Exception as error:  # torch.load raises many kinds
        raise UserError(f"{path} is truncated or damaged: start again without --resume") from error
    known = isinstance(state, dict) and (not state or isinstance(state.get("settings"), dict)
                                         and isinstance(state.get("step"), int))
    require(known, f"{path} is not a state of this script: start again without --resume")
    if not state:
        print(f"{path} is missing: starting from the beginning")
        return {}
    if state.get("inputs") != inputs:
        old = old_name(path)
        if world()[0] == 0:
            path.rename(old)
        print(f"{path} was made from other inputs: it is now {old}; starting anew")
        return {}
    may_change = ("measure_every", "save_s", "kl_stop", "max_iterations")
    differ = [k for k, v in provenance(cfg)["settings"].items()
              if state["settings"].get(k) != v and k not in may_change]
    require(not differ, f"{path} was written with other values of {', '.join(differ)}: use the "
                        "same settings, or start again without --resume")
    print(f"resuming at step {state['step']}")
    return state
