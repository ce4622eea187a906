"""
The transformer: LLaMA, Mistral, Qwen2 and Qwen3 decoders that read and write Hugging Face safetensors folders.

What is notable about it:
- parameter names are Hugging Face's own, so a checkpoint loads without a table of names
- RMSNorm before each block, rotary positions, grouped-query attention, SwiGLU, no dropout
- forward(input_ids, labels) computes logits only where a label asks for them: with one answer token a row, the
  vocabulary's head (49k to 150k rows) costs almost nothing
- no padding mask: batches are padded on the right, and causal attention never looks there
- normalisation and loss in fp32, everything else in the weights' dtype

LLaMA: arXiv 2302.13971; rotary positions: 2104.09864; grouped queries: 2305.13245; sliding windows (Mistral): 2310.06825;
Qwen2: 2407.10671; norms on queries and keys (Qwen3): 2505.09388.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from support.files import malformed, read_json, replacing, write_json
from support.kernels import ROWS, cross_entropy
from support.quantized import QuantizedLinear, kind_of, pack

# What transformers takes for a key that config.json leaves out
COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "sliding_window": None,
    "rms_norm_eps": 1e-6,
}
DEFAULTS = {
    "llama": COMMON | {"max_position_embeddings": 2048},
    "mistral": COMMON
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": COMMON
    | {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": COMMON
    | {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "head_dim": 128,
    },
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict  # rope_type, rope_theta, and what the type needs
    windows: list  # for each layer: how many tokens back it sees, itself included, or None: all
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hf: dict  # the whole config.json, so that save_pretrained loses nothing

    @classmethod
    @malformed("config.json")
    def from_hf(cls, config_dict):
        """
        Read a Hugging Face config.json, given as a dict, in the spelling of transformers 4 or 5.

        Raises ValueError, naming the key, for what this model does not compute: another model_type, an unknown kind of rotary
        scaling, another activation, a checkpoint that is quantised already, or a size that is missing or no number.
        """
        kind = config_dict.get("model_type")
        if kind not in DEFAULTS:
            raise ValueError(
                f"config.json: model_type {kind!r} is not supported; these are: {', '.join(DEFAULTS)}"
            )
        c = DEFAULTS[kind] | config_dict
        if c.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"config.json: hidden_act {c['hidden_act']!r} is not supported; 'silu' is"
            )
        if c.get("quantization_config"):
            raise ValueError(
                "config.json: the checkpoint is quantised already (quantization_config), which is not supported: "
                "take the unquantised one, and quantise it when it is loaded"
            )
        rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
        plain = isinstance(rope, dict) and not any(
            isinstance(value, dict) for value in rope.values()
        )
        rope = (
            {"rope_theta": c.get("rope_theta") or 10000.0, **rope} if plain else {"rope_type": rope}
        )
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if (
            rope["rope_type"] not in ROPE_TYPES
            or rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1)) != 1
        ):
            raise ValueError(
                f"config.json: rotary positions {rope} are not supported; these rope types are, the same in all layers "
                f"and over whole heads: {', '.join(ROPE_TYPES)}"
            )
        original = (
            c.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or c["max_position_embeddings"]
        )
        rope["original_max_position_embeddings"] = original
        if rope["rope_type"] == "yarn" and "factor" in rope and rope["factor"] is None:
            rope["factor"] = c["max_position_embeddings"] / original
        sizes = {
            name: c.get(name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
            )
        }
        sizes["num_key_value_heads"] = c["num_key_value_heads"] or sizes["num_attention_heads"]
        for name, value in sizes.items():
            if name not in c:
                raise ValueError(f"config.json: {name!r} is missing")
            if type(value) is not int or value < 1:
                raise ValueError(f"config.json: {name}={value!r} is no positive whole number")
        head_dim = c["head_dim"] or sizes["hidden_size"] // sizes["num_attention_heads"]
        windows = [c["sliding_window"]] * sizes["num_hidden_layers"]
        if kind in ("qwen2", "qwen3"):  # its first layers see everything
            types = c.get("layer_types") or [
                "full_attention" if i < c["max_window_layers"] else "sliding_attention"
                for i in range(sizes["num_hidden_layers"])
            ]
            windows = [
                c["sliding_window"]
                if c.get("use_sliding_window") and t == "sliding_attention"
                else None
                for t in types
            ]
        numbers = [
            c["rms_norm_eps"],
            head_dim,
            *(value for value in windows if value is not None),
            *(
                rope[name]
                for name in rope.keys()
                & {"rope_theta", "factor", "original_max_position_embeddings"}
            ),
        ]
        if (
            not all(isinstance(value, (int, float)) and value > 0 for value in numbers)
            or len(windows) != sizes["num_hidden_layers"]
        ):
            raise ValueError(
                f"config.json: rms_norm_eps, head_dim, sliding_window and the rope's numbers must be positive, not {numbers}"
            )
        config = cls(
            **sizes,
            head_dim=head_dim,
            rms_norm_eps=c["rms_norm_eps"],
            rope=rope,
            windows=windows,
            tie_word_embeddings=bool(c.get("tie_word_embeddings")),
            qkv_bias=kind == "qwen2" or (kind != "mistral" and bool(c.get("attention_bias"))),
            o_bias=kind in ("llama", "qwen3") and bool(c.get("attention_bias")),
            mlp_bias=kind == "llama" and bool(c.get("mlp_bias")),
            qk_norm=kind == "qwen3",
            hf=dict(config_dict),
        )
        try:
            rotary_frequencies(config)  # tries the rope's other numbers
        except (KeyError, TypeError, ArithmeticError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"config.json: rotary positions {rope}: {error} is missing or no number"
            ) from None
        return config


def rotary_frequencies(c):
    """
    The angle a position turns each pair of a head by, (head_dim / 2,) in fp32, and the factor that cos and sin are scaled by.

    Longer contexts than the model was pretrained on: 'linear' slows all pairs down; 'llama3' (arXiv 2407.21783, section 3.4.2;
    formula: its reference code) only the slow ones; 'yarn' (arXiv 2309.00071, section 3.2) too, by a ramp, and sharpens attention.
    """
    rope, d = c.rope, c.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, d, 2).float() / d)
    if rope["rope_type"] in (
        "default",
        "dynamic",
    ):  # 'dynamic' changes them beyond the trained length only
        return frequencies, 1.0
    factor, trained = rope["factor"], rope["original_max_position_embeddings"]
    slowed = frequencies / factor
    if rope["rope_type"] == "linear":
        return slowed, 1.0
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = trained * frequencies / (2 * math.pi)  # in the trained length
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * slowed + keep * frequencies, 1.0

    def pair_that_turns(times):  # in the trained length; as a fraction of pairs
        return d * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first, last = (
        pair_that_turns(rope.get("beta_fast") or 32),
        pair_that_turns(rope.get("beta_slow") or 1),
    )
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    keep = 1 - ((torch.arange(d // 2) - first) / max(last - first, 0.001)).clamp(0, 1)

    def sharpening(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        scale = (
            sharpening(rope["mscale"]) / sharpening(rope["mscale_all_dim"])
            if both
            else sharpening(1)
        )
    return (1 - keep) * slowed + keep * frequencies, scale


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + head_dim/2]) by its position's angle. x: (B, H, T, head_dim); cos, sin: (T, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c, window):
        super().__init__()
        self.c, self.window = c, window
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache):
        B, T, _ = x.shape
        q = rotate(
            self.q_norm(self.q_proj(x).view(B, T, -1, self.c.head_dim)).transpose(1, 2), cos, sin
        )  # (B, H, T, head_dim)
        k = rotate(
            self.k_norm(self.k_proj(x).view(B, T, -1, self.c.head_dim)).transpose(1, 2), cos, sin
        )  # (B, Hkv, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.c.head_dim).transpose(1, 2)  # (B, Hkv, T, head_dim)
        if cache is not None:  # this layer's keys and values of the tokens before
            if cache:
                k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
            cache.update(k=k, v=v)
        S = k.size(2)  # all tokens so far: T new ones and those in the cache
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and S <= 256:
            # The fused kernel's backward pass in bf16 is slow on CPUs: for 8 × 64 tokens 10 ms a layer, and 2 ms in fp32, which is exacter too.
            q, k, v = q.float(), k.float(), v.float()
        beyond = self.window is not None and S > self.window
        mask = None
        if beyond or T not in (1, S):
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
            if beyond:
                mask = mask.triu(S - T - self.window + 1)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            enable_gqa=self.c.num_key_value_heads != self.c.num_attention_heads,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, window):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, window)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Linear):
    def forward(self, hidden, targets=None):
        """hidden: (..., hidden_size). The logits, (..., vocab); with targets (N,) for hidden (N, hidden_size) the loss, over a frozen weight."""
        return (
            super().forward(hidden)
            if targets is None
            else cross_entropy(hidden, self.weight, targets)
        )


def find_tensors(folder):
    """
    The tensors of a folder's safetensors files, by name: (file, shape).

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, each with what to do.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map is missing or empty")
        names = sorted(set(map(str, weight_map.values())))
        if strange := [
            name for name in names if Path(name).name != name or not name.endswith(".safetensors")
        ]:
            raise ValueError(
                f"{index}: {strange[0]!r} is no name of a safetensors file in this folder"
            )
    elif not (folder / names[0]).exists() and any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} holds its weights as .bin files only. Those are pickles, which can run any code when they are "
            f"opened, so they are not read: take the model's safetensors files"
        )
    elif not (folder / names[0]).exists() and any(folder.glob("model-*.safetensors")):
        raise FileNotFoundError(f"{index} is missing, though shards are there: download it too")
    tensors = {}
    for path in (folder / name for name in names):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing"
                + (f", though {index.name} lists it: download it too" if index.exists() else "")
            )
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if not key.endswith(
                        "rotary_emb.inv_freq"
                    ):  # old LLaMA files hold this table; it is computed here
                        tensors[key] = path, tuple(file.get_slice(key).get_shape())
        except SafetensorError as error:
            with open(path, "rb") as file:
                if file.read(40).startswith(b"version https://git-lfs"):
                    raise ValueError(
                        f"{path} is a git-lfs pointer, not the weights: fetch them with `git lfs pull`"
                    ) from None
            raise ValueError(
                f"{path} is damaged or no safetensors file ({error}): download it again"
            ) from None
    return tensors


class Transformer(nn.Module):
    """
    The language model. gradient_checkpointing (an attribute, off): each block's activations are dropped after the forward pass and
    computed again in the backward one: less memory for one more forward pass (arXiv 1604.06174).
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, window) for window in config.windows),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden_states(self, input_ids, caches=None):
        """The last layer's normalised output, (B, T, hidden_size). caches: one dict a layer, updated in place."""
        T = input_ids.size(1)
        past = caches[0]["k"].size(2) if caches and caches[0] else 0
        trained = self.config.max_position_embeddings
        if self.config.rope["rope_type"] == "dynamic" and past + T > trained:
            raise ValueError(
                f"{past + T} tokens: with rope type 'dynamic' only the {trained} that the model was trained on are supported"
            )
        x = self.model.embed_tokens(input_ids)  # (B, T, hidden_size)
        frequencies, scale = rotary_frequencies(self.config)
        positions = torch.arange(past, past + T, device=x.device).float()
        angles = torch.outer(positions, frequencies.to(x.device))  # (T, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, head_dim)
        cos, sin = (scale * angles.cos()).to(x.dtype), (scale * angles.sin()).to(x.dtype)
        for i, block in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, None, use_reentrant=False)
            else:
                x = block(x, cos, sin, caches[i] if caches else None)
        return self.model.norm(x)

    def forward(self, input_ids, labels=None):
        """
        Without labels: the logits, (B, T, vocab). With labels: the mean cross-entropy in nats, a scalar.

        input_ids: (B, T). labels: (B, T), -100 where nothing is asked; shifted inside, so labels[t] is the token that
        position t-1 should predict.
        """
        if labels is None:
            return self.lm_head(self.hidden_states(input_ids))
        hidden, targets = self.asked(input_ids, labels)
        if (
            isinstance(self.lm_head, Head)
            and not self.lm_head.weight.requires_grad
            and len(targets)
        ):
            return self.lm_head(hidden, targets)
        return F.cross_entropy(self.lm_head(hidden).float(), targets)

    def asked(self, input_ids, labels):
        """Where labels ask for a token: the hidden states that predict it, (asked, hidden_size), and the token, (asked,). Arguments as forward's."""
        asked = labels[:, 1:] != -100
        return self.hidden_states(input_ids)[:, :-1][asked], labels[:, 1:][asked]

    @torch.no_grad()
    def totals(self, input_ids, labels):
        """Of the tokens that labels ask for: the sum of the cross-entropies in nats, how many are the likeliest, how many there are."""
        hidden, targets = self.asked(input_ids, labels)
        loss = right = 0
        for part, answers in zip(hidden.split(ROWS), targets.split(ROWS)):  # not all logits at once
            logits = self.lm_head(part).float()  # (rows, vocab)
            loss += F.cross_entropy(logits, answers, reduction="sum").item()
            right += (logits.argmax(1) == answers).sum().item()
        return loss, right, len(targets)

    @torch.no_grad()
    def score(self, prompts, answers):
        """
        log p(answer | prompt) in nats, summed over the answer's tokens: (prompts, answers). Both are lists of token id lists.

        What all prompts begin with (a system message, the question) is computed once. Answers that differ in their last
        token only share a forward pass, so one-token labels cost one pass in all.
        """
        device = self.lm_head.weight.device
        scores = torch.zeros(len(prompts), len(answers), device=device)
        rows = torch.arange(len(prompts), device=device)
        shared = min(
            len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1
        )  # leave each prompt its last token
        prefix = [{} for _ in self.model.layers]
        if shared:
            self.hidden_states(torch.tensor([prompts[0][:shared]], device=device), prefix)
        for head in {tuple(answer[:-1]) for answer in answers}:
            ids = [torch.tensor([*prompt[shared:], *head], device=device) for prompt in prompts]
            caches = [
                {name: t.expand(len(prompts), -1, -1, -1) for name, t in layer.items()}
                for layer in prefix
            ]
            x = self.hidden_states(
                nn.utils.rnn.pad_sequence(ids, batch_first=True), caches
            )  # (P, T, hidden_size)
            first = torch.tensor(
                [len(prompt) - shared - 1 for prompt in prompts], device=device
            )  # predicts the answer's first token
            log_p = [
                self.lm_head(x[rows, first + i]).float().log_softmax(-1)
                for i in range(len(head) + 1)
            ]  # each (P, vocab)
            for column, answer in enumerate(answers):
                if tuple(answer[:-1]) == head:
                    scores[:, column] = sum(log_p[i][:, token] for i, token in enumerate(answer))
        return scores

    @torch.no_grad()
    def generate(
        self, input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_ids=()
    ):
        """
        Sample a continuation; returns input_ids with the new tokens behind, (B, T + new).

        input_ids: (B, T), rows of equal length. temperature 0 takes the likeliest token. top_k keeps the k likeliest
        tokens, top_p the smallest set that holds this share of the probability (nucleus sampling, arXiv 1904.09751).
        Ends after max_new_tokens, or when every row has produced one of stop_ids; a row that stopped repeats its stop token.
        """
        caches = [{} for _ in self.model.layers]
        stop = torch.tensor(list(stop_ids), device=input_ids.device)
        stopped = torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)
        new = input_ids  # what the cache has not seen yet
        for _ in range(max_new_tokens):
            logits = self.lm_head(self.hidden_states(new, caches)[:, -1]).float()  # (B, vocab)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                logits = logits / temperature
                if top_k is not None:
                    logits[
                        logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    ] = -torch.inf
                if top_p is not None:
                    ordered, order = logits.softmax(-1).sort(descending=True)
                    beyond = (
                        ordered.cumsum(-1) - ordered >= top_p
                    )  # the likeliest token always stays
                    logits[torch.zeros_like(beyond).scatter(1, order, beyond)] = -torch.inf
                token = torch.multinomial(logits.softmax(-1), 1)  # (B, 1)
            token = torch.where(stopped[:, None], input_ids[:, -1:], token)
            input_ids = torch.cat((input_ids, token), dim=1)
            stopped |= torch.isin(token[:, 0], stop)
            if stopped.all():
                break
            new = token
        return input_ids

    @classmethod
    def from_pretrained(
        cls, folder, dtype=torch.float32, device="cpu", quantize=None, mapped=False
    ):
        """
        Load a Hugging Face folder: config.json and model.safetensors, or shards with their index.

        quantize: None, or 'nf4', 'fp4', 'int8' for the blocks' linear layers; embeddings, norms and the head stay in dtype.
        mapped: leave what has this dtype and device in the files' pages, which the system reads when asked, once for all processes.
        Raises FileNotFoundError when a file is missing, ValueError for an unsupported model, a damaged file, or a tensor
        that is missing, unexpected or misshapen.
        """
        folder = Path(folder)
        config = ModelConfig.from_hf(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = cls(config)
        found = find_tensors(folder)
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del expected["lm_head.weight"]
            if "lm_head.weight" in found:  # some files hold the shared matrix twice
                both = [
                    safe_open(found[key][0], "pt").get_tensor(key)
                    for key in ("lm_head.weight", "model.embed_tokens.weight")
                    if key in found
                ]
                if len(both) == 2 and not torch.equal(*both):
                    raise ValueError(
                        f"{folder}: config.json ties the head to the embeddings, but the files hold another lm_head.weight: "
                        f"set tie_word_embeddings to false in config.json"
                    )
                del found["lm_head.weight"], both
        for key, shape in expected.items():
            if key not in found:
                raise ValueError(f"{folder}: tensor {key} is missing")
            if found[key][1] != shape:
                raise ValueError(
                    f"{folder}: tensor {key} is {found[key][1]}, but config.json asks for {shape}"
                )
        unexpected = sorted(found.keys() - expected.keys())
        if unexpected:
            raise ValueError(
                f"{folder}: unexpected tensor {unexpected[0]} (and {len(unexpected) - 1} more)"
            )
        # The largest first, and the file closed after each: its pages go, so that beside what is loaded there is one tensor at most.
        for key in sorted(expected, key=lambda key: -math.prod(expected[key])):
            with safe_open(found[key][0], framework="pt") as file:
                tensor = file.get_tensor(key).to(device, dtype, copy=not mapped)
            path, _, name = key.rpartition(".")
            layer = model.get_submodule(path)
            if (
                quantize
                and isinstance(layer, nn.Linear)
                and name == "weight"
                and layer is not model.lm_head
            ):
                packed = QuantizedLinear(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    pack(tensor, quantize),
                )
                model.set_submodule(path, packed)
            else:
                setattr(layer, name, nn.Parameter(tensor))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    def save_pretrained(self, folder):
        """
        Write config.json and model.safetensors, as Hugging Face transformers loads them.

        Raises ValueError for an adapted or a quantised model: `bidora.merge(model)` first.
        """
        if any(
            "lora_" in key or kind_of(value)
            for key, value in self.state_dict(keep_vars=True).items()
        ):
            raise ValueError(
                "the model holds adapters or quantised weights, which are not written here: call merge(model) first"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()
        }
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        config = {
            key: value for key, value in self.config.hf.items() if key != "torch_dtype"
        }  # the older spelling of dtype
        config["dtype"] = str(self.lm_head.weight.dtype).removeprefix("torch.")
        with replacing(folder / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(folder / "config.json", config)
        (folder / "model.safetensors.index.json").unlink(
            missing_ok=True
        )  # of shards that lay there: they are not this model's
