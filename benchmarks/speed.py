"""Time a rollout and a training step against the alternatives, and measure how their cost grows.

    python -m benchmarks.speed
    pip install transformers               # optional, for the rollout of Hugging Face `generate`

Rollout: `GPT.generate` against Hugging Face `generate` and a loop without a cache. The Hugging Face
model is Nemotron with our weights. It has the same squared ReLU, rotary positions and grouped-query
heads, and we compare its log-probs first. Training step: ours against the same step written with
PyTorch's own functions. On a CPU we measure both twice: with the default allocator, and with freed
pages kept, as in all scripts (`keep_freed_pages` in model.py). That helps the others too. The floor
is the time for the arithmetic, or for reading the KV cache once per token, at the rates that a
large product and a copy reach in this run.

Then we measure time and peak memory against completions, length, model size and vocabulary. One of
them changes at a time, and each case runs in its own process. The model is 01's default
on this device. Prints Markdown; writes benchmarks/results/speed-DEVICE.json.
"""
import importlib
import json
import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from benchmarks.kernels import DEVICE, GPU, MINIBATCH, MODEL, ROOT, ceilings
from model import GPT, GPTConfig, fast_dtype, keep_freed_pages, norm, rotate

pretrain = importlib.import_module("01_pretrain")
PRESET = pretrain.Config(**(pretrain.ON_GPU if GPU else {}))
DTYPE = fast_dtype(torch.device(DEVICE))
COMPLETIONS = 4096 if GPU else 1024


@dataclass
class Config:
    rounds: int = 3  # measurements of each, in turn; the median counts
    growth: bool = True


def make(c: GPTConfig) -> GPT:
    """A model with random weights, as large as trained ones: zeros would be faster on a GPU."""
    torch.manual_seed(0)
    model = GPT(c).to(DEVICE)
    model.dtype = DTYPE
    for name, p in model.named_parameters():
        if name != "embed.weight":
            torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    return model


def seconds(call) -> float:
    began = time.perf_counter()
    call()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(calls: dict, rounds: int) -> dict[str, float]:
    """The median seconds of each call. They take turns, after one warm-up each."""
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds + 1)]
    return {name: sorted(t[name] for t in times[1:])[rounds // 2] for name in calls}


def products(model: GPT) -> int:
    """How many weights each token is multiplied by."""
    return sum(p.numel() for p in model.blocks.parameters()) + model.unembed().numel()


# ---- Rollout -------------------------------------------------------------------------------------
def hugging_face(ours: GPT):
    """Put our weights into Nemotron. Our input normalisation goes into its embedding. Our norms
    have no learned scale, so its scale is 1 + 0."""
    from transformers import NemotronConfig, NemotronForCausalLM
    c, Dh = ours.config, ours.config.d_model // ours.config.n_head
    theirs = NemotronForCausalLM(NemotronConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=4 * c.d_model,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=Dh, hidden_act="relu2", norm_eps=1e-5,
        max_position_embeddings=c.context, bos_token_id=ours.bos, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0,
                         "partial_rotary_factor": 1.0},
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False)).eval()
    theirs.lm_head = torch.nn.Linear(c.d_model, ours.n_text, bias=False)
    sizes = [h * Dh for h in (c.n_head, c.n_kv_head, c.n_kv_head)]
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p.zero_()
        theirs.model.embed_tokens.weight.copy_(norm(ours.embed.weight))
        theirs.lm_head.weight.copy_(ours.head[: ours.n_text])
        for a, b in zip(ours.blocks, theirs.model.layers):
            for name, w in zip("qkv", a.attention.qkv.weight.split(sizes)):
                if name != "v":  # it rotates the other way round, so swap the halves
                    w = w.view(-1, 2, Dh // 2, c.d_model).flip(1).flatten(0, 2)
                getattr(b.self_attn, f"{name}_proj").weight.copy_(w)
            b.self_attn.o_proj.weight.copy_(a.attention.proj.weight)
            b.mlp.up_proj.weight.copy_(a.mlp.up.weight)
            b.mlp.down_proj.weight.copy_(a.mlp.down.weight)
        theirs, y = theirs.to(DEVICE, ours.dtype), ours.generate(8, 64, seed=1)[0]
        x = torch.cat((torch.full_like(y[:, :1], ours.bos), y[:, :-1]), 1)
        log_p = theirs(x).logits.float().log_softmax(-1).gather(2, y[..., None])[..., 0]
    off = (log_p - ours.logprob(y)).abs().mean().item()
    if off > 0.05:
        raise AssertionError(f"not the same model: log-probs differ by {off:.3f} on average")
    return theirs


@torch.no_grad()
def without_cache(model: GPT, n: int, length: int) -> torch.Tensor:
    """The simplest sampling loop: it reads the whole prefix again for every token."""
    y = torch.empty(n, 0, dtype=torch.long, device=DEVICE)
    for _ in range(length):
        x = torch.cat((torch.full((n, 1), model.bos, device=DEVICE), y), 1)
        p = (model(x, last_only=True)[:, 0] @ model.unembed().T).float().softmax(-1)
        y = torch.cat((y, p.multinomial(1)), 1)
    return y


def rollout(rounds: int) -> tuple[dict, int, float, float]:
    """-> seconds of each, tokens, and the least FLOP to do and bytes to read for them."""
    ours, n, length = make(MODEL), COMPLETIONS, 64
    calls = {"ours": lambda: ours.generate(n, length, seed=0),
             "no cache": lambda: without_cache(ours, n, length)}
    if find_spec("transformers"):
        theirs, start = hugging_face(ours), torch.full((n, 1), ours.bos, device=DEVICE)

        def generate(**how):
            theirs.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
                            top_p=1.0, max_new_tokens=length, min_new_tokens=length,
                            pad_token_id=ours.bos, **how)
        calls["Hugging Face generate"] = generate
        if GPU:  # there a static cache also compiles the forward pass
            calls["Hugging Face generate, static cache"] = lambda: generate(
                cache_implementation="static")
    width = MODEL.n_kv_head * (MODEL.d_model // MODEL.n_head) * ours.dtype.itemsize
    cache = MODEL.n_layer * 2 * n * width * length**2 / 2
    return medians(calls, rounds), n * length, 2 * products(ours) * n * length, cache


# ---- Training step -------------------------------------------------------------------------------
def eager_logprob(model: GPT, y: torch.Tensor) -> torch.Tensor:
    """Mean log-prob with PyTorch's own functions: SDPA, relu().square(), cross_entropy."""
    x = torch.cat((torch.full_like(y[:, :1], model.bos), y[:, :-1]), 1)
    h, (cos, sin) = norm(model.embed(x).to(model.dtype)), model.angles(y.size(1))
    for b in model.blocks:
        H, Hkv = b.attention.n_head, b.attention.n_kv_head
        qkv = b.attention.qkv(norm(h)).unflatten(-1, (H + 2 * Hkv, -1))
        q, k, v = qkv.split((H, Hkv, Hkv), dim=-2)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H > Hkv)
        h = h + b.attention.proj(a.transpose(1, 2).flatten(2))
        h = h + b.mlp.down(F.relu(b.mlp.up(norm(h))).square())
    logits = F.linear(norm(h), model.unembed())
    return -F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def training_step(rounds: int) -> tuple[dict, int, float, float]:
    model = make(MODEL)
    y = torch.randint(model.n_text, (PRESET.batch, PRESET.context), device=DEVICE)
    calls = {"ours": lambda: model.logprob(y).mean().backward(),
             "eager": lambda: eager_logprob(model, y).backward()}
    if GPU:
        compiled = torch.compile(eager_logprob)
        calls["compiled"] = lambda: compiled(model, y).backward()
    return medians(calls, 4 * rounds), y.numel(), 6 * products(model) * y.numel(), 0


def compare(keep: bool, rounds: int) -> dict:
    """Run both comparisons, with the default allocator or with freed pages kept."""
    if keep:
        keep_freed_pages()
    before = ceilings(11)
    done = {f"rollout of {COMPLETIONS:,} x 64 tokens": rollout(rounds),
            f"training step of {PRESET.batch} x {PRESET.context} tokens": training_step(rounds)}
    bandwidth, peak = map(max, before, ceilings(11))
    return {"copy_bytes_per_s": bandwidth, "product_flop_per_s": peak} | {
        title: {name: {"seconds": s, "tokens_per_s": tokens / s, "ours_is_faster": s / each["ours"],
                       "of_floor": max(flop / peak, read / bandwidth) / s}
                for name, s in each.items()}
        for title, (each, tokens, flop, read) in done.items()}


def alone(f, *arguments):
    """Run f(*arguments) in a new process, with its own memory and allocator."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(f, *arguments).result()


# ---- Growth --------------------------------------------------------------------------------------
def peak_memory(reset: bool = False) -> float:
    """GiB since the last reset: allocated on the GPU, or resident in this process."""
    if GPU:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


def parts(c: GPTConfig, n: int, length: int) -> dict:
    """Seconds and peak memory of a rollout, a scoring pass and an update with n completions. Each
    is measured once, after a warm-up with one minibatch."""
    keep_freed_pages()  # as every script does
    model = make(replace(c, context=length))
    y = torch.randint(model.n_text, (n, length), device=DEVICE)

    def score(y):
        with torch.no_grad():
            for b in y.split(MINIBATCH):
                model.sentiment(b)

    def update(y):
        for b in y.split(MINIBATCH):
            model.logprob(b).mean().backward()
    row = {"parameters": sum(p.numel() for p in model.parameters()), "completions": n,
           "length": length, "vocabulary": c.vocab_size}
    for name, work in (("rollout", lambda y: model.generate(len(y), length, seed=0)),
                       ("score", score), ("update", update)):
        seconds(lambda: work(y[:MINIBATCH]))
        peak_memory(reset=True)
        row |= {f"{name}_s": seconds(lambda: work(y)), f"{name}_gib": peak_memory()}
    return row


def growth():
    n, T = 2048, 64
    for x in (512, 2048, 8192, 16_384):
        yield "completions", MODEL, x, T
    for x in (32, 64, 128, 256):
        yield "length", MODEL, n, x
    for layers, d in ((2, 128), (4, 192), (6, 384), (12, 576)):
        yield "model size", replace(MODEL, n_layer=layers, d_model=d, n_head=d // 64), 512, T
    for x in (512, 2048, 4096, 16_384):
        yield "vocabulary", replace(MODEL, vocab_size=x), n, T


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    device = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} CPU threads"
    name = device.replace(" ", "-").lower() if GPU else "cpu"
    report = {"device": device, "torch": torch.__version__, "dtype": str(DTYPE)}
    for keep in (False,) if GPU else (False, True):
        name_of = "freed pages kept" if keep else "allocator as it comes"
        report[name_of] = r = alone(compare, keep, cfg.rounds)
        print(f"\n{device}, torch {torch.__version__}, {name_of}: copy "
              f"{r['copy_bytes_per_s'] / 1e9:.0f} GB/s, product "
              f"{r['product_flop_per_s'] / 1e12:.2f} TFLOP/s")
        for title, rows in list(r.items())[2:]:
            print(f"\n| {title} | s | tokens/s | times ours | of floor |\n|---|---|---|---|---|")
            for provider, x in rows.items():
                print(f"| {provider} | {x['seconds']:.3f} | {x['tokens_per_s']:,.0f} | "
                      f"{x['ours_is_faster']:.2f} | {x['of_floor']:.0%} |", flush=True)
    if cfg.growth:
        print("\n| grows with | parameters | completions | length | vocabulary | rollout, s | GiB "
              "| score, s | GiB | update, s | GiB |\n|" + "---|" * 11)
        report["growth"] = []
        for what, *case in growth():
            r = alone(parts, *case)
            report["growth"].append({"grows_with": what} | r)
            costs = (f"{r[f'{k}_s']:.2f} | {r[f'{k}_gib']:.2f}" for k in
                     ("rollout", "score", "update"))
            print(f"| {what} | {r['parameters'] / 1e6:.1f} M | {r['completions']:,} | "
                  f"{r['length']} | {r['vocabulary']:,} | {' | '.join(costs)} |", flush=True)
    (ROOT / f"benchmarks/results/speed-{name}.json").write_text(
        json.dumps(report, indent=1, allow_nan=False))
