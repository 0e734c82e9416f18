"""`make gpu` where there is no GPU: what it refuses, what it says, what its table makes of figures.
Its rehearsal runs beside the kernels' tests, in test_triton.py."""
import shutil

import pytest

from benchmarks import gpu, gpu_parts
from model import UserError


def test_each_call_fits_ten_minutes_and_every_part_is_there():
    for call in ("first", "second"):
        assert sum(limit for c, limit, _, _ in gpu.PARTS.values() if c == call) < 600
    for _, _, command, _ in gpu.PARTS.values():
        assert callable(getattr(gpu_parts, command.split()[0]))


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda module: module != "tyro")
    needed, _ = gpu.missing()
    assert "tyro is not installed: pip install tyro" in needed and len(needed) <= 2  # and no GPU


def test_the_wrong_model_is_not_timed(monkeypatch, tmp_path):
    """Without a corpus 01 installs the shipped model of a CPU, and would be fast."""
    monkeypatch.setattr(gpu_parts, "OUT", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))

    def script(name, *arguments):
        (tmp_path / "run").mkdir()
        shutil.copy("pretrained/base.safetensors", tmp_path / "run")
        return {}
    monkeypatch.setattr(gpu_parts, "script", script)
    with pytest.raises(UserError, match="d_model is 192"):
        gpu_parts.pipeline("cold")


def test_the_table_tells_reached_from_missed_and_failed():
    passed = {"passed": True, "seconds": 50.0}
    assert gpu.rows("warm", passed | {"figures": {"five scripts, s": 40.0}}) == [
        "| warm | yes | 50 | five scripts, s: 40 | at most 60 | 1.50 |"]
    assert gpu.rows("warm", passed | {"figures": {"five scripts, s": 80.0}}) == [
        "| warm | missed | 50 | five scripts, s: 80 | at most 60 | 0.75 |"]
    failed = {"passed": False, "seconds": 80.0, "figures": {}, "why": "over 80 s: 03"}
    assert "| failed | 80 | over 80 s: 03 |" in gpu.rows("warm", failed)[0]
    nothing = passed | {"figures": {"sample, times Gumbel, torch.compile": None}}
    assert "| missed | 50 | sample, times Gumbel, torch.compile: not measured |" in gpu.rows("sample", nothing)[0]
    report = {"versions": {"torch": "2"}, "parts": {"variants": passed | {"figures": {"ran": 12}}}}
    assert "| variants | yes | 50 |  |  |  |" in gpu.table(report)


def test_the_table_goes_between_its_marks(monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/kernels.md"
    page.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.fill_table({"versions": {"GPU": "one"}, "parts": {}})
    text = page.read_text()
    assert text.startswith("before\n<!-- gpu -->\nGPU one\n")
    assert text.endswith("|\n<!-- /gpu -->\nafter\n")
    assert "old" not in text
