"""Adapters of mlx-lm and torchtune against their formula, GGUF against gguf and transformers."""

import copy
import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from test_bidora import adapted
from test_train import trained
from torch.testing import assert_close

import bidora
import sample
from support.weights.gguf_format import write_gguf
from support.weights.other_formats import write_mlx
from support.weights.pretrained import find_model
from tools import merge

pytestmark = pytest.mark.usefixtures("elsewhere")
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
LAYERS = {  # a layer: its rows, and its name in torchtune
    "self_attn.q_proj": (32, "attn.q_proj"),
    "self_attn.k_proj": (16, "attn.k_proj"),
    "self_attn.o_proj": (32, "attn.output_proj"),
    "mlp.up_proj": (48, "mlp.w3"),
}
IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
CAUSAL = transformers.AutoModelForCausalLM


def base(family="llama", **more):
    torch.manual_seed(1)
    return CAUSAL.from_config(transformers.AutoConfig.for_model(family, **SIZES | more)).eval()


def by_formula(model, dora, scale):
    """{(block, layer): drawn A, B, m}, and the model with W' = m ⊙ (W0 + sBA) / ‖W0 + sBA‖."""
    model, factors = copy.deepcopy(model), {}
    for i, (name, (rows, _)) in [(i, item) for i in range(2) for item in LAYERS.items()]:
        A, B, m = torch.randn(3, 32) / 6, torch.randn(rows, 3), torch.rand(rows) + 0.5
        layer = model.get_submodule(f"model.layers.{i}.{name}")
        W = layer.weight.data + scale * B @ A
        layer.weight.data = m[:, None] * W / W.norm(dim=1, keepdim=True) if dora else W
        factors[i, name] = A, B, m
    return factors, model


def save(tensors, name, config):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, name)
    Path("adapter_config.json").write_text(json.dumps(config))


def mlx_file(factors, dora, own=(), **changes):
    tensors = {}
    for (i, name), parts in factors.items():
        parts = dict(zip(("lora_a", "lora_b", "m"), (*(x.T for x in parts[:2]), parts[2])))
        tensors |= {f"model.layers.{i}.{name}.{part}": x for part, x in parts.items()}
    tensors = {name: x for name, x in tensors.items() if dora or name[-2:] != ".m"}
    own = {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": list(LAYERS)} | dict(own)
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 2, "model": "its/base"}
    save(tensors, "adapters.safetensors", config | {"lora_parameters": own} | changes)


def pairs_together(rows, heads):
    """A head's rows i and i + d/2, which turn together, one after the other."""
    d = len(rows) // heads
    pairs = [i + j * d // 2 for i in range(d // 2) for j in (0, 1)]
    return rows[[h * d + i for h in range(heads) for i in pairs]]


def torchtune_file(factors, dora, family):
    """LLaMA's queries and keys hold each rotary pair together there, Qwen2's don't."""
    tensors = {}
    for (i, name), (A, B, m) in factors.items():
        if heads := {"q_proj": 4, "k_proj": 2}.get(name[-6:] if family == "llama" else None):
            B, m = pairs_together(B, heads), pairs_together(m, heads)
        layer = f"layers.{i}.{LAYERS[name][1]}"
        tensors |= {f"{layer}.lora_a.weight": A, f"{layer}.lora_b.weight": B}
        tensors |= {f"{layer}.magnitude": m} if dora else {}
    config = {"r": 3, "lora_alpha": 15, "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"]}
    save(tensors, "adapter_model.safetensors", config | {"peft_type": "LORA"})


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("family, program", [("llama", 0), ("llama", 1), ("qwen2", 1)])
def test_an_adapter_of_mlx_lm_or_torchtune_computes_what_it_does_there(dora, family, program):
    """mlx-lm's scale is s itself, torchtune's is alpha / rank. 1e-5: fp32 sums in another order."""
    model = base(family)
    factors, peer = by_formula(model, dora, scale=5.0)
    torchtune_file(factors, dora, family) if program else mlx_file(factors, dora)
    found = bidora.load_adapter(model, ".")(IDS).logits
    assert_close(found, peer(IDS).logits, rtol=1e-4, atol=1e-5)


def mlx(**changes):
    return lambda factors: mlx_file(factors, True, **changes)


def for_peft(dora):
    """As torchtune writes it: without use_dora, its queries' and keys' rows partly turned."""

    def write(factors):
        A, B, m = factors[0, "self_attn.q_proj"]
        parts = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {f"{name}.{part}": x for part, x in parts.items() if dora or x is not m}
        config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"}
        save(tensors, "adapter_model.safetensors", config)

    return write


def torn(factors):
    torchtune_file({key: (A, B[:-3], m) for key, (A, B, m) in factors.items()}, True, "qwen2")


@pytest.mark.parametrize(
    "write, family, said",
    [
        (mlx(own={"alpha": 16}), "llama", "must have a scale, and no alpha"),
        (mlx(own={"rank": 4}), "llama", "no tensor of an adapter of rank 4"),
        (mlx(fine_tune_type="full"), "llama", "fine_tune_type 'full' is no adapter"),
        (mlx(fine_tune_type="lora"), "llama", "which the tensors contradict"),
        (mlx(num_layers=1, own={"keys": ["mlp.gate_proj"]}), "llama", "lacks 1 of the layers"),
        (for_peft(dora=True), "llama", "as torchtune's"),
        (for_peft(dora=False), "qwen2", "as torchtune's"),
        (torn, "llama", "attn.[qk]_proj.lora_b.weight does not fit [24] heads"),
    ],
)
def test_a_file_that_is_torn_or_can_be_read_in_two_ways_is_refused(write, family, said):
    model = base(family)
    write(by_formula(model, True, scale=5.0)[0])
    with pytest.raises(ValueError, match=said):
        bidora.load_adapter(model, ".")


def test_layers_of_two_ranks_and_scales_become_one_rank_and_scale_in_mlx_lms_layout():
    model = base()
    options = dict(lora_alpha=6, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9})
    own = adapted(model, ["q_proj", "up_proj"], method="bidora", **options)
    write_mlx("mlx", bidora.adapter_layers(own), "base")
    again = bidora.load_adapter(model, "mlx")
    assert_close(again(IDS).logits, own(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_a_run_that_is_handed_on_computes_there_what_peft_does(to):
    trained("run", method="bidora", lower_lr=1e-2)
    assert merge.main(["--adapter=run", "--out_dir=out", f"--to={to}"]) == 0
    tiny = find_model("tiny-random")
    expected = PeftModel.from_pretrained(CAUSAL.from_pretrained(tiny), "run")(IDS).logits
    if to == "gguf":
        found = CAUSAL.from_pretrained("out", gguf_file="model.gguf")(IDS).logits
    else:
        asked = ["--adapter=out", "--prompt=a", "--raw", "--max_new_tokens=1"]
        assert sample.main(asked) == 0  # the base is named there
        mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
        peer, _ = mlx_lm.load(str(tiny), adapter_path="out")
        found = torch.tensor(peer(mx.array(IDS.numpy())).tolist())
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def model_folder(model):
    model.save_pretrained("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("tiny-random") / name, "model")
    return Path("model")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_holds_every_tensor_and_transformers_reads_it(family, dtype):
    folder = model_folder(base(family, tie_word_embeddings=family == "qwen3").to(dtype))
    write_gguf(folder, folder / "model.gguf")
    model = CAUSAL.from_pretrained(folder, dtype=torch.float32)
    again = CAUSAL.from_pretrained(folder, gguf_file="model.gguf")
    assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert_close(again(IDS).logits, model(IDS).logits)

    reader = gguf.GGUFReader(folder / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    rows = model.get_submodule("model.layers.1.self_attn.q_proj").weight.data
    rows = rows if family.startswith("qwen") else pairs_together(rows, 4)
    q = tensors["blk.1.attn_q.weight"]
    assert torch.equal(torch.tensor(gguf.dequantize(q.data, q.tensor_type)), rows)
    assert {tensor.tensor_type for name, tensor in tensors.items() if "norm" in name} == {0}  # fp32
    pre = "qwen2" if family == "qwen2" else "smollm"  # transformers puts Qwen2's own in its place
    assert reader.fields["tokenizer.ggml.pre"].contents() == pre
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [3, 3, 3, 1]  # three control tokens, then bytes


def test_llama_3s_positions_are_written_as_one_factor_a_pair_and_yarns_refused():
    rope = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    rope |= dict(rope_type="llama3", rope_theta=1e4, factor=8.0)
    write_gguf(model_folder(base(rope_parameters=rope, head_dim=32)), Path("a.gguf"))
    [factors] = [t.data for t in gguf.GGUFReader("a.gguf").tensors if "rope_freqs" in t.name]
    plain = 1 / 1e4 ** (torch.arange(0, 32, 2) / 32)
    peer = CAUSAL.from_pretrained("model").model.rotary_emb.inv_freq
    assert_close(plain / torch.tensor(factors), peer)
    yarn = model_folder(base(rope_parameters=dict(rope_type="yarn", factor=2.0)))
    with pytest.raises(ValueError, match="rope type yarn"):
        write_gguf(yarn, Path("b.gguf"))


@pytest.mark.parametrize("wrong", [["--lora_rank=3"], ["--to=peft-lora"], ["--to=onnx"]])
def test_a_wrong_form_is_refused_in_one_line(wrong, refuses):
    said = "gguf, mlx, peft-lora" if "onnx" in wrong[0] else "--to=peft-lora and --lora_rank=..."
    refuses(merge, ["--adapter=run", "--out_dir=out", *wrong], said)


@pytest.mark.parametrize(
    "settings, to, said",
    [
        (dict(quantize="nf4"), "mlx", "a packed base: use --to=transformers"),
        (dict(task="classification"), "gguf", "--to=gguf is for language models"),
        (dict(magnitude_axis="column"), "mlx", "no magnitudes per column"),
    ],
)
def test_what_another_programs_form_cant_hold_is_refused_in_one_line(settings, to, said, refuses):
    trained("run", **settings)
    refuses(merge, ["--adapter=run", "--out_dir=out", f"--to={to}"], said)
