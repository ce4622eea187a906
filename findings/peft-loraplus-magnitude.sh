#!/usr/bin/env bash
# PEFT's LoRA+ optimizer (create_loraplus_optimizer), given a DoRA adapter.
# Expected: B alone learns at the higher rate, as LoRA+ means it (arXiv 2402.12354); the magnitude
#   learns at the base rate, beside A.
# Seen (peft 0.21.2): every trained vector is put into B's group, so DoRA's magnitude learns at
#   loraplus_lr_ratio times the rate: 16 times here. A magnitude starts at the norm of a weight's row,
#   B at zero: a rate meant for B can be far too much for it.
# What follows: group the parameters by hand if the adapter has magnitudes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$work/venv/bin/python" -W ignore - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

base = torch.nn.Sequential(torch.nn.Linear(8, 8))
model = get_peft_model(base, LoraConfig(r=2, use_dora=True, target_modules=["0"]))
optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)

names = {id(p): name.split(".")[-3] for name, p in model.named_parameters()}
rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
for name, rate in rates.items():
    print(f"{name}: {rate:.1e}")
assert rates["lora_A"] == 1e-4 and rates["lora_B"] == 16e-4
assert rates["lora_magnitude_vector"] == 16e-4, "this has changed"
PY
