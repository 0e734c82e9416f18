"""The page that a run ends in: out/report.html, the plots in it, and all its figures as JSON.

    findings.py   what the measured rows say
    plots.py      the figures
    page.html     the page, a Jinja template
"""
import json
from pathlib import Path

from jinja2 import Environment

from report.findings import conclusions
from report.plots import draw_plots
from running import write


def render(results: dict, figures: str, show: int) -> str:
    """page.html with the results in it; everything is escaped but the figures."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(template).render(
        report=results, figures=figures, show=show)


def build_report(results: dict, out: Path, show: int) -> None:
    """results: what 05_eval.py measured. Writes out/report.html, out/report.json, out/plots/*.png,
    and prints what they say."""
    results = results | conclusions(results)
    for target in ("happy", "sad"):
        for row in results.get(target, []):
            del row["words"]  # counts of every word: the risen ones are enough
    curve = out / "curve.json"  # of benchmarks/learning_curve.py
    learning_curve = json.loads(curve.read_text()) if curve.exists() else []
    figures = draw_plots(results, learning_curve, out / "plots")
    write(out / "report.json", json.dumps(results, indent=1))
    write(out / "report.html", render(results, figures, show))
    print("risen most, per 1,000 words:", ", ".join(
        "{word} {before:.1f} -> {after:.1f}".format(**row) for row in results["risen_words"]))
    print(results["summary"])
    print("sqrt KL against iteration: slope {slope:.3f}, R^2 {r2:.4f}"
          .format(**results["sqrt_kl_fit"]))
