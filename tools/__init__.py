"""The other programs: python -m tools.NAME."""

import support.run.interrupt  # noqa: F401  (Ctrl-C in one line, while a program loads too)
