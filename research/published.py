r"""
train.py with what BiDoRA's published program does differently from its paper, for comparison.

    python -m research.published --config=paper/as_published.py --transposed --network --noise \
        --all_weights
    python -m research.published --config=small.py --trace    train.py's settings, and those below

A run with the first four saves no adapter, since it would not fit its base.
"""

import contextlib
import functools
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

import train as program
from bidora import adapter_layers
from bilevel import BilevelOptimizer, in_training
from hypergrad import assign, dot, first_order, restored
from research.arms import EFFECTS
from support.run import settings


@dataclass
class Published(program.Config):
    transposed: bool = False  # the adapted layers compute x·W where the base computes x·Wᵀ, as
    #: loralib/bidora.py does (github.com/t2ance/BiDoRA, commit e7922af); they must be square
    network: bool = False  # the lower level trains every weight of the network, not A, B and the
    #: head alone; retraining begins at the original weights, the head's too. Betty 0.2.1, which the
    #: program uses, rebuilds each optimizer over all parameters of its module
    all_weights: bool = False  # v = ∂F/∂θ and the finite difference θ ± ε·v are of every weight of
    #: the network, whichever of them train: Betty's darts
    noise: bool = False  # an encoder's dropout is on, at the rates of its config.json, in training
    #: and in the hypergradient too, whose passes then draw different masks
    trace: bool = False  # summary.json says for each upper-level step how the indirect part of the
    #: hypergradient compares with the direct one, ∂F/∂m, and how far m has moved


read_config = functools.partial(program.read_config, kind=Published)


def effects(config):
    """The settings of a Published that change the run, by name."""
    return [name for name in EFFECTS if getattr(config, name)]


@dataclass
class PublishedTask(program.Task):
    """A Task whose config is a Published."""

    def __post_init__(self):
        config = self.config
        self.trace = {"indirect": [], "cosine": [], "moved": []} if config.trace else None
        if config.transposed:
            transpose(self.model)
        if config.noise:
            add_dropout(self.model)
        self.base = base_weights(self.model) if config.network or config.all_weights else []

    def create_optimizer(self, model, *arguments, **options):
        observed = {"published": self.config, "base": self.base, "trace": self.trace}
        return ObservedOptimizer(model, *arguments, **observed, **options)

    def save(self, out):
        if not effects(self.config):
            super().save(out)

    def summary(self):
        return super().summary() | ({"trace": self.trace} if self.trace else {})


class ObservedOptimizer(BilevelOptimizer):
    """
    BilevelOptimizer with the settings of a Published. base: (parameter, its original value) pairs
    of all but the adapters' own. trace: None, or lists to which an upper-level step adds
    "indirect": ‖indirect‖ / ‖direct‖ of the hypergradient's parts, "cosine": of their angle, and
    "moved": ‖m - m0‖ / ‖m0‖.
    """

    def __init__(self, model, *arguments, published, base=(), trace=None, **options):
        self.frozen = [p for p, _ in base if not p.requires_grad]
        if published.network:
            for weight, value in base:
                weight.data.copy_(value)  # retraining begins where search began
                weight.requires_grad_(True)
        super().__init__(model, *arguments, **options)
        self.published, self.trace = published, trace
        self.start = [m.detach().clone() for m in self.upper]
        self.hypergradient, self.function = self.function, self.observed

    @property
    def adapters(self):
        """A, B and the head: what the lower level would train without `network`."""
        known = {id(p) for p in self.frozen}
        return [p for p in self.lower if id(p) not in known]

    def observed(self, train_loss, val_loss, lower, upper, **options):
        """The hypergradient. Its parts are kept for the trace."""
        if self.published.hypergradient.startswith("identity"):
            lower = self.adapters + (self.frozen if self.published.all_weights else [])
        modules = set(self.model.modules()) if self.published.noise else ()
        with in_training(self.model, modules), differentiable(lower):
            with torch.random.fork_rng():  # both draw the same masks on the val batch
                direct = None if self.trace is None else self.direct()
            h = self.hypergradient(train_loss, val_loss, lower, upper, **options)
        self.parts = direct, [x.clone() for x in h]  # before it is clipped
        return h

    def direct(self):
        """
        ∂F/∂m at the V where the hypergradient takes it: for neumann and conjugate_gradient, before
        the last step that was kept.
        """
        with restored(self.lower):
            if self.past and self.entry.looks_back and "steps" not in self.entry.options:
                assign(self.lower, self.past[-1].values)
            return first_order(None, self.val_loss, self.lower, self.upper, reduce=self.reduce)

    def upper_step(self, loss_fn, val_batch, train_batch=None):
        self.val_loss = self.watched(loss_fn, val_batch, [])  # for `direct`, without a log
        loss = super().upper_step(loss_fn, val_batch, train_batch)
        if self.trace is not None:
            direct, h = self.parts
            indirect = [x - d for x, d in zip(h, direct)]
            moved = [m.detach() - start for m, start in zip(self.upper, self.start)]
            sizes = [dot(x, x).sqrt() for x in (direct, indirect, moved, self.start)]
            self.trace["indirect"].append((sizes[1] / sizes[0]).item())
            cosine = dot(direct, indirect) / (sizes[0] * sizes[1]).clamp_min(1e-30)
            self.trace["cosine"].append(cosine.item())  # 0 where there is no indirect part
            self.trace["moved"].append((sizes[2] / sizes[3]).item())
        return loss


@contextlib.contextmanager
def differentiable(weights):
    """A context in which frozen weights have gradients."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def base_weights(model):
    """All parameters of a model but its adapters' own, as (parameter, its value) pairs."""
    named = [(name.rpartition(".")[2], p) for name, p in model.named_parameters()]
    return [(p, p.detach().clone()) for name, p in named if not name.startswith("lora_")]


def transpose(model):
    """Put W0ᵀ for W0 in each adapted layer, m at its norms. Raises ValueError if not square."""
    for name, layer in adapter_layers(model).items():
        if layer.in_features != layer.out_features:
            raise ValueError(f"--transposed: {name} is not square; choose other target_modules")
        layer.weight = nn.Parameter(layer.weight.data.T.contiguous(), requires_grad=False)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.data.copy_(layer.squared_norms().sqrt())


def add_dropout(model):
    """Give an encoder with BERT's names its dropouts back. Raises ValueError for other models."""
    rates = getattr(model, "own", {})
    if "hidden_dropout_prob" not in rates:
        raise ValueError("--noise is of the dropout of BERT, RoBERTa and ESM-2")
    adapters = {id(p) for layer in adapter_layers(model).values() for p in layer.modules()}
    for name, part in model.named_modules():
        if isinstance(part, nn.Dropout) and id(part) not in adapters:
            of_attention = name.endswith("attention.self.dropout")
            part.p = rates[f"{'attention_probs' if of_attention else 'hidden'}_dropout_prob"]


def checked(config):
    """A Published with a dtype that fits it. Raises ValueError for settings that do not fit."""
    altered = effects(config)
    if altered and (config.resume or config.method == "ft"):
        raise ValueError(f"--{altered[0]} works neither with resume=True nor with method=ft")
    if config.all_weights and config.hypergradient != "identity_difference":
        raise ValueError("--all_weights needs hypergradient=identity_difference")
    if not config.network:
        return config
    if not program.is_bilevel(config):
        raise ValueError(f"--network is of the lower level, which method={config.method} lacks")
    if config.dtype == "bfloat16":
        raise ValueError("--network trains the weights themselves: use dtype=float32")
    return replace(config, dtype="float32")


def train(config):
    """train.train for a Published, after `checked`. The summary has "trace" if that is set."""
    summary = program.train(checked(config), PublishedTask)
    if effects(config):
        print("no adapter was saved: it would not fit the base model's file")
    return summary


def main(arguments):
    return settings.program(arguments or ["--help"], Published, train, __doc__, reader=read_config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
