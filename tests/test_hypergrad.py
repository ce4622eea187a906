"""Each hypergradient against closed forms and against autograd through the steps, in float64."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from test_model import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import bidora
import data
import hypergrad
from bidora import replace_linear_with_bidora
from bilevel import HYPERGRADIENTS, MicroBatches, create_bilevel_optimizer
from hypergrad import (
    adam_scale,
    conjugate_gradient,
    first_order,
    neumann,
    plain_first_order,
    plain_neumann,
    plain_unrolled,
    unrolled,
)
from model import Transformer

UNROLLED = ("unrolled", "finite_difference")  # look back on steps of the lower level
HERE = ("first_order", "identity", "identity_difference")  # are taken at the current values
DIFFERENCES = ("finite_difference", "identity_difference")


class Quadratic:
    """
    Lower L = ½ VᵀHV - Vᵀ C m, so V* = H⁻¹ C m; upper F = ½ |V - t|² + ½ |m|² + bᵀm.

    At any V: ∂F/∂V = V - t, ∂F/∂m = m + b, ∂²L/∂m∂V = -Cᵀ. The implicit hypergradient is m + b + Cᵀ
    H⁻¹ (V - t).
    """

    def __init__(self, n=6, k=4):
        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64)

        root = draw(n, n)
        self.H, self.C, self.t, self.b = (
            root @ root.T / n + 0.5 * torch.eye(n, dtype=torch.float64),
            draw(n, k),
            draw(n),
            draw(k),
        )
        self.V, self.m = nn.Parameter(draw(n)), nn.Parameter(draw(k))
        self.arguments = (self.lower_loss, self.upper_loss, [self.V], [self.m])

    def lower_loss(self):
        return 0.5 * self.V @ self.H @ self.V - self.V @ self.C @ self.m

    def upper_loss(self):
        return (
            0.5 * (self.V - self.t).square().sum() + 0.5 * self.m.square().sum() + self.b @ self.m
        )

    def exact(self, inverse):
        """m + b + Cᵀ · inverse · (V - t)"""
        return (self.m + self.b + self.C.T @ inverse @ (self.V - self.t)).detach()


class Curved:
    """
    A two-layer network with BiDoRA layers: V = A and B, m = the magnitudes; train and val are
    different samples.
    """

    def __init__(self):
        self.model = replace_linear_with_bidora(
            nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
            .double()
            .requires_grad_(False),
            1,
            target_modules=("0", "2"),
        )
        for layer in bidora.adapter_layers(self.model).values():
            nn.init.normal_(layer.lora_B, std=0.3)
        self.train, self.val = (
            (torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64))
            for _ in range(2)
        )
        self.lower, self.upper = (
            bidora.lower_parameters(self.model),
            bidora.upper_parameters(self.model),
        )

    def loss(self, model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    def through_autograd(self, lr, steps):
        """The hypergradient by plain autograd through functional gradient steps."""
        values = {
            name: p.detach().clone().requires_grad_(p.requires_grad)
            for name, p in self.model.named_parameters()
        }
        upper = [name for name in values if "magnitude" in name]
        lower = [name for name in values if "lora_A" in name or "lora_B" in name]
        start = [values[name] for name in upper]
        for _ in range(steps):
            loss = F.mse_loss(
                torch.func.functional_call(self.model, values, self.train[0]), self.train[1]
            )
            grads = torch.autograd.grad(loss, [values[name] for name in lower], create_graph=True)
            values = values | {name: values[name] - lr * g for name, g in zip(lower, grads)}
        loss = F.mse_loss(torch.func.functional_call(self.model, values, self.val[0]), self.val[1])
        return torch.autograd.grad(loss, start)

    def arguments(self):
        return (
            lambda: self.loss(self.model, self.train),
            lambda: self.loss(self.model, self.val),
            self.lower,
            self.upper,
        )


def test_first_order_is_the_direct_gradient():
    q = Quadratic()
    torch.testing.assert_close(first_order(*q.arguments)[0], (q.m + q.b).detach())


def test_conjugate_gradient_reaches_the_implicit_gradient_in_n_iterations():
    """CG solves an n-dimensional system in n steps, up to rounding: 1e-9."""
    q = Quadratic(n=6)
    exact = q.exact(torch.linalg.inv(q.H))
    errors = [
        (conjugate_gradient(*q.arguments, iterations=k, damping=0.0)[0] - exact).norm()
        for k in (1, 3, 6)
    ]
    assert errors[0] > errors[1] > 1e-6 > 1e-9 > errors[2]
    torch.testing.assert_close(
        conjugate_gradient(*q.arguments, iterations=50, damping=0.0)[0], exact
    )  # more do no harm


def test_damping_is_added_to_the_hessian():
    q = Quadratic()
    exact = q.exact(torch.linalg.inv(q.H + 0.7 * torch.eye(6, dtype=torch.float64)))
    torch.testing.assert_close(
        conjugate_gradient(*q.arguments, iterations=6, damping=0.7)[0], exact
    )


def test_neumann_converges_geometrically_to_the_implicit_gradient():
    q = Quadratic()
    eigenvalues = torch.linalg.eigvalsh(q.H)
    alpha = (1 / eigenvalues[-1]).item()
    exact = q.exact(torch.linalg.inv(q.H))
    shrink = (1 - alpha * eigenvalues[0]).item()  # the slowest direction's factor a term
    errors = [
        (neumann(*q.arguments, terms=k, alpha=alpha)[0] - exact).norm().item()
        for k in (1, 20, 40, 60, 600)
    ]
    assert errors[-1] < 1e-9
    for before, after in zip(errors[1:], errors[2:-1]):
        assert after <= before * shrink**20 * 1.5


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neumann_equals_its_truncated_series(terms):
    q = Quadratic()
    one = torch.eye(6, dtype=torch.float64)
    series = 0.1 * sum(torch.linalg.matrix_power(one - 0.1 * q.H, j) for j in range(terms))
    torch.testing.assert_close(neumann(*q.arguments, terms=terms, alpha=0.1)[0], q.exact(series))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unrolled_equals_its_closed_form_on_a_quadratic(steps):
    q = Quadratic()
    one, V, lr = torch.eye(6, dtype=torch.float64), q.V.detach(), 0.1
    slope = torch.zeros(6, 4, dtype=torch.float64)  # dV/dm
    for _ in range(steps):
        V, slope = V - lr * (q.H @ V - q.C @ q.m.detach()), (one - lr * q.H) @ slope + lr * q.C
    expected = (q.m + q.b).detach() + slope.T @ (V - q.t)
    torch.testing.assert_close(unrolled(*q.arguments, lr=lr, steps=steps)[0], expected)


@pytest.mark.parametrize(
    "plain, general, options",
    [
        (plain_first_order, first_order, {}),
        (plain_unrolled, unrolled, {"lr": 0.1}),
        (plain_neumann, neumann, {"alpha": 0.05, "terms": 4}),
    ],
)
def test_the_plain_forms_equal_the_general_ones(plain, general, options):
    """1e-12 in float64: the same products, in another order."""
    c = Curved()
    found = list(plain(*c.arguments(), **options))
    torch.testing.assert_close(found, general(*c.arguments(), **options), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unrolled_equals_autograd_through_the_steps(steps):
    """1e-8 relative: the same derivatives, in another order of operations."""
    c = Curved()
    torch.testing.assert_close(
        tuple(unrolled(*c.arguments(), lr=0.1, steps=steps)),
        c.through_autograd(0.1, steps),
        rtol=1e-8,
        atol=1e-10,
    )


def test_finite_difference_tends_to_exact_quadratically():
    """A tenth of the radius, a hundredth of the error, as for any central difference."""
    c = Curved()
    exact = torch.cat(unrolled(*c.arguments(), lr=0.1, steps=2))
    errors = [
        (
            torch.cat(unrolled(*c.arguments(), lr=0.1, steps=2, mode="finite_difference", radius=r))
            - exact
        )
        .norm()
        .item()
        for r in (1e-3, 1e-4)
    ]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2) and errors[1] < 1e-5
    assert (
        exact - torch.cat(first_order(*c.arguments()))
    ).norm() > 1e-2  # the second-order part is no rounding error


def test_hypergradients_agree_with_re_solved_finite_differences():
    """
    A lower level solved to convergence: ridge regression V*(m) = argmin |XV - y|² / 2 + Σ exp(m)·V²
    / 2, with the upper loss re-solved at m ± 1e-5. CG with 10 iterations on 5 unknowns is exact;
    Neumann has converged. 1e-6 relative.
    """
    X, y, Xv, yv = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((30, 5), (30,), (20, 5), (20,))
    )
    V, m = (
        nn.Parameter(torch.zeros(5, dtype=torch.float64)),
        nn.Parameter(torch.randn(5, dtype=torch.float64)),
    )

    def solve(m):
        return torch.linalg.solve(X.T @ X + torch.diag(m.exp()), X.T @ y)

    def upper(V):
        return 0.5 * (Xv @ V - yv).square().sum()

    V.data = solve(m.detach())
    arguments = (
        lambda: 0.5 * (X @ V - y).square().sum() + 0.5 * (m.exp() * V * V).sum(),
        lambda: upper(V),
        [V],
        [m],
    )
    steps = 1e-5 * torch.eye(5, dtype=torch.float64)
    resolved = torch.stack(
        [(upper(solve(m.detach() + d)) - upper(solve(m.detach() - d))) / 2e-5 for d in steps]
    )
    largest = torch.linalg.eigvalsh(X.T @ X + torch.diag(m.exp()).detach())[-1].item()
    torch.testing.assert_close(
        conjugate_gradient(*arguments, iterations=10, damping=0.0)[0],
        resolved,
        rtol=1e-6,
        atol=1e-8,
    )
    torch.testing.assert_close(
        neumann(*arguments, terms=400, alpha=1 / largest)[0], resolved, rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(
        unrolled(*arguments, lr=1 / largest, steps=400)[0], resolved, rtol=1e-6, atol=1e-8
    )
    assert torch.equal(
        first_order(*arguments)[0], torch.zeros(5, dtype=torch.float64)
    )  # m stands in L alone


@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_parameters_are_left_as_found_also_after_an_error(name):
    c = Curved()
    before = [p.detach().clone() for p in c.lower + c.upper]
    storage = [p.data_ptr() for p in c.lower + c.upper]
    train_loss, val_loss, lower, upper = c.arguments()
    HYPERGRADIENTS[name].function(train_loss, val_loss, lower, upper)

    def broken():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        HYPERGRADIENTS[name].function(train_loss, broken, lower, upper)
    assert all(torch.equal(p, b) for p, b in zip(lower + upper, before))
    assert [p.data_ptr() for p in lower + upper] == storage
    assert all(p.grad is None for p in lower + upper)


@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_bilevel_step_moves_each_level_along_its_own_gradient(name):
    """
    The lower parameters move by AdamW on the train loss alone, the upper ones by Adam on the
    hypergradient alone: for `unrolled` through the step just taken, for `identity` at its end, for
    the other implicit ones where it began, whose graph they share.
    """
    c = Curved()
    options = {"lr": 0.05} if name in UNROLLED else {}
    twin = copy.deepcopy(c)
    twin.lower, twin.upper = (
        bidora.lower_parameters(twin.model),
        bidora.upper_parameters(twin.model),
    )
    optimizer = create_bilevel_optimizer(
        c.model, 1e-2, 1e-3, weight_decay=0.0, hypergradient=name, grad_clip=float("inf"), **options
    )
    train_loss, val_loss = optimizer.bilevel_step(c.loss, c.train, c.val)

    assert train_loss.item() == pytest.approx(twin.loss(twin.model, twin.train).item())
    h = HYPERGRADIENTS[name].function(*twin.arguments(), **options)
    if name in UNROLLED:
        g = torch.autograd.grad(twin.loss(twin.model, twin.train), twin.lower, create_graph=True)
    adam = torch.optim.AdamW([p.detach().clone() for p in twin.lower], lr=1e-2, weight_decay=0.0)
    for p, q in zip(
        adam.param_groups[0]["params"],
        torch.autograd.grad(twin.loss(twin.model, twin.train), twin.lower),
    ):
        p.grad = q
    adam.step()
    for p, moved in zip(c.lower, adam.param_groups[0]["params"]):
        torch.testing.assert_close(p.detach(), moved)
    if name in UNROLLED:
        start = [p.data for p in twin.lower]
        for p, moved in zip(twin.lower, adam.param_groups[0]["params"]):
            p.data = moved
        both = torch.autograd.grad(twin.loss(twin.model, twin.val), twin.lower + twin.upper)
        for p, value in zip(twin.lower, start):
            p.data = value
        cross = torch.autograd.grad(g, twin.upper, grad_outputs=both[: len(g)])
        h = [hm - 0.05 * x for hm, x in zip(both[len(g) :], cross)]
    elif name in HERE:
        for p, moved in zip(twin.lower, adam.param_groups[0]["params"]):
            p.data = moved
        h = HYPERGRADIENTS[name].function(*twin.arguments())
    for m, g in zip(twin.upper, h):
        m.grad = g
    torch.optim.AdamW(twin.upper, lr=1e-3, weight_decay=0.0).step()
    # Central differences are exact up to ε²: 1e-5 of a step that is 1e-3 long.
    tolerance = dict(rtol=0, atol=1e-6) if name in DIFFERENCES else {}
    torch.testing.assert_close(c.upper, twin.upper, **tolerance)
    assert val_loss.shape == ()


@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_a_parameter_that_no_loss_uses_gets_zeros_and_disturbs_nothing(name):
    q = Quadratic()
    idle = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    alone = HYPERGRADIENTS[name].function(*q.arguments)
    h = HYPERGRADIENTS[name].function(q.lower_loss, q.upper_loss, [q.V, idle[0]], [q.m, idle[1]])
    torch.testing.assert_close(h, [alone[0], torch.zeros(3, dtype=torch.float64)])


def test_hypergradient_sees_no_dropout_and_training_goes_on_with_it():
    model = replace_linear_with_bidora(
        nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 1)).requires_grad_(False),
        1,
        lora_dropout=0.5,
        target_modules=("0", "1"),
    )
    model.train()
    seen = []

    def loss_fn(model, batch):
        seen.append({module.training for module in model.modules()})
        return model(batch).square().mean()

    create_bilevel_optimizer(model, 1e-3, 1e-3, hypergradient="unrolled").bilevel_step(
        loss_fn, torch.randn(4, 5), torch.randn(4, 5)
    )
    assert (
        seen == [{True}, {False}] and model.training
    )  # the step itself, whose graph is shared, and the val loss
    optimizer = create_bilevel_optimizer(model, 1e-3, 1e-3, hypergradient="unrolled")
    optimizer.upper_step(loss_fn, torch.randn(4, 5), train_batch=torch.randn(4, 5))
    assert seen[2:] == [{False}, {False}] and model.training


def test_lower_steps_are_taken_before_each_upper_step():
    c = Curved()
    calls = []

    def loss_fn(model, batch):
        calls.append("train" if batch is c.train else "val")
        return c.loss(model, batch)

    create_bilevel_optimizer(c.model, 1e-3, 1e-3, lower_steps=3).bilevel_step(
        loss_fn, c.train, c.val
    )
    assert calls == ["train"] * 3 + ["val"]


def test_a_loss_that_is_not_finite_changes_nothing():
    c = Curved()
    before = [p.detach().clone() for p in c.lower]
    optimizer = create_bilevel_optimizer(c.model, 1e-3, 1e-3)
    with pytest.raises(FloatingPointError, match="nan"):
        optimizer.lower_step(lambda model, batch: c.loss(model, batch) * float("nan"), c.train)
    assert all(torch.equal(p, b) for p, b in zip(c.lower, before))


def test_fused_attention_is_differentiated_twice():
    """
    A transformers model, whose attention is scaled_dot_product_attention: second derivatives
    against finite differences.
    """
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config).double()
    replace_linear_with_bidora(model.requires_grad_(False), 2, target_modules=("q_proj", "v_proj"))
    for layer in bidora.adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.5)
    train, val = torch.randint(0, 31, (2, 3, 9))
    arguments = (
        lambda: model(train, labels=train).loss,
        lambda: model(val, labels=val).loss,
        bidora.lower_parameters(model),
        bidora.upper_parameters(model),
    )
    exact = unrolled(*arguments, lr=1.0)
    difference = unrolled(*arguments, lr=1.0, mode="finite_difference", radius=1e-3)
    torch.testing.assert_close(difference, exact, rtol=1e-4, atol=1e-6)


def test_unknown_names_are_refused():
    c = Curved()
    with pytest.raises(ValueError, match="unknown hypergradient 'third_order'"):
        create_bilevel_optimizer(c.model, 1e-3, 1e-3, hypergradient="third_order")
    with pytest.raises(ValueError, match="unknown mode"):
        unrolled(*c.arguments(), mode="guess")
    with pytest.raises(ValueError, match="put in adapters"):
        create_bilevel_optimizer(nn.Linear(2, 2).requires_grad_(False), 1e-3, 1e-3)
    dora = replace_linear_with_bidora(
        nn.Sequential(nn.Linear(5, 1)).requires_grad_(False),
        1,
        target_modules=("0",),
        method="dora",
    )
    with pytest.raises(ValueError, match="no upper-level parameters"):
        create_bilevel_optimizer(dora, 1e-3, 1e-3).bilevel_step(
            lambda model, x: model(x).sum(), torch.ones(2, 5), torch.ones(2, 5)
        )


# --------------------------------------------------------------------------------- truth: a
# re-solved lower level


class Logistic:
    """
    Logistic regression with a penalty exp(m_j) a feature, V = its weights, solved by Newton's
    method to a gradient of 1e-13.
    """

    def __init__(self, n=6):
        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64)

        truth = draw(n)
        self.X, self.Xv = (
            draw(60, n) @ torch.diag(torch.linspace(0.5, 2, n, dtype=torch.float64)),
            draw(40, n),
        )
        self.y, self.yv = (
            torch.sign(self.X @ truth + draw(60)),
            torch.sign(self.Xv @ truth + draw(40)),
        )
        self.V, self.m = (
            nn.Parameter(torch.zeros(n, dtype=torch.float64)),
            nn.Parameter(draw(n) - 1),
        )
        self.arguments = (
            lambda: self.lower_loss(self.V, self.m),
            lambda: self.upper_loss(self.V),
            [self.V],
            [self.m],
        )
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

    def resolved(self, epsilon=1e-5):
        """Central differences of the upper loss, the lower level solved anew at each m ± ε."""
        m = self.m.detach()
        return torch.stack(
            [
                (self.upper_loss(self.solve(m + d)) - self.upper_loss(self.solve(m - d)))
                / (2 * epsilon)
                for d in epsilon * torch.eye(len(m), dtype=torch.float64)
            ]
        )


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
    series = [
        error(neumann(*p.arguments, terms=k, alpha=alpha), truth)
        for k in (1, 2, 4, 8, 16, 32, 64, 128)
    ]
    for k, (before, after) in zip((1, 2, 4, 8, 16, 32, 64), zip(series, series[1:])):
        assert after <= before * shrink**k * 1.01 + 1e-8
    assert series[-1] < 1e-3 * series[0]
    solved = [
        error(conjugate_gradient(*p.arguments, iterations=k, damping=0.0), truth)
        for k in range(1, 7)
    ]
    assert all(after < before for before, after in zip(solved, solved[1:])) and solved[-1] < 1e-8
    assert solved[4] / solved[3] < solved[1] / solved[0]  # ever faster
    assert solved[3] < 0.5 * error(
        neumann(*p.arguments, terms=5, alpha=alpha), truth
    )  # as many products
    assert error(first_order(*p.arguments), truth) == pytest.approx(1.0)


def test_unrolling_from_a_solved_lower_level_is_the_neumann_series():
    """At V* the steps stay where they are, and K of rate α give the series' first K terms."""
    p = Logistic()
    for K in (1, 2, 7):
        torch.testing.assert_close(
            unrolled(*p.arguments, lr=0.01, steps=K),
            neumann(*p.arguments, terms=K, alpha=0.01),
            rtol=1e-8,
            atol=1e-12,
        )


def test_a_diagonal_preconditioner_speeds_up_a_badly_scaled_problem_and_changes_no_limit():
    p = Logistic()
    p.X[:, 0] *= 30
    p.V.data = p.solve(p.m.detach())
    truth, H = p.resolved(), p.hessian(p.V.detach(), p.m.detach())
    P = [1 / H.diagonal()]
    rate = (1 / torch.linalg.eigvalsh(H)[-1]).item()
    scaled = (1 / torch.linalg.eigvals(torch.diag(P[0]) @ H).real.max()).item()
    plain, better = (
        error(neumann(*p.arguments, terms=30, alpha=a, precondition=P_), truth)
        for a, P_ in ((rate, None), (scaled, P))
    )
    assert better < 0.05 * plain
    assert error(neumann(*p.arguments, terms=2000, alpha=scaled, precondition=P), truth) < 1e-6
    assert (
        error(conjugate_gradient(*p.arguments, iterations=6, damping=0.0, precondition=P), truth)
        < 1e-6
    )
    assert error(
        conjugate_gradient(*p.arguments, iterations=2, damping=0.0, precondition=P), truth
    ) < error(conjugate_gradient(*p.arguments, iterations=2, damping=0.0), truth)


def test_errors_against_a_re_solved_network_with_bidora_layers():
    """
    A two-layer network, magnitudes above, A and B below, with a ridge around the start that makes
    the minimum a strict one; solved by Newton's method. CG run to the end agrees with re-solved
    differences to 1e-5 (their error is ε² times a third derivative), first order stays off by its
    bias.
    """
    c = Curved()
    shapes, start = [p.shape for p in c.lower], torch.cat([p.detach().flatten() for p in c.lower])

    def values(flat, m):
        named = dict(c.model.named_parameters())
        lower = torch.split(flat, [s.numel() for s in shapes])
        replaced = {id(p): x.view(s) for p, x, s in zip(c.lower, lower, shapes)} | {
            id(p): x for p, x in zip(c.upper, m)
        }
        return {name: replaced.get(id(p), p.detach()) for name, p in named.items()}

    def lower_loss(flat, m):
        return (
            F.mse_loss(torch.func.functional_call(c.model, values(flat, m), c.train[0]), c.train[1])
            + (flat - start).square().sum()
        )

    def upper_loss(flat, m):
        return F.mse_loss(torch.func.functional_call(c.model, values(flat, m), c.val[0]), c.val[1])

    def solve(flat, m):
        for _ in range(200):
            g = torch.autograd.functional.jacobian(lambda x: lower_loss(x, m), flat)
            H = torch.autograd.functional.hessian(lambda x: lower_loss(x, m), flat)
            smallest = torch.linalg.eigvalsh(H)[0]
            flat = flat - torch.linalg.solve(
                H + max(0.0, 0.05 - smallest.item()) * torch.eye(len(flat), dtype=flat.dtype), g
            )
            if g.norm() < 1e-12:
                assert smallest > 0.01
                return flat
        raise AssertionError("the lower level was not solved")

    m = [p.detach().clone() for p in c.upper]
    flat = solve(start, m)
    epsilon, truth = 1e-4, []
    for j in range(len(m)):
        for i in range(len(m[j])):
            sides = []
            for sign in (1, -1):
                moved = [x.clone() for x in m]
                moved[j][i] += sign * epsilon
                sides.append(upper_loss(solve(flat, moved), moved))
            truth.append((sides[0] - sides[1]) / (2 * epsilon))
    truth = torch.stack(truth)
    for p, x, s in zip(c.lower, torch.split(flat, [s.numel() for s in shapes]), shapes):
        p.data = x.view(s)

    def train_loss():
        return (
            c.loss(c.model, c.train)
            + (torch.cat([p.flatten() for p in c.lower]) - start).square().sum()
        )

    arguments = (train_loss, lambda: c.loss(c.model, c.val), c.lower, c.upper)
    errors = [
        error(conjugate_gradient(*arguments, iterations=k, damping=0.0), truth) for k in (1, 3, 40)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5
    largest = torch.linalg.eigvalsh(
        torch.autograd.functional.hessian(lambda x: lower_loss(x, m), flat)
    )[-1].item()
    errors = [error(neumann(*arguments, terms=k, alpha=1 / largest), truth) for k in (1, 10, 100)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3
    assert error(first_order(*arguments), truth) > 0.01


# ----------------------------------------------------------------------------------------------
# Adam below


def adam_by_hand(c, optimizer, grad_clip, steps):
    """The hypergradient by plain autograd through AdamW's formulas, moments and all."""
    group = optimizer.param_groups[0]
    (b1, b2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
    values = {
        name: p.detach().clone().requires_grad_(p.requires_grad)
        for name, p in c.model.named_parameters()
    }
    upper, lower = (
        [n for n in values if "magnitude" in n],
        [n for n in values if "lora_A" in n or "lora_B" in n],
    )
    own = dict(c.model.named_parameters())
    first, second = (
        {n: optimizer.state[own[n]][key].clone() for n in lower}
        for key in ("exp_avg", "exp_avg_sq")
    )
    t, start = int(optimizer.state[own[lower[0]]]["step"]), [values[n] for n in upper]
    for _ in range(steps):
        t += 1
        loss = F.mse_loss(torch.func.functional_call(c.model, values, c.train[0]), c.train[1])
        grads = torch.autograd.grad(loss, [values[n] for n in lower], create_graph=True)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for n, g in zip(lower, grads):
            g = g * torch.clamp(grad_clip / (norm + 1e-6), max=1.0)
            first[n], second[n] = b1 * first[n] + (1 - b1) * g, b2 * second[n] + (1 - b2) * g * g
            values[n] = (
                values[n]
                - lr * decay * values[n]
                - lr * (first[n] / (1 - b1**t)) / (torch.sqrt(second[n] / (1 - b2**t)) + eps)
            )
    loss = F.mse_loss(torch.func.functional_call(c.model, values, c.val[0]), c.val[1])
    return torch.autograd.grad(loss, start)


def warmed_up(c, grad_clip=0.3, **options):
    optimizer = create_bilevel_optimizer(
        c.model, 0.02, 1e-3, weight_decay=0.1, grad_clip=grad_clip, **options
    )
    for _ in range(4):
        optimizer.lower_step(c.loss, c.train)
    return optimizer


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("grad_clip", [0.3, 1e9])
def test_adams_own_update_is_differentiated(steps, grad_clip):
    """
    1e-8 relative to autograd through AdamW by hand: moments, weight decay and clipping; and its
    state stays as it was.
    """
    c = Curved()
    optimizer = warmed_up(c, grad_clip)
    before = copy.deepcopy(optimizer.lower_optimizer.state_dict())
    expected = adam_by_hand(c, optimizer.lower_optimizer, grad_clip, steps)
    h = unrolled(*c.arguments(), steps=steps, adam=optimizer.lower_optimizer, grad_clip=grad_clip)
    torch.testing.assert_close(tuple(h), expected, rtol=1e-8, atol=1e-11)
    finite = unrolled(
        *c.arguments(),
        steps=steps,
        adam=optimizer.lower_optimizer,
        grad_clip=grad_clip,
        mode="finite_difference",
        radius=1e-4,
    )
    torch.testing.assert_close(tuple(finite), expected, rtol=1e-4, atol=1e-6)
    after = optimizer.lower_optimizer.state_dict()
    assert all(
        torch.equal(before["state"][i][key], after["state"][i][key])
        for i in before["state"]
        for key in before["state"][i]
    )


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_steps_just_taken_are_differentiated_as_they_were(steps):
    """
    Through AdamW's last K steps as training took them: what autograd through the same steps from
    the same state gives.
    """
    c = Curved()
    options = dict(hypergradient="unrolled", precondition="adam", steps=steps)
    optimizer = warmed_up(c, lower_steps=steps, **options)
    expected = adam_by_hand(c, optimizer.lower_optimizer, 0.3, steps)
    for _ in range(steps):
        optimizer.lower_step(c.loss, c.train)
    assert [step.graph is not None for step in optimizer.past] == [False] * (steps - 1) + [True]
    taken = hypergradients_taken(optimizer)
    optimizer.upper_step(c.loss, c.val)
    torch.testing.assert_close(tuple(taken[0]), expected, rtol=1e-8, atol=1e-11)
    assert optimizer.past == []


def test_a_second_upper_step_goes_through_simulated_steps_on_the_last_train_batch():
    c = Curved()
    optimizer = create_bilevel_optimizer(c.model, 0.05, upper_steps=2, grad_clip=float("inf"))
    optimizer.lower_step(c.loss, c.train)
    optimizer.upper_step(c.loss, c.val)
    expected, taken = c.through_autograd(0.05, 1), hypergradients_taken(optimizer)
    optimizer.upper_step(c.loss, c.val)
    torch.testing.assert_close(tuple(taken[0]), expected)


def test_only_the_last_steps_of_a_round_are_kept():
    """Also where its steps are counted from another's state, as after a checkpoint."""
    c = Curved()
    options = dict(lower_steps=3, upper_steps=2, steps=2)
    optimizer, kept = create_bilevel_optimizer(c.model, **options), []
    for step in range(1, 10):
        optimizer.lower_step(c.loss, c.train)
        kept.append(len(optimizer.past))
        if step % 3 == 0:
            for _ in range(2):
                optimizer.upper_step(c.loss, c.val)
        elif step % 3 == 1:
            state, optimizer = optimizer.state_dict(), create_bilevel_optimizer(c.model, **options)
            optimizer.load_state_dict(state)
    assert kept == [0, 1, 2] * 3


def test_keeping_a_step_changes_nothing_about_it():
    """Bit for bit the same lower steps, with the graph kept and without."""
    results = []
    for keep in (False, True):
        torch.manual_seed(0)
        c = Curved()
        name = "unrolled" if keep else "first_order"
        optimizer = create_bilevel_optimizer(c.model, 1e-2, hypergradient=name, grad_clip=0.1)
        for _ in range(3):
            optimizer.lower_step(c.loss, c.train)
        results.append([p.detach().clone() for p in c.lower])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name", ["unrolled", "neumann", "conjugate_gradient"])
def test_adam_preconditions_every_second_order_method(name):
    c = Curved()
    optimizer = warmed_up(c, hypergradient=name, precondition="adam")
    scale = adam_scale(optimizer.lower_optimizer)
    for p, s in zip(c.lower, scale):
        state = optimizer.lower_optimizer.state[p]
        torch.testing.assert_close(
            s, 1 / ((state["exp_avg_sq"] / (1 - 0.999 ** int(state["step"]))).sqrt() + 1e-8)
        )
    before = [m.detach().clone() for m in c.upper]
    optimizer.upper_step(c.loss, c.val, c.train)
    assert all(torch.isfinite(m).all() and not torch.equal(m, b) for m, b in zip(c.upper, before))


def test_adams_derivative_is_finite_where_gradient_and_moments_are_zero():
    """As for A before the first step, while B is zero."""
    model = replace_linear_with_bidora(
        nn.Sequential(nn.Linear(5, 8)).requires_grad_(False), 2, target_modules=["0"]
    )
    optimizer = create_bilevel_optimizer(
        model, 1e-2, 1e-3, hypergradient="unrolled", precondition="adam"
    )
    x = torch.randn(6, 5)
    optimizer.bilevel_step(lambda m, b: m(x).square().mean(), None, None)
    assert all(torch.isfinite(m).all() for m in optimizer.upper)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(hypergradient="newton"), "unknown hypergradient"),
        (dict(precondition="diag"), "unknown precondition"),
        (dict(precondition="adam", optimizer="adamw8bit"), "8 bits"),
        (dict(hypergradient="finite_difference"), "loses too many digits"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(options, said):
    model = replace_linear_with_bidora(
        nn.Sequential(nn.Linear(5, 8).bfloat16()).requires_grad_(False), 2, target_modules=["0"]
    )
    with pytest.raises(ValueError, match=said):
        create_bilevel_optimizer(model, 1e-2, 1e-3, **options)


# ------------------------------------------------------------------------------------------------
# parts and processes


@pytest.mark.parametrize("name", HYPERGRADIENTS)
@pytest.mark.parametrize("steps", [1, 2])
def test_losses_in_micro_batches_give_the_hypergradient_of_the_whole(name, steps):
    """Relative 1e-8 in float64, 1e-6 for differences: the same sums in another order."""
    options = {"steps": steps} if name in UNROLLED else {}
    c = Curved()
    whole = HYPERGRADIENTS[name].function(*c.arguments(), **options)

    def parts(batch):
        return [
            lambda rows=rows: (
                F.mse_loss(c.model(batch[0][rows]), batch[1][rows])
                * (len(range(*rows.indices(20))) / 20)
            )
            for rows in (slice(0, 7), slice(7, 20))
        ]

    split = HYPERGRADIENTS[name].function(parts(c.train), parts(c.val), c.lower, c.upper, **options)
    torch.testing.assert_close(split, whole, rtol=1e-6 if name in DIFFERENCES else 1e-8, atol=1e-9)


PROCESS = """
import sys
sys.path[:0] = {paths!r}
import torch
import torch.distributed as dist
from test_hypergrad import Curved, HYPERGRADIENTS, distributed_cases
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def reduce(tensors):
    for tensor in tensors:
        dist.all_reduce(tensor)
    return [tensor / 2 for tensor in tensors]

torch.manual_seed(0)
c = Curved()
share = slice(10 * rank, 10 * rank + 10)
c.train, c.val = tuple(t[share] for t in c.train), tuple(t[share] for t in c.val)
found = [
    [h.tolist() for h in HYPERGRADIENTS[name].function(*c.arguments(), reduce=reduce, **options)]
    for name, options in distributed_cases()
]
torch.save(found, sys.argv[3] + str(rank))
dist.barrier()
dist.destroy_process_group()
"""


def distributed_cases():
    return [
        ("first_order", {}),
        ("unrolled", {"lr": 0.1}),
        ("unrolled", {"lr": 0.1, "steps": 3}),
        ("finite_difference", {"lr": 0.1, "radius": 1e-4}),
        ("neumann", {"terms": 3, "alpha": 0.1}),
        ("conjugate_gradient", {"iterations": 3}),
        ("identity", {}),
        ("identity_difference", {"radius": 1e-4}),
    ]


def test_two_processes_give_the_hypergradient_of_the_joined_batch(tmp_path):
    """
    Each has half of the train and of the val batch; 1e-6 relative in float64 (the finite difference
    is nonlinear in rounding).
    """
    script = tmp_path / "process.py"
    script.write_text(
        PROCESS.format(
            paths=[str(Path(hypergrad.__file__).parent), str(Path(__file__).parent)]
        ).replace("torch.save(", "save(")
    )
    script.write_text(
        "import json\n\ndef save(x, path):\n    json.dump(x, open(path, 'w'))\n"
        + script.read_text()
    )
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store"), str(tmp_path / "h")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    torch.manual_seed(0)
    c = Curved()
    results = [json.loads((tmp_path / f"h{rank}").read_text()) for rank in range(2)]
    for i, (name, options) in enumerate(distributed_cases()):
        joined = torch.cat(
            [h.flatten() for h in HYPERGRADIENTS[name].function(*c.arguments(), **options)]
        )
        for rank in range(2):
            ours = torch.cat(
                [torch.tensor(h, dtype=torch.float64).flatten() for h in results[rank][i]]
            )
            assert (ours - joined).norm() <= 1e-6 * joined.norm(), name


# -------------------------------------------------------------------------------------------------
# memory


def transformer(folder, family, quantize=None, **changes):
    """
    A random transformer, adapted, with directions away from their start; in float64, but for 4-bit
    weights, which have no such form.
    """
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
@pytest.mark.parametrize("kind", LEAN)
@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_what_is_computed_again_changes_no_hypergradient(
    tmp_path, monkeypatch, name, kind, queries
):
    """
    In float64, second derivatives included: recomputed blocks, and attention over few queries at a
    time, give what double backward gives. 1e-10 of the largest, 1e-4 in fp32.
    """
    family, options = LEAN[kind]
    model = transformer(tmp_path, family, **options)
    train, val = (torch.randint(0, 131, (2, 11)) for _ in range(2))
    results = []
    for model.gradient_checkpointing in (False, True):
        h = HYPERGRADIENTS[name].function(
            lambda: model(train, train),
            lambda: model(val, val),
            bidora.lower_parameters(model),
            bidora.upper_parameters(model),
            **({"lr": 0.5, "steps": 2} if name in UNROLLED else {}),
        )
        results.append(torch.cat(h))
        monkeypatch.setattr("model.QUERIES", queries)
    assert not torch.equal(results[0], torch.zeros_like(results[0]))
    tolerance = 1e-4 if kind == "nf4" else 1e-10
    torch.testing.assert_close(
        results[1], results[0], rtol=0, atol=tolerance * results[0].abs().max().item()
    )


def test_attention_over_few_queries_at_a_time_makes_no_whole_scores(tmp_path, monkeypatch):
    """Of 39 × 39 numbers a head, the largest matrices there are: a row's last token is no input."""
    model = transformer(tmp_path, "Llama")
    ids = torch.randint(0, 131, (1, 40))
    lower, upper = bidora.lower_parameters(model), bidora.upper_parameters(model)
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            result = operation(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and result.dim() > 2:
                largest[-1] = max(largest[-1], result.shape[-2:].numel())
            return result

    for queries in (256, 4):
        monkeypatch.setattr("model.QUERIES", queries)
        largest.append(0)
        with Largest():
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
        return losses, torch.cat([p.flatten() for p in bidora.lower_parameters(model)])

    for size in (3, 2, 1):
        for ours, expected in zip(trained(size), trained(0)):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_8_bit_adamw_follows_adamw_at_both_levels():
    """
    Bitsandbytes' quantised moments leave the path within a tenth of its length after 30 steps, and
    are 8 bits wide.
    """

    def trained(optimizer):
        torch.manual_seed(0)
        model = replace_linear_with_bidora(
            nn.Sequential(nn.Linear(300, 5000)).requires_grad_(False), 16, target_modules=["0"]
        )
        x, y = torch.randn(40, 300), torch.randn(40, 5000)
        bilevel = create_bilevel_optimizer(model, 1e-2, 1e-2, optimizer=optimizer)
        start = [p.detach().clone() for p in bilevel.lower + bilevel.upper]
        for _ in range(30):
            bilevel.bilevel_step(lambda model, batch: F.mse_loss(model(x), y), None, None)
        return bilevel, [
            torch.cat([(p - p0).flatten() for p, p0 in zip(part, first)])
            for part, first in ((bilevel.lower, start[:2]), (bilevel.upper, start[2:]))
        ]

    (ours, moved), (_, expected) = trained("adamw8bit"), trained("adamw")
    for a, b in zip(moved, expected):
        assert b.norm() > 0 and (a - b).norm() < 0.1 * b.norm()
    for optimizer in (ours.lower_optimizer, ours.upper_optimizer):
        assert all(
            state["state1"].dtype == torch.uint8
            for p, state in optimizer.state.items()
            if p.numel() >= 4096
        )
    with pytest.raises(ValueError, match="'sgd'.*adamw, adamw8bit"):
        create_bilevel_optimizer(ours.model, 1e-2, 1e-2, optimizer="sgd")


# ------------------------------------------------- what the optimizer must not do in silence


def hypergradients_taken(optimizer):
    """A list that collects the hypergradient of each upper step from now on."""
    taken, real = [], optimizer.step

    def step(of, parameters, gradients, loss):
        if of is optimizer.upper_optimizer:
            taken.append([g.clone() for g in gradients])
        real(of, parameters, gradients, loss)

    optimizer.step = step
    return taken


@pytest.mark.parametrize("steps, lower_steps", [(1, 3), (3, 3), (2, 4)])
def test_bilevel_step_differentiates_through_as_many_steps_as_asked(steps, lower_steps):
    """Autograd through AdamW's last steps, from the state before them."""
    options = dict(precondition="adam", steps=steps, lower_steps=lower_steps)
    pairs = []
    for _ in range(2):
        torch.manual_seed(0)
        c = Curved()
        pairs.append((c, warmed_up(c, **options)))
    (c, optimizer), twin = pairs
    for _ in range(lower_steps - steps):
        twin[1].lower_step(c.loss, c.train)
    expected = adam_by_hand(twin[0], twin[1].lower_optimizer, 0.3, steps)
    taken = hypergradients_taken(optimizer)
    optimizer.bilevel_step(c.loss, c.train, c.val)
    torch.testing.assert_close(tuple(taken[0]), expected, rtol=1e-8, atol=1e-11)


def test_looking_back_on_more_steps_than_are_taken_is_refused():
    c = Curved()
    with pytest.raises(ValueError, match="steps=3 looks back on more than lower_steps=1"):
        create_bilevel_optimizer(c.model, hypergradient="unrolled", steps=3)


def test_a_batch_that_is_a_list_is_one_batch():
    """As a DataLoader gives it; only MicroBatches are parts."""
    c = Curved()
    optimizer = create_bilevel_optimizer(c.model)
    twin, other = copy.deepcopy((c, optimizer))
    loss = optimizer.upper_step(c.loss, list(c.val), list(c.train))
    assert loss == other.upper_step(c.loss, tuple(c.val), tuple(c.train))
    assert all(torch.equal(m, n) for m, n in zip(c.upper, twin.upper))


def test_a_step_that_fails_is_not_kept():
    c = Curved()
    optimizer = create_bilevel_optimizer(c.model)
    with pytest.raises(FloatingPointError):
        optimizer.lower_step(lambda m, batch: c.loss(m, batch) * float("inf"), c.train)
    with pytest.raises(ValueError, match="no lower step was taken"):
        optimizer.upper_step(c.loss, c.val)


def test_the_rate_of_a_simulated_step_is_the_one_that_a_step_would_take():
    c = Curved()
    optimizer = create_bilevel_optimizer(c.model, 0.5, grad_clip=float("inf"))
    optimizer.scale_lr(0.1)
    expected, taken = c.through_autograd(0.05, 1), hypergradients_taken(optimizer)
    optimizer.upper_step(c.loss, c.val, c.train)
    torch.testing.assert_close(tuple(taken[0]), expected)


def test_the_rate_of_a_kept_step_is_the_one_at_its_time():
    c = Curved()
    optimizer = create_bilevel_optimizer(c.model, 0.5, grad_clip=float("inf"))
    optimizer.scale_lr(0.1)
    twin = copy.deepcopy(c)
    optimizer.lower_step(c.loss, c.train)
    optimizer.scale_lr(0.01)  # as a schedule may, before the upper step

    both = torch.autograd.grad(c.loss(c.model, c.val), c.lower + c.upper)
    g = torch.autograd.grad(twin.loss(twin.model, twin.train), twin.lower, create_graph=True)
    cross = torch.autograd.grad(g, twin.upper, grad_outputs=both[: len(g)])
    taken = hypergradients_taken(optimizer)
    optimizer.upper_step(c.loss, c.val)
    expected = [h - 0.05 * x for h, x in zip(both[len(g) :], cross)]
    torch.testing.assert_close(taken[0], expected)


# At alpha = 10 the terms grow for the network's curvature; at 1e-3 they shrink.
@pytest.mark.parametrize("alpha, grows", [(10.0, True), (1e-3, False)])
def test_a_neumann_series_whose_terms_grow_says_so(alpha, grows, recwarn):
    q = Quadratic()
    neumann(*q.arguments, alpha=alpha, terms=5)
    assert any("terms of the Neumann series grow" in str(w.message) for w in recwarn) == grows


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(hypergradient="neumann", steps=3), "neumann has no option 'steps': .*alpha, terms"),
        (dict(hypergradient="first_order", lr=0.1), "no option 'lr': it has none"),
        (dict(steps=0), "steps=0 must be a whole number of at least 1"),
        (dict(steps=1.5), "steps=1.5 must be a whole number"),
        (dict(lr=-0.1), "lr=-0.1 must be a positive number"),
        (dict(hypergradient="neumann", alpha="small"), "alpha='small' must be"),
        (dict(hypergradient="conjugate_gradient", damping=float("nan")), "damping=nan must be"),
    ],
)
def test_wrong_options_of_a_hypergradient_are_refused_at_once(options, said):
    with pytest.raises(ValueError, match=said):
        create_bilevel_optimizer(Curved().model, **options)


def test_preconditioning_by_moments_needs_a_lower_step_first():
    c = Curved()
    optimizer = create_bilevel_optimizer(
        c.model, hypergradient="neumann", precondition="adam", grad_clip=1.0
    )
    with pytest.raises(ValueError, match="take a lower step first"):
        optimizer.upper_step(c.loss, c.val, c.train)


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


# ------------------------------------------------------------------ parameters out of reach


class Checkpointed(nn.Module):
    """Linear layers, each under gradient checkpointing of a kind; dropout in the adapters."""

    def __init__(self, *reentrant, dropout=0.0):
        super().__init__()
        layers = nn.ModuleList(nn.Linear(5, 5) for _ in reentrant).double().requires_grad_(False)
        self.layers, self.reentrant = layers, reentrant
        replace_linear_with_bidora(
            self, 2, lora_dropout=dropout, target_modules=[str(i) for i in range(len(layers))]
        )

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
    model, x = Checkpointed(True, False), torch.randn(4, 5, dtype=torch.float64)
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


def direct_call(function, *arguments, use_reentrant):
    return function(*arguments)


class NumbersRead(TorchDispatchMode):
    """Counts the numbers that leave tensors, each of which waits for a GPU to finish."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("precondition", ["none", "adam"])
@pytest.mark.parametrize("name", ["first_order", "unrolled", "finite_difference", "identity"])
def test_a_bilevel_step_reads_one_number_per_level(name, precondition):
    c = Curved()
    optimizer = warmed_up(c, hypergradient=name, precondition=precondition)
    with NumbersRead() as numbers:
        optimizer.bilevel_step(c.loss, c.train, c.val)
    assert numbers.count == 2
