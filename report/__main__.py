"""Turn what 05_eval.py measured into a page: python -m report, or with --out FOLDER."""
import sys
from pathlib import Path

import tyro

from model import one_line
from report import build_report


def main(out: Path = Path("out")) -> None:
    """Write out/report.html and out/plots/*.svg from out/report.json, and from out/ratings.json and
    out/curve.json if they are there."""
    build_report(out)
    print(f"next: open {out / 'report.html'} in a browser")


if __name__ == "__main__":
    sys.excepthook = one_line
    tyro.cli(main)
