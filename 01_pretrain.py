"""Stage 1: train a small transformer on Shakespeare, from raw text to held-out bits per byte.

    python 01_pretrain.py                   # 185 s: 1.913 bits per byte on held-out text
    python 01_pretrain.py --corpus my.txt   # any UTF-8 text

Times and figures here and in 02 to 05: seed 0, two cores of an Intel Xeon with AMX, no GPU.

Reads   data/shakespeare.txt or ../shared/data/shakespeare.txt. Without them, it downloads the
        complete works, or tinyshakespeare. Without a network, it takes the shipped base model.
Writes  out/base.safetensors (weights, tokenizer, settings, metrics), out/corpus.txt, out/01.jsonl

Decisions a reader may question:
1. The tokenizer is byte-level BPE, trained on the training part only. Three ids are reserved (start
   of text, happy, sad). They never occur in the corpus, and we never sample them.
2. The held-out text is the last 5%, in one piece: random held-out windows would have their
   neighbours in the training text.
3. Sequences do not overlap within an epoch. Each epoch cuts the text at a random offset, so the
   model hardly ever meets the same windows twice.
4. Each sequence begins with the start token, wherever the text was cut. So an unconditional sample
   is a random window of Shakespeare, not always an opening line.
5. Muon trains the matrices; AdamW trains embedding and head. Each group has its own learning rate.
6. We report bits per byte. Nats per token (log 2 nats are one bit) depend on the tokenizer.
"""
import hashlib
import http.client
import math
import re
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from model import (
    GPT,
    RESERVED,
    GPTConfig,
    Log,
    UserError,
    average_gradients,
    check_numbers,
    decode,
    finish,
    gather,
    load,
    my_rows,
    only_writer,
    provenance,
    remove,
    require,
    resume,
    save,
    save_state,
    stale,
    start,
    words,
    world,
    write,
)

HERE = Path(__file__).parent
URLS = ("https://www.gutenberg.org/cache/epub/100/pg100.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")


@dataclass
class Config:
    corpus: str = ""         # a UTF-8 text; empty: data/, ../shared/data/, or a download
    out: Path = Path("out")  # where all stages write
    seed: int = 0
    resume: bool = False     # continue a killed run from its last saved state
    vocab_size: int = 4096   # reserved tokens included
    context: int = 128       # tokens per training sequence
    n_layer: int = 4
    n_head: int = 3
    n_kv_head: int = 1
    d_model: int = 192
    batch: int = 32          # sequences per step
    steps: int = 900
    muon_lr: float = 0.02    # learning rate of the matrices
    weight_decay: float = 0.1  # of the matrices, times their learning rate
    embed_lr: float = 0.05   # large, because rows have unit variance and are normalised when read
    head_lr: float = 8e-3
    warmup: int = 20         # steps of linear warm-up
    cooldown: float = 0.7    # last fraction of the steps, over which all rates fall linearly to 0
    measure_every: int = 225  # steps between held-out measurements
    save_s: float = 30       # seconds between saved states, for --resume
    n_samples: int = 512     # samples drawn at the end to count real words


# 12 million parameters
ON_GPU = dict(n_layer=6, n_head=6, d_model=384, batch=128, steps=320, muon_lr=0.03,
              weight_decay=0.3, embed_lr=0.07, head_lr=0.01, measure_every=80, n_samples=4096)


def check(cfg: Config) -> None:
    check_numbers(cfg, not_negative=("muon_lr", "embed_lr", "head_lr", "weight_decay"), positive=(
        "batch", "steps", "warmup", "measure_every", "context", "cooldown", "n_samples", "n_layer",
        "n_head", "n_kv_head", "d_model", "vocab_size"))
    require(cfg.cooldown <= 1, "--cooldown must be at most 1")
    require(cfg.batch % world()[1] == 0, "--batch must be a multiple of the number of processes")
    require(cfg.d_model % (2 * cfg.n_head) == 0, "--d-model must be a multiple of 2 x --n-head")
    require(cfg.n_head % cfg.n_kv_head == 0, "--n-head must be a multiple of --n-kv-head")


# ---- Text into tokens ----------------------------------------------------------------------------
def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2): every text can be encoded, and
    decodes to itself. The reserved tokens get the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=max(vocab_size - len(RESERVED), len(alphabet)),
                                  initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(list(RESERVED))
    return tokenizer


# ---- Batches and measurements --------------------------------------------------------------------
def epoch_windows(ids: torch.Tensor, context: int, seed: int) -> torch.Tensor:
    """ids (N,) -> (n, context) windows that do not overlap, cut at a random offset, shuffled."""
    g = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(min(context, len(ids) - context + 1), (1,), generator=g))
    n = (len(ids) - offset) // context
    windows = ids[offset:offset + n * context].view(n, context)
    return windows[torch.randperm(n, generator=g)]


def lr_scale(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Linear warm-up, constant, then linear to 0 over the last `cooldown` fraction of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (cooldown * steps))


@torch.no_grad()
def held_out(model: GPT, ids: torch.Tensor, token_bytes: torch.Tensor) -> tuple[float, float]:
    """Mean nats per token, and bits per byte, over windows that do not overlap. Each fills the
    model's context and is read after a start token, so its first tokens have little to go on."""
    n = len(ids) // model.config.context
    windows = ids[: n * model.config.context].view(n, -1).to(model.head.device)
    nats = -sum(float(model.logprob(y).sum(dtype=torch.float64)) for y in windows.split(64))
    return nats / windows.numel(), nats / math.log(2) / int(token_bytes[windows.cpu()].sum())


def real_word_share(samples: list[str], vocabulary: set[str]) -> float:
    """Fraction of sampled words that are in the vocabulary. The first and last word of a sample do
    not count, because the sample may begin or end inside them."""
    sampled = [w for text in samples for w in words(text)[1:-1]]
    return sum(w in vocabulary for w in sampled) / max(len(sampled), 1)


# ---- Finding the corpus: nothing about learning here, skip to the run ----------------------------
def download(url: str, limit_s: float = 120, at_least: int = 500_000) -> str:
    """Fetch a text. Raises UserError if it is refused, slower than `limit_s`, cut off, shorter than
    `at_least` bytes, an HTML page, or not UTF-8."""
    parts, deadline = [], time.monotonic() + limit_s
    try:
        with urllib.request.urlopen(url, timeout=min(limit_s, 20)) as reply:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc="download") as bar:
                while part := reply.read1(1 << 16):
                    parts.append(part)
                    bar.update(len(part))
                    require(time.monotonic() <= deadline, f"{url}: slower than {limit_s:.0f} s")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {error}") from error
    data = b"".join(parts)
    require(len(data) >= size, f"{url}: cut off after {len(data)} of {size} bytes")
    is_html = data[:1000].lstrip(b"\xef\xbb\xbf \r\n").lower().startswith((b"<!doctype", b"<html"))
    require(not is_html, f"{url}: an HTML page, not the text")
    require(len(data) >= at_least, f"{url}: only {len(data)} bytes, not the text")
    print(f"downloaded {url}: {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}")
    return without_licence(decode(data, url)).strip() + "\n"


def without_licence(text: str) -> str:
    """The texts between Project Gutenberg's marks; all of it if there are none."""
    start = r"\*\*\* ?START OF TH\w+ PROJECT GUTENBERG[^\n]*\n|\*END\*? ?THE SMALL PRINT![^\n]*\n"
    end = r"\*\*\* ?END OF TH\w+ PROJECT GUTENBERG|\nEnd of (?:the )?Project Gutenberg"
    books = re.split(start, text)[1:]
    return "\n\n".join(re.split(end, book)[0].strip() for book in books) + "\n" if books else text


def find_corpus(path: str, urls=URLS) -> str | None:
    """The corpus, or None if there is none and none can be downloaded."""
    local = [Path(path)] if path else [HERE / "data" / "shakespeare.txt",
                                       HERE.parent / "shared" / "data" / "shakespeare.txt"]
    for file in local:
        if path or file.exists():
            print(f"corpus: {file}")
            if not file.is_file():
                raise UserError(f"--corpus {file} is not a file: name a UTF-8 text file")
            return without_licence(decode(file.read_bytes(), str(file)))
    for url in urls:
        try:
            text = download(url)
        except UserError as error:
            print(f"download failed: {error}")
            continue
        write(local[0], text)
        return text
    return None


def use_shipped_model(out: Path) -> None:
    """Without corpus and network, take the base model that this script's defaults once trained."""
    print("no corpus and no network: using pretrained/base.safetensors, which this script made")
    shipped = HERE / "pretrained" / "base.safetensors"
    _, _, header = load(shipped, "git checkout pretrained")
    base, data = out / "base.safetensors", shipped.read_bytes()
    require(not base.exists() or base.read_bytes() == data,
            f"{base} is another model, which would be lost: name its corpus with --corpus FILE, or "
            "choose another --out")
    write(base, data)
    print("its metrics:", ", ".join(f"{k} {v:.4g}" for k, v in header["metrics"].items()))
    (out / "corpus.txt").unlink(missing_ok=True)
    finish("python 02_sample_label.py")


# ---- The run -------------------------------------------------------------------------------------
if __name__ == "__main__":
    cfg, device, dtype = start(Config, __doc__, ON_GPU)
    check(cfg)
    only_writer(cfg.out / "base.safetensors")
    text = find_corpus(cfg.corpus)
    if text is None:
        use_shipped_model(cfg.out)
        raise SystemExit
    require(not any(token in text for token in RESERVED),
            f"the corpus contains one of the reserved tokens {', '.join(RESERVED)}")
    require(len(text) >= 2000, f"the corpus has {len(text)} characters, too few to learn from: "
                               "choose a larger one with --corpus FILE")

    # -- text into tokens, the last 5% held out
    cut = int(len(text) * 0.95)
    tokenizer = train_tokenizer(text[:cut], cfg.vocab_size)
    train_ids = torch.tensor(tokenizer.encode(text[:cut]).ids)                       # (N,)
    test_ids = torch.tensor(tokenizer.encode(text[cut:]).ids)
    vocab_size = tokenizer.get_vocab_size()
    # a byte-level token is spelled with one character per byte
    token_bytes = torch.tensor([len(tokenizer.id_to_token(i)) for i in range(vocab_size)])
    per_epoch = (len(train_ids) // cfg.context - 1) // cfg.batch  # the offset may cost a window
    require(per_epoch > 0, f"{len(train_ids)} training tokens are too few for one batch of "
            f"{cfg.batch} x {cfg.context}: lower --batch or --context, or use a longer --corpus")
    require(len(test_ids) >= cfg.context, "the held-out part, the last 5% of the corpus, has "
            f"{len(test_ids)} tokens, too few for one window of {cfg.context}: lower --context, or "
            "use a longer --corpus")
    print(f"{len(train_ids)} training and {len(test_ids)} held-out tokens, "
          f"{len(text[:cut].encode()) / len(train_ids):.2f} bytes each")

    # -- the model and its two optimizers
    model = GPT(GPTConfig(vocab_size, cfg.context, cfg.n_layer, cfg.n_head, cfg.n_kv_head,
                          cfg.d_model))
    model.to(device).dtype = dtype
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{cfg.steps / per_epoch:.1f} epochs of {per_epoch} steps")
    matrices = {"params": list(model.blocks.parameters()), "peak_lr": cfg.muon_lr}
    embedding = {"params": [model.embed.weight], "peak_lr": cfg.embed_lr}
    head = {"params": [model.head], "peak_lr": cfg.head_lr}
    muon = torch.optim.Muon([matrices], weight_decay=cfg.weight_decay)
    adam = torch.optim.AdamW([embedding, head], betas=(0.9, 0.95), weight_decay=0)

    # -- begin anew, or with --resume where a killed run saved its state
    inputs = {"corpus_sha256": hashlib.sha256(text.encode()).hexdigest()}
    state_path = cfg.out / "01-state.pt"
    run = {"step": 0, "rows": [], "seconds": 0.0, "inputs": inputs}
    run |= resume(state_path, cfg, inputs)
    parts = {"model": model, "muon": muon, "adam": adam}
    with stale(state_path):
        for name in parts.keys() & run.keys():
            parts[name].load_state_dict(run[name])
    first = run["step"]
    log = Log(cfg.out / "01.jsonl", run["rows"])

    # -- training
    seconds, saved = 0.0, time.monotonic()
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc="pretrain")
    for step in bar:
        began = time.monotonic()
        epoch, i = divmod(step, per_epoch)
        if step == first or i == 0:
            windows = epoch_windows(train_ids, cfg.context, cfg.seed * 1000 + epoch).to(device)
        rows = my_rows(torch.arange(i * cfg.batch, (i + 1) * cfg.batch), cfg.batch)
        loss = -model.logprob(windows[rows]).mean()
        loss.backward()
        average_gradients(model)
        scale = lr_scale(step, cfg.steps, cfg.warmup, cfg.cooldown)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.step()
            optimizer.zero_grad()
        row = {"step": step, "lr_scale": scale,
               "nats_per_token": gather(loss.detach()[None]).mean().item()}
        seconds += time.monotonic() - began
        require(math.isfinite(row["nats_per_token"]), f"diverged at step {step}: the loss is not a "
                "number; lower --muon-lr, --embed-lr and --head-lr, and start without --resume")
        tokens_per_s = (step + 1 - first) * cfg.batch * cfg.context / seconds
        bar.set_postfix(nats=f"{row['nats_per_token']:.3f}", refresh=False)
        if (step + 1) % cfg.measure_every == 0 or step + 1 == cfg.steps:
            nats, bits = held_out(model, test_ids, token_bytes)
            row |= {"held_out_nats": nats, "held_out_bits_per_byte": bits}
            tqdm.write(f"step {step + 1}: held out {bits:.3f} bits per byte")
        log(**row, tokens_per_s=tokens_per_s)
        if time.monotonic() - saved > cfg.save_s or step + 1 == cfg.steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_state(state_path, cfg, run | {"step": step + 1} | states)
            saved = time.monotonic()

    # -- results
    last = run["rows"][-1]
    nats, bits = last["held_out_nats"], last["held_out_bits_per_byte"]
    uniform = math.log(model.n_text)
    require(nats <= uniform + 0.1, f"diverged: held-out text costs {nats:.3g} nats per token, and "
            f"{uniform:.1f} without any learning; lower --muon-lr, --embed-lr and --head-lr, and "
            "start without --resume")
    tokens, _ = model.generate(cfg.n_samples, 64, seed=cfg.seed)
    samples = tokenizer.decode_batch(tokens.tolist())
    metrics = {"nats_per_token": nats, "bits_per_byte": bits, "perplexity": math.exp(nats),
               "tokens_per_s": last["tokens_per_s"],
               "real_word_share": real_word_share(samples, set(words(text[:cut])))}
    write(cfg.out / "corpus.txt", text)
    save(cfg.out / "base.safetensors", model, tokenizer, step=cfg.steps, metrics=metrics,
         inputs=inputs, **provenance(cfg, run["seconds"]))
    remove(state_path)
    for sample in samples[:3]:
        print(f"--- sample\n{sample}")
    print("---\nheld out:", ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    finish("python 02_sample_label.py", run["seconds"])
