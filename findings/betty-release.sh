#!/usr/bin/env bash
# `pip install betty-ml`, without a version, on two Pythons: a bilevel library that papers name so.
# Expected: the same release, the newest, 0.2.1; or a word that a newer one does not fit this Python.
# Seen (pip 24.0): for Python 3.10 and older 0.2.1; for 3.11 and later, which 0.2.x excludes, 0.1.1.
#   Its finite difference, `darts`, never goes back, so that each upper-level step moves the lower
#   level's weights by 0.01, down the upper loss; that of 0.2.1 goes back. Also 0.2.1 rebuilds the
#   lower level's optimizer over all parameters of the module, at the optimizer's default rate.
# What follows: what a program computes depends on the Python that its authors had. Ask pip for that
#   one, with --python-version.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pip==24.0
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
for python in 3.7 3.10 3.11 3.12; do
    "$work/venv/bin/pip" download --quiet --no-deps --only-binary=:all: --python-version "$python" \
        --dest "$work/$python" betty-ml 2> /dev/null
    echo "Python $python: $(ls "$work/$python")"
done
[ "$(ls "$work/3.7" "$work/3.10" | grep -c 'betty_ml-0.2.1')" = 2 ]
[ "$(ls "$work/3.11" "$work/3.12" | grep -c 'betty_ml-0.1.1')" = 2 ]

for python in 3.10 3.11; do
    "$work/venv/bin/python" -m zipfile -e "$work/$python"/*.whl "$work/betty-$python"
    PYTHONPATH="$work/betty-$python" "$work/venv/bin/python" -W ignore - <<'EOF'
import importlib.metadata

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem


class Value(torch.nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.v = torch.nn.ParameterList(torch.tensor([x], dtype=torch.float64) for x in values)

    def forward(self):
        return self.v[0] * self.v[-1]


class Inner(ImplicitProblem):
    def training_step(self, batch):
        return (self.module() - self.outer.module()).square().sum()


class Outer(ImplicitProblem):
    def training_step(self, batch):
        return (self.inner.module() - 3).square().sum() + 0 * self.module().sum()


release = importlib.metadata.version("betty-ml")
old = {"device": torch.device("cpu")} if release == "0.1.1" else {}
config = Config(type="darts", retain_graph=True)
options = dict(config=config, train_data_loader=[torch.zeros(1)], **old)
lower, upper = Value(1.0, 1.0), Value(2.0)
given = torch.optim.SGD([{"params": [lower.v[0]], "lr": 0.0}], lr=0.125)
inner = Inner("inner", module=lower, optimizer=given, **options)
still = torch.optim.SGD(upper.parameters(), lr=0.0)
outer = Outer("outer", module=upper, optimizer=still, **options)
engine = EngineConfig(train_iters=1, valid_step=9)
if not old:
    engine.strategy = "cpu"
links = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
Engine(config=engine, problems=[outer, inner], dependencies=links).run()

moved = [round(p.item() - 1, 6) for p in lower.v]
print(f"betty-ml {release}: a weight at rate 0 moved by {moved[0]}, one without a rate by {moved[1]}")
drifted, rebuilt = [0.007071, 0.007071], [0.75, 0.75]  # 0.125 · the gradient, 2 · (1 - 2²) = -6
assert moved == (drifted if old else rebuilt), "this has changed"
EOF
done
