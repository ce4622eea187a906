"""
How fine-tuning moved the weights: ΔM, the change of magnitudes, over ΔD, the change of directions.

Of a weight W0 that became W, with rows (or columns) w0_n and w_n (DoRA, arXiv 2402.09353, section 3.2):

    ΔM = mean_n | ‖w_n‖ - ‖w0_n‖ |          ΔD = mean_n (1 - cos(w_n, w0_n))

Each adapted matrix at each snapshot in training is a point, and a line is fitted through them. The papers print its slope, and
BiDoRA (arXiv 2410.09758, figure 1) calls it a correlation; a slope has a unit, which depends on the weights' scale, so `fit` gives three
numbers: the least-squares slope k, Pearson's r and Spearman's ρ.

    python analysis.py --tuned=out/small                         the snapshots of a run (train.py --snapshots=4), or else its end
    python analysis.py --base=some/folder --tuned=other/folder   two checkpoints: a table and a picture
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.stats import rankdata

import settings
from bidora import adapter_layers, ends_in
from files import malformed, read_json, replacing, write_json
from quantized import dequantize, float_dtype, linear, transposed
from sample import load


def decompose(weight, axis="row"):
    """
    A weight (out × in) as magnitude and direction: weight = magnitude ⊙ direction.

    axis: 'row' or 'column', what the vectors are. Returns magnitude, (out, 1) or (1, in), and direction, (out × in), of unit vectors;
    a vector of zeros has the direction zero. Raises ValueError for another axis.
    """
    if axis not in ("row", "column"):
        raise ValueError(f"unknown axis {axis!r}: choose row, column")
    magnitude = torch.linalg.vector_norm(weight, dim=1 if axis == "row" else 0, keepdim=True)
    return magnitude, weight / magnitude.clamp_min(torch.finfo(weight.dtype).tiny)


def changes(squares, inner, change):
    """
    |‖w‖ - ‖w0‖| and 1 - cos(w, w0), tensors like the arguments, of vectors w = w0 + d from ‖w0‖², w0·d and ‖d‖².

    Fine-tuning moves a weight so little that ‖w‖ - ‖w0‖ and 1 - cos would be differences of nearly equal numbers. Multiplied out, they
    are not: ‖w‖² - ‖w0‖² = 2 w0·d + ‖d‖², and sin² = (‖w0‖²‖d‖² - (w0·d)²) / (‖w0‖²‖w‖²), 1 - cos = sin² / (1 + cos).
    A vector that was zero keeps its direction if it is zero still; else 1 - cos = 1.
    """
    after = (squares + 2 * inner + change).clamp_min(0)
    norms = (squares.sqrt(), after.sqrt())
    tiny = torch.finfo(squares.dtype).tiny
    cos = (squares + inner) / (norms[0] * norms[1]).clamp_min(tiny)
    sin2 = (squares * change - inner**2).clamp_min(0) / (squares * after).clamp_min(tiny)
    turned = torch.where(cos > 0, sin2 / (1 + cos.clamp_min(0)), 1 - cos)
    return (2 * inner + change).abs() / sum(norms).clamp_min(tiny), torch.where(change == 0, 0.0, turned)


def delta(weight, base, axis="row"):
    """
    (ΔM, ΔD) as floats, of two weights (out × in), computed in float64. Raises ValueError for unequal shapes or an unknown axis.
    """
    if weight.shape != base.shape:
        raise ValueError(f"the weights have the shapes {tuple(weight.shape)} and {tuple(base.shape)}")
    base, dim = base.double(), {"row": 1, "column": 0}[axis]
    d = weight.double() - base
    moved, turned = changes(base.square().sum(dim), (base * d).sum(dim), d.square().sum(dim))
    return moved.mean().item(), turned.mean().item()


@torch.no_grad()
def layer_delta(layer, axis="row"):
    """
    (ΔM, ΔD) as floats, of a BiDoRALinear against its own frozen weight.

    From the factors, without building W0 + s·B·A, where the layer's own norm runs along the axis: a scaling of rows changes no
    row's direction. Else (a magnitude for each row, and ΔD of columns) from the whole matrix.
    """
    if axis != layer.magnitude_axis:
        return delta(layer.merged_weight(), dequantize(layer.weight, torch.float64), axis)
    A, B = layer.lora_A, layer.scaling * layer.folded_B()
    if axis == "row":
        inner = (linear(A.to(float_dtype(layer.weight)), layer.weight).T * B).sum(1)
        change = ((B @ (A @ A.T)) * B).sum(1)
    else:
        inner = (transposed(B.T.to(float_dtype(layer.weight)), layer.weight) * A).sum(0)
        change = (((B.T @ B) @ A) * A).sum(0)
    moved, turned = changes(layer.weight_squares, inner, change)
    if layer.lora_magnitude_vector is not None:
        moved = (layer.lora_magnitude_vector - layer.weight_squares.sqrt()).abs()
    return moved.mean().item(), turned.mean().item()


@dataclass
class Trajectory:
    """
    ΔM and ΔD of every adapted matrix at each snapshot.

    axis: 'row' or 'column'. layers: the matrices' names. magnitude: each one's mean ‖w0_n‖. snapshots: what each is, [{"phase", "step"}].
    delta_m, delta_d: a row (a list over layers) for each snapshot.
    """

    axis: str
    layers: list
    magnitude: list
    snapshots: list = field(default_factory=list)
    delta_m: list = field(default_factory=list)
    delta_d: list = field(default_factory=list)
    base: dict = field(default_factory=dict, repr=False)  # copies of the weights, where training changes these themselves

    @classmethod
    def start(cls, model, targets, axis="row"):
        """An empty trajectory of a model before training: of its adapters' layers, or without any of the linear layers named in targets."""
        base = {}
        if not adapter_layers(model):
            base = {name: layer.weight.detach().clone() for name, layer in model.named_modules()
                    if isinstance(layer, nn.Linear) and any(ends_in(name, target) for target in targets)}
        layers = list(base or adapter_layers(model))
        weights = (base[name] if base else dequantize(model.get_submodule(name).weight, torch.float32) for name in layers)
        return cls(axis, layers, [decompose(weight.float(), axis)[0].mean().item() for weight in weights], base=base)

    def record(self, model, phase, step):
        """Add a snapshot of the model as it is."""
        pairs = [delta(model.get_submodule(name).weight.detach(), self.base[name], self.axis) if self.base
                 else layer_delta(model.get_submodule(name), self.axis) for name in self.layers]
        self.snapshots.append({"phase": phase, "step": step})
        self.delta_m.append([moved for moved, _ in pairs])
        self.delta_d.append([turned for _, turned in pairs])

    def save(self, folder):
        """Write trajectory.safetensors (the numbers) and trajectory.json (what they are), each atomically."""
        folder = Path(folder)
        with replacing(folder / "trajectory.safetensors") as temporary:
            shape = (len(self.snapshots), len(self.layers))
            save_file({"magnitude": torch.tensor(self.magnitude, dtype=torch.float64), **{
                name: torch.tensor(getattr(self, name), dtype=torch.float64).reshape(shape) for name in ("delta_m", "delta_d")}}, temporary)
        write_json(folder / "trajectory.json", {"axis": self.axis, "layers": self.layers, "snapshots": self.snapshots})

    @classmethod
    def load(cls, folder):
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for damaged files, and for files that don't fit together."""
        with malformed(f"{folder}: trajectory.json or trajectory.safetensors"):
            return cls.read(Path(folder))

    @classmethod
    def read(cls, folder):
        """load's work."""
        about = read_json(folder / "trajectory.json")
        try:
            numbers = load_file(folder / "trajectory.safetensors")
        except SafetensorError as error:
            raise ValueError(f"{folder / 'trajectory.safetensors'} is damaged: {error}") from None
        shape = (len(about.get("snapshots", ())), len(about.get("layers", ())))
        if {"axis", "layers", "snapshots"} - about.keys() or any(name not in numbers or numbers[name].shape != wanted for name, wanted in (
                ("magnitude", shape[1:]), ("delta_m", shape), ("delta_d", shape))):
            raise ValueError(f"{folder}: trajectory.json and trajectory.safetensors don't fit together")
        return cls(about["axis"], about["layers"], snapshots=about["snapshots"], **{name: tensor.tolist() for name, tensor in numbers.items()})

    def select(self, target, phase=None):
        """The part of the layers whose names end in target, and of the snapshots of one phase, if given, as a Trajectory."""
        keep = [i for i, name in enumerate(self.layers) if ends_in(name, target)]
        times = [t for t, snapshot in enumerate(self.snapshots) if phase in (None, snapshot["phase"])]
        return Trajectory(self.axis, [self.layers[i] for i in keep], [self.magnitude[i] for i in keep], [self.snapshots[t] for t in times],
                          [[self.delta_m[t][i] for i in keep] for t in times], [[self.delta_d[t][i] for i in keep] for t in times])


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
    drawn = numpy.concatenate([[range(count)], numpy.random.default_rng(seed).integers(count, size=(samples, count))])  # all layers first

    def points(values):
        flat = values[:, drawn].transpose(1, 0, 2).reshape(len(drawn), -1)  # (1 + samples, points)
        return flat - flat.mean(1, keepdims=True)

    def ranks(values):
        return rankdata(values, axis=1) - (values.shape[1] + 1) / 2

    x, y, scaled = points(x), points(y), points(scaled)
    with numpy.errstate(invalid="ignore", divide="ignore"):
        found = {"k": (x * y).sum(1) / (x * x).sum(1), "relative": (x * scaled).sum(1) / (x * x).sum(1)}
        for name, (a, b) in {"r": (x, y), "rho": (ranks(x), ranks(y))}.items():
            found[name] = (a * b).sum(1) / numpy.sqrt((a * a).sum(1) * (b * b).sum(1))
    enough = count >= 8
    return {name: (values[0], *(numpy.nanpercentile(values[1:], (2.5, 97.5)) if enough else (numpy.nan,) * 2)) if numpy.isfinite(values[0])
            else (numpy.nan,) * 3 for name, values in found.items()}


MARKERS = "os^vDP*X<>"


def plot(trajectories, targets=("q_proj", "v_proj"), samples=2000):
    """
    The papers' scatter: a column of panels for each entry of trajectories, {title: Trajectory}, and a row for each target.

    Colour is the layer's depth, the marker the snapshot, the line the fit over all points of the panel. Returns the matplotlib figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(1.2 + 3 * len(trajectories), 0.6 + 2.8 * len(targets)), layout="constrained")
    panels = figure.subplots(len(targets), len(trajectories), squeeze=False)
    for row, target in zip(panels, targets):
        for axes, (title, trajectory) in zip(row, trajectories.items()):
            part = trajectory.select(target)
            depth = numpy.arange(len(part.layers))
            for t in range(len(part.snapshots)):
                shown = axes.scatter(part.delta_d[t], part.delta_m[t], c=depth, cmap="viridis", s=14, marker=MARKERS[t % len(MARKERS)])
            line, x = fit([part], samples), numpy.ravel(part.delta_d)
            if numpy.isfinite(line["k"][0]):
                ends = numpy.array([x.min(), x.max()])
                axes.plot(ends, numpy.mean(part.delta_m) + line["k"][0] * (ends - x.mean()), color="black", linewidth=1)
            axes.set_title(f"{title}, {target.removesuffix('_proj')}: k = {line['k'][0]:.3g}, r = {line['r'][0]:+.2f}", fontsize=9)
            axes.set(xlabel="ΔD", ylabel="ΔM")
            axes.ticklabel_format(scilimits=(-2, 3), useMathText=True)
            axes.margins(0.08)
    figure.colorbar(shown, ax=panels, label="layer, first to last", shrink=0.8)
    count = max(len(trajectory.snapshots) for trajectory in trajectories.values())
    handles = [Line2D([], [], linestyle="", color="gray", marker=MARKERS[t % len(MARKERS)], label=f"snapshot {t + 1}") for t in range(count)]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8)
    return figure


def table(trajectories, targets, samples=2000):
    """Lines of text: the fit of each trajectory, {title: Trajectory}, for each target, with its 95 % interval."""
    lines = [f"{'':28}{'points':>8}{'mean ΔM':>10}{'mean ΔD':>10}{'slope k':>28}{'k, ΔM relative':>28}{'Pearson r':>24}{'Spearman ρ':>24}"]
    for title, trajectory in trajectories.items():
        for target in targets:
            part = trajectory.select(target)
            found = fit([part], samples)
            cells = [f"{value:.3g} ({low:.3g} … {high:.3g})" for value, low, high in (found[name] for name in ("k", "relative", "r", "rho"))]
            lines.append(f"{title + ', ' + target:28}{numpy.size(part.delta_d):8}{numpy.mean(part.delta_m):10.2g}{numpy.mean(part.delta_d):10.2g}"
                         f"{cells[0]:>28}{cells[1]:>28}{cells[2]:>24}{cells[3]:>24}")
    return lines


def of_checkpoints(tuned, base="", axis="row", targets=("q_proj", "v_proj")):
    """
    The Trajectory of a finished model, one snapshot: an adapter's folder, or a whole model's with the folder or name of its base.

    Raises FileNotFoundError or ValueError for folders that hold no models, or models of different shapes.
    """
    model, _, run = load(tuned, base) if (Path(tuned) / "adapter_config.json").exists() else load("", tuned)
    if adapter_layers(model):
        trajectory = Trajectory.start(model, targets, axis)
    else:
        if not (base or run.get("model")):
            raise ValueError(f"{tuned} is a whole model: name the one it was tuned from with --base=...")
        original, _, _ = load("", base or run["model"], revision=run.get("revision", ""))
        trajectory = Trajectory.start(original, targets, axis)
        layers = dict(model.named_modules())
        for name in trajectory.layers:
            if getattr(layers.get(name), "weight", torch.empty(0)).shape != trajectory.base[name].shape:
                raise ValueError(f"{tuned} was not tuned from {base or run['model']}: {name} has another shape")
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
        asked, _ = settings.read(Analysis, arguments, Path(__file__).parent / "configs")
        if asked.axis not in ("row", "column"):
            raise ValueError(f"unknown axis {asked.axis!r}: choose row, column")
        if not asked.tuned:
            raise ValueError("nothing to analyse: give --tuned=out/small, a run, an adapter or a model")
        trajectories = {}
        for folder in asked.tuned:
            recorded = (Path(folder) / "trajectory.json").exists()
            found = Trajectory.load(folder) if recorded else of_checkpoints(folder, asked.base, asked.axis, asked.targets)
            if not found.snapshots:
                raise ValueError(f"{folder} holds no snapshot yet: its run ended before the first")
            for target in asked.targets:
                if not found.select(target).layers:
                    raise ValueError(f"{folder} has no matrix {target!r}; there are: {', '.join(sorted({n.rpartition('.')[2] for n in found.layers}))}")
            trajectories[str(Path(folder))] = found
            print(f"{folder}: {len(found.layers)} matrices, {len(found.snapshots)} snapshots, by {found.axis}s")
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
