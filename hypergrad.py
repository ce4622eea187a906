"""
Hypergradients: how the validation loss changes with the upper parameters, the lower ones following along.

Lower level: V (direction) minimises L(V, m) on train. Upper level: m (magnitude) minimises F(V*(m), m) on val. So

    dF/dm = ∂F/∂m + (dV*/dm)ᵀ · ∂F/∂V         and the four functions differ in how they treat dV*/dm:

    first_order          ignores it
    unrolled             V* is what K steps give; K = 1 is BiDoRA's choice (arXiv 2410.09758, eq. 8-9; DARTS, 1806.09055)
    neumann              dV*/dm = -H⁻¹ · ∂²L/∂V∂m (implicit function theorem), H⁻¹ by K terms of its series (arXiv 1911.02590)
    conjugate_gradient   the same, H⁻¹ · v solved by K iterations of CG (arXiv 1602.02355)

All have one signature, f(train_loss, val_loss, lower, upper, **options) -> list of tensors, one per upper parameter.
train_loss and val_loss are closures without arguments that return a scalar from the parameters' current values, or lists of
such closures whose values add up: parts of a batch, one in memory at a time. They must be deterministic (no dropout). lower
and upper are lists of parameters. Nothing is changed: values are put back as found, also when a closure raises.

reduce: over several processes, a function that adds up (or averages, if the losses are means over equal shares) a list of tensors over
them. The cross term is a product of a train and a val quantity, so it is not enough to reduce the result: v = ∂F/∂V and every product are
reduced inside.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bidora import lower_parameters, upper_parameters


def same(tensors):
    """The reduce of a single process."""
    return tensors


def parts_of(loss):
    """A loss as a list of closures that add up."""
    return loss if isinstance(loss, (list, tuple)) else [loss]


def add(*lists):
    """Lists of tensors, added one by one."""
    return [sum(tensors) for tensors in zip(*lists)]


def gradient(loss, parameters, **options):
    """∂loss/∂parameters as a list; zeros where the loss does not depend on a parameter."""
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True, **options))


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys))


def total_gradient(loss, parameters, reduce=same):
    """∂loss/∂parameters, part by part, reduced over the processes."""
    return reduce(add(*(gradient(part(), parameters) for part in parts_of(loss))))


def val_gradients(val_loss, lower, upper, reduce=same):
    """v = ∂F/∂V and ∂F/∂m from one backward pass a part."""
    both = total_gradient(val_loss, [*lower, *upper], reduce)
    return both[: len(lower)], both[len(lower) :]


class LowerGradient:
    """
    g = ∂L/∂V at the values that V has now, and products of vectors with its derivatives, Σ_i x_i · ∂g_i/∂(parameters), by double
    backward: Hessian-vector and cross products. A loss in one part keeps one graph for all products; a loss in several makes
    each part's graph anew for each product, so that memory is bounded by the part.
    """

    def __init__(self, train_loss, lower, reduce=same):
        self.parts, self.lower, self.reduce = parts_of(train_loss), lower, reduce
        self.graph = self.differentiable(self.parts[0]) if len(self.parts) == 1 else None
        self.value = (
            reduce([g.detach() for g in self.graph])
            if self.graph
            else total_gradient(self.parts, lower, reduce)
        )

    def differentiable(self, part):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no second derivative
            return gradient(part(), self.lower, create_graph=True)

    def product(self, vectors, parameters, last=False):
        """Σ vectors · ∂g/∂parameters. V must have the values that it had. last: the graph is not needed any more."""
        products = []
        for g in [self.graph] if self.graph else map(self.differentiable, self.parts):
            pairs = [
                (gV, x) for gV, x in zip(g, vectors) if gV.requires_grad
            ]  # parts of g can be constant: a layer that is not used
            with sdpa_kernel(
                SDPBackend.MATH
            ):  # with gradient checkpointing, parts of the forward pass are computed again here
                products.append(
                    gradient(
                        [gV for gV, _ in pairs],
                        parameters,
                        grad_outputs=[x for _, x in pairs],
                        retain_graph=bool(self.graph) and not last,
                    )
                    if pairs
                    else [torch.zeros_like(p) for p in parameters]
                )
        return self.reduce(add(*products))


@contextlib.contextmanager
def restored(parameters):
    """Put the parameters' values back at the end, also when the block raises."""
    found = [p.data for p in parameters]
    try:
        yield
    finally:
        assign(parameters, found)


def assign(parameters, values):
    """
    Give parameters other values, by exchanging tensors rather than by writing into them: a graph made at the old values
    stays usable once they are back.
    """
    for parameter, value in zip(parameters, values):
        parameter.data = value


@dataclass
class Step:
    """A step that the lower level has taken, or tries out: V and the optimizer's state before it, its gradient g, how it moved V."""

    values: list
    g: list
    state: list
    update: object  # a function (V, g, state) -> (V, state)
    train_loss: object  # what g is the gradient of: a closure, or a list of closures
    graph: LowerGradient | None = None  # where g can still be differentiated


def gradient_descent(lr):
    """The update V - lr · g, which has no state."""
    return lambda V, g, state: ([x - lr * gx for x, gx in zip(V, g)], state)


def adam_moments(optimizer):
    """Copies of a torch.optim.AdamW's moments, the first ones followed by the second ones; zeros before its first step."""
    return [
        optimizer.state[p][name].clone() if p in optimizer.state else torch.zeros_like(p)
        for name in ("exp_avg", "exp_avg_sq")
        for p in optimizer.param_groups[0]["params"]
    ]


def adamw(optimizer, grad_clip=None, ahead=0):
    """
    The update that a torch.optim.AdamW does next, or `ahead` steps later: moments and weight decay as they are (arXiv 1711.05101),
    the gradient cut to the norm grad_clip before. Differentiating through the real update is the idea of SAMA (arXiv 2310.05674).
    """
    group = optimizer.param_groups[0]
    (beta1, beta2), lr, eps, decay = (
        group["betas"],
        group["lr"],
        group["eps"],
        group["weight_decay"],
    )
    t = int(optimizer.state.get(group["params"][0], {"step": 0})["step"]) + 1 + ahead

    def update(V, g, moments):
        if grad_clip is not None:
            scale = (grad_clip / (dot(g, g).sqrt() + 1e-6)).clamp_max(
                1.0
            )  # as torch.nn.utils.clip_grad_norm_
            g = [scale * gx for gx in g]
        first = [beta1 * m + (1 - beta1) * gx for m, gx in zip(moments[: len(V)], g)]
        second = [beta2 * m + (1 - beta2) * gx**2 for m, gx in zip(moments[len(V) :], g)]
        tiny = torch.finfo(g[0].dtype).tiny  # a root of 0 would have no derivative
        return [
            (1 - lr * decay) * x
            - lr * (a / (1 - beta1**t)) / ((b / (1 - beta2**t)).clamp_min(tiny).sqrt() + eps)
            for x, a, b in zip(V, first, second)
        ], first + second

    return update


def adjoint(step, v, state):
    """Send derivatives with respect to a step's results, (v, state), back to what it took: V, g and the state before it."""
    inputs = [x.detach().requires_grad_() for x in (*step.values, *step.g, *step.state)]
    n = len(v)
    with torch.enable_grad():
        V, after = step.update(inputs[:n], inputs[n : 2 * n], inputs[2 * n :])
        back = gradient(dot([*V, *after], [*v, *state]), inputs)
    return back[:n], back[n : 2 * n], back[2 * n :]


def first_order(train_loss, val_loss, lower, upper, reduce=same):
    """∂F/∂m at the current V: one gradient. Blind to how V would answer a change of m."""
    return val_gradients(val_loss, [], upper, reduce)[1]


def unrolled(
    train_loss,
    val_loss,
    lower,
    upper,
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

    The steps are `steps` ones from the current V on; or those of `past`, a list of Step, that have led to it. U is gradient descent
    with rate lr; or with adam, a torch.optim.AdamW over `lower`, what that does next (grad_clip as in `adamw`).

    Reverse recursion over the stored steps, from v = ∂F/∂V(V_K): with a = (∂U/∂g)ᵀ·v,
    h ← h + ∂²L/∂m∂V(V_k)·a,  v ← (∂U/∂V)ᵀ·v + ∂²L/∂V²(V_k)·a.  For gradient descent a = -lr·v.
    mode='exact' takes the products from a double backward; 'finite_difference' from ∂L at V ± ε·a with ε = radius / ‖a‖ (two
    gradients; noise in bf16). Memory grows by the adapter's size a step, not by activations.
    """
    if mode not in ("exact", "finite_difference"):
        raise ValueError(f"unknown mode {mode!r}: choose 'exact' or 'finite_difference'")
    with restored(lower):
        trajectory, state = list(past or []), adam_moments(adam) if adam else []
        for k in range(0 if past else steps):
            update = adamw(adam, grad_clip, ahead=k) if adam else gradient_descent(lr)
            # The last step's graph serves the step here and the products below.
            graph = (
                LowerGradient(train_loss, lower, reduce)
                if mode == "exact" and k == steps - 1
                else None
            )
            g = graph.value if graph else total_gradient(train_loss, lower, reduce)
            trajectory.append(Step([V.data for V in lower], g, state, update, train_loss, graph))
            values, state = update(trajectory[-1].values, g, state)
            assign(lower, values)
        v, h = val_gradients(val_loss, lower, upper, reduce)
        state = [torch.zeros_like(x) for x in state or trajectory[-1].state]
        for k, step in reversed(list(enumerate(trajectory))):
            v, a, state = adjoint(step, v, state)
            assign(lower, step.values)
            wanted = (
                [*upper] if k == 0 else [*lower, *upper]
            )  # before the first step V does not depend on m
            if mode == "exact":
                products = (step.graph or LowerGradient(step.train_loss, lower, reduce)).product(
                    a, wanted, last=True
                )
            else:
                epsilon = radius / dot(a, a).sqrt().clamp_min(1e-20)
                assign(lower, [V + epsilon * x for V, x in zip(step.values, a)])
                plus = total_gradient(step.train_loss, wanted, reduce)
                assign(lower, [V - epsilon * x for V, x in zip(step.values, a)])
                minus = total_gradient(step.train_loss, wanted, reduce)
                products = [(p - q) / (2 * epsilon) for p, q in zip(plus, minus)]
            h = add(h, products[-len(upper) :])
            if k > 0:
                v = add(v, products[: -len(upper)])
    return h


def implicit(solve, train_loss, val_loss, lower, upper, past, reduce):
    """∂F/∂m - ∂²L/∂m∂V · q, where q = solve(v, H) for v = ∂F/∂V and H a function that multiplies with ∂²L/∂V²."""
    with restored(lower):
        if past:  # at the values before the last step, whose graph is at hand
            assign(lower, past[-1].values)
        g = (
            past[-1].graph if past else LowerGradient(train_loss, lower, reduce)
        )  # one graph serves all products
        v, h = val_gradients(val_loss, lower, upper, reduce)
        q = solve(v, lambda x: g.product(x, lower))
        return [hm - c for hm, c in zip(h, g.product(q, upper, last=True))]


def neumann(
    train_loss,
    val_loss,
    lower,
    upper,
    terms=3,
    alpha=1e-2,
    precondition=None,
    past=None,
    reduce=same,
):
    """
    ∂F/∂m - ∂²L/∂m∂V · q with q = alpha · Σ_{j<terms} (I - alpha·P·H)^j · P · ∂F/∂V, H = ∂²L/∂V².

    q tends to H⁻¹ · ∂F/∂V as terms grows, if alpha < 2 / (largest eigenvalue of P·H); the error falls geometrically. P:
    precondition, positive tensors like lower's, or the identity. Costs `terms` products. past: as for `unrolled`, the last of it.
    """

    def solve(v, H):
        scale = [torch.ones_like(x) for x in v] if precondition is None else precondition
        power = total = [p * x for p, x in zip(scale, v)]
        for _ in range(terms - 1):
            power = [x - alpha * p * Hx for x, p, Hx in zip(power, scale, H(power))]
            total = add(total, power)
        return [alpha * x for x in total]

    return implicit(solve, train_loss, val_loss, lower, upper, past, reduce)


def conjugate_gradient(
    train_loss,
    val_loss,
    lower,
    upper,
    iterations=3,
    damping=1e-2,
    precondition=None,
    past=None,
    reduce=same,
):
    """
    ∂F/∂m - ∂²L/∂m∂V · q with (H + damping·I) · q = ∂F/∂V solved by `iterations` steps of conjugate gradients, preconditioned by
    P (positive tensors like lower's, near the diagonal of H⁻¹) if given.

    Stops early at a direction of negative curvature (H of a network need not be positive), or when solved.
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

    return implicit(solve, train_loss, val_loss, lower, upper, past, reduce)


def adam_scale(optimizer):
    """What a torch.optim.AdamW divides by, as a preconditioner: 1 / (√second moment + eps), one tensor a parameter."""
    group = optimizer.param_groups[0]
    t = int(optimizer.state[group["params"][0]]["step"])
    second = adam_moments(optimizer)[len(group["params"]) :]
    return [1 / ((m / (1 - group["betas"][1] ** t)).sqrt() + group["eps"]) for m in second]


HYPERGRADIENTS = {
    "first_order": first_order,
    "unrolled": unrolled,
    "neumann": neumann,
    "conjugate_gradient": conjugate_gradient,
}


class BilevelOptimizer:
    """
    AdamW at both levels; the upper one is fed a hypergradient. Without upper parameters, lower_step alone is plain training.

    lower, upper: lists of parameters. hypergradient: a key of HYPERGRADIENTS, with its options. With keep=True, lower_step remembers
    what it did, gradient's graph included, and the next upper_step without train batch differentiates through that: one
    gradient less. reduce: as in the functions; it also reduces the lower gradients and the losses.
    """

    def __init__(
        self,
        model,
        lower,
        upper,
        lower_lr,
        upper_lr,
        lower_steps,
        hypergradient,
        options,
        weight_decay,
        grad_clip,
        optimizer,
        precondition,
        reduce,
    ):
        self.model, self.lower, self.upper = model, lower, upper
        self.lower_steps, self.hypergradient, self.options, self.grad_clip = (
            lower_steps,
            hypergradient,
            options,
            grad_clip,
        )
        self.precondition, self.reduce = precondition, reduce
        self.past = []  # kept steps since the last upper one
        if optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit as AdamW
        else:
            AdamW = functools.partial(
                torch.optim.AdamW, fused=True
            )  # one kernel for each tensor: 5 ms a step instead of 19 for DoRA's 630
        self.lower_optimizer = AdamW(lower, lr=lower_lr, weight_decay=weight_decay)
        self.upper_optimizer = AdamW(upper, lr=upper_lr, weight_decay=0.0) if upper else None

    def scale_lr(self, factor):
        """Set both levels' learning rates to factor × the ones given at the start."""
        for optimizer in filter(None, (self.lower_optimizer, self.upper_optimizer)):
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("base_lr", group["lr"])

    def step(self, optimizer, parameters, gradients, loss):
        """One optimizer step. Raises FloatingPointError, changing nothing, if loss or gradients are not finite."""
        for parameter, g in zip(parameters, gradients):
            parameter.grad = g
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.grad_clip)
        finite = torch.isfinite(loss + norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        if not finite:
            raise FloatingPointError(f"loss {loss.item():g}, gradient norm {norm.item():g}")

    def lower_step(self, loss_fn, *parts, keep=False):
        """
        One step of the lower level on a batch, given whole, or in parts whose losses and gradients add up (one part's activations
        in memory at a time). Returns its loss before the step, a scalar tensor. keep: see the class.
        """
        seen = []

        def closure(part):
            def loss():
                value = loss_fn(self.model, part)
                seen.append(value.detach())
                return value

            return loss

        losses, protect = [closure(part) for part in parts], contextlib.nullcontext()
        if keep and self.hypergradient != "first_order":
            for step in self.past:
                step.graph = None  # only the last step's stays
            graph = (
                LowerGradient(losses, self.lower, self.reduce)
                if self.options.get("mode", "exact") == "exact"
                else None
            )
            g = graph.value if graph else total_gradient(losses, self.lower, self.reduce)
            adam = self.precondition == "adam"
            update = (
                adamw(self.lower_optimizer, self.grad_clip)
                if adam
                else gradient_descent(self.options.get("lr"))
            )
            step = Step(
                [V.data for V in self.lower],
                g,
                adam_moments(self.lower_optimizer) if adam else [],
                update,
                losses,
                graph,
            )
            self.past = [*self.past, step][-self.options.get("steps", 1) :]
            # The graph refers to V's values: the optimizer writes into copies of them, which torch need not know.
            assign(self.lower, [V.data.clone() for V in self.lower])
            protect = torch.autograd._unsafe_preserve_version_counter(tuple(self.lower))
            g = [x.clone() for x in g]  # clipping writes into it
        else:
            g = total_gradient(losses, self.lower, self.reduce)
        [total] = self.reduce([sum(seen)])
        with protect:
            self.step(self.lower_optimizer, self.lower, g, total)
        return total

    def upper_step(self, loss_fn, train_batch, val_batch):
        """
        One step of the upper level along the hypergradient; returns the val loss that it saw, a scalar tensor.

        train_batch: None to differentiate through the steps that lower_step kept (where their graphs must be made anew, without dropout).
        A batch that is a list is taken for a list of parts, as lower_step's.
        """
        if not self.upper:
            raise ValueError(
                "the model has no upper-level parameters: adapt it with method='bidora', or take lower_step alone"
            )
        if train_batch is None and not self.past and self.hypergradient != "first_order":
            raise ValueError(
                "no lower step was kept: give a train batch, or call lower_step(..., keep=True) first"
            )
        seen = []

        def val_loss(part):
            value = loss_fn(self.model, part)
            seen.append(value.detach())
            return value

        def closures(loss, batch):
            return [
                functools.partial(loss, part)
                for part in (batch if isinstance(batch, list) else [batch])
            ]

        options = dict(self.options, reduce=self.reduce)
        if train_batch is None and self.hypergradient != "first_order":
            options["past"] = self.past
        if self.precondition == "adam" and self.hypergradient == "unrolled":
            options |= {"adam": self.lower_optimizer, "grad_clip": self.grad_clip}
        elif self.precondition == "adam":
            options["precondition"] = adam_scale(self.lower_optimizer)
        training = [module for module in self.model.modules() if module.training]
        for module in (
            training
        ):  # no dropout: a hypergradient compares several passes, so they must see one function
            module.training = False
        try:
            h = HYPERGRADIENTS[self.hypergradient](
                closures(lambda part: loss_fn(self.model, part), train_batch),
                closures(val_loss, val_batch),
                self.lower,
                self.upper,
                **options,
            )
        finally:
            self.past = []
            for module in training:
                module.training = True
        [total] = self.reduce([sum(seen)])
        self.step(self.upper_optimizer, self.upper, h, total)
        return total

    def bilevel_step(self, loss_fn, train_batch, val_batch):
        """
        `lower_steps` steps of the lower level on train_batch, then one of the upper level on val_batch, through the last of them.

        loss_fn(model, batch) -> scalar. Returns (train_loss, val_loss) as floats, the train loss before the last lower step.
        """
        for i in range(self.lower_steps):
            train_loss = self.lower_step(loss_fn, train_batch, keep=i == self.lower_steps - 1)
        return train_loss.item(), self.upper_step(loss_fn, None, [val_batch]).item()


def create_bilevel_optimizer(
    model,
    lower_lr,
    upper_lr,
    lower_steps=1,
    hypergradient="first_order",
    weight_decay=0.0,
    grad_clip=1.0,
    optimizer="adamw",
    precondition="none",
    reduce=same,
    **options,
):
    """
    A BilevelOptimizer over the model's lower and upper parameters (bidora.lower_parameters, upper_parameters).

    hypergradient: 'first_order', 'unrolled', 'neumann' or 'conjugate_gradient', with that function's options (`unrolled`
    steps with lower_lr unless `lr` is given). grad_clip: the largest gradient norm of each level. optimizer: 'adamw', or
    'adamw8bit', bitsandbytes' AdamW with moments in 8 bits (tensors below 4,096 numbers keep 32). precondition: 'none', or 'adam':
    unrolled differentiates through AdamW's own update, the implicit ones are preconditioned by its second moments.
    Raises ValueError for a choice that is none, options that don't go together, or a model with nothing to train.
    """
    if hypergradient not in HYPERGRADIENTS:
        raise ValueError(
            f"unknown hypergradient {hypergradient!r}: choose {', '.join(HYPERGRADIENTS)}"
        )
    if optimizer not in ("adamw", "adamw8bit"):
        raise ValueError(f"unknown optimizer {optimizer!r}: choose adamw, adamw8bit")
    if precondition not in ("none", "adam"):
        raise ValueError(f"unknown precondition {precondition!r}: choose none, adam")
    if precondition == "adam" and optimizer == "adamw8bit":
        raise ValueError(
            "precondition=adam reads AdamW's moments, which adamw8bit keeps in 8 bits: use optimizer=adamw"
        )
    if options.get("mode") == "finite_difference" and any(
        p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()
    ):
        raise ValueError(
            "mode=finite_difference is rounding noise over a base in bfloat16 or float16: use mode=exact, or float32"
        )
    if hypergradient == "unrolled":
        options.setdefault("lr", lower_lr)
    lower, upper = lower_parameters(model), upper_parameters(model)
    if not lower:
        raise ValueError("the model has no trainable lower-level parameters: put in adapters first")
    return BilevelOptimizer(
        model,
        lower,
        upper,
        lower_lr,
        upper_lr,
        lower_steps,
        hypergradient,
        options,
        weight_decay,
        grad_clip,
        optimizer,
        "none" if hypergradient == "first_order" else precondition,
        reduce,
    )
