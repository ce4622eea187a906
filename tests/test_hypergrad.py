"""Each hypergradient against closed forms and against autograd through the steps, in float64."""

import copy
import functools
import inspect
import json
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from test_distributed import forked
from test_kernels import Watched
from test_model import checkpoint
from torch.autograd.functional import jacobian

import bidora
import data
import hypergrad
from bidora import replace_linear_with_bidora
from bilevel import HYPERGRADIENTS, MicroBatches, create_bilevel_optimizer
from hypergrad import conjugate_gradient, first_order, neumann, unrolled
from model import Transformer

UNROLLED = ("unrolled", "finite_difference")  # look back on steps of the lower level
HERE = ("first_order", "identity", "identity_difference")  # are taken at the current values
DIFFERENCES = ("finite_difference", "identity_difference")


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def adapted(*layers, **options):
    """The layers in a row, frozen, each linear one with a BiDoRA adapter of rank 1."""
    model = nn.Sequential(*layers).requires_grad_(False)
    linear = [name for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
    return replace_linear_with_bidora(model, **dict(rank=1, target_modules=linear) | options)


class Quadratic:
    """
    Lower L = ½ VᵀHV - Vᵀ C m, so V* = H⁻¹ C m; upper F = ½ |V - t|² + ½ |m|² + bᵀm.

    At any V: ∂F/∂V = V - t, ∂F/∂m = m + b, ∂²L/∂m∂V = -Cᵀ. dF/dm is m + b + Cᵀ H⁻¹ (V - t).
    """

    def __init__(self, n=6, k=4):
        root = draw(n, n)
        self.H = root @ root.T / n + 0.5 * torch.eye(n, dtype=torch.float64)
        self.C, self.t, self.b = draw(n, k), draw(n), draw(k)
        self.V, self.m = nn.Parameter(draw(n)), nn.Parameter(draw(k))
        self.arguments = (self.lower_loss, self.upper_loss, [self.V], [self.m])

    def lower_loss(self):
        return 0.5 * self.V @ self.H @ self.V - self.V @ self.C @ self.m

    def upper_loss(self):
        return 0.5 * ((self.V - self.t).square().sum() + self.m.square().sum()) + self.b @ self.m

    def exact(self, inverse):
        """m + b + Cᵀ · inverse · (V - t)"""
        return (self.m + self.b + self.C.T @ inverse @ (self.V - self.t)).detach()


class Curved:
    """Two BiDoRA layers: V = A and B, m = the magnitudes; train and val are different samples."""

    def __init__(self):
        self.model = adapted(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        for layer in bidora.adapter_layers(self.model).values():
            nn.init.normal_(layer.lora_B, std=0.3)
        self.train, self.val = ((draw(20, 5), draw(20, 1)) for _ in range(2))
        self.lower = bidora.lower_parameters(self.model)
        self.upper = bidora.upper_parameters(self.model)

    def loss(self, model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    def loss_at(self, lower, upper, batch):
        """The loss with other values of the parameters of both levels."""
        values = {id(p): x for p, x in zip(self.lower + self.upper, [*lower, *upper])}
        named = {n: values.get(id(p), p.detach()) for n, p in self.model.named_parameters()}
        return self.loss(lambda x: torch.func.functional_call(self.model, named, x), batch)

    def through_autograd(self, steps, update):
        """The hypergradient by plain autograd through V ← update(V, ∂L/∂V)."""
        levels = self.lower, self.upper
        lower, upper = ([p.detach().clone().requires_grad_() for p in level] for level in levels)
        for _ in range(steps):
            loss = self.loss_at(lower, upper, self.train)
            lower = update(lower, torch.autograd.grad(loss, lower, create_graph=True))
        return torch.autograd.grad(self.loss_at(lower, upper, self.val), upper)

    def through_descent(self, lr, steps):
        return self.through_autograd(steps, lambda V, g: [p - lr * x for p, x in zip(V, g)])

    def arguments(self):
        train, val = (functools.partial(self.loss, self.model, x) for x in (self.train, self.val))
        return train, val, self.lower, self.upper


def test_first_order_is_the_direct_gradient():
    q = Quadratic()
    torch.testing.assert_close(first_order(*q.arguments)[0], (q.m + q.b).detach())


@pytest.mark.parametrize("iterations, damping", [(6, 0.0), (50, 0.0), (6, 0.7)])
def test_conjugate_gradient_solves_the_damped_system_in_n_iterations(iterations, damping):
    """Six unknowns, so six steps, up to rounding: 1e-9. More do no harm."""
    q = Quadratic(n=6)
    exact = q.exact(torch.linalg.inv(q.H + damping * torch.eye(6, dtype=torch.float64)))
    [h] = conjugate_gradient(*q.arguments, iterations=iterations, damping=damping)
    assert (h - exact).norm() < 1e-9


@pytest.mark.parametrize("terms", [1, 2, 5, 600])
def test_neumann_equals_its_truncated_series(terms):
    q = Quadratic()
    one = torch.eye(6, dtype=torch.float64)
    series = 0.1 * sum(torch.linalg.matrix_power(one - 0.1 * q.H, j) for j in range(terms))
    torch.testing.assert_close(neumann(*q.arguments, terms=terms, alpha=0.1)[0], q.exact(series))
    if terms == 600:  # enough for the implicit gradient
        torch.testing.assert_close(series, torch.linalg.inv(q.H), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "plain, general, options",
    [
        (hypergrad.plain_first_order, first_order, {}),
        (hypergrad.plain_unrolled, unrolled, {"lr": 0.1}),
        (hypergrad.plain_neumann, neumann, {"alpha": 0.05, "terms": 4}),
    ],
)
def test_the_plain_forms_equal_the_general_ones(plain, general, options):
    """1e-12 in float64: the same products, in another order."""
    c = Curved()
    h, expected = plain(*c.arguments(), **options), general(*c.arguments(), **options)
    torch.testing.assert_close(list(h), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unrolled_equals_autograd_through_the_steps(steps):
    """1e-8 relative: the same derivatives, in another order of operations."""
    c = Curved()
    h, expected = unrolled(*c.arguments(), lr=0.1, steps=steps), c.through_descent(0.1, steps)
    torch.testing.assert_close(tuple(h), expected, rtol=1e-8, atol=1e-10)


def test_finite_difference_tends_to_exact_quadratically():
    """A tenth of the radius, a hundredth of the error, as for any central difference."""
    c, options = Curved(), dict(lr=0.1, steps=2)
    exact, first = unrolled(*c.arguments(), **options), first_order(*c.arguments())
    errors = []
    for radius in (1e-3, 1e-4):
        h = unrolled(*c.arguments(), **options, mode="finite_difference", radius=radius)
        errors.append((torch.cat(h) - torch.cat(exact)).norm().item())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2) and errors[1] < 1e-5
    # The second-order part is no rounding error.
    assert (torch.cat(exact) - torch.cat(first)).norm() > 1e-2


@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_parameters_are_left_as_found_also_after_an_error(name):
    train_loss, val_loss, lower, upper = Curved().arguments()
    before = [(p.detach().clone(), p.data_ptr()) for p in lower + upper]
    HYPERGRADIENTS[name].function(train_loss, val_loss, lower, upper)

    def broken():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        HYPERGRADIENTS[name].function(train_loss, broken, lower, upper)
    for p, (value, place) in zip(lower + upper, before):
        assert torch.equal(p, value) and p.data_ptr() == place and p.grad is None


def through_a_step(before, after, lr):
    """The hypergradient through the gradient step that led from one Curved to the other."""
    loss = before.loss(before.model, before.train)
    g = torch.autograd.grad(loss, before.lower, create_graph=True)
    both = torch.autograd.grad(after.loss(after.model, after.val), after.lower + after.upper)
    v, direct = both[: len(g)], both[len(g) :]
    return [h - lr * x for h, x in zip(direct, torch.autograd.grad(g, before.upper, v))]


@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_bilevel_step_moves_each_level_along_its_own_gradient(name):
    """
    The lower parameters move by AdamW on the train loss alone, the upper ones by Adam on the
    hypergradient alone: for `unrolled` through the step just taken, for `identity` at its end, for
    the other implicit ones where it began, whose graph they share.
    """
    c = Curved()
    before, after = copy.deepcopy(c), copy.deepcopy(c)
    options = {"lr": 0.05} if name in UNROLLED else {}
    optimizer = create_bilevel_optimizer(
        c.model, 1e-2, 1e-3, weight_decay=0.0, hypergradient=name, grad_clip=float("inf"), **options
    )
    train_loss, val_loss = optimizer.bilevel_step(c.loss, c.train, c.val)

    expected = after.loss(after.model, after.train)
    expected.backward()
    torch.optim.AdamW(after.lower, lr=1e-2, weight_decay=0.0).step()
    torch.testing.assert_close(c.lower, after.lower)
    assert train_loss.item() == pytest.approx(expected.item()) and val_loss.shape == ()

    if name in UNROLLED:
        h = through_a_step(before, after, 0.05)
    else:
        h = HYPERGRADIENTS[name].function(*(after if name in HERE else before).arguments())
    for m, g in zip(before.upper, h):
        m.grad = g
    torch.optim.AdamW(before.upper, lr=1e-3, weight_decay=0.0).step()
    # Central differences are exact up to ε²: 1e-5 of a step that is 1e-3 long.
    tolerance = dict(rtol=0, atol=1e-6) if name == "finite_difference" else {}
    torch.testing.assert_close(c.upper, before.upper, **tolerance)


@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_a_parameter_that_no_loss_uses_gets_zeros_and_disturbs_nothing(name):
    q = Quadratic()
    idle = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    alone = HYPERGRADIENTS[name].function(*q.arguments)
    h = HYPERGRADIENTS[name].function(q.lower_loss, q.upper_loss, [q.V, idle[0]], [q.m, idle[1]])
    torch.testing.assert_close(h, [alone[0], torch.zeros(3, dtype=torch.float64)])


def test_hypergradient_sees_no_dropout_and_training_goes_on_with_it():
    model = adapted(nn.Linear(5, 8), nn.Linear(8, 1), lora_dropout=0.5).train()
    x, seen = torch.randn(4, 5), []

    def loss_fn(model, batch):
        seen.append({module.training for module in model.modules()})
        return model(batch).square().mean()

    create_bilevel_optimizer(model, hypergradient="unrolled").bilevel_step(loss_fn, x, x)
    # The step itself, whose graph is shared, and the val loss.
    assert seen == [{True}, {False}] and model.training
    create_bilevel_optimizer(model, hypergradient="unrolled").upper_step(loss_fn, x, train_batch=x)
    assert seen[2:] == [{False}, {False}] and model.training


def test_lower_steps_are_taken_before_each_upper_step():
    c, calls = Curved(), []

    def loss_fn(model, batch):
        calls.append("train" if batch is c.train else "val")
        return c.loss(model, batch)

    optimizer = create_bilevel_optimizer(c.model, 1e-3, 1e-3, lower_steps=3)
    optimizer.bilevel_step(loss_fn, c.train, c.val)
    assert calls == ["train"] * 3 + ["val"]


def test_a_loss_that_is_not_finite_changes_nothing_and_its_step_is_not_kept():
    c = Curved()
    before = [p.detach().clone() for p in c.lower]
    optimizer = create_bilevel_optimizer(c.model, 1e-3, 1e-3)
    for value in ("nan", "inf"):
        with pytest.raises(FloatingPointError, match=value):
            optimizer.lower_step(lambda m, batch, x=value: c.loss(m, batch) * float(x), c.train)
    assert all(torch.equal(p, b) for p, b in zip(c.lower, before))
    with pytest.raises(ValueError, match="no lower step was taken"):
        optimizer.upper_step(c.loss, c.val)


def test_fused_attention_is_differentiated_twice():
    """Of transformers, which calls scaled_dot_product_attention: against finite differences."""
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)
    model = transformers.LlamaForCausalLM(config).double()
    replace_linear_with_bidora(model.requires_grad_(False), 2, target_modules=("q_proj", "v_proj"))
    for layer in bidora.adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.5)
    train, val = (
        functools.partial(lambda ids: model(ids, labels=ids).loss, ids)
        for ids in torch.randint(0, 31, (2, 3, 9))
    )
    arguments = (train, val, bidora.lower_parameters(model), bidora.upper_parameters(model))
    exact = unrolled(*arguments, lr=1.0)
    difference = unrolled(*arguments, lr=1.0, mode="finite_difference", radius=1e-3)
    torch.testing.assert_close(difference, exact, rtol=1e-4, atol=1e-6)


def test_an_unknown_mode_and_a_model_without_both_levels_are_refused():
    x = torch.ones(2, 5)
    with pytest.raises(ValueError, match="unknown mode"):
        unrolled(*Curved().arguments(), mode="guess")
    with pytest.raises(ValueError, match="put in adapters"):
        create_bilevel_optimizer(nn.Linear(2, 2).requires_grad_(False), 1e-3, 1e-3)
    optimizer = create_bilevel_optimizer(adapted(nn.Linear(5, 1), method="dora"), 1e-3, 1e-3)
    with pytest.raises(ValueError, match="no upper-level parameters"):
        optimizer.bilevel_step(square, x, x)


class Logistic:
    """Logistic regression, penalty exp(m_j) a feature, solved by Newton to a gradient of 1e-13."""

    def __init__(self, n=6):
        truth = draw(n)
        self.X = draw(60, n) @ torch.diag(torch.linspace(0.5, 2, n, dtype=torch.float64))
        self.Xv = draw(40, n)
        self.y = torch.sign(self.X @ truth + draw(60))
        self.yv = torch.sign(self.Xv @ truth + draw(40))
        self.V, self.m = nn.Parameter(torch.zeros_like(truth)), nn.Parameter(draw(n) - 1)
        train, val = (lambda: self.lower_loss(self.V, self.m), lambda: self.upper_loss(self.V))
        self.arguments = (train, val, [self.V], [self.m])
        self.V.data = self.solve(self.m.detach())

    def lower_loss(self, V, m):
        return F.softplus(-self.y * (self.X @ V)).sum() + 0.5 * (m.exp() * V * V).sum()

    def upper_loss(self, V):
        return F.softplus(-self.yv * (self.Xv @ V)).sum()

    def hessian(self, V, m):
        return torch.func.hessian(self.lower_loss)(V, m)

    def solve(self, m):
        V = torch.zeros_like(m)
        for _ in range(30):
            V = V - torch.linalg.solve(self.hessian(V, m), torch.func.grad(self.lower_loss)(V, m))
        assert torch.func.grad(self.lower_loss)(V, m).norm() < 1e-12
        return V

    def resolved(self):
        return central_differences(lambda m: self.upper_loss(self.solve(m)), self.m.detach(), 1e-5)


def central_differences(f, x, epsilon):
    steps = epsilon * torch.eye(len(x), dtype=torch.float64)
    return torch.stack([(f(x + step) - f(x - step)) / (2 * epsilon) for step in steps])


def error(h, truth):
    return ((torch.cat([x.flatten() for x in h]) - truth).norm() / truth.norm()).item()


def test_errors_against_a_re_solved_logistic_regression_fall_as_theory_says():
    """
    Neumann: at most by the factor 1 - α·λmin a term, once α = 1/λmax. CG: faster at each step than
    at the one before, and exact after as many steps as unknowns (1e-8 is the finite differences'
    own error). First order: 100 % off, since m is in L alone.
    """
    p = Logistic()
    truth = p.resolved()
    eigenvalues = torch.linalg.eigvalsh(p.hessian(p.V.detach(), p.m.detach()))
    alpha, shrink = (1 / eigenvalues[-1]).item(), (1 - eigenvalues[0] / eigenvalues[-1]).item()

    def series(terms):
        return error(neumann(*p.arguments, terms=terms, alpha=alpha), truth)

    for k in (1, 2, 4, 8, 16, 32, 64):
        assert series(2 * k) <= series(k) * shrink**k * 1.01 + 1e-8
    assert series(128) < 1e-3 * series(1) and series(400) < 1e-6
    assert error(unrolled(*p.arguments, steps=400, lr=alpha), truth) < 1e-6
    steps = [dict(iterations=k, damping=0.0) for k in range(1, 7)]
    solved = [error(conjugate_gradient(*p.arguments, **each), truth) for each in steps]
    assert all(after < before for before, after in zip(solved, solved[1:])) and solved[-1] < 1e-8
    assert solved[4] / solved[3] < solved[1] / solved[0]  # ever faster
    assert solved[3] < 0.5 * series(5)  # as many products
    assert torch.equal(first_order(*p.arguments)[0], torch.zeros_like(p.m))


@pytest.mark.parametrize("K", [1, 2, 7])
def test_unrolling_from_a_solved_lower_level_is_the_neumann_series(K):
    """At V* the steps stay where they are, and K of rate α give the series' first K terms."""
    p = Logistic()
    steps = unrolled(*p.arguments, lr=0.01, steps=K)
    terms = neumann(*p.arguments, terms=K, alpha=0.01)
    torch.testing.assert_close(steps, terms, rtol=1e-8, atol=1e-12)


def test_a_diagonal_preconditioner_speeds_up_a_badly_scaled_problem_and_changes_no_limit():
    p = Logistic()
    p.X[:, 0] *= 30
    p.V.data = p.solve(p.m.detach())
    truth, H = p.resolved(), p.hessian(p.V.detach(), p.m.detach())
    P = [1 / H.diagonal()]
    rate = (1 / torch.linalg.eigvalsh(H)[-1]).item()
    scaled = (1 / torch.linalg.eigvals(torch.diag(P[0]) @ H).real.max()).item()

    def series(terms, alpha, P):
        return error(neumann(*p.arguments, terms=terms, alpha=alpha, precondition=P), truth)

    def solved(k, P):
        options = dict(iterations=k, damping=0.0, precondition=P)
        return error(conjugate_gradient(*p.arguments, **options), truth)

    assert series(30, scaled, P) < 0.05 * series(30, rate, None)
    assert series(2000, scaled, P) < 1e-6 and solved(6, P) < 1e-6
    assert solved(2, P) < solved(2, None)


def test_errors_against_a_re_solved_network_with_bidora_layers():
    """
    A two-layer network, magnitudes above, A and B below, with a ridge around the start that makes
    the minimum a strict one; solved by Newton's method. CG run to the end agrees with re-solved
    differences to 1e-5 (their error is ε² times a third derivative), first order keeps its bias.
    """
    c = Curved()
    start, m = (nn.utils.parameters_to_vector(x).detach() for x in (c.lower, c.upper))

    def divided(flat, level):
        return [x.view_as(p) for p, x in zip(level, flat.split([p.numel() for p in level]))]

    def loss(flat, m, batch):
        return c.loss_at(divided(flat, c.lower), divided(m, c.upper), batch)

    def lower_loss(flat, m):
        return loss(flat, m, c.train) + (flat - start).square().sum()

    def hessian(flat, m):
        return torch.autograd.functional.hessian(lower_loss, (flat, m))[0][0]

    def solve(flat, m):
        for _ in range(200):
            g, H = jacobian(lower_loss, (flat, m))[0], hessian(flat, m)
            smallest = torch.linalg.eigvalsh(H)[0]
            H = H + max(0.0, 0.05 - smallest.item()) * torch.eye(len(flat), dtype=flat.dtype)
            flat = flat - torch.linalg.solve(H, g)
            if g.norm() < 1e-12:
                assert smallest > 0.01
                return flat
        raise AssertionError("the lower level was not solved")

    flat = solve(start, m)
    truth = central_differences(lambda m: loss(solve(flat, m), m, c.val), m, 1e-4)
    nn.utils.vector_to_parameters(flat, c.lower)

    def train_loss():
        ridge = (nn.utils.parameters_to_vector(c.lower) - start).square().sum()
        return c.loss(c.model, c.train) + ridge

    arguments = (train_loss, *c.arguments()[1:])
    alpha = 1 / torch.linalg.eigvalsh(hessian(flat, m))[-1].item()
    for method, largest, options in (
        (conjugate_gradient, 1e-5, [dict(iterations=k, damping=0.0) for k in (1, 3, 40)]),
        (neumann, 1e-3, [dict(terms=k, alpha=alpha) for k in (1, 10, 100)]),
    ):
        errors = [error(method(*arguments, **each), truth) for each in options]
        assert errors[0] > errors[1] > errors[2] and errors[2] < largest
    assert error(first_order(*arguments), truth) > 0.01


def adam_by_hand(c, optimizer, grad_clip, steps):
    """The hypergradient by plain autograd through AdamW's formulas, moments and all."""
    group, states = optimizer.param_groups[0], [optimizer.state[p] for p in c.lower]
    (b1, b2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
    first, second = ([s[key].clone() for s in states] for key in ("exp_avg", "exp_avg_sq"))
    t = int(states[0]["step"])

    def update(V, grads):
        nonlocal t
        t += 1
        norm, moved = torch.sqrt(sum((g**2).sum() for g in grads)), []
        for i, (p, g) in enumerate(zip(V, grads)):
            g = g * torch.clamp(grad_clip / (norm + 1e-6), max=1.0)
            first[i], second[i] = b1 * first[i] + (1 - b1) * g, b2 * second[i] + (1 - b2) * g * g
            root = torch.sqrt(second[i] / (1 - b2**t)) + eps
            moved.append(p - lr * decay * p - lr * (first[i] / (1 - b1**t)) / root)
        return moved

    return c.through_autograd(steps, update)


def warmed_up(c, grad_clip=0.3, **options):
    options |= dict(weight_decay=0.1, grad_clip=grad_clip)
    optimizer = create_bilevel_optimizer(c.model, 0.02, 1e-3, **options)
    for _ in range(4):
        optimizer.lower_step(c.loss, c.train)
    return optimizer


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("grad_clip", [0.3, 1e9])
def test_adams_own_update_is_differentiated(steps, grad_clip):
    """1e-8 relative to autograd through AdamW by hand, with decay and clipping; its state stays."""
    c = Curved()
    optimizer = warmed_up(c, grad_clip).lower_optimizer
    before = copy.deepcopy(optimizer.state_dict()["state"])
    expected = adam_by_hand(c, optimizer, grad_clip, steps)
    options = dict(steps=steps, adam=optimizer, grad_clip=grad_clip)
    exact = unrolled(*c.arguments(), **options)
    torch.testing.assert_close(tuple(exact), expected, rtol=1e-8, atol=1e-11)
    finite = unrolled(*c.arguments(), **options, mode="finite_difference", radius=1e-4)
    torch.testing.assert_close(tuple(finite), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


def test_only_the_last_steps_of_a_round_are_kept_and_the_graph_of_the_very_last():
    """Also where its steps are counted from another's state, as after a checkpoint."""
    c = Curved()
    options = dict(lower_steps=3, upper_steps=2, steps=2)
    optimizer, kept = create_bilevel_optimizer(c.model, **options), []
    for step in range(1, 10):
        optimizer.lower_step(c.loss, c.train)
        kept.append([past.graph is not None for past in optimizer.past])
        if step % 3 == 0:
            for _ in range(2):
                optimizer.upper_step(c.loss, c.val)
            assert optimizer.past == []
        elif step % 3 == 1:
            state, optimizer = optimizer.state_dict(), create_bilevel_optimizer(c.model, **options)
            optimizer.load_state_dict(state)
    assert kept == [[], [True], [False, True]] * 3


def test_keeping_a_step_changes_nothing_about_it():
    """Bit for bit the same lower steps, with the graph kept and without."""
    c = Curved()
    twin = copy.deepcopy(c)
    for each, name in ((c, "unrolled"), (twin, "first_order")):
        optimizer = create_bilevel_optimizer(each.model, 1e-2, hypergradient=name, grad_clip=0.1)
        for _ in range(3):
            optimizer.lower_step(each.loss, each.train)
    assert all(torch.equal(a, b) for a, b in zip(c.lower, twin.lower))


@pytest.mark.parametrize("name", ["neumann", "conjugate_gradient"])
def test_adam_preconditions_by_its_second_moment(name):
    c = Curved()
    optimizer = warmed_up(c, hypergradient=name, precondition="adam")
    for p, scale in zip(c.lower, optimizer.moving_options()["precondition"], strict=True):
        state = optimizer.lower_optimizer.state[p]
        second = state["exp_avg_sq"] / (1 - 0.999 ** int(state["step"]))
        torch.testing.assert_close(scale, 1 / (second.sqrt() + 1e-8))


def test_adams_derivative_is_finite_where_gradient_and_moments_are_zero():
    """As for A before the first step, while B is zero."""
    options = dict(hypergradient="unrolled", precondition="adam")
    optimizer = create_bilevel_optimizer(adapted(nn.Linear(5, 8), rank=2), 1e-2, 1e-3, **options)
    x = torch.randn(6, 5)
    optimizer.bilevel_step(square, x, x)
    assert all(torch.isfinite(m).all() for m in optimizer.upper)


def test_a_finite_difference_in_bfloat16_is_refused():
    model = adapted(nn.Linear(5, 8).bfloat16())
    with pytest.raises(ValueError, match="loses too many digits"):
        create_bilevel_optimizer(model, hypergradient="finite_difference")


@pytest.mark.parametrize("name", HYPERGRADIENTS)
@pytest.mark.parametrize("steps", [1, 2])
def test_losses_in_micro_batches_give_the_hypergradient_of_the_whole(name, steps):
    """Relative 1e-8 in float64, 1e-6 for differences: the same sums in another order."""
    options = {"steps": steps} if name in UNROLLED else {}
    c = Curved()
    hypergradient = HYPERGRADIENTS[name].function
    whole = hypergradient(*c.arguments(), **options)

    def part(batch, rows):
        return lambda: c.loss(c.model, [x[rows] for x in batch]) * (len(batch[0][rows]) / 20)

    slices = slice(0, 7), slice(7, 20)
    train, val = ([part(batch, rows) for rows in slices] for batch in (c.train, c.val))
    split = hypergradient(train, val, c.lower, c.upper, **options)
    torch.testing.assert_close(split, whole, rtol=1e-6 if name in DIFFERENCES else 1e-8, atol=1e-9)


PROCESS = """
import functools, json, torch
import torch.nn.functional as F
from torch import nn
from bidora import replace_linear_with_bidora
from bilevel import HYPERGRADIENTS
{problem}
distributed.start("cpu")

def reduce(tensors):
    for tensor in tensors:
        dist.all_reduce(tensor)
    return [tensor / 2 for tensor in tensors]

torch.manual_seed(0)
c = Curved()
share = slice(10 * rank, 10 * rank + 10)
c.train, c.val = tuple(t[share] for t in c.train), tuple(t[share] for t in c.val)
for name, options in {options}:
    h = HYPERGRADIENTS[name].function(*c.arguments(), reduce=reduce, **options)
    line = [rank, name, *torch.cat([x.flatten() for x in h]).tolist()]
    sys.stdout.write(json.dumps(line) + "\\n")
"""
DISTRIBUTED = [
    ("first_order", {}),
    ("unrolled", {"lr": 0.1}),
    ("unrolled", {"lr": 0.1, "steps": 3}),
    ("finite_difference", {"lr": 0.1, "radius": 1e-4}),
    ("neumann", {"terms": 3, "alpha": 0.1}),
    ("conjugate_gradient", {"iterations": 3}),
    ("identity", {}),
    ("identity_difference", {"radius": 1e-4}),
]


def test_two_processes_give_the_hypergradient_of_the_joined_batch():
    """Each has half of the batches; 1e-6 relative in float64, where differences are rounded."""
    # Their sources alone: importing this file takes seconds.
    problem = "\n".join(map(inspect.getsource, (draw, adapted, Curved)))
    done = forked(PROCESS.format(problem=problem, options=DISTRIBUTED))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    c = Curved()
    for each in range(2):
        own = [line[1:] for line in lines if line[0] == each]
        for (name, options), (same, *h) in zip(DISTRIBUTED, own, strict=True):
            truth = torch.cat(HYPERGRADIENTS[name].function(*c.arguments(), **options))
            error = torch.tensor(h, dtype=torch.float64) - truth
            assert same == name and error.norm() <= 1e-6 * truth.norm(), name


def transformer(folder, family, quantize=None, **changes):
    """A random adapted transformer, directions away from their start, in float64 unless 4-bit."""
    checkpoint(folder, family, **changes)
    dtype = torch.float32 if quantize == "nf4" else torch.float64
    model = Transformer.from_pretrained(folder, dtype, quantize=quantize)
    model.requires_grad_(False)
    bidora.replace_linear_with_bidora(model, 2, target_modules=["q_proj", "o_proj", "up_proj"])
    for layer in bidora.adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


LEAN = {
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "window": ("Mistral", dict(sliding_window=3, head_dim=10)),
    "nf4": ("Llama", dict(quantize="nf4")),
    "int8": ("Llama", dict(quantize="int8")),
}


@pytest.mark.parametrize("queries", [256, 4])
@pytest.mark.parametrize("base", LEAN)
@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_what_is_recomputed_changes_no_hypergradient(tmp_path, monkeypatch, name, base, queries):
    """Second derivatives included: within 1e-10 of the largest in float64, 1e-4 in fp32."""
    family, options = LEAN[base]
    model = transformer(tmp_path, family, **options)
    train, val = (torch.randint(0, 131, (2, 11)) for _ in range(2))
    levels = bidora.lower_parameters(model), bidora.upper_parameters(model)
    options = {"lr": 0.5, "steps": 2} if name in UNROLLED else {}
    results = []
    for model.gradient_checkpointing in (False, True):
        losses = lambda: model(train, train), lambda: model(val, val)
        results.append(torch.cat(HYPERGRADIENTS[name].function(*losses, *levels, **options)))
        monkeypatch.setattr("model.QUERIES", queries)
    kept, again = results
    assert kept.any()
    tolerance = (1e-4 if base == "nf4" else 1e-10) * kept.abs().max().item()
    torch.testing.assert_close(again, kept, rtol=0, atol=tolerance)


def test_attention_over_few_queries_at_a_time_makes_no_whole_scores(tmp_path, monkeypatch):
    """Of 39 × 39 numbers a head, the largest matrices there are: a row's last token is no input."""
    model = transformer(tmp_path, "Llama")
    ids = torch.randint(0, 131, (1, 40))
    lower, upper = bidora.lower_parameters(model), bidora.upper_parameters(model)
    largest = []

    def note(operation, arguments, result):
        if isinstance(result, torch.Tensor) and result.dim() > 2:
            largest[-1] = max(largest[-1], result.shape[-2:].numel())

    for queries in (256, 4):
        monkeypatch.setattr("model.QUERIES", queries)
        largest.append(0)
        with Watched(note):
            hypergrad.unrolled(lambda: model(ids, ids), lambda: model(ids, ids), lower, upper)
    assert largest[0] == 39 * 39 and largest[1] < 39 * 20


@pytest.mark.parametrize("name", ["unrolled", "neumann"])
def test_dropout_in_recomputed_blocks_is_that_of_the_step(tmp_path, name):
    """Two steps with dropout, blocks recomputed or kept: the same masks, so 1e-10 in float64."""
    ids = torch.randint(0, 131, (2, 11))
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        model = transformer(tmp_path, "Llama").train()
        model.gradient_checkpointing = again
        for layer in bidora.adapter_layers(model).values():
            layer.dropout.p = 0.5
        optimizer = create_bilevel_optimizer(model, 1e-2, 1e-2, hypergradient=name)
        for _ in range(2):
            optimizer.bilevel_step(lambda model, batch: model(batch, batch), ids, ids.flip(1))
        results.append([p.detach().clone() for p in optimizer.lower + optimizer.upper])
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_micro_batches_give_the_step_of_the_whole_batch():
    """They have different numbers of labels; each weighs as its labels do."""

    def trained(size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11)).double()
        model.requires_grad_(False)
        bidora.replace_linear_with_bidora(model, 2, target_modules=["1"], method="dora")
        optimizer = create_bilevel_optimizer(model, 1e-2, 1e-2)
        ids = torch.randint(0, 11, (5, 7))
        labels = ids.masked_fill(torch.rand(5, 7) < 0.6, -100)
        rows = [data.Encoded(*row) for row in zip(ids.tolist(), labels.tolist())]

        def loss_fn(model, micro_batch):
            rows, share = micro_batch
            ids, labels = data.collate(rows, pad_id=0)
            logits = model(ids)[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits, labels[:, 1:].flatten()) * share

        parts = MicroBatches(data.micro_batches(rows, size))
        losses = [optimizer.lower_step(loss_fn, parts).item() for _ in range(3)]
        return losses, nn.utils.parameters_to_vector(optimizer.lower)

    for size in (3, 2, 1):
        for ours, expected in zip(trained(size), trained(0)):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_8_bit_adamw_follows_adamw_at_both_levels():
    """Its 8-bit moments leave the path within a tenth of its length after 30 steps."""

    def trained(optimizer):
        torch.manual_seed(0)
        model = adapted(nn.Linear(300, 5000), rank=16)
        x, y = torch.randn(40, 300), torch.randn(40, 5000)
        bilevel = create_bilevel_optimizer(model, 1e-2, 1e-2, optimizer=optimizer)
        levels = (bilevel.lower, bilevel.upper)
        start = [nn.utils.parameters_to_vector(level).detach() for level in levels]
        for _ in range(30):
            bilevel.bilevel_step(lambda model, batch: F.mse_loss(model(x), y), None, None)
        ends = map(nn.utils.parameters_to_vector, levels)
        return bilevel, [end - first for end, first in zip(ends, start)]

    (ours, moved), (_, expected) = trained("adamw8bit"), trained("adamw")
    for a, b in zip(moved, expected):
        assert b.norm() > 0 and (a - b).norm() < 0.1 * b.norm()
    for optimizer in (ours.lower_optimizer, ours.upper_optimizer):
        wide = [state for p, state in optimizer.state.items() if p.numel() >= 4096]
        assert all(state["state1"].dtype == torch.uint8 for state in wide)


def taken(optimizer, take, *arguments):
    """The hypergradient that an upper step takes."""
    hypergradients, real = [], optimizer.step

    def step(of, parameters, gradients, loss):
        if of is optimizer.upper_optimizer:
            hypergradients.append(tuple(g.clone() for g in gradients))
        real(of, parameters, gradients, loss)

    optimizer.step = step
    take(*arguments)
    [h] = hypergradients
    return h


@pytest.mark.parametrize("steps, lower_steps", [(1, 1), (2, 2), (3, 3), (1, 3), (2, 4)])
def test_bilevel_step_differentiates_through_as_many_steps_as_asked(steps, lower_steps):
    """What autograd gives through AdamW's last steps, as they were, from the state before them."""
    c = Curved()
    twin, options = copy.deepcopy(c), dict(steps=steps, lower_steps=lower_steps)
    optimizer, other = (warmed_up(x, precondition="adam", **options) for x in (c, twin))
    for _ in range(lower_steps - steps):
        other.lower_step(twin.loss, twin.train)
    expected = adam_by_hand(twin, other.lower_optimizer, 0.3, steps)
    h = taken(optimizer, optimizer.bilevel_step, c.loss, c.train, c.val)
    torch.testing.assert_close(h, expected, rtol=1e-8, atol=1e-11)


def test_a_batch_that_is_a_list_is_one_batch():
    """As a DataLoader gives it; only MicroBatches are parts."""
    c = Curved()
    optimizer = create_bilevel_optimizer(c.model)
    twin, other = copy.deepcopy((c, optimizer))
    loss = optimizer.upper_step(c.loss, list(c.val), list(c.train))
    assert loss == other.upper_step(c.loss, tuple(c.val), tuple(c.train))
    assert all(torch.equal(m, n) for m, n in zip(c.upper, twin.upper))


@pytest.mark.parametrize("kept", [True, False])
def test_the_rate_of_a_step_is_the_one_at_its_time(kept):
    """A second upper step simulates a step on the last train batch, at the rate of now."""
    c = Curved()
    optimizer = create_bilevel_optimizer(c.model, 0.5, upper_steps=2, grad_clip=float("inf"))
    optimizer.scale_lr(0.1)
    before = copy.deepcopy(c)
    optimizer.lower_step(c.loss, c.train)
    if kept:
        optimizer.scale_lr(0.01)  # as a schedule may, before the upper step
        expected = tuple(through_a_step(before, c, 0.05))
    else:
        optimizer.upper_step(c.loss, c.val)
        expected = c.through_descent(0.05, 1)
    torch.testing.assert_close(taken(optimizer, optimizer.upper_step, c.loss, c.val), expected)


# At alpha = 10 the terms grow for the network's curvature; at 1e-3 they shrink.
@pytest.mark.parametrize("alpha, grows", [(10.0, True), (1e-3, False)])
def test_a_neumann_series_whose_terms_grow_says_so(alpha, grows, recwarn):
    neumann(*Quadratic().arguments, alpha=alpha, terms=5)
    assert any("terms of the Neumann series grow" in str(w.message) for w in recwarn) == grows


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(hypergradient="third_order"), "unknown hypergradient 'third_order'"),
        (dict(hypergradient="neumann", steps=3), "neumann has no option 'steps': .*alpha, terms"),
        (dict(hypergradient="first_order", lr=0.1), "no option 'lr': it has none"),
        (dict(steps=3), "steps=3 looks back on more than lower_steps=1"),
        (dict(steps=0), "steps=0 must be a whole number of at least 1"),
        (dict(steps=1.5), "steps=1.5 must be a whole number"),
        (dict(lr=-0.1), "lr=-0.1 must be a positive number"),
        (dict(hypergradient="neumann", alpha="small"), "alpha='small' must be"),
        (dict(hypergradient="conjugate_gradient", damping=float("nan")), "damping=nan must be"),
        (dict(precondition="diag"), "unknown precondition"),
        (dict(precondition="adam", optimizer="adamw8bit"), "8 bits"),
        (dict(optimizer="sgd"), "'sgd'.*adamw, adamw8bit"),
    ],
)
def test_wrong_options_are_refused_at_once(options, said):
    with pytest.raises(ValueError, match=said):
        create_bilevel_optimizer(Curved().model, **options)


def test_preconditioning_by_moments_needs_a_lower_step_first():
    c, options = Curved(), dict(hypergradient="neumann", precondition="adam", grad_clip=1.0)
    with pytest.raises(ValueError, match="take a lower step first"):
        create_bilevel_optimizer(c.model, **options).upper_step(c.loss, c.val, c.train)


def test_an_optimizers_state_can_be_saved_and_loaded():
    """Bit for bit the same steps after it, schedule included."""
    c = Curved()
    optimizer = create_bilevel_optimizer(c.model, 1e-2, 1e-2)
    optimizer.scale_lr(0.5)
    optimizer.bilevel_step(c.loss, c.train, c.val)
    twin = copy.deepcopy(c)
    other = create_bilevel_optimizer(twin.model, 1e-2, 1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, o in ((c, optimizer), (twin, other)):
        o.scale_lr(0.7)
        o.bilevel_step(each.loss, each.train, each.val)
    assert all(torch.equal(a, b) for a, b in zip(c.lower + c.upper, twin.lower + twin.upper))


class Checkpointed(nn.Module):
    """Linear layers, each under gradient checkpointing, reentrant or not; with dropout."""

    def __init__(self, *reentrant, dropout=0.0):
        super().__init__()
        layers = [nn.Linear(5, 5) for _ in reentrant]
        self.layers = adapted(*layers, rank=2, lora_dropout=dropout).double()
        self.reentrant = reentrant

    def forward(self, x):
        for layer, reentrant in zip(self.layers, self.reentrant):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).tanh()
        return x


def square(model, x):
    return model(x).square().mean()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_model_whose_adapters_no_gradient_reaches_is_refused_at_the_first_step():
    model, x = Checkpointed(True, True), torch.randn(4, 5, dtype=torch.float64)
    for name in ("first_order", "unrolled"):
        optimizer = create_bilevel_optimizer(model, hypergradient=name)
        with pytest.raises(ValueError, match=r"no gradient reaches layers.0, layers.1"):
            optimizer.lower_step(square, x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_that_no_gradient_reaches_are_named_once():
    model, x = Checkpointed(True, False), draw(4, 5)
    optimizer = create_bilevel_optimizer(model)
    with pytest.warns(UserWarning, match="no gradient reaches layers.0: "):
        optimizer.bilevel_step(square, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "None of the inputs")
        optimizer.bilevel_step(square, x, x)


@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_dropout_under_gradient_checkpointing_gives_the_same_steps_as_without(name, monkeypatch):
    """1e-12: the same operations in float64, with the same dropout mask."""

    def direct_call(function, *arguments, use_reentrant):
        return function(*arguments)

    results = []
    for recompute in (True, False):
        torch.manual_seed(0)
        model, x = Checkpointed(False, False, dropout=0.5), torch.randn(4, 5).double()
        if not recompute:
            monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", direct_call)
        optimizer = create_bilevel_optimizer(model.train(), 1e-2, 1e-2, hypergradient=name)
        for _ in range(2):
            optimizer.bilevel_step(square, x, x + 1)
        results.append([p.detach().clone() for p in optimizer.lower + optimizer.upper])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("precondition", ["none", "adam"])
@pytest.mark.parametrize("name", ["first_order", "unrolled", "finite_difference", "identity"])
def test_a_bilevel_step_reads_one_number_per_level(name, precondition):
    """Each number that leaves a tensor waits for a GPU to finish."""
    c, seen = Curved(), []
    optimizer = warmed_up(c, hypergradient=name, precondition=precondition)
    with Watched(lambda operation, *_: seen.append(operation)):
        optimizer.bilevel_step(c.loss, c.train, c.val)
    assert seen.count(torch.ops.aten._local_scalar_dense.default) == 2
