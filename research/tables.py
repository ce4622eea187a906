"""
All tables of docs/tables/, from the runs in results/.

    python -m research.tables
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy

from research import noise, resolved
from research.arms import ARMS, AT_RANK, GROUPS
from research.differences import (
    TRACED,
    dtype_note,
    of_group,
    seconds_table,
    spread,
    table,
    tables,
    tables_of,
    traced,
)
from research.results import load_results, read_results, trajectory_of
from support.run import settings
from support.run.files import replacing

ROOT = Path(__file__).parents[1]
RESULTS, TABLES = ROOT / "results", ROOT / "docs" / "tables"


def method_table(runs, titles, *columns):
    """Lines of Markdown, a row for each method. columns: functions of a method's runs."""
    methods = {}
    for run in runs:
        methods.setdefault(run["method"], []).append(run)
    rows = [[f"`{m}`", *(column(own) for column in columns)] for m, own in sorted(methods.items())]
    return table(titles, rows)


def each(values, digits):
    return " / ".join(f"{value:.{digits}f}" for value in values)


def of(split, name, digits=1, text=spread):
    """A column: the runs' values of a score or the loss as text, accuracies in points of 100."""
    factor = 100 if name == "accuracy" else 1
    return lambda runs: text([factor * run["after"][split][name] for run in runs], digits)


def seconds(runs):
    """A column: the least and the most seconds of a run."""
    totals = [run["seconds"]["total"] for run in runs]
    return f"{min(totals):.0f} to {max(totals):.0f}"


def default():
    """The default runs of each method."""
    titles = ["method", "test accuracy, seeds 0 / 1 / 2, %", "mean ± s.d.", "test loss"]
    titles += ["train accuracy, %", "seconds a run"]
    columns = [of("test", "accuracy", text=each), of("test", "accuracy")]
    columns += [of("test", "loss", 2), of("train", "accuracy"), seconds]
    return method_table(load_results(RESULTS / "default"), titles, *columns)


def decoder(domain):
    """The runs on SmolLM2 in a domain."""
    return [run for run in load_results(RESULTS / "smollm2") if run["domain"] == domain]


def texts():
    """Text from data on SmolLM2."""
    titles = ["method", "BLEU, seeds 0 / 1 / 2", "mean ± s.d.", "chrF", "ROUGE-L", "NIST"]
    titles += ["test loss", "train loss"]
    columns = [of("test", "bleu", text=each), of("test", "bleu"), of("test", "chrf")]
    columns += [of("test", "rougeL", 3), of("test", "nist", 2)]
    columns += [of("test", "loss", 3), of("train", "loss", 3)]
    return method_table(decoder("e2e"), titles, *columns)


def ablation():
    """The ablation on SmolLM2."""
    runs = decoder("movie-sentiment")
    titles = ["arm", "test accuracy, seeds 0 to 4, %", "mean ± s.d.", "train accuracy, %"]
    columns = [of("test", "accuracy", text=each), of("test", "accuracy"), of("train", "accuracy")]
    columns += [of("test", "loss", 2)]
    columns += [lambda own, i=i: traced(own)[i] for i in range(len(TRACED))]
    yield from method_table(runs, [*titles, "test loss", *TRACED], *columns)
    yield from dtype_note(runs)


def group(name, which="main"):
    """The arms of a group of research/arms.py."""
    given = GROUPS[name]
    return tables(results_of(given, which), given.arms, given.sign)


def results_of(given, which="main"):
    """The results of a Group in one set."""
    return of_group(load_results(ROOT / given.results, which), given)


def comparison(which):
    """A set of the comparison on SmolLM2, and what its runs took."""
    given = GROUPS["smollm2"]
    yield from group("smollm2", which)
    yield from seconds_table(results_of(given, which), given.arms)


def chosen_by():
    """The mean loss and accuracy of three seeds on the tuning set, at each point of the grids."""
    measured = {}
    for run in load_results(RESULTS, "tune"):
        upper = f", `upper_lr` {run['upper_lr']:g}" if "upper_lr" in run else ""
        at, after = measured.setdefault(f"`{run['method']}`{upper}", {}), run["after"]["test"]
        at.setdefault(run["lower_lr"], []).append((after["loss"], 100 * after["accuracy"]))
    rates = sorted(set().union(*measured.values()))
    rows = [
        [name, *("{:.3f}, {:.1f}".format(*numpy.mean(at[rate], axis=0)) for rate in rates)]
        for name, at in sorted(measured.items())
    ]
    return table(["loss, accuracy at `lower_lr`", *(f"{rate:g}" for rate in rates)], rows)


def rank():
    """The methods at each rank, and DoRA with half of LoRA's."""
    given, (lora, dora, bidora) = GROUPS["rank"], AT_RANK.values()
    runs = results_of(given)
    pairs = [(bidora[r], dora[r]) for r in dora] + [(bidora[r], lora[r]) for r in dora]
    pairs += [(dora[r], lora[r]) for r in dora] + [(dora[r // 2], lora[r]) for r in dora if r > 1]
    rows = {f"`{ours}` minus `{other}`": (ours, other) for ours, other in pairs}
    return tables_of(runs, [*lora.values(), *dora.values(), *bidora.values()], "", rows)


def moved(target, runs):
    """How far the matrices of a name moved in runs, as text: ΔM in % of their norms, and ΔD."""
    ends = [trajectory_of(run).select(target) for run in runs]
    ratio = numpy.mean([numpy.divide(end.delta_m[-1], end.magnitude) for end in ends])
    return f"{100 * ratio:.1f} %, {numpy.mean([end.delta_d[-1] for end in ends]):.4f}"


def granularity():
    """Queries and values, and the MLP's matrices, whose magnitudes alone train."""
    runs = [run for run in results_of(GROUPS["relatives"]) if "trajectory" in run]
    targets = ("query", "value", "intermediate.dense", "output.dense")
    columns = [functools.partial(moved, target) for target in targets]
    return method_table(runs, ["ΔM, ΔD of", *(f"`{target}`" for target in targets)], *columns)


def alpha():
    """LoRA and DoRA at other alphas and rates, beside themselves."""
    arms = GROUPS["alpha"].arms
    rows = {f"`{arm}` minus `{ARMS[arm].rates}`": (arm, ARMS[arm].rates) for arm in arms[2:]}
    return tables_of(results_of(GROUPS["alpha"]), arms, "", rows)


def rates():
    """The rates, lower and upper, at which each arm of the study ran."""
    given, shown = GROUPS["methods"], {}
    for run in results_of(given):
        values = [f"{run[name]:g}" for name in ("lower_lr", "upper_lr") if name in run]
        shown[str(run["size"]), run["method"], run["domain"]] = " and ".join(values)
    for size in given.sizes:
        titles = [f"{size} examples", *(f"`{domain}`" for domain in given.domains)]
        rows = (
            [f"`{arm}`", *(shown[size, arm, domain] for domain in given.domains)]
            for arm in given.arms
        )
        yield from table(titles, rows)


OWN = "controls paper published network hypergradients tiny sensitivity cost".split()
FILES = {
    "default": default,
    "compare": lambda: [*comparison("main"), *chosen_by()],
    "compare-one-rate": lambda: comparison("rate-0.001"),
    "study": lambda: group("methods"),
    "study-rates": rates,
    "e2e": texts,
    "noise": lambda: noise.noise_table(read_results(RESULTS / "noise").values()),
    "rank": rank,
    "alpha": alpha,
    "relatives": lambda: [*group("relatives"), *granularity()],
    **{name: functools.partial(group, name) for name in OWN},  # a page a group
    "resolved": lambda: resolved.all_tables(RESULTS / "resolved"),
    "decoder": ablation,
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
