"""
Heads: from hidden states to classes, numbers or tags, and to the loss of each.

    model = EncoderWithHead.from_pretrained(find_model("minilm"), "classification", labels=2)
    bidora.replace_linear_with_bidora(model, target_modules=["query", "value"])
    loss = model(input_ids, attention_mask, token_type_ids, targets=targets)

    model = DecoderWithHead(Transformer.from_pretrained(folder), "classification", labels=2)

Parameter names are those of transformers' …ForSequenceClassification and …ForTokenClassification,
so PEFT's adapters keep the head (modules_to_save), and the encoders' checkpoints load with it.

What trains, besides adapters, is the head, as when the papers' experiments, and PEFT's, fine-tune
such models. BERT's pooler, which stands before it, stays as it was pretrained; it trains only where
the checkpoint has none. All of it is a lower-level parameter (bidora.py), in fp32 or finer, since
small updates round to nothing in bf16.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from support.tasks.encoder import Encoder, dense
from support.weights import hf_format

MOST = 100_000
KINDS = {  # the numbers of labels that each can have
    "classification": range(2, MOST + 1),  # one class a row
    "multi_label": range(1, MOST + 1),  # any number of classes a row
    "regression": range(1, 2),  # one number a row
    "tagging": range(2, MOST + 1),  # one class a token
}
IGNORED = -100  # the target of a token that has none
MODULES = {"bert": "bert", "esm": "esm"}  # transformers' name of the encoder; others: "roberta"
ARCHITECTURES = {  # how transformers' names of models with a head begin
    "bert": "Bert",
    "roberta": "Roberta",
    "camembert": "Camembert",
    "xlm-roberta": "XLMRoberta",
    "esm": "Esm",
}
PROBLEMS = {  # transformers' names
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
}


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
        The logits, (B, labels) or (B, T, labels) for tagging; with targets, the mean loss, a scalar
        in fp32 or finer:

            classification   cross-entropy in nats    targets (B,), 0 to labels - 1
            multi_label      binary cross-entropy     (B, labels), 0 to 1
            regression       squared error            (B,), finite numbers
            tagging          cross-entropy            (B, T), as in classification, or -100: none

        Other arguments as in Encoder.forward; ESM and decoders leave token types out. Raises
        ValueError for targets that don't fit, and, but for tagging, for a row that is padded on the
        left.
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


class EncoderWithHead(Head):
    """
    An encoder, used as it is and frozen but for adapters, with a fresh head on it, drawn by torch's
    generator. No dropout, as in the encoder. kind, labels: as in Head.
    """

    def __init__(self, encoder, kind, labels):
        super().__init__(kind, labels)
        self.module = MODULES.get(encoder.config.hf["model_type"], "roberta")
        self.add_module(self.module, encoder)
        freeze(encoder)

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

    @property
    def output(self):
        """The layer that gives the logits."""
        head = self.classifier
        return head.out_proj if isinstance(head, TwoLayers) else head

    def logits(self, input_ids, real, token_type_ids):
        """As in forward; the first token stands for a row."""
        if not self.encoder.config.type_vocab_size:
            token_type_ids = None
        hidden = self.encoder(input_ids, real, token_type_ids).to(self.dtype)
        if self.encoder.pooler is not None:
            hidden = self.encoder.pooled(hidden)
        return self.classifier(hidden)

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

    def save_pretrained(self, folder, names=()):
        """
        Write config.json and model.safetensors, as transformers' …ForSequenceClassification or
        …ForTokenClassification loads them. names: of the labels.

        Raises ValueError for an adapted model: call `bidora.merge(model)` first.
        """
        hf = self.encoder.config.hf
        end = "ForTokenClassification" if self.kind == "tagging" else "ForSequenceClassification"
        names = list(names) or [f"LABEL_{i}" for i in range(self.labels)]
        config = hf | {"architectures": [ARCHITECTURES[hf["model_type"]] + end]}
        config |= {"id2label": dict(enumerate(names))}
        config |= {"label2id": {name: i for i, name in enumerate(names)}}
        if self.kind != "tagging":
            config["problem_type"] = PROBLEMS.get(self.kind, self.kind)

        tensors = {f"{self.module}.{name}": x for name, x in self.encoder.tensors().items()}
        head = self.classifier.state_dict()
        tensors |= {f"classifier.{name}": tensor for name, tensor in head.items()}
        hf_format.write(folder, config, tensors, self.dtype)


class DecoderWithHead(Head):
    """A model.Transformer, frozen but for adapters, with a fresh head for its output layer."""

    def __init__(self, decoder, kind, labels):
        super().__init__(kind, labels)
        freeze(decoder)
        self.model = decoder.model
        self.__dict__["decoder"] = decoder  # a module would put its name before all parameters'
        width, weight = decoder.config.hidden_size, decoder.model.embed_tokens.weight
        self.score = fresh(nn.Linear(width, labels, bias=kind == "tagging"))
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.score.to(weight.device, self.dtype)

    @property
    def output(self):
        """The layer that gives the logits."""
        return self.score

    def logits(self, input_ids, real, token_type_ids=None):
        """As in forward; the last token, which has seen all others, stands for a row."""
        ends = real & ~F.pad(real[:, 1:], (0, 1))
        wanted = real if self.kind == "tagging" else ends  # (B, T)
        # `supervised` gives the hidden states before each token that has a label.
        labels = F.pad(torch.where(wanted, 0, IGNORED), (1, 0), value=IGNORED)
        hidden, _ = self.decoder.supervised(F.pad(input_ids, (0, 1)), labels)
        logits = self.score(hidden.to(self.dtype))
        if self.kind != "tagging":
            return logits
        every = logits.new_zeros(*real.shape, self.labels)
        return every.masked_scatter(real[..., None].to(logits.device), logits)


def freeze(model):
    """Leave only adapters trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_" in name)
