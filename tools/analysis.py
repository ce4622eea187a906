"""
How fine-tuning moved the weights: the change of magnitudes, ΔM, against that of directions, ΔD.

A weight W0 became W; its rows (or columns) w0_n became w_n (DoRA, arXiv 2402.09353, section 3.2):

    ΔM = mean_n | ‖w_n‖ - ‖w0_n‖ |          ΔD = mean_n (1 - cos(w_n, w0_n))

Each adapted matrix at each snapshot of training is a point, and a line is fitted to the points. The
papers print its slope, which BiDoRA (arXiv 2410.09758, figure 1) calls a correlation. Since a slope
has the weights' unit, `fit` returns the least-squares slope k, Pearson's r and Spearman's ρ.

    python -m tools.analysis --tuned=out/small                     a run, at its recorded snapshots
                                                                   (train.py --snapshots=4) or end
    python -m tools.analysis --tuned=one/model --base=its/base     two checkpoints
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.stats import rankdata

from bidora import adapter_layers, linear_layers
from sample import load
from support.run import settings
from support.run.files import replacing
from support.weights.weight_changes import Trajectory


def fit(trajectories, samples=2000, seed=0):
    """
    The line through the points of one or several trajectories over the same layers.

    Returns {"k", "r", "rho", "relative"}, each (value, low, high). k: the least-squares slope of ΔM
    over ΔD, in the weights' unit. relative: k with ΔM divided by the matrix's mean magnitude, so
    that models compare. r, rho: Pearson's and Spearman's correlation. Without variation: NaN.

    low, high: a 95 % bootstrap interval. It resamples whole layers, since a layer's snapshots are
    one matrix in motion, not independent points. Below 8 layers it would be too narrow and is NaN.
    """
    x = numpy.concatenate([t.delta_d for t in trajectories])  # (snapshots, layers)
    y = numpy.concatenate([t.delta_m for t in trajectories])
    scaled = numpy.concatenate([numpy.divide(t.delta_m, t.magnitude) for t in trajectories])

    count = x.shape[1]
    resampled = numpy.random.default_rng(seed).integers(count, size=(samples, count))
    drawn = numpy.concatenate([[range(count)], resampled])  # the first draw is all layers

    def points(values):
        return values[:, drawn].transpose(1, 0, 2).reshape(len(drawn), -1)  # (1 + samples, points)

    def inner(a, b):
        """Σ (a - mean a)·(b - mean b) of each draw."""
        return ((a - a.mean(1, keepdims=True)) * (b - b.mean(1, keepdims=True))).sum(1)

    def correlation(a, b):
        return inner(a, b) / numpy.sqrt(inner(a, a) * inner(b, b))

    x, y, scaled = points(x), points(y), points(scaled)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        line = {
            "k": inner(x, y) / inner(x, x),
            "relative": inner(x, scaled) / inner(x, x),
            "r": correlation(x, y),
            "rho": correlation(rankdata(x, axis=1), rankdata(y, axis=1)),
        }

    for name, (value, *draws) in line.items():
        low, high = numpy.nan, numpy.nan
        if not numpy.isfinite(value):
            value = numpy.nan
        elif count >= 8:
            low, high = numpy.nanpercentile(draws, (2.5, 97.5))
        line[name] = (value, low, high)
    return line


MARKERS = "os^vDP*X<>"


def panel(axes, trajectory, title):
    """Draw a trajectory's points and line. Returns the ScalarMappable for a colour bar."""
    count = len(trajectory.layers)
    depth = ScalarMappable(Normalize(0, max(1, count - 1)), "viridis")
    colors = depth.to_rgba(numpy.arange(count))
    phases = [snapshot["phase"] for snapshot in trajectory.snapshots]
    for t, (x, y) in enumerate(zip(trajectory.delta_d, trajectory.delta_m)):
        marker = MARKERS[phases[:t].count(phases[t]) % len(MARKERS)]
        faces = "none" if phases[t] == "retrain" else colors
        axes.scatter(x, y, s=22, marker=marker, facecolors=faces, edgecolors=colors)

    line, x = fit([trajectory]), numpy.ravel(trajectory.delta_d)
    slope = line["k"][0]
    if numpy.isfinite(slope):
        ends = numpy.array([x.min(), x.max()])
        y = numpy.mean(trajectory.delta_m) + slope * (ends - x.mean())
        axes.plot(ends, y, color="black", linewidth=1)
        title += f": k = {slope:.3g}, r = {line['r'][0]:+.2f}"

    axes.set_title(title, fontsize=10, pad=16)  # above the axis's power of ten
    axes.set(xlabel="ΔD", ylabel="ΔM")
    axes.ticklabel_format(scilimits=(-2, 3), useMathText=True)
    axes.margins(0.08)
    return depth


def legend(figure, trajectories):
    """Draw the legend of the snapshots' markers, in rows that fit into the figure."""
    runs = [[snapshot["phase"] for snapshot in t.snapshots] for t in trajectories.values()]
    most = max(phases.count(phase) for phases in runs for phase in phases)
    marks = [(marker, "full", f"snapshot {t + 1}") for t, marker in enumerate(MARKERS[:most])]
    if any("retrain" in phases for phases in runs):
        marks.append(("o", "none", "hollow: retrain"))
    look = {"linestyle": "", "color": "gray"}
    handles = [Line2D([], [], marker=m, fillstyle=f, label=text, **look) for m, f, text in marks]
    columns = int(figure.get_figwidth() / 1.4)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)


def plot(trajectories, targets=("q_proj", "v_proj")):
    """
    The papers' scatter plot, as a matplotlib figure: a row of panels for each {title: Trajectory},
    a column for each target. A point's colour is its layer's depth, its marker the number of the
    snapshot in its phase (hollow in retrain). The line is fitted to all points of the panel.
    """
    size = (max(6.5, 1 + 4.2 * len(targets)), 0.8 + 2.9 * len(trajectories))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(trajectories), len(targets), squeeze=False)
    for row, (title, trajectory) in zip(panels, trajectories.items()):
        for axes, target in zip(row, targets):
            label = f"{title}, {target.removesuffix('_proj')}"
            depth = panel(axes, trajectory.select(target), label)
    whole = MaxNLocator(integer=True, min_n_ticks=1)  # there is no layer 0.2
    figure.colorbar(depth, ax=panels, label="layer, from 0", aspect=30, ticks=whole)
    legend(figure, trajectories)
    return figure


def interval(value, low, high):
    """A number of `fit` as text. NOTES explain its dashes."""
    if numpy.isnan(value):
        return "–"
    return f"{value:.3g} (–)" if numpy.isnan(low) else f"{value:.3g} ({low:.3g} … {high:.3g})"


NOTES = {
    "(–)": "(–): no interval. It draws layers at random, and fewer than 8 are too few to draw from",
    " –": "–: undefined, since ΔD or ΔM is the same in all points",
}
WIDTHS = {"points": 8, "mean ΔM": 10, "mean ΔD": 10, "slope k": 30, "k, ΔM relative": 36}
WIDTHS |= {"Pearson r": 28, "Spearman ρ": 28}


def table(trajectories, targets):
    """Lines of text: the fit of each {title: Trajectory} for each target."""
    rows = {"": WIDTHS}
    for (title, trajectory), target in itertools.product(trajectories.items(), targets):
        chosen = trajectory.select(target)
        means = (f"{numpy.mean(values):.2g}" for values in (chosen.delta_m, chosen.delta_d))
        numbers = (interval(*number) for number in fit([chosen]).values())
        rows[f"{title}, {target}"] = (str(numpy.size(chosen.delta_d)), *means, *numbers)
    lines = [
        f"{name:28}" + "".join(map(str.rjust, cells, WIDTHS.values()))
        for name, cells in rows.items()
    ]
    return lines + [note for end, note in NOTES.items() if any(end in line for line in lines)]


def of_checkpoints(tuned, base="", axis="row", targets=()):
    """
    The Trajectory of a finished model, with one snapshot. tuned: the folder of an adapter or a
    whole model; base: the model that it was tuned from, if the folder does not name it; targets: of
    a whole model, by default its run's, or all. Raises FileNotFoundError for a missing model,
    ValueError for models of unequal shapes.
    """
    is_adapter = (Path(tuned) / "adapter_config.json").exists()
    model, _, run = load(tuned, base) if is_adapter else load("", tuned)

    if layers := adapter_layers(model):
        trajectory = Trajectory.start(layers, axis)
    else:
        base = base or run.get("model")
        if not base:
            raise ValueError(f"{tuned} is a whole model: name its base model with --base=...")
        targets = targets or run.get("target_modules") or "all-linear"
        trajectory = Trajectory.start(linear_layers(load("", base)[0], targets), axis)
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        for name, weight in trajectory.base.items():
            if shapes.get(f"{name}.weight") != weight.shape:
                raise ValueError(f"{tuned} was not tuned from {base}: {name} has another shape")

    trajectory.record(model, "end", 1)
    return trajectory


@dataclass
class Analysis:
    tuned: tuple = ()  # folders of runs, adapters or whole models, separated by commas
    base: str = ""  # the model that they were tuned from; empty: the one that their run names
    targets: tuple = ()  # the matrices to show, by the ends of their names; empty: those recorded
    axis: str = "row"  # row or column, for folders without recorded snapshots
    out: str = ""  # the picture; empty: analysis.png in the (first) folder of `tuned`


def trajectory_at(folder, analysis):
    """The Trajectory recorded in a folder, or its finished model's. Raises ValueError."""
    if not (Path(folder) / "trajectory.json").exists():
        return of_checkpoints(folder, analysis.base, analysis.axis, analysis.targets)
    trajectory = Trajectory.load(folder)
    if not trajectory.snapshots:
        raise ValueError(f"{folder} has no snapshot: its run ended before the first one")
    return trajectory


def targets_of(folder, trajectory, targets):
    """The targets, or else the ends of all names. Raises ValueError for a missing target."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in trajectory.layers)
    for target in targets:
        if not trajectory.select(target).layers:
            known = ", ".join(sorted(ends))
            raise ValueError(f"{folder} has no matrix {target!r}: set --targets to some of {known}")
    return targets or tuple(ends)


def analyse(analysis):
    """Print the table of runs or models, and draw their picture."""
    settings.check_names("axis", analysis.axis, ("row", "column"))
    if not analysis.tuned:
        raise ValueError("nothing to analyse: set --tuned to the folder of a run or a model")
    for folder in analysis.tuned:
        if not Path(folder).is_dir():
            raise ValueError(f"tuned={folder} is no folder: give that of a run or a model")
    out = Path(analysis.out or Path(analysis.tuned[0]) / "analysis.png")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder: say with --out= where the picture goes")

    trajectories, targets = {}, analysis.targets
    for folder in analysis.tuned:
        trajectory = trajectories[str(Path(folder))] = trajectory_at(folder, analysis)
        targets = targets_of(folder, trajectory, targets)  # empty: the first one's
        print(
            f"{folder}: {len(trajectory.layers)} matrices by {trajectory.axis}, "
            f"snapshots: {len(trajectory.snapshots)}"
        )
    print("", *table(trajectories, targets), sep="\n")
    with replacing(out) as temporary:
        plot(trajectories, targets).savefig(temporary, format="png", dpi=150)
    print(f"\nsaved in {out}")


def main(arguments):
    return settings.program(arguments or ["--help"], Analysis, analyse, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
