"""Checks what happens when files, terminals or machines misbehave: the scripts must print one line,
return an exit code, and lose nothing.

Each test repeats a situation that has occurred: clean-up, resumed runs, editors, browsers, closed
pipes, other languages, a reward of one's own. All share the tiny run of conftest.py.
"""
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from model import UserError, load, read_prompts, resume, save
from people import ratings, sheet
from people.answers import answers_in, read_items, stage
from report import build_report
from tests.test_pipeline import ROOT, STAGES, command, rows, run, type_keys

rm, ppo, ev = (importlib.import_module(name) for name in ("03_reward_model", "04_ppo", "05_eval"))


@pytest.fixture
def out(pipeline, tmp_path):
    shutil.copytree(pipeline[0], tmp_path / "out")
    return tmp_path / "out"


def refused(done, *told: str) -> None:
    """One line on standard error, exit code 2, no traceback."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for text in told:
        assert re.search(text, errors[0]), errors[0]


def answers(out, name: str, n: int, label="positive", **more) -> list[dict]:
    """Rows of the first n samples, as a labeller gives them."""
    items = rows(out / "samples.jsonl")[:n]
    return [item | {"label": label, "labeller": name, "time": 1000 + i} | more
            for i, item in enumerate(items)]


def write_rows(path: Path, found: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


# ---- 1. Nothing good is deleted or overwritten without a word ------------------------------------
def make(*arguments, cwd=ROOT, **env):
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | env)


def test_clean_deletes_what_the_scripts_wrote_and_nothing_else(out, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "Makefile", project)
    (project / ".venv").mkdir()
    (project / "01_pretrain.py").touch()
    for name in ("notes.txt", "01-notes.jsonl", "policy-best.safetensors", "draft.tmp"):
        (out / name).write_text("mine")
    write_rows(out / "labels-anna (1).jsonl", answers(out, "anna", 3))
    kept = {"notes.txt", "01-notes.jsonl", "policy-best.safetensors", "draft.tmp",
            "labels-anna (1).jsonl", "labels-vader.jsonl"}
    (tmp_path / "link").symlink_to(out)
    for bad in ("OUT=", "OUT=my out", "OUT=a%b", "OUT=o(1)", "OUT=a;b", "OUT=a`b`", "OUT=a>b"):
        assert make("clean", bad, "VENV=", cwd=project).returncode == 2, bad
    for nothing in ("OUT=nowhere", "OUT=.", f"OUT={project}"):
        assert make("clean", nothing, "VENV=mine", cwd=project).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(out, tmp_path / "elsewhere" / "out")  # CDPATH must not lead there
    (project / "out").mkdir()
    make("clean", "VENV=mine", cwd=project, CDPATH=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "out" / "base.safetensors").exists()
    (project / "out").rmdir()
    (tmp_path / "downloads").mkdir()  # a folder of somebody's with one label file
    for name in ("labels-anna.jsonl", "corpus.txt", "report.html"):
        (tmp_path / "downloads" / name).touch()
    assert make("clean", f"OUT={tmp_path / 'downloads'}", cwd=project, VENV="mine").returncode == 2
    assert {path.name for path in project.iterdir()} == {"Makefile", ".venv", "01_pretrain.py"}
    done = make("clean", f"OUT={tmp_path / 'link'}", cwd=project)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.rglob("*") if p.is_file() and p.name[0] != "."} == kept
    assert not (project / ".venv").exists() and (tmp_path / "link").is_symlink()
    assert make("clean", f"OUT={out}", cwd=project).returncode == 0  # a second time


def test_make_counts_a_second_download_once(out):
    """`labels-anna (1).jsonl`: make has no rule with blanks; 03 counts each item once."""
    found = answers(out, "anna", 30, "positive")
    write_rows(out / "labels-anna.jsonl", found)
    later = [row | {"label": "negative", "time": 5000} for row in found[:12]]
    write_rows(out / "labels-anna (1).jsonl", found[:25] + later)
    os.utime(out / "reward.safetensors", (0, 0))
    done = make("-n", f"OUT={out}", "VENV=", f"PYTHON={sys.executable}",
                f"{out}/reward.safetensors")
    assert done.returncode == 0 and "03_reward_model.py" in done.stdout, done.stderr
    done = run("03_reward_model.py", out)
    assert done.returncode == 0, done.stderr
    assert "anna: 30 labels, negative 12, positive 18" in done.stdout.replace(
        "positive 18, negative 12", "negative 12, positive 18")
    assert "25 labels are in another file too" in done.stdout


def test_a_run_goes_on_on_a_machine_without_bf16(out):
    """The constants of the reward, measured again in float32, are not those of the state."""
    assert run("04_ppo.py", out, "--max-iterations", "3").returncode == 0
    before = rows(out / "04-happy.jsonl")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    wrapped = ("import runpy, sys, torch, model\nmodel.fast_dtype = lambda device: torch.float32\n"
               f"sys.argv[0] = {str(ROOT / '04_ppo.py')!r}\n"
               "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", wrapped, *command("04_ppo.py", out)[2:],
                           "--resume", "--max-iterations", "4"], capture_output=True, text=True,
                          env=env, timeout=200)
    assert done.returncode == 0 and "resuming at step 2" in done.stdout, done.stderr
    assert "float32" in done.stdout and rows(out / "04-happy.jsonl")[:2] == before[:2]


def test_what_is_refused_deletes_nothing(out):
    assert run("04_ppo.py", out, "--max-iterations", "2").returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags in (("--kl-stop", "0"), ("--kl-stop", "nan"), ("--batch", "100")):
        refused(run("04_ppo.py", out, *flags))
        assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("flags", [("--muon-lr", "1e30"), ("--warmup", "1", "--head-lr", "1000")])
def test_a_diverged_pretraining_keeps_the_good_model(out, corpus, flags):
    good = (out / "base.safetensors").read_bytes()
    refused(run("01_pretrain.py", out, "--corpus", str(corpus), "--steps", "30", *flags),
            "diverged.*lower --muon-lr")
    assert (out / "base.safetensors").read_bytes() == good


def test_a_model_with_nan_is_not_used(out):
    model, tokenizer, _ = load(out / "base.safetensors", "")
    model.head.data[0, 0] = torch.nan
    save(out / "base.safetensors", model, tokenizer)
    with pytest.raises(UserError, match="not finite.*run python 01_pretrain.py"):
        load(out / "base.safetensors", "01_pretrain.py")


def test_two_processes_do_not_write_one_file(out):
    """The second is refused; another target, and labelling, go on."""
    with FileLock(out / ".policy-happy.safetensors.lock"):
        refused(run("04_ppo.py", out), "another process is writing .*policy-happy")
        done = run("04_ppo.py", out, "--target", "sad", "--max-iterations", "1")
        assert done.returncode == 0, done.stderr
    for script, name in (("01_pretrain.py", "base.safetensors"), ("05_eval.py", "report.json"),
                         ("02_sample_label.py", "samples.jsonl"), ("report", "report.html"),
                         ("03_reward_model.py", "reward.safetensors")):
        with FileLock(out / f".{name}.lock"):
            refused(run(script, out), f"another process is writing .*{name}")


def sheet_of(out, n=12) -> tuple[Path, list[dict]]:
    items = read_items(out, "labels", 0)[:n]
    sheet.write_sheet(out.parent / "sheet.html", "labels", items)
    return out.parent / "sheet.html", items


def test_the_later_answer_counts_in_any_order(out, capsys):
    page, items = sheet_of(out)
    asked = sheet.read_sheet(page)
    first, second = (write_rows(out.parent / f"{when}.jsonl", [
        item | {"label": label, "labeller": "anna", "time": when} for item in items])
        for when, label in ((1000, "negative"), (2000, "positive")))
    for files in ([second, first], [first, second], [first], [second]):
        assert sheet.collect(asked, files, out) == 0
        assert set(answers_in(out, "labels")["anna"].values()) == {"positive"}
    assert len(rows(out / "labels-anna.jsonl")) == 12 and "replace" not in capsys.readouterr().err
    later = write_rows(out.parent / "c.jsonl", [
        items[0] | {"label": "neutral", "labeller": "anna", "time": 3000}])
    sheet.collect(asked, [later], out)
    assert "1 of anna's answers replace earlier, different ones" in capsys.readouterr().err


def test_merging_does_not_cut_off_a_labeller_at_work(out):
    page, items = sheet_of(out)
    given = write_rows(out.parent / "a.jsonl", [items[0] | {"label": "skip", "labeller": "anna"}])
    with FileLock(out / ".labels-anna.jsonl.lock"):
        refused(run("people merge", out, str(page), str(given)), "another process is writing")


# ---- 2. Files that a person, an editor or another program has touched ----------------------------
SAVED = {"Notepad": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n",
         "PowerShell": lambda text: b"\xff\xfe" + text.replace("\n", "\r\n").encode("utf-16-le"),
         "an old Mac": lambda text: text.replace("\n", "\r").encode(),
         "blank lines": lambda text: text.replace("\n", "\n\n \n").encode(),
         "no end": lambda text: text.rstrip().encode(),
         "padded": lambda text: text.encode() + b"\0" * 512}


@pytest.mark.parametrize("editor", SAVED)
def test_answers_that_an_editor_has_saved(out, editor):
    """As answers to a sheet, and as labels that 03 reads, and as a file to go on with."""
    page, items = sheet_of(out)
    text = "".join(json.dumps(item | {"label": "positive", "labeller": "anna", "time": 1}) + "\n"
                   for item in items)
    (out.parent / "a.jsonl").write_bytes(SAVED[editor](text))
    assert sheet.collect(sheet.read_sheet(page), [out.parent / "a.jsonl"], out) == 0
    assert len(answers_in(out, "labels")["anna"]) == 12
    (out / "labels-anna.jsonl").write_bytes(SAVED[editor](text))
    assert len(rm.read_labels(out / "labels-anna.jsonl")) == 12
    assert len(stage.read_answers(out / "labels-anna.jsonl")) == 12
    assert (out / "labels-anna.jsonl").read_bytes() == SAVED[editor](text)  # reading only reads
    assert len(stage.own_answers(out / "labels-anna.jsonl", "labels", "anna")) == 12
    assert (out / "labels-anna.jsonl").read_bytes() == text.encode()


def test_any_json_lines_are_read(out):
    """Other key order, escapes, spaces, null for what is not there, 12.0 for 12."""
    found = answers(out, "anna", 5)
    text = "".join(json.dumps(dict(reversed(row.items())) | {"prompt": None, "note": None},
                              indent=None, separators=(" , ", " : ")).replace("/", "\\/") + "\n"
                   for row in found)
    (out / "labels-anna.jsonl").write_text(re.sub(r"(\d+)( ,|\])", r"\1.0\2", text))
    read = rm.read_labels(out / "labels-anna.jsonl")
    assert [{k: row[k] for k in found[0]} for row in read] == found


BROKEN = ["[" * 100_000, '{"id": ' * 5000, "9" * 10_000, '{"id": "x"}', "null", "[]", '"text"']


@pytest.mark.parametrize("bad", BROKEN, ids=range(len(BROKEN)))
def test_hostile_lines_are_named(out, bad, capsys):
    page, items = sheet_of(out)
    good = json.dumps(items[0] | {"label": "skip", "labeller": "anna", "seconds": 1e999})
    (out.parent / "a.jsonl").write_text(good + "\n" + bad + "\n")
    assert sheet.collect(sheet.read_sheet(page), [out.parent / "a.jsonl"], out) == 1
    assert "a.jsonl line 2 left out: broken" in capsys.readouterr().err
    assert rows(out / "labels-anna.jsonl")[0]["seconds"] == 0
    (out / "labels-bo.jsonl").write_text(bad + "\n")
    for read in (rm.read_labels, stage.read_answers):
        with pytest.raises(UserError, match="labels-bo.jsonl line 1 is broken"):
            read(out / "labels-bo.jsonl")


def test_two_people_of_one_name_and_answers_without_a_good_time(out, capsys):
    page, items = sheet_of(out)
    asked, given = sheet.read_sheet(page), []
    for label, name in (("negative", "anna"), ("positive", "Anna")):
        given.append(write_rows(out.parent / f"{label}.jsonl", [
            item | {"label": label, "labeller": name} for item in items]))
    sheet.collect(asked, given, out)
    assert "anna answered 12 items twice, differently" in capsys.readouterr().err
    assert set(answers_in(out, "labels")["anna"].values()) == {"positive"}
    for when in ("1800000000", 1_800_000_000_000, None, 4e9):  # text, milliseconds, none, to come
        (out / "labels-anna.jsonl").unlink()
        sheet.collect(asked, [write_rows(out.parent / "t.jsonl", [
            items[0] | {"label": "skip", "labeller": "anna", "time": when}])], out)
        sheet.collect(asked, [write_rows(out.parent / "u.jsonl", [
            items[0] | {"label": "neutral", "labeller": "anna", "time": time.time() + 1}])], out)
        assert answers_in(out, "labels")["anna"] == {items[0]["id"]: "neutral"}, when
    write_rows(out / "labels-anna.jsonl", answers(out, "bo", 3))
    with pytest.raises(UserError, match="holds answers of bo"):
        sheet.collect(asked, given, out)


def test_labels_replaced_or_deleted_while_a_person_labels(out):
    """As `sed -i` and some editors do: what follows goes into the new file, and nothing is lost."""
    import pty
    path, (ours, theirs) = out / "labels-anna.jsonl", pty.openpty()
    process = subprocess.Popen(command("people label", out, "anna"), stdin=theirs, stdout=theirs,
                               stderr=theirs)
    os.set_blocking(ours, False)

    def press(keys, first):
        """Each key until it is in the file: the terminal drops keys that nobody waits for yet."""
        for n, key in enumerate(keys, first):
            deadline, again = time.time() + 60, 0
            while not path.exists() or len(rows(path)) < n:
                assert time.time() < deadline, key
                if time.time() > again:
                    os.write(ours, key.encode())
                    again = time.time() + 5
                with suppress(BlockingIOError):
                    os.read(ours, 10_000)
                time.sleep(0.02)
    press("pp", 1)
    copy = path.read_bytes()
    path.unlink()
    path.write_bytes(copy)
    press("n", 3)
    path.unlink()
    press("n", 4)
    os.write(ours, b"q")
    process.wait(20)
    assert [row["label"] for row in rows(path)] == ["positive"] * 2 + ["negative"] * 2


def test_names_that_nearly_fit_are_named(out):
    for name in ("Copy of labels-anna.jsonl", "labels_bo.jsonl", "labels-cy.jsonl.txt"):
        write_rows(out / name, answers(out, "anna", 3))
    done = run("03_reward_model.py", out, "--epochs", "0.1")
    assert done.returncode == 0 and done.stderr.count("is not read: only files named") == 3


def test_a_name_that_contradicts_the_file(out):
    found = answers(out, "anna", 30) + answers(out, "anna", 15, "negative")
    write_rows(out / "labels-bo.jsonl", found)
    done = run("03_reward_model.py", out)
    assert done.returncode == 0 and "anna: 30 labels" in done.stdout, done.stderr
    assert "labels-bo.jsonl holds labels of anna" in done.stderr
    code, shown = type_keys(command("people label", out, "bo"), "q")
    assert code == 2 and "holds answers of anna: rename it" in shown


def find_policies(out):
    ev.find_policies(out, "happy", load(out / "policy-happy.safetensors", "")[2]["inputs"])


def resume_04(out):
    resume(out / "04-happy-state.pt", ppo.Config(resume=True), {})


DAMAGED = [
    (build_report, "curve.json", b"7"), (build_report, "curve.json", b'[{"labels": "x"}]'),
    (build_report, "ratings.json", b"[]"), (build_report, "report.json", b"{}"),
    (build_report, "ratings.json", b'{"policies": {}, "results": 5}'),
    (build_report, "report.json", b"[1]"), (build_report, "02.json", b"{"),
    (find_policies, "04-happy.jsonl", b'{"step": 0, "kl": "x"}\n'),
    (find_policies, "04-happy.jsonl", b"\xff\xfe\x00"),
    (lambda out: ev.load_run(out, "cpu", torch.float32), "base.safetensors", b""),
    (lambda out: read_items(out, "labels", 0), "samples.jsonl", b'{"id": "1", "text": 5}\n'),
    (ratings.unblind, "key-x.json", b'{"items": []}'), (resume_04, "04-happy-state.pt", b"x"),
    (lambda out: stage.read_answers(out / "labels-a.jsonl"), "labels-a.jsonl", b"\xff\xfe\0\0[\0"),
    (lambda out: read_prompts(out / "prompts.json", "train", 99), "prompts.json",
     b'{"train": [[99]]}'),
    (lambda out: answers_in(out, "ratings"), "ratings-a.jsonl", b'{"id": "1", "label": "left"}\n'),
    (build_report, "curve.json", b'[{"labels": 1e999}]')]


@pytest.mark.parametrize("read, name, data", DAMAGED, ids=[f"{d[1]}-{d[2]!r}" for d in DAMAGED])
def test_damaged_files_are_named(out, read, name, data):
    (out / name).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(name)):
        read(out)


def test_what_is_not_a_model_is_said(out):
    (out / "x-state.pt").touch()
    model, tokenizer, _ = load(out / "base.safetensors", "")
    newer = tokenizer.to_str().replace('"type":"BPE"', '"type":"Newer"')
    save(out / "newer.safetensors", model, type("", (), {"to_str": lambda self: newer})())
    for name, why in ((".", "is a folder"), ("x-state.pt", "state of an unfinished run"),
                      ("none.safetensors", "missing"), ("newer.safetensors", "another version")):
        with pytest.raises(UserError, match=why):
            load(out / name, "01_pretrain.py")
    done = subprocess.run([sys.executable, "-m", "report.complete", str(out)], cwd=ROOT,
                          capture_output=True, text=True)
    refused(done, "is a folder")


# ---- 3. Paths and commands -----------------------------------------------------------------------
def test_the_printed_commands_work_when_pasted(pipeline, tmp_path):
    """In a folder with a blank and a quote, from a page with a blank."""
    out = tmp_path / "anna's run"
    shutil.copytree(pipeline[0], out)
    done = run("people sheet", out, str(tmp_path / "for anna.html"), "--n", "3")
    pasted = shlex.split(done.stdout.splitlines()[-1].removeprefix("next: "))
    assert pasted[-2:] == ["--out", str(out)] and str(tmp_path / "for anna.html") in pasted
    items = sheet.read_sheet(tmp_path / "for anna.html")["items"]
    back = write_rows(tmp_path / "back.jsonl", [
        item | {"label": "skip", "labeller": "anna"} for item in items])
    pasted = [sys.executable if x == "python" else str(back) if x == "FILE.jsonl" else x
              for x in pasted if x != "..."]
    done = subprocess.run(pasted, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(rows(out / "labels-anna.jsonl")) == 3, done.stderr
    said = run("02_sample_label.py", out, "--n", "64").stdout.splitlines()[-1]
    assert said == f"next: python 03_reward_model.py --out {shlex.quote(str(out))}"


def test_merging_needs_files_and_a_run(out, tmp_path):
    page, _ = sheet_of(out)
    refused(run("people merge", out, str(page)), "name the files that came back")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(run("people merge", out, str(page), str(tmp_path / "empty.jsonl")), "no answers in")
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "samples.jsonl", [{"id": "another-run-1", "text": "What ho!"}])
    for folder in (tmp_path / "none", other):
        refused(run("people merge", folder, str(page), str(tmp_path / "empty.jsonl")),
                "does not ask about the samples in")
    assert not (tmp_path / "none").exists() and len([*other.iterdir()]) == 1


def test_a_linked_file_stays_a_link(out, tmp_path):
    """Labels that lie in a folder which some program copies elsewhere."""
    elsewhere = write_rows(tmp_path / "labels-anna.jsonl", answers(out, "anna", 3))
    (out / "labels-anna.jsonl").symlink_to(elsewhere)
    page, items = sheet_of(out)
    back = write_rows(tmp_path / "back.jsonl", [items[0] | {"label": "skip", "labeller": "anna"}])
    assert sheet.collect(sheet.read_sheet(page), [back], out) == 0
    assert (out / "labels-anna.jsonl").is_symlink() and len(rows(elsewhere)) == 4


# ---- 4. Terminals and machines -------------------------------------------------------------------
def test_a_terminal_that_cannot_print_a_character(out, corpus, tmp_path):
    text = corpus.read_text().replace("love", "l’amour").replace("joy", "joie ☃")
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    for script, more in (("01_pretrain.py", ["--corpus", str(tmp_path / "corpus.txt"), "--steps",
                                             "60"]),
                         ("02_sample_label.py", []), ("03_reward_model.py", ["--epochs", "1"]),
                         ("04_ppo.py", ["--max-iterations", "1"])):
        done = subprocess.run(command(script, out, *more), capture_output=True, env=env)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", [
    "stdout=1>&-", "stderr=2>&-", "pipe=| head -1", "none=>&- 2>&-"])
def test_a_closed_stream_ends_no_run(out, closed):
    line = shlex.join(command("04_ppo.py", out, "--max-iterations", "1", "--seed", "3"))
    done = subprocess.run(["bash", "-c", f"{line} {closed.partition('=')[2]}; true"], timeout=200,
                          capture_output=True, text=True)
    assert load(out / "policy-happy.safetensors", "")[2]["settings"]["seed"] == 3, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


@pytest.mark.parametrize("env", [
    {"RANK": "0", "WORLD_SIZE": "4", "SLURM_PROCID": "1", "LC_ALL": "C", "OMP_NUM_THREADS": ""},
    {"PYTHONUTF8": "0", "LC_ALL": "de_DE.ISO-8859-1", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "0",
     "TERM": "dumb", "HOME": "/nowhere"}])
def test_variables_of_schedulers_and_shells(out, env):
    done = run("02_sample_label.py", out, "--n", "64", env=os.environ | env)
    assert done.returncode == 0, done.stderr


def test_a_clock_that_jumps(out, tmp_path):
    """Seconds are of a clock that only goes forward."""
    wrapped = ("import runpy, sys, time\nreal = time.time\n"
               "time.time = lambda: real() - 1e6 * (real() % 2 > 1)\n"
               f"sys.argv[0] = {str(ROOT / '04_ppo.py')!r}\n"
               "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", wrapped, *command("04_ppo.py", out)[2:],
                           "--max-iterations", "2"], capture_output=True, text=True, timeout=200,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert all(0 <= row.get("s_update", 0) < 100 for row in rows(out / "04-happy.jsonl"))
    assert 0 < load(out / "policy-happy.safetensors", "")[2]["seconds"] < 200


def test_a_git_that_hangs(out, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\nexec sleep 100\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    began = time.time()
    done = run("report", out, env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 0 and time.time() - began < 30, done.stderr


def test_a_prompt_that_is_no_text(out):
    def complete(prompt):
        line = [sys.executable, "-m", "report.complete", str(out / "base.safetensors"), "--prompt"]
        return subprocess.run([*line, prompt], cwd=ROOT, capture_output=True, text=True)
    refused(complete(b"caf\xe9"), "not UTF-8")
    refused(complete("love " * 500), "the prompt has .* tokens, too many")


# ---- 5. Corpora ----------------------------------------------------------------------------------
RUSSIAN = ("любовь радость счастье свет".split(), "смерть горе слёзы тьма".split(),
           "дом дорога город конь телега полдень и на в с".split())
GERMAN = ("die liebe und die freude sind das glück".split(), "der tod und das leid".split(),
          "das haus am weg in die stadt ist alt und der wagen steht hier".split())


def corpus_of(words, path: Path) -> Path:
    import random
    rng = random.Random(0)
    lines = [" ".join(rng.choice(rng.choice(words)) for _ in range(6)) + "." for _ in range(2000)]
    path.write_text("\r\n".join(lines), encoding="utf-8")
    return path


def pretrained(words, tmp_path) -> Path:
    out = tmp_path / "other"
    done = run("01_pretrain.py", out, "--corpus", str(corpus_of(words, tmp_path / "c.txt")),
               "--steps", "100")
    assert done.returncode == 0, done.stderr
    return out


def test_a_corpus_that_vader_cannot_read(tmp_path):
    """VADER's labels are refused with the reason; a person's labels make a reward model."""
    out = pretrained(RUSSIAN, tmp_path)
    done = run("02_sample_label.py", out, "--corpus-fraction", "0")
    assert done.returncode == 0 and "VADER reads English" in done.stderr, done.stderr
    refused(run("03_reward_model.py", out), "the same|not neutral")
    happy = re.compile("любовь|радость|счастье|свет")
    found = [row | {"label": "positive" if len(happy.findall(row["text"])) > 3 else "negative",
                    "labeller": "anna"} for row in rows(out / "samples.jsonl")[:60]]
    write_rows(out / "labels-anna.jsonl", found)
    done = run("03_reward_model.py", out)
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stderr and "anna: 60 labels" in done.stdout
    assert load(out / "reward.safetensors", "")[2]["metrics"]["all"]["bag_of_words_auc"] > 0.4


def test_vader_warns_of_german(tmp_path):
    done = run("02_sample_label.py", pretrained(GERMAN, tmp_path), "--corpus-fraction", "0")
    assert done.returncode == 0 and "warning: VADER reads English" in done.stderr


def test_no_warning_of_english(pipeline):
    assert "reads English" not in pipeline[1]["02_sample_label.py"]
    assert stage.english(rows(pipeline[0] / "samples.jsonl")) > 0.15


def test_parts_of_a_corpus_that_are_too_short_are_named(out, corpus):
    refused(run("01_pretrain.py", out, "--corpus", str(corpus), "--context", "4000", "--batch",
                "1"), "held-out part.*too few")
    refused(run("01_pretrain.py", out, "--corpus", str(corpus), "--batch", "99999"),
            "training tokens are too few")


# ---- 6. A reward and a judge of one's own --------------------------------------------------------
def test_a_reward_of_integers(out, tmp_path):
    line = "torch.tensor([t.count('e') for t in tokenizer.decode_batch(y.tolist())])"
    source = (ROOT / "04_ppo.py").read_text(encoding="utf-8")
    (tmp_path / "04_ppo.py").write_text(
        source.replace("        return log_p[:, target]\n", f"        return {line}\n"))
    done = subprocess.run([sys.executable, str(tmp_path / "04_ppo.py"), *STAGES["04_ppo.py"],
                           "--out", str(out), "--max-iterations", "1"], capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=200)
    assert done.returncode == 0, done.stderr


REWARDS = {
    "a list": (lambda y: y[:, 0].tolist(), None), "bool": (lambda y: y[:, 0] > 50, None),
    "infinite": (lambda y: (y[:, 0] - 50).clamp_min(0).log(), "not finite for [0-9]+ of 512"),
    "one number": (lambda y: torch.tensor(1.0), r"shape \(\) for 256 completions"),
    "a column": (lambda y: y[:, :1], r"shape \(256, 1\) for 256 completions"),
    "constant": (lambda y: torch.ones(len(y)), "same reward"),
    "words": (lambda y: ["x"] * len(y), "list for 256"), "None": (lambda y: None, "NoneType for")}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_of_ones_own(name, pipeline):
    reward, why = REWARDS[name]
    base, cfg = load(pipeline[0] / "base.safetensors", "")[0], ppo.Config(reward_samples=512)

    def constants():
        return ppo.reward_constants(ppo.scores_of(lambda y, prompt: reward(y)), base, None, 8, cfg)
    if why:
        with pytest.raises(UserError, match=why):
            constants()
    else:
        assert constants()[1] > 0


def test_a_judge_of_ones_own(out, monkeypatch):
    monkeypatch.setitem(ev.JUDGES, "mine", "Mine")
    with pytest.raises(UserError, match="the judge 'mine' must give one finite number"):
        ev.judge(["love", "hate"])


# ---- 7. What it writes is what it says it is -----------------------------------------------------
def strict(text: str):
    def no(constant):
        raise AssertionError(f"{constant} is no JSON")
    return json.loads(text, parse_constant=no)


def test_json_is_strict_and_the_page_says_na(out):
    """Labels of which none is negative have no AUC; a policy that stands still has no fit."""
    happy = [row for row in rows(out / "labels-vader.jsonl") if row["label"] != "negative"]
    write_rows(out / "labels-vader.jsonl", happy)
    assert run("03_reward_model.py", out).returncode == 0
    done = run("04_ppo.py", out, "--lr", "0", "--max-iterations", "3")
    assert done.returncode == 0, done.stderr
    for script in ("05_eval.py", "report"):
        done = run(script, out)
        assert done.returncode == 0, done.stderr
    for path in (*out.glob("*.json"), *out.glob("*.jsonl")):
        for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            strict(line)
    page = (out / "report.html").read_text()
    assert "n/a" in page and not re.search(r"[>( ]nan[<,;.)% ]", page)


# ---- kill -9 -------------------------------------------------------------------------------------
def test_a_killed_merge_loses_no_answer(out):
    """Killed at five moments, each time run again: all answers are there, each once."""
    page, items = sheet_of(out, n=200)
    back = write_rows(out.parent / "a.jsonl", [
        item | {"label": "skip", "labeller": "anna", "time": 1} for item in items])
    for k in range(5):
        process = subprocess.Popen(command("people merge", out, str(page), str(back)),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1.6 + 0.2 * k)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "labels-anna.jsonl").exists():
            assert len(rows(out / "labels-anna.jsonl")) == 200
    assert run("people merge", out, str(page), str(back)).returncode == 0
    assert len({row["id"] for row in rows(out / "labels-anna.jsonl")}) == 200
