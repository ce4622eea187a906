#!/usr/bin/env bash
# One passes generate a whole GenerationConfig of one's own with eos_token_id=None, to generate a
# fixed number of tokens from a model whose generation_config.json names an end token.
# Expected: the configuration that is passed counts: no token ends the text.
# Seen (transformers 5.24.0): the text ends at the file's end token. What is None in the passed
#   configuration is filled in from the model's own, so None can't say "none".
# What follows: for a fixed length, replace model.generation_config itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=4)).eval()
model.generation_config.eos_token_id = 2
own = GenerationConfig(max_new_tokens=400, do_sample=True, top_k=0, eos_token_id=None)
passed = model.generate(torch.tensor([[5]]), generation_config=own)
model.generation_config = own
replaced = model.generate(torch.tensor([[5]]))
print("passed:", passed.size(1) - 1, "new tokens, the last is", passed[0, -1].item())
print("replaced:", replaced.size(1) - 1, "new tokens")
assert passed.size(1) < 401 and passed[0, -1] == 2, "this has changed"
assert replaced.size(1) == 401
EOF
