"""
Hypergradients: how the val loss changes with the upper parameters while the lower ones follow.

Lower level: V (all factors A and B) minimises L(V, m) on train. Upper level: m (the magnitudes)
minimises F(V*(m), m) on val. So dF/dm = ∂F/∂m + (dV*/dm)ᵀ · v, v = ∂F/∂V. The methods differ in
dV*/dm, with H = ∂²L/∂V², and in where they take F:

    first_order          0; F at V
    unrolled             through K `steps`, 1 in BiDoRA (2410.09758, eq. 8-9); F after them
    finite_difference    the same, second derivatives by differences (arXiv 1806.09055, section 2.3)
    neumann              -H⁻¹ · ∂²L/∂V∂m, H⁻¹ by `terms` of its series (arXiv 1911.02590); F at V
    conjugate_gradient   the same, H⁻¹ · v by `iterations` of CG (arXiv 1602.02355)
    identity             the same, I in place of H⁻¹, as in the library Betty

All have one signature, f(train_loss, val_loss, lower, upper, *, options) -> a tensor per upper
parameter; lower and upper are the lists of tensors V and m. A loss is a closure without arguments
that returns a scalar at the parameters' current values, or a list of closures whose values add up
(micro-batches: one is in memory at a time). It must be deterministic (no dropout). Parameters get
their values back, also when a closure raises.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

try:
    from support.fast.kernels import second_derivatives
except ImportError:  # copied alone into another project
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def second_derivatives():
        return sdpa_kernel(SDPBackend.MATH)


# Three of them in their plainest form, for reading; tests compare them with those below. Further
# below: val_gradients (∂F/∂V and ∂F/∂m), assign (gives V other values), restored (puts V back).
# They simulate a step from V; training differentiates the step that it has just taken (`past`).


def plain_first_order(train_loss, val_loss, V, m):
    """∂F/∂m, as if V did not follow m."""
    return torch.autograd.grad(val_loss(), m)


def plain_unrolled(train_loss, val_loss, V, m, lr):
    """Through one step, the paper's: ∂F/∂m - lr · ∂²L/∂m∂V · ∂F/∂V, L at V, F at V - lr · ∂L/∂V."""
    g = torch.autograd.grad(train_loss(), V, create_graph=True)  # ∂L/∂V, differentiable
    with restored(V):
        assign(V, [x.detach() - lr * gx.detach() for x, gx in zip(V, g)])
        v, direct = val_gradients(val_loss, V, m)  # ∂F/∂V and ∂F/∂m at V'

    cross = torch.autograd.grad(g, m, grad_outputs=v)  # ∂²L/∂m∂V · v
    return [d - lr * c for d, c in zip(direct, cross)]


def plain_neumann(train_loss, val_loss, V, m, alpha, terms):
    """∂F/∂m - ∂²L/∂m∂V · q, where q = alpha · Σ_{j<terms} (I - alpha·H)^j · ∂F/∂V ≈ H⁻¹ · ∂F/∂V."""
    g = torch.autograd.grad(train_loss(), V, create_graph=True)
    power, direct = val_gradients(val_loss, V, m)
    q = [torch.zeros_like(x) for x in power]
    for _ in range(terms):
        q = [x + alpha * p for x, p in zip(q, power)]
        Hp = torch.autograd.grad(g, V, grad_outputs=power, retain_graph=True)  # ∂²L/∂V² · power
        power = [p - alpha * x for p, x in zip(power, Hp)]

    cross = torch.autograd.grad(g, m, grad_outputs=q)
    return [d - c for d, c in zip(direct, cross)]


def one_process(tensors):
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


def add(*lists):
    """The sum of several lists of tensors, as one list; a single list as it is."""
    return [sum(rest, first) for first, *rest in zip(*lists)]


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys))


def gradient(loss, parameters, **options):
    """∂loss/∂parameters as a list; zeros where the loss does not depend on a parameter."""
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True, **options))


def total_gradient(loss, parameters, reduce=one_process):
    """∂loss/∂parameters, one micro-batch at a time, reduced over the processes."""
    return reduce(add(*(gradient(closure(), parameters) for closure in closures(loss))))


def val_gradients(val_loss, lower, upper, reduce=one_process):
    """v = ∂F/∂V and ∂F/∂m, from one backward pass per micro-batch."""
    both = total_gradient(val_loss, [*lower, *upper], reduce)
    return both[: len(lower)], both[len(lower) :]


class LowerGradient:
    """
    g = ∂L/∂V at V's current values, and its products Σ_i x_i · ∂g_i/∂(parameters): Hessian-vector
    and cross products, by double backward.

    A loss of one micro-batch keeps one graph for all products. A loss of several builds each
    micro-batch's graph anew for each product, so that only one is in memory at a time.

    context: makes a context manager for the products of a kept graph. Gradient checkpointing
    computes the forward pass again there, and must find the model's dropout as it was.
    """

    def __init__(self, train_loss, lower, reduce=one_process, context=contextlib.nullcontext):
        self.losses, self.lower, self.reduce = closures(train_loss), lower, reduce
        self.graph = self.differentiable(self.losses[0]) if len(self.losses) == 1 else None
        self.context = context if self.graph else contextlib.nullcontext
        if self.graph:
            self.value = reduce([g.detach() for g in self.graph])
        else:
            self.value = total_gradient(self.losses, lower, reduce)

    def differentiable(self, loss):
        with second_derivatives():  # fused attention kernels have no second derivative
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
            options = dict(grad_outputs=weights, retain_graph=keep)
            with second_derivatives(), self.context():
                products.append(gradient(outputs, parameters, **options))
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


@dataclass
class Step:
    """A step of the lower level, real or simulated: its start, and a model to differentiate."""

    values: list  # V before it
    g: list  # its gradient ∂L/∂V
    state: list  # the optimizer's state before it
    update: Callable  # the model that is differentiated: (V, g, state) -> (V, state)
    train_loss: object  # the loss whose gradient g is: a closure, or a list of closures
    graph: LowerGradient | None = None  # if kept: g's, with its graph if there is one micro-batch


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
    return torch.as_tensor(state["step"] if state else 0, dtype=torch.float64)


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


def first_order(train_loss, val_loss, lower, upper, *, reduce=one_process):
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
    reduce=one_process,
):
    """
    The gradient through K steps V_{k+1} = U(V_k, g_k), g_k = ∂L/∂V(V_k, m), of the lower level.

    The steps are K = `steps` simulated ones from the current V, or those in `past`, a list of Step
    that led to it. U is gradient descent with rate lr, or the next update of `adam`, a
    torch.optim.AdamW over `lower` (grad_clip as in `adamw`). A Step in `past` has its own U: steps,
    lr, adam and grad_clip are for simulated ones.

    mode='exact' takes products by double backward; 'finite_difference' from ∂L at V ± ε·a with
    ε = radius / ‖a‖ (DARTS, arXiv 1806.09055, section 2.3): two gradients, but noise in bf16.
    One step's graph, with its activations, is in memory; each further step adds V and g, or with
    adam four times V's size. Raises ValueError for another mode.
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
    Recursion from the last Step to the first, from v = ∂F/∂V(V_K), h = ∂F/∂m. With a = (∂U/∂g)ᵀ·v
    (plus, through AdamW's moments, what later steps owe to g),

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
    """Σ a · ∂g/∂wanted ≈ (∂L/∂wanted at V + ε·a, minus that at V - ε·a) / 2ε, ε = radius / ‖a‖."""
    epsilon = radius / dot(a, a).sqrt().clamp_min(1e-20)
    assign(lower, [V + epsilon * x for V, x in zip(step.values, a)])
    plus = total_gradient(step.train_loss, wanted, reduce)
    assign(lower, [V - epsilon * x for V, x in zip(step.values, a)])
    minus = total_gradient(step.train_loss, wanted, reduce)
    return [(p - q) / (2 * epsilon) for p, q in zip(plus, minus)]


def implicit(solve, train_loss, val_loss, lower, upper, *, past, reduce):
    """
    ∂F/∂m - ∂²L/∂m∂V · q with q = solve(v, H), v = ∂F/∂V, and H multiplying by ∂²L/∂V². With past,
    all of it is taken at V before its last step.
    """
    with restored(lower):
        if past:  # the kept graph of the last step is valid at the values before that step
            assign(lower, past[-1].values)
        g = past[-1].graph if past else None
        g = g or LowerGradient(past[-1].train_loss if past else train_loss, lower, reduce)
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
    reduce=one_process,
):
    """
    ∂F/∂m - ∂²L/∂m∂V · q, q = alpha · Σ_{j<terms} (I - alpha·P·H)^j · P · ∂F/∂V, H = ∂²L/∂V².

    With more terms, q converges to H⁻¹ · ∂F/∂V if all eigenvalues of P·H are positive and alpha is
    below 2 / the largest; the error falls geometrically. Otherwise the terms grow: a warning says
    so. alpha is no LoRA scale. precondition: P as positive tensors shaped like lower, by default
    the identity. Costs `terms` products. past: as for `unrolled`; only its last step is used.
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
                f"converge: alpha is too large, or the Hessian has negative eigenvalues; take a "
                f"smaller alpha, or conjugate_gradient",
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
    reduce=one_process,
):
    """
    ∂F/∂m - ∂²L/∂m∂V · q, with (H + damping·I) · q = ∂F/∂V solved by `iterations` steps of conjugate
    gradients. precondition: positive tensors, near the diagonal of H⁻¹. past: as for `neumann`.

    Stops early when solved, or at a direction of negative curvature, where H is not definite.
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


def identity(train_loss, val_loss, lower, upper, *, mode="exact", radius=0.01, reduce=one_process):
    """
    ∂F/∂m - ∂²L/∂m∂V · ∂F/∂V at the current V: the implicit gradient with H⁻¹ replaced by I.

    In the mode 'finite_difference' it is `darts` of Betty 0.2.1 (arXiv 2207.02849). BiDoRA's
    published program (github.com/t2ance/BiDoRA, commit e7922af) takes that over all weights of the
    network and under dropout (research/published.py). The paper's equation, as in `unrolled`, has
    the lower level's rate before the second term; here that coefficient is 1.
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
