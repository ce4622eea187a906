#!/usr/bin/env bash
# torch's fused optimizers on a CPU, given a gradient whose memory lies in another order than its
# parameter's: what torch.autograd.grad returns for a factor that was used transposed, put into .grad
# by hand, as one does with a hypergradient.
# Expected: the step moves each number along its own gradient, as without fused.
# Seen (torch 2.13.0): AdamW and SGD with fused=True read the gradient in memory order, so numbers move
#   along others' gradients. Nothing is said. backward() itself copies gradients into the right order.
# What follows: before a step, give .grad the parameter's order (g.contiguous() for usual parameters).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch


def against_its_gradient(optimizer, fused, contiguous):
    """Whether a first step from 0 moves every number against its own gradient."""
    torch.manual_seed(0)
    factor = torch.zeros(3, 4, requires_grad=True)
    loss = (torch.randn(4, 3) * factor.T).sum()
    [g] = torch.autograd.grad(loss, [factor])
    factor.grad = g.contiguous() if contiguous else g
    optimizer([factor], lr=0.1, weight_decay=0, fused=fused).step()
    return torch.equal(factor.sign(), -g.sign())


for optimizer in (torch.optim.AdamW, torch.optim.SGD):
    plain, fused, mended = (
        against_its_gradient(optimizer, *case)
        for case in ((False, False), (True, False), (True, True))
    )
    print(f"{optimizer.__name__}: right without fused {plain}, fused {fused}, copied {mended}")
    assert (plain, fused, mended) == (True, False, True), "this has changed"
PY
