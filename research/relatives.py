"""
Relatives of LoRA and DoRA as entries of METHODS, each by the factors of its update ΔW = s·B·A:

    vera     one pair of random A and B for all layers of a shape stays; vectors b and d train:
             ΔW = diag(b)·B·diag(d)·A (arXiv 2310.11454, section 3.1)
    dvora    VeRA's update under DoRA's magnitude (2402.09353); bidvora: under BiDoRA's
    pissa    A and B start as W0's principal components A0, B0 (2404.02948): ΔW = s·(B·A - B0·A0),
             which is B·A beside W0's residual
    pidora   PiSSA's update under DoRA's magnitude; bipidora: under BiDoRA's

    python -m research.relatives --config=small.py --method=dvora      as train.py

An adapter's file holds the factors, over the unchanged W0: sample.py and PEFT read it as LoRA's or
DoRA's (of PiSSA with twice the rank).
"""

import functools
import sys

import torch
import torch.nn as nn

import bidora
from bidora import Method
from support.weights import quantized
from train import main


@functools.cache
def frozen_factors(rank, inputs, outputs, device, dtype):
    """VeRA's A, (rank, in), and B, (out, rank), of all layers of one shape."""
    generator = torch.Generator(device).manual_seed(0)
    A = torch.empty(rank, inputs, device=device, dtype=dtype)
    B = torch.empty(outputs, rank, device=device, dtype=dtype)
    for factor in (A, B):
        nn.init.kaiming_uniform_(factor, generator=generator)
    return A, B


class VeRA(Method):
    def build(self, layer, **new):
        layer.scaling = 1  # whatever alpha is
        A, B = frozen_factors(layer.rank, layer.in_features, layer.out_features, **new)
        layer.register_buffer("lora_A", A, persistent=False)
        layer.register_buffer("lora_B", B, persistent=False)
        layer.vera_d = nn.Parameter(torch.empty(layer.rank, **new))
        layer.vera_b = nn.Parameter(torch.empty(layer.out_features, **new))

    def start(self, layer):
        nn.init.constant_(layer.vera_d, 0.1)
        nn.init.zeros_(layer.vera_b)  # so that ΔW = 0

    def factors(self, layer):
        return layer.lora_A, layer.vera_b[:, None] * layer.lora_B * layer.vera_d


class PiSSA(Method):
    def build(self, layer, **new):
        super().build(layer, **new)
        W0 = quantized.dequantize(layer.weight.detach(), new["dtype"])
        U, S, V = torch.linalg.svd(W0, full_matrices=False)  # W0 = U·diag(S)·V
        root = (S[: layer.rank] / layer.scaling).sqrt()
        layer.register_buffer("first_A", root[:, None] * V[: layer.rank], persistent=False)
        layer.register_buffer("first_B", U[:, : layer.rank] * root, persistent=False)

    @torch.no_grad()
    def start(self, layer):
        layer.lora_A.copy_(layer.first_A)
        layer.lora_B.copy_(layer.first_B)

    def factors(self, layer):
        A = torch.cat((layer.lora_A, layer.first_A))
        return A, torch.cat((layer.lora_B, -layer.first_B), dim=1)


UPPER = (True, "lora_magnitude_vector")  # a magnitude, and it learns at the upper level
METHODS = {
    "vera": VeRA(),
    "dvora": VeRA(True),
    "bidvora": VeRA(*UPPER),
    "pissa": PiSSA(),
    "pidora": PiSSA(True),
    "bipidora": PiSSA(*UPPER),
}
bidora.METHODS |= METHODS

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
