"""The transformer against transformers' own, on small random checkpoints that transformers made."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file, save_model
from torch.nn.attention import SDPBackend, sdpa_kernel

import bidora
from model import ModelConfig, Transformer
from support.tasks.any_model import AnyLanguageModel

ROOT = Path(__file__).parent.parent
LLAMA = dict(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3)
LLAMA |= dict(num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128)
LLAMA |= dict(rms_norm_eps=1e-5)
FAMILIES = {
    name: (getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM"))
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3_32 = LLAMA3 | dict(original_max_position_embeddings=32)


def checkpoint(folder, family="Llama", save=None, **changes):
    """A random model that transformers makes and saves."""
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    peer = model_class(config_class(**(LLAMA | changes))).eval()
    # Biases and norms start at 0 and 1, and heads alike, which would hide a mistake.
    for name, parameter in peer.named_parameters():
        std = 0.3 if "norm" in name or "bias" in name else 0.08
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    peer.save_pretrained(folder, **(save or {}))
    return peer


def rope(rope_type, theta=10000.0, **values):
    return dict(rope_parameters=dict(rope_theta=theta, rope_type=rope_type, **values))


def assert_alike(ours, peer, ids, kept=slice(None)):
    """Logits within 1e-4 in fp32: both sum the same products in another order."""
    with torch.no_grad():
        logits, expected = ours(ids)[kept], peer(ids).logits[kept]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


YARN = dict(factor=4.0, original_max_position_embeddings=32)
OTHER_YARN = dict(factor=8.0, original_max_position_embeddings=24, beta_fast=16, beta_slow=2)
OTHER_YARN |= dict(mscale=0.7, mscale_all_dim=1.2, truncate=False)
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = dict(use_sliding_window=True, layer_types=[SLIDING, FULL, SLIDING])
ABOVE = dict(use_sliding_window=True, max_window_layers=1)
QWEN2 = MIXED | {"model_type": "qwen2"}
CHECKPOINTS = {
    "llama, tied, other theta": ("Llama", rope("default", 1e5) | dict(tie_word_embeddings=True)),
    "llama, biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, no grouped queries, own head_dim": ("Llama", dict(num_key_value_heads=6, head_dim=12)),
    "llama, one key head": ("Llama", dict(num_key_value_heads=1)),
    "llama, sharded": ("Llama", dict(save=dict(max_shard_size="50KB"))),
    "llama, linear": ("Llama", rope("linear", factor=4.0)),
    "llama, dynamic": ("Llama", rope("dynamic", factor=4.0)),
    "llama, llama3": ("Llama", rope(theta=5e5, **LLAMA3_32) | dict(tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral, window": ("Mistral", dict(sliding_window=7, head_dim=10)),
    "qwen2, tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2, windows above layer 1": ("Qwen2", ABOVE | dict(sliding_window=9)),
    "qwen2, yarn": ("Qwen2", rope("yarn", **YARN)),
    "qwen2, yarn with everything": ("Qwen2", rope("yarn", **OTHER_YARN)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3, biases, windows, tied": (
        "Qwen3",
        dict(head_dim=10, attention_bias=True, tie_word_embeddings=True, sliding_window=5) | MIXED,
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_generation_equal_transformers(tmp_path, name):
    """At every position of ragged, right-padded batches. Then 64 greedy tokens."""
    family, changes = CHECKPOINTS[name]
    peer = checkpoint(tmp_path, family, **changes)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("sharded" in name)
    ours = Transformer.from_pretrained(tmp_path)
    lengths = torch.tensor([40, 3, 17, 1])
    ids = torch.randint(3, 131, (4, 40))
    there = torch.arange(40) < lengths[:, None]
    masked = functools.partial(peer, attention_mask=there.long())
    assert_alike(lambda ids: ours(ids * there), masked, ids, there)
    prompt = ids[:2, :6]
    peer.generation_config.eos_token_id = None
    expected = peer.generate(prompt, max_new_tokens=64, do_sample=False)
    assert torch.equal(ours.generate(prompt, 64, temperature=0), expected)


def test_bfloat16_checkpoint_is_read_and_computed_as_transformers_does(tmp_path):
    """In fp32 within 1e-4; in bf16, which rounds sums, no further off than transformers' own."""
    peer = checkpoint(tmp_path, "Qwen3", head_dim=16).bfloat16()
    peer.save_pretrained(tmp_path)
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 131, (3, 30))
    assert_alike(Transformer.from_pretrained(tmp_path), exact, ids)
    with torch.no_grad():
        truth, theirs = exact(ids).logits, peer(ids).logits.float()
        ours = Transformer.from_pretrained(tmp_path, torch.bfloat16)(ids).float()
    assert (ours - truth).norm() < 1.3 * (theirs - truth).norm()


def test_both_spellings_of_config_are_read():
    config = LLAMA | {"model_type": "llama"}
    scaling = {name.replace("rope_type", "type"): value for name, value in LLAMA3_32.items()}
    old = {"rope_theta": 5e5, "torch_dtype": "bfloat16", "rope_scaling": scaling}
    new = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, **LLAMA3_32}}
    old, new = (ModelConfig.from_hf(config | spelling) for spelling in (old, new))
    assert {name: x for name, x in old.rope.items() if name != "type"} == new.rope
    assert old.windows == new.windows == [None] * 3


def edited(folder, change):
    """Change a folder's config.json by hand. `...` stands for a key that is left out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


EDITED = [
    ("Llama", {"rope_scaling": {"rope_type": "yarn", **YARN}}),  # beside what transformers 5 wrote
    ("Qwen2", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("Qwen2", {"rope_parameters": ..., "rope_theta": 500.0}),
    ("Qwen2", rope("yarn", **YARN | {"factor": None})),
    ("Qwen3", {"original_max_position_embeddings": 64, **rope("yarn", **YARN)}),
    ("Mistral", {"max_position_embeddings": ..., **rope("yarn", factor=4.0)}),
    ("Qwen2", {"max_position_embeddings": ..., **rope(**LLAMA3)}),
    ("Llama", {"max_position_embeddings": ..., "rms_norm_eps": ..., "num_key_value_heads": ...}),
    ("Mistral", {"sliding_window": ..., "rms_norm_eps": ...}),
]
WINDOWS = [
    dict(sliding_window=7),
    ABOVE | dict(sliding_window=7),
    ABOVE | dict(sliding_window=7, use_sliding_window=False),
    dict(sliding_window=7, **MIXED),
    ABOVE | dict(sliding_window=None),
]
EDITED += [(family, change) for family in FAMILIES for change in WINDOWS]


@pytest.mark.parametrize("family, change", EDITED)
def test_edited_and_shortened_configs_mean_what_they_mean_to_transformers(tmp_path, family, change):
    """Windows too: a leftover one that counts would change llama's logits by 3."""
    heads = dict(num_key_value_heads=6) if "num_key_value_heads" in change else {}
    checkpoint(tmp_path, family, **heads)
    edited(tmp_path, change)
    peer = FAMILIES[family][1].from_pretrained(tmp_path).eval()
    assert_alike(Transformer.from_pretrained(tmp_path), peer, torch.randint(0, 131, (2, 60)))


@pytest.mark.parametrize("load", [Transformer, AnyLanguageModel])
def test_a_head_said_to_be_tied_that_differs_is_untied_as_by_transformers(load, tmp_path, capsys):
    """And it is said. What is saved loads again in both."""
    checkpoint(tmp_path, tie_word_embeddings=False)
    edited(tmp_path, {"tie_word_embeddings": True})
    ids = torch.arange(9)[None]
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load.from_pretrained(tmp_path)
    assert "hold another lm_head.weight, which is used" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = peer(ids).logits
        for logits in (model(ids), again(ids).logits):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_tied_matrix_may_have_the_heads_name_alone(tmp_path):
    """As safetensors' save_model writes it."""
    peer = checkpoint(tmp_path, tie_word_embeddings=True)
    save_model(peer, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path)(ids), peer(ids).logits)


def test_saving_over_shards_leaves_one_model(tmp_path):
    checkpoint(tmp_path, save=dict(max_shard_size="50KB"))
    model = Transformer.from_pretrained(tmp_path)
    model.model.norm.weight.data *= 3
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)


def test_a_dynamic_rope_ends_at_the_trained_length(tmp_path):
    checkpoint(tmp_path, **rope("dynamic", factor=4.0), max_position_embeddings=24)
    model = Transformer.from_pretrained(tmp_path)
    model(torch.zeros(1, 24, dtype=torch.long))
    with pytest.raises(ValueError, match="25 tokens: .*'dynamic'.* 24"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_loss_equals_transformers_where_labels_ask(tmp_path):
    peer = checkpoint(tmp_path)
    ids = torch.randint(0, 131, (4, 20))
    labels = ids.masked_fill(torch.rand(4, 20) < 0.7, -100)
    loss = Transformer.from_pretrained(tmp_path)(ids, labels)
    torch.testing.assert_close(loss, peer(ids, labels=labels).loss, atol=1e-5, rtol=1e-5)


BATCHES = {  # rows of (what they begin with, their own length), and what is supervised
    "padded, shared": ([(12, 9), (12, 4), (12, 1)], "last"),
    "ragged, nothing shared": ([(0, 11), (0, 5), (0, 17)], "last"),
    "even, nothing shared": ([(0, 9), (0, 9)], "all"),
    "even, shared": ([(10, 6), (10, 6), (10, 6)], "all"),
    "one row": ([(0, 20)], "all"),
    "nothing but what is shared": ([(14, 0), (14, 0)], "all"),
    "few shared": ([(3, 9), (3, 5)], "all"),
    "a row without a target": ([(10, 5), (10, 0), (10, 7)], "all but row 1"),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def model(request, tmp_path_factory):
    """A checkpoint with adapters, in float64."""
    family, changes = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp("adapted")
    checkpoint(folder, family, **changes)
    model = Transformer.from_pretrained(folder, torch.float64).requires_grad_(False)
    bidora.replace_linear_with_bidora(model, 2, target_modules=["q_proj", "v_proj", "down_proj"])
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        torch.nn.init.normal_(p, mean=p.mean().item(), std=0.1)
    return model


@pytest.mark.parametrize("batch", BATCHES)
def test_rows_laid_end_to_end_give_the_loss_and_the_derivatives_of_padded_ones(model, batch):
    """Cross-entropy, its gradient, and the gradient of that gradient's square: 1e-10 in float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows, supervised = BATCHES[batch]
    beginning = torch.randint(3, 131, (20,))
    ids = [torch.cat((beginning[:n], torch.randint(3, 131, (m,)))) for n, m in rows]
    labels = [row.clone() for row in ids]
    for i, row in enumerate(labels):
        if supervised == "last":
            row[:-1] = -100
        elif supervised == f"all but row {i}":
            row[:] = -100
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids, labels = pad(ids), pad(labels, padding_value=-100)

    def derivatives(loss):
        g = torch.autograd.grad(loss, parameters, create_graph=True)
        return loss, g, torch.autograd.grad(sum((x * x).sum() for x in g), parameters)

    with sdpa_kernel(SDPBackend.MATH):
        ours = derivatives(model(ids, labels))
        plain = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        expected = derivatives(plain)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_tokens_that_rows_share_and_padding_never_reach_a_linear_layer(tmp_path):
    """8 rows of 30 tokens, of which 20 are the same: 20 + 8 · 9 pass, the last being targets."""
    checkpoint(tmp_path)
    model, seen = Transformer.from_pretrained(tmp_path), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: seen.append(a[1][0].shape))
    ids = torch.randint(3, 131, (8, 35))
    ids[:, :20] = ids[0, :20]
    labels = torch.full_like(ids, -100)
    labels[:, 29] = 7
    model(ids, labels)
    assert [shape[:-1].numel() for shape in seen] == [20 + 8 * 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, changes",
    [
        ("Llama", dict(tie_word_embeddings=True)),
        ("Llama", dict(tie_word_embeddings=False)),
        ("Qwen3", dict(head_dim=10)),
        ("Mistral", dict(sliding_window=7)),
        ("Qwen2", rope("yarn", **YARN)),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_saved_model_loads_in_transformers(tmp_path, family, changes, dtype, adapted):
    """The same weights in the same dtype; so the logits are equal too."""
    checkpoint(tmp_path / "peer", family, **changes)
    ours = Transformer.from_pretrained(tmp_path / "peer", dtype)
    if adapted:
        bidora.replace_linear_with_bidora(ours, 4, target_modules=["q_proj", "down_proj"])
        for layer in bidora.adapter_layers(ours).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
            layer.lora_magnitude_vector.data *= 1.1
        with pytest.raises(ValueError, match="merge"):
            ours.save_pretrained(tmp_path / "ours")
        bidora.merge(ours)
    ours.save_pretrained(tmp_path / "ours")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    assert peer.dtype == dtype
    saved, own = peer.state_dict(), ours.state_dict()
    assert saved.keys() == own.keys() and all(torch.equal(saved[key], own[key]) for key in own)
    assert_alike(ours.float(), peer.float(), torch.randint(0, 131, (2, 20)))


def test_generation_stops_at_a_stop_token(tmp_path):
    checkpoint(tmp_path)
    generate = functools.partial(Transformer.from_pretrained(tmp_path).generate, temperature=0)
    prompt = torch.randint(3, 131, (1, 7))
    free = generate(prompt, 20)
    stop = free[0, 12].item()
    first = free[0, 7:].tolist().index(stop)
    assert torch.equal(generate(prompt, 20, stop_ids=[stop]), free[:, : 8 + first])


def test_top_k_and_top_p_keep_only_the_likeliest_tokens(tmp_path):
    checkpoint(tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    prompt = torch.randint(3, 131, (1, 7)).expand(400, -1)
    p, order = model(prompt[:1])[0, -1].softmax(-1).sort(descending=True)
    assert set(model.generate(prompt, 1, top_k=3)[:, -1].tolist()) == set(order[:3].tolist())
    nucleus = int((p.cumsum(0) < 0.2).sum()) + 1  # the smallest set with a fifth of the probability
    drawn = set(model.generate(prompt, 1, top_p=0.2)[:, -1].tolist())
    assert drawn <= set(order[:nucleus].tolist()) and order[0].item() in drawn
    model.config.hf["attention_dropout"] = "x"  # which transformers checks
    pytest.raises(ValueError, model.generate, prompt, 1).match("config.json: transformers .*load")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, "gpt2.*llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"model_type": ...}, "None"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "longrope.*yarn"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'factor' is missing"),
        ({"partial_rotary_factor": 0.5}, "whole heads"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}}, "the same in all layers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"num_attention_heads": "6"}, "num_attention_heads='6' must be a positive integer"),
        ({"num_attention_heads": 0}, "must be a positive integer"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings='512'"),
        ({"rms_norm_eps": "x"}, "must be positive"),
        ({"rms_norm_eps": True}, "must be positive"),
        ({"rope_parameters": 5}, "5"),
        ({"rope_scaling": "linear"}, "linear"),
        ({"rope_theta": -5}, "must be positive"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "must be positive"),
        ({"rope_scaling": {"type": "yarn", "factor": -2}}, "must be positive"),
        ({"model_type": "mistral", "sliding_window": "x"}, "must be positive"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (QWEN2 | {"layer_types": [FULL]}, "must be positive"),
        (QWEN2 | {"layer_types": [FULL, "chunked", FULL]}, "layer_types 'chunked' is not"),
        (QWEN2 | {"sliding_window": 7.0}, "sliding_window .an integer."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than 1000"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "4 key-value heads do not divide 6"),
        ({"head_dim": 7}, "head_dim=7 is not an even integer"),
        ({"head_dim": 8.5}, "head_dim=8.5 is not an even integer"),
        ({"head_dim": 10**12}, "head_dim=1000000000000 is not an even integer up to"),
        ({"hidden_size": 2**62}, "hidden_size=4611686018427387904 is more than 100000000"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps.* must be positive and below"),
        (rope("yarn", factor=2.0, attention_factor="much"), "much.* is missing or not a number"),
    ],
)
def test_unsupported_config_is_refused_by_name(change, named):
    config = LLAMA | {"model_type": "llama"} | change
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf({key: x for key, x in config.items() if x is not ...})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "file_dtype, dtype, layers", [("bfloat16", "float32", 9), ("float32", "bfloat16", 20)]
)
def test_loading_never_holds_the_weights_twice(tmp_path, file_dtype, dtype, layers):
    """A peak of at most 1.15 × the loaded size, some 500 MB. (getrusage counts the parent's.)"""
    sizes = dict(vocab_size=32000, hidden_size=1024, intermediate_size=2816)
    heads = dict(num_attention_heads=16, num_key_value_heads=4, num_hidden_layers=layers)
    config = transformers.LlamaConfig(**LLAMA | sizes | heads, tie_word_embeddings=True)
    peer = transformers.LlamaForCausalLM(config).to(getattr(torch, file_dtype))
    peer.save_pretrained(tmp_path, max_shard_size="200MB")
    checkpoint(tmp_path / "small")
    size = sum(p.numel() for p in peer.parameters()) * getattr(torch, dtype).itemsize
    del peer
    code = f"""
import re
import torch
from model import Transformer
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
# All that a process loads once:
Transformer.from_pretrained({str(tmp_path / "small")!r}, torch.{dtype})
before = peak()
model = Transformer.from_pretrained({str(tmp_path)!r}, torch.{dtype})
total = sum(float(p.detach().view(-1)[::1000].sum()) for p in model.parameters())
print(peak() - before)
"""
    options = dict(capture_output=True, text=True, check=True, cwd=ROOT)
    grown = int(subprocess.run([sys.executable, "-c", code], **options).stdout)
    assert size > 500e6 and 0.9 * size < grown < 1.15 * size, (size, grown)


def test_broken_weights_are_refused_by_name(tmp_path):
    checkpoint(tmp_path)
    path, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    whole, tensors = path.read_bytes(), load_file(path)
    name, shard = "model.layers.1.mlp.up_proj.weight", "model-00001-of-00002.safetensors"

    def refused(message, error=ValueError):
        with pytest.raises(error, match=message):
            Transformer.from_pretrained(tmp_path)

    save_file({key: t for key, t in tensors.items() if key != name}, path)
    refused(f"{name} is missing")
    save_file(tensors | {name: tensors[name][:5].contiguous()}, path)
    refused(f"{name} is")
    save_file(tensors | {"model.extra": torch.zeros(2)}, path)
    refused("model.extra")
    path.write_bytes(whole[: len(whole) // 2])
    refused("damaged.*download it again")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n")
    refused("git lfs pull")
    path.unlink()
    refused("model.safetensors", FileNotFoundError)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("pickles.*safetensors", FileNotFoundError)

    index.write_text(json.dumps({"weight_map": {name: shard}}))
    refused(f"{shard} is missing, though .*index.json lists it", FileNotFoundError)
    index.write_text('{"weight_map": null}')
    refused("weight_map is missing or empty")
    index.write_text(json.dumps({"weight_map": {name: "../model.safetensors"}}))
    refused("does not name a safetensors file in this folder")
    index.unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / shard).write_bytes(whole)
    refused("index.json is missing, though shards are there", FileNotFoundError)


def test_old_tables_and_a_second_copy_of_the_shared_matrix_are_passed_over(tmp_path):
    peer = checkpoint(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors | more, path)
    assert_alike(Transformer.from_pretrained(tmp_path), peer, torch.randint(0, 131, (2, 9)))
