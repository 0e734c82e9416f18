"""Asking people: a program of its own, `python -m people --help`.

    answers.py    items, the files of answers, who may answer
    terminal.py   one key per item, in the terminal
    sheet.py      sheet.html, a page to mail, and what comes back
    agreement.py  do people agree with each other, and with the machine?
    ratings.py    the blind test: base model against final policies

An item is {"id", "text", ...}, its text one text, or two to compare, and perhaps a "prompt" that
they continue. An answer is the item with "label", "labeller" and "time": one line of a file that
only ever grows. An undo is one more line, and the last line about an item counts, so that no later
run can orphan or lose a label.
"""
from people.answers import need_name
from people.terminal import label, need_terminal

__all__ = ["label", "need_name", "need_terminal"]
