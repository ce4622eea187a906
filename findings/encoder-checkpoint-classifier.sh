#!/usr/bin/env bash
# A folder that holds T5's encoder alone (T5EncoderModel), as many protein and retrieval models are
# published, opened by AutoModelForSequenceClassification.
# Expected: a head on the encoder; or an error, since half of the model is missing.
# Seen (transformers 5.24.0): an encoder *and a decoder*, the decoder drawn at random, without an
#   error: 32 tensors are "newly initialized", of which the head is 4. Its logits come out of the
#   random decoder. AutoModelForTokenClassification uses the encoder alone.
# What follows: read output_loading_info, and refuse missing tensors outside the head.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers import T5Config, T5EncoderModel

sizes = dict(vocab_size=41, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
T5EncoderModel(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained("encoder")
lacks = {}
for kind in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    model, said = kind.from_pretrained("encoder", output_loading_info=True)
    lacks[kind.__name__] = sorted(said["missing_keys"])
    decoder = [name for name in lacks[kind.__name__] if "decoder" in name]
    count = len(lacks[kind.__name__])
    print(f"{type(model).__name__}: {count} tensors at random, {len(decoder)} of a decoder")
assert len(lacks["AutoModelForSequenceClassification"]) == 32, "this has changed"
assert lacks["AutoModelForTokenClassification"] == ["classifier.bias", "classifier.weight"]
EOF
