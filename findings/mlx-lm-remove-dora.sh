#!/usr/bin/env bash
# mlx-lm's remove_lora_layers takes a model's adapters out again, as before a comparison with the base.
# Expected: it takes out the layers that linear_to_lora_layers put in, LoRA's and DoRA's.
# Seen (mlx-lm 0.32.2, mlx 0.32.4 on a CPU): LoRA's go. DoRA's stay, without a word, so "the base"
#   still computes the adapter.
# What follows: load the base anew.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(model_type="llama", rms_norm_eps=1e-5, vocab_size=40)
ids, off = mx.arange(9)[None], {}
for method in ("lora", "dora"):
    mx.random.seed(0)
    model = Model(ModelArgs(**sizes))
    before = model(ids)
    options = dict(rank=4, scale=2.0, dropout=0.0, keys=["self_attn.q_proj", "mlp.up_proj"])
    linear_to_lora_layers(model, 2, options, use_dora=method == "dora")
    for _, layer in model.named_modules():
        if "lora_b" in layer:
            layer.lora_b = mx.random.normal(layer.lora_b.shape)
    adapted = mx.abs(model(ids) - before).max().item()
    off[method] = mx.abs(remove_lora_layers(model)(ids) - before).max().item()
    print(f"{method}: logits off by {adapted:.3f} with adapters, {off[method]:.3f} after removal")
assert off["lora"] == 0 and off["dora"] > 0.01, "this has changed"
PY
