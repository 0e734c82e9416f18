"""What the scripts do, against what one would call instead, and how their cost grows.

    python -m benchmarks.speed
    pip install transformers               # optional, for the rollout of Hugging Face `generate`

Rollout: 1,024 completions of 64 tokens by `GPT.generate`, by Hugging Face `generate` (the same
weights in its Nemotron, which has the same squared ReLU, rotary positions and grouped-query heads;
its log-probs are compared first), and by a loop without a cache. Training step: ours against the same
step written with PyTorch's own functions. Then time against completions, length, model size and
vocabulary, one at a time. Prints Markdown; writes benchmarks/results/speed-<device>.json.
"""
import json
import resource
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from model import GPT, GPTConfig, fast_dtype, norm, rotate

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEFAULT = GPTConfig(vocab_size=4096, context=128, n_layer=4, n_head=3, n_kv_head=1, d_model=192)  # 01's


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
    for i in range(rounds + 1):
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
            for name, w in zip("qkv", a.qkv.weight.split(sizes)):
                if name != "v":  # it rotates the other way round: the same with the halves exchanged
                    w = w.view(-1, 2, c.d_model // c.n_head // 2, c.d_model).flip(1).flatten(0, 2)
                getattr(b.self_attn, f"{name}_proj").weight.copy_(w)
            b.self_attn.o_proj.weight.copy_(a.proj.weight)
            b.mlp.up_proj.weight.copy_(a.up.weight)
            b.mlp.down_proj.weight.copy_(a.down.weight)
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


def rollout(rounds: int) -> dict:
    ours, n, length = make(DEFAULT), 1024, 64
    calls = {"ours": lambda: ours.generate(n, length, seed=0), "no cache": lambda: without_cache(ours, n, length)}
    if find_spec("transformers"):
        theirs = hugging_face(ours)
        y = ours.generate(8, length, seed=1)[0]
        with torch.no_grad():
            x = torch.cat((torch.full_like(y[:, :1], ours.bos), y[:, :-1]), 1)
            log_p = theirs(x).logits.float().log_softmax(-1).gather(2, y[..., None])[..., 0]
            off = (log_p - ours.logprob(y)[0]).abs().mean().item()
        if off > 0.05:
            raise AssertionError(f"not the same model: log-probs differ by {off:.3f} on average")
        start = torch.full((n, 1), ours.bos, device=DEVICE)
        calls["Hugging Face generate"] = lambda: theirs.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=length,
            min_new_tokens=length, pad_token_id=ours.bos)
    s = medians(calls, rounds)
    return {name: {"seconds": t, "tokens_per_s": n * length / t, "ours_is_faster": t / s["ours"]} for name, t in s.items()}


# ---- Training step -------------------------------------------------------------------------------
def eager_logprob(model: GPT, y: torch.Tensor) -> torch.Tensor:
    """Mean log-prob by PyTorch's own functions: SDPA, relu().square(), cross_entropy."""
    h = norm(model.embed(torch.cat((torch.full_like(y[:, :1], model.bos), y[:, :-1]), 1)).to(model.dtype))
    cos, sin = model.angles(y.size(1))
    for b in model.blocks:
        H, Hkv, _ = b.heads
        q, k, v = b.qkv(norm(h)).unflatten(-1, (H + 2 * Hkv, -1)).split(b.heads, dim=-2)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H > Hkv)
        h = h + b.proj(a.transpose(1, 2).flatten(2))
        h = h + b.down(F.relu(b.up(norm(h))).square())
    logits = F.linear(norm(h), model.unembed())
    return -F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def training_step(rounds: int) -> dict:
    model = make(DEFAULT)
    y = torch.randint(model.n_text, (32, 128), device=DEVICE)
    calls = {"ours": lambda: model.logprob(y)[0].mean().backward(), "eager": lambda: eager_logprob(model, y).backward()}
    s = medians(calls, 4 * rounds)
    return {name: {"seconds": t, "tokens_per_s": y.numel() / t, "ours_is_faster": t / s["ours"]} for name, t in s.items()}


# ---- Growth --------------------------------------------------------------------------------------
def parts(c: GPTConfig, n: int, length: int, rounds: int) -> dict:
    """Seconds of a rollout, a forward for scoring, and an update of n completions."""
    model, mb = make(replace(c, context=length)), 256

    def score():
        with torch.no_grad():
            for b in y.split(mb):
                model.sentiment(b)

    def update():
        for b in y.split(mb):
            model.logprob(b)[0].mean().backward()
    y = torch.randint(model.n_text, (n, length), device=DEVICE)
    s = medians({"rollout": lambda: model.generate(n, length, seed=0), "score": score, "update": update}, rounds)
    return {"parameters": sum(p.numel() for p in model.parameters()), "completions": n, "length": length,
            "vocabulary": c.vocab_size} | s


def growth():
    c, n, T = DEFAULT, 512, 64
    yield "completions", [parts(c, x, T, 1) for x in (512, 1024, 2048, 4096)]
    yield "length", [parts(c, n, x, 1) for x in (32, 64, 128, 256)]
    yield "model size", [parts(replace(c, n_layer=layers, d_model=d, n_head=d // 64), 256, T, 1)
                         for layers, d in ((2, 128), (4, 192), (6, 384), (10, 576))]
    yield "vocabulary", [parts(replace(c, vocab_size=x), n, T, 1) for x in (512, 2048, 8192, 16_384)]


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    path = ROOT / "benchmarks/results" / f"speed-{'cpu' if DEVICE.type == 'cpu' else device.replace(' ', '-').lower()}.json"
    report = {"device": device, "torch": torch.__version__, "dtype": str(fast_dtype(DEVICE))}
    for title, measure in (("rollout of 1,024 x 64 tokens", rollout), ("training step of 32 x 128 tokens", training_step)):
        report[title] = r = measure(cfg.rounds)
        print(f"\n| {title} | s | tokens/s | times ours |\n|---|---|---|---|")
        for name, x in r.items():
            print(f"| {name} | {x['seconds']:.3f} | {x['tokens_per_s']:,.0f} | {x['ours_is_faster']:.2f} |", flush=True)
    if cfg.growth:
        print("\n| grows with | parameters | completions | length | vocabulary | rollout, s | score, s | update, s |\n"
              "|---|---|---|---|---|---|---|---|")
        report["growth"] = {}
        for name, rows in growth():
            report["growth"][name] = rows
            for r in rows:
                print(f"| {name} | {r['parameters'] / 1e6:.1f} M | {r['completions']:,} | {r['length']} | {r['vocabulary']:,} | "
                      f"{r['rollout']:.2f} | {r['score']:.2f} | {r['update']:.2f} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"\npeak memory {peak:.2f} GiB")
    path.write_text(json.dumps(report, indent=1))
