#!/usr/bin/env bash
# A LLaMA 3.1-like model's GGUF file is loaded with from_pretrained(gguf_file=...). For its scaled
# rotary positions, llama.cpp's converter stores one factor a pair, the tensor rope_freqs.weight.
# Expected: the model computes what the file's own says, or loading names the tensor it can't use.
# Seen (transformers 5.24.0, gguf 0.19.0): every weight is equal, and nothing is said, but the logits
#   are not: the factors are left out, and the configuration has plain rotary positions.
# What follows: of a LLaMA 3.1 or 3.2, take the safetensors files, or set config.rope_parameters.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=40, hidden_size=64, intermediate_size=32, num_hidden_layers=1)
sizes |= dict(num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=512)
rope = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0)
rope |= dict(high_freq_factor=4.0, original_max_position_embeddings=64)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))

writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_block_count(1)
writer.add_context_length(512)
writer.add_embedding_length(64)
writer.add_feed_forward_length(32)
writer.add_head_count(1)
writer.add_head_count_kv(1)
writer.add_rope_dimension_count(64)
writer.add_rope_freq_base(10000.0)
writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
writer.add_vocab_size(40)
writer.add_tokenizer_model("gpt2")
writer.add_token_list([str(i) for i in range(40)])
plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
for name, tensor in model.state_dict().items():
    if "q_proj" in name or "k_proj" in name:  # GGUF's LLaMA holds each rotary pair together
        tensor = tensor.unflatten(0, (1, 2, -1)).transpose(1, 2).flatten(0, 2)
    writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", tensor.numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

again = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf").eval()
weights = model.state_dict()
equal = all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
ids = torch.arange(40)[None]
with torch.no_grad():
    off = (again(ids).logits - model(ids).logits).abs().max().item()
    again.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq)
    mended = (again(ids).logits - model(ids).logits).abs().max().item()
print("weights equal:", equal, "- rotary positions:", again.config.rope_parameters)
print(f"logits off by {off:.3f}; with the factors put in by hand, by {mended:.1e}")
assert equal and off > 0.01 and mended < 1e-4, "this has changed"
PY
