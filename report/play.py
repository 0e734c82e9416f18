"""See what RLHF did before you train anything: base model and policy, side by side.

    make play                     # or python -m report.play

Both complete the same prompt from the same random numbers. The colour of a token says what it does
to the reward model. Shows the run in out/ if it is finished, else the one in pretrained/. Where
nobody can press keys, as in a pipe, it prints one comparison and ends.
"""
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from model import GPT, UserError, command, load, program, require, set_out, steady
from report.complete import encoded
from report.made import MODELS, SHIPPED
from report.trust import STEPS, shade, without_blank_lines

ev, label = importlib.import_module("05_eval"), importlib.import_module("02_sample_label")

TINTS = {"up": ("#d3e8f5", "#a6d1ec", "#74b6df", "#419bd2"),    # black on these: readable on a
         "down": ("#fce3c8", "#f9c896", "#f5ab60", "#ef8e2c")}  # light and on a dark terminal
KEYS = {"p": "another prompt", "r": "other random numbers", "q": "quit"}
ARROWS = {"\x1b[d": -1, "\x1bod": -1, "\x1b[c": 1, "\x1boc": 1}  # left and right, in lower case


@dataclass
class Run:
    """A finished run of the five scripts, or the one that the project ships."""
    base: GPT
    reward_model: GPT
    tokenizer: Tokenizer
    length: int         # tokens of a sample
    prompted: bool      # whether the reward model has learned to read prompts
    policies: list      # (KL in nats, path), by rising KL
    folder: Path


def open_run(folder: Path) -> Run:
    """Raises UserError if models are missing, or do not belong together."""
    if folder == Path("out") and not all((folder / name).exists() for name in MODELS):
        folder = SHIPPED
    base, reward_model, tokenizer, about = ev.load_run(folder, "cpu", torch.float32)
    policies = []
    final = folder / "policy-happy.safetensors"
    for path in (*(folder / "checkpoints").glob("happy-kl-*.safetensors"), final):
        header = load(path, "04_ppo.py")[2]
        if header["inputs"] == about["made_from"]:
            policies.append((header["kl"], path))
    require(policies, f"{final} was made from other models: run {command('04_ppo.py')} again")
    policies = sorted(dict(policies).items())  # the final one may be kept twice
    return Run(base, reward_model, tokenizer, about["length"], about["prompted"], policies, folder)


# ---- One comparison ------------------------------------------------------------------------------
@torch.no_grad()
def completion(run: Run, model: GPT, prompt: list[int], seed: int) -> tuple[Text, float]:
    """One completion of the prompt's tokens, coloured, and the reward model's p(happy) of it. A
    reward model without prompts reads prompt and completion as one text."""
    ids = torch.tensor([prompt], dtype=torch.long)                           # (1, P)
    length = run.length if run.prompted else run.length - len(prompt)
    y, _ = model.generate(1, length, seed, prompts=ids)                      # (1, T)
    text = y if run.prompted else torch.cat((ids, y), 1)
    odds = ev.log_odds(run.reward_model, text, ids if run.prompted else None)[0, -length - 1:]
    shown = Text().append(run.tokenizer.decode(prompt), "italic")
    parts = without_blank_lines(ev.pieces(run.tokenizer, y[0].tolist()))
    for part, change in zip(parts, odds.diff().tolist()):
        printable = label.as_text({"text": part})
        blank = len(printable) - len(printable.lstrip(" "))
        shown.append(printable[:blank]).append(printable[blank:], style(shade(change)))
    return shown, odds[-1].sigmoid().item()


def style(shade: str) -> str:
    """A class of report.trust, "up1" to "down4" -> how a terminal shows it."""
    return f"black on {TINTS[shade[:-1]][int(shade[-1]) - 1]}" if shade else ""


def legend() -> Text:
    text = Text()
    for way, sign, steps in (("down", "-", STEPS[::-1]), ("up", "+", STEPS)):
        text.append("each token: sadder " if way == "down" else " ")
        for step in steps:
            text.append(f" {sign}{step:g} ", style(f"{way}{STEPS.index(step) + 1}"))
    return text.append(" happier")


def comparison(run: Run, policy: GPT, kl: float, prompt: list[int], seed: int) -> Table:
    table = Table.grid(expand=True)
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    panels = []
    for title, model in (("base model", run.base), (f"policy, {kl:.1f} nats away", policy)):
        text, p_happy = completion(run, model, prompt, seed)
        panels.append(Panel(text, title=title, subtitle=f"p(happy) {p_happy:.2f}"))
    table.add_row(*panels)
    return table


# ---- Keys ----------------------------------------------------------------------------------------
def tokens_of(run: Run, prompt: str) -> list[int]:
    """Raises UserError if the models cannot complete this prompt."""
    ids, most = encoded(run.tokenizer, prompt), run.length // 2
    require(len(ids) <= most, f"the prompt has {len(ids)} tokens: {most} at most")
    require(max(ids, default=0) < run.base.n_text, "the prompt holds a reserved token")
    return ids


def play(out: Path = Path("out"), prompt: str = "", seed: int = 0) -> None:
    """Compare the base model with a policy. Keys: another prompt, other random numbers, and the
    arrows for checkpoints between the two."""
    set_out(out)
    console = Console()
    run = open_run(out)
    at, loaded = len(run.policies) - 1, {}
    ids, note = tokens_of(run, prompt), ""
    keys = sys.stdin.isatty() and console.is_terminal
    while True:
        kl, path = run.policies[at]
        if path not in loaded:
            loaded[path] = load(path, "04_ppo.py")[0]
        view = comparison(run, loaded[path], kl, ids, seed)
        if keys:
            console.clear()
        console.print(f"{'prompt ' + repr(prompt) if prompt else 'no prompt'}, random numbers "
                      f"{seed}, models of {run.folder.name}/", highlight=False)
        console.print(view)
        if console.color_system:
            console.print(legend())
        if not keys:
            return
        keys_shown = [f"{key} {what}" for key, what in KEYS.items()]
        if len(run.policies) > 1:
            keys_shown.insert(0, f"arrows: checkpoint {at + 1} of {len(run.policies)}")
        console.print("   ".join(keys_shown), highlight=False)
        if note:
            console.print(note, style="bold", highlight=False)
        key, note = label.read_key(), ""
        if key == "q":
            return
        if key == "r":
            seed += 1
        at = min(max(at + ARROWS.get(key, 0), 0), len(run.policies) - 1)
        if key == "p":
            try:
                typed = input("prompt: ")
                ids, prompt = tokens_of(run, typed), typed
            except (UserError, EOFError) as error:
                note = str(error)


if __name__ == "__main__":
    steady()
    tyro.cli(play, prog=program())
