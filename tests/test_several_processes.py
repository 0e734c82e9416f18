"""torchrun with two gloo processes on a CPU: the same run as one process, and a clean end."""
import os
import signal
import subprocess
import sys

import pytest

from model import load
from tests.test_pipeline import corpus, command, pipeline, rows, run, wait_for  # noqa: F401  (fixtures)


def torchrun(script, out, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            *command(script, out, *args)[1:]]


def copy(source, out, *names):
    out.mkdir()
    for name in names:
        (out / name).write_bytes((source / name).read_bytes())


def equal(one, two, keys, first, later):
    """Row by row: the first within rounding of one sum, the later as far as rounding has grown."""
    assert len(one) == len(two)
    for i, (a, b) in enumerate(zip(one, two)):
        for key in keys:
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=first if i == 0 else later, abs=1e-2 if i else 1e-4), (i, key)


@pytest.mark.parametrize("script, inputs, log, keys", [
    ("01_pretrain.py", [], "01.jsonl", ["nats_per_token", "held_out_nats"]),
    ("03_reward_model.py", ["base.safetensors", "labels-vader.jsonl", "labels-vader-pieces.jsonl"], "03.jsonl",
     ["loss", "val_nll", "val_auc"]),
    ("04_ppo.py", ["base.safetensors", "reward.safetensors"], "04-happy.jsonl",
     ["kl", "kl_se", "kl_k1", "score", "score_std", "reward", "entropy", "clip_fraction", "loss", "batch"]),
])
def test_two_processes_do_what_one_does(script, inputs, log, keys, pipeline, corpus, tmp_path):  # noqa: F811
    """Guards against shards that overlap, gradients that are summed instead of averaged, a metric of
    one rank taken for all, and ranks that decide differently when to stop."""
    source, out = pipeline[0], tmp_path / "out"
    copy(source, out, *inputs)
    extra = ["--corpus", str(corpus)] if script.startswith("01") else []
    done = subprocess.run(torchrun(script, out, *extra), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("wall time") == 1
    equal(rows(source / log), rows(out / log), keys, 2e-3, 5e-2)
    if script.startswith("04"):
        files = [sorted(p.name for p in (d / "checkpoints").glob("happy-*")) for d in (source, out)]
        assert files[0] == files[1] and files[0]
        one, two = (load(d / "policy-happy.safetensors", "")[2] for d in (source, out))
        assert two["kl"] == pytest.approx(one["kl"], rel=0.1) and two["step"] == one["step"]


def test_a_killed_process_ends_all_and_one_process_goes_on(pipeline, corpus, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    process = subprocess.Popen(torchrun("01_pretrain.py", out, "--corpus", str(corpus)), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(process, (out / "01-state.safetensors").exists)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    workers = [pid for pid in children if "01_pretrain" in open(f"/proc/{pid}/cmdline").read()]
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and "another process of this run has ended" in errors or "SIGKILL" in errors
    done = run("01_pretrain.py", out, "--corpus", str(corpus), "--resume")
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    end, whole = (rows(d / "01.jsonl")[-1]["nats_per_token"] for d in (out, pipeline[0]))
    assert end == pytest.approx(whole, rel=5e-2)


def test_bad_input_is_said_once(pipeline, corpus, tmp_path):  # noqa: F811
    done = subprocess.run(torchrun("01_pretrain.py", tmp_path / "out", "--corpus", str(corpus), "--batch", "33"),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Traceback" not in done.stderr.split("ChildFailedError")[0]
    assert done.stderr.count("error: a minibatch of 33 does not divide among 2 processes") == 1
