"""Runs torchrun with two gloo processes on a CPU: same result as one process, and a clean end."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model import load
from tests.test_pipeline import ROOT, command, rows, run, wait_for


def torchrun(script, out, *args, processes=2):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(processes), *command(script, out, *args)[1:]]


def copy(source, out, *names):
    out.mkdir()
    for name in names:
        (out / name).write_bytes((source / name).read_bytes())


WRAPPER = """
import runpy, sys, torch, model
from model import GPT, chunked
model.fast_dtype = lambda device: torch.float32
real = GPT.generate


def taught(policy, n, length, seed, **how):
    path = {folder!r} + f"/tokens-{{seed}}.pt"
    if {replay}:
        y = torch.load(path)[torch.as_tensor(n)] if torch.is_tensor(n) else torch.load(path)[:n]
    else:
        y, _ = real(policy, n, length, seed, **how)
        torch.save(y, path)
    return y, chunked(policy.logprob, 64, y)


GPT.generate = taught
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("script, inputs, log, keys, limit", [
    ("01_pretrain.py", [], "01.jsonl", ["nats_per_token", "held_out_nats"], 2e-3),
    ("04_ppo.py", ["base.safetensors", "reward.safetensors"], "04-happy.jsonl",
     ["kl", "kl_se", "kl_k1", "score", "score_std", "reward", "entropy", "clip_fraction", "loss",
      "batch"], 1e-3),
])
def test_two_processes_do_what_one_does(script, inputs, log, keys, limit, pipeline, corpus,
                                        tmp_path):
    """Guards against shards that overlap, gradients summed instead of averaged, a metric of one
    rank alone, and ranks that disagree when to stop. In float32, and two processes replay the
    tokens of one: sums in another order round differently, so that some token would differ."""
    extra = {"01_pretrain.py": ["--corpus", str(corpus)], "04_ppo.py": [
        "--kl-stop", "1", "--lr", "0.0005", "--warmup", "4"]}[script]
    logs, headers = [], []
    for processes in (1, 2):
        out, wrapper = tmp_path / str(processes), tmp_path / str(processes) / script
        copy(pipeline[0], out, *inputs)
        wrapper.write_text(WRAPPER.format(folder=str(tmp_path), replay=processes == 2,
                                          script=str(ROOT / script)))
        line = [str(wrapper) if x == str(ROOT / script) else x
                for x in torchrun(script, out, *extra, processes=processes)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        assert (("2 processes" in done.stdout) == (processes == 2)
                and done.stdout.count("wall time") == 1)
        logs.append(rows(out / log))
        headers.append([load(p, "")[2]["step"]
                        for p in sorted((out / "checkpoints").glob("happy-*"))])
    assert len(logs[0]) == len(logs[1]) and headers[0] == headers[1]
    if script == "04_ppo.py":
        assert logs[0][-1]["batch"] == 512 and headers[0]
        assert "fewer than 1% of ratios were clipped: the batch doubles to 512" in done.stdout
    for i, (one, two) in enumerate(zip(*logs)):
        for key in (k for k in keys if k in one):
            assert two[key] == pytest.approx(one[key], rel=limit, abs=limit), (i, key)


def test_a_killed_process_ends_all_and_one_process_goes_on(pipeline, corpus, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(torchrun("01_pretrain.py", out, "--corpus", str(corpus)), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(process, (out / "01-state.pt").exists)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                              text=True).stdout.split()
    workers = [pid for pid in children
               if b"01_pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "SIGKILL" in errors, errors
    done = run("01_pretrain.py", out, "--corpus", str(corpus), "--resume")
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    end, whole = (rows(d / "01.jsonl")[-1]["nats_per_token"] for d in (out, pipeline[0]))
    assert end == pytest.approx(whole, rel=5e-2)


def test_bad_input_is_said_once(pipeline, corpus, tmp_path):
    done = subprocess.run(torchrun("01_pretrain.py", tmp_path / "out", "--corpus", str(corpus),
                                   "--batch", "33"), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and '01_pretrain.py", line' not in done.stderr  # no traceback of 01
    assert done.stderr.count("error: --batch must be a multiple of the number of processes") == 1
