"""
Regularisers that keep a layer's directions apart. The lower loss adds gram_weight times one.

    BiDoRA    ‖C - I‖, C the cosines between the directions (the BiDoRA authors' code, for columns)
    BiLoRA    ‖BᵀB - I‖² + ‖A·Aᵀ - I‖² (arXiv 2403.13037, section 3.2)
"""

import torch

from support.weights.quantized import blocks, float_dtype, linear, transposed


def regulariser(layers):
    """The mean regulariser of an iterable of BiDoRALinear, a scalar."""
    each = [cosines_apart(x) if x.method.magnitude else orthonormal(x) for x in layers]
    return sum(each) / len(each)


def orthonormal(layer):
    """‖BᵀB - I‖² + ‖A·Aᵀ - I‖², a scalar."""
    A, B = layer.lora_A, layer.lora_B
    eye = torch.eye(layer.rank, device=A.device, dtype=A.dtype)
    return (B.T @ B - eye).square().sum() + (A @ A.T - eye).square().sum()


def cosines_apart(layer):
    """
    ‖C - I‖, a scalar. C holds the cosines between the rows (or columns) of W0 + s·B·A. Unless W0
    trains, the layer keeps W0·W0ᵀ (or W0ᵀ·W0), so that later calls need only rank-r products.
    """
    A, sB = layer.factors()
    weight, dtype = layer.weight, float_dtype(layer.weight)
    row = layer.magnitude_axis == "row"
    base = layer.weight_gram
    if base is None or weight.requires_grad:
        base = weight_gram(weight, A.dtype, row)
    if not weight.requires_grad:
        layer.weight_gram = base

    if row:
        low = linear(A.to(dtype), weight).T.to(A.dtype) @ sB.T  # W0·Aᵀ·(sB)ᵀ
        gram = base + low + low.T + sB @ (A @ A.T) @ sB.T
    else:
        low = transposed(sB.T.to(dtype), weight).to(A.dtype).T @ A  # W0ᵀ·(sB)·A
        gram = base + low + low.T + A.T @ (sB.T @ sB) @ A

    norm = gram.diagonal().clamp_min(1e-24).sqrt()
    cosines = gram / (norm[:, None] * norm)
    eye = torch.eye(len(norm), device=A.device, dtype=A.dtype)
    return (cosines - eye).square().sum().clamp_min(1e-24).sqrt()


def weight_gram(weight, dtype, row):
    """W0·W0ᵀ, (out × out), or W0ᵀ·W0, (in × in), of a weight of any kind."""
    pieces = (rows for _, _, rows in blocks(weight, dtype))
    if not row:
        return sum(rows.T @ rows for rows in pieces)
    return torch.cat([linear(rows, weight) for rows in pieces])
