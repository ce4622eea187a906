#!/usr/bin/env bash
# Libraries that wrap an optimizer (bilevel, sharded, differentiable ones) often rebuild it as
# type(optimizer)(parameters, **optimizer.defaults).
# Expected: this works for each optimizer of torch, as it did for years.
# Seen (torch 2.13.0): it works for fourteen of them and not for AdamW, whose defaults hold
#   'decoupled_weight_decay', which its own constructor does not take: a TypeError. Adam takes it.
# What follows: betty-ml 0.2.1, which rebuilds so, can't take torch's AdamW with this torch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch

weights, works, fails = [torch.nn.Parameter(torch.ones(3, 3))], [], []
for name, kind in sorted(vars(torch.optim).items()):
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        if kind is torch.optim.Optimizer:
            continue
        optimizer = kind(weights, lr=0.1)
        try:
            kind(weights, **optimizer.defaults)
            works.append(name)
        except TypeError as error:
            fails.append(name)
            print(error)
print("rebuilt from its defaults:", ", ".join(works))
print("not:", ", ".join(fails))
assert fails == ["AdamW"] and len(works) == 14, "this has changed"
EOF
