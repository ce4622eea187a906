"""
Adapters of mlx-lm and torchtune against the formula that these libraries compute, and GGUF files
against gguf's and transformers' readers. The mlx-lm of this machine, if there is one, reads ours.
"""

import copy
import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_bidora import adapted
from torch.testing import assert_close

import bidora
import sample
from bidora import load_adapter
from support.weights.gguf_format import write_gguf
from support.weights.other_formats import write_mlx
from support.weights.pretrained import find_model
from tools import merge

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
LAYERS = {  # a layer: its rows, and the name that torchtune has for it
    "self_attn.q_proj": (32, "attn.q_proj"),
    "self_attn.k_proj": (16, "attn.k_proj"),
    "self_attn.o_proj": (32, "attn.output_proj"),
    "mlp.up_proj": (48, "mlp.w3"),
}
IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def base(family="llama", **more):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **SIZES | more)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def by_formula(model, dora, scale):
    """(A, B, m) of each layer, drawn here, and the model with W' = m ⊙ (W0 + sBA) / ‖W0 + sBA‖."""
    model, factors = copy.deepcopy(model), {}
    for i in range(2):
        for name, (rows, _) in LAYERS.items():
            A, B, m = torch.randn(3, 32) / 6, torch.randn(rows, 3), torch.rand(rows) + 0.5
            layer = model.get_submodule(f"model.layers.{i}.{name}")
            W = layer.weight.data + scale * B @ A
            layer.weight.data = m[:, None] * W / W.norm(dim=1, keepdim=True) if dora else W
            factors[i, name] = A, B, m
    return factors, model


def save(tensors, name, config):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, name)
    Path("adapter_config.json").write_text(json.dumps(config))


def mlx_file(factors, dora):
    tensors = {}
    for (i, name), (A, B, m) in factors.items():
        layer = f"model.layers.{i}.{name}"
        tensors |= {f"{layer}.lora_a": A.T, f"{layer}.lora_b": B.T}
        tensors |= {f"{layer}.m": m} if dora else {}
    own = {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": list(LAYERS)}
    config = {"model": "its/base", "fine_tune_type": "dora" if dora else "lora", "num_layers": 2}
    save(tensors, "adapters.safetensors", config | {"lora_parameters": own})


@pytest.mark.parametrize("dora", [True, False])
def test_an_adapter_of_mlx_lm_computes_what_mlx_lm_does(dora, elsewhere):
    """Its scale is s itself. 1e-5: fp32 sums in another order."""
    model = base()
    factors, peer = by_formula(model, dora, scale=5.0)
    mlx_file(factors, dora)
    assert_close(load_adapter(model, ".")(IDS).logits, peer(IDS).logits, rtol=1e-4, atol=1e-5)


def pairs_together(rows, heads):
    """A head's rows i and i + d/2, which turn together, one after the other."""
    d = len(rows) // heads
    order = [h * d + i + j * d // 2 for h in range(heads) for i in range(d // 2) for j in (0, 1)]
    return rows[order]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dora", [True, False])
def test_an_adapter_of_torchtune_computes_what_torchtune_does(dora, family, elsewhere):
    """LLaMA's queries and keys hold each rotary pair together there, Qwen2's don't."""
    model, tensors = base(family), {}
    factors, peer = by_formula(model, dora, scale=2.0)
    for (i, name), (A, B, m) in factors.items():
        if name[-6:] in ("q_proj", "k_proj") and family == "llama":
            B, m = (pairs_together(rows, 4 if name[-6] == "q" else 2) for rows in (B, m))
        layer = f"layers.{i}.{LAYERS[name][1]}"
        tensors |= {f"{layer}.lora_a.weight": A, f"{layer}.lora_b.weight": B}
        tensors |= {f"{layer}.magnitude": m} if dora else {}
    config = {"r": 3, "lora_alpha": 6, "target_modules": [n[-6:] for n in LAYERS]}
    config["target_modules"][-1] = "up_proj"
    save(tensors, "adapter_model.safetensors", config | {"peft_type": "LORA"})
    assert_close(load_adapter(model, ".")(IDS).logits, peer(IDS).logits, rtol=1e-4, atol=1e-5)


def in_peft_s_layout(family):
    """What torchtune writes for PEFT: without use_dora, its queries and keys partly turned."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(3, 32),
        f"{name}.lora_B.weight": torch.ones(32, 3),
    }
    if family == "llama":
        tensors[f"{name}.lora_magnitude_vector"] = torch.ones(32)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"}
    save(tensors, "adapter_model.safetensors", config)


def changed(**changes):
    def change(factors):
        mlx_file(factors, True)
        config = json.loads(Path("adapter_config.json").read_text())
        for key, value in changes.items():
            (config if key in config else config["lora_parameters"])[key] = value
        Path("adapter_config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    "make, family, said",
    [
        (changed(alpha=16), "llama", "must have a scale, and no alpha"),
        (changed(rank=4), "llama", r"rank=4 does not fit the tensors' \[3\]"),
        (changed(fine_tune_type="full"), "llama", "fine_tune_type 'full' is no adapter"),
        (changed(fine_tune_type="lora"), "llama", "which the tensors contradict"),
        (changed(num_layers=1, keys=["mlp.gate_proj"]), "llama", "lacks 1 of the layers"),
        (lambda _: in_peft_s_layout("llama"), "llama", "as torchtune writes it"),
        (lambda _: in_peft_s_layout("qwen2"), "qwen2", "as torchtune writes it"),
    ],
)
def test_a_file_that_can_be_read_in_two_ways_is_refused(make, family, said, elsewhere):
    model = base(family)
    make(by_formula(model, True, scale=5.0)[0])
    with pytest.raises(ValueError, match=said):
        load_adapter(model, ".")


def test_mlx_lm_computes_an_adapter_of_ours_from_its_folder(elsewhere):
    """Of layers of two ranks and scales, and by sample.py too: the base is named there."""
    tiny = find_model("tiny-random")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    options = dict(lora_alpha=6, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9})
    model = adapted(model, ["q_proj", "up_proj"], method="bidora", **options)
    write_mlx("mlx", bidora.adapter_layers(model), str(tiny))
    assert sample.main(["--adapter=mlx", "--prompt=a", "--raw", "--max_new_tokens=1"]) == 0
    again = load_adapter(transformers.AutoModelForCausalLM.from_pretrained(tiny), "mlx")
    expected = model(IDS).logits
    assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)

    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    peer, _ = mlx_lm.load(str(tiny), adapter_path="mlx")
    found = torch.tensor(peer(mx.array(IDS.numpy())).tolist())
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_holds_every_tensor_and_transformers_reads_it(family, dtype, elsewhere, capfd):
    base(family, tie_word_embeddings=family == "qwen3").to(dtype).save_pretrained("model")
    model = transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("tiny-random") / name, "model")
    write_gguf(Path("model"), Path("model/model.gguf"))
    again = transformers.AutoModelForCausalLM.from_pretrained("model", gguf_file="model.gguf")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], p) for name, p in model.state_dict().items())
    assert_close(again(IDS).logits, model(IDS).logits)

    reader = gguf.GGUFReader("model/model.gguf")
    [q] = [t for t in reader.tensors if t.name == "blk.1.attn_q.weight"]
    rows = model.get_submodule("model.layers.1.self_attn.q_proj").weight.data
    rows = rows if family.startswith("qwen") else pairs_together(rows, 4)
    assert torch.equal(torch.tensor(gguf.dequantize(q.data, q.tensor_type)), rows)
    assert [t.name for t in reader.tensors if "norm" in t.name and t.tensor_type != 0] == []
    pre = "qwen2" if family == "qwen2" else "smollm"  # transformers puts Qwen2's own in its place
    assert reader.fields["tokenizer.ggml.pre"].contents() == pre
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [3, 3, 3, 1]  # three control tokens, then bytes


def test_positions_of_llama_3_are_written_as_factors_and_others_refused(elsewhere):
    """By the formula of arXiv 2407.21783's code: a factor of 1 for fast pairs, 8 for slow ones."""
    own = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    rope = dict(rope_type="llama3", rope_theta=1e4, factor=8.0) | own
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("model").mkdir(exist_ok=True)
        shutil.copy(find_model("tiny-random") / name, "model")
    base(rope_parameters=rope, head_dim=32).save_pretrained("model")
    write_gguf(Path("model"), Path("a.gguf"))
    [factors] = [t for t in gguf.GGUFReader("a.gguf").tensors if t.name == "rope_freqs.weight"]
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    turned = 1 / 1e4 ** (torch.arange(0, 32, 2) / 32) / torch.tensor(factors.data)
    assert_close(model.model.rotary_emb.inv_freq, turned)
    assert factors.data[0] == 1 and factors.data[-1] == 8
    base(rope_parameters=dict(rope_type="yarn", factor=2.0)).save_pretrained("model")
    with pytest.raises(ValueError, match="rope type yarn"):
        write_gguf(Path("model"), Path("b.gguf"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--lora_rank=3"], "--to=peft-lora and --lora_rank=... go together"),
        (["--to=peft-lora"], "--to=peft-lora and --lora_rank=... go together"),
        (["--to=onnx"], "transformers, gguf, mlx, peft-lora"),
    ],
)
def test_a_wrong_form_is_refused_in_one_line(arguments, said, refuses, elsewhere):
    refuses(merge, ["--adapter=run", "--out_dir=out", *arguments], said)
