"""
Frozen weights in 4 or 8 bits, packed by bitsandbytes; no dequantised copy is ever kept.

    nf4, fp4    64 weights share a scale, itself quantised      QLoRA, arXiv 2305.14314, section 3
    int8        a row shares a scale, its largest |weight|      LLM.int8, 2208.07339, section 2.1

A product x·Wᵀ dequantises W one block of rows at a time. Its first and second derivatives are
products with W and Wᵀ again. They are exact, since activations are not quantised.
"""

import contextlib
import ctypes
import logging
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

KINDS = ("nf4", "fp4", "int8")
BLOCK_ROWS = 1024  # rows that are dequantised at a time


def pack(weight, quantize):
    """A weight (out, in) as bitsandbytes' Params4bit or Int8Params. Raises ValueError."""
    if quantize not in KINDS or not weight.is_floating_point():
        problem = f"can't pack a {weight.dtype} weight by {quantize!r}"
        raise ValueError(f"{problem}: choose {', '.join(KINDS)}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a kernel that is not used here
    try:
        from bitsandbytes.nn import Int8Params, Params4bit
    except ImportError as error:
        raise ValueError(f"quantisation needs bitsandbytes ({error}): pip install it") from None

    if quantize == "int8":
        packed = Int8Params(weight, requires_grad=False)._quantize(weight.device)
        packed.float_dtype = weight.dtype
    else:
        packed = Params4bit(weight, requires_grad=False, quant_type=quantize)
        packed = packed._quantize(weight.device)
    return_freed_memory(weight.device)
    return packed


def return_freed_memory(device):
    """Make glibc return the memory of temporary copies: packing SmolLM2 would leave 400 MB."""
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def kind_of(weight):
    """'nf4', 'fp4', 'int8', or None for an ordinary weight."""
    if getattr(weight, "quant_state", None) is not None:
        return weight.quant_state.quant_type
    return "int8" if getattr(weight, "SCB", None) is not None else None


def float_dtype(weight):
    """A weight's dtype, or a packed weight's dtype before packing."""
    if getattr(weight, "quant_state", None) is not None:
        return weight.quant_state.dtype
    default = weight.dtype if weight.is_floating_point() else torch.float32
    return getattr(weight, "float_dtype", default)


def complete(module):
    """
    Make the packed weights of a transformers model readable, in place: undo what bitsandbytes did
    when their layers were called. int8's scales may have moved to the layer's `state`. A weight's
    dtype before packing is that of the model's other parameters.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for layer in module.modules():
        scales = getattr(getattr(layer, "state", None), "SCB", None)
        if scales is not None:
            layer.weight.SCB = scales
        if isinstance(layer, nn.Linear) and kind_of(layer.weight) == "int8":
            layer.weight.float_dtype = getattr(layer.weight, "float_dtype", dtype)
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            undo_layout(layer.weight, state)


def undo_layout(weight, state):
    """
    Undo the layout that bitsandbytes gives a 4-bit weight at the first call in eval mode, on CPUs
    with bf16 in AVX-512. Its scales were rounded to bf16, and stay so.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state.original_nested = False  # else it would quantise the scales again
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.float().flatten()


def blocks(weight, dtype):
    """Yield (start, stop, the weight's rows from start to stop in dtype, (stop - start, in))."""
    if kind_of(weight) is None:
        yield 0, weight.size(0), weight.to(dtype)
    elif kind_of(weight) == "int8":
        for start in range(0, weight.size(0), BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, weight.size(0))
            rows = weight.data[start:stop].float().mul_(weight.SCB[start:stop, None] / 127)
            yield start, stop, rows.to(dtype)
    else:
        yield from blocks_of_4_bits(weight, dtype)


def blocks_of_4_bits(weight, dtype):
    """`blocks` for nf4 and fp4."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state, packed_bytes = weight.quant_state, weight.data.view(torch.uint8).view(-1)
    scales = state.absmax
    if state.nested:  # the scales are quantised too
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset

    rows, columns = state.shape
    group = state.blocksize  # this many weights share a scale; no block of rows may cut a group
    step = max(BLOCK_ROWS, group)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        a, b = start * columns, stop * columns
        # The shape is (groups, weights in a group), since bitsandbytes 0.50 gives wrong numbers on
        # CPUs where a row ends inside a group.
        count, rest = divmod(b - a, group)
        shape = torch.Size((1, b - a) if rest else (count, group))
        own_scales = scales[a // group : -(-b // group)]
        own_state = QuantState(own_scales, shape, state.code, group, state.quant_type, dtype)
        values = dequantize_4bit(packed_bytes[a // 2 : -(-b // 2), None], own_state)
        yield start, stop, values.view(stop - start, columns)


def dequantize(weight, dtype):
    """The whole weight as an ordinary tensor, (out, in): for merging and analysis."""
    return torch.cat([rows for _, _, rows in blocks(weight, dtype)])


def unpack(model, kinds):
    """Dequantise all of a model's linear layers that are packed, in place, and say so."""
    dtype = float_dtype(next(model.parameters()))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and kind_of(layer.weight):
            new = nn.Linear(layer.in_features, layer.out_features, device="meta")
            weight = dequantize(layer.weight, float_dtype(layer.weight))
            new.weight, new.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            model.set_submodule(name, new.train(layer.training))
    packed, dtype = " and ".join(sorted(kinds)), str(dtype).removeprefix("torch.")
    print(f"the {packed} base was dequantised to {dtype} to merge the adapter into it")
    if getattr(model, "hf_quantizer", None):  # transformers must not take it for quantised
        model.hf_quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def nbytes(model):
    """Bytes of a model's weights and their scales. A matrix that modules share counts once."""
    total = 0
    for weight in {parameter.data_ptr(): parameter for parameter in model.parameters()}.values():
        total += weight.nbytes
        if kind_of(weight) == "int8":
            total += weight.SCB.nbytes
        elif kind_of(weight):
            state = weight.quant_state
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


class Products(torch.autograd.Function):
    """
    x·Wᵀ of each x, (N, in) -> (N, out), or with transpose x·W. Either is the other's derivative.
    Each block of W is dequantised once for all x.
    """

    @staticmethod
    def forward(ctx, weight, transpose, *xs):
        ctx.weight, ctx.transpose = weight, transpose
        ctx.set_materialize_grads(False)
        parts = [[] for _ in xs]
        for i, j, rows in blocks(weight, xs[0].dtype):
            for x, products in zip(xs, parts):
                if not transpose:
                    products.append(x @ rows.T)
                elif products:
                    products[0].addmm_(x[:, i:j], rows)
                else:
                    products.append(x[:, i:j] @ rows)
        return tuple(p[0] if len(p) == 1 else torch.cat(p, dim=1) for p in parts)

    @staticmethod
    def backward(ctx, *gs):
        needed = [i for i, g in enumerate(gs) if g is not None and ctx.needs_input_grad[i + 2]]
        products = Products.apply(ctx.weight, not ctx.transpose, *(gs[i] for i in needed))
        return None, None, *map(dict(zip(needed, products)).get, range(len(gs)))


def linear(x, weight, bias=None):
    """x·Wᵀ + bias in x's dtype for a weight of any kind and dtype, (..., in) -> (..., out)."""
    if kind_of(weight) is None:
        return F.linear(x, weight.to(x.dtype), bias)
    [y] = Products.apply(weight, False, x.reshape(-1, x.size(-1)))
    return (y if bias is None else y + bias).unflatten(0, x.shape[:-1])


def transposed(g, weight):
    """g·W for a weight of any kind: (rank, out) -> (rank, in)."""
    return g @ weight if kind_of(weight) is None else Products.apply(weight, True, g)[0]


class QuantizedLinear(nn.Linear):
    """A linear layer with a packed weight."""

    def __init__(self, in_features, out_features, bias, packed):
        super().__init__(in_features, out_features, bias, device="meta")
        self.weight = packed

    def forward(self, x):
        return linear(x, self.weight, self.bias)
