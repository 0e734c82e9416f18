"""Checks the PyTorch path of every kernel against an independent float64 computation."""
import math

import numpy as np
import pytest
import torch

from kernels import attention, decode_attention, linear_logprob, rotate, sample
from kernels.attention import DENSE_UP_TO
from kernels.logprob import CHUNK
from kernels.sample import philox_uniform


def attention_by_loops(q, k, v):
    """One row of one head at a time, in float64 NumPy. It never reads ahead, so needs no mask."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    B, T, H, Dh = q.shape
    out = np.zeros((B, T, H, Dh))
    for b in range(B):
        for h in range(H):
            kv = h // (H // k.shape[2])
            for t in range(T):
                s = k[b, : t + 1, kv] @ q[b, t, h] / math.sqrt(Dh)
                p = np.exp(s - s.max())
                out[b, t, h] = p / p.sum() @ v[b, : t + 1, kv]
    return torch.from_numpy(out.reshape(B, T, H * Dh))


def qkv(B, T, H, Hkv, Dh, dtype=torch.float32, seed=0):
    """q, k, v as strided views of one packed projection, as the model passes them."""
    g = torch.Generator().manual_seed(seed)
    packed = torch.randn(B, T, H + 2 * Hkv, Dh, generator=g, dtype=torch.float64).to(dtype)
    return packed.split([H, Hkv, Hkv], dim=2)


@pytest.mark.parametrize("T", [1, 2, 17, 64, DENSE_UP_TO, DENSE_UP_TO + 3])
@pytest.mark.parametrize("H, Hkv, Dh", [(4, 4, 16), (4, 2, 24), (3, 1, 64)])
def test_attention_equals_double_loop(T, H, Hkv, Dh):
    q, k, v = qkv(2, T, H, Hkv, Dh)
    torch.testing.assert_close(attention(q, k, v).double(), attention_by_loops(q, k, v),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [5, DENSE_UP_TO + 3])
def test_attention_never_looks_ahead(T):
    """Guards against a missing or shifted mask: a change at j leaves rows before j bit-equal."""
    q, k, v = (x.clone() for x in qkv(1, T, 4, 2, 16))
    before = attention(q, k, v)
    j = T // 2
    k[:, j:], v[:, j:] = 7, 7
    after = attention(q, k, v)
    assert torch.equal(before[:, :j], after[:, :j]) and not torch.equal(before[:, j], after[:, j])


def test_attention_gradients():
    q, k, v = (x.detach().requires_grad_() for x in qkv(2, 6, 4, 2, 4, torch.float64))
    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_attention_in_bf16_is_as_exact_as_sdpa():
    q, k, v = qkv(4, 64, 4, 4, 32, torch.bfloat16)
    exact = attention_by_loops(q, k, v)
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2).reshape(4, 64, -1)
    error, error_sdpa = ((x.double() - exact).norm() for x in (attention(q, k, v), sdpa))
    assert error <= 2 * error_sdpa


def test_attention_refuses_shapes_that_do_not_fit():
    q, k, v = qkv(2, 5, 4, 2, 16)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k[:, :4], v[:, :4])
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:, :, :3], k, v)


@pytest.mark.parametrize("H, Hkv", [(4, 4), (4, 2), (3, 1)])
def test_decode_step_equals_row_of_prefill(H, Hkv):
    """Guards against writing the cache at the wrong slot and reading unfilled slots (1e6)."""
    B, T, Dh = 3, 9, 16
    q, k, v = qkv(B, T, H, Hkv, Dh)
    angle = torch.randn(T, 1, Dh // 2)
    angles = torch.cat((angle.cos(),) * 2, -1), torch.cat((angle.sin(), -angle.sin()), -1)
    turned = [rotate(x, *angles) for x in (q, k)]
    whole = attention(*turned, v)
    k_cache, v_cache = (torch.full((B, Hkv, T + 2, Dh), 1e6) for _ in range(2))
    for t in range(T):
        row = decode_attention(q[:, t], k[:, t], v[:, t], k_cache, v_cache, t, angles)
        torch.testing.assert_close(row, whole[:, t], rtol=1e-5, atol=1e-6)
    assert torch.equal(k_cache[:, :, :T], turned[1].transpose(1, 2))
    assert torch.equal(v_cache[:, :, :T], v.transpose(1, 2))
    assert (k_cache[:, :, T:] == 1e6).all() and (v_cache[:, :, T:] == 1e6).all()


def reference_logprob(hidden, weight, target):
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    return log_p.gather(-1, target[..., None])[..., 0]


@pytest.mark.parametrize("N, V", [(1, 65), (CHUNK - 1, 129), (CHUNK + 1, 2048), (3 * CHUNK, 257)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_linear_logprob_equals_float64(N, V, scale):
    g = torch.Generator().manual_seed(N + V)
    hidden, weight = (torch.randn(n, 24, generator=g) * scale for n in (N, V))
    target = torch.randint(V, (N,), generator=g)
    target[0] = V - 1
    logp = linear_logprob(hidden, weight, target)
    exact = reference_logprob(hidden, weight, target)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=1e-5)


def test_linear_logprob_gradients(monkeypatch):
    """Of hidden and weight, across a chunk boundary, with an ignored target."""
    monkeypatch.setattr("kernels.logprob.CHUNK", 3)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=g, dtype=torch.float64, requires_grad=True)
                      for n in (7, 5))
    target = torch.tensor([0, 4, 2, -1, 1, 1, 3])
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, target), (hidden, weight))
    logp = linear_logprob(hidden, weight, target)
    assert logp[3] == 0
    logp.sum().backward()
    assert hidden.grad[3].abs().max() == 0 and hidden.grad[2].abs().max() > 0


def test_linear_logprob_of_extreme_logits_and_slices():
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 9.0]])
    logp = linear_logprob(hidden, weight, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(logp, torch.tensor([0.0, 0.0, -math.log(3)]))
    h = torch.randn(2, 6, 2)
    sliced = linear_logprob(h[:, 1:4], weight, torch.zeros(2, 3, dtype=torch.long))
    whole = linear_logprob(h, weight, torch.zeros(2, 6, dtype=torch.long))
    torch.testing.assert_close(sliced, whole[:, 1:4])


def test_linear_logprob_refuses_targets_out_of_range_and_takes_none():
    hidden, weight = torch.randn(2, 4), torch.randn(5, 4)
    for bad in ([0, 5], [-2, 0]):
        with pytest.raises(ValueError, match="targets"):
            linear_logprob(hidden, weight, torch.tensor(bad))
    assert linear_logprob(hidden[:0], weight, torch.zeros(0, dtype=torch.long)).shape == (0,)


def philox_reference(key, counter):
    """Philox4x32-10 in Python integers, as in the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_philox_equals_the_published_vectors():
    """The reference passes Random123's known-answer tests (kat_vectors), and ours equals it."""
    assert philox_reference((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C,
                                                      0x9B00DBD8]
    full = 0xFFFFFFFF
    assert philox_reference((full, full), (full,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6,
                                                           0x6D5451FD]
    rows = torch.tensor([0, 1, 17, 2**31, 2**32 - 1])
    for seed, step in ((0, 0), (3, 5), (2**63 + 12345, 2**32 - 1)):
        ours = philox_uniform(seed, rows, step)
        theirs = [(philox_reference((seed % 2**32, seed >> 32), (r, step, 0, 0))[0] + 0.5)
                  / 2**32 for r in rows.tolist()]
        assert ours.tolist() == theirs


def test_sample_frequencies_match_the_probabilities():
    """Chi-square over 40,000 draws. The same test must reject a slightly wrong distribution."""
    g = torch.Generator().manual_seed(1)
    weight, hidden = torch.randn(23, 8, generator=g), torch.randn(1, 8, generator=g)
    n = 40_000
    token, logp = sample(hidden.expand(n, -1), weight, 5, torch.arange(n), 0)
    exact = reference_logprob(hidden.expand(n, -1), weight, token)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-4, atol=1e-4)

    def chi_square(p):
        return float(((token.bincount(minlength=23) - n * p) ** 2 / (n * p)).sum())
    logits = (hidden.double() @ weight.double().T)[0]
    limit = 22 + 4 * math.sqrt(2 * 22)  # mean + 4 standard deviations at 22 degrees of freedom
    assert chi_square(logits.softmax(-1)) < limit < chi_square((logits / 1.08).softmax(-1))


def test_sample_never_draws_the_impossible():
    weight = torch.eye(4) * 200.0
    hidden = torch.eye(4)[[2] * 1000]
    token, logp = sample(hidden, weight, 0, torch.arange(1000), 0)
    assert (token == 2).all() and (logp.abs() < 1e-6).all()


def test_a_family_can_be_sent_to_pytorch(monkeypatch):
    """TORCH_KERNELS works around a kernel that fails on a GPU. A stand-in plays the GPU here."""
    from kernels import backend

    class OnGpu:
        is_cuda, dtype, type, device = True, torch.bfloat16, "cuda", torch.device("cuda")
    monkeypatch.setattr(backend, "has_bf16", lambda device: True)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.delenv("TORCH_KERNELS", raising=False)
    assert all(backend.use_triton("auto", OnGpu, family) for family in backend.FAMILIES)
    assert backend.live_path(OnGpu) == "Triton" and \
        backend.live_path(torch.device("cpu")) == "PyTorch"
    monkeypatch.setenv("TORCH_KERNELS", "sample,attention")
    assert [backend.use_triton("auto", OnGpu, family) for family in backend.FAMILIES] == [
        False, True, False, True, True]
    assert backend.live_path(OnGpu) == "Triton, PyTorch for attention, sample"
    monkeypatch.setenv("TORCH_KERNELS", "all")
    assert not any(backend.use_triton("auto", OnGpu, family) for family in backend.FAMILIES)
    monkeypatch.setenv("TORCH_KERNELS", "atention")
    with pytest.raises(ValueError, match="a list of attention, logprob, sample, decoder, "
                                         "elementwise, or all"):
        backend.use_triton("auto", OnGpu, "logprob")


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """On a machine with several GPUs a launch would else go to the first one."""
    import kernels
    from kernels import backend
    guarded, q = [], torch.randn(2, 3, 4, 8)

    class Guard:
        def __init__(self, x):
            guarded.append(x)

        def __enter__(self):
            raise RuntimeError("guarded")

        def __exit__(self, *_):
            pass
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    target, pos = torch.zeros(2, 3, dtype=torch.long), torch.tensor(0)
    cache, angle = torch.randn(2, 2, 4, 5, 8), torch.randn(3, 1, 8)
    calls = (lambda: kernels.attention(q, q, q, backend="triton"),
             lambda: kernels.decode_attention(q[:, 0], q[:, 0], q[:, 0], *cache, pos,
                                              (angle, angle), backend="triton"),
             lambda: kernels.linear_logprob(q[:, :, 0], q[0, 0], target, backend="triton"),
             lambda: kernels.sample(q[0, 0], q[0, 1], 0, torch.arange(4), 0, backend="triton"),
             lambda: kernels.squared_relu(q, backend="triton"),
             lambda: kernels.rotate(q, angle, angle, backend="triton"))
    for n, call in enumerate(calls, 1):
        with pytest.raises(RuntimeError, match="guarded"):
            call()
        assert len(guarded) == n


def test_a_gpu_without_bf16_gets_float32_and_pytorch(monkeypatch):
    """A T4 has capability 7.5, an A100 8.0."""
    from kernels.backend import has_bf16, live_path
    from model import fast_dtype
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        has_bf16.cache_clear()
        assert fast_dtype(torch.device("cuda")) == dtype
        old = "older than Ampere" in live_path(torch.device("cuda"))
        assert old == (dtype == torch.float32)
    has_bf16.cache_clear()


def test_rotate_and_squared_relu_refuse_what_they_cannot_do():
    """Shapes that do not fit; and a second derivative, which would silently be wrong."""
    from kernels import rotate, squared_relu
    x, angle = torch.randn(2, 3, 4, 8), torch.randn(3, 1, 8)
    for cos, sin in ((angle[:2], angle[:2]), (angle, angle[:2]), (angle[..., :4], angle[..., :4])):
        with pytest.raises(ValueError, match="do not fit"):
            rotate(x, cos, sin)
    y = x.clone().requires_grad_()
    first, = torch.autograd.grad(squared_relu(y).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_benchmark_runs_and_refuses_what_is_wrong_or_slow(monkeypatch, capsys):
    """At toy size: every row. A wrong kernel is not timed, and a slow peer is given up."""
    from benchmarks import kernels as bench
    bench.main(bench.Config(toy=True))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 6 + 3 + 2 and not any("failed" in line for line in table)
    monkeypatch.setattr(bench, "SLOW_S", 0.0)
    found = bench.compare({"ours": lambda: None, "peer": lambda: None}, 1)
    assert "ms" in found["ours"] and "given up" in found["peer"]["failed"]
    monkeypatch.setattr(bench, "attention", lambda q, k, v: bench.eager_attention(q, k, v) * 1.05)
    with pytest.raises(AssertionError, match="wrong values"):
        next(bench.bench_attention([(2, 16, 2, 1)], 1, 1e9, 1e9))
