"""
Weight decomposition: a frozen weight W0 (out × in), a low-rank direction B·A, a magnitude m.

    W' = m ⊙ (W0 + s·B·A) / ‖W0 + s·B·A‖,    s = alpha / rank       (DoRA, arXiv 2402.09353, eq. 5)

DoRA trains A, B and m together; BiDoRA (arXiv 2410.09758) trains A, B at the lower level and m at
the upper. LoRA (2106.09685) is the same layer without m; BiLoRA (2403.13037) has no m, but
ΔW = s·B·diag(λ)·A with λ at the upper level. The norm and m have one number per output row, or with
magnitude_axis='column' one per input column, as the papers write it.

Training never builds W0 + s·B·A. With ratio = m / ‖·‖, y = ratio ⊙ (W0·x + s·B·(A·x)) + bias, and
the norm comes from the factors:  ‖W0 + sBA‖² = ‖W0‖² + 2s Σ (W0·Aᵀ) ⊙ B + s² Σ (B·(A·Aᵀ)) ⊙ B.
(Others found this norm, too: arXiv 2603.22276, and PEFT's pull request 3387.)

Works on any nn.Module that has nn.Linear layers (or transformers' Conv1D). All but save_adapter and
load_adapter also works when this file is copied alone into another project.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    from support.fast.kernels import rescale
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

    def rescale(y, change):
        return y + change.to(y.dtype) * y


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Method:
    """An entry of METHODS."""

    magnitude: bool = False  # whether the layer has m
    singular_values: Callable | None = None  # BiLoRA's λ, of raw numbers (rank,) that start at 0
    upper: str | None = None  # the name of the adapter parameter that learns at the upper level
    names: tuple = ("direction", "magnitude")  # of what the lower and the upper level train
    scale: Callable = lambda alpha, rank: alpha / rank  # s


SINGULAR = dict(upper="lora_lambda", names=("singular vectors", "singular values"))
METHODS = {
    "lora": Method(),
    "dora": Method(magnitude=True),
    "bidora": Method(magnitude=True, upper="lora_magnitude_vector"),
    "bilora": Method(singular_values=lambda raw: 1 + raw, **SINGULAR),
    # These λ sum to the rank, so each starts at 1, as above.
    "bilora_softmax": Method(singular_values=lambda raw: len(raw) * raw.softmax(0), **SINGULAR),
    # A steep sigmoid approximates a choice between 0 and 1; each λ starts at ½.
    "bilora_binary": Method(singular_values=lambda raw: (raw / 0.1).sigmoid(), **SINGULAR),
}


CHOICES = {
    "method": METHODS,
    "norm_grad": ("exact", "detach"),
    "magnitude_axis": ("row", "column"),
    "init": ("kaiming", "normal", "normal_b"),
}


class BiDoRALinear(nn.Linear):
    """
    A frozen linear layer with a trainable low-rank update and, as its method says, m or λ.

    rank, lora_alpha   the update is s·B·A with A (rank × in), B (out × rank)
    lora_dropout       on the update's input
    method             a key of METHODS
    magnitude_axis     'row' (one m per output) or 'column' (one per input)
    norm_grad          'exact', or 'detach': a constant in the backward pass (DoRA, section 4.3)
    init               of A, with B = 0: 'kaiming' (uniform, as in LoRA) or 'normal' (N(0, 1));
                       'normal_b': of B, with A = 0
    linear             an nn.Linear whose weight and bias are shared, not copied; bitsandbytes may
                       have packed it (support/weights/quantized.py). Without it, W0 is random

    Adapter parameters are fp32 even over a bf16 weight, also after .to(torch.bfloat16): in bf16,
    small updates round to nothing. Under autocast the products run in autocast's dtype.
    Raises ValueError for a rank below 1 and for an unknown method, magnitude_axis, norm_grad or
    init.
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
            self.adopt(linear)
        self.requires_grad_(False)  # the weight and the bias

        self.method, self.norm_grad = METHODS[method], norm_grad
        self.magnitude_axis, self.init = magnitude_axis, init
        self.rank, self.scaling = rank, self.method.scale(lora_alpha, rank)
        self.dropout = nn.Dropout(lora_dropout)

        self.register_buffer("weight_squares", None, persistent=False)
        self.measure()
        self.register_load_state_dict_post_hook(BiDoRALinear.measure)

        new = dict(device=self.weight.device, dtype=self.weight_squares.dtype)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **new))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, **new))
        self.reset_direction()
        self.lora_lambda = self.lora_magnitude_vector = None
        if self.method.singular_values:
            self.lora_lambda = nn.Parameter(torch.zeros(rank, **new))

        # m starts at ‖W0‖, computed exactly as forward computes the norm, so that the ratio starts
        # at exactly 1. A row of zeros has no direction: its m is exactly 0, so that ratio and
        # gradients are 0 and the row stays as it is.
        if self.method.magnitude:
            norm = self.direction_norm().detach()
            start = torch.where(self.weight_squares > 0, norm, 0.0)
            self.lora_magnitude_vector = nn.Parameter(start)

    def adopt(self, linear):
        """Share the weight and bias of an nn.Linear."""
        quantized.complete(linear)
        self.weight, self.bias = linear.weight, linear.bias

    def squared_norms(self):
        """‖W0‖² of each row, (out,), or column, (in,), in fp32 or finer."""
        dtype = torch.promote_types(quantized.float_dtype(self.weight), torch.float32)
        blocks = (rows for _, _, rows in quantized.blocks(self.weight, dtype))
        if self.magnitude_axis == "row":
            return torch.cat([rows.square().sum(1) for rows in blocks])
        return sum(rows.square().sum(0) for rows in blocks)

    @torch.no_grad()
    def measure(self, _=None):
        """Keep ‖W0‖² of the weight that is there now, and drop what else was kept of an old one."""
        self.weight_squares, self.measured = self.squared_norms(), self.weight_version()
        self.weight_gram = None  # support/weights/regularisers.py

    def weight_version(self):
        """Differs when W0 is another tensor, or was written into."""
        return id(self.weight), 0 if self.weight.is_inference() else self.weight._version

    def _apply(self, fn, recurse=True):
        """What .to(), .cuda(), .bfloat16() and the like call: adapters stay in fp32."""

        def move(tensor):
            moved = fn(tensor)
            base = tensor is self.weight or tensor is self.bias
            coarse = moved.is_floating_point() and moved.itemsize < 4
            return tensor.to(moved.device) if coarse and not base else moved

        super()._apply(move, recurse)
        self.measure()
        return self

    @property
    def magnitude(self):
        """m, (out,) or (in,), or None: lora_magnitude_vector is PEFT's name for it."""
        return self.lora_magnitude_vector

    @property
    def upper(self):
        """The parameter that learns at the upper level, or None."""
        return getattr(self, self.method.upper) if self.method.upper else None

    def reset_direction(self):
        """Start the direction afresh: one factor random, the other zero, so that B·A = 0."""
        random, zero = self.lora_A, self.lora_B
        if self.init == "normal_b":
            random, zero = zero, random
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(random, a=math.sqrt(5))
        else:
            nn.init.normal_(random)
        nn.init.zeros_(zero)

    def reference_forward(self, x):
        """BiDoRA's equation, for reading: `forward` computes the same without building V or W."""
        V = self.weight + self.scaling * (self.lora_B @ self.lora_A)  # (out, in)
        norm = V.norm(dim=1, keepdim=True)  # (out, 1)
        W = self.lora_magnitude_vector[:, None] * V / norm  # (out, in)
        return F.linear(x, W, self.bias)

    def forward(self, x):
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # the norm stays in fp32
                return self.forward(x.to(torch.get_autocast_dtype(kind)))

        row = self.magnitude_axis == "row"
        if self.method.magnitude:
            norm = self.direction_norm()  # (out,) or (in,)
            norm = norm if self.norm_grad == "exact" else norm.detach()
            # ratio·y is computed as y + (ratio - 1)·y: near 1, bf16 has steps of 0.8 %, too coarse
            # for ratio, but not for ratio - 1.
            change = self.lora_magnitude_vector / norm - 1
            if not row:
                x = torch.addcmul(x, x, change.to(x.dtype))

        rows = x.reshape(-1, self.in_features)  # (N, in)
        z = F.linear(self.dropout(rows), self.lora_A.to(x.dtype))  # (N, rank)
        if self.method.singular_values:
            z = z * self.method.singular_values(self.lora_lambda).to(x.dtype)

        sB = (self.scaling * self.lora_B).to(x.dtype)  # (out, rank)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not (self.method.magnitude and row):
            y = quantized.linear(rows, self.weight, bias).addmm_(z, sB.T)  # (N, out), in place
        else:
            y = rescale(quantized.linear(rows, self.weight).addmm_(z, sB.T), change)
            # The bias comes last: in bf16, a large one would hide y from the gradient of m.
            y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], self.out_features)

    def direction_norm(self):
        """‖W0 + s·B·A‖ of each row, (out,), or column, (in,), without building the product."""
        A, sB = self.lora_A, self.scaling * self.lora_B
        dtype, squares = quantized.float_dtype(self.weight), self.weight_squares
        if self.weight.requires_grad:  # full fine-tuning beside the adapter
            squares = self.squared_norms()
        elif not torch.compiler.is_compiling() and self.measured != self.weight_version():
            self.measure()
            squares = self.weight_squares

        if self.magnitude_axis == "row":
            W0A = quantized.linear(A.to(dtype), self.weight).T.to(A.dtype)  # (out, rank)
            squares = squares + ((2 * W0A + sB @ (A @ A.T)) * sB).sum(dim=1)
        else:
            BW0 = quantized.transposed(sB.T.to(dtype), self.weight).to(A.dtype)  # (rank, in)
            squares = squares + ((2 * BW0 + (sB.T @ sB) @ A) * A).sum(dim=0)
        return squares.clamp_min(1e-24).sqrt()  # a row of zeros must not divide by 0

    @torch.no_grad()
    def folded_B(self):
        """B with BiLoRA's λ folded into its columns, so that LoRA with this B is the same layer."""
        if self.method.singular_values is None:
            return self.lora_B
        return self.lora_B * self.method.singular_values(self.lora_lambda)

    @torch.no_grad()
    def merged_weight(self):
        """W' as one matrix, (out × in), in the adapter's precision; for merging, not training."""
        W = quantized.dequantize(self.weight, self.lora_A.dtype)
        W = W + self.scaling * (self.folded_B() @ self.lora_A)
        if not self.method.magnitude:
            return W
        dim = 1 if self.magnitude_axis == "row" else 0
        norm = torch.linalg.vector_norm(W, dim=dim).clamp_min(1e-12)
        ratio = self.lora_magnitude_vector / norm
        return ratio[:, None] * W if dim == 1 else W * ratio


# ----------------------------------------------------------------------- adapting a model


def is_linear(layer):
    """Whether a layer computes x·Wᵀ + b: an nn.Linear, or transformers' Conv1D, which keeps Wᵀ."""
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def as_linear(layer):
    """A layer for which is_linear holds as an nn.Linear that shares its weight and bias."""
    if isinstance(layer, nn.Linear):
        return layer
    linear = nn.Linear(*layer.weight.shape, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.data.T), layer.bias
    return linear.train(layer.training)


def linear_layers(model, targets):
    """
    The model's linear layers that match targets, {name: layer}. A target is a layer's name or its
    end: "q_proj" matches every "….q_proj". Raises ValueError for a target without a match.
    """
    linears = {name: layer for name, layer in model.named_modules() if is_linear(layer)}
    chosen = {}
    for target in targets:
        found = [name for name in linears if name and f".{name}".endswith(f".{target}")]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(
                f"target module {target!r} matches no linear layer; there are: {', '.join(ends)}"
            )
        chosen |= {name: linears[name] for name in found}
    return chosen


def replace_linear_with_bidora(
    module,
    rank=8,
    lora_alpha=16.0,
    lora_dropout=0.0,
    target_modules=ATTENTION,
    method="bidora",
    **options,
):
    """
    Replace, in place, the linear layers that match target_modules (as in linear_layers) by
    BiDoRALinear layers that share their weights; return module. options: norm_grad, magnitude_axis,
    init.

    Raises ValueError when a target matches no linear layer, or when a layer is adapted already,
    shares its weight with another layer, is smaller than the rank, or is read by its owner without
    being called.
    """
    chosen = linear_layers(module, target_modules)
    for name, layer in chosen.items():
        sizes = as_linear(layer).in_features, as_linear(layer).out_features
        if not 1 <= rank <= min(sizes):
            raise ValueError(
                f"{name}: rank {rank} does not fit a layer of {sizes[0]} inputs and {sizes[1]} "
                f"outputs: choose 1 to {min(sizes)}"
            )
    return adapt(
        module, {name: (rank, lora_alpha) for name in chosen}, lora_dropout, method, **options
    )


def adapt(module, chosen, lora_dropout, method, **options):
    """
    Replace layers, {name: (rank, lora_alpha)}, by BiDoRALinear ones: all, or after an error none.
    """
    quantized.complete(module)
    owners = list(module.named_parameters(remove_duplicate=False))
    adapted = {}
    for name, (rank, lora_alpha) in chosen.items():
        layer = module.get_submodule(name)
        if isinstance(layer, BiDoRALinear):
            raise ValueError(f"{name} has an adapter already")
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"{name}: nn.MultiheadAttention reads this layer's weight without calling the "
                f"layer, so an adapter would have no effect: leave it out of the target modules"
            )
        for owner, parameter in owners:
            if parameter is layer.weight and owner != f"{name}.weight":
                raise ValueError(
                    f"{name} shares its weight with {owner}, so it can't be adapted by itself"
                )

        linear = as_linear(layer)
        sizes = linear.in_features, linear.out_features, rank, lora_alpha, lora_dropout
        try:
            new = BiDoRALinear(*sizes, linear.bias is not None, method, linear=linear, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        new.transposed = linear is not layer
        adapted[name] = new.train(layer.training)
        quantized.return_freed_memory(new.weight.device)  # of the norm's fp32 copy

    for name, layer in adapted.items():
        module.set_submodule(name, layer)
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # no fast path, which reads weights in eval mode
    return module


# ------------------------------------------------------------------------ who trains what


def adapter_layers(model):
    """The model's BiDoRALinear layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BiDoRALinear)}


def upper_parameters(model):
    """The parameters that learn on val data: BiDoRA's magnitudes, BiLoRA's λ, unless frozen."""
    uppers = [layer.upper for layer in adapter_layers(model).values()]
    return [parameter for parameter in uppers if parameter is not None and parameter.requires_grad]


def lower_parameters(model):
    """The parameters that learn on train data: all trainable ones except the upper ones."""
    upper = {id(parameter) for parameter in upper_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in upper]


def start_retrain(model, fresh=True):
    """
    Phase 3: fix what the upper level trained, and every magnitude. fresh: reset directions; what is
    trained beside them, such as a head, goes on.
    """
    for layer in adapter_layers(model).values():
        for parameter in (layer.upper, layer.lora_magnitude_vector):
            if parameter is not None:
                parameter.requires_grad_(False)
        if fresh:
            layer.reset_direction()


# --------------------------------------------------------------------- merge, save and load


def merge(model):
    """
    Fold every adapter into its weight, in place, so that ordinary linear layers remain. Returns
    model.

    The merged weight has the base weight's dtype: over a bf16 base it is rounded once. A quantised
    base is first dequantised, in all its layers, and a line is printed that says so: an adapter
    fits the weights that it was trained over, not those before quantisation.
    """
    quantized.complete(model)
    kinds = set()
    for name, layer in list(model.named_modules()):
        adapted = isinstance(layer, BiDoRALinear)
        if not isinstance(layer, nn.Linear) or not (adapted or quantized.kind_of(layer.weight)):
            continue

        kinds.add(quantized.kind_of(layer.weight))
        dtype = quantized.float_dtype(layer.weight)
        weight = (
            layer.merged_weight().to(dtype)
            if adapted
            else quantized.dequantize(layer.weight, dtype)
        )
        model.set_submodule(name, ordinary_layer(layer, weight))

    if kinds := sorted(filter(None, kinds)):
        packed, dtype = " and ".join(kinds), str(dtype).removeprefix("torch.")
        print(f"the {packed} base was dequantised to {dtype} to merge the adapter into it")
        if getattr(model, "hf_quantizer", None):  # transformers must not take it for quantised
            model.hf_quantizer.remove_quantization_config(model)
            model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    return model


def ordinary_layer(layer, weight):
    """The nn.Linear, or Conv1D if that is what an adapter replaced, of a weight (out × in)."""
    if getattr(layer, "transposed", False):
        from transformers.pytorch_utils import Conv1D

        new, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
    else:
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        new = nn.Linear(*sizes, device="meta")
    new.weight, new.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return new.train(layer.training)


def save_adapter(model, folder, base_model=""):
    """
    Write adapter_model.safetensors and adapter_config.json as PEFT does, each atomically.

    base_model: the name, name@revision or folder of the base, written into the config. For PEFT, a
    BiDoRA adapter is a DoRA adapter; BiLoRA's λ is folded into B. Modules that are trained beside
    the adapters, such as a classifier, are saved whole. Raises ValueError for a model without
    adapters, with several kinds, or with trained parameters that the format can't hold; OSError
    when the folder can't be written.
    """
    from support.weights import peft_format  # here, so that the rest of this file works alone

    peft_format.write(folder, model, adapter_layers(model), base_model)


def load_adapter(model, folder):
    """
    Load an adapter that save_adapter or PEFT wrote; a model without adapters is given them. Returns
    model.

    The layers and their ranks are read from the tensors, so any pattern of ranks or targets loads.
    Raises FileNotFoundError for a missing file, ValueError for a damaged one, for one that does not
    fit the model, and for variants of LoRA that these layers don't compute.
    """
    from support.weights import peft_format

    found = peft_format.read(folder, peft_format.state_of(model))
    if not adapter_layers(model):
        linears = {name for name, layer in model.named_modules() if is_linear(layer)}
        if missing := sorted(found.tensors.keys() - linears):
            raise ValueError(
                f"{folder}: the adapter does not fit the model: no linear layer {missing[0]}"
            )

        model.requires_grad_(False)
        method = "dora" if found.magnitude else "lora"
        adapt(model, found.sizes, found.dropout, method, magnitude_axis=found.axis)
    peft_format.copy_into(model, adapter_layers(model), found)
    return model


def __getattr__(name):
    """The other names of the `bidora` package on PyPI (docs/coming-from.md)."""
    try:
        from support.weights import bidora_package
    except ImportError:  # copied alone into another project
        bidora_package = None
    if name.startswith("__") or not hasattr(bidora_package, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(bidora_package, name)
