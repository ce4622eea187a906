"""The transformer against transformers' own, on small random checkpoints that transformers made."""

import pytest
import torch
import transformers

from model import ModelConfig, Transformer

LLAMA = dict(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=128, rms_norm_eps=1e-5)


def checkpoint(folder, family="llama", **changes):
    torch.manual_seed(0)
    kinds = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM), "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}
    config_class, model_class = kinds[family]
    peer = model_class(config_class(**(LLAMA | changes))).eval()
    for name, parameter in peer.named_parameters():  # biases and norms start at 0 and 1, which would hide a mistake
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    peer.save_pretrained(folder)
    return peer


@pytest.mark.parametrize("family, changes", [
    ("llama", dict(tie_word_embeddings=True, rope_parameters={"rope_theta": 100000.0, "rope_type": "default"})),  # SmolLM2's layout
    ("llama", dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    ("llama", dict(num_key_value_heads=6, head_dim=12)),
    ("qwen2", dict(tie_word_embeddings=True)),
])
def test_logits_equal_transformers(tmp_path, family, changes):
    """Tolerance 1e-4 in fp32: both sum the same products in another order."""
    peer = checkpoint(tmp_path, family, **changes)
    ours = Transformer.from_pretrained(tmp_path)
    ids = torch.randint(0, 131, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), peer(ids).logits, atol=1e-4, rtol=1e-4)


def test_right_padding_changes_nothing_before_it(tmp_path):
    checkpoint(tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    ids = torch.randint(0, 131, (1, 12))
    padded = torch.cat((ids, torch.zeros(1, 9, dtype=torch.long)), dim=1)
    torch.testing.assert_close(model(padded)[:, :12], model(ids), atol=1e-5, rtol=1e-5)


def test_loss_equals_transformers_where_labels_ask(tmp_path):
    peer = checkpoint(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    ids = torch.randint(0, 131, (4, 20))
    labels = ids.masked_fill(torch.rand(4, 20) < 0.7, -100)
    torch.testing.assert_close(ours(ids, labels), peer(ids, labels=labels).loss, atol=1e-5, rtol=1e-5)


def test_sharded_checkpoint_loads_as_one(tmp_path):
    peer = checkpoint(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    one, many = (Transformer.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_in_transformers(tmp_path, tied, dtype):
    checkpoint(tmp_path / "peer", tie_word_embeddings=tied)
    ours = Transformer.from_pretrained(tmp_path / "peer", dtype)
    ours.save_pretrained(tmp_path / "ours")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert peer.dtype == dtype
    saved, own = peer.state_dict(), ours.state_dict()
    assert saved.keys() == own.keys() and all(torch.equal(saved[key], own[key]) for key in own)


def test_cached_greedy_generation_equals_uncached_and_transformers(tmp_path):
    peer = checkpoint(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    prompt = torch.randint(3, 131, (2, 7))
    cached = ours.generate(prompt, 40, temperature=0)
    uncached = prompt
    for _ in range(40):
        uncached = torch.cat((uncached, ours(uncached)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(cached, uncached)
    assert torch.equal(cached, peer.generate(prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False))


def test_generation_stops_at_a_stop_token(tmp_path):
    checkpoint(tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    prompt = torch.randint(3, 131, (1, 7))
    free = model.generate(prompt, 20, temperature=0)
    stop = free[0, 12].item()
    first = free[0, 7:].tolist().index(stop)
    assert torch.equal(model.generate(prompt, 20, temperature=0, stop_ids=[stop]), free[:, :8 + first])


def test_top_k_and_top_p_keep_only_the_likeliest_tokens(tmp_path):
    checkpoint(tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    prompt = torch.randint(3, 131, (1, 7)).expand(400, -1)
    p, order = model(prompt[:1])[0, -1].softmax(-1).sort(descending=True)
    drawn = set(model.generate(prompt, 1, top_k=3)[:, -1].tolist())
    assert drawn == set(order[:3].tolist())
    nucleus = int((p.cumsum(0) < 0.2).sum()) + 1  # the smallest set with a fifth of the probability
    drawn = set(model.generate(prompt, 1, top_p=0.2)[:, -1].tolist())
    assert drawn <= set(order[:nucleus].tolist()) and order[0].item() in drawn


def test_score_is_the_log_probability_of_the_answer(tmp_path):
    """Against one plain forward pass for each prompt and answer; prompts share a beginning, answers differ in length."""
    peer = checkpoint(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 10, 11]]
    answers = [[20], [21], [20, 22], [20, 23, 24]]
    expected = torch.zeros(3, 4)
    for i, prompt in enumerate(prompts):
        for j, answer in enumerate(answers):
            with torch.no_grad():
                log_p = peer(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected[i, j] = sum(log_p[len(prompt) - 1 + k, token] for k, token in enumerate(answer))
    torch.testing.assert_close(ours.score(prompts, answers), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.score([[7]], answers), ours.score([[7], [8]], answers)[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change, named", [
    ({"model_type": "gpt2"}, "gpt2"), ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
    ({"hidden_act": "gelu"}, "gelu"), ({"hidden_size": None}, "hidden_size"), ({"use_sliding_window": True}, "sliding"),
])
def test_unsupported_config_is_refused_by_name(change, named):
    config = LLAMA | {"model_type": "llama"} | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf(config)


def test_broken_weights_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: t for key, t in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Transformer.from_pretrained(tmp_path)
    save_file(tensors | {name: tensors[name][:5].contiguous()}, path)
    with pytest.raises(ValueError, match=f"{name} is"):
        Transformer.from_pretrained(tmp_path)
    save_file(tensors | {"model.extra": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="model.extra"):
        Transformer.from_pretrained(tmp_path)
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        Transformer.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        Transformer.from_pretrained(tmp_path)
