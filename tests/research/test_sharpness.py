"""λ_max: beside the whole Hessian of a small network, and for the arms of a study."""

import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, hessian

from research import sharpness
from research.results import save
from research.sweep import TUNING_SEEDS


def test_the_largest_eigenvalue_is_that_of_the_whole_hessian():
    """To 1e-6: 1e-9 is asked of Lanczos, in float64. The other half of the weights is constant."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
    parameters = dict(model[0].named_parameters(prefix="0"))

    def loss_at(flat):
        parts = flat.split([p.numel() for p in parameters.values()])
        values = [part.view_as(p) for part, p in zip(parts, parameters.values())]
        return F.cross_entropy(functional_call(model, dict(zip(parameters, values)), x), y)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    expected = torch.linalg.eigvalsh(hessian(loss_at)(flat))[-1].item()
    found = sharpness.largest_eigenvalue(
        lambda: F.cross_entropy(model(x), y), list(parameters.values()), 1e-9
    )
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_table_has_a_row_for_each_arm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy = ["--model=tiny-random", "--target_modules=q_proj,v_proj", "--domains=toy-sentiment"]
    assert sharpness.main([*toy, "--arms=lora,dora", "--steps=2"]) == 0
    head, *lines, note = capsys.readouterr().out.splitlines()
    assert note == "–: results/study has no chosen rate yet: python -m research.sweep chooses it"
    assert head.split()[-4:] == ["2", "steps", "chosen", "rate"]
    assert [line.split()[:2] for line in lines] == [[toy[2][10:], arm] for arm in ("lora", "dora")]
    for line in lines:
        *values, rate = line.split()[2:]
        assert all(float(value) > 0 for value in values) and rate == "–"

    # The note is for any row, not only for the last: here dora has a choice.
    for rate, seed in itertools.product((1e-3, 3e-3, 1e-2), TUNING_SEEDS):
        line = {"name": f"tune-toy-sentiment-dora-{rate:g}-{seed}", "set": "tune"}
        line |= {"command": " ".join([*toy[:2], "--dtype=float32", f"--lower_lr={rate}"])}
        save("results/study", line | {"after": {"test": {"loss": abs(rate - 3e-3)}}})
    assert sharpness.main([*toy, "--arms=lora,dora", "--steps=0"]) == 0
    *_, without, chosen, last = capsys.readouterr().out.splitlines()
    assert without.split()[-1] == "–" and chosen.split()[-1] == "0.003" and last == note

    assert sharpness.main(["--arms=doar"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: unknown arms 'doar'; did you mean 'dora'")
