"""
Encoders: BERT; RoBERTa, with CamemBERT and XLM-RoBERTa, which are the same; ESM-2, for proteins.

    encoder = Encoder.from_pretrained(find_model("minilm"))
    hidden = encoder(input_ids, attention_mask)  # (B, T, hidden_size)

What is notable about it, beside model.py:
- parameter names are Hugging Face's own, so a checkpoint loads without renaming, and its adapters
  are PEFT's; heads that the checkpoint carries, such as the masked-language head, are left out
- every token sees all others. BERT normalises after each block and adds a learned vector for each
  position; ESM-2 normalises before each block and has rotary positions
- rows lie end to end: norms and linears see no padding, attention alone does (class Packing)
- no dropout, in training either: a hypergradient needs the same loss at each call

BERT: arXiv 1810.04805; RoBERTa: 1907.11692; ESM-2: Lin et al., Science 379 (2023), p. 1123.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from support.fast import rotary
from support.fast.kernels import QUERIES, TWICE, recompute, recompute_module
from support.run.files import malformed, read_json
from support.weights import hf_format

# The values that transformers assumes for keys that config.json leaves out
COMMON = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
}
ROBERTA = COMMON | {"pad_token_id": 1}
DEFAULTS = {
    "bert": COMMON,
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
    "esm": COMMON | {"max_position_embeddings": 1026, "rope_theta": 10000.0},
}
ACT = {
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
TRAIN_MASKED = 0.15 * 0.8  # the share of tokens that were <mask> in ESM-2's training
INV_FREQ = "attention.self.rotary_embeddings.inv_freq"  # in each layer, in ESM-2's files


@dataclass
class EncoderConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int  # 0 for ESM
    layer_norm_eps: float
    act: str  # a key of ACT
    pre_norm: bool
    embeddings_norm: str | None  # its name in the files
    rope_theta: float | None  # None for learned positions
    pad_token_id: int | None  # positions are counted from the next number on; None: from 0
    mask_token_id: int | None  # of ESM's token dropout; None without it
    hf: dict  # the whole config.json, so that save_pretrained loses nothing

    @property
    def positions(self):
        """The most tokens a row; RoBERTa counts from the padding token's number on."""
        skipped = 0 if self.pad_token_id is None else self.pad_token_id + 1
        return self.max_position_embeddings - skipped

    @classmethod
    @malformed("config.json")
    def from_hf(cls, config_dict):
        """
        From the dict of a config.json. Raises ValueError, naming the key, for a model that this
        file does not compute, or a size that is missing or not a positive integer.
        """
        kind = config_dict.get("model_type")
        if kind not in DEFAULTS:
            raise ValueError(
                f"config.json: model_type {kind!r} is not an encoder that is supported; "
                f"these are: {', '.join(DEFAULTS)}"
            )
        c, esm = DEFAULTS[kind] | config_dict, kind == "esm"
        check_options(c)
        sizes = hf_format.read_sizes(c | {"num_key_value_heads": None})
        del sizes["num_key_value_heads"]

        rotates, last = c["position_embedding_type"] == "rotary", sizes["vocab_size"] - 1
        width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if width % heads or (rotates and width // heads % 2):  # pairs turn
            raise ValueError(
                f"config.json: hidden_size={width} / num_attention_heads={heads} must be an "
                f"{'even ' * rotates}integer"
            )
        counted, dropped = not rotates and kind != "bert", esm and c.get("token_dropout")
        before = "layer_norm" if c.get("emb_layer_norm_before") else None
        return cls(
            **sizes,
            type_vocab_size=0 if esm else whole(c, "type_vocab_size", 10**8),
            layer_norm_eps=positive(c, "layer_norm_eps"),
            act=c["hidden_act"],
            pre_norm=esm,
            embeddings_norm=before if esm else "LayerNorm",
            rope_theta=positive(c, "rope_theta") if rotates else None,
            pad_token_id=whole(c, "pad_token_id", last) if counted else None,
            mask_token_id=whole(c, "mask_token_id", last) if dropped else None,
            hf=dict(config_dict),
        )


def check_options(c):
    """Raise ValueError for what this file does not compute."""
    supported = {
        "hidden_act": list(ACT),
        "position_embedding_type": ["absolute", *["rotary"] * (c["model_type"] == "esm")],
    }
    for name, values in supported.items():
        if c[name] not in values:
            raise ValueError(
                f"config.json: {name} {c[name]!r:.40} is not supported for {c['model_type']}; "
                f"supported: {', '.join(values)}"
            )
    for name in ("is_decoder", "add_cross_attention", "is_folding_model", "quantization_config"):
        if c.get(name):
            raise ValueError(
                f"config.json: {name}={c[name]!r:.40} is not supported; an unquantised encoder is"
            )


def whole(c, name, most):
    """A value of config.json, if it is an integer from 0 to most. Raises ValueError."""
    if type(value := c.get(name)) is not int or not 0 <= value <= most:
        raise ValueError(f"config.json: {name}={value!r:.40} must be an integer from 0 to {most}")
    return value


def positive(c, name):
    """A value of config.json, if it is a positive number. Raises ValueError."""
    if not isinstance(value := c[name], (int, float)) or not 0 < value < 1e12:
        raise ValueError(f"config.json: {name}={value!r:.40} must be a positive number")
    return value


class Packing:
    """
    Which places of (B, T) hold the N real tokens. real: (B, T), False at padding.

    mask says the same to attention, (B, 1, 1, T); it is None where nothing is padded.
    """

    def __init__(self, real):
        self.shape, self.ragged = real.shape, not real.all()
        self.mask = real[:, None, None] if self.ragged else None
        if self.ragged:
            self.packed = real.flatten().nonzero()[:, 0]  # (N,) place of each token
            # (B·T,) token of each place; at padding any one will do
            self.padded = (real.flatten().cumsum(0) - 1).clamp_min(0)

    def pack(self, x):
        """(B, T, …) -> (N, …)"""
        x = x.flatten(0, 1)
        return x.index_select(0, self.packed) if self.ragged else x

    def unpack(self, x):
        """The inverse of pack. Padding holds copies of other tokens."""
        x = x.index_select(0, self.padded) if self.ragged else x
        return x.unflatten(0, self.shape)


def attention(q, k, v, mask):
    """Every token sees all real ones. q, k, v: (B, H, T, head_dim)."""
    if q.size(2) > QUERIES and TWICE.get():
        # For second derivatives: all scores at once would be kept.
        part = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
        return torch.cat([recompute(part, some, k, v) for some in q.split(QUERIES, dim=2)], dim=2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    attend = staticmethod(attention)  # research/published.py gives a layer one with dropout

    def __init__(self, c):
        super().__init__()
        self.heads = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        self.query = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(c.hidden_size, c.hidden_size)
        self.value = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, packing, angles):
        """x: (N, hidden_size). angles: cos and sin of rotary positions, (N, 1, head_dim) each."""
        q, k, v = (
            layer(x).unflatten(-1, self.heads) for layer in (self.query, self.key, self.value)
        )
        if angles is not None:
            q, k = rotary.rotate(q, *angles), rotary.rotate(k, *angles)
        q, k, v = (packing.unpack(t).transpose(1, 2) for t in (q, k, v))  # (B, H, T, head_dim)
        return packing.pack(self.attend(q, k, v, packing.mask).transpose(1, 2)).flatten(-2)


def dense(inputs, outputs):
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs)})


class Layer(nn.Module):
    """Norms come after each sum as in BERT, or before each block as in ESM-2."""

    def __init__(self, c):
        super().__init__()
        width, self.pre_norm, self.act = c.hidden_size, c.pre_norm, ACT[c.act]
        self.attention = nn.ModuleDict({"self": Attention(c), "output": dense(width, width)})
        self.intermediate = dense(width, c.intermediate_size)
        self.output = dense(c.intermediate_size, width)

        after = (self.attention.output, self.output)
        for owner in (self.attention, self) if c.pre_norm else after:
            owner.add_module("LayerNorm", nn.LayerNorm(width, c.layer_norm_eps))

    def forward(self, x, packing, angles):
        """x: (N, hidden_size)."""
        attention = self.attention
        if self.pre_norm:
            y = attention["self"](attention.LayerNorm(x), packing, angles)
            x = x + attention.output.dense(y)
            return x + self.mlp(self.LayerNorm(x))
        y = attention["self"](x, packing, angles)
        x = attention.output.LayerNorm(x + attention.output.dense(y))
        return self.output.LayerNorm(x + self.mlp(x))

    def mlp(self, x):
        return self.output.dense(self.act(self.intermediate.dense(x)))


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.rope_theta is None:
            self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        if c.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        if c.embeddings_norm:
            norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
            self.add_module(c.embeddings_norm, norm)

    def forward(self, input_ids, real, token_type_ids, packing):
        """input_ids, real, token_type_ids: (B, T) -> (N, hidden_size)."""
        c = self.c
        x = self.word_embeddings(packing.pack(input_ids))
        if c.mask_token_id is not None:
            # ESM-2 sets masked tokens to zero, and the others are larger for it, as in dropout.
            masked = input_ids == c.mask_token_id
            kept = 1 - masked.sum(1, keepdim=True) / real.sum(1, keepdim=True)
            x = (x * packing.pack(~masked * (1 - TRAIN_MASKED) / kept)[:, None]).to(x.dtype)
        if c.rope_theta is None:
            x = x + self.position_embeddings(packing.pack(self.positions(input_ids)))
        if c.type_vocab_size:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(packing.pack(types))
        return getattr(self, c.embeddings_norm)(x) if c.embeddings_norm else x

    def positions(self, input_ids):
        """(B, T): 0, 1, 2 … in BERT; in RoBERTa counted without padding, after padding's own."""
        first, most = 0, self.c.max_position_embeddings
        if (padding := self.c.pad_token_id) is None:
            positions = torch.arange(input_ids.size(1), device=input_ids.device)
            positions = positions.expand_as(input_ids)
        else:
            first, tokens = padding + 1, input_ids != padding
            positions = tokens.cumsum(1) * tokens + padding
        if positions.max() >= most:
            raise ValueError(
                f"{positions.max() + 1 - first} tokens in a row: the encoder has positions for "
                f"{most - first} only; shorten the rows"
            )
        return positions


class Encoder(nn.Module):
    """
    The encoder. gradient_checkpointing as in model.Transformer. pooler: whether it has BERT's
    layer for one vector a row.
    """

    def __init__(self, config, pooler=False):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        width = config.hidden_size
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        if config.pre_norm:
            self.encoder["emb_layer_norm_after"] = nn.LayerNorm(width, config.layer_norm_eps)
        self.pooler = dense(width, width) if pooler else None

        self.inv_freq = None  # no buffer: in fp32, whatever the weights' dtype
        if config.rope_theta is not None:
            rope = {"rope_type": "default", "rope_theta": config.rope_theta}
            with torch.device("cpu"):
                self.inv_freq, _ = rotary.frequencies(rope, width // config.num_attention_heads)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """
        The last layer's output, (B, T, hidden_size), zero at padding.

        input_ids, attention_mask (0 at padding), token_type_ids (0 by default): (B, T). Raises
        ValueError for other shapes, for token types in ESM, and for rows that are too long.
        """
        for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(f"{name} is {(*given.shape,)}, input_ids {(*input_ids.shape,)}")
        if token_type_ids is not None and not self.config.type_vocab_size:
            raise ValueError("token_type_ids: ESM has no token types; leave them out")

        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real = real.bool()
        packing = Packing(real)
        x = self.embeddings(input_ids, real, token_type_ids, packing)  # (N, hidden_size)

        angles = self.angles(real, packing, x.dtype)
        for layer in self.encoder.layer:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recompute_module(layer, x, packing=packing, angles=angles)
            else:
                x = layer(x, packing, angles)
        if self.config.pre_norm:
            x = self.encoder.emb_layer_norm_after(x)
        return packing.unpack(x) * real[..., None]

    def angles(self, real, packing, dtype):
        """cos and sin of the rotary positions, (N, 1, head_dim) each; None without them."""
        if self.inv_freq is None:
            return None
        positions = torch.arange(real.size(1), device=real.device).expand_as(real)
        return rotary.angles(packing.pack(positions), self.inv_freq.to(real.device), 1.0, dtype)

    def pooled(self, hidden):
        """
        tanh(W·x + b) of each row's first token, (B, hidden_size). Raises ValueError without pooler.
        """
        if self.pooler is None:
            raise ValueError("this encoder has no pooler: its file holds no pooler.dense.weight")
        return self.pooler.dense(hidden[:, 0]).tanh()

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """
        Load a Hugging Face folder: config.json and model.safetensors, or shards with their index.

        Heads are left out. Raises FileNotFoundError when a file is missing, ValueError for an
        unsupported model, a damaged file, or a missing, unexpected or misshapen tensor.
        """
        folder = Path(folder)
        config = EncoderConfig.from_hf(read_json(folder / "config.json"))
        found = find_tensors(folder, config)
        with torch.device("meta"), hf_format.WithoutValues():
            model = cls(config, pooler="pooler.dense.weight" in found)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if "inv_freq" in found:
            expected["inv_freq"] = tuple(model.inv_freq.shape)
        hf_format.check_tensors(found, expected, folder)

        for name in expected:
            path, _, key = found[name]
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(key)
            if name == "inv_freq":
                model.inv_freq = tensor.to(torch.float32, copy=True)
                continue
            owner, _, kind = name.rpartition(".")
            tensor = tensor.to(device, dtype, copy=True)
            setattr(model.get_submodule(owner), kind, nn.Parameter(tensor))
        return model.eval()

    def save_pretrained(self, folder):
        """
        Write config.json and model.safetensors, as transformers' AutoModel loads them; no heads.

        Raises ValueError for an adapted model: call `bidora.merge(model)` first.
        """
        # The architecture may be one with a head.
        config = {key: x for key, x in self.config.hf.items() if key != "architectures"}
        dtype = self.embeddings.word_embeddings.weight.dtype
        hf_format.write(folder, config, self.tensors(), dtype)

    def tensors(self):
        """Everything that a file of the encoder holds, by name. Raises as save_pretrained."""
        tensors = self.state_dict()
        if any("lora_" in name for name in tensors):
            raise ValueError(
                "the encoder holds adapters, which are not written here: call merge(encoder) first"
            )
        if self.inv_freq is not None:
            for i in range(self.config.num_hidden_layers):
                tensors[f"encoder.layer.{i}.{INV_FREQ}"] = self.inv_freq.clone()
        return dict(tensors)


def find_tensors(folder, config):
    """
    The encoder's tensors in a folder, {name in Encoder: (file, shape, name in the file)}, and as
    "inv_freq" the rotary frequencies if they are there. Heads are left out.
    """
    unused = ["embeddings.position_ids"]  # 0, 1, 2 …
    if config.rope_theta is None:
        unused.append("inv_freq")
    else:  # some files of ESM-2 hold learned positions, too
        unused.append("embeddings.position_embeddings.weight")

    found = {}
    for key, place in hf_format.find_tensors(folder).items():
        name = key.removeprefix("bert.").removeprefix("roberta.").removeprefix("esm.")
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):  # of old LayerNorms
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if name.endswith("rotary_embeddings.inv_freq"):  # alike in all layers
            name = "inv_freq"
        parts = ("embeddings.", "encoder.", "pooler.", "inv_freq")  # all else belongs to heads
        if name.startswith(parts) and name not in unused:
            found[name] = *place, key
    return found
