"""Progress bars on stderr, with the unit of what they count; of several processes, the first's."""

import sys
import time

from tqdm import tqdm

from support.run import distributed


class Bar(tqdm):
    """
    A bar whose rate, and so the time left, leaves out the first step, which also pays for memory
    and kernels that the later ones use again.
    """

    first = last = None  # (when, how many were done) after the first step, and after the last one

    def update(self, n=1):
        self.last = time.time(), self.n + n
        self.first = self.first or self.last
        return super().update(n)

    @property
    def format_dict(self):
        rate = 0  # shown as "?"
        if self.last != self.first:
            (begin, few), (end, many) = self.first, self.last
            rate = (many - few) / max(end - begin, 1e-9)
        return super().format_dict | {"rate": rate}


def bar(name, total, unit, begin=0, **options):
    """A Bar; rarely drawn where stderr is a log. options: tqdm's."""
    options |= dict(desc=name, total=total, unit=unit, initial=begin)
    every = 0.5 if sys.stderr.isatty() else 10  # seconds
    return Bar(disable=distributed.RANK > 0, mininterval=every, **options)


def over(items, name, unit):
    """Yield the items of a list, with a bar if that takes more than 3 seconds."""
    with bar(name, len(items), unit, delay=3) as shown:
        for item in items:
            yield item
            shown.update()
