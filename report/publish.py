"""Ship a finished run: its models in pretrained/, its page and pictures in docs/.

    python -m report.publish                    # of the run in out/
    python -m report.publish --out pretrained   # the page again, after a change to it

README's figures must then come from the same run: tests/test_shipped.py checks that.
"""
import shutil
from pathlib import Path

import tyro

from model import program, require, set_out, steady, write
from report import build_report
from report.made import MODELS, SHIPPED

DOCS = SHIPPED.parent / "docs"
MEASURED = ("report.json", "02.json")  # from which the page can be made again
PLOTS = ("kl", "clip", "entropy", "calibration", "risen", "variety")  # docs/results.md shows them


def photograph(page: Path, picture: Path) -> None:
    """Take a picture of the page's first screen, with its slider at the final policy."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium or not shutil.which("chromedriver"):
        print(f"no chromium and chromedriver: {picture} stays as it was")
        return
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 "--window-size=1280,845"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.get(page.absolute().as_uri())
        browser.execute_script("let slider = document.querySelector('input'); "
                               "slider.value = slider.max; "
                               "slider.dispatchEvent(new Event('input'))")
        write(picture, browser.get_screenshot_as_png())


def publish(out: Path = Path("out")) -> None:
    """Copy a finished run's models to pretrained/; make its page, docs/index.html, its
    plots and README's picture."""
    set_out(out)
    for name in (*MODELS, *MEASURED):
        require((out / name).exists(), f"{out / name} is missing: publish a finished run")
    build_report(out)
    if out.resolve() != SHIPPED.resolve():
        for name in (*MODELS, *MEASURED):
            write(SHIPPED / name, (out / name).read_bytes())
    write(DOCS / "index.html", (out / "report.html").read_bytes())
    for name in PLOTS:
        write(DOCS / f"{name}.svg", (out / "plots" / f"{name}.svg").read_bytes())
    photograph(DOCS / "index.html", DOCS / "report.png")
    print(f"next: {SHIPPED.name}/ and {DOCS.name}/ hold this run; write its figures into README.md")


if __name__ == "__main__":
    steady()
    tyro.cli(publish, prog=program())
