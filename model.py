"""
The transformer: LLaMA, Mistral, Qwen2 and Qwen3 decoders.

What is notable about it:
- parameter names are Hugging Face's own, so a checkpoint loads without renaming
- RMSNorm before each block, rotary positions, grouped-query attention, SwiGLU, no dropout
- forward(input_ids, labels) computes logits only at supervised positions: with one answer token
  per row, the head (49k to 150k vocabulary entries) costs almost nothing
- in training, rows lie end to end and what they all begin with passes once: in classification,
  the question; norms, linears and MLPs see no padding and no token twice (support/fast/rows.py)
- normalisation and loss in fp32, everything else in the weights' dtype

LLaMA: arXiv 2302.13971; grouped queries: 2305.13245; sliding windows (Mistral): 2310.06825;
Qwen2: 2407.10671; norms on queries and keys (Qwen3): 2505.09388.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.fast import kernels, rotary
from support.fast.kernels import QUERIES, ROWS, TWICE, cross_entropy, recompute, recompute_module
from support.fast.rows import Rows
from support.run.files import read_json
from support.tasks import any_model, likelihood
from support.weights import hf_format


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
    rope: dict  # rope_type, rope_theta, and the numbers that the type needs
    windows: list  # per layer: how many tokens back it sees, itself included; None for all
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hf: dict  # the whole config.json, so that save_pretrained loses nothing

    @classmethod
    def from_hf(cls, config_dict):
        """From the dict of a config.json. Raises ValueError as hf_format.read_config does."""
        return cls(**hf_format.read_config(config_dict))


class Attention(nn.Module):
    def __init__(self, c, window):
        super().__init__()
        self.c, self.window = c, window
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.o_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, rows=None):
        """x: (B, T, hidden_size); of Rows (N, hidden_size)."""
        heads = (-1, self.c.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))
        v = self.v_proj(x).unflatten(-1, heads)  # (B, T, Hkv, head_dim) or (N, Hkv, head_dim)
        q, k = rotary.rotate(q, cos, sin), rotary.rotate(k, cos, sin)

        if rows is not None:
            return self.o_proj(self.over_rows(q, k, v, rows).flatten(-2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H or Hkv, T, head_dim)
        return self.o_proj(self.attention(q, k, v).transpose(1, 2).flatten(-2))

    def over_rows(self, q, k, v, rows):
        """Each row's own tokens see the shared ones and their own. q: (N, H, head_dim)."""
        own_q, own_k, own_v = (rows.unpack(t) for t in (q, k, v))  # (B, H or Hkv, S, head_dim)
        if not rows.shared:
            return rows.pack(self.attention(own_q, own_k, own_v))

        first_q, first_k, first_v = (t[None, : rows.shared].transpose(1, 2) for t in (q, k, v))
        shared = self.attention(first_q, first_k, first_v)  # (1, H, P, head_dim)
        every = (len(own_k), -1, -1, -1)
        k = torch.cat((first_k.expand(every), own_k), dim=2)  # (B, Hkv, P + S, head_dim)
        v = torch.cat((first_v.expand(every), own_v), dim=2)
        own = self.attention(own_q, k, v)
        return torch.cat((shared[0].transpose(0, 1), rows.pack(own)))

    def attention(self, q, k, v):
        """The last T of S tokens see all before them: (B, H, T, head_dim), in q's dtype."""
        (T, S), dtype = (q.size(2), k.size(2)), q.dtype
        twice = TWICE.get()  # whether second derivatives will be taken: no fused attention
        if T > QUERIES and twice:  # all scores would be kept
            ends = [*range(QUERIES, T, QUERIES), T]
            parts = [
                recompute(self.attention, part, k[:, :, : S - T + end], v[:, :, : S - T + end])
                for part, end in zip(q.split(QUERIES, dim=2), ends)
            ]
            return torch.cat(parts, dim=2)

        if q.device.type == "cpu" and dtype == torch.bfloat16 and (S <= 256 or twice):
            # On CPUs the fused kernel's backward pass is slow in bf16: for 8 × 64 tokens 10 ms per
            # layer, against 2 ms in fp32, which is also more precise. Unfused, all of it is slow.
            q, k, v = q.float(), k.float(), v.float()

        mask = self.mask(T, S, q.device)
        causal = mask is None and T > 1
        grouped = self.c.num_key_value_heads != self.c.num_attention_heads
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return y.to(dtype)

    def mask(self, T, S, device):
        """(T, S), True where a new token sees an earlier one; None where is_causal says it."""
        beyond = self.window is not None and S > self.window
        if T in (1, S) and not beyond:
            return None
        mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
        return mask.triu(S - T - self.window + 1) if beyond else mask


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c, window):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, window)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, rows=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Linear):
    def forward(self, hidden, targets=None):
        """Logits (..., vocab); with targets (N,), the mean loss, without the weight's gradient."""
        if targets is None:
            return super().forward(hidden)
        return cross_entropy(hidden, self.weight, targets)


class Transformer(nn.Module):
    """
    The language model. gradient_checkpointing: whether the blocks' activations are dropped and
    recomputed in the backward pass: less memory, one more forward pass (arXiv 1604.06174).
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, window) for window in config.windows),
                "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden_states(self, input_ids, rows=None):
        """The last layer's normalised output, (B, T, hidden_size); of Rows (N, hidden_size)."""
        if rows is not None:
            positions, length = rows.positions, rows.shared + rows.longest
        else:
            length = input_ids.size(1)
            positions = torch.arange(length, device=input_ids.device)

        trained = self.config.max_position_embeddings
        if self.config.rope["rope_type"] == "dynamic" and length > trained:
            raise ValueError(
                f"{length} tokens: rope type 'dynamic' is supported up to the trained {trained}"
            )

        x = self.model.embed_tokens(input_ids)  # (..., hidden_size)
        turns = rotary.frequencies(self.config.rope, self.config.head_dim)
        cos, sin = rotary.angles(positions, *turns, x.dtype)  # (T, 1, head_dim) each

        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recompute_module(block, x, cos=cos, sin=sin, rows=rows)
            else:
                x = block(x, cos, sin, rows)
        return self.model.norm(x)

    def forward(self, input_ids, labels=None):
        """
        The logits, (B, T, vocab); with labels, the mean cross-entropy in nats, a scalar.

        input_ids: (B, T). labels: (B, T), -100 where a position is not supervised; shifted inside,
        so labels[t] is the token that position t-1 should predict. With labels, both may also be
        lists of rows of any lengths.
        """
        if labels is None:
            return self.lm_head(self.hidden_states(input_ids))
        rows, wanted, targets = likelihood.supervised(input_ids, labels)
        hidden, targets = self.states(rows, wanted), targets.to(self.lm_head.weight.device)
        frozen = isinstance(self.lm_head, Head) and not self.lm_head.weight.requires_grad
        if frozen and len(targets):
            return self.lm_head(hidden, targets)
        return F.cross_entropy(self.lm_head(hidden).float(), targets)

    def states(self, rows, wanted):
        """
        The hidden states, (N, hidden_size), of some tokens. rows: lists of ids; wanted: for each
        row, the places of these tokens. Tokens that none depends on are left out.
        """
        places = [(i, t) for i, some in enumerate(wanted) for t in some]
        row, position = torch.tensor(places, dtype=torch.long).view(-1, 2).T
        device = self.lm_head.weight.device
        rows = Rows([ids[: max(some, default=0) + 1] for ids, some in zip(rows, wanted)], device)
        return self.hidden_states(rows.ids, rows=rows)[rows.find(row, position).to(device)]

    def predictions(self, rows, wanted):
        """The logits, (N, vocab), of the tokens that follow; arguments as in states."""
        return self.lm_head(self.states(rows, wanted)).float()

    def in_parts(self, rows, wanted):
        """Yield predictions for a few tokens at a time."""
        for part in self.states(rows, wanted).split(ROWS):
            yield self.lm_head(part).float()

    totals = likelihood.totals  # (rows, labels) -> summed loss, right predictions, their number
    score = likelihood.score  # (prompts, answers) -> log p(answer | prompt)

    def generate(
        self, input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_ids=()
    ):
        """
        Sample a continuation, by transformers; return input_ids and the new tokens, (B, T + new).

        input_ids: (B, T), rows of equal length. temperature=0 takes the likeliest token. top_k
        keeps the k likeliest tokens, top_p the smallest set with this share of the probability
        (nucleus sampling, arXiv 1904.09751). Ends after max_new_tokens, or when every row has
        produced one of stop_ids; a row that ends earlier is filled up with the first of them.
        """
        options = temperature, top_k, top_p, stop_ids
        return any_model.as_any(self).generate(input_ids, max_new_tokens, *options)

    @classmethod
    def from_pretrained(
        cls, folder, dtype=torch.float32, device="cpu", quantize=None, mapped=False
    ):
        """
        Load a Hugging Face folder: config.json and model.safetensors, or shards with their index.

        quantize: None, or 'nf4', 'fp4', 'int8' for the blocks' linear layers. mapped: tensors that
        already have this dtype and device stay mapped to their files: the system reads them on
        demand, and processes share the memory.

        Raises FileNotFoundError when a file is missing, ValueError for an unsupported model, a
        damaged file, or a missing, unexpected or misshapen tensor.
        """
        folder = Path(folder)
        config = ModelConfig.from_hf(read_json(folder / "config.json"))
        with torch.device("meta"), hf_format.WithoutValues():
            model = cls(config)
        hf_format.load_weights(model, folder, dtype, device, quantize, mapped)
        return model.eval()

    def save_pretrained(self, folder):
        """
        Write config.json and model.safetensors, as Hugging Face transformers loads them.

        Raises ValueError for an adapted or a quantised model: call `bidora.merge(model)` first.
        """
        hf_format.save(self, folder)
