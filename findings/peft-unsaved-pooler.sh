#!/usr/bin/env bash
# A LoRA adapter for classification on DeBERTa, trained and saved by PEFT (task_type SEQ_CLS), then
# loaded over the same base in another process. The base's file, a pretrained one, has no pooler,
# so transformers draws the pooler at random; it stands between the encoder and the head.
# Expected: PEFT trains and saves what the head needs, as it does with the classifier; so the loaded
#   model gives the saved one's logits.
# Seen (peft 0.21.2, transformers 5.24.0): it gives other logits. PEFT keeps "classifier" and "score"
#   alone; the pooler stays frozen at its random values and is in no file. The next process draws
#   another. BERT's pooler, which most files have, hides this.
# What follows: modules_to_save=["pooler", "classifier"] for DeBERTa; or the seed decides the scores.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, DebertaV2Config, DebertaV2ForMaskedLM

sizes = dict(vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
DebertaV2ForMaskedLM(DebertaV2Config(**sizes, num_attention_heads=4)).save_pretrained("base")
ids = torch.arange(3, 20)[None]


def base(seed):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)


apart = []
for also in (None, ["pooler", "classifier"]):
    name = f"modules_to_save={also}"
    options = dict(task_type="SEQ_CLS", target_modules=["query_proj"], modules_to_save=also)
    model = get_peft_model(base(0), LoraConfig(**options)).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.5 * torch.randn_like(p)
    model.save_pretrained("adapter")
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base(1), "adapter").eval()(ids).logits
        apart.append((model(ids).logits - loaded).abs().max().item())
    print(f"{name}: saved and loaded logits differ by {apart[-1]:.3f}")
assert apart[0] > 1e-2 and apart[1] < 1e-6, "this has changed"
EOF
