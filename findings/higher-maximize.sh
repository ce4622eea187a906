#!/usr/bin/env bash
# higher turns a torch optimizer into a differentiable one, for hypergradients through its steps.
# Expected: three differentiable steps equal torch's own, or a setting that higher does not know is
#   refused, as a whole optimizer is ("Optimizer type … not supported by higher yet").
# Seen (higher 0.2.1, torch 2.13.0): SGD and Adam agree to 1e-6, but maximize=True is ignored, so
#   that the inner loop descends where torch ascends, and decoupled_weight_decay=True is ignored, so
#   that Adam decays weights through its moments. Nothing is said.
# What follows: after a move to a newer torch, compare one differentiable step with a plain one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 higher==0.2.1
"$work/venv/bin/python" -W ignore - <<'EOF'
import higher
import torch


def gap(kind, **options):
    """The largest difference after three steps, differentiable and plain."""
    torch.manual_seed(0)
    x, model, plain = torch.randn(5, 3), torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    plain.load_state_dict(model.state_dict())
    optimizer = kind(plain.parameters(), lr=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        plain(x).square().mean().backward()
        optimizer.step()
    inner = kind(model.parameters(), lr=0.1, **options)
    with higher.innerloop_ctx(model, inner) as (copy, differentiable):
        for _ in range(3):
            differentiable.step(copy(x).square().mean())
        pairs = zip(copy.parameters(), plain.parameters())
        return max((a - b).abs().max().item() for a, b in pairs)


cases = [
    (torch.optim.SGD, {}, True),
    (torch.optim.Adam, {"weight_decay": 0.5}, True),
    (torch.optim.SGD, {"maximize": True}, False),
    (torch.optim.Adam, {"maximize": True}, False),
    (torch.optim.Adam, {"weight_decay": 0.5, "decoupled_weight_decay": True}, False),
]
for kind, options, agrees in cases:
    found = gap(kind, **options)
    print(f"{kind.__name__:5} {options}: differs by {found:.1e}")
    assert (found < 1e-6) == agrees, "this has changed"
EOF
