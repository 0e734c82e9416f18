"""Asking people: a program beside the scripts, `python -m people --help`.

    answers.py    the items to ask about, and all answers
    sheet.py      sheet.html, a page to mail, and what comes back
    agreement.py  do people agree with each other, and with the machine?
    ratings.py    the blind test: base model against final policies

An item is {"id", "text", ...}. Its text is one text, or two to compare; it may have a "prompt". An
answer is the item with "label", "labeller" and "time": one line of a file that only grows. An undo
is one more line, and the last line about an item counts. So no later run can lose a label.
The loop that asks in the terminal is in 02_sample_label.py.
"""
