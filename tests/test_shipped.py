"""Checks what the project ships: one run in pretrained/, its page in docs/, and its figures in
README and in the scripts. Then runs `make play` on it."""
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

from model import UserError, fingerprint, load
from report import play, publish
from report.made import MODELS, SHIPPED
from tests.test_pipeline import type_keys

ROOT = SHIPPED.parent


def headers() -> tuple[dict, dict, dict]:
    """What the files of pretrained/ say of the base model, the reward model and the policy."""
    return tuple(load(SHIPPED / name, "")[2] for name in MODELS)


# ---- One run -------------------------------------------------------------------------------------
def test_the_shipped_models_are_of_one_run():
    base, reward = (fingerprint(load(SHIPPED / name, "")[0]) for name in MODELS[:2])
    _, of_reward, of_policy = headers()
    assert of_reward["inputs"]["base"] == base
    assert of_policy["inputs"] == {"base": base, "reward_model": reward}
    report = json.loads((SHIPPED / "report.json").read_text())
    policy = fingerprint(load(SHIPPED / MODELS[2], "")[0])
    assert [report["happy"][i]["fingerprint"] for i in (0, -1)] == [base, policy]
    page = (ROOT / "docs" / "index.html").read_text()
    assert f"<td>policy-happy made from base</td><td>{base}</td>" in page
    assert f"<td>policy-happy made from reward_model</td><td>{reward}</td>" in page


def test_the_headline_figures_are_those_of_the_shipped_run():
    """In README, in the scripts' first lines and on the page."""
    base, reward, policy = headers()
    report = json.loads((SHIPPED / "report.json").read_text())
    bits = f"{base['metrics']['bits_per_byte']:.3f} bits per byte"
    auc = f"AUC {reward['metrics']['all']['auc']:.3f}"
    p_happy = f"p(happy) {report['ppo'][0]['p_target']:.2f} -> {policy['p_target']:.2f}"
    nats = f"{policy['kl']:.1f} nats away"
    before, after = (f"{row['positive']:.1%}" for row in (report["happy"][0], report["happy"][-1]))
    positive = f"{before} -> {after} positive"
    places = {"README.md": (bits, auc, p_happy, nats, positive), "01_pretrain.py": (bits,),
              "03_reward_model.py": (auc,), "04_ppo.py": (p_happy, nats),
              "05_eval.py": (positive,), "docs/index.html": (before, after)}
    for name, figures in places.items():
        text = " ".join((ROOT / name).read_text().split())
        for figure in figures:
            assert figure in text, (name, figure)


def test_publishing_a_run(pipeline, tmp_path, monkeypatch):
    """Every file of the run arrives, and the page, its plots and picture; an unfinished run is
    refused before anything is written."""
    run, shipped, docs = tmp_path / "run", tmp_path / "pretrained", tmp_path / "docs"
    shutil.copytree(pipeline[0], run)
    for module, name, value in ((publish, "SHIPPED", shipped), (publish, "DOCS", docs),
                                (publish, "photograph", lambda page, picture: None)):
        monkeypatch.setattr(module, name, value)
    (run / "02.json").rename(run / "kept")
    with pytest.raises(UserError, match="02.json is missing"):
        publish.publish(run)
    assert not shipped.exists() and not docs.exists()
    (run / "kept").rename(run / "02.json")
    publish.publish(run)
    for name in (*MODELS, *publish.MEASURED):
        assert (shipped / name).read_bytes() == (run / name).read_bytes()
    assert (docs / "index.html").read_bytes() == (run / "report.html").read_bytes()
    assert {path.stem for path in docs.glob("*.svg")} == set(publish.PLOTS)


def test_make_quick_starts_from_the_shipped_base_model(tmp_path):
    """It runs 02 to 05 and the page, and not 01. A base model that is there stays."""
    for name in ("Makefile", *(path.name for path in ROOT.glob("0*.py")), "model.py"):
        shutil.copy(ROOT / name, tmp_path)  # copy, not copy2: as old as the files of a clone
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "base.safetensors").write_text("shipped")
    for mine in ("mine", None):
        base = tmp_path / f"run-{mine}" / "base.safetensors"
        if mine:
            base.parent.mkdir()
            base.write_text(mine)
        done = subprocess.run(["make", "quick", f"OUT={base.parent.name}", "VENV=", "PYTHON=true"],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        called = re.findall(r"^true (?:-m )?(\w+)", done.stdout, re.M)
        assert called == ["02_sample_label", "03_reward_model", "04_ppo", "05_eval", "report"]
        assert base.read_text() == (mine or "shipped")
        assert [path.name for path in base.parent.iterdir()] == ["base.safetensors"]


# ---- make play -----------------------------------------------------------------------------------
def played(capsys, **how) -> str:
    play.play(**how)
    return capsys.readouterr().out


def test_play_prints_one_comparison_where_nobody_presses_keys(tmp_path, monkeypatch, capsys):
    """Without a run in out/, of the shipped models; without colours, which a pipe does not have.
    The random numbers decide both texts."""
    monkeypatch.chdir(tmp_path)
    first = played(capsys)
    assert f"policy, {headers()[2]['kl']:.1f} nats away" in first and "base model" in first
    assert first.count("p(happy)") == 2 and "\x1b" not in first and "sadder" not in first
    assert max(map(len, first.splitlines())) <= 80
    assert first == played(capsys) != played(capsys, seed=1)
    assert "My lord, " in played(capsys, prompt="My lord, ")
    with pytest.raises(UserError, match="the prompt has .* tokens: 32 at most"):
        play.play(prompt="the moon " * 40)
    with pytest.raises(UserError, match="reserved"):
        play.play(prompt="<|happy|>")


def test_the_colours_are_what_each_token_does_to_the_reward_model():
    """Its verdict on the text before a token and on the text with it, one token at a time. It reads
    the prompt as a part of the text."""
    run = play.open_run(SHIPPED)
    prompt = run.tokenizer.encode("My lord, ").ids
    shown, p_happy = play.completion(run, run.base, prompt, seed=0)
    ids = torch.tensor([prompt])
    y, _ = run.base.generate(1, run.length - len(prompt), 0, prompts=ids)
    text = torch.cat((ids, y), 1)
    verdicts = [run.reward_model.sentiment(text[:, :t])[0].tolist()
                for t in range(len(prompt), run.length + 1)]
    assert p_happy == pytest.approx(math.exp(verdicts[-1][0]), abs=1e-4)
    odds = [happy - sad for happy, sad in verdicts]
    styles = [play.style(play.shade(b - a)) for a, b in zip(odds, odds[1:])]
    pieces = play.without_blank_lines(play.ev.pieces(run.tokenizer, y[0].tolist()))
    assert [span.style for span in shown.spans if "black" in str(span.style)] == [
        style for style, piece in zip(styles, pieces) if style and piece.strip(" ")]
    assert len(set(styles)) > 3


def test_play_with_keys(pipeline):
    """In a terminal: other random numbers, an earlier checkpoint, another prompt, a bad one."""
    argv = [sys.executable, "-m", "report.play", "--out", str(pipeline[0])]
    code, shown = type_keys(argv, [
        "r", "\x1b[D", "pMy lord\n", "p" + "my " * 60 + "\n", "\x1b", "q"])
    assert code == 0, shown
    screens = shown.split("\x1b[2J")[1:]
    at = [re.search(r"checkpoint (\d+) of (\d+)", screen).groups() for screen in screens]
    last = at[0][1]
    assert [place for place, _ in at] == [last, last] + [str(int(last) - 1)] * 4
    assert "random numbers 0" in screens[0] and "random numbers 1" in screens[1]
    assert "'My lord'" in screens[3] and "'My lord'" in screens[4]
    assert "tokens: 12 at most" in screens[4] and "tokens:" not in screens[5]
    assert "sadder" in screens[0]  # the legend
