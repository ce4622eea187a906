"""
Hypergradients: how the val loss changes with the upper parameters while the lower ones follow.

Lower level: V (direction) minimises L(V, m) on train. Upper level: m (magnitude) minimises
F(V*(m), m) on val. So dF/dm = ∂F/∂m + (dV*/dm)ᵀ · ∂F/∂V, and methods differ in dV*/dm:

    first_order          ignores it
    unrolled             V* is what K steps give; K = 1 is BiDoRA's choice (2410.09758, eq. 8-9)
    finite_difference    the same, second derivatives by differences (arXiv 1806.09055, section 2.3)
    neumann              -H⁻¹ · ∂²L/∂V∂m, H⁻¹ by K terms of its series (arXiv 1911.02590)
    conjugate_gradient   as neumann, H⁻¹ · v solved by K iterations of CG (arXiv 1602.02355)
    identity             as neumann, H⁻¹ replaced by I: the form of what Betty's darts computes

All have one signature, f(train_loss, val_loss, lower, upper, *, options) -> a tensor per upper
parameter. A loss is a closure without arguments that returns a scalar at the parameters' current
values, or a list of closures whose values add up (micro-batches: one is in memory at a time). It
must be deterministic (no dropout). Parameters get their values back, also when a closure raises.
"""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def unrolled_once(train_loss, val_loss, lower, upper, *, lr):
    """
    The paper's hypergradient in its plainest form: through one step V' = V - lr · ∂L/∂V.

        dF/dm = ∂F/∂m(V', m) - lr · ∂²L/∂m∂V(V, m) · ∂F/∂V(V', m)

    For reading: `unrolled` computes the same for K steps, with less memory; a test compares them.
    """
    g = torch.autograd.grad(train_loss(), lower, create_graph=True)  # ∂L/∂V, differentiable
    with restored(lower):
        assign(lower, [V.detach() - lr * gV.detach() for V, gV in zip(lower, g)])
        v, direct = val_gradients(val_loss, lower, upper)  # ∂F/∂V and ∂F/∂m at V'

    cross = torch.autograd.grad(g, upper, grad_outputs=v)  # ∂²L/∂m∂V · v
    return [d - lr * c for d, c in zip(direct, cross)]


# ------------------------------------------------------------------ gradients and products


def same(tensors):
    """
    The `reduce` for a single process, which has nothing to add. For several, give a function that
    sums each tensor of a list over the processes.

    The cross term multiplies a train quantity by a val quantity, so summing finished hypergradients
    would be wrong: v = ∂F/∂V and every product are reduced inside the functions.
    """
    return tensors


def closures(loss):
    """A loss as a list of closures whose values add up."""
    return loss if isinstance(loss, (list, tuple)) else [loss]


def reached(loss):
    """The ids of the leaves, such as parameters, whose gradient loss.backward() would compute."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


def add(*lists):
    """The sum of several lists of tensors, as one list; a single list as it is."""
    return [sum(rest, first) for first, *rest in zip(*lists)]


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys))


def gradient(loss, parameters, **options):
    """∂loss/∂parameters as a list; zeros where the loss does not depend on a parameter."""
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True, **options))


def total_gradient(loss, parameters, reduce=same):
    """∂loss/∂parameters, one micro-batch at a time, reduced over the processes."""
    return reduce(add(*(gradient(closure(), parameters) for closure in closures(loss))))


def val_gradients(val_loss, lower, upper, reduce=same):
    """v = ∂F/∂V and ∂F/∂m, from one backward pass per micro-batch."""
    both = total_gradient(val_loss, [*lower, *upper], reduce)
    return both[: len(lower)], both[len(lower) :]


class LowerGradient:
    """
    g = ∂L/∂V at V's current values, and its products Σ_i x_i · ∂g_i/∂(parameters): Hessian-vector
    and cross products, by double backward.

    A loss of one micro-batch keeps one graph for all products. A loss of several builds each
    micro-batch's graph anew for each product, so that only one is in memory at a time.

    mode: makes a context manager for the products of a kept graph. Gradient checkpointing computes
    the forward pass again there, and must find the model's dropout as it was.
    """

    def __init__(self, train_loss, lower, reduce=same, mode=contextlib.nullcontext):
        self.losses, self.lower, self.reduce = closures(train_loss), lower, reduce
        self.graph = self.differentiable(self.losses[0]) if len(self.losses) == 1 else None
        self.mode = mode if self.graph else contextlib.nullcontext
        if self.graph:
            self.value = reduce([g.detach() for g in self.graph])
        else:
            self.value = total_gradient(self.losses, lower, reduce)

    def differentiable(self, loss):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no second derivative
            return gradient(loss(), self.lower, create_graph=True)

    def product(self, vectors, parameters, last=False):
        """Σ vectors · ∂g/∂parameters, at the values that V had. last: the graph may be freed."""
        products = []
        for g in [self.graph] if self.graph else map(self.differentiable, self.losses):
            # g is constant for a layer that the loss does not use, and adds nothing.
            pairs = [(gV, x) for gV, x in zip(g, vectors) if gV.requires_grad]
            if not pairs:
                products.append([torch.zeros_like(p) for p in parameters])
                continue

            outputs, weights = map(list, zip(*pairs))
            keep = bool(self.graph) and not last
            with sdpa_kernel(SDPBackend.MATH), self.mode():
                products.append(
                    gradient(outputs, parameters, grad_outputs=weights, retain_graph=keep)
                )
        return self.reduce(add(*products))


@contextlib.contextmanager
def restored(parameters):
    """Give the parameters their values back at the end, also when the block raises."""
    found = [p.data for p in parameters]
    try:
        yield
    finally:
        assign(parameters, found)


def assign(parameters, values):
    """
    Give parameters other values by exchanging tensors, not by writing into them, so that a graph
    that was built at the old values is usable again once they are back.
    """
    for parameter, value in zip(parameters, values):
        parameter.data = value


# --------------------------------------------------------------- steps of the lower level


@dataclass
class Step:
    """A step of the lower level, real or simulated: what it started from, and how it moved V."""

    values: list  # V before it
    g: list  # its gradient ∂L/∂V
    state: list  # the optimizer's state before it
    update: Callable  # (V, g, state) -> (V, state)
    train_loss: object  # the loss whose gradient g is: a closure, or a list of closures
    graph: LowerGradient | None = None  # if kept: differentiates g without a new forward pass


def gradient_descent(lr):
    """The update V - lr · g, which has no state."""
    return lambda V, g, state: ([x - lr * gx for x, gx in zip(V, g)], state)


def adam_moments(optimizer):
    """Copies of an AdamW's moments, first ones then second ones; zeros before its first step."""
    return [
        optimizer.state[p][name].clone() if p in optimizer.state else torch.zeros_like(p)
        for name in ("exp_avg", "exp_avg_sq")
        for p in optimizer.param_groups[0]["params"]
    ]


def steps_taken(optimizer):
    """How often an AdamW has stepped: a float64 scalar, which stays on its device."""
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0])
    return state["step"].double() if state else torch.zeros((), dtype=torch.float64)


def adamw(optimizer, grad_clip=None, ahead=0):
    """
    The update that a torch.optim.AdamW (arXiv 1711.05101) will make next, or `ahead` steps later,
    as a differentiable function; the gradient is first clipped to the norm grad_clip.
    Differentiating through the real update is the idea of SAMA (arXiv 2310.05674).
    """
    group = optimizer.param_groups[0]
    (beta1, beta2), lr = group["betas"], group["lr"]
    eps, decay = group["eps"], group["weight_decay"]
    t = steps_taken(optimizer) + 1 + ahead

    def update(V, g, moments):
        if grad_clip is not None:  # as torch.nn.utils.clip_grad_norm_
            scale = (grad_clip / (dot(g, g).sqrt() + 1e-6)).clamp_max(1.0)
            g = [scale * gx for gx in g]
        first = [beta1 * m + (1 - beta1) * gx for m, gx in zip(moments[: len(V)], g)]
        second = [beta2 * m + (1 - beta2) * gx**2 for m, gx in zip(moments[len(V) :], g)]

        tiny = torch.finfo(g[0].dtype).tiny  # a square root at 0 would have no derivative
        moved = [
            (1 - lr * decay) * x
            - lr * (a / (1 - beta1**t)) / ((b / (1 - beta2**t)).clamp_min(tiny).sqrt() + eps)
            for x, a, b in zip(V, first, second)
        ]
        return moved, first + second

    return update


def adam_scale(optimizer):
    """AdamW's own preconditioner: 1 / (√second moment + eps), one tensor per parameter."""
    group = optimizer.param_groups[0]
    if not optimizer.state:
        raise ValueError("precondition=adam reads AdamW's moments: take a lower step first")
    t = steps_taken(optimizer)
    second = adam_moments(optimizer)[len(group["params"]) :]
    return [1 / ((m / (1 - group["betas"][1] ** t)).sqrt() + group["eps"]) for m in second]


def adjoint(step, v, state):
    """Backpropagate derivatives (v, state) through a step, from its results to V, g and state."""
    inputs = [x.detach().requires_grad_() for x in (*step.values, *step.g, *step.state)]
    n = len(v)
    with torch.enable_grad():
        V, after = step.update(inputs[:n], inputs[n : 2 * n], inputs[2 * n :])
        back = gradient(dot([*V, *after], [*v, *state]), inputs)
    return back[:n], back[n : 2 * n], back[2 * n :]


# ------------------------------------------------------------------------ hypergradients


def first_order(train_loss, val_loss, lower, upper, *, reduce=same):
    """∂F/∂m at the current V: one gradient, which ignores how V would follow a change of m."""
    return val_gradients(val_loss, [], upper, reduce)[1]


def unrolled(
    train_loss,
    val_loss,
    lower,
    upper,
    *,
    lr=1e-3,
    steps=1,
    mode="exact",
    radius=0.01,
    adam=None,
    grad_clip=None,
    past=None,
    reduce=same,
):
    """
    The gradient through K steps V_{k+1} = U(V_k, g_k), g_k = ∂L/∂V(V_k, m), of the lower level.

    The steps are K = `steps` simulated ones from the current V, or those in `past`, a list of Step
    that led to it. U is gradient descent with rate lr, or the next update of `adam`, a
    torch.optim.AdamW over `lower` (grad_clip as in `adamw`).

    mode='exact' takes products by double backward; 'finite_difference' from ∂L at V ± ε·a with
    ε = radius / ‖a‖ (DARTS, arXiv 1806.09055, section 2.3): two gradients, but noise in bf16.
    Memory grows by the adapter's size per step, not by activations. Raises ValueError for another
    mode.
    """
    check_mode(mode)
    with restored(lower):
        trajectory = list(past or [])
        state = adam_moments(adam) if adam else []
        for k in range(0 if past else steps):
            update = adamw(adam, grad_clip, ahead=k) if adam else gradient_descent(lr)
            # The last step's graph serves the step here and the products below.
            last = mode == "exact" and k == steps - 1
            graph = LowerGradient(train_loss, lower, reduce) if last else None
            g = graph.value if graph else total_gradient(train_loss, lower, reduce)
            trajectory.append(Step([V.data for V in lower], g, state, update, train_loss, graph))
            values, state = update(trajectory[-1].values, g, state)
            assign(lower, values)

        def product(step, a, wanted):
            if mode == "finite_difference":
                return central_difference(step, a, wanted, lower, radius, reduce)
            graph = step.graph or LowerGradient(step.train_loss, lower, reduce)
            return graph.product(a, wanted, last=True)

        v, h = val_gradients(val_loss, lower, upper, reduce)
        return through_steps(trajectory, v, h, lower, upper, product)


def check_mode(mode):
    if mode not in ("exact", "finite_difference"):
        raise ValueError(f"unknown mode {mode!r}: choose 'exact' or 'finite_difference'")


def through_steps(trajectory, v, h, lower, upper, product):
    """
    Recursion from the last Step to the first, from v = ∂F/∂V(V_K), h = ∂F/∂m. With a = (∂U/∂g)ᵀ·v,

        h ← h + ∂²L/∂m∂V(V_k)·a        v ← (∂U/∂V)ᵀ·v + ∂²L/∂V²(V_k)·a

    For gradient descent a = -lr·v. product(step, a, parameters) gives Σ a · ∂g/∂parameters.
    """
    state = [torch.zeros_like(x) for x in trajectory[-1].state]
    for k, step in reversed(list(enumerate(trajectory))):
        v, a, state = adjoint(step, v, state)
        assign(lower, step.values)
        wanted = [*upper] if k == 0 else [*lower, *upper]  # V_0 does not depend on m
        products = product(step, a, wanted)
        h = add(h, products[-len(upper) :])
        if k > 0:
            v = add(v, products[: -len(upper)])
    return h


def central_difference(step, a, wanted, lower, radius, reduce):
    """Σ a · ∂g/∂wanted ≈ (∂L(V + ε·a) - ∂L(V - ε·a)) / 2ε, ε = radius / ‖a‖."""
    epsilon = radius / dot(a, a).sqrt().clamp_min(1e-20)
    assign(lower, [V + epsilon * x for V, x in zip(step.values, a)])
    plus = total_gradient(step.train_loss, wanted, reduce)
    assign(lower, [V - epsilon * x for V, x in zip(step.values, a)])
    minus = total_gradient(step.train_loss, wanted, reduce)
    return [(p - q) / (2 * epsilon) for p, q in zip(plus, minus)]


def implicit(solve, train_loss, val_loss, lower, upper, *, past, reduce):
    """∂F/∂m - ∂²L/∂m∂V · q with q = solve(v, H), v = ∂F/∂V, and H multiplying by ∂²L/∂V²."""
    with restored(lower):
        if past:  # the kept graph of the last step is valid at the values before that step
            assign(lower, past[-1].values)
        g = past[-1].graph if past else LowerGradient(train_loss, lower, reduce)
        v, h = val_gradients(val_loss, lower, upper, reduce)
        q = solve(v, lambda x: g.product(x, lower))  # one graph serves all products
        return [hm - c for hm, c in zip(h, g.product(q, upper, last=True))]


def neumann(
    train_loss,
    val_loss,
    lower,
    upper,
    *,
    terms=3,
    alpha=1e-2,
    precondition=None,
    past=None,
    reduce=same,
):
    """
    ∂F/∂m - ∂²L/∂m∂V · q, q = alpha · Σ_{j<terms} (I - alpha·P·H)^j · P · ∂F/∂V, H = ∂²L/∂V².

    With more terms, q converges to H⁻¹ · ∂F/∂V if alpha < 2 / (largest eigenvalue of P·H); the
    error falls geometrically. Otherwise the terms grow: a warning says so. precondition: P as
    positive tensors shaped like lower, by default the identity. Costs `terms` products. past: as
    for `unrolled`; only its last step is used.
    """

    def solve(v, H):
        scale = [torch.ones_like(x) for x in v] if precondition is None else precondition
        first = power = total = [p * x for p, x in zip(scale, v)]
        for _ in range(terms - 1):
            power = [x - alpha * p * Hx for x, p, Hx in zip(power, scale, H(power))]
            total = add(total, power)
        if terms > 1 and dot(power, power) > dot(first, first):
            warnings.warn(
                f"the terms of the Neumann series grow at alpha = {alpha:g}, so it does not "
                f"converge: take a smaller alpha, or conjugate_gradient",
                stacklevel=2,
            )
        return [alpha * x for x in total]

    return implicit(solve, train_loss, val_loss, lower, upper, past=past, reduce=reduce)


def conjugate_gradient(
    train_loss,
    val_loss,
    lower,
    upper,
    *,
    iterations=3,
    damping=1e-2,
    precondition=None,
    past=None,
    reduce=same,
):
    """
    ∂F/∂m - ∂²L/∂m∂V · q, with (H + damping·I) · q = ∂F/∂V solved by `iterations` steps of conjugate
    gradients. precondition: positive tensors, near the diagonal of H⁻¹. past: as for `neumann`.

    Stops early when solved, or at a direction of negative curvature: H need not be positive
    definite.
    """

    def solve(v, H):
        scale = [torch.ones_like(x) for x in v] if precondition is None else precondition
        q, residual = [torch.zeros_like(x) for x in v], v
        direction = scaled = [p * r for p, r in zip(scale, residual)]
        rr = dot(residual, scaled)
        for _ in range(iterations):
            Hd = [x + damping * d for x, d in zip(H(direction), direction)]
            curvature = dot(direction, Hd)
            if not curvature > 0:
                break
            length = rr / curvature
            q = [x + length * d for x, d in zip(q, direction)]
            residual = [r - length * x for r, x in zip(residual, Hd)]
            scaled = [p * r for p, r in zip(scale, residual)]
            rr, rr_before = dot(residual, scaled), rr
            direction = [r + rr / rr_before * d for r, d in zip(scaled, direction)]
        return q

    return implicit(solve, train_loss, val_loss, lower, upper, past=past, reduce=reduce)


def identity(train_loss, val_loss, lower, upper, *, mode="exact", radius=0.01, reduce=same):
    """
    ∂F/∂m - ∂²L/∂m∂V · ∂F/∂V at the current V: the implicit gradient with H⁻¹ replaced by I.

    In the mode 'finite_difference' it is `darts` of Betty 0.2.1 (arXiv 2207.02849). BiDoRA's
    published program (github.com/t2ance/BiDoRA, commit e7922af) takes that over all weights of the
    network and under dropout (tools/published.py). The paper's equation, as in `unrolled`, has the
    lower level's rate before the second term; here that coefficient is 1.
    """
    check_mode(mode)
    if mode == "exact":
        return implicit(
            lambda v, H: v, train_loss, val_loss, lower, upper, past=None, reduce=reduce
        )
    with restored(lower):
        v, h = val_gradients(val_loss, lower, upper, reduce)
        here = Step([V.data for V in lower], [], [], None, train_loss)
        cross = central_difference(here, v, upper, lower, radius, reduce)
    return [hm - c for hm, c in zip(h, cross)]


@dataclass(frozen=True)
class Hypergradient:
    """
    An entry of HYPERGRADIENTS: all that the optimizer and train.py need to know about a function.

    If the function has a parameter `past`, it is given the last lower-level steps: as many as its
    option "steps" says, or one.
    """

    function: Callable
    options: dict = field(default_factory=dict)  # {an option: the setting in config.py for it}
    second_order: bool = True  # whether it differentiates gradients of the lower level
    float32: bool = False  # whether it needs float32: bfloat16 has too few digits


HYPERGRADIENTS = {
    "first_order": Hypergradient(first_order, second_order=False),
    "unrolled": Hypergradient(unrolled, {"steps": "hypergradient_steps", "lr": "hypergradient_lr"}),
    "finite_difference": Hypergradient(
        functools.partial(unrolled, mode="finite_difference"),
        {"steps": "hypergradient_steps", "lr": "hypergradient_lr"},
        second_order=False,
        float32=True,
    ),
    "neumann": Hypergradient(
        neumann, {"terms": "hypergradient_steps", "alpha": "hypergradient_lr"}
    ),
    "conjugate_gradient": Hypergradient(
        conjugate_gradient, {"iterations": "hypergradient_steps", "damping": "damping"}
    ),
    "identity": Hypergradient(identity),
    "identity_difference": Hypergradient(
        functools.partial(identity, mode="finite_difference"), second_order=False, float32=True
    ),
}


CHOICES = {
    "hypergradient": HYPERGRADIENTS,
    "optimizer": ("adamw", "adamw8bit"),
    "precondition": ("none", "adam"),
}


def check_options(hypergradient, options):
    """Raise ValueError for options that a hypergradient does not have, or for unfit values."""
    entry = HYPERGRADIENTS[hypergradient]
    known = {*entry.options} | ({"radius"} if entry.float32 else set())  # of differences
    if unknown := sorted(options.keys() - known):
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ValueError(f"hypergradient={hypergradient} has no option {unknown[0]!r}: {has}")
    for name, value in options.items():
        whole = name in ("steps", "terms", "iterations")
        least = 1 if whole else 0
        number = isinstance(value, int if whole else (int, float)) and math.isfinite(value)
        if not number or value < least or (value == 0 and name != "damping"):
            kind = "a whole number of at least 1" if whole else "a positive number"
            raise ValueError(f"{name}={value!r} must be {kind}")


def check_choices(hypergradient, optimizer, precondition, coarse):
    """
    Raise ValueError for an unknown choice, or for choices that exclude each other. coarse: whether
    the base has 16 bits.
    """
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


# --------------------------------------------------------------------- the two-level optimizer


class MicroBatches(list):
    """
    A batch in parts whose losses add up, so that the activations of one are in memory at a time.
    Any other batch, also a list, is handed to the loss as it is.
    """


@contextlib.contextmanager
def in_training(model, wanted):
    """
    Put exactly the modules in `wanted` into training mode. Without any, dropout is off: all passes
    of a hypergradient must see the same function.
    """
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = module in wanted
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class BilevelOptimizer:
    """
    AdamW over a model's lower_parameters, and over its upper_parameters (bidora.py) along a
    hypergradient. For a model without upper parameters, lower_step alone is plain training.

    lower_steps     as in bilevel_step
    weight_decay    of the lower level; upper_weight_decay: of magnitudes or singular values
    hypergradient   a key of HYPERGRADIENTS; options: that function's own (lr: by default the lower
                    level's rate at the time)
    grad_clip       the norm to which the gradient of each level is clipped
    optimizer       'adamw', or 'adamw8bit', bitsandbytes' AdamW with 8-bit moments (tensors below
                    4,096 numbers keep 32 bits)
    precondition    'none', or 'adam': unrolled differentiates through AdamW's own update, neumann
                    and conjugate_gradient are preconditioned by its second moments
    reduce          as in the functions; it also reduces lower gradients and losses

    A batch is whatever loss_fn(model, batch) -> scalar takes, or MicroBatches of them. Raises
    ValueError for an unknown choice or option, choices that exclude each other, or a model with
    nothing to train.
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
        grad_clip=1.0,
        optimizer="adamw",
        precondition="none",
        upper_weight_decay=0.0,
        reduce=same,
        **options,
    ):
        from bidora import lower_parameters, upper_parameters  # here: the functions above need none

        coarse = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        check_choices(hypergradient, optimizer, precondition, coarse)
        check_options(hypergradient, options)
        entry = HYPERGRADIENTS[hypergradient]
        self.model, self.lower, self.upper = model, lower_parameters(model), upper_parameters(model)
        if not self.lower:
            raise ValueError(
                "the model has no trainable lower-level parameters: put in adapters first"
            )

        self.function, self.second_order = entry.function, entry.second_order
        self.takes = set(inspect.signature(entry.function).parameters)
        self.looks_back = "past" in self.takes  # on the steps that the lower level has taken
        self.needs_train = entry.function is not first_order
        self.options, self.kept_steps = options, options.get("steps", 1)
        self.lower_steps, self.grad_clip = lower_steps, grad_clip
        self.precondition, self.reduce = precondition, reduce
        self.past = []  # the lower-level steps kept for the next upper_step
        self.begun = False

        AdamW = functools.partial(torch.optim.AdamW, fused=True)  # one kernel: 5 ms a step, not 19
        if optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit as AdamW
        self.lower_optimizer = AdamW(self.lower, lr=lower_lr, weight_decay=weight_decay)
        self.upper_optimizer = (
            AdamW(self.upper, lr=upper_lr, weight_decay=upper_weight_decay) if self.upper else None
        )

    @property
    def optimizers(self):
        """The AdamW of each level that has one."""
        both = {"lower": self.lower_optimizer, "upper": self.upper_optimizer}
        return {level: optimizer for level, optimizer in both.items() if optimizer}

    def state_dict(self):
        """Both levels' states, {"lower": …, "upper": …}; kept steps are not part of it."""
        return {level: optimizer.state_dict() for level, optimizer in self.optimizers.items()}

    def load_state_dict(self, state):
        """Continue from a state_dict; the next upper_step needs a step kept after it."""
        for level, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[level])
        self.past = []

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
        One optimizer step. Raises FloatingPointError, and changes nothing, if the loss or the
        gradient is not finite.
        """
        for parameter, g in zip(parameters, gradients):
            parameter.grad = g
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        finite = bool(torch.isfinite(loss + norm))  # the only number that a step reads from a GPU
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        if not finite:
            self.past = []
            raise FloatingPointError(f"loss {loss.item():g}, gradient norm {norm.item():g}")

    def watched(self, loss_fn, batch, seen):
        """Closures of the loss, one per micro-batch; each appends its value to `seen`."""

        def loss(micro_batch):
            value = loss_fn(self.model, micro_batch)
            seen.append(value.detach())
            if not self.begun:
                self.check_reach(value)
            return value

        parts = batch if isinstance(batch, MicroBatches) else [batch]
        return [functools.partial(loss, micro_batch) for micro_batch in parts]

    def check_reach(self, loss):
        """At the first step: say which parameters the loss does not depend on."""
        found = reached(loss)
        ours = {id(parameter) for parameter in (*self.lower, *self.upper)}
        named = [(name, p) for name, p in self.model.named_parameters() if id(p) in ours]
        layers = [name.rpartition(".")[0] for name, p in named if id(p) not in found]
        layers = list(dict.fromkeys(layers))
        self.begun = bool(ours & found)
        if not layers:
            return

        names = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if layers[5:] else "")
        problem = (
            f"no gradient reaches {names}: is the layer's weight read without calling the layer, "
            f"or is it inside reentrant gradient checkpointing (use_reentrant=False is right)?"
        )
        if not self.begun:
            raise ValueError(problem)
        warnings.warn(problem, stacklevel=2)

    def lower_step(self, loss_fn, batch):
        """
        One step of the lower level on a batch. Returns its loss before the step, a scalar. Steps
        that were kept before it are dropped, since it moves on from where they led.
        """
        self.past, seen = [], []
        losses = self.watched(loss_fn, batch, seen)
        g = total_gradient(losses, self.lower, self.reduce)
        [total] = self.reduce([sum(seen)])
        self.step(self.lower_optimizer, self.lower, g, total)
        return total

    def lower_step_kept(self, loss_fn, batch):
        """
        A lower_step that is kept: the next upper_step without a train batch differentiates through
        it, so that one gradient serves both levels.

        Of several kept steps only the last keeps its graph, to save memory.
        """
        if not self.needs_train:
            return self.lower_step(loss_fn, batch)  # nothing needs to be kept

        for step in self.past:
            step.graph = None
        seen = []
        losses = self.watched(loss_fn, batch, seen)
        graph = None
        if self.looks_back and self.second_order:
            training = {module for module in self.model.modules() if module.training}
            mode = functools.partial(in_training, self.model, training)
            graph = LowerGradient(losses, self.lower, self.reduce, mode)
        g = graph.value if graph else total_gradient(losses, self.lower, self.reduce)

        adam = self.precondition == "adam"
        update = gradient_descent(self.options.get("lr", self.lower_lr))
        if adam:
            update = adamw(self.lower_optimizer, self.grad_clip)
        state = adam_moments(self.lower_optimizer) if adam else []
        step = Step([V.data for V in self.lower], g, state, update, losses, graph)
        self.past = [*self.past, step][-self.kept_steps :]

        # The graph refers to V's values, so the optimizer writes into copies of them. Torch would
        # still count this as a change of V and refuse to use the graph later. The old values will
        # be back by then, but no public function can tell torch so.
        assign(self.lower, [V.data.clone() for V in self.lower])
        [total] = self.reduce([sum(seen)])
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.lower)):
            copies = [x.clone() for x in g]  # clipping writes into them
            self.step(self.lower_optimizer, self.lower, copies, total)
        return total

    def upper_step(self, loss_fn, train_batch, val_batch):
        """
        One step of the upper level along the hypergradient. Returns the val loss from which the
        hypergradient was computed, a scalar tensor.

        train_batch: None to differentiate through the steps that lower_step_kept took (a step
        without its graph builds it anew, without dropout). Raises ValueError without upper
        parameters or without steps to use.
        """
        if not self.upper:
            raise ValueError(
                "the model has no upper-level parameters: adapt it with method='bidora', "
                "or take lower_step alone"
            )

        if train_batch is None and not self.past and self.needs_train:
            raise ValueError(
                "no lower step was kept: give a train batch, or call lower_step_kept first"
            )

        seen = []
        train_loss = self.watched(loss_fn, train_batch, [])
        val_loss = self.watched(loss_fn, val_batch, seen)
        options = self.options | {"reduce": self.reduce} | self.moving_options()
        if train_batch is None and self.past:
            train_loss = self.past[-1].train_loss
            options |= {"past": self.past} if self.looks_back else {}

        try:
            with in_training(self.model, ()):
                h = self.function(train_loss, val_loss, self.lower, self.upper, **options)
        finally:
            self.past = []
        [total] = self.reduce([sum(seen)])
        self.step(self.upper_optimizer, self.upper, h, total)
        return total

    def moving_options(self):
        """The hypergradient's options that change from step to step, as far as it takes them."""
        options, adam = {}, self.precondition == "adam"
        if "lr" in self.takes and "lr" not in self.options:
            options |= {"lr": self.lower_lr}
        if adam and "adam" in self.takes:
            options |= {"adam": self.lower_optimizer, "grad_clip": self.grad_clip}
        if adam and "precondition" in self.takes:
            options |= {"precondition": adam_scale(self.lower_optimizer)}
        return options

    def bilevel_step(self, loss_fn, train_batch, val_batch):
        """
        `lower_steps` steps of the lower level on train_batch, then one of the upper level on
        val_batch, which differentiates through the last of them: as many as the option `steps`.

        loss_fn(model, batch) -> scalar. Returns (train_loss, val_loss), scalar tensors; the train
        loss is the one before the last lower step. Raises ValueError for `steps` above lower_steps.
        """
        if self.kept_steps > self.lower_steps:
            raise ValueError(
                f"steps={self.kept_steps} looks back on more than lower_steps={self.lower_steps}"
            )
        for _ in range(self.lower_steps - self.kept_steps):
            self.lower_step(loss_fn, train_batch)
        for _ in range(self.kept_steps):
            train_loss = self.lower_step_kept(loss_fn, train_batch)
        return train_loss, self.upper_step(loss_fn, None, val_batch)

    # The names of these steps in the `bidora` package on PyPI:

    def lower_level_step(self, loss_fn, train_batch):
        return self.lower_step(loss_fn, train_batch)

    def upper_level_step(self, loss_fn, val_batch, train_batch=None):
        return self.upper_step(loss_fn, train_batch, val_batch)

    def final_finetune_step(self, loss_fn, combined_batch):
        """A lower_step with the upper parameters fixed for good."""
        for parameter in self.upper:
            parameter.requires_grad_(False)
        return self.lower_step(loss_fn, combined_batch)


create_bilevel_optimizer = BilevelOptimizer  # its name in the `bidora` package
