"""
All tables of docs/tables/, from the runs in results/.

    python -m research.tables
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy

from research import noise, resolved
from research.arms import AT_RANK, GROUPS
from research.differences import (
    MEASURES,
    TRACED,
    difference_table,
    dtype_note,
    of_group,
    score_table,
    seconds_table,
    spread,
    table,
    tables,
    traced,
)
from research.results import read_results
from support.run import settings
from support.run.files import replacing

ROOT = Path(__file__).parents[1]
RESULTS, TABLES = ROOT / "results", ROOT / "docs" / "tables"


def lines_of(folder, which="main", domain=None):
    """The results of a set in a folder, perhaps of one domain, by seed."""
    runs = [run for run in read_results(RESULTS / folder).values() if run["set"] == which]
    own = [run for run in runs if domain in (None, run.get("domain"))]
    return sorted(own, key=lambda run: run.get("seed", 0))


def score_rows(runs, first, columns):
    """A row a method: its runs' test score `first`, the spread, and columns, functions of them."""
    for method in sorted({run["method"] for run in runs}):
        own = [run for run in runs if run["method"] == method]
        scores = values_of(own, "test", first)
        each = " / ".join(f"{score:.1f}" for score in scores)
        yield [f"`{method}`", each, spread(scores), *(column(own) for column in columns)]


def values_of(runs, split, name):
    """A score or the loss of each run; accuracies in points of 100."""
    factor = 100 if name == "accuracy" else 1
    return [factor * run["after"][split][name] for run in runs]


def spread_of(split, name, digits):
    """The column of a score's or the loss's spread."""
    return lambda runs: spread(values_of(runs, split, name), digits)


def seconds_of(runs):
    """The column of the least and the most seconds of a run."""
    seconds = [run["seconds"]["total"] for run in runs]
    return f"{min(seconds):.0f} to {max(seconds):.0f}"


def default():
    """The default run of each method."""
    columns = {
        "test loss": lambda runs: f"{numpy.mean(values_of(runs, 'test', 'loss')):.2f}",
        "train accuracy, %": lambda runs: f"{numpy.mean(values_of(runs, 'train', 'accuracy')):.1f}",
        "seconds a run": seconds_of,
    }
    rows = score_rows(lines_of("default"), "accuracy", columns.values())
    return table(["method", "test accuracy, seeds 0 / 1 / 2, %", "mean ± s.d.", *columns], rows)


def texts():
    """Text from data on SmolLM2."""
    columns = {
        "chrF": spread_of("test", "chrf", 1),
        "ROUGE-L": spread_of("test", "rougeL", 3),
        "NIST": spread_of("test", "nist", 2),
        "test loss": spread_of("test", "loss", 3),
        "train loss": spread_of("train", "loss", 3),
    }
    rows = score_rows(lines_of("smollm2", domain="e2e"), "bleu", columns.values())
    return table(["method", "BLEU, seeds 0 / 1 / 2", "mean ± s.d.", *columns], rows)


def decoder():
    """The ablation on SmolLM2."""
    runs = lines_of("smollm2", domain="movie-sentiment")
    columns = {
        "train accuracy, %": spread_of("train", "accuracy", 1),
        "test loss": spread_of("test", "loss", 2),
    }
    columns |= {title: lambda own, i=i: traced(own)[i] for i, title in enumerate(TRACED)}
    rows = score_rows(runs, "accuracy", columns.values())
    yield from table(["arm", "test accuracy, seeds 0 to 4, %", "mean ± s.d.", *columns], rows)
    yield from dtype_note(runs)


def comparison(which):
    """A set of the comparison on SmolLM2; with the main one, the losses that chose its rates."""
    given = GROUPS["smollm2"]
    runs = of_group(lines_of(".", which), given)
    yield from (*tables(runs, given.arms, given.sign), *seconds_table(runs, given.arms))
    if which == "main":
        yield from chosen_by()


def chosen_by():
    """The mean losses of three seeds on the tuning set, at each point of the grids."""
    found = {}
    for run in lines_of(".", "tune"):
        upper = f", `upper_lr` {run['upper_lr']:g}" if "upper_lr" in run else ""
        losses = found.setdefault(f"`{run['method']}`{upper}", {})
        losses.setdefault(run["lower_lr"], []).append(run["after"]["test"]["loss"])
    rates = sorted({rate for losses in found.values() for rate in losses})
    rows = [
        [name, *(f"{numpy.mean(losses[rate]):.3f}" for rate in rates)]
        for name, losses in sorted(found.items())
    ]
    return table(["loss at `lower_lr`", *(f"{rate:g}" for rate in rates)], rows)


def group(name):
    """The arms of a group of research/arms.py, on the encoder."""
    given = GROUPS[name]
    return tables(of_group(lines_of("study"), given), given.arms, given.sign)


def rank():
    """The methods at each rank, and DoRA with half of LoRA's."""
    given, (lora, dora, bidora) = GROUPS["rank"], AT_RANK.values()
    runs = of_group(lines_of("study"), given)
    pairs = [(bidora[r], dora[r]) for r in dora] + [(bidora[r], lora[r]) for r in dora]
    pairs += [(dora[r], lora[r]) for r in dora] + [(dora[r // 2], lora[r]) for r in dora if r > 1]
    arms = [*lora.values(), *dora.values(), *bidora.values()]
    rows = {f"`{ours}` minus `{other}`": (ours, other) for ours, other in pairs}
    for size, measure in itertools.product(map(int, given.sizes), MEASURES):
        yield from score_table(runs, size, measure, arms)
        yield from difference_table(runs, size, measure, "", rows)


def rates():
    """The rates, lower and upper, at which each arm of the study ran."""
    given, shown = GROUPS["methods"], {}
    for run in lines_of("study"):
        values = [f"{run[name]:g}" for name in ("lower_lr", "upper_lr") if name in run]
        shown[str(run["size"]), run["method"], run["domain"]] = " and ".join(values)
    for size in given.sizes:
        titles = [f"{size} examples", *(f"`{domain}`" for domain in given.domains)]
        rows = (
            [f"`{arm}`", *(shown[size, arm, domain] for domain in given.domains)]
            for arm in given.arms
        )
        yield from table(titles, rows)


def solved():
    """The layer whose lower level can be solved."""
    errors, runs = resolved.results_of(RESULTS / "resolved")
    yield from resolved.error_table(errors)
    yield from resolved.loss_table(runs)
    yield from tables(runs, resolved.ARMS, -1)


FILES = {
    "default": default,
    "compare": lambda: comparison("main"),
    "compare-one-rate": lambda: comparison("rate-0.001"),
    "study": lambda: group("methods"),
    "study-rates": rates,
    "controls": lambda: group("controls"),
    "e2e": texts,
    "paper": lambda: group("paper"),
    "published": lambda: group("published"),
    "network": lambda: group("network"),
    "noise": lambda: noise.noise_table(lines_of("noise")),
    "hypergradients": lambda: group("hypergradients"),
    "rank": rank,
    "tiny": lambda: group("tiny"),
    "sensitivity": lambda: group("sensitivity"),
    "resolved": solved,
    "decoder": decoder,
}


@dataclass
class Tables:
    only: str = ""  # one file, by its name without .md; empty: all of them


def write(given):
    """Write the files of docs/tables/, or the one of --only. Raises ValueError for another name."""
    settings.check_names("table", given.only, ["", *FILES])
    for name in [given.only] if given.only else FILES:
        with replacing(TABLES / f"{name}.md") as temporary:
            temporary.write_text("\n".join(FILES[name]()).rstrip() + "\n", encoding="utf-8")
        print(f"wrote docs/tables/{name}.md")


def main(arguments):
    return settings.program(arguments, Tables, write, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
