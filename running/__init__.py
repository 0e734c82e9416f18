"""How a script runs: nothing about language models or RLHF here, skip it.

    script.py      starts, logs, ends, and fails in one line, not a traceback
    files.py       writes files whole or not at all; the state from which --resume goes on
    processes.py   several processes, started by torchrun, that act as one
"""
from running.files import (State, UserError, read_tensors, readable, remove, require, settings_of,
                           write, write_tensors)
from running.processes import average_gradients, errors, gather, means, share, world
from running.script import Log, fast_dtype, finish, keep_freed_pages, one_line, start

__all__ = ["Log", "State", "UserError", "average_gradients", "errors", "fast_dtype", "finish",
           "gather", "keep_freed_pages", "means", "one_line", "read_tensors", "readable", "remove",
           "require", "settings_of", "share", "start", "world", "write", "write_tensors"]
