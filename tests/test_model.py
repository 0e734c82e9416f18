import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import model as m
from kernels import squared_relu
from kernels.decoder import Decoder
from model import (
    GPT,
    GPTConfig,
    Log,
    UserError,
    fast_dtype,
    fingerprint,
    load,
    read_prompts,
    resume,
    save,
    save_state,
)
from report.complete import complete


def tiny(vocab=20, context=12, kv=1, seed=0, noise=0.3, dtype=torch.float32):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab, context, n_layer=2, n_head=2, n_kv_head=kv, d_model=16))
    with torch.no_grad():  # away from the zero start, where every distribution is uniform
        for p in gpt.parameters():
            p.add_(noise * torch.randn_like(p))
    gpt.dtype = dtype
    return gpt


@pytest.fixture(scope="module")
def tokenizer():
    return importlib.import_module("01_pretrain").train_tokenizer("to be or not to be " * 50, 300)


def test_reversing_needs_the_first_half_and_cannot_foresee_it():
    """Chapter 1's check of the mask: on random sequences followed by their reverse, a causal model
    learns the second half and stays at ln(10) on the first. A leaking mask learns both."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(13, 12, n_layer=2, n_head=2, n_kv_head=2, d_model=32))
    optimizer = torch.optim.Adam(gpt.parameters(), lr=3e-3)
    for _ in range(500):
        half = torch.randint(10, (64, 6))
        nll = -gpt.logprob(torch.cat((half, half.flip(1)), dim=1))
        optimizer.zero_grad()
        nll.mean().backward()
        optimizer.step()
    first, second = nll[:, :6].mean().item(), nll[:, 6:].mean().item()
    assert second < 0.2 and first > 2.2, (first, second)


def test_hidden_states_are_causal_and_positions_matter():
    gpt, x = tiny(), torch.randint(17, (2, 10))
    before = gpt(x)
    y = x.clone()
    y[:, 6] = (y[:, 6] + 1) % 17
    assert (torch.equal(before[:, :6], gpt(y)[:, :6])
            and not torch.allclose(before[:, 6:], gpt(y)[:, 6:]))
    same = gpt(torch.full((1, 4), 3))  # the tokens are equal; only their positions differ,
    assert torch.allclose(same[0, 0], same[0, 3], atol=1e-5)  # and values carry no position
    ab, ba = gpt(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, 2]
    assert not torch.allclose(ab, ba, atol=1e-3)


def test_the_decoder_draws_what_the_loop_draws():
    """The step that a GPU captures, run on a CPU, against the loop of `GPT.draw`: with prompts of
    several lengths, a batch smaller than the buffers, and a second rollout with other weights."""
    gpt, other = tiny(seed=1), tiny(seed=2)
    prompt = torch.tensor([[3, 1, 4, 1], [5, 9, -1, -1], [-1, -1, -1, -1]])
    numbers = torch.tensor([7, 0, 2])
    decoder = Decoder(gpt, 5, 4, 8)
    for model in (gpt, other):
        with torch.no_grad():
            torch._foreach_copy_(list(decoder.model.parameters()), list(model.parameters()))
            expected = model.draw(numbers, prompt, 8, seed=3)
            found = decoder.draw(numbers, prompt, 8, seed=3)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)


def test_a_decoder_samples_a_changed_model(monkeypatch):
    """Otherwise a GPU would sample from another policy than the one it trains."""
    gpt, prompt, numbers = (tiny(seed=1), torch.empty(3, 0, dtype=torch.long),
                            torch.tensor([7, 0, 2]))
    with torch.no_grad():
        plain = gpt.draw(numbers, prompt, 8, seed=3)
    monkeypatch.setattr(m.MLP, "forward", lambda self, x: self.down(self.up(x).relu()))
    decoder = Decoder(gpt, 3, 0, 8)
    with torch.no_grad():
        found, expected = (decoder.draw(numbers, prompt, 8, seed=3),
                           gpt.draw(numbers, prompt, 8, seed=3))
    assert torch.equal(found[0], expected[0]) and not torch.equal(found[1], plain[1])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)


def test_the_gpu_path_of_generate_is_the_decoder(monkeypatch):
    """If a step can be captured, `generate` uses a decoder with the current weights."""
    from kernels import decoder
    gpt, other = tiny(seed=1), tiny(seed=2)
    prompt = torch.tensor([[3, 1, 4, 1], [5, 9, -1, -1], [-1, -1, -1, -1]])
    expected = [model.generate(3, 8, seed=3, batch=2, prompts=prompt)[0] for model in (gpt, other)]
    monkeypatch.setattr(m, "can_capture", lambda model: True)
    monkeypatch.setattr(decoder, "decoders", {})
    found = [model.generate(3, 8, seed=3, batch=2, prompts=prompt)[0] for model in (gpt, other)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert len(decoder.decoders) == 1  # models of the same shape share it


def test_a_rollout_uses_the_weights_of_now():
    gpt, other = tiny(seed=1), tiny(seed=2)
    before = gpt.generate(20, 8, seed=0)[0]
    with torch.no_grad():
        for p, q in zip(gpt.parameters(), other.parameters()):
            p.copy_(q)
    after = gpt.generate(20, 8, seed=0)[0]
    assert torch.equal(after, other.generate(20, 8, seed=0)[0]) and not torch.equal(before, after)
    assert torch.equal(gpt.generate(5, 8, seed=0)[0], after[:5])  # a smaller batch, another decoder


def test_prompts_of_different_lengths_equal_one_by_one():
    """A batch of prompts of 0 to 4 tokens gives each row the rollout, log-probs and
    gradients that it has alone, without padding. What the padding holds does not matter."""
    gpt, length = tiny(seed=4), 5
    prompt = torch.tensor(
        [[3, 1, 4, 1], [5, 9, -1, -1], [-1, -1, -1, -1], [2, -1, -1, -1], [6, 5, 3, 5]])
    y, sampled = gpt.generate(5, length, seed=1, prompts=prompt, batch=3)
    logp = gpt.logprob(y, prompt)
    torch.testing.assert_close(sampled, logp.detach(), rtol=1e-4, atol=1e-5)
    logp.sum().backward()
    grad, gpt.embed.weight.grad = gpt.embed.weight.grad.clone(), None
    for i, row in enumerate(prompt):
        start = row[row >= 0]
        alone, _ = gpt.generate(torch.tensor([i]), length, seed=1, prompts=start[None])
        assert torch.equal(alone, y[i:i + 1])
        both = gpt.logprob(torch.cat((start, y[i]))[None])  # as one
        torch.testing.assert_close(both[0, len(start):], logp[i], rtol=1e-5, atol=1e-6)
        both[0, len(start):].sum().backward()
    torch.testing.assert_close(gpt.embed.weight.grad, grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(gpt.generate(3, length, seed=1, prompts=prompt[2:3].expand(3, -1))[0],
                       gpt.generate(3, length, seed=1)[0])


def test_the_picture_of_the_layout():
    """The picture in `lay_out`, whose padding may hold anything; and a prompt without padding."""
    y, prompt = torch.tensor([[7, 8, 9], [7, 8, 9]]), torch.tensor([[5, 6, -1], [4, 5, 6]])
    x, places = m.lay_out(y, prompt, bos=99)
    assert (x.tolist() == [[99, 5, 6, 7, 8, 9, 9], [99, 4, 5, 6, 7, 8, 9]]
            and places.tolist() == [[2, 3, 4], [3, 4, 5]])
    assert torch.equal(x.gather(1, places + 1), y)


def test_prompts_come_from_both_parts_of_the_text(tokenizer, tmp_path):
    label = importlib.import_module("02_sample_label")
    speech = "ROMEO:\nTo be, or not\nTo be\n\nNURSE:\n" + "a very long line " * 30 + "\n\n"
    (tmp_path / "c.txt").write_text(speech * 40 + "JULIET:\nNot to be\n" * 200)
    label.write_prompts(tmp_path / "c.txt", tokenizer, 24, tmp_path / "prompts.json")

    def texts(part):
        rows = read_prompts(tmp_path / "prompts.json", part, 999)
        return tokenizer.decode_batch([[t for t in row if t >= 0] for row in rows.tolist()])
    assert (texts("train") == ["ROMEO:\nTo be, or not\n", "JULIET:\nNot to be\n"]
            and texts("held_out") == ["JULIET:\nNot to be\n"])
    gutenberg = "WITCH.\nWhen shall we\n\nTHIRD, A.\nThere\n\nThus:\nSo\n\n" * 99  # its layout
    assert tokenizer.decode_batch(label.find_prompts("training", gutenberg, tokenizer, 24)) == [
        "WITCH.\nWhen shall we\n", "THIRD, A.\nThere\n"]
    with pytest.raises(UserError, match="missing"):
        label.write_prompts(tmp_path / "none.txt", tokenizer, 24, tmp_path / "prompts.json")
    with pytest.raises(UserError, match="missing: run python 02_sample_label.py --prompts"):
        read_prompts(tmp_path / "none.json", "train", 999)
    with pytest.raises(UserError, match="held-out text has no prompts"):
        label.find_prompts("held-out", "no speakers here\n" * 99, tokenizer, 24)


def test_settings_of_a_gpu(monkeypatch, capsys):
    """On a GPU the defaults come from ON_GPU; a flag on the command line still wins."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(m, "has_bf16", lambda device: True)
    monkeypatch.setattr(m, "live_path", lambda device: "Triton")
    for name, flag in (("01_pretrain", "--steps"), ("02_sample_label", "--n"),
                       ("03_reward_model", "--warmup"), ("04_ppo", "--max-iterations")):
        stage = importlib.import_module(name)
        monkeypatch.setattr("sys.argv", [name, flag, "7"])
        cfg, device, dtype = m.start(stage.Config, stage.__doc__, stage.ON_GPU)
        expected = stage.Config(**stage.ON_GPU | {flag[2:].replace("-", "_"): 7})
        assert (cfg == expected != stage.Config() and device.type == "cuda"
                and dtype is torch.bfloat16)


@pytest.mark.parametrize("kv", [1, 2])
def test_cached_sampling_equals_the_full_forward(kv):
    """Guards against a cache, position or head slice that differs between rollout and scoring."""
    gpt = tiny(kv=kv)
    tokens, logp = gpt.generate(50, 12, seed=3, batch=16)
    full = gpt.logprob(tokens)
    torch.testing.assert_close(logp, full.detach(), rtol=0, atol=1e-5)
    assert tokens.max() < gpt.n_text  # reserved tokens are never sampled


def test_a_sample_depends_on_seed_and_number_alone():
    gpt = tiny()
    whole = gpt.generate(40, 12, seed=3)[0]
    assert torch.equal(whole, gpt.generate(40, 12, seed=3, batch=7)[0])
    assert torch.equal(whole[25:], gpt.generate(torch.arange(25, 40), 12, seed=3)[0])
    assert not torch.equal(whole, gpt.generate(40, 12, seed=4)[0])
    assert len(set(map(tuple, whole.tolist()))) == 40


def test_sampled_sequences_follow_the_model():
    """A chi-square test of 30,000 two-token samples against the enumerated joint distribution."""
    gpt = tiny(vocab=9, noise=0.5)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    p = gpt.logprob(pairs).double().sum(1).exp().detach()
    assert abs(p.sum() - 1) < 1e-5
    n = 30_000
    tokens, _ = gpt.generate(n, 2, seed=0, batch=10_000)
    counts = (tokens[:, 0] * 6 + tokens[:, 1]).bincount(minlength=36)
    chi = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi < 35 + 4 * 70**0.5


def test_sentiment_reads_the_whole_sample_and_two_tokens():
    """Guards against a reward that misses the last sampled token."""
    gpt, y = tiny(), torch.randint(17, (4, 8))
    log_p = gpt.sentiment(y)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(4))
    changed = y.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 17
    assert not torch.allclose(log_p, gpt.sentiment(changed))


def test_squared_relu_gradient():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    y = squared_relu(x)
    y.sum().backward()
    assert torch.equal(y, x.clamp_min(0) ** 2) and torch.equal(x.grad, 2 * x.detach().clamp_min(0))


def test_save_and_load(tmp_path, tokenizer):
    gpt = tiny(vocab=tokenizer.get_vocab_size())
    save(tmp_path / "x.safetensors", gpt, tokenizer, step=7, metrics={"a": 1.5})
    again, tok, header = load(tmp_path / "x.safetensors", "01")
    assert header["step"] == 7 and header["metrics"] == {"a": 1.5} and again.config == gpt.config
    assert tok.to_str() == tokenizer.to_str() and fingerprint(again) == fingerprint(gpt)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    gpt.dtype = torch.bfloat16
    save(tmp_path / "half.safetensors", gpt, tokenizer)
    size = [(tmp_path / f).stat().st_size - len(tokenizer.to_str())
            for f in ("x.safetensors", "half.safetensors")]
    assert size[1] < 0.75 * size[0]


def test_completions_are_those_that_generate_draws_after_the_prompt(tmp_path, tokenizer, capsys):
    gpt = tiny(vocab=tokenizer.get_vocab_size())
    save(tmp_path / "x.safetensors", gpt, tokenizer)
    complete(tmp_path / "x.safetensors", "to be", length=6, n=2, seed=3)
    prompt = torch.tensor([tokenizer.encode("to be").ids] * 2)
    y, _ = load(tmp_path / "x.safetensors", "", dtype=fast_dtype(torch.device("cpu")))[0].generate(
        2, 6, 3, prompts=prompt)
    assert capsys.readouterr().out == "".join(
        f"to be{text}\n\n" for text in tokenizer.decode_batch(y.tolist()))
    with pytest.raises(UserError, match="has learned 12 tokens"):
        complete(tmp_path / "x.safetensors", "to be", length=12)


def test_optimizers_continue_exactly(tmp_path, tokenizer):
    def make(gpt):
        return (torch.optim.Muon(gpt.blocks.parameters(), lr=0.01),
                torch.optim.AdamW([gpt.embed.weight, gpt.head], lr=0.01))

    def step(gpt, optimizers, seed):
        y = torch.randint(200, (4, 6), generator=torch.Generator().manual_seed(seed))
        (-gpt.logprob(y).mean()).backward()
        for o in optimizers:
            o.step(), o.zero_grad()

    gpt = tiny(vocab=tokenizer.get_vocab_size())
    optimizers = make(gpt)
    for s in range(3):
        step(gpt, optimizers, s)
    path, inputs = tmp_path / "state.pt", {"corpus": "x"}
    save_state(path, Config(), {"step": 3, "seen": [1], "seconds": 0.0, "inputs": inputs,
                                "model": gpt.state_dict(),
                                "optimizers": [o.state_dict() for o in optimizers]})
    again = tiny(vocab=tokenizer.get_vocab_size(), seed=9)
    more = make(again)
    state = resume(path, Config(), inputs)
    assert (state["step"], state["seen"]) == (3, [1])
    again.load_state_dict(state["model"])
    for optimizer, saved in zip(more, state["optimizers"]):
        optimizer.load_state_dict(saved)
    for s in range(3, 6):
        step(gpt, optimizers, s), step(again, more, s)
    assert fingerprint(gpt) == fingerprint(again)


@dataclass
class Config:
    out: Path = Path("out")
    resume: bool = True
    lr: float = 0.01
    save_s: float = 0


def test_what_a_run_resumes_from(tmp_path):
    """Never from other inputs, other settings, an earlier run or a damaged file."""
    path, inputs = tmp_path / "state.pt", {"corpus": "x"}
    assert resume(path, Config(), inputs) == {}
    save_state(path, Config(), {"step": 3, "seconds": 1.0, "inputs": inputs})
    assert resume(path, Config(save_s=9, out=Path("elsewhere")), inputs)["step"] == 3
    assert resume(path, Config(), {"corpus": "y"}) == {} and not path.exists()
    (tmp_path / "state.pt.old").rename(path)  # nothing is lost
    with pytest.raises(UserError, match="other values of lr"):
        resume(path, Config(lr=0.1), inputs)
    whole = path.read_bytes()
    for broken in (whole[:-10], b"", b"not a state"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="truncated or damaged"):
            resume(path, Config(), inputs)
        assert path.read_bytes() == broken
    assert resume(path, Config(resume=False), inputs) == {} and not path.exists()


def test_a_state_holds_plain_types_only(tmp_path):
    """Guards against a file that runs code when it is read."""
    import pickle
    save_state(tmp_path / "s.pt", Config(),
               {"step": 0, "seconds": 0.0, "inputs": {}, "bad": Config()})
    with pytest.raises(UserError, match="damaged"):
        resume(tmp_path / "s.pt", Config(), {})
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "s.pt", weights_only=True)


def test_load_refuses_what_it_cannot_use(tmp_path, tokenizer):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="missing: run python 01_pretrain.py first"):
        load(path, "01_pretrain.py")
    save(path, tiny(vocab=tokenizer.get_vocab_size()), tokenizer)
    whole = path.read_bytes()
    for cut in (0, 5, 1000, len(whole) - 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="truncated or damaged"):
            load(path, "01")
    from safetensors.torch import save_file
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="or another version wrote it"):
        load(path, "01")


def test_write_keeps_the_old_file_if_it_cannot_write_the_new(tmp_path, monkeypatch):
    m.write(tmp_path / "a", "old")

    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        m.write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_log_begins_with_the_rows_of_the_state(tmp_path):
    """Lines that a killed run wrote after its last state are removed; new ones join the rows."""
    path, rows = tmp_path / "log.jsonl", [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    Log(path, rows)(step=2, again=True)
    assert [json.loads(x) for x in path.read_text().splitlines()] == rows == [
        {"step": 0}, {"step": 1}, {"step": 2, "again": True}]
    Log(path, [])
    assert path.read_text() == ""


def test_rows_as_other_programs_write_them(tmp_path):
    """A byte-order mark, other line ends, blank lines, and a line separator inside a text."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "1"}\r\n\r\n{"id": "\xe2\x80\xa8"}\n\n')
    assert m.read_rows(path, "02_sample_label.py") == [{"id": "1"}, {"id": "\u2028"}]
    for line, why in (("[", "line 2 is broken"), ("{}", "line 2 is broken .*'id'"),
                      ("7", "line 2 is broken")):
        path.write_text('{"id": "1"}\n' + line)
        with pytest.raises(UserError, match=why):
            m.read_rows(path, "02_sample_label.py", lambda row: row["id"])
    with pytest.raises(UserError, match="missing: run python 02_sample_label.py first"):
        m.read_rows(tmp_path / "none.jsonl", "02_sample_label.py")


def test_the_arrows_run_one_way():
    """kernels <- model <- 01 to 05 <- other folders. A numbered script imports only model.py."""
    import ast
    root = Path(m.__file__).parent
    rooms = ("people", "report", "experiments", "benchmarks", "tests")

    def imported(path):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
                found.add(getattr(node.args[0], "value", "a name that is computed"))
        own = {name for name in found
               if (root / name.split(".")[0]).is_dir() or (root / f"{name}.py").exists()}
        return {name.split(".")[0] for name in own}
    scripts = sorted(root.glob("0?_*.py"))
    assert len(scripts) == 5
    for script in scripts:
        assert imported(script) == {"model"}, script
    assert imported(root / "model.py") == {"kernels"}
    for path in (root / "kernels").glob("*.py"):
        assert imported(path) <= {"kernels"}, path
    above = {"people": {"people"}, "report": {"report"},
             "benchmarks": {"benchmarks", "people", "report"},
             "experiments": {"experiments", "benchmarks", "people", "report"}}
    for room, allowed in above.items():
        for path in (root / room).glob("*.py"):
            assert imported(path) & {*rooms} <= allowed, path
