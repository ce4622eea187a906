"""The programs that made the results: python -m research.NAME."""

import support.run.interrupt  # noqa: F401  (Ctrl-C in one line, while a program loads too)
