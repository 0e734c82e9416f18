"""The figures of the report, each a PNG file and an image within the page."""
import base64
import html
import io
import math
from pathlib import Path

import matplotlib

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


def against_kl(path: Path, results: dict, key: str, title: str) -> str:
    """Checkpoints of every target, and best-of-n."""
    series = []
    for style, target in (("o-", "happy"), ("v-", "sad")):
        if target in results:
            rows = sorted(results[target], key=lambda row: row["kl"])
            error = column(rows, f"{key}_se", 2)
            series.append((style, f"PPO, {target}", sqrt_kl(rows), column(rows, key), error))
    best = results["happy"][0]["best_of_n"]
    series.append(("s--", "best of n = 1 ... 256, happy", sqrt_kl(best), column(best, key), None))
    return plot(path, title, "sqrt KL(policy || base), sqrt nats", "mean ± 2 SE", series)


def draw_plots(results: dict, learning_curve: list[dict], folder: Path) -> str:
    """All figures, each also a file in `folder` -> HTML."""
    figures = []
    for key, title in (("proxy", "Reward model, of its target"),
                       ("gold", "Gold: VADER compound score")):
        figures.append(against_kl(folder / f"{key}_by_kl.png", results, key, title))

    ppo = results["ppo"]
    steps = column(ppo, "step")
    fit = results["sqrt_kl_fit"]
    line = [fit["slope"] * step + fit["intercept"] for step in steps]
    formula = "{slope:.2f} x iteration {intercept:+.2f}, R² = {r2:.3f}".format(**fit)
    figures.append(plot(
        folder / "kl.png", "Distance from the base model", "iteration", "sqrt nats per completion",
        [("o", "measured", steps, sqrt_kl(ppo), None), ("-", formula, steps, line, None)]))

    updates = [row for row in ppo if "clip_fraction" in row]
    series = []
    for style, label, key in (("o-", "outside the clip range", "clip_fraction"),
                              ("s--", "clip binding", "clip_binding")):
        percent = [100 * max(row[key], 1e-5) for row in updates]
        series.append((style, label, column(updates, "step"), percent, None))
    figures.append(plot(folder / "clip.png", "Ratios clipped (healthy: 1 to 20 %)", "iteration",
                        "% of tokens", series, lines=(1, 20), log="y"))

    figures.append(plot(folder / "entropy.png", "Entropy of the policy", "iteration",
                        "nats per token", [("o-", "", steps, column(ppo, "entropy"), None)]))

    bins = results["calibration"]
    figures.append(plot(
        folder / "calibration.png", "Calibration of the reward model, held out", "predicted",
        "labelled", [("o-", "", column(bins, "predicted"), column(bins, "target"), None),
         (":", "", [0, 1], [0, 1], None)]))

    if learning_curve:
        series, labels = [], column(learning_curve, "labels")
        for style, label, key in (("o-", "reward model, these labels alone", "alone"),
                                  ("v-", "after the phases before", "after"),
                                  ("s--", "bag of words", "bag_of_words")):
            series.append((style, label, labels, column(learning_curve, key), None))
        figures.append(plot(folder / "curve.png", "Learning curve of the reward model", "labels",
                            "held-out AUC", series, log="x"))
    return "".join(figures)
