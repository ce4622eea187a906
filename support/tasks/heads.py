"""
Heads: from hidden states to classes, numbers or tags, and to their loss.

    model = DecoderWithHead(Transformer.from_pretrained(folder), "classification", labels=2)
    model = AnyWithHead.from_pretrained(find_model("minilm"), "classification", labels=2)
    bidora.replace_linear_with_bidora(model, target_modules=["query", "value"])
    loss = model(input_ids, attention_mask, token_type_ids, targets=targets)

Parameter names are those of transformers' …ForSequenceClassification and …ForTokenClassification,
so PEFT's adapters keep the head (modules_to_save). AnyWithHead: support/tasks/any_model.py.

The head trains beside the adapters, as in the papers' experiments and in PEFT. BERT's pooler, which
stands before it, trains only if the checkpoint has none. What trains here belongs to the lower
level (bidora.py), in fp32 or finer, since small updates round to nothing in bf16.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

MOST = 100_000
KINDS = {  # the numbers of labels that each can have
    "classification": range(2, MOST + 1),  # one class a row
    "multi_label": range(1, MOST + 1),  # any number of classes a row
    "regression": range(1, 2),  # one number a row
    "tagging": range(2, MOST + 1),  # one class a token
}
IGNORED = -100  # the target of a token that has none


def fresh(layer):
    """Start a linear layer with weights from N(0, 0.02) and zero biases, as transformers does."""
    layer.reset_parameters()  # without its random draws, commands in results/ give other runs
    nn.init.normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Head(nn.Module):
    """What both models share. kind: a key of KINDS. labels: the number of classes, or 1."""

    def __init__(self, kind, labels):
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: choose {', '.join(KINDS)}")
        if type(labels) is not int or labels not in KINDS[kind]:
            least, most = KINDS[kind][0], KINDS[kind][-1]
            needed = f"an integer from {least} to {most}" if most > least else str(least)
            raise ValueError(f"labels={labels!r:.40} must be {needed} for {kind}")
        super().__init__()
        self.kind, self.labels = kind, labels

    @property
    def task_type(self):
        """PEFT's name of such a model, for the adapter's file."""
        return "TOKEN_CLS" if self.kind == "tagging" else "SEQ_CLS"

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, targets=None):
        """
        The logits, (B, labels) or, tagging, (B, T, labels); with targets, the loss, fp32 or finer:

            classification   cross-entropy in nats    targets (B,), 0 to labels - 1
            multi_label      binary cross-entropy     (B, labels), 0 to 1
            regression       squared error            (B,), finite numbers
            tagging          cross-entropy            (B, T), as in classification, or -100: none

        input_ids, attention_mask (0 at padding), token_type_ids (0 by default; left out by models
        without them): (B, T). Raises ValueError for targets that don't fit, and, but for tagging,
        for a row that is padded on the left.
        """
        if targets is not None:
            self.check_targets(targets, input_ids)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.kind != "tagging" and not real[:, 0].all():
            raise ValueError("a row begins with padding: pad the end")
        device = self.output.weight.device
        types = None if token_type_ids is None else token_type_ids.to(device)
        logits = self.logits(input_ids.to(device), real.bool().to(device), types)
        return logits if targets is None else self.loss(logits, targets)

    def check_targets(self, targets, input_ids):
        """Raise ValueError for targets of another shape, or out of range."""
        rows, tokens = input_ids.shape
        shapes = {"multi_label": (rows, self.labels), "tagging": (rows, tokens)}
        shape, given = shapes.get(self.kind, (rows,)), tuple(targets.shape)
        if given != shape:
            raise ValueError(f"targets are {given}: {self.kind} needs {shape} here")
        if self.kind == "tagging" and (targets == IGNORED).all():
            raise ValueError(f"all targets are {IGNORED}: a batch needs at least one tag")

        if self.kind == "regression":
            fits, needed = targets.isfinite(), "finite"
        elif self.kind == "multi_label":
            fits, needed = (targets >= 0) & (targets <= 1), "from 0 to 1"
        else:
            fits = (targets >= 0) & (targets < self.labels)
            needed = f"integers from 0 to {self.labels - 1}"
            if self.kind == "tagging":
                fits, needed = fits | (targets == IGNORED), f"{needed}, or {IGNORED}"
            fits &= not targets.is_floating_point()
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
        """Classes (B,), 0 or 1 a label (B, labels), numbers (B,), or a tag a token (B, T)."""
        if self.kind == "regression":
            return logits[:, 0]
        return (logits > 0).long() if self.kind == "multi_label" else logits.argmax(-1)


class DecoderWithHead(Head):
    """A model.Transformer, frozen but for adapters, with a fresh head for its output layer."""

    def __init__(self, decoder, kind, labels):
        super().__init__(kind, labels)
        decoder.requires_grad_(False)
        self.model = decoder.model
        self.__dict__["decoder"] = decoder  # a module would put its name before all parameters'
        width, weight = decoder.config.hidden_size, decoder.model.embed_tokens.weight
        self.score = fresh(nn.Linear(width, labels, bias=kind == "tagging"))
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.score.to(weight.device, self.dtype)

    @property
    def gradient_checkpointing(self):
        return self.decoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted):
        self.decoder.gradient_checkpointing = wanted

    @property
    def output(self):
        """The layer that gives the logits."""
        return self.score

    def logits(self, input_ids, real, token_type_ids=None):
        """The logits of forward. A row's last token, which has seen all others, stands for it."""
        ends = real & ~F.pad(real[:, 1:], (0, 1))
        wanted = real if self.kind == "tagging" else ends  # (B, T)
        places = [row.nonzero().flatten().tolist() for row in wanted]
        hidden = self.decoder.states(input_ids.tolist(), places)
        logits = self.score(hidden.to(self.dtype))
        if self.kind != "tagging":
            return logits
        every = logits.new_zeros(*real.shape, self.labels)
        return every.masked_scatter(real[..., None].to(logits.device), logits)
