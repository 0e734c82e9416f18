"""Turn what 05_eval.py measured into a page: python -m report, or with --out FOLDER.

    python -m report --table    # print it instead
"""
import shlex
from pathlib import Path

import tyro

from model import only_writer, program, set_out, steady
from report import build_report, read_results
from report.table import print_tables


def main(out: Path = Path("out"), table: bool = False) -> None:
    """Write out/report.html and out/plots/*.svg from out/report.json, and from out/ratings.json and
    out/curve.json if they are there. With --table, print tables and write nothing."""
    set_out(out)
    if table:
        return print_tables(read_results(out))
    only_writer(out / "report.html")
    build_report(out)
    print(f"next: open {shlex.quote(str(out / 'report.html'))} in a browser")


if __name__ == "__main__":
    steady()
    tyro.cli(main, prog=program())
