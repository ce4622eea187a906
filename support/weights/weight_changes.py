"""
How fine-tuning moved the weights: ΔM, the change of magnitudes, and ΔD, the change of directions.

For a weight W0 that became W, with rows (or columns) w0_n and w_n (DoRA, arXiv 2402.09353, section
3.2):

    ΔM = mean_n | ‖w_n‖ - ‖w0_n‖ |          ΔD = mean_n (1 - cos(w_n, w0_n))

A Trajectory records both at snapshots during training.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.run.files import malformed, read_json, replacing, write_json
from support.weights.quantized import dequantize, float_dtype, linear, transposed


def decompose(weight, axis="row"):
    """
    A weight (out, in) as magnitude and direction: weight = magnitude ⊙ direction.

    axis: 'row' or 'column', the vectors of the weight. Returns magnitude, (out, 1) or (1, in), and
    direction, (out, in), of unit vectors; a zero vector has the direction zero. Raises ValueError
    for another axis.
    """
    if axis not in ("row", "column"):
        raise ValueError(f"unknown axis {axis!r}: choose row, column")
    magnitude = torch.linalg.vector_norm(weight, dim=1 if axis == "row" else 0, keepdim=True)
    return magnitude, weight / magnitude.clamp_min(torch.finfo(weight.dtype).tiny)


def changes(squares, inner, change):
    """
    |‖w‖ - ‖w0‖| and 1 - cos(w, w0) of vectors w = w0 + d.

    squares: ‖w0‖². inner: w0·d. change: ‖d‖². All are tensors of one shape, which the results have.

    Fine-tuning moves a weight so little that ‖w‖ - ‖w0‖ and 1 - cos would be differences of nearly
    equal numbers. Expanded, they are not:

        ‖w‖² - ‖w0‖² = 2 w0·d + ‖d‖²
        sin² = (‖w0‖²‖d‖² - (w0·d)²) / (‖w0‖²‖w‖²),   1 - cos = sin² / (1 + cos)

    A zero vector that stays zero keeps its direction; if it changes, 1 - cos = 1.
    """
    tiny = torch.finfo(squares.dtype).tiny
    after = (squares + 2 * inner + change).clamp_min(0)
    norms = (squares.sqrt(), after.sqrt())

    cos = (squares + inner) / (norms[0] * norms[1]).clamp_min(tiny)
    sin2 = (squares * change - inner**2).clamp_min(0) / (squares * after).clamp_min(tiny)
    turned = torch.where(cos > 0, sin2 / (1 + cos.clamp_min(0)), 1 - cos)

    moved = (2 * inner + change).abs() / sum(norms).clamp_min(tiny)
    return moved, torch.where(change == 0, 0.0, turned)


def delta(weight, base, axis="row"):
    """
    (ΔM, ΔD), floats, of a weight (out, in) against its base (out, in), computed in float64.

    Raises ValueError for unequal shapes or an unknown axis.
    """
    if weight.shape != base.shape:
        raise ValueError(
            f"the weights have different shapes, {tuple(weight.shape)} and {tuple(base.shape)}"
        )
    base, dim = base.double(), {"row": 1, "column": 0}[axis]
    d = weight.double() - base
    moved, turned = changes(base.square().sum(dim), (base * d).sum(dim), d.square().sum(dim))
    return moved.mean().item(), turned.mean().item()


@torch.no_grad()
def layer_delta(layer, axis="row"):
    """
    (ΔM, ΔD), floats, of a BiDoRALinear against its own frozen weight.

    Where the layer normalises along the same axis, both come from the factors, without building
    W0 + s·B·A: scaling a row by its magnitude does not change its direction. Otherwise they come
    from the merged weight.
    """
    if axis != layer.magnitude_axis:
        return delta(layer.merged_weight(), dequantize(layer.weight, torch.float64), axis)

    A, B = layer.factors()  # s is in B
    dtype = float_dtype(layer.weight)
    if axis == "row":
        inner = (linear(A.to(dtype), layer.weight).T * B).sum(1)
        change = ((B @ (A @ A.T)) * B).sum(1)
    else:
        inner = (transposed(B.T.to(dtype), layer.weight) * A).sum(0)
        change = (((B.T @ B) @ A) * A).sum(0)

    moved, turned = changes(layer.weight_squares, inner, change)
    if layer.lora_magnitude_vector is not None:
        moved = (layer.lora_magnitude_vector - layer.weight_squares.sqrt()).abs()
    return moved.mean().item(), turned.mean().item()


@dataclass
class Trajectory:
    """
    ΔM and ΔD of every adapted matrix at each snapshot.

    axis: 'row' or 'column'. layers: the matrices' names. magnitude: the mean ‖w0_n‖ of each.
    snapshots: [{"phase", "step"}]. delta_m, delta_d: for each snapshot, a list over the layers.
    base: copies of the weights before training, where training changes the weights themselves.
    """

    axis: str
    layers: list
    magnitude: list
    snapshots: list = field(default_factory=list)
    delta_m: list = field(default_factory=list)
    delta_d: list = field(default_factory=list)
    base: dict = field(default_factory=dict, repr=False)

    @classmethod
    def start(cls, layers, axis="row"):
        """
        An empty trajectory, to be made before training.

        layers: {name: module}, either all BiDoRALinear, or all nn.Linear whose own weights will
        change.
        """
        base = {
            name: layer.weight.detach().clone()
            for name, layer in layers.items()
            if not hasattr(layer, "lora_A")
        }

        # One at a time, since a dequantised weight is large.
        magnitude = []
        for name, layer in layers.items():
            weight = base[name] if base else dequantize(layer.weight, torch.float32)
            magnitude.append(decompose(weight.float(), axis)[0].mean().item())
        return cls(axis, list(layers), magnitude, base=base)

    def record(self, model, phase, step):
        """Add a snapshot of the model's current weights."""
        pairs = []
        for name in self.layers:
            layer = model.get_submodule(name)
            if self.base:
                pairs.append(delta(layer.weight.detach(), self.base[name], self.axis))
            else:
                pairs.append(layer_delta(layer, self.axis))
        self.snapshots.append({"phase": phase, "step": step})
        self.delta_m.append([moved for moved, _ in pairs])
        self.delta_d.append([turned for _, turned in pairs])

    def save(self, folder):
        """Write trajectory.safetensors (the numbers) and trajectory.json (their meaning)."""
        folder, shape = Path(folder), (len(self.snapshots), len(self.layers))
        numbers = {"magnitude": torch.tensor(self.magnitude, dtype=torch.float64)}
        for name in ("delta_m", "delta_d"):
            rows = torch.tensor(getattr(self, name), dtype=torch.float64)
            numbers[name] = rows.reshape(shape)  # also without a snapshot: (0, layers)

        with replacing(folder / "trajectory.safetensors") as temporary:
            save_file(numbers, temporary)
        about = {"axis": self.axis, "layers": self.layers, "snapshots": self.snapshots}
        write_json(folder / "trajectory.json", about)

    @classmethod
    def load(cls, folder):
        """
        Read what `save` wrote.

        Raises FileNotFoundError for a missing file; ValueError for damaged files, and for files
        that don't fit together.
        """
        with malformed(f"{folder}: trajectory.json or trajectory.safetensors"):
            return cls.read(Path(folder))

    @classmethod
    def read(cls, folder):
        """`load`, without the check for unexpected structure."""
        about = read_json(folder / "trajectory.json")
        try:
            numbers = load_file(folder / "trajectory.safetensors")
        except SafetensorError as error:
            raise ValueError(f"{folder / 'trajectory.safetensors'} is damaged: {error}") from None

        shape = (len(about.get("snapshots", ())), len(about.get("layers", ())))
        shapes = {"magnitude": shape[1:], "delta_m": shape, "delta_d": shape}
        if {"axis", "layers", "snapshots"} - about.keys() or any(
            name not in numbers or numbers[name].shape != wanted for name, wanted in shapes.items()
        ):
            raise ValueError(
                f"{folder}: trajectory.json and trajectory.safetensors don't fit together"
            )
        return cls(
            about["axis"],
            about["layers"],
            snapshots=about["snapshots"],
            **{name: tensor.tolist() for name, tensor in numbers.items()},
        )

    def select(self, target, phase=None):
        """The layers whose names end in target, in all snapshots or one phase's: a Trajectory."""
        keep = [i for i, name in enumerate(self.layers) if f".{name}".endswith(f".{target}")]
        times = [
            t for t, snapshot in enumerate(self.snapshots) if phase in (None, snapshot["phase"])
        ]
        return Trajectory(
            self.axis,
            [self.layers[i] for i in keep],
            [self.magnitude[i] for i in keep],
            [self.snapshots[t] for t in times],
            [[self.delta_m[t][i] for i in keep] for t in times],
            [[self.delta_d[t][i] for i in keep] for t in times],
        )
