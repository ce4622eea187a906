"""
Weight decomposition: a frozen weight W0 (out × in), a low-rank direction B·A, and a magnitude m (one per output row).

    W' = m ⊙ (W0 + s·B·A) / ‖W0 + s·B·A‖,    s = alpha / rank            DoRA, arXiv 2402.09353, eq. 5

The training forward never builds W0 + s·B·A. With ratio = m / ‖·‖ it is  y = ratio ⊙ (W0·x + s·B·(A·x)) + bias,
and the norm comes from the factors, with ‖W0‖² computed once:

    ‖W0 + sBA‖² = ‖W0‖² + 2s Σ (W0·Aᵀ) ⊙ B + s² Σ (B·(A·Aᵀ)) ⊙ B          sums along each row

magnitude_axis='column' has one m per input column instead, as the papers write it: then ratio scales x, and the sums run along columns.
LoRA (arXiv 2106.09685) is the same layer without m. DoRA trains A, B and m together; BiDoRA (arXiv 2410.09758) trains A, B at the
lower level and m at the upper. BiLoRA (arXiv 2403.13037) has no m, but ΔW = s·B·diag(λ)·A, with λ at the upper level.
Works on any nn.Module that has nn.Linear layers.
"""

import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.files import read_json, replacing, write_json
from support.quantized import (
    blocks,
    dequantize,
    float_dtype,
    kind_of,
    linear,
    transposed,
)

METHODS = ("lora", "dora", "bidora", "bilora")
ALL_LINEAR = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # of a block of LLaMA and its kin
# BiLoRA's pseudo singular values λ of raw numbers, all 1 or ½ at the start; softmax sums to the rank, so that it starts as the others
LAMBDAS = {
    "real": lambda raw: 1 + raw,
    "softmax": lambda raw: len(raw) * raw.softmax(0),
    "binary": lambda raw: (raw / 0.1).sigmoid(),
}


class Rescale(torch.autograd.Function):
    """
    b + (1 + change) ⊙ (y - b) in place of y, where y = W·x + b: (N, out), (out,), (out,) or None -> (N, out).

    Autograd would keep y beside the result and fill four more tensors of its size; here y - b is had back from the result by a division, and
    two fill. A DoRA step came down from 1.30 to 1.23 LoRA steps by that (SmolLM2, bf16, 8 × 64 tokens, two CPU cores).
    """

    @staticmethod
    def forward(ctx, y, change, bias):
        low = change.to(y.dtype)
        ctx.mark_dirty(y)
        y.addcmul_(y, low)
        if bias is not None:
            y.addcmul_(bias, low, value=-1)
        ctx.save_for_backward(y, change, bias)
        return y

    @staticmethod
    def backward(ctx, g):
        y, change, bias = ctx.saved_tensors
        ratio = torch.where(
            change == -1, 1, 1 + change
        )  # 0 for a row of zeros: there y - b is 0 too
        own = y if bias is None else y - bias
        product = g * own
        by_change = product.sum(0) / ratio
        # Into the product's memory, unless this gradient will be differentiated in turn.
        return (
            torch.addcmul(
                g, g, change.to(g.dtype), out=None if torch.is_grad_enabled() else product
            ),
            by_change,
            None,
        )


class BiDoRALinear(nn.Linear):
    """
    A frozen linear layer with a trainable low-rank direction and, for 'dora' and 'bidora', a trainable magnitude.

    rank, lora_alpha: the direction is (lora_alpha / rank)·B·A with A (rank × in), B (out × rank). lora_dropout: on the
    direction's input. method: 'lora' (no magnitude), 'dora' (magnitude at the lower level), 'bidora' (at the upper), 'bilora'
    (no magnitude; pseudo singular values λ between A and B, at the upper level, of the kind lambda_kind: 'real', 'softmax' or 'binary',
    which a steep sigmoid approximates). magnitude_axis: 'row' (one for each output) or 'column' (one for each input).
    norm_grad: 'exact', or 'detach' to treat the norm as a constant in the backward pass (DoRA, section 4.3).
    linear: an nn.Linear whose weight and bias are adopted (shared, not copied), also one that bitsandbytes has packed in 4 or 8
    bits (quantized.py); without it W0 is random, as nn.Linear's.

    Adapter parameters are fp32 even over a bf16 weight, because in bf16 small updates round to nothing.
    Raises ValueError for a rank below 1, or an unknown method, magnitude_axis, lambda_kind or norm_grad.
    """

    def __init__(
        self,
        in_features,
        out_features,
        rank=8,
        lora_alpha=16.0,
        lora_dropout=0.0,
        bias=True,
        method="bidora",
        norm_grad="exact",
        magnitude_axis="row",
        lambda_kind="real",
        linear=None,
    ):
        if rank < 1:
            raise ValueError(f"rank {rank} must be at least 1")
        for name, value, choices in (
            ("method", method, METHODS),
            ("norm_grad", norm_grad, ("exact", "detach")),
            ("magnitude_axis", magnitude_axis, ("row", "column")),
            ("lambda_kind", lambda_kind, LAMBDAS),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: choose {', '.join(choices)}")
        super().__init__(
            in_features, out_features, bias, device="meta" if linear is not None else None
        )
        if linear is not None:
            self.weight, self.bias = linear.weight, linear.bias
            if getattr(linear, "state", None) is not None and linear.state.SCB is not None:
                self.weight.SCB = (
                    linear.state.SCB
                )  # where bitsandbytes' own int8 layer keeps the scales once it was called
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.rank, self.lora_alpha, self.scaling = rank, lora_alpha, lora_alpha / rank
        self.method, self.norm_grad, self.magnitude_axis, self.lambda_kind = (
            method,
            norm_grad,
            magnitude_axis,
            lambda_kind,
        )
        self.dropout = nn.Dropout(lora_dropout)
        new = dict(
            device=self.weight.device,
            dtype=torch.promote_types(float_dtype(self.weight), torch.float32),
        )
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **new))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, **new))
        self.reset_direction()
        self.lora_lambda = nn.Parameter(torch.zeros(rank, **new)) if method == "bilora" else None
        squares = (
            rows.square().sum(1 if magnitude_axis == "row" else 0)
            for _, _, rows in blocks(self.weight, new["dtype"])
        )
        squares = torch.cat(list(squares)) if magnitude_axis == "row" else sum(squares)
        self.register_buffer(
            "weight_squares", squares, persistent=False
        )  # ‖W0‖² of each row, (out,), or column, (in,)
        # m starts at ‖W0‖ of the weight that is there, by the same arithmetic as the norm, so that ratio starts at exactly 1;
        # but at exactly 0 for a row of zeros, which has no direction: there ratio and all gradients are 0, and it stays as it is.
        self.lora_magnitude_vector = (
            None
            if method in ("lora", "bilora")
            else nn.Parameter(torch.where(squares > 0, self.direction_norm().detach(), 0.0))
        )

    @property
    def upper(self):
        """The parameter that learns at the upper level, or None."""
        return {"bidora": self.lora_magnitude_vector, "bilora": self.lora_lambda}.get(self.method)

    def reset_direction(self):
        """Start the direction afresh: A Kaiming-uniform, B zero, so that B·A = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def direction_norm(self):
        """‖W0 + s·B·A‖ of each row, (out,), or column, (in,), without building the product."""
        A, sB = self.lora_A, self.scaling * self.lora_B
        if self.magnitude_axis == "row":
            W0A = linear(A.to(float_dtype(self.weight)), self.weight).T.to(A.dtype)  # (out, rank)
            squares = self.weight_squares + ((2 * W0A + sB @ (A @ A.T)) * sB).sum(dim=1)
        else:
            BW0 = transposed(sB.T.to(float_dtype(self.weight)), self.weight).to(
                A.dtype
            )  # (rank, in)
            squares = self.weight_squares + ((2 * BW0 + (sB.T @ sB) @ A) * A).sum(dim=0)
        return squares.clamp_min(1e-24).sqrt()  # never 0, for a row of zeros

    def forward(self, x):
        if self.lora_magnitude_vector is not None:
            norm = self.direction_norm()
            ratio = self.lora_magnitude_vector / (
                norm if self.norm_grad == "exact" else norm.detach()
            )  # (out,) or (in,)
            # ratio·y as y + (ratio - 1)·y: ratio stays near 1, where bf16 has steps of 0.8 %; ratio - 1 keeps its digits.
            change = ratio - 1
            if self.magnitude_axis == "column":
                x = torch.addcmul(x, x, change.to(x.dtype))
        rows = x.reshape(-1, self.in_features)  # (N, in)
        z = F.linear(self.dropout(rows), self.lora_A.to(x.dtype))  # (N, rank)
        if self.lora_lambda is not None:
            z = z * LAMBDAS[self.lambda_kind](self.lora_lambda).to(x.dtype)
        y = linear(rows, self.weight, self.bias).addmm_(
            z, (self.scaling * self.lora_B).to(x.dtype).T
        )  # (N, out), the sum in place
        if self.lora_magnitude_vector is not None and self.magnitude_axis == "row":
            y = Rescale.apply(y, change, self.bias)  # the bias lies outside the scaling
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def folded_B(self):
        """B, with BiLoRA's λ folded into its columns: as LoRA's B it does the same."""
        return (
            self.lora_B
            if self.lora_lambda is None
            else self.lora_B * LAMBDAS[self.lambda_kind](self.lora_lambda)
        )

    @torch.no_grad()
    def merged_weight(self):
        """W' as one matrix, (out × in), in the adapter's precision. For merging and analysis, not for training."""
        W = dequantize(self.weight, self.lora_A.dtype) + self.scaling * (
            self.folded_B() @ self.lora_A
        )
        if self.lora_magnitude_vector is None:
            return W
        ratio = self.lora_magnitude_vector / torch.linalg.vector_norm(
            W, dim=1 if self.magnitude_axis == "row" else 0
        ).clamp_min(1e-12)
        return ratio[:, None] * W if self.magnitude_axis == "row" else W * ratio

    def regulariser(self):
        """
        What keeps the layer's directions apart, a scalar. For a layer with magnitudes: ‖C - I‖, C the cosines between the directions
        (the unit rows or columns of W0 + s·B·A), as the BiDoRA authors' code has it for columns. From the factors and W0·W0ᵀ, which is
        computed at the first call and kept (out × out, or in × in): r products of that size instead of one with W0.
        For BiLoRA: ‖BᵀB - I‖² + ‖A·Aᵀ - I‖² (arXiv 2403.13037, section 3.2).
        """
        A, sB = self.lora_A, self.scaling * self.lora_B
        if self.lora_magnitude_vector is None:
            eye = torch.eye(self.rank, device=A.device, dtype=A.dtype)
            return (self.lora_B.T @ self.lora_B - eye).square().sum() + (
                A @ A.T - eye
            ).square().sum()
        row = self.magnitude_axis == "row"
        if not hasattr(self, "weight_gram"):
            pieces = (rows for _, _, rows in blocks(self.weight, A.dtype))
            self.weight_gram = (
                torch.cat(
                    [
                        linear(x, self.weight)
                        if kind_of(self.weight)
                        else x @ self.weight.to(A.dtype).T
                        for x in pieces
                    ]
                )
                if row
                else sum(x.T @ x for x in pieces)
            )
        if row:
            low = (
                linear(A.to(float_dtype(self.weight)), self.weight).T.to(A.dtype) @ sB.T
            )  # W0·Aᵀ·(sB)ᵀ
            gram = self.weight_gram + low + low.T + sB @ (A @ A.T) @ sB.T
        else:
            low = (
                transposed(sB.T.to(float_dtype(self.weight)), self.weight).to(A.dtype).T @ A
            )  # W0ᵀ·(sB)·A
            gram = self.weight_gram + low + low.T + A.T @ (sB.T @ sB) @ A
        norm = gram.diagonal().clamp_min(1e-24).sqrt()
        cosines = gram / (norm[:, None] * norm)
        return (
            (cosines - torch.eye(len(norm), device=A.device, dtype=A.dtype))
            .square()
            .sum()
            .clamp_min(1e-24)
            .sqrt()
        )


def ends_in(name, target):
    """Whether a module's name is a target's, or ends in it: "q_proj" is meant by "layers.0.self_attn.q_proj"."""
    return f".{name}".endswith(f".{target}")


def replace_linear_with_bidora(
    module,
    rank=8,
    target_modules=("q_proj", "v_proj"),
    lora_alpha=16.0,
    lora_dropout=0.0,
    method="bidora",
    norm_grad="exact",
    magnitude_axis="row",
    lambda_kind="real",
):
    """
    Replace, in place, the nn.Linear layers named in target_modules by BiDoRALinear layers that share their weights.

    target_modules: names as in module.named_modules(), or their ends: "q_proj" takes every "….q_proj". Returns module.
    Raises ValueError when a target matches no linear layer, is adapted already, shares its weight with another layer, or is
    smaller than the rank.
    """
    linears = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)
    }
    chosen = []
    for target in target_modules:
        found = [name for name in linears if name and ends_in(name, target)]
        if not found:
            raise ValueError(
                f"target module {target!r} matches no linear layer; there are: "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in linears}))}"
            )
        chosen += found
    for name in chosen:
        largest = min(linears[name].in_features, linears[name].out_features)
        if not 1 <= rank <= largest:
            raise ValueError(
                f"{name}: rank {rank} does not fit a layer of {linears[name].in_features} inputs and "
                f"{linears[name].out_features} outputs: choose 1 to {largest}"
            )
    return adapt(
        module,
        {name: (rank, lora_alpha) for name in chosen},
        lora_dropout,
        method,
        norm_grad,
        magnitude_axis,
        lambda_kind,
    )


def adapt(
    module,
    chosen,
    lora_dropout,
    method,
    norm_grad="exact",
    magnitude_axis="row",
    lambda_kind="real",
):
    """Put adapters into the nn.Linear layers `chosen`, {name: (rank, lora_alpha)}, all or none; errors name the layer."""
    owners = list(module.named_parameters(remove_duplicate=False))
    adapted = {}
    for name, (rank, lora_alpha) in chosen.items():
        layer = module.get_submodule(name)
        if isinstance(layer, BiDoRALinear):
            raise ValueError(f"{name} has an adapter already")
        shared = [
            owner
            for owner, parameter in owners
            if parameter is layer.weight and owner != f"{name}.weight"
        ]
        if shared:
            raise ValueError(
                f"{name} shares its weight with {shared[0]}, so it can't be adapted by itself"
            )
        try:
            adapted[name] = BiDoRALinear(
                layer.in_features,
                layer.out_features,
                rank,
                lora_alpha,
                lora_dropout,
                layer.bias is not None,
                method,
                norm_grad,
                magnitude_axis,
                lambda_kind,
                linear=layer,
            ).train(layer.training)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, layer in adapted.items():
        module.set_submodule(name, layer)
    return module


@dataclass
class BiDoRAConfig:
    """Settings in the names of the `bidora` package. use_bidora=False trains the magnitude with the direction (DoRA)."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: tuple = ("q_proj", "v_proj")
    use_bidora: bool = True
    lower_lr_multiplier: float = (
        1.0  # these three are for create_bilevel_optimizer: lower_lr = base rate × multiplier
    )
    upper_lr_multiplier: float = 2.0
    lower_steps: int = 1


def prepare_bidora_model(model, config, quantized=False):
    """
    Freeze every parameter of model, then put in adapters by a BiDoRAConfig; returns model.

    quantized: whether the base is; this checks it, since a model remembers by itself how its weights are packed.
    Raises ValueError for quantized=True over an ordinary model, and as replace_linear_with_bidora does.
    """
    if quantized and not any(
        kind_of(parameter) or not parameter.is_floating_point() for parameter in model.parameters()
    ):
        raise ValueError(
            "quantized=True, but the model's weights are not quantised: load it with quantize='nf4'"
        )
    model.requires_grad_(False)
    return replace_linear_with_bidora(
        model,
        config.rank,
        config.target_modules,
        config.alpha,
        config.dropout,
        "bidora" if config.use_bidora else "dora",
    )


def linear_layers(model, targets):
    """The model's nn.Linear layers, by name, that the targets mean."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(ends_in(name, target) for target in targets)
    }


def adapter_layers(model):
    """The model's BiDoRALinear layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BiDoRALinear)}


def upper_parameters(model):
    """The parameters of the upper level, which learn on validation data: BiDoRA's magnitudes, BiLoRA's λ, unless frozen."""
    return [
        layer.upper
        for layer in adapter_layers(model).values()
        if layer.upper is not None and layer.upper.requires_grad
    ]


def lower_parameters(model):
    """The parameters of the lower level, which learn on training data: all trainable ones that are not upper."""
    upper = {id(parameter) for parameter in upper_parameters(model)}
    return [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and id(parameter) not in upper
    ]


def freeze_magnitude(model):
    """Fix every magnitude, and every λ, where it is, for the last phase."""
    for layer in adapter_layers(model).values():
        for parameter in (layer.lora_magnitude_vector, layer.lora_lambda):
            if parameter is not None:
                parameter.requires_grad_(False)


def regulariser(model):
    """The mean of the layers' regularisers, a scalar; times a small weight it joins the lower level's loss."""
    layers = adapter_layers(model).values()
    return sum(layer.regulariser() for layer in layers) / len(layers)


def merge(model):
    """
    Fold every adapter into its weight, in place: plain nn.Linear layers again, for saving and serving. Returns model.

    The merged weight has the base weight's dtype, so over a bf16 base it is rounded once. A quantised base is dequantised first,
    in all its layers, which is printed: an adapter fits the weights that it was trained over, not the ones before quantisation.
    """
    quantised = set()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or not (
            isinstance(layer, BiDoRALinear) or kind_of(layer.weight)
        ):
            continue
        quantised.add(kind_of(layer.weight))
        dtype = float_dtype(layer.weight)
        weight = (
            layer.merged_weight().to(dtype)
            if isinstance(layer, BiDoRALinear)
            else dequantize(layer.weight, dtype)
        )
        linear = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        model.set_submodule(name, linear.train(layer.training))
    if kinds := sorted(filter(None, quantised)):
        print(
            f"the {' and '.join(kinds)} base was dequantised to {str(dtype).removeprefix('torch.')} to merge the adapter into it"
        )
    return model


COLUMN_DORA = "COLUMN_DORA"  # the peft_type of an adapter with a magnitude for each column
# PEFT's names inside adapter_model.safetensors
PEFT_PREFIX = "base_model.model."
PEFT_NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
# Settings of PEFT's LoraConfig that these layers know, or that change nothing once an adapter is trained. Any other one that is
# switched on is a variant of LoRA that computes something else (a number alone switches nothing on).
PEFT_KNOWN = {
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "parent_library",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "eva_config",
    "runtime_config",
    "megatron_core",
    "ensure_weight_tying",
}


def adapter_tensors(model):
    """Every adapter parameter under the name that PEFT saves it by; BiLoRA's λ is folded into B."""
    return {
        f"{PEFT_PREFIX}{name}.{PEFT_NAMES[part]}": (
            layer.folded_B() if part == "lora_B" else getattr(layer, part)
        ).detach()
        for name, layer in adapter_layers(model).items()
        for part in PEFT_NAMES
        if getattr(layer, part) is not None
    }


def save_adapter(model, folder, base_model="", revision=""):
    """
    Write adapter_model.safetensors and adapter_config.json, as PEFT does; each file is replaced atomically.

    base_model, revision: the name or folder of the base, and which version of it, for the reader. To PEFT a BiDoRA adapter is a DoRA adapter.
    A magnitude for each column can't be expressed there: such an adapter gets a peft_type of ours, which PEFT refuses, and load_adapter reads.
    Raises ValueError for a model without adapters, or with several kinds; OSError when the folder can't be written.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to save")
    (use_dora, axis), *mixed = {
        (layer.lora_magnitude_vector is not None, layer.magnitude_axis) for layer in layers.values()
    }
    if mixed:
        raise ValueError(
            "the model's adapters differ in having a magnitude, or in its axis; one file holds one kind"
        )
    rank, alpha, dropout = statistics.mode(
        (layer.rank, layer.lora_alpha, layer.dropout.p) for layer in layers.values()
    )
    # Short names where they say enough: "q_proj" only if every q_proj is adapted.
    ends = {name.rpartition(".")[2] for name in layers}
    plain = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name not in layers
    ]
    targets = (
        list(layers) if any(name.rpartition(".")[2] in ends for name in plain) else sorted(ends)
    )
    config = {
        "peft_type": COLUMN_DORA if use_dora and axis == "column" else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": targets,
        "use_dora": use_dora,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {
            name: layer.lora_alpha for name, layer in layers.items() if layer.lora_alpha != alpha
        },
        "bias": "none",
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model).items()},
            temporary,
        )
    write_json(folder / "adapter_config.json", config)


def load_adapter(model, folder):
    """
    Load an adapter that save_adapter or PEFT wrote; a model without adapters gets them first. Returns model.

    Which layers, of which rank, with or without a magnitude: that is read from the tensors, so any pattern of ranks or targets
    loads. rsLoRA's scale alpha / √rank (arXiv 2312.03732) becomes the alpha that gives the same scale.
    Raises FileNotFoundError for a missing file, ValueError for a damaged one, for one that does not fit the model, and for
    variants of LoRA that these layers do not compute.
    """
    folder = Path(folder)
    where = folder / "adapter_config.json"
    config = read_json(where)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder / 'adapter_model.safetensors'} is missing (adapters are read from safetensors only)"
        ) from None
    except SafetensorError as error:
        raise ValueError(f"{folder / 'adapter_model.safetensors'} is damaged: {error}") from None
    if config.get("peft_type", "LORA") not in ("LORA", COLUMN_DORA):
        raise ValueError(
            f"{where}: peft_type {config['peft_type']!r} is not supported; 'LORA', with or without use_dora, is"
        )
    # "pissa", "olora", "loftq" and the like change the base's weights at the start, and the file does not hold these.
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"{where}: init_lora_weights {config['init_lora_weights']!r} changes the base itself: have PEFT convert it "
            f"to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    unsupported = [
        key
        for key, value in config.items()
        if key not in PEFT_KNOWN
        and (key, value) != ("bias", "none")
        and (value is True or (value and not isinstance(value, (int, float))))
    ]
    if unsupported:
        raise ValueError(f"{where}: {', '.join(unsupported)} is not supported")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{where}: lora_dropout {dropout!r} is no share below 1")
    patterns = config.get("alpha_pattern") or {}
    for alpha in (config.get("lora_alpha"), *patterns.values()):
        if not isinstance(alpha, (int, float)):
            raise ValueError(
                f"{where}: lora_alpha or a value of alpha_pattern is missing or no number ({alpha!r})"
            )

    found = {}  # {layer: {"lora_A": tensor, ...}}
    for key, tensor in tensors.items():
        if key.endswith(
            ".base_layer.weight"
        ):  # PEFT adds the weight itself where the head is adapted
            name = key.removeprefix(PEFT_PREFIX).removesuffix(".base_layer.weight")
            if torch.equal(
                dict(model.named_parameters()).get(f"{name}.weight", tensor).to(tensor.dtype),
                tensor,
            ):
                continue
            raise ValueError(f"{folder}: the adapter holds another weight of {name} than the base")
        match = re.fullmatch(
            re.escape(PEFT_PREFIX) + r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", key
        )
        if not match:
            raise ValueError(
                f"{folder}: {key} is no tensor of a LoRA or DoRA adapter of linear layers, which is not supported"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    has_magnitudes = {"lora_magnitude_vector" in parts for parts in found.values()}
    if has_magnitudes != {bool(config.get("use_dora"))}:
        raise ValueError(
            f"{folder}: adapter_config.json has use_dora={bool(config.get('use_dora'))}, which the tensors contradict"
        )
    alphas, ranks = {}, {}
    for name, parts in found.items():
        ranks[name] = (
            len(parts["lora_A"]) if "lora_A" in parts and parts["lora_A"].dim() == 2 else 1
        )
        try:
            fitting = [
                key for key in patterns if re.match(rf"(.*\.)?({key})$", name)
            ]  # PEFT's rule: the first that fits
        except re.error as error:
            raise ValueError(
                f"{where}: alpha_pattern holds no regular expression ({error})"
            ) from None
        alphas[name] = (patterns[fitting[0]] if fitting else config["lora_alpha"]) * (
            ranks[name] ** 0.5 if config.get("use_rslora") else 1
        )
    if not adapter_layers(model):
        linears = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        if missing := sorted(found.keys() - linears):
            raise ValueError(
                f"{folder}: the adapter does not fit the model: there is no linear layer {missing[0]}"
            )
        model.requires_grad_(False)
        adapt(
            model,
            {name: (ranks[name], alphas[name]) for name in found},
            dropout,
            "dora" if config.get("use_dora") else "lora",
            magnitude_axis="column" if config.get("peft_type") == COLUMN_DORA else "row",
        )
    if any(layer.method == "bilora" for layer in adapter_layers(model).values()):
        raise ValueError(
            "the model has BiLoRA adapters, whose λ a saved adapter holds folded: load it into a model without adapters"
        )
    own = adapter_tensors(model)
    tensors = {
        f"{PEFT_PREFIX}{name}.{PEFT_NAMES[part]}": tensor
        for name, parts in found.items()
        for part, tensor in parts.items()
    }
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            shapes = [
                tuple(side[name].shape) if name in side else "none" for side in (tensors, own)
            ]
            raise ValueError(
                f"{folder}: the adapter does not fit the model: {name} is {shapes[0]} in the file, "
                f"{shapes[1]} in the model"
            )
    for name, layer in adapter_layers(model).items():
        if not math.isclose(layer.lora_alpha, alphas[name]):
            raise ValueError(
                f"{folder}: the adapter does not fit the model: {name} has alpha {alphas[name]:g} in the file, "
                f"{layer.lora_alpha:g} in the model"
            )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    return model
