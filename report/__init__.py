"""Show a finished run as a page: `python -m report` turns out/report.json into out/report.html.

    page.html     the page, a Jinja template, with page.css, plot.css and page.js
    story.py      tells the run in a headline and four paragraphs
    plots.py      chooses the figures; svg.py draws them
    trust.py      what the reward model sees, token by token, and whether it is still right
    health.py     holds the run of PPO against rules that it can fail
    made.py       versions, commit, date, settings, seconds

Beside the page:

    table.py      the results as tables in the terminal: `python -m report --table`
    play.py       base model and policy side by side in the terminal: `make play`
    complete.py   completes a prompt with any checkpoint: `python -m report.complete`
    publish.py    copies a run into pretrained/ and docs/: `python -m report.publish`
"""
import hashlib
import importlib
import math
import re
from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, StrictUndefined, UndefinedError

from model import UserError, command, read_json, write
from report.health import marks
from report.made import is_shipped, made_by
from report.plots import draw_plots
from report.story import headline, in_short
from report.svg import STYLE
from report.trust import STEPS, against_vader, shown_samples

ev = importlib.import_module("05_eval")


def render(results: dict, figures: dict, made: dict) -> str:
    """Fill page.html with the results, everything escaped. The page's policy allows only this
    script and this style, and loads nothing."""
    here = Path(__file__).parent
    html, css, script = ((here / f"page.{kind}").read_text(encoding="utf-8")
                         for kind in ("html", "css", "js"))
    style = STYLE + css
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for kind, content in (("script", script), ("style", style)):
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    page = Environment(autoescape=True, undefined=StrictUndefined)
    page.filters["format"] = lambda pattern, *values: not_measured(pattern % values)
    return page.from_string(html).render(
        report=results, figures=figures, made=made, judges=ev.JUDGES, steps=STEPS, style=style,
        script=script, policy=policy)


def not_measured(text: str) -> str:
    """Replace NaN by "n/a" in a text; a quoted “nan” stays, as it may be a word of the corpus."""
    return re.sub(r"(?<![“\w])nan(?![”\w])", "n/a", text)


def nan_for_null(x):
    """Replace None by NaN. JSON has no NaN, so what could not be measured was written as null."""
    if isinstance(x, dict):
        return {key: nan_for_null(value) for key, value in x.items()}
    if isinstance(x, list):
        return [nan_for_null(value) for value in x]
    return math.nan if x is None else x


def read(path: Path, made_by: str, right, otherwise):
    """Read a JSON file; return `otherwise` if it is missing. Raises UserError if it is damaged."""
    if not path.exists():
        return otherwise
    return nan_for_null(read_json(path, made_by, lambda value: right(nan_for_null(value))))


def is_ratings(found) -> bool:
    keys = ("base", "of_base", "other", "of_other", "p")
    return (all(map(str.isalnum, found["policies"].values())) and all(
        row["rater"] + row["feeling"] and row["policy"] in found["policies"]
        and len(row["difference_interval"]) == 2
        and all(isinstance(row[key], int | float) for key in keys) for row in found["results"]))


def is_curve(found) -> bool:
    keys = ("labels", "alone", "after", "last_token", "bag_alone", "bag_after")
    return all(isinstance(row[key], int | float) for row in found for key in keys)


def read_ratings(path: Path, fingerprints: set[str]) -> list[dict]:
    """Read the blind ratings that `python -m people` wrote, if they are of these policies."""
    ratings = read(path, "-m people unblind", is_ratings, {"policies": {}, "results": []})
    kept = [row for row in ratings["results"]
            if ratings["policies"][row["policy"]] in fingerprints]
    if len(kept) < len(ratings["results"]):
        print(f"{path} also rates policies that 05 has not measured: left out")
    return kept


def read_results(out: Path) -> dict:
    """Read what 05 wrote; add what the page says about it. Raises UserError if 05 has not run."""
    results = nan_for_null(read_json(out / "report.json", "05_eval.py", lambda r: r["happy"][1]))
    rows = results["happy"] + results.get("sad", [])
    for row in rows:
        row |= against_vader(row) | {"shown": shown_samples(row)}
    fingerprints = {row["fingerprint"] for row in rows}
    results["shipped_base"] = is_shipped(rows[0]["fingerprint"])
    results["ratings"] = read_ratings(out / "ratings.json", fingerprints)
    health = marks(results["ppo"])
    for mark in health.values():
        mark["measured"] = not_measured(mark["measured"])
    said = {title: not_measured(text) for title, text in in_short(results).items()}
    return results | {"health": health, "headline": headline(results["happy"]), "in_short": said}


def build_report(out: Path) -> None:
    """Write out/report.html and out/plots/*.svg. Raises UserError if a file it reads is missing or
    damaged."""
    learning_curve = read(out / "curve.json", "-m experiments.learning_curve", is_curve, [])
    learning_curve = [row for row in learning_curve if all(map(math.isfinite, row.values()))]
    try:
        results = read_results(out)
        figures = draw_plots(results, learning_curve, out / "plots")
        page = render(results, figures, made_by(out, results))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError,
            UndefinedError) as error:
        raise UserError(f"{out}/report.json is damaged, or another version wrote it ({error!r}): "
                        f"run {command('05_eval.py')} again") from error
    write(out / "report.html", page)
