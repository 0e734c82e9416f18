"""The page that a run ends in: `python -m report` turns out/report.json into out/report.html.

    trust.py      what the reward model sees, token by token, and whether it still sees right
    health.py     marks for the run of PPO, each with its rule
    story.py      the run in a few sentences
    made.py       versions, settings, seconds
    plots.py      which figures; svg.py: how they are drawn
    complete.py   completions of a prompt by any checkpoint: `python -m report.complete`
    page.html     the page, a Jinja template, with page.css, plot.css and page.js
"""
import hashlib
import importlib
import json
import math
from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from model import UserError, require, write
from report.health import marks
from report.made import made_by
from report.plots import draw_plots
from report.story import headline, in_short
from report.svg import STYLE
from report.trust import STEPS, against_vader, shown_samples

ev = importlib.import_module("05_eval")


def render(results: dict, figures: dict, made: dict) -> str:
    """page.html with the results in it, everything escaped. Its policy allows this very script and
    style, and loads nothing."""
    here = Path(__file__).parent
    html, css, script = ((here / f"page.{kind}").read_text(encoding="utf-8")
                         for kind in ("html", "css", "js"))
    style = STYLE + css
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for kind, content in (("script", script), ("style", style)):
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(html).render(
        report=results, figures=figures, made=made, judges=ev.JUDGES, steps=STEPS, style=style,
        script=script, policy=policy)


def nan_for_null(x):
    """JSON has no NaN: what could not be measured was written as null."""
    if isinstance(x, dict):
        return {key: nan_for_null(value) for key, value in x.items()}
    if isinstance(x, list):
        return [nan_for_null(value) for value in x]
    return math.nan if x is None else x


def read_json(path: Path, otherwise):
    """What a JSON file holds; `otherwise` if there is none. Raises UserError if it is damaged."""
    try:
        return nan_for_null(json.loads(path.read_text())) if path.exists() else otherwise
    except ValueError as error:
        raise UserError(f"{path} is damaged: delete it, or write it again") from error


def read_ratings(path: Path, fingerprints: set[str]) -> list[dict]:
    """What `python -m people` wrote of blind ratings, if they are of these policies."""
    ratings = read_json(path, {"policies": {}, "results": []})
    if not {*ratings["policies"].values()} <= fingerprints:
        print(f"{path} is of other policies: left out")
        return []
    return ratings["results"]


def read_results(out: Path) -> dict:
    """What 05 wrote, and what the page says of it. Raises UserError if 05 has not run."""
    require((out / "report.json").exists(), f"{out}/report.json is missing: run 05_eval.py first")
    results = read_json(out / "report.json", {})
    rows = results["happy"] + results.get("sad", [])
    for row in rows:
        row |= against_vader(row) | {"shown": shown_samples(row)}
    fingerprints = {row["fingerprint"] for row in rows}
    results["ratings"] = read_ratings(out / "ratings.json", fingerprints)
    return results | {"health": marks(results["ppo"]), "headline": headline(results["happy"]),
                      "in_short": in_short(results)}


def build_report(out: Path) -> None:
    """Writes out/report.html and out/plots/*.svg."""
    results = read_results(out)
    learning_curve = read_json(out / "curve.json", [])  # of experiments/learning_curve.py
    figures = draw_plots(results, learning_curve, out / "plots")
    write(out / "report.html", render(results, figures, made_by(out, results)))
