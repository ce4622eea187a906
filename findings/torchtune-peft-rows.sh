#!/usr/bin/env bash
# torchtune's checkpointer passes an adapter's tensors through tune_to_peft_adapter_weights, so that
# PEFT can load them.
# Expected: the weights that PEFT then computes are torchtune's, for each model that torchtune trains.
# Seen (torchtune 0.6.1): it turns the rows of q_proj's and k_proj's lora_B from LLaMA's order in
#   torchtune, where a rotary pair stands together, to Hugging Face's. It does so for Qwen2, too, whose
#   rows are in Hugging Face's order already: the update lands on other rows. And of LLaMA's DoRA it
#   leaves the magnitudes as they are, so each scales another row; the configuration that it writes
#   beside them has no use_dora, so PEFT leaves them out.
# What follows: convert adapter_model.pt, which holds torchtune's own tensors.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 torchtune==0.6.1 torchao==0.10.0
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
from torchtune.models.convert_weights import hf_to_tune, tune_to_peft_adapter_weights
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

heads = dict(num_heads=4, num_kv_heads=2, dim=32)
name, own = "model.layers.0.self_attn.q_proj", "layers.0.attn.q_proj"
torch.manual_seed(0)
A, B, m, W0 = torch.randn(4, 32), torch.randn(32, 4), torch.rand(32) + 1, torch.randn(32, 32)
results = {}
for family, convert in (("LLaMA", hf_to_tune), ("Qwen2", qwen2_hf_to_tune)):
    # What torchtune trains, for a weight that Hugging Face's file holds as W0, with rows in its order
    base = convert({f"{name}.weight": W0}, **heads)[f"{own}.weight"]
    merged = base + B @ A
    for method in ("LoRA", "DoRA"):
        tensors = {f"{own}.lora_a.weight": A, f"{own}.lora_b.weight": B}
        tensors |= {f"{own}.magnitude": m} if method == "DoRA" else {}
        peft = tune_to_peft_adapter_weights(tensors, **heads)
        peft = {key.rpartition("q_proj.")[2]: value for key, value in peft.items()}
        W = W0 + peft["lora_B.weight"] @ peft["lora_A.weight"]
        true = merged
        if method == "DoRA":
            true = m[:, None] * merged / merged.norm(dim=1, keepdim=True)
            W = peft["lora_magnitude_vector"][:, None] * W / W.norm(dim=1, keepdim=True)
        off = (convert({f"{name}.weight": W}, **heads)[f"{own}.weight"] - true).abs().max().item()
        results[family, method] = off
        print(f"{family}, {method}: the converted weight is off by {off:.3f}")
assert results["LLaMA", "LoRA"] < 1e-5, "this has changed"
assert min(off for key, off in results.items() if key != ("LLaMA", "LoRA")) > 0.1, "this has changed"
PY
