"""The adapter layers against a float64 reference that builds the matrix, and against PEFT."""

import copy
import json
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_architectures import perturbed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close

import bidora
import sample
import train
from bidora import BiDoRALinear, load_adapter, merge, replace_linear_with_bidora, save_adapter
from bilevel import create_bilevel_optimizer
from support.fast import kernels
from support.weights import peft_format, quantized
from support.weights.regularisers import regulariser

METHODS = ("lora", "dora", "bidora")
ALL = [*METHODS, "bilora", "bilora_softmax", "bilora_binary"]
PATTERNS = dict(rank_pattern={"k_proj": 2, "layers.1.self_attn.q_proj": 7})
PATTERNS |= dict(alpha_pattern={"^model.layers.0.*": 3, "up_proj": 5})
PREFIX = peft_format.PREFIX


def built(layer):
    """W0 + s·B·A in float64."""
    return layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()


def reference(layer, x):
    """The adapted output in float64, from the formula with the matrix built."""
    W, m = built(layer), layer.lora_magnitude_vector
    if m is not None and layer.magnitude_axis == "row":
        W = m.double()[:, None] * W / W.norm(dim=1, keepdim=True)
    elif m is not None:
        W = m.double() * W / W.norm(dim=0, keepdim=True)
    return x.double() @ W.T + (0 if layer.bias is None else layer.bias.double())


def trained(layer, scale=0.1):
    """Give the adapter values as if it had been trained."""
    m = layer.lora_magnitude_vector
    with torch.no_grad():
        layer.lora_B.normal_(std=scale)
        if m is not None:
            m.mul_(1 + 0.1 * torch.randn_like(m))
    return layer


def adapted(base, targets, rank=4, **options):
    """A copy of a model with adapters that have values as if they had been trained."""
    model = copy.deepcopy(base).requires_grad_(False)
    replace_linear_with_bidora(model, rank, target_modules=targets, **options)
    for layer in bidora.adapter_layers(model).values():
        trained(layer)
    return model


def pefts(base, **options):
    """A copy of a model with PEFT's adapters, which have values as if they had been trained."""
    config = LoraConfig(**dict(r=4, lora_alpha=8) | options)
    return perturbed(get_peft_model(copy.deepcopy(base), config).eval())


def mlp():
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))


def tiny(name):
    """A random model of transformers, by its class."""
    sizes = dict(vocab_size=31, num_hidden_layers=1, hidden_size=8, num_attention_heads=2)
    if name.startswith("T5"):
        sizes = dict(vocab_size=31, num_layers=1, d_model=8, num_heads=2, d_kv=4, d_ff=8)
    build = getattr(transformers, name)
    return build(build.config_class(**sizes)).eval()


def tiny_llama():
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize("rank, scale", [(1, 0.01), (4, 0.1), (12, 3.0)])
def test_factored_norm_equals_the_norm_of_the_built_matrix(rank, scale):
    """Relative 1e-5: fp32 sums over a row of 40 entries."""
    layer = trained(BiDoRALinear(40, 24, rank=rank), scale)
    assert_close(layer.direction_norm().double(), built(layer).norm(dim=1), rtol=1e-5, atol=0)


def test_factored_norm_over_a_bf16_weight_keeps_fp32_accuracy():
    """1e-4: W0·Aᵀ, in bf16, is a few percent of the norm. A norm in bf16 would be off by 4e-3."""
    linear = nn.Linear(512, 64, bias=False).bfloat16()
    layer = trained(BiDoRALinear(512, 64, rank=8, linear=linear), 0.01)
    norm = built(layer).norm(dim=1)
    moved = (norm / layer.weight.double().norm(dim=1) - 1).abs().mean()
    assert moved > 1e-3  # the update is large enough to matter
    assert_close(layer.direction_norm().double(), norm, rtol=1e-4, atol=0)


def test_a_methods_own_scale_survives_saving(tmp_path, monkeypatch):
    """rsLoRA (arXiv 2312.03732) as an entry of METHODS: what is saved gives the same outputs."""
    rslora = bidora.Method(scale=lambda alpha, rank: alpha / rank**0.5)
    monkeypatch.setitem(bidora.METHODS, "rslora", rslora)
    base, x = mlp(), torch.randn(3, 12)
    model = adapted(base, ["0", "2"], method="rslora")
    save_adapter(model, tmp_path)
    assert_close(load_adapter(base, tmp_path)(x), model(x))


COPIED = """
import sys
import torch
import torch.nn as nn
import torch.nn.functional as F
from bidora import merge, replace_linear_with_bidora
from bilevel import HYPERGRADIENTS, create_bilevel_optimizer

assert "support" not in sys.modules
x, y = torch.randn(32, 16), torch.randn(32, 8)
for name in HYPERGRADIENTS:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    replace_linear_with_bidora(model.requires_grad_(False), 4, target_modules=["0", "2"])
    optimizer = create_bilevel_optimizer(model, 1e-2, 1e-2, hypergradient=name)
    losses = [
        optimizer.bilevel_step(lambda model, batch: F.mse_loss(model(x), y), None, None)[0]
        for _ in range(20)
    ]
    assert losses[-1] < losses[0], name
    before = model(x)
    torch.testing.assert_close(merge(model)(x), before)
"""


def test_the_three_files_alone_train_ordinary_layers(tmp_path):
    for name in ("bidora.py", "hypergrad.py", "bilevel.py"):
        shutil.copy(Path(bidora.__file__).with_name(name), tmp_path)
    command = [sys.executable, "-c", COPIED]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(10,), (1, 10), (2, 3, 10), (0, 10)])
def test_inputs_of_any_number_of_dimensions(shape):
    layer, x = trained(BiDoRALinear(10, 7, rank=3)), torch.randn(shape)
    assert_close(layer(x), reference(layer, x).float())


def test_rescaling_in_place_has_right_first_and_second_derivatives():
    y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    change = torch.tensor([0.3, -0.2, 1.5], dtype=torch.float64, requires_grad=True)

    def rescale(y, change):
        return kernels.rescale(y * 1, change)  # y itself is a leaf, which can't be written into

    assert_close(rescale(y, change), y * (1 + change))
    assert torch.autograd.gradcheck(rescale, (y, change))
    assert torch.autograd.gradgradcheck(rescale, (y, change))
    # A row of zeros: y = 0 and ratio 0.
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    nothing = torch.full((3,), -1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(rescale(zeros, nothing).sum(), nothing)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_forward_and_gradients_equal_the_built_matrix(method, bias):
    base = nn.Linear(10, 7, bias=bias).double()
    layer = trained(BiDoRALinear(10, 7, rank=3, bias=bias, method=method, linear=base))
    x = torch.randn(4, 6, 10, dtype=torch.float64, requires_grad=True)
    parameters = [x] + [p for p in layer.parameters() if p.requires_grad]
    target, expected = torch.randn(4, 6, 7, dtype=torch.float64), reference(layer, x)
    gradients = torch.autograd.grad((expected * target).sum(), parameters)
    shown = [layer(x)] if method == "lora" else [layer(x), bidora.plain_forward(layer, x)]
    for y in shown:  # the equation at the file's head, too
        assert_close(y, expected, rtol=1e-10, atol=1e-12)
        found = torch.autograd.grad((y * target).sum(), parameters)
        assert_close(found, gradients, rtol=1e-9, atol=1e-11)


def test_detached_norm_gives_the_gradient_of_a_constant_norm():
    base = nn.Linear(10, 7).double()
    layer = trained(BiDoRALinear(10, 7, rank=3, norm_grad="detach", linear=base))
    x = torch.randn(5, 10, dtype=torch.float64)
    ratio = (layer.lora_magnitude_vector / layer.direction_norm()).detach()
    plain = ratio * (x @ (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).T)
    expected = torch.autograd.grad(plain.sin().sum(), [layer.lora_A, layer.lora_B])
    got = torch.autograd.grad((layer(x) - layer.bias).sin().sum(), [layer.lora_A, layer.lora_B])
    assert_close(got, expected)


def test_detached_norm_gives_pefts_gradients(tmp_path):
    base, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    options = dict(lora_alpha=8, method="dora", norm_grad="detach")
    ours = adapted(base, ["q_proj", "up_proj"], **options)
    save_adapter(ours, tmp_path)
    gradients = []
    for model in (ours, PeftModel.from_pretrained(base, tmp_path, is_trainable=True)):
        model(ids, labels=ids).loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        names = (n.removeprefix(PREFIX).removesuffix(".weight") for n in trained)
        gradients.append({n.removesuffix(".default"): g for n, g in zip(names, trained.values())})
    assert len(gradients[0]) == 3 * 4
    assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_magnitude_change_of_half_a_percent_survives_bf16():
    """On average, to 0.1 %: as a bf16 factor, 1.005 is 1.0078. (Changes below 0.2 % are lost.)"""
    layer = BiDoRALinear(64, 2000, bias=False, linear=nn.Linear(64, 2000, bias=False).bfloat16())
    x = torch.randn(50, 64).bfloat16()
    before = layer(x).double()
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.005)
    moved = (layer(x).double() * before).sum() / (before * before).sum()
    assert abs(moved - 1.005) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_adapted_model_equals_base_before_training(method, dtype):
    """Bit for bit, but over a bf16 weight with a bias: it is added after m, one more rounding."""
    model = mlp().to(dtype)
    x = torch.randn(8, 12).to(dtype)
    before = model(x)
    replace_linear_with_bidora(model, 4, target_modules=["0", "2"], method=method)
    if method != "lora" and dtype == torch.bfloat16:
        assert_close(model(x), before, rtol=0, atol=2**-7 * before.abs().max().item())
    else:
        assert torch.equal(model(x), before)

    model, ids = tiny_llama().to(dtype), torch.randint(0, 97, (2, 9))
    before, targets = model(ids).logits, ["q_proj", "v_proj", "down_proj"]
    replace_linear_with_bidora(model, 4, target_modules=targets, method=method)
    assert torch.equal(model(ids).logits, before)


def test_magnitude_is_the_norm_of_the_weight_that_is_there():
    linear = nn.Linear(6, 4)
    layer = BiDoRALinear(6, 4, rank=2, linear=linear)
    assert_close(layer.lora_magnitude_vector.data, linear.weight.norm(dim=1))


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled", "neumann"])
@pytest.mark.parametrize("method", ["dora", "bidora"])
def test_a_row_of_zeros_stays_zero_and_spoils_no_gradient(method, hypergradient, axis):
    linear = nn.Linear(6, 5)
    with torch.no_grad():
        linear.weight[2] = linear.weight[:, 3] = 0
    layer = BiDoRALinear(6, 5, rank=2, method=method, magnitude_axis=axis, linear=linear)
    model = nn.Sequential(layer)
    optimizer = create_bilevel_optimizer(model, 1e-2, 1e-2, hypergradient=hypergradient)
    batches = [(torch.randn(8, 6), torch.randn(8, 5)) for _ in range(2)]

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    for _ in range(5):
        if method == "bidora":
            optimizer.bilevel_step(loss_fn, *batches)
        else:
            optimizer.lower_step(loss_fn, batches[0])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    merged = layer.merged_weight()
    # A column of zeros gets a direction from B·A, as soon as other columns have moved B.
    assert axis == "column" or not merged[2].any()
    assert merged.count_nonzero() >= 20


@pytest.mark.parametrize("method", METHODS)
def test_merge_reproduces_the_adapted_outputs(method):
    """1e-5 in fp32: the same products in another order."""
    ids = torch.randint(0, 97, (2, 9))
    model = adapted(tiny_llama(), ["q_proj", "up_proj"], method=method)
    expected = model(ids).logits
    merge(model)
    assert not bidora.adapter_layers(model)
    assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_loads_bit_for_bit_and_in_peft(tmp_path, method):
    """In PEFT within 1e-4 in fp32: it builds the matrix for its norm, we don't."""
    base, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    model = adapted(base, ["q_proj", "v_proj", "gate_proj"], method=method)
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    own, theirs = (peft_format.named_tensors(bidora.adapter_layers(m)) for m in (model, loaded))
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    peer = PeftModel.from_pretrained(base, tmp_path)
    assert_close(peer(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "o_proj"]),
        dict(target_modules=["k_proj", "lm_head"]),
        dict(target_modules=["k_proj"], rank_pattern={"k_proj": 40}),
        dict(target_modules=["q_proj", "o_proj"], use_rslora=True),
        dict(target_modules="all-linear"),
        dict(target_modules=r".*\.1\..*\.(up|v)_proj"),
        dict(target_modules=["v_proj"], layers_to_transform=[1]),
        dict(target_modules=["v_proj", "up_proj"], layers_to_transform=0),
        dict(target_modules=["v_proj"], layers_to_transform=0, layers_pattern="layers"),
        dict(target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"]),
        dict(target_modules=["q_proj", "up_proj"], modules_to_save=["mlp"]),
        PATTERNS | dict(target_modules=["q_proj", "k_proj", "up_proj"], use_rslora=True),
    ],
)
def test_we_load_what_peft_saves_and_pass_it_on(tmp_path, use_dora, options):
    """Logits equal to PEFT's within 1e-4; saved again by us, in PEFT's format, equal once more."""
    base, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    ours, peer = copy.deepcopy(base), pefts(base, use_dora=use_dora, **options)
    peer.save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(ours, tmp_path / "theirs"), tmp_path / "ours")
    for model in (ours, PeftModel.from_pretrained(base, tmp_path / "ours")):
        assert_close(model(ids).logits, peer(ids).logits, rtol=1e-4, atol=1e-4)


def with_block(model, wrap):
    """A model whose last block is wrapped."""
    model.model.layers[1] = wrap(model.model.layers[1])
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPED = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "a compiled block": lambda model: with_block(model, compiled),
    "a checkpointed block": lambda model: with_block(model, checkpoint_wrapper),
    "all": lambda model: nn.DataParallel(compiled(with_block(model, checkpoint_wrapper))),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_s_adapter_has_the_plain_names_in_both_directions(kind, tmp_path):
    """PEFT loads it into the plain model to the same logits, and a wrapped one loads it."""
    base, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    model = adapted(base, ["q_proj", "up_proj"])
    model.model.layers[1].input_layernorm.requires_grad_(True).weight.data += 0.5  # saved whole
    expected = model(ids).logits
    save_adapter(WRAPPED[kind](model), tmp_path)
    again = load_adapter(WRAPPED[kind](copy.deepcopy(base)), tmp_path)
    assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    save_adapter(again, tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        peer = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert_close(peer(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrap, options",
    [  # PEFT's file then holds the wrapper's name; a start that leaves the base as it is
        (compiled, dict(alpha_pattern={"_orig_mod.model.layers.1.*": 300})),
        (copy.deepcopy, dict(init_lora_weights="mica")),
    ],
)
def test_other_adapters_of_peft_s_are_loaded(wrap, options, tmp_path):
    base, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    peer = pefts(wrap(base), target_modules=["q_proj"], **options)
    peer.save_pretrained(tmp_path)
    assert_close(load_adapter(base, tmp_path)(ids).logits, peer(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dora", "bidora"])
def test_column_magnitudes_scale_the_inputs(method):
    """Value and every gradient against the built matrix; equal to the base at first; merged."""
    base, x = nn.Linear(9, 14), torch.randn(5, 9)
    layer = BiDoRALinear(9, 14, 3, method=method, magnitude_axis="column", linear=base)
    assert_close(layer(x), base(x), rtol=1e-5, atol=1e-6)
    assert layer.lora_magnitude_vector.shape == (9,)
    trained(layer)
    layer.lora_magnitude_vector.data *= torch.linspace(0.8, 1.2, 9)
    expected = reference(layer, x)
    assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    parameters = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    ours, truth = (torch.autograd.grad(y.square().sum(), parameters) for y in (layer(x), expected))
    assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    assert_close(merge(nn.Sequential(layer))(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_column_adapters_are_ours_to_load_and_peft_refuses_them(tmp_path):
    base, x = mlp(), torch.randn(3, 12)
    model = adapted(base, ["0", "2"], 2, magnitude_axis="column")
    save_adapter(model, tmp_path)
    assert_close(load_adapter(base, tmp_path)(x), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises((ValueError, KeyError, TypeError)):
        PeftModel.from_pretrained(mlp(), tmp_path)


SINGULAR_VALUES = {  # of raw numbers; where they start
    "bilora": (lambda raw: 1 + raw, 1.0),
    "bilora_softmax": (lambda raw: 4 * raw.exp() / raw.exp().sum(), 1.0),
    "bilora_binary": (lambda raw: 1 / (1 + (-raw / 0.1).exp()), 0.5),
}


@pytest.mark.parametrize("method", SINGULAR_VALUES)
def test_bilora_puts_singular_values_between_the_factors(tmp_path, method):
    """Against the built matrix; PEFT loads it as LoRA, λ folded in, with equal logits."""
    base, ids, tolerance = tiny_llama(), torch.randint(0, 97, (2, 9)), dict(rtol=1e-4, atol=1e-4)
    model, (values, start) = copy.deepcopy(base).requires_grad_(False), SINGULAR_VALUES[method]
    replace_linear_with_bidora(model, 4, target_modules=["q_proj", "up_proj"], method=method)
    assert_close(model(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    layers = bidora.adapter_layers(model).values()
    for layer in layers:
        assert_close(values(layer.lora_lambda), torch.full((4,), start))
        trained(layer)
        nn.init.normal_(layer.lora_lambda, std=0.3)
    layer, x = next(iter(layers)), torch.randn(5, 32)
    lambdas = torch.diag(values(layer.lora_lambda))
    W = layer.weight + layer.scaling * layer.lora_B @ lambdas @ layer.lora_A
    assert_close(layer(x), x @ W.T, rtol=1e-4, atol=1e-5)
    assert {p.shape for p in bidora.upper_parameters(model)} == {(4,)}
    assert len(bidora.lower_parameters(model)) == 2 * len(layers)

    expected = model(ids).logits
    save_adapter(model, tmp_path)
    assert_close(PeftModel.from_pretrained(base, tmp_path)(ids).logits, expected, **tolerance)
    with pytest.raises(ValueError, match="λ"):
        load_adapter(model, tmp_path)
    assert_close(merge(model)(ids).logits, expected, **tolerance)


def distance(W, axis):
    """‖C - I‖, C the cosines between the rows, or columns, of W."""
    D = F.normalize(W if axis == "row" else W.T)
    return (D @ D.T - torch.eye(len(D))).norm()


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_the_gram_regulariser_is_the_one_of_the_built_directions(axis, quantize):
    """It and its gradient, against the matrix built in float64."""
    base = nn.Linear(64, 20, bias=False)
    if quantize:
        packed = quantized.pack(torch.randn(20, 64), quantize)
        base = quantized.QuantizedLinear(64, 20, False, packed)
    layer = trained(BiDoRALinear(64, 20, 3, bias=False, magnitude_axis=axis, linear=base))
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    W = quantized.dequantize(layer.weight, torch.float32).double() + layer.scaling * B @ A
    truth = distance(W, axis)
    assert_close(regulariser([layer]).double(), truth, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(regulariser([layer]), [layer.lora_A, layer.lora_B])
    for g, expected in zip(ours, torch.autograd.grad(truth, [A, B])):
        assert_close(g.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("axis", ["row", "column"])
def test_the_gram_regulariser_follows_a_weight_that_trains(axis):
    """Two backward passes through W0, with the gradient of the built matrix in float64: 1e-9."""
    layer = trained(BiDoRALinear(9, 7, 2, magnitude_axis=axis)).double()
    for _ in range(2):
        layer.weight.requires_grad_(True)
        W = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
        truth = torch.autograd.grad(distance(W, axis), layer.weight)[0]
        [found] = torch.autograd.grad(regulariser([layer]), layer.weight)
        assert_close(found, truth, rtol=1e-9, atol=1e-9)
        layer.weight.data = layer.weight.data + 0.1


def test_biloras_regulariser_makes_its_factors_orthonormal():
    layer = trained(BiDoRALinear(9, 14, 3, method="bilora"))
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        regulariser([layer]).backward()
        optimizer.step()
    assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(3), rtol=0, atol=1e-3)
    assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(3), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name, value", [("method", "adalora"), ("magnitude_axis", "diagonal"), ("norm_grad", "none")]
)
def test_an_unknown_choice_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"unknown {name} '{value}'"):
        BiDoRALinear(4, 4, 2, **{name: value})


def test_each_method_trains_the_right_parameters_at_each_level():
    def names(parameters):
        return {name for name, p in model.named_parameters() if any(p is q for q in parameters)}

    direction, magnitude = {"0.lora_A", "0.lora_B"}, {"0.lora_magnitude_vector"}
    for method, upper in (("dora", set()), ("bidora", magnitude)):
        model = mlp().requires_grad_(False)
        replace_linear_with_bidora(model, 2, target_modules=["0"], method=method)
        assert names(bidora.upper_parameters(model)) == upper
        assert names(bidora.lower_parameters(model)) == (direction | magnitude) - upper
        bidora.start_retrain(model)
        assert names(bidora.lower_parameters(model)) == direction
        assert not bidora.upper_parameters(model)
    assert len(bidora.lower_parameters(mlp())) == 4  # no adapters: full fine-tuning


@pytest.mark.parametrize(
    "rank, targets, message, options",
    [
        (2, ["0", "no_such"], "no_such.*there are: 0, 2", {}),
        (6, ["0", "2"], "2: rank 6 does not fit", {}),
        (0, ["2"], "rank 0 does not fit", {}),
        (2, ["0"], "0: rank 2.5 does not fit", dict(rank_pattern={"0": 2.5})),
        (2, ["0"], "'2' has no effect: no adapted layer", dict(rank_pattern={"2": 1})),
        (2, ["0"], "'0' has no effect", dict(alpha_pattern={".*": 1, "0": 2})),
    ],
)
def test_what_cannot_be_adapted_is_refused(rank, targets, message, options):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        replace_linear_with_bidora(model, rank, target_modules=targets, **options)
    assert not bidora.adapter_layers(model)  # not half adapted


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "BertForSequenceClassification", "GPT2LMHeadModel", None]
)
@pytest.mark.parametrize("targets", ["all-linear", ".*(q_proj|query|c_attn)", "query"])
def test_a_string_of_targets_selects_what_it_selects_in_peft(name, targets):
    base, task = tiny(name) if name else mlp(), "SEQ_CLS" if "Bert" in str(name) else None
    try:
        modules = pefts(base, r=2, target_modules=targets, task_type=task).named_modules()
    except ValueError:  # it finds none
        with pytest.raises(ValueError, match="target pattern '.*' matches no linear layer"):
            bidora.linear_layers(base, targets)
        return
    theirs = {name.removeprefix(PREFIX) for name, m in modules if hasattr(m, "lora_A")}
    for given in (targets, (targets,)):  # the second as settings have it
        assert bidora.linear_layers(base, given).keys() == theirs


@pytest.mark.parametrize("method", ALL)
def test_torch_saves_and_loads_an_adapted_model(method, tmp_path):
    model, x = adapted(mlp(), ["0", "2"], 2, method=method), torch.randn(3, 12)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))


def test_what_trains_beside_the_adapters_is_counted_unless_the_model_was_frozen(capsys):
    replace_linear_with_bidora(mlp(), 2, target_modules=["0"])
    assert "105 other parameters train, and are saved, beside" in capsys.readouterr().err
    replace_linear_with_bidora(mlp(), 2, target_modules=["0", "2"])  # there are no others
    model = mlp().requires_grad_(False)
    model[2].requires_grad_(True)  # on purpose, as a new head
    replace_linear_with_bidora(model, 2, target_modules=["0"])
    assert capsys.readouterr().err == ""


def test_a_loaded_adapter_is_trained_further_by_the_method_that_is_asked_for(tmp_path):
    base, x = mlp(), torch.randn(3, 12)
    model = adapted(base, ["0", "2"], 2)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="use_dora=True does not fit method=lora"):
        load_adapter(copy.deepcopy(base), tmp_path, method="lora")
    for method, uppers in (("", 0), ("bidora", 2)):
        loaded = load_adapter(copy.deepcopy(base), tmp_path, method=method)
        assert torch.equal(loaded(x), model(x))
        assert len(bidora.upper_parameters(loaded)) == uppers


def test_patterns_are_peft_s_in_the_order_that_is_given_and_survive_saving(tmp_path):
    """The first match counts. PEFT's own file would sort them, which gives other ranks here."""
    base, ids, targets = tiny_llama(), torch.randint(0, 97, (2, 9)), ["q_proj", "down_proj"]
    patterns = dict(rank_pattern={"q_proj": 2, r".*layers\.1\..*": 6})
    patterns |= dict(alpha_pattern={"down_proj": 5, ".*1.*": 3})
    peer = pefts(base, target_modules=targets, **patterns).base_model.model
    ours = adapted(base, targets, 4, lora_alpha=8, method="lora", init="orthogonal", **patterns)
    sizes = set()
    for name, layer in bidora.adapter_layers(ours).items():
        theirs = peer.get_submodule(name)
        assert (layer.rank, layer.scaling) == (theirs.r["default"], theirs.scaling["default"])
        assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(layer.rank))  # orthogonal
        sizes.add((layer.rank, layer.scaling))
    assert sizes == {(2, 4), (2, 1.5), (4, 1.25), (6, 5 / 6)}
    save_adapter(ours, tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert_close(again(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("times", [1, 16])
def test_steps_are_torch_s_adamw_s_with_lora_plus_s_rate_for_b(times):
    """Also where autograd gives B's gradient with its numbers in another order in memory."""

    def loss(model, x):
        return model(x).square().mean() + model[0].lora_B.T.exp().sum()

    ours, x = adapted(mlp(), ["0", "2"], 2, method="dora"), torch.randn(6, 12)
    other = copy.deepcopy(ours)
    optimizer = create_bilevel_optimizer(ours, 1e-2, lora_plus=times, grad_clip=1e9)
    named = {n: p for n, p in other.named_parameters() if p.requires_grad}
    Bs, rest = ([p for n, p in named.items() if ("lora_B" in n) == b] for b in (True, False))
    groups = [{"params": rest}, {"params": Bs, "lr": times * 1e-2}]
    peer = torch.optim.AdamW(groups, 1e-2, weight_decay=0.01)
    for _ in range(2):
        optimizer.lower_step(loss, x)
        peer.zero_grad()
        loss(other, x).backward()
        peer.step()
    for p, q in zip(ours.parameters(), other.parameters()):
        assert_close(p, q)
    with pytest.raises(ValueError, match="lora_plus"):
        create_bilevel_optimizer(adapted(mlp(), ["0"], 2), lora_plus=16)


def test_a_run_takes_patterns_and_lora_plus_and_refuses_what_is_none(tmp_path, refuses):
    run = ["--config=tiny.py", "--search_steps=1", "--retrain_steps=1", f"--out_dir={tmp_path}/run"]
    run += ["--eval_size=4", "--eval_before=False"]
    dora = ["--method=dora", "--lora_plus=4", '--rank_pattern={"layers.1.mlp.down_proj": 5}']
    assert train.main([*run, *dora]) == 0
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert [len(t) for n, t in sorted(tensors.items()) if "down_proj.lora_A" in n] == [8, 5]
    assert sample.load(str(tmp_path / "run"))[2]["lora_plus"] == 4
    for wrong, said in [
        (["--method=bidora", "--lora_plus=4"], "lora_plus=4 is for lora and dora, not for bidora"),
        (['--rank_pattern={"q_proj": -1}'], "is not a JSON object of positive numbers"),
        (["--alpha_pattern=q_proj"], "is not a JSON object of positive numbers"),
    ]:
        refuses(train, [*run, "--overwrite", *wrong], said)


def test_alpha_patterns_whose_order_peft_lost_are_named(tmp_path, capsys):
    """It sorts them when it saves; the file is read as PEFT reads it."""
    base, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    patterns = {"q_proj": 30, "layers.1.self_attn.q_proj": 500}
    peer = pefts(base, target_modules=["q_proj"], alpha_pattern=patterns)
    peer.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert (again(ids).logits - peer(ids).logits).abs().max() > 1e-3
    assert_close(load_adapter(base, tmp_path)(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-4)
    said = "model.layers.1.self_attn.q_proj the alphas 500, which is taken, and 30 (layers: 1)"
    assert said in capsys.readouterr().err


def test_layers_that_are_adapted_tied_or_read_by_their_owner_are_refused():
    with pytest.raises(ValueError, match="already"):
        replace_linear_with_bidora(adapted(mlp(), ["0"]), 2, target_modules=["0"])
    tied = tiny_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(ValueError, match="shares its weight"):
        replace_linear_with_bidora(tied, 2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="out_proj: nn.MultiheadAttention reads"):
        replace_linear_with_bidora(nn.MultiheadAttention(8, 2), 2, target_modules=["out_proj"])
    for wrap in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        with pytest.raises(ValueError, match="1 computes its weight, as by weight_norm"):
            model = nn.Sequential(nn.Linear(3, 3), wrap(nn.Linear(3, 3)))
            replace_linear_with_bidora(model, 2, target_modules="all-linear")


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: nn.Sequential(nn.Linear(13, 20)), r"0\.lora_A.*\(2, 12\).*\(2, 13\)"),
        (lambda: nn.Sequential(nn.ReLU()), "no linear layer 0"),
        (lambda: adapted(mlp(), ["0"], 2, lora_alpha=8), "0 has alpha 16 in the file, 8 in the"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(model, message, tmp_path):
    save_adapter(adapted(mlp(), ["0"], 2), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_adapter(model(), tmp_path)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"modules_to_save": ["2"]}, "modules_to_save names 2, of which .* holds nothing"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": False}, "use_dora=False, which the tensors contradict"),
        ({"use_dora": None}, "use_dora=None, which the tensors contradict"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"lora_alpha": None}, "lora_alpha.* is missing or not a number"),
        ({"alpha_pattern": {"(": 3}}, "invalid regular expression"),
        ({"alpha_pattern": {"(" * 450 + ")" * 450: 4}}, "invalid regular expression"),
        ({"alpha_pattern": {"(" * 900 + ")" * 900: 4}}, "a pattern exceeds 1000 characters"),
        ({"alpha_pattern": {"a" * 10**6: 4}}, "a pattern exceeds 1000 characters"),
        ({"alpha_pattern": {"0": float("nan")}}, "not a number below 1e9"),
        ({"alpha_pattern": ["0"]}, "alpha_pattern is not a JSON object"),
        ({"lora_alpha": 10**400}, "not a number below 1e9"),
        ({"modules_to_save": "2"}, "modules_to_save is not a list of names"),
    ],
)
def test_an_adapter_that_these_layers_do_not_compute_is_refused_by_name(change, named, tmp_path):
    save_adapter(adapted(mlp(), ["0"], 2), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=named) as caught:
        load_adapter(mlp(), tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t[f"{PREFIX}0.lora_B.weight"].fill_(float("nan")), r"0\.lora_B.* not a number"),
        (lambda t: t[f"{PREFIX}2.bias"].fill_(float("inf")), r"2\.bias holds .* infinite"),
        (lambda t: [t.pop(n) for n in [*t] if ".1." in n], "lacks 1 of the layers .* first 1.0"),
        (lambda t: t.clear(), "adapter_model.safetensors is empty"),
        (lambda t: t.update({f"{PREFIX}3.bias": torch.ones(7)}), "another 3.bias than the base"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused_by_the_layer_s_name(change, said, tmp_path):
    def base():
        layers = nn.Linear(12, 20), nn.Sequential(nn.Linear(20, 5)), nn.Linear(5, 5)
        return nn.Sequential(*layers, nn.LayerNorm(7))

    model = adapted(base(), ["0", "1.0"], 2)
    model[2].requires_grad_(True)
    save_adapter(model, tmp_path)
    load_adapter(base(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=said):
        load_adapter(base(), tmp_path)


def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path):
    save_adapter(adapted(mlp(), ["0"], 2), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(mlp(), tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        load_adapter(mlp(), tmp_path)


@pytest.fixture
def two():
    """An adapted model, another one to be given its state, an input, and the right output."""
    model, other = adapted(mlp(), ["0", "2"], 2), adapted(mlp(), ["0", "2"], 2)
    x = torch.randn(6, 12)
    return model, other, x, model(x)


@pytest.mark.parametrize("wrap", [nn.Sequential, compiled])
def test_the_norm_follows_a_weight_that_is_loaded_or_written(two, wrap):
    model, other, x, expected = two
    wrapped = wrap(other)
    wrapped(x)
    other.load_state_dict(model.state_dict())
    assert_close(wrapped(x), expected)
    with torch.no_grad():
        for layer in bidora.adapter_layers(model).values():
            layer.weight.normal_()
    assert_close(model(x), merge(copy.deepcopy(model))(x))


def test_the_regulariser_follows_a_weight_that_is_loaded(two):
    model, other, _, _ = two
    regulariser(bidora.adapter_layers(other).values())  # keeps products of the old weights
    other.load_state_dict(model.state_dict())
    ours, theirs = (regulariser(bidora.adapter_layers(m).values()) for m in (model, other))
    assert_close(ours, theirs)


def test_a_model_adapted_on_the_meta_device_is_right_once_loaded(two):
    model, _, x, expected = two
    with torch.device("meta"):
        empty = replace_linear_with_bidora(mlp(), 2, target_modules=["0", "2"])
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert_close(empty(x), expected)


def test_adapters_are_fp32_over_a_bf16_base_and_stay_so_when_the_model_is_cast():
    """The starting ratio is then 1 to the rounding of one weight in bf16, not of the norm."""
    layer = BiDoRALinear(6, 4, rank=2, linear=nn.Linear(6, 4).bfloat16())
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    model = replace_linear_with_bidora(mlp(), 2, target_modules=["0", "2"])
    model.to(torch.bfloat16)
    for layer in bidora.adapter_layers(model).values():
        assert layer.weight.dtype == torch.bfloat16
        adapter = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.weight_squares
        assert {tensor.dtype for tensor in adapter} == {torch.float32}
        # Rounding errors of 2^-9 at most in each of 12 or 20 numbers.
        assert_close(layer.lora_magnitude_vector, layer.direction_norm(), rtol=2**-9, atol=0)
        assert_close(layer.direction_norm(), layer.weight.float().norm(dim=1))
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


def test_a_base_weight_that_is_trained_gets_its_gradient_through_the_norm():
    layer = trained(BiDoRALinear(10, 7, rank=3, linear=nn.Linear(10, 7).double()))
    x = torch.randn(5, 10, dtype=torch.float64)
    layer.weight.requires_grad_(True)
    expected = torch.autograd.grad(reference(layer, x).sin().sum(), layer.weight)
    assert_close(torch.autograd.grad(layer(x).sin().sum(), layer.weight), expected)


@pytest.mark.parametrize("size", [1, 10, 100])
def test_a_large_bias_does_not_spoil_the_gradient_of_m_in_bf16(size):
    """Within 1 % of float64, on average over m; y's own rounding in bf16 leaves 0.4 %."""
    linear = nn.Linear(64, 32).bfloat16()
    nn.init.normal_(linear.bias, std=size)
    layer = trained(BiDoRALinear(64, 32, rank=4, linear=linear))
    x, g = torch.randn(128, 64).bfloat16(), torch.randn(128, 32).bfloat16()
    m = layer.lora_magnitude_vector
    [exact] = torch.autograd.grad((reference(layer, x) * g.double()).sum(), m)
    [ours] = torch.autograd.grad((layer(x) * g).float().sum(), m)
    assert (ours - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("axis", bidora.CHOICES["magnitude_axis"])
@pytest.mark.parametrize("method", ALL)
def test_autocast_computes_in_bf16_with_norms_and_gradients_in_fp32(method, axis):
    """Within 2 % of fp32: three roundings of 2^-8 each."""
    layer = BiDoRALinear(64, 32, method=method, magnitude_axis=axis)
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(16, 64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    expected = layer(x)
    gradients = torch.autograd.grad(expected.sum(), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.02 * expected.norm()
    for got, g in zip(torch.autograd.grad(y.float().sum(), parameters), gradients):
        assert got.dtype == torch.float32 and (got - g).norm() < 0.02 * g.norm()


class Named(nn.Module):
    """Modules whose names end alike: two linear ones, and two of other kinds."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Sequential(nn.Linear(6, 6), nn.Tanh())})
        self.outer = nn.ModuleDict({"inner": nn.ModuleDict({"proj": nn.Linear(6, 6)})})

    def forward(self, x):
        return self.outer["inner"]["proj"](self.inner["proj"](self.proj(x)))


@pytest.mark.parametrize("targets", [["proj"], ["inner.proj"], ["inner.proj.0", "proj"]])
def test_peft_adapts_the_same_layers_whatever_other_modules_are_called(targets, tmp_path):
    base = Named()
    model, x = adapted(base, targets, 2), torch.randn(5, 6)
    save_adapter(model, tmp_path)
    assert_close(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


@pytest.mark.parametrize(
    "name, target, task",
    [
        ("LlamaForCausalLM", "q_proj", "CAUSAL_LM"),
        ("BertForSequenceClassification", "query", "SEQ_CLS"),
        ("BertForTokenClassification", "query", "TOKEN_CLS"),
        ("BertForQuestionAnswering", "query", "QUESTION_ANS"),
        ("BertForMaskedLM", "query", None),
        ("BertModel", "query", None),
        ("T5ForConditionalGeneration", "q", "SEQ_2_SEQ_LM"),
    ],
)
def test_the_task_type_is_the_models(name, target, task, tmp_path):
    save_adapter(adapted(tiny(name), [target], 2), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task


def distilbert():
    return tiny("DistilBertForSequenceClassification")


def classifiers():
    inner = nn.Sequential(OrderedDict(classifier=nn.Linear(16, 16), f=nn.Tanh()))
    parts = dict(embed=nn.Embedding(6, 16), pre_classifier=nn.Linear(16, 16), inner=inner)
    return nn.Sequential(OrderedDict(**parts, classifier=nn.Linear(16, 2)))


@pytest.mark.parametrize(
    "build, target",
    [(distilbert, x) for x in ("pre_classifier", "q_lin")]
    + [(classifiers, x) for x in ("pre_classifier", "inner.classifier")],
)
def test_a_trained_module_whose_name_ends_like_an_adapted_one_s(build, target, tmp_path):
    """It alone is saved whole, and PEFT and load_adapter give the model's outputs."""
    base, ids = build(), torch.arange(6)[None]
    model = adapted(base, [target], 2)
    nn.init.normal_(model.classifier.requires_grad_(True).weight)
    save_adapter(model, tmp_path)
    peer = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for found in (peer(ids), load_adapter(base, tmp_path)(ids)):
        assert_close(*(getattr(y, "logits", y) for y in (found, model(ids))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_base_weights_that_peft_saved_beside_an_adapter_are_no_reason_to_refuse(tied, tmp_path):
    base, ids = tiny_llama(), torch.randint(0, 97, (2, 9))
    if tied:
        base.lm_head.weight = base.model.embed_tokens.weight
    peer = pefts(base, target_modules=["q_proj"])
    peer.save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"{PREFIX}lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert_close(load_adapter(base, tmp_path)(ids).logits, peer(ids).logits)


def test_running_statistics_which_training_changes_are_saved(tmp_path):
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    model = adapted(base, ["0", "3"], 2).train()
    for _ in range(5):
        model(3 * torch.randn(32, 6) + 1)
    save_adapter(model.eval(), tmp_path)
    x, peer = torch.randn(4, 6), PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for found in (peer, load_adapter(base, tmp_path)):
        assert_close(found.eval()(x), model(x), rtol=1e-4, atol=1e-5)


def test_trained_parameters_that_no_file_of_pefts_can_hold_are_named_after_saving(tmp_path):
    model = adapted(mlp(), ["0"], 2)
    model[0].bias.requires_grad_(True)
    model[2].bias.requires_grad_(True)
    with pytest.raises(ValueError, match="saved without 0.bias, trained parameters"):
        save_adapter(model, tmp_path)
    assert_close(load_adapter(mlp(), tmp_path)[2].bias, model[2].bias)
