"""
Ctrl-C in one line with the command to go on, not a traceback, while a program loads or works.

A program imports this first: to import torch and the rest takes seconds.
"""

import os
import shlex
import sys


def excepthook(kind, error, traceback):
    """Python's own, but for KeyboardInterrupt, which ends the process with status 130 at once."""
    if issubclass(kind, KeyboardInterrupt):
        again = shlex.join(["python", *sys.orig_argv[1:]])
        print(f"interrupted; start it again with: {again}", file=sys.stderr, flush=True)
        os._exit(130)  # Python's own status is 130 or 1, by what runs as it ends
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook
