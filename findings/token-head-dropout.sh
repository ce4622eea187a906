#!/usr/bin/env bash
# A GPT-2 with a head on each token, whose configuration sets every dropout that it names to 0.
# Expected: no dropout is left, so training mode and evaluation mode give the same logits.
# Seen (transformers 5.24.0): they differ. GPT2ForTokenClassification has a dropout of its own before
#   the head, which is 0.1 if the configuration has neither classifier_dropout nor hidden_dropout,
#   and GPT2Config has neither.
# What follows: whatever needs the same loss twice (a finite difference, a hypergradient, a resumed
#   run) should set the modules' rates, not the configuration's.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch
from transformers import GPT2Config, GPT2ForTokenClassification

sizes = dict(vocab_size=41, n_embd=16, n_layer=2, n_head=4, num_labels=3)
config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                    summary_first_dropout=0.0)
model = GPT2ForTokenClassification(config)
left = {name: x.p for name, x in model.named_modules() if isinstance(x, torch.nn.Dropout) and x.p}
ids = torch.arange(3, 20)[None]
difference = (model.train()(ids).logits - model.eval()(ids).logits).abs().max().item()
print("named in the configuration:", {k: x for k, x in config.to_dict().items() if "drop" in k})
print("dropouts left:", left, "- logits differ by", round(difference, 3))
assert left == {"dropout": 0.1} and difference > 0, "this has changed"
EOF
