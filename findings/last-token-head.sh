#!/usr/bin/env bash
# A decoder's classification head reads each row's last token. Models without a padding token are
# commonly given pad_token_id = eos_token_id; here the rows end with the end token, and the
# attention mask says that it is there.
# Expected: the head reads the end token, which the attention mask marks as real.
# Seen (transformers 5.24.0): it reads the token before it. The last token is found by comparing ids
#   with pad_token_id; the attention mask is not asked. So the end token has no effect at all.
# What follows: pad with an id that occurs in no row, or take the hidden state oneself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

torch.manual_seed(0)
sizes = dict(vocab_size=41, n_embd=16, n_layer=2, n_head=4, num_labels=3)
model = GPT2ForSequenceClassification(GPT2Config(**sizes, eos_token_id=2, pad_token_id=2)).eval()
row = torch.tensor([[5, 6, 7, 2]])
with torch.no_grad():
    logits = model(row, attention_mask=torch.ones_like(row)).logits
    each = model.score(model.transformer(row).last_hidden_state)[0]
reads = [place for place in range(4) if torch.allclose(each[place], logits[0])]
print("a row of", row[0].tolist(), "with a mask of ones: the head reads place", reads)
assert reads == [2], "this has changed"
EOF
