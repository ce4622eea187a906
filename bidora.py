"""
Weight decomposition: a frozen weight W0 (out × in), a low-rank update B·A, a magnitude m.

    W' = m ⊙ (W0 + s·B·A) / ‖W0 + s·B·A‖,    s = alpha / rank       (DoRA, arXiv 2402.09353, eq. 5)

DoRA trains A, B and m together; BiDoRA (2410.09758) trains A, B at the lower level, m at the upper.
LoRA (2106.09685) has no m. BiLoRA (2403.13037) has none either: its upper level trains λ in
ΔW = s·B·diag(λ)·A. Norm and m have one number per output row or, as in the papers, per column.

Training never builds W0 + s·B·A. With ratio = m / ‖·‖, y = ratio ⊙ (W0·x + s·B·(A·x)) + bias (per
column, ratio ⊙ x goes in instead), and each row's norm is, with W0·Aᵀ and B (out × rank),
‖W0 + sBA‖² = ‖W0‖² + 2s Σ (W0·Aᵀ) ⊙ B + s² Σ (B·(A·Aᵀ)) ⊙ B, Σ over the rank.
(The same norm: arXiv 2603.22276, and PEFT's pull request 3387.)

Works on any nn.Module with nn.Linear layers (or transformers' Conv1D). Everything but save_adapter,
load_adapter and patterns also works when this file is copied alone.
"""

import contextlib
import importlib
import math
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from support.fast import kernels
    from support.weights import quantized
except ImportError:  # copied alone into another project: ordinary weights, plain formulas
    quantized = SimpleNamespace(
        linear=lambda x, weight, bias=None: F.linear(x, weight.to(x.dtype), bias),
        transposed=torch.matmul,
        blocks=lambda weight, dtype: [(0, weight.size(0), weight.to(dtype))],
        dequantize=lambda weight, dtype: weight.to(dtype),
        float_dtype=lambda weight: weight.dtype,
        kind_of=lambda weight: None,
        complete=lambda module: None,
        return_freed_memory=lambda device: None,
    )
    kernels = SimpleNamespace(rescale=lambda y, change: y + change.to(y.dtype) * y)


def plain_forward(layer, x):
    """The equation above, for reading; a test compares BiDoRALinear.forward with it."""
    direction = layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A)  # (out, in)
    norm = direction.norm(dim=1, keepdim=True)  # (out, 1)
    W = layer.lora_magnitude_vector[:, None] * direction / norm  # (out, in)
    return F.linear(x, W, layer.bias)


@dataclass(frozen=True)
class Method:
    """An entry of METHODS: a layer's parameters, the update they form, and who trains them."""

    magnitude: bool = False  # whether a layer has m
    upper: str | None = None  # the name of the parameter that learns at the upper level
    names: tuple = ("direction", "magnitude")  # what reports call lower and upper parameters
    scale: Callable = operator.truediv  # s of alpha and rank

    def build(self, layer, **new):
        """Give a layer the parameters of its update. new: their device and dtype."""
        layer.lora_A = nn.Parameter(torch.empty(layer.rank, layer.in_features, **new))
        layer.lora_B = nn.Parameter(torch.empty(layer.out_features, layer.rank, **new))

    def start(self, layer):
        """Initialise A and B: one factor random, the other zero, so that ΔW = 0."""
        random, zero = layer.lora_A, layer.lora_B
        if layer.init == "normal_b":
            random, zero = zero, random
        if layer.init == "kaiming":
            nn.init.kaiming_uniform_(random, a=math.sqrt(5))
        elif layer.init == "orthogonal":
            nn.init.orthogonal_(random)
        else:
            nn.init.normal_(random)
        nn.init.zeros_(zero)

    def factors(self, layer):
        """A, (rank, in), and B, (out, rank), of ΔW = s·B·A; PEFT reads them as LoRA's."""
        return layer.lora_A, layer.lora_B


@dataclass(frozen=True)
class BiLoRA(Method):
    """ΔW = s·B·diag(λ)·A (arXiv 2403.13037)."""

    upper: str = "lora_lambda"
    names: tuple = ("singular vectors", "singular values")
    form: str = "real"  # of λ

    def build(self, layer, **new):
        super().build(layer, **new)
        layer.lora_lambda = nn.Parameter(torch.zeros(layer.rank, **new))

    def factors(self, layer):
        return layer.lora_A, layer.lora_B * self.singular_values(layer.lora_lambda)

    def singular_values(self, raw):
        """λ of raw numbers (rank,) that start at 0."""
        if self.form == "softmax":  # they sum to the rank, so each starts at 1, as the real ones
            return len(raw) * raw.softmax(0)
        # A steep sigmoid approximates a choice between 0 and 1; each starts at ½.
        return (raw / 0.1).sigmoid() if self.form == "binary" else 1 + raw


METHODS = {
    "lora": Method(),
    "dora": Method(magnitude=True),
    "bidora": Method(magnitude=True, upper="lora_magnitude_vector"),
    "bilora": BiLoRA(),
    "bilora_softmax": BiLoRA(form="softmax"),
    "bilora_binary": BiLoRA(form="binary"),
}
CHOICES = {
    "method": METHODS,
    "norm_grad": ("exact", "detach"),  # detach: a constant in the backward pass (DoRA, section 4.3)
    "magnitude_axis": ("row", "column"),  # one m per output, or one per input
    "init": ("kaiming", "normal", "normal_b", "orthogonal"),  # of A, B = 0; normal_b: of B, A = 0
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


class BiDoRALinear(nn.Linear):
    """
    A frozen linear layer with a trainable low-rank update and, as its method says, m.

    lora_dropout is on the update's input; method, norm_grad, magnitude_axis and init: see CHOICES.
    linear: an nn.Linear whose weight and bias are shared, not copied; bitsandbytes may have packed
    it (support/weights/quantized.py). Without it, W0 is random.
    Adapter parameters are fp32 even over a bf16 weight, also after .to(torch.bfloat16): in bf16,
    small updates round to nothing. Under autocast the products run in autocast's dtype.
    Raises ValueError for a rank below 1 and for an unknown choice.
    """

    transposed = False  # whether the layer replaced a Conv1D, whose weight is W0ᵀ

    def __init__(
        self,
        in_features,
        out_features,
        rank=8,
        lora_alpha=16.0,
        lora_dropout=0.0,
        bias=True,
        method="bidora",
        *,
        norm_grad="exact",
        magnitude_axis="row",
        init="kaiming",
        linear=None,
    ):
        if rank < 1:
            raise ValueError(f"rank {rank} must be at least 1")
        for name, value in zip(CHOICES, (method, norm_grad, magnitude_axis, init)):
            if value not in CHOICES[name]:
                raise ValueError(f"unknown {name} {value!r}: choose {', '.join(CHOICES[name])}")

        super().__init__(in_features, out_features, bias, device="meta" if linear else None)
        if linear is not None:
            quantized.complete(linear)
            self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)  # the weight and the bias

        self.method, self.norm_grad = METHODS[method], norm_grad
        self.magnitude_axis, self.init = magnitude_axis, init
        self.rank, self.scaling = rank, self.method.scale(lora_alpha, rank)
        self.dropout = nn.Dropout(lora_dropout)

        self.register_buffer("weight_squares", None, persistent=False)
        self.cache_norms()
        self.register_load_state_dict_post_hook(BiDoRALinear.cache_norms)

        self.method.build(self, device=self.weight.device, dtype=self.weight_squares.dtype)
        self.method.start(self)

        # m starts at ‖W0‖ as forward computes it, so that the ratio is exactly 1. A row of zeros
        # has no direction: its m is exactly 0, so ratio and gradients are 0, and the row stays.
        self.lora_magnitude_vector = None
        if self.method.magnitude:
            start = torch.where(self.weight_squares > 0, self.direction_norm().detach(), 0.0)
            self.lora_magnitude_vector = nn.Parameter(start)

    def factors(self):
        """A, (rank, in), and s·B, (out, rank), of the update."""
        A, B = self.method.factors(self)
        return A, self.scaling * B

    def squared_norms(self):
        """‖W0‖² of each row, (out,), or column, (in,), in fp32 or finer."""
        dtype = torch.promote_types(quantized.float_dtype(self.weight), torch.float32)
        row = self.magnitude_axis == "row"
        blocks = quantized.blocks(self.weight, dtype)
        squares = [rows.square().sum(1 if row else 0) for _, _, rows in blocks]
        return torch.cat(squares) if row else sum(squares)

    @torch.no_grad()
    def cache_norms(self, _=None):
        """Keep ‖W0‖² of the weight that is there now, and drop what else was kept of an old one."""
        self.weight_squares, self.cached_version = self.squared_norms(), self.weight_version()
        self.weight_gram = None  # support/weights/regularisers.py

    def weight_version(self):
        """Differs when W0 is another tensor, or was written into."""
        return id(self.weight), 0 if self.weight.is_inference() else self.weight._version

    def _apply(self, fn, recurse=True):
        """What .to(), .cuda(), .bfloat16() and the like call: adapters stay in fp32."""

        def move(tensor):
            moved = fn(tensor)
            base = tensor is self.weight or tensor is self.bias
            return moved if base or moved.itemsize >= 4 else tensor.to(moved.device)

        super()._apply(move, recurse)
        self.cache_norms()
        return self

    def forward(self, x):
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # the norm stays in fp32
                return self.forward(x.to(torch.get_autocast_dtype(device)))

        row, y, AW0 = self.magnitude_axis == "row", None, None
        if self.method.magnitude:
            if row and quantized.kind_of(self.weight):  # unpack W0 once, for x and for the norm
                both = x.reshape(-1, self.in_features), self.method.factors(self)[0].to(x.dtype)
                y, AW0 = quantized.Products.apply(self.weight, False, *both)
            norm = self.direction_norm(AW0)  # (out,) or (in,)
            norm = norm if self.norm_grad == "exact" else norm.detach()
            # ratio·y is computed as y + (ratio - 1)·y: near 1, bf16 has steps of 0.8 %, too coarse
            # for ratio, but not for ratio - 1.
            change = self.lora_magnitude_vector / norm - 1
            if not row:
                x = torch.addcmul(x, x, change.to(x.dtype))

        A, sB = (factor.to(x.dtype) for factor in self.factors())  # (rank, in), (out, rank)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, self.in_features)  # (N, in)
        z = F.linear(self.dropout(rows), A)  # (N, rank)
        if not (self.method.magnitude and row):
            y = quantized.linear(rows, self.weight, bias).addmm_(z, sB.T)  # (N, out), in place
        else:
            y = quantized.linear(rows, self.weight) if y is None else y
            y = kernels.rescale(y.addmm_(z, sB.T), change)
            # The bias comes last: in bf16, a large one would hide y from the gradient of m.
            y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], self.out_features)

    def direction_norm(self, AW0=None):
        """‖W0 + s·B·A‖ of each row, (out,), or column, (in,). AW0: A·W0ᵀ, (rank, out), if known."""
        A, sB = self.factors()
        dtype, squares = quantized.float_dtype(self.weight), self.weight_squares
        if self.weight.requires_grad:  # full fine-tuning beside the adapter
            squares = self.squared_norms()
        elif not torch.compiler.is_compiling() and self.cached_version != self.weight_version():
            self.cache_norms()
            squares = self.weight_squares

        if self.magnitude_axis == "row":
            if AW0 is None or AW0.dtype != dtype:  # as under autocast
                AW0 = quantized.linear(A.to(dtype), self.weight)
            squares = squares + ((2 * AW0.T.to(A.dtype) + sB @ (A @ A.T)) * sB).sum(dim=1)
        else:
            BW0 = quantized.transposed(sB.T.to(dtype), self.weight).to(A.dtype)  # (rank, in)
            squares = squares + ((2 * BW0 + (sB.T @ sB) @ A) * A).sum(dim=0)
        return squares.clamp_min(1e-24).sqrt()  # a row of zeros must not divide by 0

    @torch.no_grad()
    def merged_weight(self):
        """W' as one matrix, (out × in), in the adapter's precision; for merging, not training."""
        A, sB = self.factors()
        W = quantized.dequantize(self.weight, A.dtype) + sB @ A
        if not self.method.magnitude:
            return W
        dim = 1 if self.magnitude_axis == "row" else 0
        norm = torch.linalg.vector_norm(W, dim=dim, keepdim=True).clamp_min(1e-12)
        return self.lora_magnitude_vector.view_as(norm) / norm * W


def as_linear(layer):
    """An nn.Linear itself; transformers' Conv1D, which keeps Wᵀ, as one that shares its weight."""
    if type(layer).__name__ != "Conv1D":
        return layer if isinstance(layer, nn.Linear) else None
    linear = nn.Linear(*layer.weight.shape, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.data.T), layer.bias
    return linear


def linear_layers(model, targets):
    """
    The model's linear layers that match targets, {name: layer}. A target is a layer's name or its
    end: "q_proj" matches every "….q_proj". A string in place of a list, or a target with other
    characters, is PEFT's: "all-linear" (but the output layer and tied ones), or a regular
    expression for whole names. Raises ValueError for a target without a match.
    """
    linears = {n: layer for n, layer in model.named_modules() if n and as_linear(layer)}
    chosen = {}
    for target in [targets] if isinstance(targets, str) else targets:
        form, matching = "module", [n for n in linears if f".{n}".endswith(f".{target}")]
        if isinstance(targets, str) or re.search(r"[^\w.]", target):
            from support.weights import peft_format

            form, matching = "pattern", peft_format.select(target, model, linears)
        if not matching:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise ValueError(f"target {form} {target!r} matches no linear layer; there are: {ends}")
        chosen |= {name: linears[name] for name in matching}
    return chosen


def replace_linear_with_bidora(
    module,
    rank=8,
    lora_alpha=16.0,
    lora_dropout=0.0,
    target_modules=ATTENTION,
    method="bidora",
    *,
    rank_pattern=None,
    alpha_pattern=None,
    **options,
):
    """
    Replace, in place, the linear layers that match target_modules (as in linear_layers) by
    BiDoRALinear ones that share their weights. Returns module. rank_pattern, alpha_pattern: numbers
    for some layers, {pattern: number} as in PEFT. options: norm_grad, magnitude_axis, init. Says
    how many other parameters train. Raises ValueError for a target or pattern without a match, and
    for a layer that has an adapter, shares or computes its weight, is too small, or is not called.
    """
    chosen = linear_layers(module, target_modules)
    sizes = dict.fromkeys(chosen, (rank, lora_alpha))
    if rank_pattern or alpha_pattern:
        from support.weights import peft_format

        sizes = peft_format.by_patterns(sizes, rank_pattern, alpha_pattern)
    for name, layer in chosen.items():
        size = as_linear(layer).in_features, as_linear(layer).out_features
        rank, _ = sizes[name]
        if not isinstance(rank, int) or not 1 <= rank <= min(size):
            problem = f"rank {rank} does not fit {size[0]} inputs and {size[1]} outputs"
            raise ValueError(f"{name}: {problem}: choose 1 to {min(size)}")
    own = {id(p) for layer in chosen.values() for p in layer.parameters()}
    others = sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) not in own)
    if others and any(layer.weight.requires_grad for layer in chosen.values()):
        note = f"note: {others:,} other parameters train, and are saved, beside the adapters"
        print(note + "; for none, call model.requires_grad_(False) first", file=sys.stderr)
    return adapt(module, sizes, lora_dropout, method, **options)


def adapt(module, sizes, lora_dropout, method, **options):
    """Give layers, {name: (rank, lora_alpha)}, adapters: all of them, or after an error none."""
    quantized.complete(module)
    owners = list(module.named_parameters(remove_duplicate=False))
    adapted = {}
    for name, (rank, lora_alpha) in sizes.items():
        layer = module.get_submodule(name)
        if isinstance(layer, BiDoRALinear):
            raise ValueError(f"{name} has an adapter already")
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            problem = "nn.MultiheadAttention reads this layer's weight without calling the layer"
            raise ValueError(f"{name}: {problem}: an adapter has no effect: leave the layer out")
        if "weight" not in layer._parameters:
            raise ValueError(f"{name} computes its weight, as by weight_norm: undo that first")
        if tied := [n for n, p in owners if p is layer.weight and n != f"{name}.weight"]:
            raise ValueError(f"{name} shares its weight with {tied[0]}: it can't be adapted alone")

        linear = as_linear(layer)
        shape = linear.in_features, linear.out_features, rank, lora_alpha, lora_dropout
        new = BiDoRALinear(*shape, linear.bias is not None, method, linear=linear, **options)
        new.transposed = linear is not layer
        adapted[name] = new.train(layer.training)
        quantized.return_freed_memory(new.weight.device)  # of the norm's fp32 copy

    for name, layer in adapted.items():
        module.set_submodule(name, layer)
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # no fast path, which reads weights in eval mode
    return module


def adapter_layers(model):
    """The model's BiDoRALinear layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BiDoRALinear)}


def upper_parameters(model):
    """The parameters that learn on val data: BiDoRA's magnitudes, BiLoRA's λ, unless frozen."""
    layers = adapter_layers(model).values()
    uppers = [getattr(layer, layer.method.upper) for layer in layers if layer.method.upper]
    return [parameter for parameter in uppers if parameter.requires_grad]


def lower_parameters(model):
    """The parameters that learn on train data: all trainable ones except the upper ones."""
    upper = {id(parameter) for parameter in upper_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in upper]


def start_retrain(model, fresh=True):
    """Freeze λ and m. fresh: initialise A and B again; a head goes on."""
    for parameter in upper_parameters(model):
        parameter.requires_grad_(False)
    for layer in adapter_layers(model).values():
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.requires_grad_(False)
        if fresh:
            layer.method.start(layer)


def merge(model):
    """
    Fold every adapter into its weight, in place, leaving ordinary linear layers. Returns model.
    The merged weight has the base's dtype: over bf16 it is rounded once. A quantised base is first
    dequantised in all its layers, and a line says so: an adapter fits what it was trained over.
    """
    quantized.complete(model)
    kinds = {quantized.kind_of(p) for p in model.parameters()} - {None}
    for name, layer in adapter_layers(model).items():
        weight, dtype = layer.merged_weight(), quantized.float_dtype(layer.weight)
        new = nn.Linear(layer.in_features, layer.out_features, device="meta")
        if layer.transposed:
            from transformers.pytorch_utils import Conv1D

            new, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
        new.weight, new.bias = nn.Parameter(weight.to(dtype), requires_grad=False), layer.bias
        model.set_submodule(name, new.train(layer.training))
    if kinds:
        quantized.unpack(model, kinds)
    return model


def save_adapter(model, folder, base_model=""):
    """
    Write adapter_model.safetensors and adapter_config.json as PEFT does, each atomically: LoRA's
    factors, with m DoRA's. Modules that are trained beside the adapters are saved whole.
    base_model: name, name@revision or folder of the base, for the config. Raises ValueError for no
    adapters, for several kinds, and (after saving the rest) for trained parameters that the format
    can't hold; OSError when the folder can't be written.
    """
    from support.weights import peft_format

    peft_format.write(folder, model, adapter_layers(model), base_model)


def load_adapter(model, folder, method=""):
    """
    Load an adapter that save_adapter or PEFT wrote; a model without adapters is given them. Returns
    model. method: of the new adapters, such as "bidora"; empty: "dora" or "lora", as in the file.
    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or incomplete,
    does not fit the model, or holds a variant of LoRA that these layers don't compute.
    """
    from support.weights import peft_format

    saved = peft_format.read(folder, model, as_linear)
    if not adapter_layers(model):
        method = method or ("dora" if saved.magnitude else "lora")
        if getattr(METHODS.get(method), "magnitude", None) != saved.magnitude:
            raise ValueError(f"{folder}: use_dora={saved.magnitude} does not fit method={method}")
        model.requires_grad_(False)
        adapt(model, saved.sizes, saved.dropout, method, magnitude_axis=saved.axis)
    peft_format.copy_into(model, adapter_layers(model), saved)
    return model


def __getattr__(name):
    """The other names of PyPI's package `bidora`, another project (docs/coming-from.md)."""
    if not name.startswith("__"):  # Python asks for __path__ at each import
        with contextlib.suppress(ImportError, KeyError):  # ImportError: this file was copied alone
            return vars(importlib.import_module("support.weights.bidora_package"))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
