"""The figures of the report, each a PNG file and an image within the page."""
import base64
import html
import io
import math
from pathlib import Path

import matplotlib

from report.findings import JUDGES
from report.text import WORDS
from running import write

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)


def plot(path: Path, title: str, xlabel: str, ylabel: str, series, lines=(), log: str = "") -> str:
    """series: (style, label, x, y, y error or None); lines: heights of dotted lines; log: "x", "y"
    or "". Writes path and returns it as an <img> of the page."""
    fig, ax = plt.subplots(figsize=(5.6, 3.7), dpi=110, layout="constrained")
    for style, label, x, y, error in series:
        ax.errorbar(x, y, error, fmt=style, label=label or None, capsize=2)
    for height in lines:
        ax.axhline(height, color="grey", ls=":")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log" if "x" in log else "linear",
           yscale="log" if "y" in log else "linear")
    ax.grid(alpha=0.3)
    if any(label for _, label, *_ in series):
        ax.legend(fontsize=8)
    png = io.BytesIO()
    fig.savefig(png, format="png")
    plt.close(fig)
    write(path, png.getvalue())
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def column(rows: list[dict], key: str, scale: float = 1) -> list[float]:
    return [scale * row[key] for row in rows]


def sqrt_kl(rows: list[dict]) -> list[float]:
    return [math.sqrt(max(row["kl"], 0)) for row in rows]


def errors(rows: list[dict], key: str) -> list | None:
    """Half-widths of 95 % intervals, where there are: two standard errors, or a bootstrap's."""
    if f"{key}_se" in rows[0]:
        return column(rows, f"{key}_se", 2)
    if f"{key}_interval" in rows[0]:
        ends = [(row[key], *row[f"{key}_interval"]) for row in rows]
        return [[max(x - low, 0) for x, low, _ in ends], [max(high - x, 0) for x, _, high in ends]]
    return None


def by_kl(path: Path, title: str, ylabel: str, results: dict, keys: dict[str, str]) -> str:
    """Measures of the happy policies against KL, each a line, and of best of n, a broken line of
    the same colour. keys: a key of the rows -> its name in the legend."""
    rows = sorted(results["happy"], key=lambda row: row["kl"])
    series = []
    for colour, (key, name) in enumerate(keys.items()):
        for style, label, points in (("o-", name, rows), ("s--", "", results["best_of_n"])):
            points = [row for row in points if key in row]
            if points:
                series.append((f"C{colour}{style}", label, sqrt_kl(points), column(points, key),
                               errors(points, key)))
    xlabel = "sqrt KL(policy || base), sqrt nats; broken: best of n"
    return plot(path, title, xlabel, ylabel, series)


def draw_plots(results: dict, learning_curve: list[dict], folder: Path) -> str:
    """All figures, each also a file in `folder` -> HTML."""
    names = {"proxy": "reward model"} | JUDGES
    figures = [
        by_kl(folder / "judges.png", "What is compared decides who wins",
              "mean, standard deviations of the base",
              results, {f"{key}_sd": name for key, name in names.items()}),
        by_kl(folder / "positive.png", "VADER calls it positive",
              "share of samples, 95 % intervals", results, {"positive": "positive"}),
        by_kl(folder / "variety.png", "Variety", f"distinct-2 of {WORDS:,} words",
              results, {"distinct_2": "distinct-2"}),
        by_kl(folder / "correlation.png", "Does the judge agree with the reward, sample by sample?",
              "correlation", results, {f"{key}_correlation": JUDGES[key] for key in JUDGES})]

    ppo = results["ppo"]
    policies = [row for row in ppo if not row.get("taken_back")]
    steps = column(policies, "updates")
    fit = results["sqrt_kl_fit"]
    line = [fit["slope"] * step + fit["intercept"] for step in steps]
    formula = "{slope:.3f} x step {intercept:+.2f}, R² = {r2:.3f}".format(**fit)
    figures.append(plot(
        folder / "kl.png", "Distance from the base model", "optimizer steps",
        "sqrt nats per completion",
        [("o", "measured", steps, sqrt_kl(policies), None), ("-", formula, steps, line, None)]))

    updates = [row for row in ppo if "clip_fraction" in row]
    series = []
    for style, label, key in (("o-", "outside the clip range", "clip_fraction"),
                              ("s--", "clip binding", "clip_binding")):
        percent = [100 * max(row[key], 1e-5) for row in updates]
        series.append((style, label, column(updates, "updates"), percent, None))
    figures.append(plot(folder / "clip.png", "Ratios clipped (healthy: 1 to 20 %)",
                        "optimizer steps", "% of tokens", series, lines=(1, 20), log="y"))

    figures.append(plot(
        folder / "advantage.png", "Advantage: how far beyond the base", "optimizer steps",
        "standard deviations of the base",
        [("o-", "mean", column(updates, "updates"), column(updates, "adv_mean"), None),
         ("s--", "standard deviation", column(updates, "updates"), column(updates, "adv_std"),
          None)]))
    figures.append(plot(folder / "entropy.png", "Entropy of the policy", "optimizer steps",
                        "nats per token", [("o-", "", steps, column(policies, "entropy"), None)]))

    bins = results["calibration"]
    figures.append(plot(
        folder / "calibration.png", "Calibration of the reward model, new samples", "predicted",
        "labelled", [("o-", "", column(bins, "predicted"), column(bins, "target"), None),
         (":", "", [0, 1], [0, 1], None)]))

    if learning_curve:
        series, labels = [], column(learning_curve, "labels")
        for style, label, key in (("o-", "reward model, these labels alone", "alone"),
                                  ("v-", "after the phases before", "after"),
                                  ("s--", "bag of words, these labels alone", "bag_alone"),
                                  ("d--", "with those of the phases before", "bag_after")):
            series.append((style, label, labels, column(learning_curve, key), None))
        figures.append(plot(folder / "curve.png", "Learning curve of the reward model", "labels",
                            "held-out AUC", series, log="x"))
    return "".join(figures)
