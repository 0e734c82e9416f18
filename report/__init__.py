"""The page that a run ends in: out/report.html, and the plots in it.

    text.py       what judges say of a text, its variety, what it copies
    findings.py   what the measured rows say
    trust.py      what the reward model sees, token by token, and whether it still sees right
    health.py     marks for the run of PPO, each with its rule
    story.py      the run in a few sentences
    made.py       versions, settings, seconds
    plots.py      which figures; svg.py: how they are drawn
    page.html     the page, a Jinja template, with page.css, plot.css and page.js
"""
import hashlib
import json
from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from report.findings import JUDGES, conclusions
from report.health import marks
from report.plots import draw_plots
from report.story import headline, in_short
from report.svg import STYLE
from report.trust import STEPS, against_vader, shown_samples
from running import write


def render(results: dict, figures: dict, made: dict) -> str:
    """page.html with the results in it, everything escaped; its policy allows this very script and
    style, and nothing to be loaded."""
    here = Path(__file__).parent
    html, css, script = ((here / f"page.{kind}").read_text(encoding="utf-8")
                         for kind in ("html", "css", "js"))
    style = STYLE + css
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for kind, content in (("script", script), ("style", style)):
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(html).render(
        report=results, figures=figures, made=made, judges=JUDGES, steps=STEPS, style=style,
        script=script, policy=policy)


def build_report(results: dict, out: Path) -> dict:
    """results: what 05_eval.py measured. Writes out/report.html and out/plots/*.svg -> the results
    and what they say, without the counts of every word and the scores of every sample."""
    made = results.pop("made")
    for target in ("happy", "sad"):
        for row in results.get(target, ()):
            row |= against_vader(row) | {"shown": shown_samples(row)}
    results = results | conclusions(results)
    results |= {"health": marks(results["ppo"]), "headline": headline(results["happy"]),
                "in_short": in_short(results)}
    curve = out / "curve.json"  # of benchmarks/learning_curve.py
    learning_curve = json.loads(curve.read_text()) if curve.exists() else []
    figures = draw_plots(results, learning_curve, out / "plots")
    write(out / "report.html", render(results, figures, made))
    for target in ("happy", "sad"):
        if target in results:
            results[target] = [{k: v for k, v in row.items()
                                if k not in ("words", "each", "pieces", "log_odds", "shown")}
                               for row in results[target]]
    return results
