"""
Heads on encoders: from hidden states to classes, numbers or tags, and to the loss of each.

    model = EncoderWithHead.from_pretrained(find_model("minilm"), "classification", labels=2)
    bidora.replace_linear_with_bidora(model, target_modules=["query", "value"])
    loss = model(input_ids, attention_mask, token_type_ids, targets=targets)

Parameter names are those of transformers' …ForSequenceClassification and …ForTokenClassification,
so their checkpoints load with the head, and PEFT's adapters keep it (modules_to_save).

What trains, besides adapters, is the head: `classifier`, as when the papers' experiments, and
PEFT's, fine-tune such models. BERT's pooler, which stands before it, stays as it was pretrained; it
trains only where the checkpoint has none. All of it is a lower-level parameter (bidora.py), in fp32
or finer, since small updates round to nothing in bf16.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from support import hf_format
from support.encoder import Encoder, dense

MOST = 100_000
KINDS = {  # the numbers of labels that each can have
    "classification": range(2, MOST + 1),  # one class a row
    "multi_label": range(1, MOST + 1),  # any number of classes a row
    "regression": range(1, 2),  # one number a row
    "tagging": range(2, MOST + 1),  # one class a token
}
IGNORED = -100  # the target of a token that has none
MODULES = {"bert": "bert", "esm": "esm"}  # transformers' name of the encoder; others: "roberta"


class TwoLayers(nn.Module):
    """The head of RoBERTa and ESM, on a row's first token."""

    def __init__(self, width, labels):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, labels)

    def forward(self, hidden):
        """(B, T, width) -> (B, labels)"""
        return self.out_proj(self.dense(hidden[:, 0]).tanh())


def fresh(module):
    """The module with weights from N(0, 0.02) and zero biases, as transformers starts heads."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    return module


class EncoderWithHead(nn.Module):
    """
    An encoder, used as it is and frozen but for adapters, with a fresh head on it, drawn by torch's
    generator. No dropout, as in the encoder.

    kind: a key of KINDS. labels: the number of classes; 1 for regression. Raises ValueError for
    others.
    """

    def __init__(self, encoder, kind, labels):
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: choose {', '.join(KINDS)}")
        if type(labels) is not int or labels not in KINDS[kind]:
            least, most = KINDS[kind][0], KINDS[kind][-1]
            needed = f"an integer from {least} to {most}" if most > least else str(least)
            raise ValueError(f"labels={labels!r:.40} must be {needed} for {kind}")

        super().__init__()
        self.kind, self.labels = kind, labels
        self.module = MODULES.get(encoder.config.hf["model_type"], "roberta")
        self.add_module(self.module, encoder)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_" in name)

        width, pooled = encoder.config.hidden_size, self.module == "bert" and kind != "tagging"
        if not pooled:
            encoder.pooler = None
        elif encoder.pooler is None:
            encoder.pooler = fresh(dense(width, width))
        layers = nn.Linear if pooled or kind == "tagging" else TwoLayers
        self.classifier = fresh(layers(width, labels))

        weight = encoder.embeddings.word_embeddings.weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.classifier.to(weight.device, self.dtype)
        if pooled:
            encoder.pooler.to(weight.device, self.dtype)

    @property
    def encoder(self):
        return getattr(self, self.module)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, targets=None):
        """
        The logits, (B, labels) or (B, T, labels) for tagging; with targets, the mean loss, a scalar
        in fp32 or finer.

            classification   cross-entropy in nats    targets (B,), 0 to labels - 1
            multi_label      binary cross-entropy     (B, labels), 0 to 1
            regression       squared error            (B,), finite numbers
            tagging          cross-entropy            (B, T), as in classification, or -100: none

        Other arguments as in Encoder.forward. Raises ValueError for targets that don't fit, and,
        where the first token is read, for a row that is padded on the left.
        """
        if targets is not None:
            self.check_targets(targets, input_ids)
        if self.kind != "tagging" and attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("a row begins with padding, but its first token is read: pad the end")

        hidden = self.encoder(input_ids, attention_mask, token_type_ids).to(self.dtype)
        if self.encoder.pooler is not None:
            hidden = self.encoder.pooled(hidden)
        logits = self.classifier(hidden)
        return logits if targets is None else self.loss(logits, targets)

    def check_targets(self, targets, input_ids):
        """Raise ValueError for targets of another shape, or out of range."""
        rows, tokens = input_ids.shape
        shapes = {"multi_label": (rows, self.labels), "tagging": (rows, tokens)}
        shape, given = shapes.get(self.kind, (rows,)), tuple(targets.shape)
        if given != shape:
            raise ValueError(f"targets are {given}: {self.kind} needs {shape} here")

        if self.kind == "regression":
            fits, needed = targets.isfinite(), "finite"
        elif self.kind == "multi_label":
            fits, needed = (targets >= 0) & (targets <= 1), "from 0 to 1"
        else:
            whole = not targets.is_floating_point()
            fits = whole & (targets >= 0) & (targets < self.labels)
            needed = f"integers from 0 to {self.labels - 1}"
        if self.kind == "tagging":
            fits, needed = fits | (whole & (targets == IGNORED)), f"{needed}, or {IGNORED}"
            if (targets == IGNORED).all():
                raise ValueError(f"all targets are {IGNORED}: a batch needs at least one tag")
        if not fits.all():
            raise ValueError(f"target {targets[~fits][0].item()}: {self.kind} needs {needed}")

    def loss(self, logits, targets):
        """The mean loss, as in forward. logits: (B, labels) or (B, T, labels)."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # after autocast
        if self.kind == "regression":
            return F.mse_loss(logits[:, 0], targets.to(logits))
        if self.kind == "multi_label":
            return F.binary_cross_entropy_with_logits(logits, targets.to(logits))
        targets = targets.to(logits.device, torch.long).flatten()
        return F.cross_entropy(logits.flatten(0, -2), targets, ignore_index=IGNORED)

    def predict(self, logits):
        """
        Classes, (B,); 0 or 1 a label, (B, labels); numbers, (B,); or a tag a token, (B, T).
        """
        if self.kind == "regression":
            return logits[:, 0]
        return (logits > 0).long() if self.kind == "multi_label" else logits.argmax(-1)

    @classmethod
    def from_pretrained(cls, folder, kind, labels, dtype=torch.float32, device="cpu"):
        """
        Load a Hugging Face folder, as Encoder.from_pretrained does, with the head if it holds one
        of this form, else with a fresh one.

        Raises as Encoder.from_pretrained, and ValueError for a head of another size.
        """
        model = cls(Encoder.from_pretrained(folder, dtype, device), kind, labels)
        found = hf_format.find_tensors(Path(folder))
        head = {f"classifier.{name}": x for name, x in model.classifier.state_dict().items()}
        for name, tensor in head.items() if head.keys() & found.keys() else ():
            path, shape = found.get(name, (None, "missing"))
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"{folder}: tensor {name} is {shape}, but the head has {tuple(tensor.shape)}: "
                    f"give the file's labels, or for a fresh head EncoderWithHead("
                    f"Encoder.from_pretrained(folder), {kind!r}, {labels})"
                )
            with safe_open(path, framework="pt") as file:
                tensor.copy_(file.get_tensor(name))
        return model.eval()


# ------------------------------------------------------------------------------ from text


def truncate(tokenizer, block_size, pair):
    """Set the tokenizer to rows of at most block_size tokens, unpadded. Raises ValueError."""
    special = tokenizer.num_special_tokens_to_add(pair)
    if block_size <= special:  # the library would silently not truncate
        raise ValueError(f"block_size={block_size} leaves no room beside {special} special tokens")
    tokenizer.enable_truncation(block_size)  # the longest text first
    tokenizer.no_padding()


def encode_pair(tokenizer, text, text_b=None, block_size=512):
    """
    (token ids, token types) of a text or a pair, with special tokens. Of a pair that is longer than
    block_size tokens, the longer text is cut first.

    tokenizer: a tokenizers.Tokenizer, whose truncation and padding are set. Raises ValueError for a
    block_size that holds special tokens only.
    """
    truncate(tokenizer, block_size, text_b is not None)
    encoding = tokenizer.encode(text, text_b)
    return encoding.ids, encoding.type_ids


def encode_words(tokenizer, words, targets, block_size=512):
    """
    (token ids, a target a token) of a row of words: a word's target is on its first token, and -100
    on all others. Words without a token, such as "", and words beyond block_size have no place.

    tokenizer: as in encode_pair; a byte-level one is set to begin each word with a space. Raises
    ValueError as there, and unless there is one target a word.
    """
    if len(words) != len(targets):
        raise ValueError(f"{len(targets)} targets for {len(words)} words: give one a word")
    truncate(tokenizer, block_size, pair=False)
    if hasattr(tokenizer.pre_tokenizer, "add_prefix_space"):
        tokenizer.pre_tokenizer.add_prefix_space = True
    encoding = tokenizer.encode(words, is_pretokenized=True)
    places = encoding.word_ids  # each token's word; None for special tokens
    return encoding.ids, [
        IGNORED if word in (None, before) else targets[word]
        for before, word in zip([None, *places], places)
    ]
