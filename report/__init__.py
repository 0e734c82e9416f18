"""The page that a run ends in: out/report.html, and the plots in it.

    text.py       what judges say of a text, its variety, what it copies
    findings.py   what the measured rows say
    plots.py      the figures
    page.html     the page, a Jinja template
"""
import json
from pathlib import Path

from jinja2 import Environment

from report.findings import JUDGES, conclusions
from report.plots import draw_plots
from running import write


def render(results: dict, figures: str, show: int) -> str:
    """page.html with the results in it; everything is escaped but the figures."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(template).render(
        report=results, figures=figures, show=show, judges=JUDGES)


def build_report(results: dict, out: Path, show: int) -> dict:
    """results: what 05_eval.py measured. Writes out/report.html and out/plots/*.png -> the results
    and what they say, without the counts of every word and the scores of every sample."""
    results = results | conclusions(results)
    for target in ("happy", "sad"):
        if target in results:
            results[target] = [{k: v for k, v in row.items() if k not in ("words", "each")}
                               for row in results[target]]
    curve = out / "curve.json"  # of benchmarks/learning_curve.py
    learning_curve = json.loads(curve.read_text()) if curve.exists() else []
    figures = draw_plots(results, learning_curve, out / "plots")
    write(out / "report.html", render(results, figures, show))
    return results
