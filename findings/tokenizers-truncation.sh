#!/usr/bin/env bash
# tokenizers' enable_truncation(max_length) promises rows of at most max_length tokens.
# Expected: where max_length leaves no room for the special tokens, an error, or at most max_length.
# Seen (tokenizers 0.23.3): below the number of special tokens nothing is cut at all: with [CLS] and
#   [SEP], max_length=1 gives all eight tokens, and max_length=2 gives two; a pair with three special
#   tokens comes back whole at max_length=2.
# What follows: compare max_length with num_special_tokens_to_add(pair) yourself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3
"$work/venv/bin/python" - <<'EOF'
from tokenizers import Tokenizer, models, pre_tokenizers, processors

tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, "[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B [SEP]",
    special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
)
text = "a a a a a a"
for texts, most, expected in (
    ((text,), 1, 8),
    ((text,), 2, 2),
    ((text,), 3, 3),
    ((text, text), 2, 15),
    ((text, text), 4, 4),
):
    tokenizer.enable_truncation(most)
    found = len(tokenizer.encode(*texts).ids)
    print(f"{len(texts)} texts, max_length={most}: {found} tokens")
    assert found == expected, "this has changed"
EOF
