"""This program asks people to label, compare and rate samples: `python -m people --help`.

    answers.py    the items to ask about, and all answers so far
    sheet.py      a page to mail (from sheet.html), and the answers that come back
    agreement.py  do people agree with each other, and with the machine?
    ratings.py    the blind test: base model against policies

An item is {"id", "text", ...}: one text, or two to compare. It may have a "prompt". An answer is
the item plus "label", "labeller" and "time", on one line of a file that only grows. An undo adds a
line too. The last line about an item counts, so a later run cannot lose a label. The loop that asks
in the terminal is in 02_sample_label.py.
"""
