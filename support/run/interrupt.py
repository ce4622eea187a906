"""
Ctrl-C prints one line with the command that goes on, and signals wait for the end of a step. A
program imports this file first, since importing torch takes seconds.
"""

import contextlib
import shlex
import signal
import sys
import threading

START_AGAIN = "start it again with"


def excepthook(error_type, error, traceback):
    """Print one line for KeyboardInterrupt, and end as a killed process does; else as Python."""
    if issubclass(error_type, KeyboardInterrupt):
        again = shlex.join(["python", *sys.orig_argv[1:]])
        print(f"interrupted; {START_AGAIN}: {again}", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # with torch, Python's own exit code may be 1
    else:
        sys.__excepthook__(error_type, error, traceback)


sys.excepthook = excepthook


class Stopped(KeyboardInterrupt):
    """A run ended by the signal `signum`. how: the words before the command that goes on."""

    def __init__(self, message, signum=signal.SIGINT, how="resume it with"):
        super().__init__(message)
        self.signum, self.how = signum, how


@contextlib.contextmanager
def stop_signals():
    """Yield a list that gathers SIGINT and SIGTERM; a second SIGINT interrupts at once."""
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
