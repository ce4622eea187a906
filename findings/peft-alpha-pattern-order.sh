#!/usr/bin/env bash
# A LoRA configuration of PEFT, whose alpha_pattern has two patterns that fit one layer.
# Expected: the first pattern that fits counts, in the order written, before and after saving.
# Seen (peft 0.21.2): before saving, yes. adapter_config.json holds the patterns sorted by their text,
#   so after loading another pattern comes first. Nothing is said: the layer's scale changes from 16
#   to 2 here. The same loss of order in rank_pattern is met at once, by sizes that don't fit.
# What follows: write patterns of which only one fits each layer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model


def base():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"first": torch.nn.Linear(8, 8), "second": torch.nn.Linear(8, 8)})


patterns = {"second": 64, "[a-z]+": 8}
config = LoraConfig(r=4, lora_alpha=4, target_modules=["first", "second"], alpha_pattern=patterns)
model = get_peft_model(base(), config)
model.save_pretrained("adapter")
again = PeftModel.from_pretrained(base(), "adapter")

before = model.base_model.model["second"].scaling["default"]
after = again.base_model.model["second"].scaling["default"]
with open("adapter/adapter_config.json") as file:
    print("written:", list(patterns), "saved:", list(json.load(file)["alpha_pattern"]))
print(f"scale of the layer 'second': {before:g} as made, {after:g} as loaded")
assert (before, after) == (16, 2), "this has changed"
PY
