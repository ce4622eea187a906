"""
Frozen weights in 4 or 8 bits, packed by bitsandbytes, of which no dequantised copy is ever kept.

    nf4, fp4    each 64 weights share a scale, and the scales are quantised in turn      QLoRA, arXiv 2305.14314, section 3
    int8        each row shares a scale, its largest absolute value                      LLM.int8, arXiv 2208.07339, section 2.1

A product x·Wᵀ dequantises W block by block of rows and drops each block. So do its first and second derivatives: they are
products with W and Wᵀ again. Activations are not quantised, in int8 neither, so that derivatives are those of the function.
"""

import contextlib
import ctypes
import logging
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

KINDS = ("nf4", "fp4", "int8")


def pack(weight, kind):
    """
    A weight (out × in) as bitsandbytes' Params4bit or Int8Params, on the weight's device.

    Raises ValueError for an unknown kind, a weight that is not floating, or when bitsandbytes is not installed.
    """
    if kind not in KINDS or not weight.is_floating_point():
        raise ValueError(
            f"unknown quantisation {kind!r} of a {weight.dtype} weight: choose {', '.join(KINDS)}"
        )
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns of an optional kernel that is not used here
    try:
        from bitsandbytes.nn import Int8Params, Params4bit
    except ImportError as error:
        raise ValueError(
            f"quantisation needs bitsandbytes ({error}): pip install bitsandbytes"
        ) from None
    if kind == "int8":
        packed = Int8Params(weight, requires_grad=False)._quantize(weight.device)
        packed.float_dtype = weight.dtype
    else:
        packed = Params4bit(weight, requires_grad=False, quant_type=kind)._quantize(weight.device)
    if weight.device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            # glibc keeps the temporary copies that packing makes: 400 MB for SmolLM2, whose packed weights take 110. This gives them back.
            ctypes.CDLL(None).malloc_trim(0)
    return packed


def kind_of(weight):
    """'nf4', 'fp4', 'int8', or None for an ordinary weight."""
    if getattr(weight, "quant_state", None) is not None:
        return weight.quant_state.quant_type
    return "int8" if getattr(weight, "SCB", None) is not None else None


def float_dtype(weight):
    """The dtype that the weight has, or had before it was packed."""
    if getattr(weight, "quant_state", None) is not None:
        return weight.quant_state.dtype
    return getattr(
        weight, "float_dtype", weight.dtype if weight.is_floating_point() else torch.float32
    )


def blocks(weight, dtype):
    """Yield (start, stop, rows start … stop of the weight in dtype); an ordinary weight is one block."""
    kind = kind_of(weight)
    if kind is None:
        yield 0, weight.size(0), weight.to(dtype)
    elif kind == "int8":
        for start in range(0, weight.size(0), 1024):
            stop = min(start + 1024, weight.size(0))
            yield (
                start,
                stop,
                weight.data[start:stop].to(dtype) * (weight.SCB[start:stop, None] / 127).to(dtype),
            )
    else:
        from bitsandbytes.functional import (
            QuantState,
            dequantize_4bit,
            dequantize_blockwise,
        )

        state, bytes_ = weight.quant_state, weight.data.view(torch.uint8).view(-1)
        scales = (
            dequantize_blockwise(state.absmax, state.state2) + state.offset
            if state.nested
            else state.absmax
        )
        rows, columns = state.shape
        step = max(
            1024, state.blocksize
        )  # rows, a multiple of the block size, so that no block is cut
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            a, b = start * columns, stop * columns
            # Laid out by scales, not by rows: where a row ends between two scales, bitsandbytes 0.50 errs on CPUs.
            count, rest = divmod(b - a, state.blocksize)
            part = QuantState(
                scales[a // state.blocksize : -(-b // state.blocksize)],
                torch.Size((1, b - a) if rest else (count, state.blocksize)),
                state.code,
                state.blocksize,
                state.quant_type,
                dtype,
            )
            yield (
                start,
                stop,
                dequantize_4bit(bytes_[a // 2 : -(-b // 2), None], part).view(
                    stop - start, columns
                ),
            )


def dequantize(weight, dtype):
    """The whole weight as an ordinary tensor, (out × in). For merging and analysis, not for training."""
    return torch.cat([rows for _, _, rows in blocks(weight, dtype)])


def nbytes(model):
    """Bytes of a model's weights, packed ones with their scales; a matrix that is shared counts once."""
    total = 0
    for weight in {parameter.data_ptr(): parameter for parameter in model.parameters()}.values():
        total += weight.nbytes
        if kind_of(weight) == "int8":
            total += weight.SCB.nbytes
        elif kind_of(weight):
            state = weight.quant_state
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


class Product(torch.autograd.Function):
    """x·Wᵀ, (..., in) -> (..., out), or with transpose g·W, (..., out) -> (..., in); each is the other's derivative."""

    @staticmethod
    def forward(ctx, x, weight, transpose):
        ctx.weight, ctx.transpose = weight, transpose
        pieces = ((start, stop, rows) for start, stop, rows in blocks(weight, x.dtype))
        if transpose:
            return sum(x[..., start:stop] @ rows for start, stop, rows in pieces)
        return torch.cat([x @ rows.T for _, _, rows in pieces], dim=-1)

    @staticmethod
    def backward(ctx, g):
        return Product.apply(g, ctx.weight, not ctx.transpose), None, None


def linear(x, weight, bias=None):
    """F.linear for a weight of any kind."""
    if kind_of(weight) is None:
        return F.linear(x, weight, bias)
    y = Product.apply(x, weight, False)
    return y if bias is None else y + bias


def transposed(g, weight):
    """g·W for a weight of any kind, (..., out) -> (..., in)."""
    return g @ weight if kind_of(weight) is None else Product.apply(g, weight, True)


class QuantizedLinear(nn.Linear):
    """A linear layer with a packed weight."""

    def __init__(self, in_features, out_features, bias, packed):
        super().__init__(in_features, out_features, bias, device="meta")
        self.weight = packed

    def forward(self, x):
        return linear(x, self.weight, self.bias)
