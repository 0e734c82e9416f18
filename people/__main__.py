"""Ask people to label, compare or blindly rate samples, in the terminal or on a page to mail.

    python -m people label anna                          # after 02: one key per sample
    python -m people sheet friends.html                  # a page of 300 samples, to mail
    python -m people merge friends.html a.jsonl b.jsonl  # add the answers to a page (any kind)
    python -m people rate anna                           # after 04: 20 samples of each model
    python -m people rate rate.html                      # the same on a page
    python -m people unblind                             # show the finished ratings again
"""
from pathlib import Path
from shlex import quote

from tyro.conf import Positional
from tyro.extras import SubcommandApp

from model import command, require, set_out, steady
from people.agreement import print_agreement
from people.answers import answers_in, read_items, stage
from people.ratings import items_to_rate
from people.ratings import unblind as unblind_ratings
from people.sheet import asks_about, collect, read_sheet, write_sheet

app = SubcommandApp()
OUT = Path("out")


def ask(name: str, kind: str, out: Path, seed: int) -> None:
    """Ask in the terminal, then print how far people agree."""
    items = read_items(out, kind, seed)
    stage.ask(items, stage.answer_file(out, kind, name), name, kind)
    print_agreement(answers_in(out, kind), items)


@app.command
def label(name: Positional[str], out: Path = OUT, seed: int = 0) -> None:
    """Label the samples in --out as positive, negative or neutral. Run it again to continue."""
    ask(name, "labels", out, seed)


@app.command
def compare(name: Positional[str], out: Path = OUT, seed: int = 0) -> None:
    """Say which of two samples is happier, for each pair from 02_sample_label.py --compare."""
    ask(name, "comparisons", out, seed)


@app.command
def sheet(page: Positional[Path], out: Path = OUT, seed: int = 0, n: int = 300, skip: int = 0,
          compare: bool = False) -> None:
    """Write FILE.html, a page of samples or pairs that people can answer in any browser.

    Args:
        n: how many items the page has
        skip: pass over this many items, used on other sheets: 300 for a second, 600 for a third
        compare: ask about pairs instead of samples
    """
    require(n > 0 and skip >= 0, "--n must be positive, --skip not negative")
    require(page.suffix == ".html", f"{page} is not the name of a page: choose one like PAGE.html")
    kind = "comparisons" if compare else "labels"
    items = read_items(out, kind, seed)
    chosen = items[skip:skip + n]
    require(len(chosen) > 0, f"no items are left after --skip {skip}: there are {len(items)}")
    write_sheet(page, kind, chosen)
    print(f"{page}: {len(chosen)} items. Mail it; a browser opens it and saves a file to send "
          f"back.\nnext: {command(f'-m people merge {quote(str(page))} FILE.jsonl ...')}")


@app.command
def merge(page: Positional[Path], files: Positional[list[Path]], out: Path = OUT) -> None:
    """Check the answers to a page, and add the valid ones to those in --out."""
    require(len(files) > 0, "name the files that came back, after the page")
    set_out(out)
    asked = read_sheet(page)
    require(asks_about(asked, out), f"{page} does not ask about the samples in {out}: name the "
            "folder that they are in with --out")
    wrong = collect(asked, files, out)
    if asked["kind"] == "ratings":
        unblind_ratings(out)
    else:
        print_agreement(answers_in(out, asked["kind"]), asked["items"])
    require(wrong == 0, f"{wrong} lines were left out, for the reasons above; {out} has the others")


@app.command
def rate(who: Positional[str], out: Path = OUT, seed: int = 0, n: int = 20,
         policy: Path | None = None) -> None:
    """Rate samples of the base model and of policies without knowing which model wrote them.

    Args:
        who: your name, or FILE.html to write a page on which others rate
        n: how many samples of each model
        policy: a checkpoint of 04; without it, the happy policy that 05's report prefers
    """
    require(n > 0, "--n must be positive")
    set_out(out)
    if not who.endswith(".html"):
        stage.need_person(who)
    items, key = items_to_rate(out, n, seed, policy)
    if who.endswith(".html"):
        write_sheet(Path(who), "ratings", items)
        print(f"{who}: {len(items)} items. Keep {key} to yourself.\n"
              f"next: {command(f'-m people merge {quote(who)} FILE.jsonl ...')}")
    else:
        stage.ask(items, stage.answer_file(out, "ratings", who), who, "ratings")
        unblind_ratings(out)


@app.command
def unblind(out: Path = OUT) -> None:
    """Print the results of the finished ratings, and write them to a file for the report."""
    set_out(out)
    unblind_ratings(out)


if __name__ == "__main__":
    steady()
    app.cli(description=__doc__, prog="python -m people")
