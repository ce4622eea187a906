"""The encoders against transformers' own, on small random checkpoints that transformers made."""

import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_architectures import VARIANTS, Problem
from tokenizers import Tokenizer

import bidora
import support.tasks.encoder
from support.tasks.encoder import Encoder, EncoderConfig
from support.weights.pretrained import find_model

ROOT = Path(__file__).parents[2]
SIZES = dict(
    vocab_size=41,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
)
ESM = dict(pad_token_id=1, mask_token_id=32, position_embedding_type="rotary")


# name: (transformers' family, settings)
CHECKPOINTS = {
    "bert": ("Bert", {}),
    "bert, gelu_new": ("Bert", dict(hidden_act="gelu_new", type_vocab_size=3, layer_norm_eps=1e-3)),
    "bert, relu": ("Bert", dict(hidden_act="relu")),
    "roberta": ("Roberta", dict(pad_token_id=1, type_vocab_size=2)),
    "roberta, other padding": ("Roberta", dict(pad_token_id=3, type_vocab_size=1)),
    "camembert": ("Camembert", {}),
    "xlm-roberta": ("XLMRoberta", {}),
    "esm": ("Esm", ESM | dict(token_dropout=True, emb_layer_norm_before=False)),
    "esm, without token dropout": ("Esm", ESM | dict(token_dropout=False)),
    "esm, norm before": ("Esm", ESM | dict(token_dropout=True, emb_layer_norm_before=True)),
    "esm, other theta": ("Esm", ESM | dict(rope_theta=100.0)),
    "esm, learned positions": (
        "Esm",
        ESM | dict(position_embedding_type="absolute", emb_layer_norm_before=True),
    ),
}
BASIC = ["bert", "roberta", "esm"]


def checkpoint(folder, name, head="Model", save=None, **changes):
    """A random model that transformers makes, and saves if a folder is given."""
    family, settings = CHECKPOINTS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | settings | changes))
    peer = getattr(transformers, family + head)(config).eval()
    # Biases and norms start at 0 and 1, which would hide a mistake.
    for parameter_name, parameter in peer.named_parameters():
        norm = "norm" in parameter_name.lower() and "weight" in parameter_name
        wide = norm or "bias" in parameter_name
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.3 if wide else 0.15)
    if folder:
        peer.save_pretrained(folder, **(save or {}))
    return peer


def batch(peer, seed=0):
    """Rows of 11, 6 and 2 tokens, with mask tokens and, where a model has them, token types."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 41, (3, 11), generator=generator)
    ids[0, 5] = ids[1, 2] = ids[1, 3] = 32
    mask = (torch.arange(11) < torch.tensor([[11], [6], [2]])).long()
    ids[mask == 0] = peer.config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if types := getattr(peer.config, "type_vocab_size", 0):
        inputs["token_type_ids"] = torch.randint(types, ids.shape, generator=generator)
    return inputs


def assert_alike(encoder, peer, inputs, atol=1e-5):
    """Hidden states of about 1 at real tokens, and the pooled ones: fp32 in another order."""
    with torch.no_grad():
        expected = peer(**inputs)
        hidden = encoder(**inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(hidden[real], expected.last_hidden_state[real], rtol=0, atol=atol)
    if encoder.pooler is not None:
        pooled = encoder.pooled(hidden)
        torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hidden_and_pooled_states_equal_transformers(name, tmp_path):
    peer = checkpoint(tmp_path, name)
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.pooler is not None
    inputs = batch(peer)
    assert_alike(encoder, peer, inputs)
    # Without a mask, padding is a token like others.
    assert_alike(encoder, peer, {"input_ids": inputs["input_ids"]})


@pytest.mark.parametrize("name", BASIC)
def test_padding_on_the_left_is_left_out_too(name, tmp_path):
    peer = checkpoint(tmp_path, name)
    inputs = {key: tensor.flip(1) for key, tensor in batch(peer).items()}
    encoder = Encoder.from_pretrained(tmp_path)
    encoder.pooler = None  # transformers' first token is padding
    assert_alike(encoder, peer, inputs)


@pytest.mark.parametrize("name", BASIC)
def test_shards_load(name, tmp_path):
    peer = checkpoint(tmp_path, name, save=dict(max_shard_size="20KB"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_alike(Encoder.from_pretrained(tmp_path), peer, batch(peer))


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("name", BASIC)
def test_a_head_in_the_file_is_left_out(name, head, tmp_path):
    """With the prefix before the encoder's names. A pooler is read where the file has one."""
    peer = checkpoint(tmp_path, name, head)
    encoder, base = Encoder.from_pretrained(tmp_path), peer.base_model
    assert (encoder.pooler is None) == (base.pooler is None)
    assert_alike(encoder, base, batch(peer))
    if encoder.pooler is None:
        with pytest.raises(ValueError, match="no pooler: its file holds no pooler.dense.weight"):
            encoder.pooled(torch.zeros(1, 2, 32))


def rewrite(folder, change):
    """Replace the file's tensors by change(tensors)."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", BASIC)
@pytest.mark.parametrize("old", [True, False])
def test_old_and_new_names_of_norms_load(name, old, tmp_path):
    """LayerNorm.gamma and .beta, as TensorFlow's checkpoints had them, or .weight and .bias."""
    peer = checkpoint(tmp_path, name)
    names = [(".gamma", ".weight"), (".beta", ".bias")]

    def renamed(tensors):
        tensors["embeddings.position_ids"] = torch.arange(64)[None]  # a buffer of old files
        for before, after in [pair[::-1] for pair in names] if old else names:
            for key in [key for key in tensors if "LayerNorm" + before in key]:
                tensors[key.removesuffix(before) + after] = tensors.pop(key)
        return tensors

    rewrite(tmp_path, renamed)
    assert_alike(Encoder.from_pretrained(tmp_path), peer, batch(peer))


@pytest.fixture
def coarse_esm(tmp_path):
    """A folder of an ESM-2 with rotary frequencies of its own, and transformers' model of it."""
    checkpoint(tmp_path, "esm")

    def coarse(tensors):
        for key in list(tensors):
            if "inv_freq" in key:
                tensors[key] = (tensors[key] * 1.01).half().float()
            if "word_embeddings" in key:  # files of ESM-2 hold unused positions
                tensors[key.replace("word", "position")] = torch.ones(64, 32)
        return tensors

    rewrite(tmp_path, coarse)
    return tmp_path, transformers.AutoModel.from_pretrained(tmp_path).eval()


def test_rotary_frequencies_come_from_the_file(coarse_esm):
    """ESM-2 was trained with what its files hold; computed ones may differ in the third digit."""
    folder, peer = coarse_esm
    encoder = Encoder.from_pretrained(folder)
    assert_alike(encoder, peer, batch(peer))
    with torch.no_grad():
        hidden = encoder(**batch(peer))
        encoder.inv_freq = encoder.inv_freq / 1.01
        assert (encoder(**batch(peer)) - hidden).abs().max() > 1e-4  # so the test sees them


def test_what_is_saved_loads_in_transformers_with_its_rotary_frequencies(coarse_esm, tmp_path):
    folder, peer = coarse_esm
    Encoder.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = transformers.AutoModel.from_pretrained(tmp_path / "saved").eval()
    assert_alike(Encoder.from_pretrained(folder), saved, batch(peer))


@pytest.mark.parametrize("name", BASIC)
def test_what_is_saved_loads_in_transformers(name, tmp_path):
    """The merged adapters included, without the head of the file that was read."""
    peer = checkpoint(tmp_path, name, "ForSequenceClassification")
    encoder = adapted(Encoder.from_pretrained(tmp_path))
    bidora.merge(encoder).save_pretrained(tmp_path / "saved")
    saved = transformers.AutoModel.from_pretrained(tmp_path / "saved").eval()
    assert_alike(encoder, saved, batch(peer))
    assert_alike(Encoder.from_pretrained(tmp_path / "saved"), saved, batch(peer))


@pytest.mark.parametrize("name", BASIC)
def test_bfloat16_stays_near_float32(name, tmp_path):
    """Within 5 % of the hidden states' norm: 3 layers of steps of 0.8 %."""
    peer = checkpoint(tmp_path, name)
    with torch.no_grad():
        exact = Encoder.from_pretrained(tmp_path)(**batch(peer))
        coarse = Encoder.from_pretrained(tmp_path, dtype=torch.bfloat16)(**batch(peer))
    assert coarse.dtype == torch.bfloat16
    assert (coarse.float() - exact).norm() < 0.05 * exact.norm()


def test_linear_layers_see_no_padding(tmp_path):
    """19 of the 33 places hold tokens; the result is zero at the others."""
    inputs = batch(checkpoint(tmp_path, "bert"))
    encoder, seen = Encoder.from_pretrained(tmp_path), []
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not encoder.pooler.dense:
            layer.register_forward_hook(lambda _, arguments, y: seen.append(arguments[0].shape[0]))
    hidden = encoder(**inputs)
    assert seen == [19] * 18
    assert not hidden[inputs["attention_mask"] == 0].any()


# --------------------------------------------------------------------------------- adapters


def adapted(encoder):
    """The encoder with BiDoRA adapters that have moved."""
    torch.manual_seed(1)
    bidora.replace_linear_with_bidora(
        encoder.requires_grad_(False), 2, 8, target_modules=["query", "value"]
    )
    for layer in bidora.adapter_layers(encoder).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        m = layer.lora_magnitude_vector.data
        m.mul_(torch.linspace(0.8, 1.2, len(m)))
    return encoder


@pytest.mark.parametrize("name", BASIC)
def test_new_adapters_change_nothing(name, tmp_path):
    """Within 1e-6: a bias is added after the magnitude, in another order than the base's."""
    inputs = batch(checkpoint(tmp_path, name))
    encoder = Encoder.from_pretrained(tmp_path)
    with torch.no_grad():
        before = encoder(**inputs)
        bidora.replace_linear_with_bidora(encoder, 2, target_modules=["query", "value"])
        torch.testing.assert_close(encoder(**inputs), before, rtol=0, atol=1e-6)
    assert len(bidora.adapter_layers(encoder)) == 6


@pytest.mark.parametrize("name", BASIC)
def test_peft_reads_the_adapter_over_transformers_model(name, tmp_path):
    peer = checkpoint(tmp_path, name)
    encoder = adapted(Encoder.from_pretrained(tmp_path))
    bidora.save_adapter(encoder, tmp_path / "adapter")
    peer = PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    inputs = batch(peer)
    assert_alike(encoder, peer, inputs)

    loaded = bidora.load_adapter(Encoder.from_pretrained(tmp_path), tmp_path / "adapter")
    assert_alike(loaded, peer, inputs)


@pytest.mark.parametrize("name", BASIC)
@pytest.mark.filterwarnings("ignore:the terms of the Neumann series grow")
@pytest.mark.parametrize("variant", VARIANTS)
def test_hypergradients_equal_finite_differences(name, variant, tmp_path):
    """Over padded rows."""
    peer = checkpoint(tmp_path, name)
    encoder = Encoder.from_pretrained(tmp_path).requires_grad_(False)
    problem = Problem(encoder, functools.partial(batch, peer), ["query", "value"])
    options, truth = VARIANTS[variant]
    problem.check(problem.hypergradient(variant, options), truth(problem), variant != "first_order")


@pytest.mark.parametrize("name", BASIC)
@pytest.mark.filterwarnings("ignore:the terms of the Neumann series grow")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("change", ["gradient_checkpointing", "attention in parts"])
def test_recomputing_leaves_hypergradients_as_they_are(
    name, variant, change, tmp_path, monkeypatch
):
    """Within 1e-10 of the largest, in float64: the same sums in another order."""
    peer = checkpoint(tmp_path, name)
    encoder = Encoder.from_pretrained(tmp_path).requires_grad_(False)
    problem = Problem(encoder, functools.partial(batch, peer), ["query", "value"])
    options, _ = VARIANTS[variant]
    plain = problem.hypergradient(variant, options)
    if change == "gradient_checkpointing":
        problem.model.gradient_checkpointing = True
    else:
        monkeypatch.setattr(support.tasks.encoder, "QUERIES", 4)
    scale = max(x.abs().max().item() for x in plain)
    for a, b in zip(problem.hypergradient(variant, options), plain):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * scale)


# -------------------------------------------------------------------------------- refusals


@contextlib.contextmanager
def refused(message):
    """The block raises a ValueError of one line that holds the message."""
    with pytest.raises(ValueError, match=message) as error:
        yield
    assert "\n" not in str(error.value)


def config_of(name, **changes):
    peer = checkpoint(None, name)
    return json.loads(peer.config.to_json_string(use_diff=False)) | changes


REFUSED = [  # (family, changes of config.json, message)
    ("bert", dict(model_type="llama"), "model_type 'llama' is not an encoder"),
    ("bert", dict(model_type=None), "model_type None is not an encoder"),
    (
        "bert",
        dict(position_embedding_type="relative_key"),
        "position_embedding_type 'relative_key' is not supported for bert; supported: absolute",
    ),
    ("roberta", dict(position_embedding_type="rotary"), "position_embedding_type .rotary. is not"),
    ("bert", dict(hidden_act="mish"), "hidden_act 'mish' is not supported"),
    ("bert", dict(hidden_act=["gelu"]), r"hidden_act \['gelu'\] is not supported"),
    ("roberta", dict(is_decoder=True), "is_decoder=True is not supported"),
    ("bert", dict(add_cross_attention=True), "add_cross_attention=True is not"),
    ("esm", dict(is_folding_model=True), "is_folding_model=True is not supported"),
    ("bert", dict(quantization_config={"a": 1}), "quantization_config=.* is not supported"),
    ("bert", dict(num_hidden_layers=0), "num_hidden_layers=0 must be a positive int"),
    ("esm", dict(vocab_size="41"), "vocab_size='41' must be a positive int"),
    ("bert", dict(num_attention_heads=5), "hidden_size=32 / num_attention_heads=5 must be an int"),
    (
        "esm",
        dict(num_attention_heads=32),
        "hidden_size=32 / num_attention_heads=32 must be an even",
    ),
    ("bert", dict(layer_norm_eps=0), "layer_norm_eps=0 must be a positive number"),
    ("esm", dict(rope_theta="ten"), "rope_theta='ten' must be a positive number"),
    ("roberta", dict(pad_token_id=None), "pad_token_id=None must be an int"),
    ("esm", dict(mask_token_id=41), "mask_token_id=41 must be an integer from 0 to 40"),
    ("bert", dict(type_vocab_size=-1), "type_vocab_size=-1 must be an integer"),
]


@pytest.mark.parametrize("name, changes, message", REFUSED)
def test_what_is_not_computed_is_refused_in_one_line(name, changes, message):
    EncoderConfig.from_hf(config_of(name))
    with refused(f"config.json: {message}"):
        EncoderConfig.from_hf(config_of(name, **changes))


def without(part):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


DAMAGED = [  # (change of the tensors, message)
    (without("layer.1.attention.self.query.weight"), "layer.1.attention.self.query.weight is miss"),
    (
        lambda tensors: tensors | {"encoder.layer.3.output.dense.bias": torch.zeros(32)},
        r"unexpected tensor encoder.layer.3.output.dense.bias \(and 0 more\)",
    ),
    (
        lambda tensors: tensors | {"pooler.dense.bias": torch.zeros(31)},
        r"tensor pooler.dense.bias is \(31,\), but config.json says \(32,\)",
    ),
]


@pytest.mark.parametrize("change, message", DAMAGED)
def test_a_file_that_does_not_fit_is_refused_in_one_line(change, message, tmp_path):
    checkpoint(tmp_path, "bert")
    rewrite(tmp_path, change)
    with refused(message):
        Encoder.from_pretrained(tmp_path)


def test_inputs_that_do_not_fit_are_refused(tmp_path):
    for name in BASIC:
        checkpoint(tmp_path / name, name)
    bert, roberta, esm = (Encoder.from_pretrained(tmp_path / name) for name in BASIC)
    ids = torch.full((2, 5), 4)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 4\), input_ids \(2, 5\)"):
        bert(ids, torch.ones(2, 4))
    with pytest.raises(ValueError, match="ESM has no token types"):
        esm(ids, token_type_ids=ids)
    for encoder, most in ((bert, 64), (roberta, 62)):
        encoder(torch.full((1, most), 4))
        with pytest.raises(ValueError, match=f"{most + 1} tokens in a row: .* for {most} only"):
            encoder(torch.full((1, most + 1), 4))
    with pytest.raises(ValueError, match="call merge"):
        adapted(bert).save_pretrained(tmp_path / "saved")


# ----------------------------------------------------------------------------------- minilm


def minilm_batch(sentences):
    """Padded rows, by the tokenizer that comes with it."""
    tokenizer = Tokenizer.from_file(str(find_model("minilm") / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(sentences)
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "attention_mask": torch.tensor([row.attention_mask for row in rows]),
    }


def test_minilm_equals_transformers():
    """On padded sentences. Its output is about 1."""
    inputs = minilm_batch(
        ["A man is eating food.", "Why?", "The girl is carrying a baby, slowly. " * 5]
    )
    assert 0 in inputs["attention_mask"]
    folder = find_model("minilm")
    peer = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert_alike(Encoder.from_pretrained(folder), peer, inputs)


def test_minilm_finds_the_sentence_of_the_same_meaning():
    """By the cosine of mean hidden states, which is what it was trained for."""
    inputs = minilm_batch(
        ["A cat sits on the mat.", "A kitten rests on a rug.", "Shares fell sharply today."]
    )
    with torch.no_grad():
        hidden = Encoder.from_pretrained(find_model("minilm"))(**inputs)
    means = hidden.sum(1) / inputs["attention_mask"].sum(1, keepdim=True)
    means = torch.nn.functional.normalize(means)
    cosines = means @ means.T
    assert cosines[0, 1] > 0.4 > 0.2 > cosines[0, 2]


def test_an_encoder_without_a_head_is_refused_in_one_line_where_text_is_to_be_written(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--model=minilm", "--prompt=Hello"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]  # a first use downloads the model, and says so
    assert line.startswith("error: ") and "model_type 'bert' is not supported" in line
