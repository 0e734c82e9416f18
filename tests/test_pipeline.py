"""Runs the five scripts as a user does: end to end, killed and resumed, and with bad input."""
import importlib
import json
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model import fingerprint, load

ROOT = Path(__file__).parent.parent
STAGES = {
    "01_pretrain.py": ["--vocab-size", "300", "--context", "48", "--n-layer", "1", "--n-head", "2",
                       "--n-kv-head", "1", "--d-model", "32", "--batch", "32", "--steps", "200",
                       "--measure-every", "20", "--n-samples", "64", "--save-s", "0.1"],
    "02_sample_label.py": ["--n", "3000", "--length", "24", "--corpus-fraction", "0.2"],
    "03_reward_model.py": ["--epochs", "2"],
    "04_ppo.py": ["--batch", "256", "--max-batch", "512", "--minibatch", "64", "--lr", "0.002",
                  "--warmup", "5", "--kl-stop", "3", "--max-iterations", "12",
                  "--kl-samples", "64", "--reward-samples", "512", "--save-s", "0.1"],
    "05_eval.py": ["--n", "256", "--n-best", "256"],
    "report": [],
}
ARTEFACT = {"01_pretrain.py": "base.safetensors", "02_sample_label.py": "labels-vader.jsonl",
            "03_reward_model.py": "reward.safetensors", "04_ppo.py": "policy-happy.safetensors",
            "05_eval.py": "report.json", "report": "report.html"}
LOG = {"01_pretrain.py": "01.jsonl", "04_ppo.py": "04-happy.jsonl"}


def make_corpus() -> str:
    """Speeches of happy, sad and neutral words, so that there is a sentiment to learn."""
    rng = random.Random(0)
    words = {"happy": "love joy sweet glad happy delight dear win".split(),
             "sad": "hate death cruel foul sad grief kill dead".split(),
             "plain": "the house and road to town by noon with a horse or cart for thee".split()}
    lines = []
    for _ in range(4000):
        mood = rng.choice(["happy", "sad", "plain"])
        line = [rng.choice(words[mood] if rng.random() < 0.4 else words["plain"])
                for _ in range(rng.randint(4, 8))]
        lines.append((rng.choice(["\nKING:\n", "\nFOOL:\n", "", ""]))
                     + " ".join(line).capitalize() + rng.choice(",.!"))
    return "\n".join(lines)


def command(script, out, *args):
    """The command line of a stage (with its small settings), "report" or "people SUBCOMMAND"."""
    if script.startswith(("people", "report")):
        return [sys.executable, "-m", *script.split(), *args, "--out", str(out)]
    return [sys.executable, str(ROOT / script), *STAGES[script], "--out", str(out), *args]


def run(script, out, *args, **kw):
    return subprocess.run(command(script, out, *args), capture_output=True, text=True, timeout=200,
                          **kw)


def rows(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


def wait_for(process, condition):
    """Waits until condition() holds; fails if the process ends first."""
    while not condition():
        assert process.poll() is None, "ended before it was to be disturbed"
        time.sleep(0.01)


def test_the_pipeline_does_what_it_is_for(pipeline):
    out, printed = pipeline
    base = load(out / "base.safetensors", "")[2]
    uniform = __import__("math").log2(257) / 1  # bits per byte of a model that knows nothing
    assert (base["metrics"]["bits_per_byte"] < 0.45 * uniform
            and base["metrics"]["real_word_share"] > 0.5)
    reward = load(out / "reward.safetensors", "")[2]
    assert (reward["metrics"]["all"]["auc"] > 0.8
            and {"model", "corpus", "all"} == set(reward["metrics"]))
    log = rows(out / "04-happy.jsonl")
    assert log[0]["kl"] == 0 and abs(log[0]["reward"] + 0.35) < 0.4
    assert (log[-1]["kl"] > 0.5 and log[-1]["score"] > log[0]["score"]
            and log[-1]["p_target"] > log[0]["p_target"])
    assert all(r["ratio_off_first"] < 1e-5 for r in log if "ratio_off_first" in r)
    assert all(abs(r["kl"] - r["kl_k1"]) <= 5 * (r["kl_se"] + r["kl_k1_se"]) for r in log)
    report = json.loads((out / "report.json").read_text())
    assert report["happy"][-1]["positive"] > report["happy"][0]["positive"] + 0.05
    final, measured = report["happy"][-1], load(out / "policy-happy.safetensors", "")[2]
    assert report["happy"][0]["kl"] == 0 and 0 < measured["kl"] <= 3  # --kl-stop, as 04 measured it
    assert len({row["kl"] for row in report["happy"]}) == len(report["happy"])  # no policy twice
    assert abs(final["kl"] - measured["kl"]) < 5 * (
        final["kl_se"]**2 + measured["kl_se"]**2)**0.5  # 05 draws fresh samples
    for script, text in printed.items():
        if script == "report":
            continue
        assert ("settings:" in text and "wall time" in text and "peak memory" in text
                and "next:" in text), script


def test_constants_never_change_and_checkpoints_know_their_kl(pipeline):
    """Guards against running normalisation: the constants that 04 prints give every reward."""
    out, printed = pipeline
    mean, std = map(float, re.search(r"reward of the base model: mean (\S+), deviation (\S+)",
                                     printed["04_ppo.py"]).groups())
    for r in rows(out / "04-happy.jsonl"):
        assert abs((r["score"] - mean) / std - r["reward"]) < 5e-3  # printed to three digits
    log, last = rows(out / "04-happy.jsonl"), 0.0
    for r in log:
        due = r["kl"]**0.5 >= last**0.5 + 0.25 and r["kl"] <= 3  # --kl-stop
        assert ("checkpoint" in r) == due
        if due:
            last = r["kl"]
            header = load(out / "checkpoints" / r["checkpoint"], "")[2]
            assert (header["kl"], header["step"]) == (r["kl"], r["step"]) and header["kl_se"] > 0
            assert r["checkpoint"] == f"happy-kl-{r['kl']:05.2f}.safetensors"
    assert len(list((out / "checkpoints").iterdir())) == len(
        [r for r in log if "checkpoint" in r]) > 2


def test_the_run_stops_beyond_its_kl_and_the_policy_before_is_final(pipeline):
    out, printed = pipeline
    *before, last = rows(out / "04-happy.jsonl")
    final = load(out / "policy-happy.safetensors", "")[2]
    assert last["kl"] > 3 >= max(r["kl"] for r in before) and "clip_fraction" not in last
    assert (final["step"], final["kl"]) == (before[-1]["step"], before[-1]["kl"])
    assert f"stopped: {last['kl']:.2f} nats; the policy before" in printed["04_ppo.py"]
    assert not (out / "04-happy-state.pt").exists()


def test_the_figures_of_an_update(pipeline, tmp_path):
    """The advantage is the reward, at every token. Of two minibatches only the second one, of 64 x
    24 tokens, can clip: in the first every ratio is 1. So with one minibatch nothing is clipped."""
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    for size, clips in (("64", True), ("128", False)):
        done = run("04_ppo.py", out, "--batch", "128", "--max-batch", "128", "--minibatch", size,
                   "--max-iterations", "5", "--clip", "0.05")
        assert done.returncode == 0, done.stderr
        log = rows(out / "04-happy.jsonl")
        assert any(r["clip_fraction"] for r in log) == clips
        for r in log:
            tokens = r["clip_fraction"] * 64 * 24
            assert abs(tokens - round(tokens)) < 1e-3 and r["clip_binding"] <= r["clip_fraction"]
            assert abs(r["adv_mean"] - r["reward"]) < 1e-5 and r["ratio_off_first"] < 1e-5


def comparable(path: Path):
    """What must be bit-identical after a resume: everything but the times."""
    if path.suffix == ".safetensors":
        model, _, header = load(path, "")
        header["metrics"] = {k: v for k, v in header.get("metrics", {}).items()
                             if k != "tokens_per_s"}
        return fingerprint(model), {k: v for k, v in header.items() if k != "seconds"}
    return re.sub(r'"(tokens_per_s|s_rollout|s_score|s_update|seconds)": [\d.e-]+', "",
                  path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", LOG)
def test_killed_and_resumed_equals_uninterrupted(script, pipeline, corpus, tmp_path):
    """kill -9 at a random moment, twice, then --resume. Only 01 and 04: the others are short."""
    before, out = pipeline[0], tmp_path / "out"
    out.mkdir()
    if script == "04_ppo.py":
        for name in ("base.safetensors", "reward.safetensors"):
            shutil.copy(before / name, out)
    args = ["--resume"] + (["--corpus", str(corpus)] if script.startswith("01") else [])
    rng, log = random.Random(script), out / LOG[script]
    total = len(rows(before / LOG[script]))
    for _ in range(2):
        seen = len(log.read_text().splitlines()) if log.exists() else 0
        target = rng.randint(seen + 1, max(seen + 1, int(0.8 * total)))
        process = subprocess.Popen(command(script, out, *args), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        wait_for(process, lambda: log.exists() and len(log.read_text().splitlines()) >= target)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(script, out, *args)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    this, earlier = map(int, re.search(r"wall time (\d+) s \(before it was resumed (\d+) s\)",
                                       done.stdout).groups())
    assert abs(load(out / ARTEFACT[script], "")[2]["seconds"] - this - earlier) < 2  # the whole run
    assert comparable(out / ARTEFACT[script]) == comparable(before / ARTEFACT[script])
    assert comparable(log) == comparable(before / LOG[script])
    assert not list(out.glob("*-state.pt"))
    if script == "04_ppo.py":
        assert [comparable(p) for p in sorted((out / "checkpoints").glob("*.safetensors"))] == [
            comparable(p) for p in sorted((before / "checkpoints").glob("*.safetensors"))]


@pytest.mark.parametrize("script", ["02_sample_label.py", "03_reward_model.py", "05_eval.py"])
def test_the_short_stages_make_the_same_again_and_leave_nothing_half_done(
        script, pipeline, tmp_path):
    """A kill leaves the old result whole. A second run gives the same result, bit for bit."""
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    before = comparable(out / ARTEFACT[script])
    process = subprocess.Popen(command(script, out), stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    assert "settings:" in process.stdout.readline()
    time.sleep(random.Random(script).random() * 2)
    process.kill()
    process.wait()
    assert comparable(out / ARTEFACT[script]) == before
    done = run(script, out)
    assert done.returncode == 0, done.stderr
    assert comparable(out / ARTEFACT[script]) == before and not list(out.glob("*.tmp"))


def test_resuming_a_run_that_has_no_iterations_left(pipeline, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    for more in ([], ["--resume"]):
        done = run("04_ppo.py", out, "--max-iterations", "2", *more)
        assert (done.returncode == 0
                and "add --resume and raise --max-iterations" in done.stdout), done.stderr
    log = (out / "04-happy.jsonl").read_text()
    for flags in (["--max-iterations", "1"], ["--kl-stop", "0.0001"]):  # refused, nothing is lost
        done = run("04_ppo.py", out, "--resume", *flags)
        assert (done.returncode == 2
                and "has already reached --max-iterations or --kl-stop" in done.stderr), done.stderr
        assert (out / "04-happy.jsonl").read_text() == log


def test_pretraining_stopped_after_its_last_step_still_ends(pipeline, corpus, tmp_path):
    """Guards against a resumed run with no steps left: the last step saves its state before the
    held-out figures, the samples and two files. A folder in place of the first file stops it."""
    out = tmp_path / "out"
    (out / "corpus.txt").mkdir(parents=True)
    done = run("01_pretrain.py", out, "--corpus", str(corpus), "--save-s", "0")
    assert done.returncode == 2 and "corpus.txt: Is a directory" in done.stderr, done.stderr
    assert (torch.load(out / "01-state.pt", weights_only=True)["step"] == 200
            and not (out / "base.safetensors").exists())
    (out / "corpus.txt").rmdir()
    done = run("01_pretrain.py", out, "--corpus", str(corpus), "--resume")
    assert done.returncode == 0 and "resuming at step 200" in done.stdout, done.stderr
    assert fingerprint(load(out / "base.safetensors", "")[0]) == fingerprint(
        load(pipeline[0] / "base.safetensors", "")[0])


def test_another_reward_and_a_new_run_start_from_the_beginning(pipeline, tmp_path):
    """Guards against a run that goes on under another reward, and against old checkpoints among
    new ones: those of an earlier run, or of iterations that were lost in a kill."""
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    assert run("04_ppo.py", out, "--max-iterations", "3").returncode == 0
    other = tmp_path / "04_ppo.py"
    other.write_text((ROOT / "04_ppo.py").read_text().replace(
        "return log_p[:, target]\n", "return -7 * log_p[:, target]\n"))
    own = list((out / "checkpoints").glob("happy-*"))
    orphan = out / "checkpoints" / "happy-kl-08.00.safetensors"
    orphan.write_bytes(b"")
    done = run("04_ppo.py", out, "--max-iterations", "4", "--resume")
    assert (done.returncode == 0 and "resuming at step 2" in done.stdout
            and not orphan.exists()), done.stderr
    assert own and all(path.exists() for path in own)
    orphan.write_bytes(b"")
    done = subprocess.run([sys.executable, str(other), *STAGES["04_ppo.py"], "--out", str(out),
                           "--resume"], timeout=200, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ("the reward has changed: starting from the beginning" in done.stdout
            and not orphan.exists()), done.stderr


CHANGES = {  # what users change: lines of 04_ppo.py, and what replaces them
    "another reward": {
        "        return log_p[:, target]\n": "        return torch.tensor([text.count('e') "
        "for text in tokenizer.decode_batch(y.tolist())]).float()\n"},
    "batch mean": {"(score - run.reward_mean) / run.reward_std ":
                   "(score - gather(score).mean()) / run.reward_std "},
    "SGD": {"torch.optim.AdamW(policy.parameters(), cfg.lr, (0.9, 0.95), weight_decay=0,\n"
            "                                  fused=True)":
            "torch.optim.SGD(policy.parameters(), cfg.lr, momentum=0.9)"},
    "tracker": {"import math\n": "import math\nimport tracker\n",
                "        log(**row)\n        show(":
                "        log(**row)\n        tracker.log(row)\n        show("}}


@pytest.mark.parametrize("name, processes", [*((name, 1) for name in CHANGES), ("batch mean", 2)])
def test_changes_that_a_user_makes(name, processes, pipeline, tmp_path):
    """Each takes at most three lines of one file. SGD resumes. The mean is of all processes."""
    import difflib
    source = edited = (ROOT / "04_ppo.py").read_text()
    for old, new in CHANGES[name].items():
        assert edited.count(old) == 1, old
        edited = edited.replace(old, new)
    added = [line for line in difflib.ndiff(source.splitlines(), edited.splitlines())
             if line.startswith("+ ")]
    assert 1 <= len(added) <= 3
    (tmp_path / "04_ppo.py").write_text(edited)
    (tmp_path / "tracker.py").write_text(
        "def log(row):\n    print('tracked', row['step'], row['kl'])\n")
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    rates = ["--lr", "0.05"] if name == "SGD" else []
    for more in (["--max-iterations", "2"], ["--max-iterations", "4", "--resume"]):
        done = subprocess.run([*start, str(tmp_path / "04_ppo.py"), *STAGES["04_ppo.py"], "--out",
                               str(out), *rates, *more], capture_output=True, text=True,
                              timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    log = rows(out / "04-happy.jsonl")
    assert (len(log) == 4 and log[0]["kl"] == 0 < log[3]["kl"]
            and "resuming at step 1" in done.stdout)
    if name == "another reward":
        assert all(row["score"] > 0 for row in log)
    if name == "batch mean":
        assert all(abs(row["reward"]) < 1e-5 for row in log)
    if name == "tracker":
        assert f"tracked 3 {log[3]['kl']}" in done.stdout


def test_old_log_probs_are_formed_anew_where_the_sampler_rounds_otherwise(pipeline, tmp_path):
    """As with bf16 on most GPUs: 04 recomputes them. Ratios start at 1; the run is the same."""
    source, line = (ROOT / "04_ppo.py").read_text(), "        rolled_out = now()\n"
    assert source.count(line) == 1
    (tmp_path / "04_ppo.py").write_text(
        source.replace(line, "        logp_old = logp_old + 1e-3\n" + line))
    logs = []
    for script in (ROOT / "04_ppo.py", tmp_path / "04_ppo.py"):
        out = tmp_path / script.parent.name
        shutil.copytree(pipeline[0], out)
        done = subprocess.run([sys.executable, str(script), *STAGES["04_ppo.py"], "--out", str(out),
                               "--max-iterations", "3"], capture_output=True, text=True,
                              timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        logs.append(rows(out / "04-happy.jsonl"))
    assert [[r["kl"], r["score"], r["ratio_off_first"]] for r in logs[0]] == [
        [r["kl"], r["score"], r["ratio_off_first"]] for r in logs[1]]


def test_a_state_is_saved_by_the_clock(pipeline, tmp_path):
    """Guards against saving at every iteration, and against never saving. The last always saves."""
    source, line = (ROOT / "04_ppo.py").read_text(), "            save_state(state_path"
    assert source.count(line) == 1
    (tmp_path / "04_ppo.py").write_text(
        source.replace(line, "            print('saved', step)\n" + line))
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    for seconds, saved in (("0", ["0", "1", "2"]), ("1000", ["2"])):
        done = subprocess.run([sys.executable, str(tmp_path / "04_ppo.py"), *STAGES["04_ppo.py"],
                               "--out", str(out), "--save-s", seconds, "--max-iterations", "3"],
                              capture_output=True, text=True, timeout=200,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert (done.returncode == 0
                and re.findall(r"saved (\d+)", done.stdout) == saved), done.stderr


@pytest.mark.parametrize("prompts", [False, True])
def test_comparisons_train_a_reward_model_that_04_takes_as_it_is(pipeline, tmp_path, prompts):
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    flags = ["--prompts", "--corpus-fraction", "0"] if prompts else []
    done = run("02_sample_label.py", out, "--compare", *flags)
    assert (done.returncode == 0
            and "comparisons-vader.jsonl: 1500 comparisons" in done.stdout), done.stderr
    if prompts:
        pair = rows(out / "comparisons-vader.jsonl")[0]
        by_id = {r["id"]: r for r in rows(out / "samples.jsonl")}
        left, right = (by_id[i] for i in pair["id"].split())
        assert left["prompt"] == right["prompt"] == pair["prompt"] and left["text"] != right["text"]
    done = run("03_reward_model.py", out, "--comparisons", "--epochs", "4", "--quarter-epochs", "2")
    assert done.returncode == 0, done.stderr
    header = load(out / "reward.safetensors", "")[2]
    assert header["kind"] == "comparisons" and header["prompted"] == prompts
    assert header["metrics"]["all"]["auc"] > 0.6  # 0.74 to 0.90 on different machines, each +- 0.03
    done = run("04_ppo.py", out)
    assert done.returncode == 0, done.stderr
    log = rows(out / "04-happy.jsonl")
    assert (abs(log[0]["reward"]) < 0.3  # recentred, then raised
            and log[-1]["reward"] > log[0]["reward"] + 0.5)
    assert (log[0]["kl"] == 0
            and all(r["ratio_off_first"] < 1e-5 for r in log if "ratio_off_first" in r))
    for script in ("05_eval.py", "report"):
        done = run(script, out)
        assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["happy"][-1]["positive"] > report["happy"][0]["positive"] + 0.05
    assert bool(re.search('<p class="text prompt">(KING|FOOL):',
                          (out / "report.html").read_text())) == prompts
    done = run("03_reward_model.py", out, "--labels", str(out / "comparisons-vader.jsonl"))
    assert done.returncode == 2 and "use --comparisons" in done.stderr


# ---- A person in the terminal --------------------------------------------------------------------
def type_keys(argv, keys):
    """Runs argv in a pseudo-terminal, presses one key at each new screen -> exit code, output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=subprocess.STDOUT,
                               close_fds=True)
    os.close(theirs)
    shown, keys, key, prompts, deadline = "", list(keys), b"", 0, time.time() + 100
    while time.time() < deadline:
        if not select.select([ours], [], [], 5)[0]:
            os.write(ours, key)  # again: the terminal drops keys that nobody waits for yet
            continue
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux raises it when the other end is closed; macOS reads nothing
            part = b""
        if not part:
            break
        shown += part.decode("utf-8", "replace")
        if shown.count("q quit") + shown.count("Any key returns") > prompts and keys:
            prompts += 1
            time.sleep(0.05)
            key = keys.pop(0).encode()
            os.write(ours, key)
    process.wait(timeout=20)
    os.close(ours)
    return process.returncode, shown


def test_a_person_labels_undoes_quits_and_goes_on(pipeline, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("base.safetensors", "corpus.txt", "samples.jsonl"):
        shutil.copy(pipeline[0] / name, out)
    argv = command("02_sample_label.py", out, "--labeller", "anna")
    code, shown = type_keys(argv, "pn0us?xpq")
    assert code == 0 and "\x1b[2J" in shown and "source" not in shown and "kl" not in shown
    path = out / "labels-anna.jsonl"
    lines = rows(path)
    assert [r["label"] for r in lines] == [
        "positive", "negative", "neutral", "undo", "skip", "positive"]
    assert lines[2]["id"] == lines[3]["id"] == lines[4]["id"]  # the undone item comes back
    argv = [sys.executable, "-m", "people", "label", "anna", "--out", str(out)]  # draws no samples
    code, shown = type_keys(argv, "nq")
    assert (code == 0 and "5 of 3000" in shown
            and "\n" + str(path) + ": 5 of 3000, positive 2" in shown.replace("\r", ""))
    assert len({r["id"] for r in rows(path)}) == 5 and rows(path)[:6] == lines


def test_a_person_rates_blind(pipeline, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    argv = [sys.executable, "-m", "people", "rate", "bo", "--out", str(out), "--n", "3"]
    code, shown = type_keys(argv, "ppuq")
    assert code == 0 and "key stays hidden" in shown and "Fisher" not in shown
    rated = rows(out / "ratings-bo.jsonl")
    assert [r["id"].split("-")[-1] for r in rated] == ["0", "1", "1"]
    assert all(set(r) == {"id", "text", "label", "labeller", "time"} for r in rated)  # no arm shown
    code, shown = type_keys(argv, "pnp0n")
    assert (code == 0 and "Fisher's exact test" in shown.replace("\r\n", " ")
            and "with 3 samples of each" in shown)
    done = run("report", out)
    assert (done.returncode == 0
            and "Blind ratings" in (out / "report.html").read_text()), done.stderr


def test_labellers_are_compared_with_each_other_and_with_the_machine(pipeline, tmp_path):
    """Cohen's kappa of each pair of labellers, and Krippendorff's alpha over the people."""
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    vader = rows(out / "labels-vader.jsonl")
    for name, label in (("anna", None), ("bo", "negative")):
        (out / f"labels-{name}.jsonl").write_text("".join(
            json.dumps(r | {"label": label or r["label"], "labeller": name}) + "\n"
            for r in vader[:30]))
    code, shown = type_keys(
        [sys.executable, "-m", "people", "label", "anna", "--out", str(out)], "q")
    assert code == 0 and "anna and vader: Cohen's kappa 1.00 on 30 common items" in shown
    assert ("anna and bo: Cohen's kappa 0.00 on 30" in shown
            and "Krippendorff's alpha over all people" in shown)


# ---- Bad input: one line, exit code 2, nothing lost ----------------------------------------------
def edit(name, change):
    def apply(out):
        path = out / name
        path.write_bytes(change(path.read_bytes()))
    return apply


def relabel(label):
    def change(data):
        return b"".join(json.dumps(json.loads(x) | {"label": label}).encode() + b"\n"
                        for x in data.splitlines())
    return edit("labels-vader.jsonl", change)


def other_base(out):
    """A base model with the same tokenizer and other weights."""
    from model import save
    model, tokenizer, header = load(out / "base.safetensors", "")
    with torch.no_grad():
        model.head += 1e-2 * torch.randn_like(model.head)
    save(out / "base.safetensors", model, tokenizer, metrics=header["metrics"])


def other_tokenizer(out):
    from model import GPT, GPTConfig, save
    tokenizer = importlib.import_module("01_pretrain").train_tokenizer("zyx wvu tsr " * 100, 290)
    torch.manual_seed(0)
    save(out / "base.safetensors", GPT(GPTConfig(tokenizer.get_vocab_size(), 32, 1, 2, 1, 32)),
         tokenizer, metrics={})


def cut_log(out):
    """Leaves the log of a new run that was killed in its second iteration."""
    log = out / "04-happy.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")


def other_log(out):
    """The log of a run that did not write the policies."""
    log = out / "04-happy.jsonl"
    log.write_text("".join(json.dumps(row | {"kl": row["kl"] * 1.01}) + "\n" for row in rows(log)))


def remove(name):
    return lambda out: (out / name).unlink()


CASES = [
    ("02_sample_label.py", remove("base.safetensors"), [],
     "base.safetensors is missing: run python 01_pretrain.py --out .* first"),
    ("03_reward_model.py", remove("labels-vader.jsonl"), [],
     "run python 02_sample_label.py --out .* first"),
    ("04_ppo.py", remove("reward.safetensors"), [], "run python 03_reward_model.py --out .* first"),
    ("05_eval.py", remove("policy-happy.safetensors"), [], "run python 04_ppo.py .*--out .* first"),
    ("02_sample_label.py", edit("base.safetensors", lambda d: d[:-99]), [],
     "truncated or damaged.*run python 01_pretrain.py --out .* again"),
    ("04_ppo.py", edit("reward.safetensors", lambda d: b"not a checkpoint"), [],
     "truncated or damaged"),
    ("03_reward_model.py", other_tokenizer, [], "another tokenizer"),
    ("04_ppo.py", other_base, [], "another base model.*run"),
    ("05_eval.py", other_base, [], "another base model"),
    ("03_reward_model.py", edit("labels-vader.jsonl", lambda d: d.replace(b"\n", b"\n{bro", 1)), [],
     "line 2 is broken"),
    ("03_reward_model.py", relabel("glorious"), [],
     "line 1 is broken .*label 'glorious' is not one of"),
    ("03_reward_model.py", relabel("positive"), [], "all labels are the same"),
    ("03_reward_model.py", edit("labels-vader.jsonl", lambda d: b""), [],
     "there are no labels in.*run python 02_sample_label.py --out .* first"),
    ("03_reward_model.py", None, ["--labels", "nowhere.jsonl"], "nowhere.jsonl is not a file"),
    ("01_pretrain.py", None, ["--corpus", "nowhere.txt"], "nowhere.txt is not a file"),
    ("01_pretrain.py", lambda out: (out / "e.txt").write_text(""), ["--corpus", "OUT/e.txt"],
     "0 characters"),
    ("01_pretrain.py", lambda out: (out / "e.txt").write_text("To be. " * 300),
     ["--corpus", "OUT/e.txt"], "too few for one batch"),
    ("01_pretrain.py", lambda out: (out / "e.txt").write_bytes(b"caf\xe9 " * 999),
     ["--corpus", "OUT/e.txt"], "not UTF-8: byte 3"),
    ("01_pretrain.py", lambda out: (out / "e.txt").write_text("<|happy|> " * 999),
     ["--corpus", "OUT/e.txt"], "reserved tokens"),
    ("02_sample_label.py", None, ["--labeller", "anna"], "needs a terminal"),
    ("people label", None, ["anna"], "needs a terminal"),
    ("people rate", None, ["anna"], "needs a terminal"),
    ("people label", remove("samples.jsonl"), ["anna"],
     "samples.jsonl is missing: run python 02_sample_label.py --out .* first"),
    ("people compare", None, ["anna"], "run python 02_sample_label.py --compare --out .* first"),
    ("people rate", remove("policy-happy.safetensors"), ["s.html"],
     "run python 04_ppo.py .*--out .* first"),
    ("people rate", other_base, ["s.html"], "another base model"),
    ("05_eval.py", edit("04-happy.jsonl", lambda d: d[:-20]), [],
     "04-happy.jsonl line .* is broken .*run python 04_ppo.py .*--out .* again"),
    ("05_eval.py", None, ["--n", "3"], "--n and --n-best must be at least 4"),
    ("05_eval.py", remove("04-happy.jsonl"), [], "04-happy.jsonl is missing: run python 04_ppo.py"),
    ("report", remove("report.json"), [],
     "report.json is missing: run python 05_eval.py --out .* first"),
    ("report", edit("report.json", lambda d: d[:-99]), [], "report.json is damaged"),
    ("report", lambda out: (out / "curve.json").write_text("[{"), [], "curve.json is damaged"),
    ("04_ppo.py", None, ["--kl-stop", "0"], "--kl-stop must be positive"),
    ("04_ppo.py", edit("reward.safetensors", lambda d: d[:-99]), ["--resume"],
     "truncated or damaged.*run python 03_reward_model.py --out .* again"),
    ("02_sample_label.py", None, ["--corpus-fraction", "7"], "corpus-fraction must be in"),
    ("02_sample_label.py", None, ["--seed", "-1"], "--seed must be in"),
    ("02_sample_label.py", None, ["--length", "49"], "--length 49 is more than the 48 tokens"),
    ("02_sample_label.py", None, ["--prompts"], "--prompts needs --corpus-fraction 0"),
    ("02_sample_label.py", None, ["--labeller", "Vader"], "is not vader or majority"),
    ("people sheet", None, ["CORPUS"], "is not the name of a page"),
    ("people sheet", None, ["OUT/s.html", "--skip", "9999"], "no items are left after --skip 9999"),
    ("people merge", None, ["CORPUS", "a.jsonl"], "is not a sheet"),
    ("02_sample_label.py", None, ["--compare", "--n", "1"], "--compare needs --n 2 or more"),
    ("03_reward_model.py",
     edit("labels-vader.jsonl", lambda d: d.replace(b'{"id"', b'{"prompt": "x", "id"', 1)), [],
     "samples with and without prompts"),
    ("people rate", None, ["majority"], "not a labeller"),
    ("04_ppo.py", None, ["--batch", "100"],
     "--batch and --max-batch must be multiples of --minibatch"),
    ("04_ppo.py", None, ["--epochs", "0"], "--epochs must be positive"),
    ("04_ppo.py", None, ["--kl-samples", "0"], "--kl-samples must be at least 2"),
    ("04_ppo.py", None, ["--reward-samples", "1"], "--reward-samples must be at least 2"),
    ("04_ppo.py", None, ["--lr", "-0.06"], "--lr must not be negative"),
    ("03_reward_model.py", None, ["--machine-weight", "0"], "no label is left to train on"),
    ("02_sample_label.py", None, ["--prompts", "--corpus-fraction", "0", "--length", "47"],
     "has no prompts.*1 tokens at most"),
    ("05_eval.py", cut_log, [], "has fewer than two iterations"),
    ("05_eval.py", other_log, [], "does not belong to the run in .*04-happy.jsonl"),
    ("people label", None, ["anna", "--seed", "-1"], "--seed must be in"),
    ("people unblind", None, [], "key.*is missing"),
    ("03_reward_model.py", None, ["--lr", "1e30", "--head-lr", "1e30", "--embed-lr", "1e30"],
     "lower --lr"),
    ("04_ppo.py", None, ["--no-such-option"], "no-such-option"),
    ("04_ppo.py", None, ["--lr", "100", "--warmup", "1"], "diverged at iteration.*lower --lr"),
    ("01_pretrain.py", None, ["--corpus", "CORPUS", "--out", "/dev/null/out"], "Not a directory"),
]


@pytest.mark.parametrize("script, prepare, args, message", CASES,
                         ids=[f"{c[0]}-{c[3][:30]}" for c in CASES])
def test_bad_input_is_one_line_and_loses_nothing(script, prepare, args, message, pipeline, corpus,
                                                 tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    if prepare:
        prepare(out)
    before = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*")
              if p.is_file() and not re.match(r"0\d", p.name)
              and not (p.parent.name == "checkpoints" and "--lr" in args)}
    done = run(script, out,
               *(a.replace("OUT", str(out)).replace("CORPUS", str(corpus)) for a in args))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and re.search(message, done.stderr, re.S), done.stderr
    if "no-such-option" not in message:
        assert len([x for x in done.stderr.splitlines() if x.startswith("error:")]) == 1
    for name, data in before.items():
        assert (out / name).read_bytes() == data, name


def test_a_full_disk_leaves_the_old_files(pipeline, corpus, tmp_path):
    """A file-size limit stands in for a full disk: the write fails in the middle."""
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    old = (out / "base.safetensors").read_bytes()
    done = run("01_pretrain.py", out, "--corpus", str(corpus),
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert (done.returncode == 2 and "Traceback" not in done.stderr
            and "File too large; make room" in done.stderr)
    assert (out / "base.safetensors").read_bytes() == old and not list(out.glob("*.tmp"))


def test_ctrl_c_says_how_to_go_on(pipeline, corpus, tmp_path):
    process = subprocess.Popen(
        command("01_pretrain.py", tmp_path / "out", "--corpus", str(corpus), "--steps", "20000"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,  # 20000: far from its end
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's & ignores it
    log = tmp_path / "out" / "01.jsonl"
    wait_for(process, lambda: log.exists() and len(log.read_text().splitlines()) >= 5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode == 2 and "Traceback" not in stderr
            and "interrupted: run the same command" in stderr)


def test_settings_of_another_run_are_not_continued(pipeline, corpus, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(command("01_pretrain.py", out, "--corpus", str(corpus)),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(process, (out / "01-state.pt").exists)
    process.kill()
    process.wait()
    done = run("01_pretrain.py", out, "--corpus", str(corpus), "--resume", "--muon-lr", "0.01")
    assert done.returncode == 2 and "other values of muon_lr" in done.stderr


def test_a_second_ppo_run_leaves_no_checkpoint_of_the_first(pipeline, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    done = run("04_ppo.py", out, "--kl-stop", "0.1", "--seed", "5")
    assert done.returncode == 0, done.stderr
    kept = out.glob("checkpoints/*.safetensors")
    assert {load(p, "")[2]["settings"]["seed"] for p in kept} <= {5}
    assert re.search(r"\d+ checkpoints .* are now .old", done.stdout)
    done = run("05_eval.py", out)
    assert done.returncode == 0, done.stderr


def test_the_negative_twin_has_its_own_target(pipeline, tmp_path):
    """Guards against a flipped sign: with --target sad the score is log p(sad), at most 0."""
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    done = run("04_ppo.py", out, "--target", "sad")
    assert done.returncode == 0, done.stderr
    log = rows(out / "04-sad.jsonl")
    assert all(r["score"] < 0 for r in log) and log[-1]["score"] > log[0]["score"]
    for script in ("05_eval.py", "report"):
        done = run(script, out)
        assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert (report["sad"][-1]["negative"] > report["happy"][0]["negative"]
            > report["happy"][-1]["negative"])
    assert (report["sad"][-1]["proxy"] > -1
            and "Checkpoints towards sad" in (out / "report.html").read_text())
    sheet = str(tmp_path / "rate.html")
    done = run("people rate", out, sheet, "--n", "4")  # three arms
    assert done.returncode == 0, done.stderr
    key = json.loads(next(out.glob("key-*.json")).read_text())
    assert sorted(key["arms"].values()) == ["base"] * 4 + ["happy"] * 4 + ["sad"] * 4
    (tmp_path / "anna.jsonl").write_text("".join(json.dumps(item | {
        "label": "negative" if key["arms"][item["id"]] == "sad" else "positive",
        "labeller": "anna"}) + "\n" for item in key["items"]))
    done = run("people merge", out, sheet, str(tmp_path / "anna.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "anna: positive 4 of 4 base, 4 of 4 happy samples (" in done.stdout
    assert ("anna: negative 0 of 4 base, 4 of 4 sad samples (policy-sad); difference +31 to +100 "
            "points (95%); Fisher's exact test, one-sided: p = 0.014") in done.stdout  # 1/C(8, 4)


def test_the_learning_curve_is_measured_and_drawn(pipeline, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    reward = (out / "reward.safetensors").read_bytes()
    done = subprocess.run([sys.executable, "-m", "experiments.learning_curve",
                           *STAGES["03_reward_model.py"], "--out", str(out)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    curve = json.loads((out / "curve.json").read_text())
    assert [c["labels"] for c in curve][:2] == [300, 1600] and 2550 < curve[2]["labels"] <= 2700
    assert curve[-1]["after"] > 0.8 and all(0.4 < c[k] <= 1 for c in curve for k in (
        "alone", "after", "last_token", "bag_alone", "bag_after"))
    assert (out / "reward.safetensors").read_bytes() == reward
    assert run("report", out).returncode == 0 and (out / "plots" / "curve.svg").exists()


def test_the_curve_of_a_person_follows_the_persons_schedule(monkeypatch):
    """Guards against a schedule that depends on a phase's name. Whatever the phases are called, few
    labels of a person come after the machine's, and keep the person's rate to the end."""
    curve, trained = importlib.import_module("experiments.learning_curve"), []
    rm = curve.rm
    items = [{"part": "train", "tokens": [1, 2], "target": float(i % 2), "weight": 1.0,
              "text": "a b"} for i in range(20)]
    monkeypatch.setattr(rm, "train", lambda model, phase, cfg: trained.append((model, phase)))
    monkeypatch.setattr(rm, "predict",
                        lambda model, items: __import__("numpy").zeros((len(items), 2)))
    from tests.test_model import tiny
    machine, person = rm.Phase("machine", items, 1.0), rm.Phase("people", items, 12.0, rate=0.03)
    curve.learning_curve(tiny(), [machine, person], items, rm.Config(), sizes=(5,))
    phases = [phase for _, phase in trained]
    assert (phases[0] is machine and [(p.rate, len(p.items)) for p in phases[1:]]
            == [(0.03, 5)] * 3 + [(0.03, 20)] * 3)
    assert [p.epochs for p in phases[1:]] == [24.0] * 3 + [12.0] * 3


def test_few_labels_of_a_person_fine_tune_the_machine_s_model(pipeline, tmp_path):
    """24 labels that contradict VADER get a phase of their own, with every part filled, and the
    model moves towards the person. --no-machine-first pools the same files into one phase."""
    out = tmp_path / "out"
    shutil.copytree(pipeline[0], out)
    vader = rows(out / "labels-vader.jsonl")
    other = {"positive": "negative", "negative": "positive", "neutral": "neutral"}
    (out / "labels-anna.jsonl").write_text("".join(
        json.dumps(r | {"label": other[r["label"]], "labeller": "anna"}) + "\n"
        for r in vader[:24]))
    before = fingerprint(load(out / "reward.safetensors", "")[0])
    done = run("03_reward_model.py", out)
    assert done.returncode == 0, done.stderr
    assert "anna: 24 labels" in done.stdout and "cross-validated, all: n 24" in done.stdout
    assert {r["phase"] for r in rows(out / "03.jsonl")} == {"quarters", "samples", "people"}
    assert fingerprint(load(out / "reward.safetensors", "")[0]) != before
    done = run("03_reward_model.py", out, "--no-machine-first")
    assert (done.returncode == 0
            and {r["phase"] for r in rows(out / "03.jsonl")} == {"all"}), done.stderr


def test_without_corpus_and_network_the_shipped_model_is_used(tmp_path):
    """A copy of the project without data/ and with a dead proxy: 01 says so in one line."""
    project = tmp_path / "p" / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(
        ".git", ".venv", "out*", "data", ".triton*"))
    done = subprocess.run([sys.executable, "01_pretrain.py"], cwd=project, capture_output=True,
                          text=True, timeout=200,
                          env=os.environ | {"http_proxy": "http://127.0.0.1:1",
                                            "https_proxy": "http://127.0.0.1:1"})
    assert done.returncode == 0, done.stderr
    assert ("using pretrained/base.safetensors" in done.stdout
            and (project / "out" / "base.safetensors").exists())
