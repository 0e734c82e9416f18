"""Print what a run measured as tables in the terminal: python -m report --table"""
import math

from rich.console import Console
from rich.table import Table

POLICIES = {"KL, nats": ("kl", ".2f"), "score": ("proxy", ".3f"), "VADER": ("vader", ".3f"),
            "AFINN": ("afinn_sd", "+.2f"), "distinct-2": ("distinct_2", ".3f"),
            "entropy": ("entropy", ".2f"), "perplexity": ("base_perplexity", ".1f")}
BEST = dict(list(POLICIES.items())[:5])
ITERATIONS = {"steps": ("updates", "d"), "KL, nats": ("kl", ".2f"), "score": ("score", ".3f"),
              "entropy": ("entropy", ".2f"), "clipped": ("clip_fraction", ".1%"),
              "ratio off": ("ratio_off_first", ".0e"), "adv. mean": ("adv_mean", ".2f"),
              "sd": ("adv_std", ".2f")}
WORDS = {"before": ("before", ".1f"), "after": ("after", ".1f")}


def table(title: str, first: str, rows: list[dict], columns: dict[str, tuple]) -> Table:
    """Turn rows into text. columns: title -> key of a row, format; what a row lacks stays empty."""
    shown = Table(first, title=title, title_justify="left", box=None)
    for name in columns:
        shown.add_column(name, justify="right")
    for row in rows:
        cells = (format(row[key], how) if math.isfinite(row.get(key, math.nan)) else ""
                 for key, how in columns.values())
        shown.add_row(str(row[first]), *cells)
    return shown


def print_tables(results: dict) -> None:
    """results: what `report.read_results` makes of a run."""
    console = Console()
    for target in ("happy", "sad"):
        if target in results:
            rows = [row | {"name": row["name"].removeprefix(f"{target}-")}
                    for row in results[target]]
            console.print(table(f"Policies towards {target}", "name", rows, POLICIES))
    console.print("AFINN in standard deviations of the base model, perplexity under the base "
                  "model\n", highlight=False)
    for title, first, rows, columns in (
            ("Best of n samples of the base model", "n", results["best_of_n"], BEST),
            ("Iterations of PPO", "step", results["ppo"], ITERATIONS),
            ("Words per 1,000", "word", results["risen_words"], WORDS)):
        console.print(table(title, first, rows, columns), "")
