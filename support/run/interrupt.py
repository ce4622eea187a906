"""
Ctrl-C in one line with the command to go on, not a traceback; and signals that wait for a step.

A program imports this first: to import torch and the rest takes seconds.
"""

import contextlib
import shlex
import signal
import sys
import threading

START_AGAIN = "start it again with"


def excepthook(kind, error, traceback):
    """Python's own, but for KeyboardInterrupt. The exit code stays that of a killed process."""
    if issubclass(kind, KeyboardInterrupt):
        again = shlex.join(["python", *sys.orig_argv[1:]])
        print(f"interrupted; {START_AGAIN}: {again}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # Python's own exit code may be 1, once torch is there
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook


class Stopped(KeyboardInterrupt):
    """Raised when a run ends because of the signal `signum`. how: to go on, before the command."""

    def __init__(self, message, signum=signal.SIGINT, how="resume it with"):
        super().__init__(message)
        self.signum, self.how = signum, how


@contextlib.contextmanager
def stop_signals():
    """
    Yield a list to which each SIGINT or SIGTERM is appended, for the caller to check between steps;
    a SIGINT after another signal interrupts at once.

    Outside the main thread, where Python handles no signals, the list stays empty.
    """
    signals = []

    def note(signum, frame):
        if signals and signum == signal.SIGINT:
            raise KeyboardInterrupt("interrupted a second time: stopped at once")
        signals.append(signum)

    in_main = threading.current_thread() is threading.main_thread()
    handled = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    before = {signum: signal.signal(signum, note) for signum in handled}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
