#!/usr/bin/env bash
# seqeval's F1 of tags in the BILOU scheme (L: last word, U: an entity of one word), by its defaults.
# Expected: two entities of one word each (U U) are not one entity of two words (B L); or the tags L
#   and U are refused, since the default counts as conlleval does, which knows B, I, E and S.
# Seen (seqeval 1.2.2): L and U are taken like I. "U-PER U-PER" against "B-PER L-PER" counts as
#   right, F1 is 1.0. With mode="strict" and scheme=BILOU it is 0.4.
# What follows: name the scheme, or turn L into E and U into S first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet numpy==2.2.6 scikit-learn==1.7.2 seqeval==1.2.2
"$work/venv/bin/python" - <<'PY'
from seqeval.metrics import f1_score
from seqeval.scheme import BILOU

right = [["U-PER", "U-PER", "O", "B-LOC", "L-LOC"]]
predicted = [["B-PER", "L-PER", "O", "B-LOC", "L-LOC"]]
default = f1_score(right, predicted)
strict = f1_score(right, predicted, mode="strict", scheme=BILOU)
swap = str.maketrans("LU", "ES")
renamed = f1_score(*([[t[0].translate(swap) + t[1:] for t in tags] for tags in side]
                     for side in (right, predicted)))
print(f"by default {default:.2f}, strictly {strict:.2f}, with E and S {renamed:.2f}")
assert (default, round(strict, 2), round(renamed, 2)) == (1.0, 0.4, 0.4), "this has changed"
PY
