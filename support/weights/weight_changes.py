"""
How fine-tuning moved the weights: ΔM, the change of magnitudes, and ΔD, the change of directions.

A weight W0 became W; its rows (or columns) w0_n became w_n (DoRA, arXiv 2402.09353, section 3.2):

    ΔM = mean_n | ‖w_n‖ - ‖w0_n‖ |          ΔD = mean_n (1 - cos(w_n, w0_n))

`delta` computes them. A Trajectory records them at snapshots of a training run.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.run.files import malformed, read_json, replacing, write_json
from support.weights.quantized import dequantize


def norms(weight, axis):
    """‖w_n‖ of a weight's rows, (out, 1), or columns, (1, in). Raises ValueError."""
    if axis not in ("row", "column"):
        raise ValueError(f"unknown axis {axis!r}: choose row, column")
    return torch.linalg.vector_norm(weight, dim=1 if axis == "row" else 0, keepdim=True)


def decompose(weight, axis="row"):
    """(magnitude, direction), whose product is the weight. The direction of a zero vector is 0."""
    magnitude = norms(weight, axis)
    return magnitude, weight / magnitude.clamp_min(torch.finfo(weight.dtype).tiny)


def delta(weight, base, axis="row"):
    """
    (ΔM, ΔD), floats, of a weight (out, in) against its base (out, in). Raises ValueError. Half the
    squared distance of the directions equals 1 - cos, which would lose digits after a small turn.
    """
    if weight.shape != base.shape:
        raise ValueError(f"the shapes {tuple(weight.shape)} and {tuple(base.shape)} differ")
    m, v = decompose(weight.double(), axis)
    m0, v0 = decompose(base.double(), axis)
    turned = norms(v - v0, axis) ** 2 / 2
    turned[(m == 0) != (m0 == 0)] = 1  # a vector of zeros has no direction: cos = 0
    return (m - m0).abs().mean().item(), turned.mean().item()


@torch.no_grad()
def layer_delta(layer, axis="row"):
    """(ΔM, ΔD), floats, of a BiDoRALinear against its own frozen weight."""
    moved, turned = delta(layer.merged_weight(), dequantize(layer.weight, torch.float64), axis)
    m = layer.lora_magnitude_vector
    if m is not None and axis == layer.magnitude_axis:
        # Without the merged weight's rounding, ΔM is constant while m is fixed.
        moved = (m - layer.weight_squares.sqrt()).abs().mean().item()
    return moved, turned


@dataclass
class Trajectory:
    """ΔM and ΔD of every adapted matrix at each snapshot."""

    axis: str  # 'row' or 'column'
    layers: list  # the matrices' names
    magnitude: list  # the mean ‖w0_n‖ of each matrix
    snapshots: list = field(default_factory=list)  # [{"phase", "step"}]
    delta_m: list = field(default_factory=list)  # for each snapshot, a list over the layers
    delta_d: list = field(default_factory=list)
    base: dict = field(default_factory=dict, repr=False)  # the starting weights, if they train

    @classmethod
    def start(cls, layers, axis="row"):
        """An empty trajectory before training. layers: {name: BiDoRALinear}, or trained Linears."""
        base, magnitude = {}, []
        for name, layer in layers.items():
            if not hasattr(layer, "lora_A"):
                base[name] = layer.weight.detach().clone()
            weight = dequantize(layer.weight, torch.float32)  # one at a time, since it is large
            magnitude.append(norms(weight.detach(), axis).mean().item())
        return cls(axis, list(layers), magnitude, base=base)

    def record(self, model, phase, step):
        """Add a snapshot of the model's current weights."""
        moved, turned = [], []
        for name in self.layers:
            layer = model.get_submodule(name)
            if self.base:
                m, d = delta(layer.weight.detach(), self.base[name], self.axis)
            else:
                m, d = layer_delta(layer, self.axis)
            moved.append(m)
            turned.append(d)
        self.snapshots.append({"phase": phase, "step": step})
        self.delta_m.append(moved)
        self.delta_d.append(turned)

    def save(self, folder):
        """Write trajectory.safetensors (the numbers) and trajectory.json (their meaning)."""
        folder, shape = Path(folder), (len(self.snapshots), len(self.layers))
        numbers = {"magnitude": torch.tensor(self.magnitude, dtype=torch.float64)}
        for name in ("delta_m", "delta_d"):
            rows = torch.tensor(getattr(self, name), dtype=torch.float64)
            numbers[name] = rows.reshape(shape)  # also without a snapshot: (0, layers)

        with replacing(folder / "trajectory.safetensors") as temporary:
            save_file(numbers, temporary)
        meaning = {"axis": self.axis, "layers": self.layers, "snapshots": self.snapshots}
        write_json(folder / "trajectory.json", meaning)

    @classmethod
    def load(cls, folder):
        """Read what `save` wrote. Raises FileNotFoundError or ValueError."""
        tensors = Path(folder) / "trajectory.safetensors"
        with malformed(f"{folder}: trajectory.json or trajectory.safetensors"):
            meaning = read_json(Path(folder) / "trajectory.json")
            try:
                numbers = load_file(tensors)
            except SafetensorError as error:
                raise ValueError(f"{tensors} is damaged: {error}") from None

            shape = (len(meaning.get("snapshots", ())), len(meaning.get("layers", ())))
            wanted = {"magnitude": shape[1:], "delta_m": shape, "delta_d": shape}
            shapes = {name: tuple(tensor.shape) for name, tensor in numbers.items()}
            if meaning.keys() != {"axis", "layers", "snapshots"} or shapes != wanted:
                raise ValueError(f"{folder}: trajectory.* files don't fit together")
            return cls(**meaning, **{name: tensor.tolist() for name, tensor in numbers.items()})

    def select(self, target, phase=None):
        """A Trajectory of the layers whose names end in target, in all snapshots or one phase's."""
        keep = [i for i, name in enumerate(self.layers) if f".{name}".endswith(f".{target}")]
        times = [t for t, s in enumerate(self.snapshots) if phase in (None, s["phase"])]
        return Trajectory(
            self.axis,
            [self.layers[i] for i in keep],
            [self.magnitude[i] for i in keep],
            [self.snapshots[t] for t in times],
            [[self.delta_m[t][i] for i in keep] for t in times],
            [[self.delta_d[t][i] for i in keep] for t in times],
        )
