"""
train.py with what BiDoRA's published program does beside its paper, for comparison only.

    python -m tools.published --config=paper/as_published.py --transposed --drift
    python -m tools.published --config=small.py --trace       any of train.py's settings, and
                                                              those below

The adapter of a run with --transposed or --drift does not fit its base, so it is not kept.
"""

import contextlib
import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy
import torch

import train as program
from bidora import linear_layers
from hypergrad import (
    BilevelOptimizer,
    MicroBatches,
    assign,
    dot,
    first_order,
    in_training,
    restored,
    total_gradient,
)
from support import settings
from support.files import read_json, write_json

RADIUS = 0.01  # Betty's darts_alpha


@dataclass
class Published(program.Config):
    transposed: bool = False  # the adapted layers compute x·W where the base computes x·Wᵀ, as
    #: loralib/bidora.py does (github.com/t2ance/BiDoRA, commit e7922af); they must be square
    drift: bool = False  # each upper-level step moves all weights, the base's too, by a step of
    #: length 0.01 down the val loss's gradient, in float32; retraining begins at the original
    #: weights. So it is with Betty 0.1.1, which the program uses: hypergradient/darts.py takes a
    #: finite difference at θ ± ε·v, and goes back with p.data.add(…), which changes nothing, not
    #: add_(…)
    trace: bool = False  # print how the indirect part of the hypergradient compares with the direct
    #: one, ∂F/∂m, and how far m moves; summary.json has it for each upper-level step


class ObservedOptimizer(BilevelOptimizer):
    """
    BilevelOptimizer that may drift as Betty does, and may keep a trace, lists of one number an
    upper-level step: {"indirect": ‖indirect‖ / ‖direct‖ of the hypergradient's parts, "cosine": of
    their angle, "moved": ‖m - m0‖ / ‖m0‖}.

    base: the model's frozen weights and their original values, a list of pairs.
    """

    def __init__(self, model, *arguments, drift, trace, base, **options):
        super().__init__(model, *arguments, **options)
        self.drift, self.trace = drift, trace
        self.start = [m.detach().clone() for m in self.upper]
        self.base = [weight for weight, _ in base] if drift else []
        function = self.function

        def watched(*arguments, **options):
            h = function(*arguments, **options)
            self.h = [x.clone() for x in h]  # before it is clipped
            return h

        self.function = watched
        if drift and not self.upper:  # retraining
            with torch.no_grad():
                for weight, value in base:
                    weight.copy_(value)

    def upper_step(self, loss_fn, train_batch, val_batch):
        parts = val_batch if isinstance(val_batch, MicroBatches) else [val_batch]
        losses = [functools.partial(loss_fn, self.model, part) for part in parts]
        direct = self.direct(losses) if self.trace is not None else None
        if self.drift:
            weights = [*self.lower, *self.base]
            with in_training(self.model, ()), differentiable(self.base):
                v = total_gradient(losses, weights, self.reduce)

        loss = super().upper_step(loss_fn, train_batch, val_batch)
        if self.trace is not None:
            indirect = [h - d for h, d in zip(self.h, direct)]
            moved = [m.detach() - start for m, start in zip(self.upper, self.start)]
            sizes = [dot(x, x).sqrt() for x in (direct, indirect, moved, self.start)]
            self.trace["indirect"].append((sizes[1] / sizes[0]).item())
            cosine = dot(direct, indirect) / (sizes[0] * sizes[1]).clamp_min(1e-30)
            self.trace["cosine"].append(cosine.item())  # 0 where there is no indirect part
            self.trace["moved"].append((sizes[2] / sizes[3]).item())
        if self.drift:
            length = (RADIUS / dot(v, v).sqrt()).item()
            with torch.no_grad():
                for weight, x in zip(weights, v):
                    weight.sub_(x, alpha=length)
        return loss

    def direct(self, losses):
        """
        ∂F/∂m at the V where the hypergradient takes it: neumann and conjugate_gradient look back to
        before the last step that was kept.
        """
        with restored(self.lower), in_training(self.model, ()):
            if self.past and self.looks_back and "steps" not in self.takes:
                assign(self.lower, self.past[-1].values)
            return first_order(None, losses, self.lower, self.upper, reduce=self.reduce)


@contextlib.contextmanager
def differentiable(weights):
    """Let frozen weights have gradients."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def transposed(load, targets, *arguments):
    """load_backbone, with the weights of the layers that match `targets` transposed."""
    model = load(*arguments)
    for name, layer in linear_layers(model, targets).items():
        if layer.in_features != layer.out_features:
            raise ValueError(f"--transposed: {name} is not square; choose other target_modules")
        layer.weight.data = layer.weight.data.T.contiguous()
    return model


def read_config(arguments):
    """The Published of a command line; as config.read_config."""
    return program.read_config(arguments, Published)


def train(config):
    """
    train.train for a Published; without its three settings it is that function. Returns its
    summary, with "trace" if asked for. Raises as train.train does, and ValueError where the three
    settings do not fit the others.
    """
    altered = config.transposed or config.drift
    if altered and (config.resume or config.method == "ft"):
        name = "transposed" if config.transposed else "drift"
        raise ValueError(f"--{name} works neither with resume=True nor with method=ft")

    if config.drift:
        if not program.is_bilevel(config):
            raise ValueError(f"--drift is of upper-level steps, which method={config.method} lacks")
        if config.dtype == "bfloat16":
            raise ValueError("--drift needs dtype=float32: so short a step rounds away in bfloat16")
        config = replace(config, dtype="float32")

    trace = {"indirect": [], "cosine": [], "moved": []} if config.trace else None
    base = []

    def build(model, *arguments, **options):
        if config.drift and not base:
            frozen = [p for p in model.parameters() if not p.requires_grad]
            base.extend((p, p.detach().clone()) for p in frozen)
        observed = dict(drift=config.drift, trace=trace, base=base)
        return ObservedOptimizer(model, *arguments, **observed, **options)

    with contextlib.ExitStack() as patches:
        if config.transposed:
            load = functools.partial(transposed, program.tasks.load_backbone, config.target_modules)
            patches.enter_context(mock.patch.object(program.tasks, "load_backbone", load))
        if config.drift or config.trace:
            patches.enter_context(mock.patch.object(program, "create_bilevel_optimizer", build))
        summary = program.train(config)

    out = Path(summary["out_dir"])
    if altered:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (out / name).unlink()
        print("the adapter was removed: it does not fit the base model's file")
    if trace:
        summary = summary | {"trace": trace}
        write_json(out / "summary.json", read_json(out / "summary.json") | {"trace": trace})
    return summary


def train_and_say(config):
    """Train, and print the trace's means."""
    trace = train(config).get("trace", {"moved": []})
    if trace["moved"]:
        print(
            f"of {len(trace['moved'])} upper-level steps, mean: the indirect part is "
            f"{numpy.mean(trace['indirect']):.2g} of the direct one, at a cosine of "
            f"{numpy.mean(trace['cosine']):+.2f}; m moved by {trace['moved'][-1]:.2%}"
        )


def main(arguments):
    options = {"reader": read_config}
    return settings.program(arguments or ["--help"], Published, train_and_say, __doc__, **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
