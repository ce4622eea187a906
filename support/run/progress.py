"""Progress bars on stderr. If there are several processes, only the first shows one."""

import sys
import time

from tqdm import tqdm

from support.run import distributed


class Bar(tqdm):
    """A bar whose rate leaves out the slow first step, so that it shows the right time left."""

    first = last = None  # (time, number done) after the first update and after the last one

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
    """A Bar, which is drawn rarely if stderr is a log. options: tqdm's."""
    options |= dict(desc=name, total=total, unit=unit, initial=begin)
    every = 0.5 if sys.stderr.isatty() else 10  # seconds
    return Bar(disable=distributed.RANK > 0, mininterval=every, **options)


def over(items, name, unit):
    """The items of a list, with a bar after 3 seconds."""
    return bar(name, len(items), unit, delay=3, iterable=items)
