"""
How fine-tuning moved the weights: ΔM, the change of magnitudes, and ΔD, the change of directions, at snapshots in training.

Of a weight W0 that became W, with rows (or columns) w0_n and w_n (DoRA, arXiv 2402.09353, section 3.2):

    ΔM = mean_n | ‖w_n‖ - ‖w0_n‖ |          ΔD = mean_n (1 - cos(w_n, w0_n))
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.files import malformed, read_json, replacing, write_json
from support.quantized import dequantize, float_dtype, linear, transposed


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
    return (2 * inner + change).abs() / sum(norms).clamp_min(tiny), torch.where(
        change == 0, 0.0, turned
    )


def delta(weight, base, axis="row"):
    """
    (ΔM, ΔD) as floats, of two weights (out × in), computed in float64. Raises ValueError for unequal shapes or an unknown axis.
    """
    if weight.shape != base.shape:
        raise ValueError(
            f"the weights have the shapes {tuple(weight.shape)} and {tuple(base.shape)}"
        )
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
    base: dict = field(
        default_factory=dict, repr=False
    )  # copies of the weights, where training changes these themselves

    @classmethod
    def start(cls, layers, axis="row"):
        """An empty trajectory of layers, {name: module}, before training: all BiDoRALinear, or all nn.Linear whose own weights will move."""
        base = {
            name: layer.weight.detach().clone()
            for name, layer in layers.items()
            if not hasattr(layer, "lora_A")
        }
        weights = (
            base[name] if base else dequantize(layer.weight, torch.float32)
            for name, layer in layers.items()
        )
        return cls(
            axis,
            list(layers),
            [decompose(weight.float(), axis)[0].mean().item() for weight in weights],
            base=base,
        )

    def record(self, model, phase, step):
        """Add a snapshot of the model as it is."""
        pairs = [
            delta(model.get_submodule(name).weight.detach(), self.base[name], self.axis)
            if self.base
            else layer_delta(model.get_submodule(name), self.axis)
            for name in self.layers
        ]
        self.snapshots.append({"phase": phase, "step": step})
        self.delta_m.append([moved for moved, _ in pairs])
        self.delta_d.append([turned for _, turned in pairs])

    def save(self, folder):
        """Write trajectory.safetensors (the numbers) and trajectory.json (what they are), each atomically."""
        folder = Path(folder)
        with replacing(folder / "trajectory.safetensors") as temporary:
            shape = (len(self.snapshots), len(self.layers))
            save_file(
                {
                    "magnitude": torch.tensor(self.magnitude, dtype=torch.float64),
                    **{
                        name: torch.tensor(getattr(self, name), dtype=torch.float64).reshape(shape)
                        for name in ("delta_m", "delta_d")
                    },
                },
                temporary,
            )
        write_json(
            folder / "trajectory.json",
            {"axis": self.axis, "layers": self.layers, "snapshots": self.snapshots},
        )

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
        if {"axis", "layers", "snapshots"} - about.keys() or any(
            name not in numbers or numbers[name].shape != wanted
            for name, wanted in (("magnitude", shape[1:]), ("delta_m", shape), ("delta_d", shape))
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
        """The part of the layers whose names end in target, and of the snapshots of one phase, if given, as a Trajectory."""
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
