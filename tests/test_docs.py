"""Checks README and docs/: links lead somewhere, commands exist, and the code is as they say."""
import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = "report|people|experiments|benchmarks|tests"
SCRIPT = r"python (\d\d_\w+)\.py((?: --[\w-]+(?: [\w./]+)?)*)"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def has_flag(stage: str, flag: str) -> bool:
    """Whether a script has --flag, or the switch that --no-flag turns off."""
    config = importlib.import_module(stage).Config
    names = {field.name.replace("_", "-") for field in fields(config)}
    return flag in names or flag.removeprefix("no-") in names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files, and headings of a page."""
    for place in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text(encoding="utf-8")):
        name, _, heading = place.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), place
        if heading:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
                               for h in headings], place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    """Scripts and their flags, modules, targets of make."""
    text, makefile = page.read_text(encoding="utf-8"), text_of("Makefile")
    for stage, flags in re.findall(SCRIPT, text):
        assert (ROOT / f"{stage}.py").exists(), stage
        for flag in re.findall(r"--([\w-]+)", flags):
            assert has_flag(stage, flag), (stage, flag)
    for module in re.findall(rf"python -m ((?:{FOLDERS})(?:\.[a-z_]+)?)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for command in re.findall(r"python -m people (\w+)", text):
        assert f"def {command}(" in text_of("people/__main__.py"), command
    for target in re.findall(r"(?:^    |`)make ([a-z]+)\b", text, re.M):
        assert f"\n{target}:" in makefile, target


def test_the_exercise_names_what_there_is():
    """`file`: `name`, `name` of docs/exercise.md: functions, classes or flags of that file."""
    named, rows = 0, re.findall(r"^\| .*", text_of("docs/exercise.md"), re.M)
    for file, names in re.findall(r"`([\w/]+\.(?:py|html))`(?:: ((?:`[\w-]+`(?:, )?)+))?",
                                  "\n".join(rows)):
        assert (ROOT / file).exists(), file
        for name in re.findall(r"`([\w-]+)`", names):
            named += 1
            if name.startswith("--"):
                assert has_flag(Path(file).stem, name[2:]), (file, name)
            else:
                assert re.search(rf"^\s*(def|class) {name}\b", text_of(file), re.M), (file, name)
    assert len(rows) > 30 and named > 35


def test_every_column_of_the_logs_is_explained(pipeline):
    """docs/log.md has a section for each log, with its columns and no others."""
    sections = text_of("docs/log.md").split("\n## ")[1:]
    for section in sections:
        name = section.split(":")[0]
        rows = (pipeline[0] / name).read_text().splitlines()
        columns = set().union(*(json.loads(row) for row in rows))
        explained = re.findall(r"^\| (`[^|]*`) \|", section, re.M)
        assert set(re.findall(r"`(\w+)`", " ".join(explained))) == columns, name
    assert len(sections) == 3
