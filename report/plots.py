"""Draw the figures of the report. Each is an SVG in the page, and also a file of its own."""
import importlib
import math
from collections.abc import Iterable
from pathlib import Path

from markupsafe import Markup
from scipy.stats import binomtest

from model import write
from report.svg import Line, arrows, plot, ridges, standing_alone
from report.trust import histogram

ev = importlib.import_module("05_eval")
JUDGES = ev.JUDGES

KL = "KL from the base model, nats per completion"
STEPS = "optimizer steps"


def column(rows: list[dict], key: str, scale: float = 1) -> list[float]:
    return [scale * row[key] for row in rows]


def ends(rows: list[dict], key: str) -> tuple[list, list] | tuple[None, None]:
    """Find the ends of 95% intervals, if the rows have any: those of a bootstrap, or two standard
    errors on either side."""
    if f"{key}_interval" in rows[0]:
        low, high = zip(*column(rows, f"{key}_interval"))
        return [*low], [*high]
    if f"{key}_se" in rows[0]:
        return tuple([row[key] + 2 * side * row[f"{key}_se"] for row in rows] for side in (-1, 1))
    return None, None


def by_people(results: dict) -> list[Line]:
    """Draw a line for each blind rater: the fraction called happy, for base model and policy."""
    kl = {row["name"]: row["kl"] for row in results["happy"]}
    lines = []
    for r in results["ratings"]:
        if r["feeling"] == "positive" and r["policy"] in kl and r["of_base"] and r["of_other"]:
            counts = (r["base"], r["of_base"]), (r["other"], r["of_other"])
            intervals = [binomtest(*count).proportion_ci(method="wilson") for count in counts]
            lines.append(Line(r["rater"], [0, kl[r["policy"]]], [k / n for k, n in counts],
                              column(intervals, 0), column(intervals, 1),
                              colour=1 + len(lines) % 4))
    return lines


def by_kl(title: str, ylabel: str, results: dict, keys: dict[str, str], more: Iterable[Line] = (),
          **how) -> Markup:
    """Plot measures of the happy policies against KL, one line each. Best-of-n is a dashed line of
    the same colour. keys: a key of the rows -> its name; more: other lines."""
    lines = [*more]
    for colour, (key, name) in enumerate(keys.items()):
        policies = sorted(results["happy"], key=lambda row: row["kl"])
        for label, rows in (("", results["best_of_n"]), (name, policies)):
            rows = [row for row in rows if math.isfinite(row.get(key, math.nan))]
            if rows:
                lines.append(Line(label, column(rows, "kl"), column(rows, key), *ends(rows, key),
                                  colour=colour, dashed=not label))
    return plot(title, KL, ylabel, lines, x="sqrt", **how)


def of_training(ppo: list[dict], fit: dict) -> dict[str, Markup]:
    """Plot what 04 logged against its optimizer steps."""
    updates = [row for row in ppo if "clip_fraction" in row]
    steps, at = column(ppo, "updates"), column(updates, "updates")
    roots = [math.sqrt(max(row["kl"], 0)) for row in ppo]
    line = [fit["slope"] * step + fit["intercept"] for step in steps]
    clipped, binding = ([100 * max(row[key], 1e-5) for row in updates]
                        for key in ("clip_fraction", "clip_binding"))
    return {
        "kl": plot("Distance from the base model", STEPS, "square root of the KL, in nats",
                   [Line("line", steps, line, colour=1, marks=False, dashed=True),
                    Line("measured", steps, roots, joined=False)]),
        "clip": plot("Ratios clipped", STEPS, "% of tokens, logarithmic",
                     [Line("clipped", at, clipped), Line("binding", at, binding, colour=1)],
                     guides=(1, 20), y="log"),
        "advantage": plot("Advantage", STEPS, "standard deviations of the base model",
                          [Line("mean", at, column(updates, "adv_mean")),
                           Line("spread", at, column(updates, "adv_std"), colour=1)]),
        "entropy": plot("Entropy of the policy", STEPS, "nats per token",
                        [Line("", steps, column(ppo, "entropy"))])}


def of_reward_model(results: dict) -> dict[str, Markup]:
    """Plot its rewards, and how well they predict VADER's labels of each policy's samples."""
    rows = sorted(results["happy"], key=lambda row: row["kl"])

    def calibrated(bins, **how):
        bins = [row for row in bins if row["n"] >= 10]
        return Line(x=column(bins, "predicted"), y=column(bins, "target"), **how)
    diagonal = Line("", [0, 1], [0, 1], colour=3, dashed=True, marks=False)
    return {
        "rewards": ridges("Distribution of p(happy) at each checkpoint, from the base model down "
                          "to the final policy", "p(happy) by the reward model; at the left: nats",
                          [(f"{row['kl']:.1f}", histogram(row)) for row in rows], 0, 1),
        "auc": by_kl("AUC of the reward model", "AUC against VADER's labels",
                     {"happy": rows, "best_of_n": []}, {"rm_auc": "AUC"}),
        "calibration": plot(
            "Calibration of the reward model", "predicted p(happy), ten bins", "labelled happy",
            [diagonal, calibrated(results["calibration"], label="held out", colour=2),
             calibrated(rows[0]["rm_calibration"], label="base"),
             calibrated(rows[-1]["rm_calibration"], label="final", colour=1)]),
        "predicted": plot(
            "Happy by the reward model and by VADER", KL, "share of samples",
            [Line("predicted", column(rows, "kl"), column(rows, "rm_predicted")),
             Line("labelled", column(rows, "kl"), column(rows, "rm_labelled"), colour=1)],
            x="sqrt"),
        "correlation": by_kl("Does the judge agree with the reward, sample by sample?",
                             "correlation with the reward", {"happy": rows, "best_of_n": []},
                             {f"{key}_correlation": JUDGES[key] for key in JUDGES})}


def draw_plots(results: dict, learning_curve: list[dict], folder: Path) -> dict[str, Markup]:
    """Draw all figures and write them to folder/NAME.svg -> name -> SVG. results: from
    `report.read_results`."""
    risen, fallen = results["risen_words"], results["fallen_words"]
    most = max(max(row["before"], row["after"]) for row in risen + fallen)
    figures = {
        "judges": by_kl("Reward and judges: policies (solid) and best-of-n (dashed)",
                        "mean, standard deviations of the base model's samples", results,
                        {"proxy_sd": "reward"} | {f"{key}_sd": JUDGES[key] for key in JUDGES},
                        cursors=column(results["happy"], "kl")),
        "positive": by_kl("Share called positive", "share of samples", results,
                          {"positive": "VADER"}, by_people(results)),
        "variety": by_kl("Variety", f"distinct-2 of {ev.WORDS:,} words", results,
                         {"distinct_2": "distinct-2"}),
        **of_reward_model(results),
        **of_training(results["ppo"], results["sqrt_kl_fit"])}
    for name, rows, colour in (("risen", risen, 0), ("fallen", fallen, 1)):
        figures[name] = arrows(f"Words that have {name}", "per 1,000 words, square-root scale",
                               [(row["word"], row["before"], row["after"]) for row in rows], most,
                               colour)
    if learning_curve:
        labels = column(learning_curve, "labels")
        names = {"alone": "model", "after": "model +", "last_token": "last token",
                 "bag_alone": "words", "bag_after": "words +"}
        figures["curve"] = plot("Learning curve of the reward model", "labels, logarithmic",
                                "held-out AUC",
                                [Line(name, labels, column(learning_curve, key), colour=i)
                                 for i, (key, name) in enumerate(names.items())], x="log")
    for name, figure in figures.items():
        write(folder / f"{name}.svg", standing_alone(figure))
    return figures
