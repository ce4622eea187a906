"""
How fine-tuning moved the weights: ΔM, the change of magnitudes, over ΔD, the change of directions.

Of a weight W0 that became W, with rows (or columns) w0_n and w_n (DoRA, arXiv 2402.09353, section 3.2):

    ΔM = mean_n | ‖w_n‖ - ‖w0_n‖ |          ΔD = mean_n (1 - cos(w_n, w0_n))

Each adapted matrix at each snapshot in training is a point, and a line is fitted through them. The papers print its slope, and
BiDoRA (arXiv 2410.09758, figure 1) calls it a correlation; a slope has a unit, which depends on the weights' scale, so `fit` gives three
numbers: the least-squares slope k, Pearson's r and Spearman's ρ.

    python -m tools.analysis --tuned=out/small                         the snapshots of a run (train.py --snapshots=4), or else its end
    python -m tools.analysis --base=some/folder --tuned=other/folder   two checkpoints: a table and a picture
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from scipy.stats import rankdata

from bidora import adapter_layers, linear_layers
from sample import load
from support import settings
from support.files import replacing
from support.weight_changes import Trajectory


def fit(trajectories, samples=2000, seed=0):
    """
    The line through the points of one or several trajectories over the same layers: {"k", "r", "rho", "relative"}, each (value, low, high).

    k: least-squares slope of ΔM over ΔD, in the weights' unit; relative: the same with ΔM divided by the matrix's mean magnitude, so that
    models can be compared; r, rho: Pearson's and Spearman's correlation. low, high: a 95 % bootstrap interval, drawing whole layers (all
    snapshots of a layer together: they are one matrix on its way, not independent points); NaN below 8 layers, where it would be too narrow.
    All are NaN where ΔD or ΔM does not vary.
    """
    x = numpy.concatenate([t.delta_d for t in trajectories])  # (snapshots, layers)
    y = numpy.concatenate([t.delta_m for t in trajectories])
    scaled = numpy.concatenate([numpy.asarray(t.delta_m) / t.magnitude for t in trajectories])
    count = x.shape[1]
    drawn = numpy.concatenate(
        [[range(count)], numpy.random.default_rng(seed).integers(count, size=(samples, count))]
    )  # all layers first

    def points(values):
        flat = values[:, drawn].transpose(1, 0, 2).reshape(len(drawn), -1)  # (1 + samples, points)
        return flat - flat.mean(1, keepdims=True)

    def ranks(values):
        return rankdata(values, axis=1) - (values.shape[1] + 1) / 2

    x, y, scaled = points(x), points(y), points(scaled)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        found = {
            "k": (x * y).sum(1) / (x * x).sum(1),
            "relative": (x * scaled).sum(1) / (x * x).sum(1),
        }
        for name, (a, b) in {"r": (x, y), "rho": (ranks(x), ranks(y))}.items():
            found[name] = (a * b).sum(1) / numpy.sqrt((a * a).sum(1) * (b * b).sum(1))
    enough = count >= 8
    return {
        name: (
            values[0],
            *(numpy.nanpercentile(values[1:], (2.5, 97.5)) if enough else (numpy.nan,) * 2),
        )
        if numpy.isfinite(values[0])
        else (numpy.nan,) * 3
        for name, values in found.items()
    }


MARKERS = "os^vDP*X<>"


def plot(trajectories, targets=("q_proj", "v_proj"), samples=2000):
    """
    The papers' scatter: a column of panels for each entry of trajectories, {title: Trajectory}, and a row for each target.

    Colour is the layer's depth, the marker the snapshot, the line the fit over all points of the panel. Returns the matplotlib figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(
        figsize=(1.2 + 3 * len(trajectories), 0.6 + 2.8 * len(targets)), layout="constrained"
    )
    panels = figure.subplots(len(targets), len(trajectories), squeeze=False)
    for row, target in zip(panels, targets):
        for axes, (title, trajectory) in zip(row, trajectories.items()):
            part = trajectory.select(target)
            depth = numpy.arange(len(part.layers))
            for t in range(len(part.snapshots)):
                shown = axes.scatter(
                    part.delta_d[t],
                    part.delta_m[t],
                    c=depth,
                    cmap="viridis",
                    s=14,
                    marker=MARKERS[t % len(MARKERS)],
                )
            line, x = fit([part], samples), numpy.ravel(part.delta_d)
            if numpy.isfinite(line["k"][0]):
                ends = numpy.array([x.min(), x.max()])
                axes.plot(
                    ends,
                    numpy.mean(part.delta_m) + line["k"][0] * (ends - x.mean()),
                    color="black",
                    linewidth=1,
                )
            axes.set_title(
                f"{title}, {target.removesuffix('_proj')}: k = {line['k'][0]:.3g}, r = {line['r'][0]:+.2f}",
                fontsize=9,
            )
            axes.set(xlabel="ΔD", ylabel="ΔM")
            axes.ticklabel_format(scilimits=(-2, 3), useMathText=True)
            axes.margins(0.08)
    figure.colorbar(shown, ax=panels, label="layer, first to last", shrink=0.8)
    count = max(len(trajectory.snapshots) for trajectory in trajectories.values())
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            color="gray",
            marker=MARKERS[t % len(MARKERS)],
            label=f"snapshot {t + 1}",
        )
        for t in range(count)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8)
    return figure


def table(trajectories, targets, samples=2000):
    """Lines of text: the fit of each trajectory, {title: Trajectory}, for each target, with its 95 % interval."""
    lines = [
        f"{'':28}{'points':>8}{'mean ΔM':>10}{'mean ΔD':>10}{'slope k':>28}{'k, ΔM relative':>28}{'Pearson r':>24}{'Spearman ρ':>24}"
    ]
    for title, trajectory in trajectories.items():
        for target in targets:
            part = trajectory.select(target)
            found = fit([part], samples)
            cells = [
                f"{value:.3g} ({low:.3g} … {high:.3g})"
                for value, low, high in (found[name] for name in ("k", "relative", "r", "rho"))
            ]
            lines.append(
                f"{title + ', ' + target:28}{numpy.size(part.delta_d):8}{numpy.mean(part.delta_m):10.2g}{numpy.mean(part.delta_d):10.2g}"
                f"{cells[0]:>28}{cells[1]:>28}{cells[2]:>24}{cells[3]:>24}"
            )
    return lines


def of_checkpoints(tuned, base="", axis="row", targets=("q_proj", "v_proj")):
    """
    The Trajectory of a finished model, one snapshot: an adapter's folder, or a whole model's with the folder or name of its base.

    Raises FileNotFoundError or ValueError for folders that hold no models, or models of different shapes.
    """
    model, _, run = (
        load(tuned, base) if (Path(tuned) / "adapter_config.json").exists() else load("", tuned)
    )
    if adapter_layers(model):
        trajectory = Trajectory.start(adapter_layers(model), axis)
    else:
        if not (base or run.get("model")):
            raise ValueError(
                f"{tuned} is a whole model: name the one it was tuned from with --base=..."
            )
        original, _, _ = load("", base or run["model"], revision=run.get("revision", ""))
        trajectory = Trajectory.start(linear_layers(original, targets), axis)
        layers = dict(model.named_modules())
        for name in trajectory.layers:
            if (
                getattr(layers.get(name), "weight", torch.empty(0)).shape
                != trajectory.base[name].shape
            ):
                raise ValueError(
                    f"{tuned} was not tuned from {base or run['model']}: {name} has another shape"
                )
    trajectory.record(model, "end", 1)
    return trajectory


@dataclass
class Analysis:
    tuned: tuple = ()  # folders of runs, adapters or whole models, separated by commas
    base: str = ""  # what they were tuned from; by default what they say themselves
    targets: tuple = ("q_proj", "v_proj")  # the matrices that are shown, by the ends of their names
    axis: str = "row"  # row or column, for folders without recorded snapshots
    out: str = "analysis.png"  # the picture


def main(arguments):
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(__doc__.strip(), settings.help_text(Analysis), sep="\n\n")
        return 0
    try:
        asked, _ = settings.read(Analysis, arguments)
        if asked.axis not in ("row", "column"):
            raise ValueError(f"unknown axis {asked.axis!r}: choose row, column")
        if not asked.tuned:
            raise ValueError(
                "nothing to analyse: give --tuned=out/small, a run, an adapter or a model"
            )
        trajectories = {}
        for folder in asked.tuned:
            recorded = (Path(folder) / "trajectory.json").exists()
            found = (
                Trajectory.load(folder)
                if recorded
                else of_checkpoints(folder, asked.base, asked.axis, asked.targets)
            )
            if not found.snapshots:
                raise ValueError(f"{folder} holds no snapshot yet: its run ended before the first")
            for target in asked.targets:
                if not found.select(target).layers:
                    raise ValueError(
                        f"{folder} has no matrix {target!r}; there are: {', '.join(sorted({n.rpartition('.')[2] for n in found.layers}))}"
                    )
            trajectories[str(Path(folder))] = found
            print(
                f"{folder}: {len(found.layers)} matrices, {len(found.snapshots)} snapshots, by {found.axis}s"
            )
        print("", *table(trajectories, asked.targets), sep="\n")
        with replacing(Path(asked.out)) as temporary:
            plot(trajectories, asked.targets).savefig(temporary, format="png", dpi=150)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nsaved in {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
