"""VeRA and PiSSA under each magnitude, in float64: the formula, PEFT, merging, and a run."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bidora
import sample
import train
from research import relatives

METHODS = relatives.METHODS


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)).double().requires_grad_(False)


def moved(base, method):
    """The base's layers adapted, with parameters that have learnt something."""
    model = bidora.replace_linear_with_bidora(copy.deepcopy(base), 3, 6, 0, ["0", "1"], method)
    x = torch.randn(5, 9).double()
    assert_close(model(x), base(x))
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        p.data += 0.1 * torch.randn_like(p)
    return model, x


def update(layer, W0):
    """W0 + ΔW, without a magnitude, written in another way."""
    if hasattr(layer, "vera_d"):
        return W0 + layer.vera_b.diag() @ layer.lora_B @ layer.vera_d.diag() @ layer.lora_A
    U, S, V = torch.linalg.svd(W0)
    residual = U[:, 3:] @ S[3:].diag() @ V[3:]  # PiSSA's frozen weight
    return residual + 2 * layer.lora_B @ layer.lora_A


@pytest.mark.parametrize("method", METHODS)
def test_a_relative_is_its_formula_in_values_and_gradients_and_peft_reads_it(method, tmp_path):
    """Gradients of what trains: VeRA's two vectors, PiSSA's factors, and m."""
    base = layers()
    model, x = moved(base, method)
    layer = model[0]
    if hasattr(layer, "vera_d"):  # one pair of factors for all layers of a shape
        assert layer.lora_A.data_ptr() == model[1].lora_A.data_ptr()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    own = {"vera_d", "vera_b"} if hasattr(layer, "vera_d") else {"lora_A", "lora_B"}
    m = layer.lora_magnitude_vector
    assert trained.keys() == own | ({"lora_magnitude_vector"} if m is not None else set())
    assert (m is None) == (method in ("vera", "pissa"))

    W = update(layer, base[0].weight)
    W = W if m is None else m[:, None] * W / W.norm(dim=1, keepdim=True)
    y = x @ W.T + layer.bias
    assert_close(layer(x), y)
    assert_close(layer.merged_weight(), W)
    ours, theirs = (torch.autograd.grad(z.sin().sum(), trained.values()) for z in (layer(x), y))
    assert_close(ours, theirs)

    bidora.save_adapter(model, tmp_path)
    assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))
    assert_close(bidora.load_adapter(copy.deepcopy(base), tmp_path)(x), model(x))
    assert_close(bidora.merge(copy.deepcopy(model))(x), model(x))
    upper = {n for n, p in trained.items() if any(p is u for u in bidora.upper_parameters(model))}
    assert upper == ({"lora_magnitude_vector"} if method.startswith("bi") else set())


def test_pissa_starts_as_peft_s_does():
    """PEFT writes the residual into the base; here the base stays, and ΔW starts at 0."""
    base, options = layers().float(), dict(r=3, lora_alpha=6, target_modules=["0", "1"])
    config = peft.LoraConfig(**options, init_lora_weights="pissa")
    peer = peft.get_peft_model(copy.deepcopy(base), config).base_model.model[0]
    layer = bidora.replace_linear_with_bidora(base, 3, 6, 0, ["0", "1"], "pissa")[0]
    update = 2 * layer.lora_B @ layer.lora_A
    assert_close(update, peer.get_delta_weight("default"))
    assert_close(layer.weight - update, peer.base_layer.weight)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("method", ["bidvora", "bipidora"])
def test_a_relative_trains_and_its_adapter_is_used(method, capsys):
    arguments = ["--config=tiny.py", "--search_steps=4", "--retrain_steps=4", "--out_dir=run"]
    assert train.main([*arguments, f"--method={method}"]) == 0
    assert sample.main(["--adapter=run", "--prompt=aeae lim"]) == 0
    assert "%" in capsys.readouterr().out
