"""Packed bases against their own dequantised weights: derivatives, methods, merging."""

import copy
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn as nn
import transformers
from test_kernels import Watched
from test_model import checkpoint

import bidora
from bidora import adapter_layers, load_adapter, merge, replace_linear_with_bidora, save_adapter
from bilevel import HYPERGRADIENTS, create_bilevel_optimizer
from model import Transformer
from support.weights import quantized
from support.weights.quantized import KINDS, Products, dequantize, kind_of, pack


def unpacked(packed, shape):
    """Codes' values times scales: dequantize_4bit is wrong on CPUs where a row ends between two."""
    if packed.dtype == torch.int8:
        return packed.data.float() * (packed.SCB[:, None] / 127)
    state, bytes_ = packed.quant_state, packed.data.view(-1).int()
    values = state.code[torch.stack((bytes_ >> 4, bytes_ & 15), dim=1).view(-1)]
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    numbers = shape[0] * shape[1]
    return (values[:numbers] * scales.repeat_interleave(64)[:numbers]).view(shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 64), (2100, 48), (33, 40), (1500, 7), (1025, 128)])
def test_blocks_are_codes_times_scales(kind, shape):
    """Also where a row ends between two scales or inside a byte. 1e-6 is one rounding."""
    weight = torch.randn(shape)
    packed = pack(weight, kind)
    assert kind_of(packed) == kind and quantized.float_dtype(packed) == torch.float32
    expected = unpacked(packed, shape)
    torch.testing.assert_close(dequantize(packed, torch.float32), expected, rtol=1e-6, atol=1e-6)
    error = (expected - weight).norm() / weight.norm()
    assert 0.001 < error < {"nf4": 0.12, "fp4": 0.16, "int8": 0.012}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_both_derivatives_are_those_of_the_dequantised_weight(kind):
    """Of two inputs in one pass over the weight, and of one that needs no gradient."""
    packed = pack(torch.randn(1100, 24), kind)
    x, a, b = (torch.randn(n, 24, requires_grad=n > 2) for n in (6, 3, 2))
    weight = dequantize(packed, torch.float32)

    def derivatives(*ys):
        g = torch.autograd.grad(sum((y**3).sum() for y in ys), (x, a), create_graph=True)
        return *ys, *g, *torch.autograd.grad(g[0].square().sum() + (g[1] ** 3).sum(), (x, a))

    plain = derivatives(*(nn.functional.linear(each, weight) for each in (x, a, b)))
    for ours, expected in zip(derivatives(*Products.apply(packed, False, x, a, b)), plain):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * scale)


def reads(weight, function):
    """(what a function returns, how often it turns a packed weight's numbers into floats)."""
    place, count = weight.untyped_storage().data_ptr(), 0

    def note(operation, arguments, result):
        nonlocal count
        given = arguments[0] if arguments else None
        if isinstance(given, torch.Tensor) and given.untyped_storage().data_ptr() == place:
            count += result.is_floating_point()

    with Watched(note):
        return function(), count


@pytest.mark.parametrize("kind", KINDS)
def test_a_dora_step_dequantises_each_weight_once_in_each_direction(kind):
    """For the product and the norm together; gradients within 1e-6 of the formula in float64."""
    packed = pack(torch.randn(48, 64), kind)
    base = quantized.QuantizedLinear(64, 48, False, packed)
    layer = bidora.BiDoRALinear(64, 48, 4, bias=False, method="dora", linear=base)
    A, B, m = parameters = [p for p in layer.parameters() if p.requires_grad]
    nn.init.normal_(B, std=0.1)
    x, target = torch.randn(30, 64, requires_grad=True), torch.randn(30, 48)
    y, forward = reads(packed, lambda: layer(x))
    loss = (y * target).sum()
    ours, backward = reads(packed, lambda: torch.autograd.grad(loss, [x, *parameters]))
    assert (forward, backward) == (1, 1)

    exact = [p.detach().double().requires_grad_() for p in (x, A, B, m)]
    x, A, B, m = exact
    W = dequantize(packed, torch.float32).double() + layer.scaling * B @ A
    truth = x @ (m[:, None] * W / W.norm(dim=1, keepdim=True)).T
    for g, expected in zip(ours, torch.autograd.grad((truth * target).sum(), exact)):
        assert (g - expected).norm() <= 1e-6 * expected.norm()


def models(folder, kind, method="bidora", **options):
    """The same adapted model on a packed base, and on that base's dequantised weights."""
    checkpoint(folder, "Qwen2", tie_word_embeddings=True)
    packed = Transformer.from_pretrained(folder, quantize=kind)
    plain = merge(copy.deepcopy(packed))
    for model in (packed, plain):
        torch.manual_seed(1)
        model.requires_grad_(False)
        options |= dict(target_modules=["q_proj", "v_proj", "down_proj"], method=method)
        replace_linear_with_bidora(model, 4, **options)
        for layer in adapter_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.05)
    return packed, plain


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_blocks_linear_layers_are_packed(tmp_path, kind):
    model, plain = models(tmp_path, kind)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, m in layers.items() if not kind_of(m.weight)} == {"lm_head"}
    assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == torch.float32
    assert quantized.nbytes(model) < 0.62 * quantized.nbytes(plain)
    with pytest.raises(ValueError, match="merge"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "dora", "bidora"])
def test_a_packed_base_is_equal_to_its_dequantised_weights(tmp_path, kind, method):
    """Gradients to 1e-4: sums in another order. m starts at the dequantised weights' norm."""
    packed, plain = models(tmp_path, kind, method)
    for a, b in zip(adapter_layers(packed).values(), adapter_layers(plain).values()):
        if method != "lora":
            m, norm = a.lora_magnitude_vector, b.weight.norm(dim=1)
            torch.testing.assert_close(m, norm, rtol=1e-5, atol=1e-6)

    ids = torch.randint(0, 131, (3, 12))
    losses, gradients = [], []
    for model in (packed, plain):
        losses.append(model(ids, ids))
        parameters = bidora.lower_parameters(model) + bidora.upper_parameters(model)
        gradients.append(torch.autograd.grad(losses[-1], parameters))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(*gradients):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_every_hypergradient_on_a_packed_base(tmp_path, kind, name):
    packed, plain = models(tmp_path, kind)
    train, val = (torch.randint(0, 131, (3, 12)) for _ in range(2))
    rate = dict(lr=0.1)
    options = {"unrolled": rate, "finite_difference": rate, "neumann": dict(alpha=0.05)}

    def hypergradient(model):
        lower, upper = bidora.lower_parameters(model), bidora.upper_parameters(model)
        losses = lambda: model(train, train), lambda: model(val, val)
        return HYPERGRADIENTS[name].function(*losses, lower, upper, **options.get(name, {}))

    ours, expected = hypergradient(packed), hypergradient(plain)
    for a, b in zip(ours, expected):
        assert (a - b).abs().max() <= 1e-3 * max(e.abs().max() for e in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_dequantises_and_says_so_and_transformers_loads_it(tmp_path, kind, capsys):
    model, _ = models(tmp_path / "base", kind)
    ids = torch.randint(0, 131, (2, 9))
    before = model(ids)
    merge(model).save_pretrained(tmp_path / "merged")
    assert f"the {kind} base was dequantised to float32" in capsys.readouterr().out
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for after in (model(ids), peer(ids).logits):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("called", [False, True])
def test_layers_that_bitsandbytes_made_are_adapted_too(tmp_path, kind, called):
    """called: an int8 layer moves its scales to another place at its first call."""

    def make(i, o):
        if kind == "nf4":
            return bnb.nn.Linear4bit(i, o, quant_type="nf4", compute_dtype=torch.float32)
        return bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)

    def dequantised(layer):
        if kind == "nf4":
            return dequantize(layer.weight, torch.float32)
        scales = layer.state.SCB if called else layer.weight.SCB
        return layer.weight.data.float() * scales[:, None] / 127

    model = nn.Sequential(make(64, 96), nn.ReLU(), make(96, 64)).to("cpu")
    x = torch.randn(5, 64)
    if called:
        model(x)

    # The adapted model starts as the one with the dequantised weights.
    weights = [dequantised(layer) for layer in (model[0], model[2])]
    replace_linear_with_bidora(model.requires_grad_(False), 4, target_modules=["0", "2"])
    hidden = torch.relu(nn.functional.linear(x, weights[0], model[0].bias))
    expected = nn.functional.linear(hidden, weights[1], model[2].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)

    # It learns.
    optimizer = create_bilevel_optimizer(model, 1e-2, 1e-2, hypergradient="unrolled")

    def loss_fn(model, batch):
        return (model(batch) - 1).square().mean()

    losses = [optimizer.bilevel_step(loss_fn, x, x)[0] for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]

    # Its adapter is refused by a model with other layers.
    save_adapter(model, tmp_path)
    others = nn.Sequential(*(nn.Linear(*weight.T.shape) for weight in weights))
    replace_linear_with_bidora(others.requires_grad_(False), 4, target_modules=["0", "1"])
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(others, tmp_path)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_layout_that_some_cpus_make_in_evaluation_is_undone(kind, nested):
    """But for the scales, which it rounds to bf16."""
    options = dict(requires_grad=False, quant_type=kind, compress_statistics=nested)
    packed = bnb.nn.Params4bit(torch.randn(96, 192), **options).to("cpu")
    before = dequantize(packed, torch.float32)
    layer = quantized.QuantizedLinear(192, 96, False, packed)
    convert = bnb.functional._convert_weight_packed_for_cpu  # what Linear4bit calls there
    packed.data, packed.quant_state = convert(packed.data, packed.quant_state)
    quantized.complete(layer)
    torch.testing.assert_close(dequantize(packed, torch.float32), before, rtol=2**-8, atol=0)


def test_an_unknown_kind_is_refused(tmp_path):
    checkpoint(tmp_path)
    with pytest.raises(ValueError, match="'int3'.*nf4, fp4, int8"):
        Transformer.from_pretrained(tmp_path, quantize="int3")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_never_holds_a_dequantised_copy(tmp_path, kind):
    """Beside the packed 67 M weights, 268 MB in fp32, second derivatives take less than 150 MB."""
    code = f"""
import re, sys
sys.path.insert(0, {str(Path(bidora.__file__).parent)!r})
import torch
from bidora import BiDoRALinear
from support.weights.quantized import QuantizedLinear, pack
def status(key):
    return int(re.search(key + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1e3
pack(torch.randn(64, 64), {kind!r})
packed = pack(torch.randn(8192, 8192), {kind!r})
open("/proc/self/clear_refs", "w").write("5")  # reset the peak
start = status("VmRSS")
layer = BiDoRALinear(8192, 8192, 4, bias=False, linear=QuantizedLinear(8192, 8192, False, packed))
x = torch.randn(4, 8192)
loss = layer(x).square().sum()
g = torch.autograd.grad(loss, [layer.lora_A, layer.lora_B], create_graph=True)
torch.autograd.grad(sum(p.square().sum() for p in g), layer.lora_magnitude_vector)
print(status("VmHWM") - start)
"""
    command = [sys.executable, "-c", code]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 150, grown


def test_int8_is_rounded_once_to_bf16():
    packed = pack(torch.randn(300, 64).bfloat16(), "int8")
    exact = packed.data.float() * (packed.SCB[:, None] / 127)
    assert torch.equal(dequantize(packed, torch.bfloat16), exact.bfloat16())


LOADED = {"nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
LOADED["int8"] = dict(load_in_8bit=True)


@pytest.fixture
def base(tmp_path):
    """The folder of a model with a multiple of 32 outputs a layer, which bitsandbytes requires."""
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, kind):
    """A folder's model, quantised by transformers."""
    options = transformers.BitsAndBytesConfig(**LOADED[kind])
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=options)


@pytest.mark.parametrize("called", ["never", "with gradients", "in evaluation"])
@pytest.mark.parametrize("kind", LOADED)
def test_models_that_transformers_quantised_are_adapted_and_merged(kind, called, base, tmp_path):
    """
    The adapters start at what bitsandbytes computes. After merging, all is ordinary and bf16, and
    transformers saves and loads it. Within 2 % of the adapted model: merged weights are rounded to
    bf16. called: before, as above; in evaluation, some CPUs make 4-bit weights another layout.
    """
    model, ids = load(base, kind), torch.arange(12).view(2, 6)
    with torch.no_grad():
        start = load(base, kind)(ids).logits.float()
    if called != "never":
        with torch.set_grad_enabled(called == "with gradients"):
            model(ids)
    every = list(bidora.linear_layers(model.model, bidora.ALL_LINEAR))
    replace_linear_with_bidora(model.requires_grad_(False), 4, target_modules=every)
    assert (model(ids).logits.float() - start).norm() < 0.02 * start.norm()
    for layer in bidora.adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    with torch.no_grad():
        expected = model(ids).logits.float()

    merged = merge(model)
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    merged.save_pretrained(tmp_path / "merged")
    for each in (merged, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        with torch.no_grad():
            error = (each(ids).logits.float() - expected).norm() / expected.norm()
        assert error < 0.02


@pytest.mark.parametrize("kind", LOADED)
def test_layers_without_an_adapter_are_dequantised_too(kind, base):
    model, ids = load(base, kind), torch.arange(6)[None]
    replace_linear_with_bidora(model.requires_grad_(False), 2, target_modules=["q_proj"])
    with torch.no_grad():
        expected = model(ids).logits.float()  # in evaluation, as above
    assert {p.dtype for p in merge(model).parameters()} == {torch.bfloat16}
    assert (model(ids).logits.float() - expected).norm() < 0.02 * expected.norm()
    assert not hasattr(model.config, "quantization_config")
