"""What the scripts do, against what one would call instead, and how their cost grows.

    python -m benchmarks.speed
    pip install transformers               # optional, for the rollout of Hugging Face `generate`

On a CPU the comparisons are made twice: with the allocator as it comes, and with freed pages kept, as
all scripts do (`keep_freed_pages` in model.py), which helps the others as well.

Rollout by `GPT.generate`, by Hugging Face `generate` (the same weights in its Nemotron, which has the
same squared ReLU, rotary positions and grouped-query heads; its log-probs are compared first), and by
a loop without a cache. Training step: ours against the same step written with PyTorch's own
functions. The floor is the arithmetic, or the KV cache read once a token, at the rates that a large
product and a copy reach in this run. Then time and peak memory against completions, length, model
size and vocabulary, one at a time, each in a process of its own. Model and batch are the defaults of
01 and 04 on this device. Prints Markdown; writes benchmarks/results/speed-<device>.json.
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

from benchmarks.kernels import ceilings
from model import GPT, GPTConfig, fast_dtype, keep_freed_pages, norm, rotate

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pretrain = importlib.import_module("01_pretrain")
PRESET = pretrain.Config(**(pretrain.ON_GPU if DEVICE.type == "cuda" else {}))
DEFAULT = GPTConfig(PRESET.vocab_size, PRESET.context, PRESET.n_layer, PRESET.n_head, PRESET.n_kv_head, PRESET.d_model)
COMPLETIONS = 4096 if DEVICE.type == "cuda" else 1024


@dataclass
class Config:
    rounds: int = 3  # measurements of each, in turn; the median counts
    growth: bool = True


def make(c: GPTConfig) -> GPT:
    """A model with random weights of a trained one's size: speed does not depend on what it has learned,
    but zeros would be unfair to nobody and untypical for all."""
    torch.manual_seed(0)
    model = GPT(c).to(DEVICE)
    model.dtype = fast_dtype(DEVICE)
    for name, p in model.named_parameters():
        if name != "embed.weight":
            torch.nn.init.normal_(p, std=p.size(-1) ** -0.5)
    return model


def medians(calls: dict, rounds: int) -> dict[str, float]:
    """Seconds, all in turn, after one warm-up each."""
    times: dict = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: sorted(t[1:])[rounds // 2] for name, t in times.items()}


# ---- Rollout -------------------------------------------------------------------------------------
def hugging_face(ours: GPT):
    """The same weights in Nemotron: our input normalisation goes into its embedding, our norms have
    no learned scale (its scale is 1 + 0)."""
    from transformers import NemotronConfig, NemotronForCausalLM
    c = ours.config
    theirs = NemotronForCausalLM(NemotronConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=4 * c.d_model, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.d_model // c.n_head,
        hidden_act="relu2", norm_eps=1e-5, max_position_embeddings=c.context, bos_token_id=ours.bos, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        tie_word_embeddings=False, attention_bias=False, mlp_bias=False)).eval()
    theirs.lm_head = torch.nn.Linear(c.d_model, ours.n_text, bias=False)
    sizes = [h * c.d_model // c.n_head for h in (c.n_head, c.n_kv_head, c.n_kv_head)]
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p.zero_()
        theirs.model.embed_tokens.weight.copy_(norm(ours.embed.weight))
        theirs.lm_head.weight.copy_(ours.head[: ours.n_text])
        for a, b in zip(ours.blocks, theirs.model.layers):
            for name, w in zip("qkv", a.attention.qkv.weight.split(sizes)):
                if name != "v":  # it rotates the other way round: the same with the halves exchanged
                    w = w.view(-1, 2, c.d_model // c.n_head // 2, c.d_model).flip(1).flatten(0, 2)
                getattr(b.self_attn, f"{name}_proj").weight.copy_(w)
            b.self_attn.o_proj.weight.copy_(a.attention.proj.weight)
            b.mlp.up_proj.weight.copy_(a.mlp.up.weight)
            b.mlp.down_proj.weight.copy_(a.mlp.down.weight)
    return theirs.to(DEVICE, ours.dtype)


@torch.no_grad()
def without_cache(model: GPT, n: int, length: int) -> torch.Tensor:
    """The loop of a first solution: the whole prefix again for every token."""
    y = torch.empty(n, 0, dtype=torch.long, device=DEVICE)
    for _ in range(length):
        x = torch.cat((torch.full((n, 1), model.bos, device=DEVICE), y), 1)
        p = (model(x, last_only=True)[:, 0] @ model.unembed().T).float().softmax(-1)
        y = torch.cat((y, p.multinomial(1)), 1)
    return y


def rollout(rounds: int) -> tuple[dict, int, float, float]:
    """-> seconds of each, tokens, FLOP and bytes that every one of them must at least do and read."""
    ours, n, length = make(DEFAULT), COMPLETIONS, 64
    calls = {"ours": lambda: ours.generate(n, length, seed=0), "no cache": lambda: without_cache(ours, n, length)}
    if find_spec("transformers"):
        theirs = hugging_face(ours)
        y = ours.generate(8, length, seed=1)[0]
        with torch.no_grad():
            x = torch.cat((torch.full_like(y[:, :1], ours.bos), y[:, :-1]), 1)
            log_p = theirs(x).logits.float().log_softmax(-1).gather(2, y[..., None])[..., 0]
            off = (log_p - ours.logprob(y)).abs().mean().item()
        if off > 0.05:
            raise AssertionError(f"not the same model: log-probs differ by {off:.3f} on average")
        start = torch.full((n, 1), ours.bos, device=DEVICE)

        def generate(**how):
            theirs.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, top_p=1.0,
                            max_new_tokens=length, min_new_tokens=length, pad_token_id=ours.bos, **how)
        calls["Hugging Face generate"] = generate
        if DEVICE.type == "cuda":  # where a static cache also means a compiled forward
            calls["Hugging Face generate, static cache"] = lambda: generate(cache_implementation="static")
    c, itemsize = DEFAULT, ours.dtype.itemsize
    cache = c.n_layer * 2 * n * c.n_kv_head * (c.d_model // c.n_head) * length**2 / 2 * itemsize
    return medians(calls, rounds), n * length, 2 * products(ours) * n * length, cache


def products(model: GPT) -> int:
    """Weights that every token is multiplied with."""
    return sum(p.numel() for p in model.blocks.parameters()) + model.unembed().numel()


# ---- Training step -------------------------------------------------------------------------------
def eager_logprob(model: GPT, y: torch.Tensor) -> torch.Tensor:
    """Mean log-prob by PyTorch's own functions: SDPA, relu().square(), cross_entropy."""
    h = norm(model.embed(torch.cat((torch.full_like(y[:, :1], model.bos), y[:, :-1]), 1)).to(model.dtype))
    cos, sin = model.angles(y.size(1))
    for b in model.blocks:
        H, Hkv = b.attention.n_head, b.attention.n_kv_head
        q, k, v = b.attention.qkv(norm(h)).unflatten(-1, (H + 2 * Hkv, -1)).split((H, Hkv, Hkv), dim=-2)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H > Hkv)
        h = h + b.attention.proj(a.transpose(1, 2).flatten(2))
        h = h + b.mlp.down(F.relu(b.mlp.up(norm(h))).square())
    logits = F.linear(norm(h), model.unembed())
    return -F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def training_step(rounds: int) -> tuple[dict, int, float, float]:
    model = make(DEFAULT)
    y = torch.randint(model.n_text, (PRESET.batch, PRESET.context), device=DEVICE)
    calls = {"ours": lambda: model.logprob(y).mean().backward(), "eager": lambda: eager_logprob(model, y).backward()}
    if DEVICE.type == "cuda":
        compiled = torch.compile(eager_logprob)
        calls["compiled"] = lambda: compiled(model, y).backward()
    return medians(calls, 4 * rounds), y.numel(), 6 * products(model) * y.numel(), 0


def compare(keep: bool, rounds: int) -> dict:
    """Both comparisons, with the allocator as it comes, or with freed pages kept as the scripts do."""
    if keep:
        keep_freed_pages()
    before = ceilings(11)
    done = {f"rollout of {COMPLETIONS:,} x 64 tokens": rollout(rounds),
            f"training step of {PRESET.batch} x {PRESET.context} tokens": training_step(rounds)}
    bandwidth, peak = map(max, before, ceilings(11))
    return {"copy_bytes_per_s": bandwidth, "product_flop_per_s": peak} | {
        title: {name: {"seconds": s, "tokens_per_s": tokens / s, "ours_is_faster": s / seconds["ours"],
                       "of_floor": max(flop / peak, read / bandwidth) / s} for name, s in seconds.items()}
        for title, (seconds, tokens, flop, read) in done.items()}


def alone(f, *arguments):
    """f(*arguments) in a process of its own: neither its memory nor its allocator is another's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(f, *arguments).result()


# ---- Growth --------------------------------------------------------------------------------------
def peak_memory(reset: bool = False) -> float:
    """GiB: allocated on the GPU, or resident in this process, at most since the last reset."""
    if DEVICE.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def parts(c: GPTConfig, n: int, length: int) -> dict:
    """Seconds and peak memory of a rollout, of a forward pass for scoring, and of an update by n
    completions, once each after a warm-up with 256."""
    keep_freed_pages()  # as every script does
    model, mb = make(replace(c, context=length)), 256
    y = torch.randint(model.n_text, (n, length), device=DEVICE)

    def score(y):
        with torch.no_grad():
            for b in y.split(mb):
                model.sentiment(b)

    def update(y):
        for b in y.split(mb):
            model.logprob(b).mean().backward()
    row = {"parameters": sum(p.numel() for p in model.parameters()), "completions": n, "length": length,
           "vocabulary": c.vocab_size}
    for name, work in (("rollout", lambda y: model.generate(len(y), length, seed=0)), ("score", score), ("update", update)):
        work(y[:mb])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        peak_memory(reset=True)
        began = time.perf_counter()
        work(y)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        row |= {f"{name}_s": time.perf_counter() - began, f"{name}_gib": peak_memory()}
    return row


def growth():
    c, n, T = DEFAULT, 2048, 64
    for x in (512, 2048, 8192, 16_384):
        yield "completions", c, x, T
    for x in (32, 64, 128, 256):
        yield "length", c, n, x
    for layers, d in ((2, 128), (4, 192), (6, 384), (12, 576)):
        yield "model size", replace(c, n_layer=layers, d_model=d, n_head=d // 64), 512, T
    for x in (512, 2048, 4096, 16_384):
        yield "vocabulary", replace(c, vocab_size=x), n, T


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    path = ROOT / "benchmarks/results" / f"speed-{'cpu' if DEVICE.type == 'cpu' else device.replace(' ', '-').lower()}.json"
    report = {"device": device, "torch": torch.__version__, "dtype": str(fast_dtype(DEVICE))}
    for keep in (False, True) if DEVICE.type == "cpu" else (False,):
        name = "freed pages kept" if keep else "allocator as it comes"
        report[name] = r = alone(compare, keep, cfg.rounds)
        print(f"\n{device}, torch {torch.__version__}, {name}: copy {r['copy_bytes_per_s'] / 1e9:.0f} GB/s, product "
              f"{r['product_flop_per_s'] / 1e12:.2f} TFLOP/s")
        for title in list(r)[2:]:
            print(f"\n| {title} | s | tokens/s | times ours | of floor |\n|---|---|---|---|---|")
            for provider, x in r[title].items():
                print(f"| {provider} | {x['seconds']:.3f} | {x['tokens_per_s']:,.0f} | {x['ours_is_faster']:.2f} | "
                      f"{x['of_floor']:.0%} |", flush=True)
    if cfg.growth:
        print("\n| grows with | parameters | completions | length | vocabulary | rollout, s | GiB | score, s | GiB | "
              "update, s | GiB |\n|" + "---|" * 11)
        report["growth"] = []
        for name, *case in growth():
            r = alone(parts, *case)
            report["growth"].append({"grows_with": name} | r)
            print(f"| {name} | {r['parameters'] / 1e6:.1f} M | {r['completions']:,} | {r['length']} | {r['vocabulary']:,} | "
                  + " | ".join(f"{r[f'{k}_s']:.2f} | {r[f'{k}_gib']:.2f}" for k in ("rollout", "score", "update")) + " |",
                  flush=True)
    path.write_text(json.dumps(report, indent=1))
