"""
The two-level optimizer: AdamW over A and B on train, AdamW over m on val along a hypergradient.

    optimizer = create_bilevel_optimizer(model, lower_lr=1e-2, upper_lr=2e-2)
    train_loss, val_loss = optimizer.bilevel_step(loss_fn, train_batch, val_batch)

V, all factors A and B, moves by AdamW, and the val loss is taken where it lands (for neumann and
conjugate_gradient where it started). By default the hypergradient's second term treats that step as
one of plain gradient descent, unclipped, at the same rate, as the paper's equation does;
precondition='adam' differentiates through AdamW itself.

hypergrad.py has the hypergradients, as functions of closures; HYPERGRADIENTS here says what the
optimizer gives to each. With bidora.py and hypergrad.py this file works copied into any project.
"""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

import hypergrad
from bidora import adapter_layers, lower_parameters, upper_parameters


@dataclass(frozen=True)
class Hypergradient:
    """
    An entry of HYPERGRADIENTS: what the optimizer and train.py need to know about a function.

    looks_back: it takes `past`, the last steps of the lower level: as many as its option "steps"
    says, or one. follows_rate: its option lr is by default the lower level's rate at the time.
    adam: what precondition=adam gives it: "update", AdamW's next update as the option adam, or
    "scale", AdamW's preconditioner as the option precondition.
    """

    function: Callable
    options: dict = field(default_factory=dict)  # {an option: the setting in config.py for it}
    reads_train: bool = True  # whether it takes anything from the train loss
    second_order: bool = True  # whether it differentiates gradients of the lower level
    float32: bool = False  # whether it needs float32: bfloat16 has too few digits
    looks_back: bool = False
    follows_rate: bool = False
    adam: str | None = None


UNROLLED = dict(
    options={"steps": "hypergradient_steps", "lr": "hypergradient_lr"},
    looks_back=True,
    follows_rate=True,
    adam="update",
)
IMPLICIT = dict(looks_back=True, adam="scale")
DIFFERENCE = dict(second_order=False, float32=True)
HYPERGRADIENTS = {
    "first_order": Hypergradient(hypergrad.first_order, reads_train=False, second_order=False),
    "unrolled": Hypergradient(hypergrad.unrolled, **UNROLLED),
    "finite_difference": Hypergradient(
        functools.partial(hypergrad.unrolled, mode="finite_difference"), **UNROLLED, **DIFFERENCE
    ),
    "neumann": Hypergradient(
        hypergrad.neumann, {"terms": "hypergradient_steps", "alpha": "hypergradient_lr"}, **IMPLICIT
    ),
    "conjugate_gradient": Hypergradient(
        hypergrad.conjugate_gradient,
        {"iterations": "hypergradient_steps", "damping": "damping"},
        **IMPLICIT,
    ),
    "identity": Hypergradient(hypergrad.identity),
    "identity_difference": Hypergradient(
        functools.partial(hypergrad.identity, mode="finite_difference"), **DIFFERENCE
    ),
}


CHOICES = {
    "hypergradient": HYPERGRADIENTS,
    "optimizer": ("adamw", "adamw8bit"),
    "precondition": ("none", "adam"),
}


class MicroBatches(list):
    """
    A batch in parts whose losses add up, so that the activations of one are in memory at a time.
    Any other batch, also a list, is handed to the loss as it is.
    """


@contextlib.contextmanager
def in_training(model, wanted):
    """
    Put exactly the modules in `wanted` into training mode. Without any, dropout is off: all new
    passes of a hypergradient must see the same function.
    """
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = module in wanted
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class AdamW(torch.optim.AdamW):
    """Torch's without its decorators, which import its compiler: a second of each start."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class BilevelOptimizer:
    """
    AdamW over a model's lower_parameters, and over its upper_parameters (bidora.py) along a
    hypergradient. For a model without upper parameters, lower_step alone is plain training.

    lower_steps     lower steps of a round, T1 of BiLoRA (arXiv 2403.13037); upper_steps: the upper
                    steps that end it, T2
    weight_decay    of the lower level; upper_weight_decay: of magnitudes or singular values
    hypergradient   a key of HYPERGRADIENTS; options: that function's own (lr: by default the lower
                    level's rate at the time)
    beta2           AdamW's, at both levels
    lora_plus       B's rate is so many times A's (arXiv 2402.12354); not with an upper level
    grad_clip       the norm to which the gradient of each level is clipped
    optimizer       'adamw', or 'adamw8bit', bitsandbytes' AdamW with 8-bit moments (tensors below
                    4,096 numbers keep 32 bits)
    precondition    'none', or 'adam' to heed AdamW: unrolled differentiates through its update,
                    neumann and conjugate_gradient are preconditioned by its second moments
    reduce          as in the functions; it also reduces lower gradients and losses

    A batch is whatever loss_fn(model, batch) -> scalar takes, or MicroBatches: several whose
    losses add up to the batch's. train.py has its own defaults (config.py). Raises ValueError for
    an unknown choice or option, choices that exclude each other, or a model with nothing to train.
    """

    def __init__(
        self,
        model,
        lower_lr=2e-4,
        upper_lr=1e-3,
        lower_steps=1,
        weight_decay=0.01,
        hypergradient="unrolled",
        *,
        beta2=0.999,
        lora_plus=1.0,
        grad_clip=1.0,
        optimizer="adamw",
        precondition="none",
        upper_weight_decay=0.0,
        upper_steps=1,
        reduce=hypergrad.one_process,
        **options,
    ):
        coarse = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        check_choices(hypergradient, optimizer, precondition, coarse)
        check_options(hypergradient, options)
        entry = HYPERGRADIENTS[hypergradient]
        self.model, self.lower, self.upper = model, lower_parameters(model), upper_parameters(model)
        if not self.lower:
            raise ValueError(
                "the model has no trainable lower-level parameters: put in adapters first"
            )
        if options.get("steps", 1) > lower_steps:
            raise ValueError(
                f"steps={options['steps']} looks back on more than lower_steps={lower_steps}"
            )

        self.entry, self.function = entry, entry.function
        self.options, self.kept_steps = options, options.get("steps", 1)
        self.lower_steps, self.upper_steps = lower_steps, upper_steps
        self.grad_clip, self.precondition, self.reduce = grad_clip, precondition, reduce
        self.train_loss = None  # of the last lower step
        self.past = []  # the lower steps kept for the next upper_step
        self.begun = False

        build = functools.partial(AdamW, fused=True)  # one kernel: 5 ms a step, not 19
        if optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit as build
        build = functools.partial(build, betas=(0.9, beta2))
        groups = self.lower_groups(lora_plus, lower_lr)
        self.lower_optimizer = build(groups, lr=lower_lr, weight_decay=weight_decay)
        upper = dict(lr=upper_lr, weight_decay=upper_weight_decay)
        self.upper_optimizer = build(self.upper, **upper) if self.upper else None

    def lower_groups(self, lora_plus, lr):
        """The lower level's parameters in groups of one rate: B has lora_plus times the others'."""
        if lora_plus == 1:
            return [{"params": self.lower}]
        if self.upper:
            raise ValueError("lora_plus: a hypergradient models one rate: use lora or dora")
        Bs = {layer.lora_B: None for layer in adapter_layers(self.model).values()}
        rest = [p for p in self.lower if p not in Bs]
        return [{"params": rest}, {"params": [*Bs], "lr": lora_plus * lr}]

    def bilevel_step(self, loss_fn, train_batch, val_batch):
        """
        A round: `lower_steps` steps of the lower level on train_batch, then `upper_steps` of the
        upper level on val_batch.

        loss_fn(model, batch) -> scalar. Returns (train_loss, val_loss), scalar tensors; the train
        loss is the one before the last lower step.
        """
        for _ in range(self.lower_steps):
            train_loss = self.lower_step(loss_fn, train_batch)
        for _ in range(self.upper_steps):
            val_loss = self.upper_step(loss_fn, val_batch)
        return train_loss, val_loss

    def lower_step(self, loss_fn, batch):
        """
        One step of the lower level on a batch. Returns its loss before the step, a scalar.

        The last steps of a round are kept: the next upper_step differentiates through them, so that
        one gradient serves both levels.
        """
        seen = []
        keep, losses = self.keeps_next(), self.watched(loss_fn, batch, seen)
        self.past = [replace(step, graph=None) for step in self.past] if keep else []
        graph = self.kept_graph(losses) if keep else None
        g = graph.value if graph else hypergrad.total_gradient(losses, self.lower, self.reduce)
        if keep:
            self.past = [*self.past, self.kept_step(losses, g, graph)][-self.kept_steps :]
            g = [x.clone() for x in g]  # clipping writes into them

        self.train_loss = losses
        [total] = self.reduce([sum(seen)])
        # A kept graph refers to the tensors before the step, and the optimizer writes into copies.
        # Torch would still count that as a change and refuse to use the graph later. The old values
        # will be back by then, but no public function can tell torch so.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.lower) if keep else ()):
            self.step(self.lower_optimizer, self.lower, g, total)
        return total

    def upper_step(self, loss_fn, val_batch, train_batch=None):
        """
        One step of the upper level along the hypergradient. Returns the val loss from which the
        hypergradient was computed, a scalar tensor.

        It differentiates through the lower steps that were kept, the last one under the dropout
        masks that it had if its graph is there; other graphs are built anew, without dropout.
        neumann and conjugate_gradient take everything at V before the last one. If none is kept (in
        a second upper step of a round), or with a train_batch, unrolled simulates steps from the
        current V, and these two take everything there, on the last lower step's batch or on
        train_batch; identity always does. first_order needs no train loss. Raises ValueError
        without upper parameters, or before any lower step without a train_batch.
        """
        if not self.upper:
            raise ValueError(
                "the model has no upper-level parameters: adapt it with method='bidora', "
                "or take lower_step alone"
            )

        seen, train_loss, past = [], self.train_loss, self.past
        if train_batch is not None:
            train_loss, past = self.watched(loss_fn, train_batch, []), []
        if train_loss is None and self.entry.reads_train:
            raise ValueError("no lower step was taken: call lower_step first, or give train_batch")
        val_loss = self.watched(loss_fn, val_batch, seen)
        options = self.options | {"reduce": self.reduce} | self.moving_options()
        if past:
            options["past"] = past

        try:
            with in_training(self.model, ()):
                h = self.function(train_loss, val_loss, self.lower, self.upper, **options)
        finally:
            self.past = []
        [total] = self.reduce([sum(seen)])
        self.step(self.upper_optimizer, self.upper, h, total)
        return total

    @property
    def optimizers(self):
        """The AdamW of each level that has one."""
        both = {"lower": self.lower_optimizer, "upper": self.upper_optimizer}
        return {level: optimizer for level, optimizer in both.items() if optimizer}

    def state_dict(self):
        """Both levels' states, {"lower": …, "upper": …}; kept steps are not part of it."""
        return {level: optimizer.state_dict() for level, optimizer in self.optimizers.items()}

    def load_state_dict(self, state):
        """Continue from a state_dict. Call lower_step before the next upper_step."""
        for level, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[level])
        self.train_loss, self.past = None, []

    def scale_lr(self, factor):
        """Set both levels' learning rates to factor × their initial values."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("base_lr", group["lr"])

    @property
    def lower_lr(self):
        return self.lower_optimizer.param_groups[0]["lr"]

    def step(self, optimizer, parameters, gradients, loss):
        """
        One optimizer step. If loss or gradient is not finite, raises FloatingPointError before it.
        """
        for parameter, g in zip(parameters, gradients):
            # Torch's fused AdamW misreads a gradient whose numbers lie in another order.
            same = g.stride() == parameter.stride()
            parameter.grad = g if same else torch.empty_like(parameter).copy_(g)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        finite = bool(torch.isfinite(loss + norm))  # the only number that a step reads from a GPU
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        if not finite:
            self.train_loss, self.past = None, []
            raise FloatingPointError(f"loss {loss.item():g}, gradient norm {norm.item():g}")

    def watched(self, loss_fn, batch, seen):
        """Closures of the loss, one per micro-batch; each appends its value to `seen`."""

        def loss(micro_batch):
            value = loss_fn(self.model, micro_batch)
            seen.append(value.detach())
            if not self.begun:
                check_reach(self.model, value, [*self.lower, *self.upper])
                self.begun = True
            return value

        parts = batch if isinstance(batch, MicroBatches) else [batch]
        return [functools.partial(loss, micro_batch) for micro_batch in parts]

    @torch.no_grad()
    def loss(self, loss_fn, batch):
        """The loss of a batch, a scalar tensor, without a step."""
        parts = self.watched(loss_fn, batch, [])
        return self.reduce([sum(part() for part in parts)])[0]

    def keeps_next(self):
        """Whether the next upper step looks back on the next lower one, of a round's kept_steps."""
        if not (self.entry.looks_back and any(m.requires_grad for m in self.upper)):
            return False
        if self.kept_steps == self.lower_steps:
            return True
        # AdamW counts the steps, also over a checkpoint.
        rounds = hypergrad.steps_taken(self.upper_optimizer) // self.upper_steps
        in_round = hypergrad.steps_taken(self.lower_optimizer) - rounds * self.lower_steps
        return bool(in_round >= self.lower_steps - self.kept_steps)

    def kept_graph(self, losses):
        """The differentiable gradient of a lower step; None where it is not differentiated."""
        if not self.entry.second_order:
            return None
        training = {module for module in self.model.modules() if module.training}
        context = functools.partial(in_training, self.model, training)
        return hypergrad.LowerGradient(losses, self.lower, self.reduce, context)

    def kept_step(self, losses, g, graph):
        """The Step of a gradient; from now on the model has copies of the values before it."""
        update, state = hypergrad.gradient_descent(self.options.get("lr", self.lower_lr)), []
        if self.precondition == "adam":
            update = hypergrad.adamw(self.lower_optimizer, self.grad_clip)
            state = hypergrad.adam_moments(self.lower_optimizer)
        step = hypergrad.Step([V.data for V in self.lower], g, state, update, losses, graph)
        hypergrad.assign(self.lower, [V.data.clone() for V in self.lower])
        return step

    def moving_options(self):
        """The hypergradient's options that change from step to step, as far as it takes them."""
        options = {}
        if self.entry.follows_rate and "lr" not in self.options:
            options["lr"] = self.lower_lr
        if self.precondition == "adam" and self.entry.adam == "update":
            options |= {"adam": self.lower_optimizer, "grad_clip": self.grad_clip}
        if self.precondition == "adam" and self.entry.adam == "scale":
            options["precondition"] = hypergrad.adam_scale(self.lower_optimizer)
        return options


create_bilevel_optimizer = BilevelOptimizer  # its name in PyPI's package `bidora`, another project


def check_options(hypergradient, options):
    """Raise ValueError for options that a hypergradient does not have, or for unfit values."""
    entry = HYPERGRADIENTS[hypergradient]
    radius = {"radius"} if entry.float32 else set()  # of a difference quotient
    known = {*entry.options} | radius
    if unknown := sorted(options.keys() - known):
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ValueError(f"hypergradient={hypergradient} has no option {unknown[0]!r}: {has}")
    for name, value in options.items():
        whole = name in ("steps", "terms", "iterations")
        number = isinstance(value, int if whole else (int, float)) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and name != "damping"):
            kind = "a whole number of at least 1" if whole else "a positive number"
            raise ValueError(f"{name}={value!r} must be {kind}")


def check_choices(hypergradient, optimizer, precondition, coarse):
    """Raise ValueError for an unknown or excluded choice. coarse: whether the base has 16 bits."""
    for name, value in zip(CHOICES, (hypergradient, optimizer, precondition)):
        if value not in CHOICES[name]:
            raise ValueError(f"unknown {name} {value!r}: choose {', '.join(CHOICES[name])}")
    if precondition == "adam" and optimizer == "adamw8bit":
        raise ValueError(
            "precondition=adam reads AdamW's moments, which adamw8bit keeps in 8 bits: "
            "use optimizer=adamw"
        )
    if HYPERGRADIENTS[hypergradient].float32 and coarse:
        exact = "identity" if hypergradient.startswith("identity") else "unrolled"
        raise ValueError(
            f"hypergradient={hypergradient} loses too many digits in bfloat16 and float16: "
            f"use hypergradient={exact}, or float32"
        )


def check_reach(model, loss, parameters):
    """Say on which parameters a loss does not depend. Raises ValueError if it depends on none."""
    found, ours = reached(loss), {id(parameter) for parameter in parameters}
    unmet = [name for name, p in model.named_parameters() if id(p) in ours - found]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in unmet))
    if not layers:
        return

    names = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if layers[5:] else "")
    problem = (
        f"no gradient reaches {names}: is the layer's weight read without calling the layer, "
        f"or is it inside reentrant gradient checkpointing (use_reentrant=False is right)?"
    )
    if not ours & found:
        raise ValueError(problem)
    warnings.warn(problem, stacklevel=2)


def reached(loss):
    """The ids of the leaves, such as parameters, whose gradient loss.backward() would compute."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}
