#!/usr/bin/env bash
# PEFT's add_weighted_adapter makes one adapter of several.
# Expected: of one DoRA adapter with weight 1 it makes that adapter; or it refuses DoRA.
# Seen (peft 0.21.2, torch 2.13.0): every combination type gives an adapter with A and B of the old
#   one, but with a magnitude that is not trained: it starts anew at the norm of the base weight. The
#   output differs by as much as if the learnt magnitude had been thrown away, for LoRA by nothing.
# What follows: merge a DoRA adapter into its base, and combine merged weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from peft import LoraConfig, get_peft_model


def gap(kind, dora):
    """How far the combination of one adapter, with weight 1, is from that adapter."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(r=2, use_dora=dora, target_modules=["0"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
            if "magnitude" in name:
                p.mul_(1.5)  # as if it had been trained
    x = torch.randn(3, 8)
    before = model(x)
    model.add_weighted_adapter(["default"], [1.0], "again", combination_type=kind)
    model.set_adapter("again")
    layer = model.base_model.model[0]
    if dora:
        ratio = layer.lora_magnitude_vector["again"].weight / layer.base_layer.weight.norm(dim=1)
        print(f"  magnitude / ‖W0‖: {ratio.mean():.3f}, it was 1.500")
    return (model(x) - before).abs().max().item()


for kind in ("linear", "cat", "svd"):
    for dora in (False, True):
        found = gap(kind, dora)
        print(f"{kind}, {'DoRA' if dora else 'LoRA'}: the output differs by {found:.1e}")
        assert (found > 0.1) == dora, "this has changed"
EOF
