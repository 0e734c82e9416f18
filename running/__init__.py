"""How a script runs. What RLHF does stands in the scripts and model.py: skip this at first.

    script.py      starts, logs, ends, and fails in one line, not a traceback
    files.py       writes files whole or not at all; the state from which --resume goes on
    processes.py   several processes, started by torchrun, that act as one
    statistics.py  means, shares, AUC, their errors, calibration
    complete.py    completions of a prompt by any checkpoint: `python model.py`
    stages.py      the models that the stages hand to one another, and which stems from which
    text.py        words, prompts as rows of token ids, the lines of a label file
    vader.py       VADER's score of many texts, on more than two cores by processes
    ppo.py         what 04 logs, shows and keeps of its run, and how the run ends
"""
from running.files import (State, UserError, read_tensors, readable, remove, require, settings_of,
                           write, write_tensors)
from running.processes import average_gradients, errors, gather, means, share, world
from running.script import (Log, check_signs, fast_dtype, finish, keep_freed_pages, one_line,
                            record, start)
from running.statistics import auc, auc_lead, bootstrap, calibration, mean_se, newcombe, wilson

__all__ = ["Log", "State", "UserError", "auc", "auc_lead", "average_gradients", "bootstrap",
           "calibration", "check_signs", "errors", "fast_dtype", "finish", "gather",
           "keep_freed_pages", "mean_se", "means", "newcombe", "one_line", "read_tensors",
           "readable", "record", "remove", "require", "settings_of", "share", "start", "wilson",
           "world", "write", "write_tensors"]
