#!/usr/bin/env bash
# torchopt has differentiable optimizers, whose hypergradients one checks in float64.
# Expected: in float64 its Adam equals torch's Adam to about 1e-15, as its SGD, RMSprop and RAdam do.
# Seen (torchopt 0.7.3, torch 2.13.0): after four steps they differ by 3e-6 at a rate of 0.1. The bias
#   correction 1 - beta**count has an integer tensor for count, and a float to the power of an integer
#   tensor is float32; Adamax and AdamW are as coarse.
# What follows: a tolerance below 1e-5 can't be had beside this Adam, whatever the dtype.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 torchopt==0.7.3
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
import torchopt


def gap(name, kind):
    """The largest difference after four steps on a sum of fourth powers, in float64."""
    torch.manual_seed(0)
    ours = (torch.randn(5, dtype=torch.float64, requires_grad=True),)
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    plain, functional = kind(theirs, lr=0.1), getattr(torchopt, name)(lr=0.1)
    state = functional.init(ours)
    for _ in range(4):
        plain.zero_grad()
        (theirs[0] ** 4).sum().backward()
        plain.step()
        g = torch.autograd.grad((ours[0] ** 4).sum(), ours)
        updates, state = functional.update(g, state, params=ours, inplace=False)
        ours = torchopt.apply_updates(ours, updates, inplace=False)
        ours = tuple(x.detach().requires_grad_() for x in ours)
    return (ours[0] - theirs[0]).abs().max().item()


optim = torch.optim
fine = {"sgd": optim.SGD, "rmsprop": optim.RMSprop, "radam": optim.RAdam}
coarse = {"adam": optim.Adam, "adamw": optim.AdamW, "adamax": optim.Adamax}
for name, kind in (fine | coarse).items():
    found = gap(name, kind)
    print(f"{name:8} differs from torch's by {found:.1e}")
    assert (found > 1e-8) == (name in coarse), "this has changed"
print("1 - 0.999 ** an integer tensor is", (1 - pow(0.999, torch.tensor(3))).dtype)
EOF
