"""Turn what 05_eval.py measured into a page: python -m report, or with --out FOLDER."""
import shlex
from pathlib import Path

import tyro

from model import only_writer, set_out, steady
from report import build_report


def main(out: Path = Path("out")) -> None:
    """Write out/report.html and out/plots/*.svg from out/report.json, and from out/ratings.json and
    out/curve.json if they are there."""
    set_out(out)
    only_writer(out / "report.html")
    build_report(out)
    print(f"next: open {shlex.quote(str(out / 'report.html'))} in a browser")


if __name__ == "__main__":
    steady()
    tyro.cli(main)
