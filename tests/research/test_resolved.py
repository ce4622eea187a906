"""Hypergradients beside a lower level that is solved again: the truth, the searches, the tables."""

import functools
import random
from pathlib import Path

import pytest
import torch
from test_heads import tokenizers as write_tokenizer
from test_tasks import encoder

import bidora
from research import figures, resolved
from research.resolved import ARMS, Problem, Resolved, search
from research.results import read_results, save


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))
    for name, value in dict(AFTER=(3, 6), DIRECTIONS=8, UPPER_STEPS=3, LOWER_STEPS=20).items():
        monkeypatch.setattr(resolved, name, value)


def given(**settings):
    folder = encoder()
    write_tokenizer(Path(folder), "roberta")  # which knows every text
    return Resolved(model=folder, domains=("toy-sentiment",), **settings)


def test_the_implicit_hypergradient_is_the_slope_of_the_solved_lower_level():
    """To 1e-4 of its length: the differences' own error at steps of 1e-3."""
    found = resolved.errors(Problem(given(), "toy-sentiment", 0), 0)
    assert [*found] == [3, 6, "solved"]
    error, cosine = found["solved"]["cg-100"]
    assert error < 1e-4 and cosine > 1 - 1e-8
    others = {arm: error for arm, (error, _) in found["solved"].items() if arm != "cg-100"}
    assert min(others.values()) > 100 * error and found[3]["cg-100"][0] > 100 * error


def test_solving_ends_at_a_zero_gradient_and_moves_the_lower_level_alone():
    problem = Problem(given(), "toy-sentiment", 0)
    [m] = bidora.upper_parameters(problem.model)
    before = m.clone()
    problem.solve(problem.model)
    lower = bidora.lower_parameters(problem.model)
    gradients = torch.autograd.grad(problem.loss(problem.model, "train"), lower)
    assert max(g.abs().max() for g in gradients) < 1e-7 and torch.equal(m, before)


def test_each_arm_searches_as_its_name_says():
    problem = Problem(given(), "toy-sentiment", 0)
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


def test_results_are_kept_tabulated_and_drawn(monkeypatch, capsys):
    options = given(seeds=6)
    resolved.measure(options, "toy-sentiment", 0)
    made = read_results("results/resolved")
    assert len(made) == 1 + len(ARMS)
    for seed in range(1, 6):  # as if measured, without the time
        for name, result in made.items():
            result = result | {"name": f"{name[:-1]}{seed}", "seed": seed}
            if "after" in result:
                test = {"accuracy": random.random(), "loss": 0.5}
                result["after"] = result["after"] | {"test": test}
            save("results/resolved", result, None)
    arguments = [f"--model={options.model}", "--domains=toy-sentiment", "--seeds=6"]
    assert resolved.main(arguments) == 0  # all is there
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| `cg-100`") for line in lines) == 6
    assert "| lower-level steps | 3 | 6 | solved | `toy-sentiment`, solved |" in lines
    assert "| arm | `toy-sentiment` (6) |" in lines

    monkeypatch.setattr(resolved, "Resolved", functools.partial(Resolved, domains=options.domains))
    assert figures.main(["--only=truth"]) == 0
    assert Path("docs/truth.png").stat().st_size > 5000

    monkeypatch.setattr(resolved, "Resolved", Resolved)
    assert resolved.main([*arguments, "--ridge=0.2"]) == 2
    assert "was not made with --model=bert --ridge=0.2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ridge=0"], "ridge=0.0 must be positive"),
        (["--domains=peptide"], "unknown domains 'peptide'; did you mean 'peptides'?"),
        (["--seeds=0"], "seeds=0 must be at least 1"),
        (["--report"], "no results in results/resolved: run python -m research.resolved"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message, capsys):
    assert resolved.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_picture_without_results_says_what_makes_them(capsys):
    assert figures.main(["--only=truth"]) == 2
    assert "too few results: python -m research.resolved makes them" in capsys.readouterr().err
