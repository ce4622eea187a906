"""
Ctrl-C in one line, not a traceback, while a program loads.

A program imports this first: to import torch and the rest takes seconds.
"""

import sys


def excepthook(kind, error, traceback):
    """Python's own, but for KeyboardInterrupt. The exit code stays that of a killed process."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook
