"""How a script runs: nothing about language models or RLHF here, skip it.

    script.py      starts, logs, writes files whole, ends, and fails in one line, not a traceback
    processes.py   several processes, started by torchrun, that act as one
"""
from running.processes import average_gradients, gather, means, share, world
from running.script import (Log, UserError, fast_dtype, finish, keep_freed_pages, one_line, require,
                            start, write)

__all__ = ["Log", "UserError", "average_gradients", "fast_dtype", "finish", "gather",
           "keep_freed_pages", "means", "one_line", "require", "share", "start", "world", "write"]
