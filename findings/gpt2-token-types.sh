#!/usr/bin/env bash
# A training loop written for BERT asks every tokenizer for token_type_ids, which are all 0 for
# single texts, and passes them to the model.
# Expected: all-zero token types change nothing in GPT-2, which was trained without any.
# Seen (transformers 5.24.0): the logits change. GPT-2 looks types up in the *word* embeddings, so
#   type 0 adds the vector of token 0 to every position.
# What follows: pass types to a model only where its configuration has a type_vocab_size.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0 tokenizers==0.23.3
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

words = "a model that was trained on words".split()
plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "a"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
encoding = tokenizer("trained on words", return_token_type_ids=True, return_tensors="pt")
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=4)).eval()
with torch.no_grad():
    both, ids = model(**encoding).logits, model(encoding["input_ids"]).logits
difference = (both - ids).abs().max().item()
print("the tokenizer returns:", ", ".join(encoding))
print("types:", encoding["token_type_ids"].tolist(), "- logits differ by", round(difference, 3))
assert not encoding["token_type_ids"].any() and difference > 0.01, "this has changed"
EOF
