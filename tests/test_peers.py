"""
Hypergradients against an independent implementation, torchopt 0.7 (arXiv 2211.06934).

hypergrad 0.0.1 on PyPI (not hypertorch, which is not there) needs torchvision and has the name of
our file; higher 0.2.1 differentiates unrolled steps only, which torchopt does, too.
"""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchopt
from test_hypergrad import Curved, Logistic

from hypergrad import conjugate_gradient, neumann, unrolled


def through_torchopt(c, make_optimizer, steps):
    """The hypergradient of a Curved problem through steps of a differentiable optimizer."""
    model = copy.deepcopy(c.model)
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    upper = {n: p.clone().requires_grad_() for n, p in fixed.items() if "magnitude" in n}
    direction = nn.Module()
    names = [name for name, p in model.named_parameters() if p.requires_grad and name not in upper]
    for i, name in enumerate(names):
        direction.register_parameter(f"p{i}", nn.Parameter(fixed[name].clone()))
    optimizer = make_optimizer(direction)

    def loss(batch):
        values = fixed | upper | {name: getattr(direction, f"p{i}") for i, name in enumerate(names)}
        return F.mse_loss(torch.func.functional_call(model, values, batch[0]), batch[1])

    for _ in range(steps):
        optimizer.step(loss(c.train))
    return torch.autograd.grad(loss(c.val), list(upper.values()))


@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_gradient_descent(steps):
    c = Curved()
    expected = through_torchopt(c, lambda module: torchopt.MetaSGD(module, lr=0.1), steps)
    ours = tuple(unrolled(*c.arguments(), lr=0.1, steps=steps))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_adamw(steps):
    """The tolerance is 1e-5: torchopt keeps its bias corrections in fp32."""
    c, options = Curved(), dict(lr=0.02, weight_decay=0.1)
    expected = through_torchopt(c, lambda module: torchopt.MetaAdamW(module, **options), steps)
    ours = unrolled(*c.arguments(), steps=steps, adam=torch.optim.AdamW(c.lower, **options))
    torch.testing.assert_close(tuple(ours), expected, rtol=1e-5, atol=1e-6)


def implicit(p, solve):
    """The hypergradient of a Logistic problem by torchopt's implicit differentiation."""
    condition = torch.func.grad(p.lower_loss, argnums=0)

    @torchopt.diff.implicit.custom_root(condition, argnums=1, solve=solve)
    def solution(start, m):
        return p.solve(m.detach())

    m = p.m.detach().clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchopt still uses functorch
        return torch.autograd.grad(p.upper_loss(solution(torch.zeros_like(m), m)), m)[0]


def test_conjugate_gradient():
    p = Logistic()
    expected = implicit(p, torchopt.linear_solve.solve_cg(maxiter=50, atol=0, rtol=1e-14))
    ours = conjugate_gradient(*p.arguments, iterations=6, damping=0.0)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("terms", [1, 8])
def test_neumann(terms):
    """torchopt's maxiter counts the terms after the first."""
    p = Logistic()
    expected = implicit(p, torchopt.linear_solve.solve_inv(ns=True, maxiter=terms - 1, alpha=0.01))
    ours = neumann(*p.arguments, terms=terms, alpha=0.01)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
