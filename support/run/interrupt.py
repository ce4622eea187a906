"""
Ctrl-C in one line with the command to go on, not a traceback, while a program loads or works.

A program imports this first: to import torch and the rest takes seconds.
"""

import shlex
import signal
import sys


def excepthook(kind, error, traceback):
    """Python's own, but for KeyboardInterrupt. The exit code stays that of a killed process."""
    if issubclass(kind, KeyboardInterrupt):
        again = shlex.join(["python", *sys.orig_argv[1:]])
        print(f"interrupted; start it again with: {again}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # Python's own exit code may be 1, once torch is there
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook
