"""
Ctrl-C in one line with the command to go on, not a traceback, while a program loads or works.

A program imports this first: to import torch and the rest takes seconds.
"""

import shlex
import sys


def excepthook(kind, error, traceback):
    """Python's own, but for KeyboardInterrupt. The exit code stays that of a killed process."""
    if issubclass(kind, KeyboardInterrupt):
        again = shlex.join(["python", *sys.orig_argv[1:]])
        print(f"interrupted; start it again with: {again}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook
