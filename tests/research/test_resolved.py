"""Hypergradients beside a lower level that is solved again: the truth, the searches, the tables."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_heads import tokenizers as write_tokenizer
from test_tasks import encoder
from torch.func import functional_call, hessian

import bidora
from research import figures, resolved
from research.resolved import ARMS, Problem, search
from research.results import read_results, save

SMALL = dict(AFTER=(3, 6), DIRECTIONS=8, UPPER_STEPS=3, LOWER_STEPS=20)
SMALL |= dict(MODEL="bert", DOMAINS=("toy-sentiment",), SEEDS=6)


@pytest.fixture(autouse=True)
def small(elsewhere, monkeypatch):
    write_tokenizer(Path(encoder()), "roberta")  # which knows every text
    for name, value in SMALL.items():
        monkeypatch.setattr(resolved, name, value)


def test_the_largest_eigenvalue_is_that_of_the_whole_hessian():
    """To 1e-6 in float64. The other half of the weights is constant."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
    parameters = dict(model[0].named_parameters(prefix="0"))

    def loss_at(flat):
        parts = flat.split([p.numel() for p in parameters.values()])
        values = [part.view_as(p) for part, p in zip(parts, parameters.values())]
        return F.cross_entropy(functional_call(model, dict(zip(parameters, values)), x), y)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    expected = torch.linalg.eigvalsh(hessian(loss_at)(flat))[-1].item()
    weights = list(parameters.values())
    found = resolved.largest_eigenvalue(lambda: F.cross_entropy(model(x), y), weights, 1000)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_implicit_hypergradient_is_the_slope_of_the_solved_lower_level():
    """To 1e-4 of its length: the differences' own error at steps of 1e-3."""
    found = resolved.errors(Problem("toy-sentiment", 0), 0)
    assert [*found] == [3, 6, "solved"]
    error, cosine = found["solved"]["cg-100"]
    assert error < 1e-4 and cosine > 1 - 1e-8
    others = {arm: error for arm, (error, _) in found["solved"].items() if arm != "cg-100"}
    assert min(others.values()) > 100 * error and found[3]["cg-100"][0] > 100 * error


def test_solving_ends_at_a_zero_gradient_and_moves_the_lower_level_alone():
    problem = Problem("toy-sentiment", 0)
    [m] = bidora.upper_parameters(problem.model)
    before = m.clone()
    problem.solve(problem.model)
    lower = bidora.lower_parameters(problem.model)
    gradients = torch.autograd.grad(problem.loss(problem.model, "train"), lower)
    assert max(g.abs().max() for g in gradients) < 1e-7 and torch.equal(m, before)


def test_each_arm_searches_as_its_name_says():
    problem = Problem("toy-sentiment", 0)
    start = {name: value.clone() for name, value in problem.model.state_dict().items()}
    found = {arm: search(problem, arm) for arm in ARMS}
    assert all(value.equal(start[name]) for name, value in problem.model.state_dict().items())

    assert search(problem, "m-fixed") == found["m-fixed"]  # whatever was drawn before it
    assert found["m-fixed"]["moved"] == 0
    val = {arm: result["val"] for arm, result in found.items()}
    searched = set(ARMS) - {"m-fixed", "m-joint", "identity"}  # coefficient 1 may point uphill
    assert all(val[arm] < val["m-fixed"] for arm in searched)
    assert len(set(val.values())) == len(ARMS)  # no two are the same search
    for result in found.values():
        assert result["metric"] == "accuracy" and {"train", "test"} == result["after"].keys()


def test_results_are_kept_tabulated_and_drawn(capsys):
    assert figures.main(["--only=truth"]) == 2
    assert "too few results: python -m research.resolved makes them" in capsys.readouterr().err
    resolved.measure("results/resolved", "toy-sentiment", 0)
    made = read_results("results/resolved")
    assert len(made) == 1 + len(ARMS)
    for seed in range(1, 6):  # as if measured, without the time
        for name, result in made.items():
            result = result | {"name": f"{name[:-1]}{seed}", "seed": seed}
            if "after" in result:
                result["after"] |= {"test": {"accuracy": random.random(), "loss": 0.5}}
            save("results/resolved", result)
    assert resolved.main([]) == 0  # all is there
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| `cg-100`") for line in lines) == 6
    assert "| lower-level steps | 3 | 6 | solved | `toy-sentiment`, solved |" in lines
    assert "| arm | `toy-sentiment` (6) |" in lines
    assert figures.main(["--only=truth"]) == 0
    assert Path("docs/truth.png").stat().st_size > 5000
