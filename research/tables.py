"""
All tables of docs/tables/, from the runs in results/.

    python -m research.tables
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy

from research import noise, resolved
from research.arms import GROUPS
from research.differences import of_group, row, seconds_table, tables, traced
from research.results import load_results
from support.run import settings
from support.run.files import replacing

ROOT = Path(__file__).parents[1]
RESULTS, TABLES = ROOT / "results", ROOT / "docs" / "tables"


def lines_of(folder, which="main"):
    """The lines of a set in a folder's runs.jsonl, by seed."""
    lines = (RESULTS / folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [run for run in map(json.loads, lines) if run["set"] == which]
    return sorted(runs, key=lambda run: run.get("seed", 0))


def table(titles, rows):
    return [row(*titles), row(*["---"] * len(titles)), *(row(*cells) for cells in rows), ""]


def each(values, digits):
    return " / ".join(f"{value:.{digits}f}" for value in values)


def spread(values, digits):
    return f"{numpy.mean(values):.{digits}f} ± {numpy.std(values, ddof=1):.{digits}f}"


def by_method(runs):
    """(method, its runs) of each method."""
    methods = sorted({run["method"] for run in runs})
    return [(method, [run for run in runs if run["method"] == method]) for method in methods]


def values_of(runs, split, name):
    """A score or the loss of each run; accuracies in points of 100."""
    factor = 100 if name == "accuracy" else 1
    return [factor * run["after"][split][name] for run in runs]


def default():
    """The default run of each method."""

    def cells(method, runs):
        accuracies = values_of(runs, "test", "accuracy")
        seconds = [run["seconds"]["total"] for run in runs]
        yield from (f"`{method}`", each(accuracies, 1), spread(accuracies, 1))
        yield f"{numpy.mean(values_of(runs, 'test', 'loss')):.2f}"
        yield f"{numpy.mean(values_of(runs, 'train', 'accuracy')):.1f}"
        yield f"{min(seconds):.0f} to {max(seconds):.0f}"

    titles = ["method", "test accuracy, seeds 0 / 1 / 2, %", "mean ± s.d.", "test loss"]
    titles += ["train accuracy, %", "seconds a run"]
    return table(titles, [cells(*pair) for pair in by_method(lines_of("default"))])


def comparison(which):
    """A set of the comparison on SmolLM2; with the main one, the losses that chose its rates."""
    given = GROUPS["smollm2"]
    runs = of_group(load_results(RESULTS, which), given)
    yield from (*tables(runs, given.arms, given.sign), *seconds_table(runs, given.arms))
    if which == "main":
        yield from ("", *chosen_by())


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


def rates():
    """The rates, lower and upper, at which each arm of the study ran."""
    given, runs = GROUPS["methods"], lines_of("study")
    for size in given.sizes:
        rows = []
        for arm in given.arms:
            cells = []
            for domain in given.domains:
                key = {"method": arm, "domain": domain, "size": int(size)}
                run = next(run for run in runs if key.items() <= run.items())
                cells.append(
                    " and ".join(f"{run[k]:g}" for k in ("lower_lr", "upper_lr") if k in run)
                )
            rows.append([f"`{arm}`", *cells])
        yield from table([f"{size} examples", *(f"`{d}`" for d in given.domains)], rows)


def texts():
    """Text from data on SmolLM2."""
    runs = [run for run in lines_of("smollm2") if run["domain"] == "e2e"]

    def cells(method, runs):
        bleu = values_of(runs, "test", "bleu")
        yield from (f"`{method}`", each(bleu, 1), spread(bleu, 1))
        for split, name, digits in SCORES:
            yield spread(values_of(runs, split, name), digits)

    titles = ["method", "BLEU, seeds 0 / 1 / 2", "mean ± s.d.", "chrF", "ROUGE-L", "NIST"]
    return table([*titles, "test loss", "train loss"], [cells(*pair) for pair in by_method(runs)])


SCORES = [("test", "chrf", 1), ("test", "rougeL", 3), ("test", "nist", 2)]
SCORES += [("test", "loss", 3), ("train", "loss", 3)]


def decoder():
    """The ablation on SmolLM2."""
    runs = [run for run in lines_of("smollm2") if run["domain"] == "movie-sentiment"]

    def cells(method, runs):
        accuracies = values_of(runs, "test", "accuracy")
        yield from (f"`{method}`", each(accuracies, 1), spread(accuracies, 1))
        yield spread(values_of(runs, "train", "accuracy"), 1)
        yield spread(values_of(runs, "test", "loss"), 2)
        yield from traced(runs)

    titles = ["arm", "test accuracy, seeds 0 to 4, %", "mean ± s.d.", "train accuracy, %"]
    titles += ["test loss", "indirect / direct", "cosine", "m moves by"]
    return table(titles, [cells(*pair) for pair in by_method(runs)])


def solved():
    """The layer whose lower level can be solved."""
    errors, runs = resolved.results_of(resolved.Resolved(results=RESULTS / "resolved"))
    yield "**Error relative to the truth, and cosine**: medians over tasks and seeds"
    yield from ("", *resolved.error_table(errors), "")
    yield "**Val loss at V*(m) after search, test loss after retraining, how far m moves**: means"
    yield "over the seeds that all arms have"
    yield from ("", *resolved.loss_table(runs), "")
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
    "noise": lambda: noise.table(lines_of("noise")),
    "hypergradients": lambda: group("hypergradients"),
    "resolved": solved,
    "decoder": decoder,
}


@dataclass
class Tables:
    only: str = ""  # one file, by its name without .md; empty: all of them


def write(given):
    """Write the files of docs/tables/, or the one of --only. Raises ValueError for another name."""
    if given.only and given.only not in FILES:
        raise ValueError(f"unknown table {given.only!r}" + settings.suggest(given.only, FILES))
    for name in [given.only] if given.only else FILES:
        with replacing(TABLES / f"{name}.md") as temporary:
            temporary.write_text("\n".join(FILES[name]()).rstrip() + "\n", encoding="utf-8")
        print(f"wrote docs/tables/{name}.md")


def main(arguments):
    return settings.program(arguments, Tables, write, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
