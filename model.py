"""
The transformer: LLaMA, Mistral, Qwen2 and Qwen3 decoders.

What is notable about it:
- parameter names are Hugging Face's own, so a checkpoint loads without renaming
- RMSNorm before each block, rotary positions, grouped-query attention, SwiGLU, no dropout
- forward(input_ids, labels) computes logits only at supervised positions: with one answer token
  per row, the head (49k to 150k vocabulary entries) costs almost nothing
- no padding mask: batches are padded on the right, and causal attention never looks there
- normalisation and loss in fp32, everything else in the weights' dtype

LLaMA: arXiv 2302.13971; grouped queries: 2305.13245; sliding windows (Mistral): 2310.06825;
Qwen2: 2407.10671; norms on queries and keys (Qwen3): 2505.09388.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support import hf_format, rotary
from support.files import read_json
from support.kernels import ROWS, cross_entropy


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + head_dim/2]) by its position's angle. x: (B, H, T, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin  # cos, sin: (T, head_dim)


class Attention(nn.Module):
    def __init__(self, c, window):
        super().__init__()
        self.c, self.window = c, window
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.c.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.c.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.c.head_dim).transpose(1, 2)  # (B, Hkv, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H or Hkv, T, head_dim)

        if cache is not None:  # this layer's keys and values of earlier tokens
            if cache:
                k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
            cache.update(k=k, v=v)
        S = k.size(2)  # all tokens so far: T new ones and those in the cache

        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and S <= 256:
            # On CPUs the fused kernel's backward pass is slow in bf16: for 8 × 64 tokens 10 ms per
            # layer, against 2 ms in fp32, which is also more precise.
            q, k, v = q.float(), k.float(), v.float()

        mask = self.mask(T, S, x.device)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            enable_gqa=self.c.num_key_value_heads != self.c.num_attention_heads,
        )  # (B, H, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))

    def mask(self, T, S, device):
        """
        (T, S), True where a new token sees an earlier one; None where is_causal alone says it.
        """
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
        """
        hidden (..., hidden_size) -> logits (..., vocab). With targets (N,) and hidden
        (N, hidden_size): the mean cross-entropy, with no gradient for the weight.
        """
        if targets is None:
            return super().forward(hidden)
        return cross_entropy(hidden, self.weight, targets)


class Transformer(nn.Module):
    """
    The language model. With the attribute gradient_checkpointing set, each block's activations are
    dropped after the forward pass and recomputed in the backward pass, which saves memory at the
    cost of one more forward pass (arXiv 1604.06174).
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
        """
        The last layer's normalised output, (B, T, hidden_size). caches: one dict per layer, empty
        at first, that collects the keys and values of all tokens so far.
        """
        T = input_ids.size(1)
        past = caches[0]["k"].size(2) if caches and caches[0] else 0
        trained = self.config.max_position_embeddings
        if self.config.rope["rope_type"] == "dynamic" and past + T > trained:
            raise ValueError(
                f"{past + T} tokens: with rope type 'dynamic' only the {trained} that the model "
                f"was trained on are supported"
            )

        x = self.model.embed_tokens(input_ids)  # (B, T, hidden_size)

        frequencies, scale = rotary.frequencies(self.config.rope, self.config.head_dim)
        positions = torch.arange(past, past + T, device=x.device).float()
        frequencies = frequencies.to(x.device, non_blocking=True)
        angles = torch.outer(positions, frequencies)  # (T, head_dim / 2)
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
        Without labels: the logits, (B, T, vocab). With labels: the mean cross-entropy in nats, a
        scalar.

        input_ids: (B, T). labels: (B, T), -100 where a position is not supervised; shifted inside,
        so labels[t] is the token that position t-1 should predict.
        """
        if labels is None:
            return self.lm_head(self.hidden_states(input_ids))
        hidden, targets = self.supervised(input_ids, labels)
        frozen = isinstance(self.lm_head, Head) and not self.lm_head.weight.requires_grad
        if frozen and len(targets):
            return self.lm_head(hidden, targets)
        return F.cross_entropy(self.lm_head(hidden).float(), targets)

    def supervised(self, input_ids, labels):
        """
        The hidden states, (N, hidden_size), and the targets, (N,), of the N supervised positions.
        """
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # one per position
        where = (targets != -100).nonzero()[:, 0]
        return self.hidden_states(input_ids).flatten(0, 1)[where], targets[where]

    @torch.no_grad()
    def totals(self, input_ids, labels):
        """
        (summed cross-entropy in nats, number of right predictions, number of supervised positions).
        """
        hidden, targets = self.supervised(input_ids, labels)
        loss = right = 0
        for part, answers in zip(hidden.split(ROWS), targets.split(ROWS)):  # not all logits at once
            logits = self.lm_head(part).float()  # (rows, vocab)
            loss += F.cross_entropy(logits, answers, reduction="sum").item()
            right += (logits.argmax(1) == answers).sum().item()
        return loss, right, len(targets)

    @torch.no_grad()
    def score(self, prompts, answers):
        """
        log p(answer | prompt) in nats, summed over the answer's tokens: (prompts, answers). Both
        are lists of lists of token ids.

        The prefix that all prompts share (a system message, the question) is computed once. Answers
        that differ only in their last token share a forward pass, so one-token labels cost one in
        all.
        """
        device = self.lm_head.weight.device
        scores = torch.zeros(len(prompts), len(answers), device=device)
        rows = torch.arange(len(prompts), device=device)

        # Each prompt keeps at least its last token, whose output predicts the answer.
        shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        prefix = [{} for _ in self.model.layers]
        if shared:
            self.hidden_states(torch.tensor([prompts[0][:shared]], device=device), prefix)

        for head in {tuple(answer[:-1]) for answer in answers}:
            ids = [torch.tensor([*prompt[shared:], *head], device=device) for prompt in prompts]
            caches = [
                {name: t.expand(len(prompts), -1, -1, -1) for name, t in layer.items()}
                for layer in prefix
            ]
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
            x = self.hidden_states(padded, caches)  # (P, T, hidden_size)

            lengths = torch.tensor([len(prompt) - shared for prompt in prompts], device=device)
            log_p = [  # for the answer's i-th token, each (P, vocab)
                self.lm_head(x[rows, lengths - 1 + i]).float().log_softmax(-1)
                for i in range(len(head) + 1)
            ]
            for column, answer in enumerate(answers):
                if tuple(answer[:-1]) == head:
                    scores[:, column] = sum(log_p[i][:, token] for i, token in enumerate(answer))
        return scores

    @torch.no_grad()
    def generate(
        self, input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_ids=()
    ):
        """
        Sample a continuation; return input_ids followed by the new tokens, (B, T + new).

        input_ids: (B, T), rows of equal length. temperature=0 takes the likeliest token. top_k
        keeps the k likeliest tokens, top_p the smallest set with this share of the probability
        (nucleus sampling, arXiv 1904.09751). Ends after max_new_tokens, or when every row has
        produced one of stop_ids; a row that has stopped repeats its stop token.
        """
        caches = [{} for _ in self.model.layers]
        stop = torch.tensor(list(stop_ids), device=input_ids.device)
        stopped = torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)
        new = input_ids  # the tokens that are not in the caches yet

        for _ in range(max_new_tokens):
            logits = self.lm_head(self.hidden_states(new, caches)[:, -1]).float()  # (B, vocab)
            new = sample(logits, temperature, top_k, top_p)  # (B, 1)
            new = torch.where(stopped[:, None], input_ids[:, -1:], new)
            input_ids = torch.cat((input_ids, new), dim=1)
            stopped |= torch.isin(new[:, 0], stop)
            if stopped.all():
                break
        return input_ids

    @classmethod
    def from_pretrained(
        cls, folder, dtype=torch.float32, device="cpu", quantize=None, mapped=False
    ):
        """
        Load a Hugging Face folder: config.json and model.safetensors, or shards with their index.

        quantize: None, or 'nf4', 'fp4', 'int8' for the blocks' linear layers; embeddings, norms and
        the head stay in dtype. mapped: leave tensors that already have this dtype and device mapped
        to their files, so that the system reads them on demand and processes share the memory.

        Raises FileNotFoundError when a file is missing, ValueError for an unsupported model, a
        damaged file, or a missing, unexpected or misshapen tensor.
        """
        folder = Path(folder)
        config = ModelConfig.from_hf(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = cls(config)
        hf_format.load_weights(model, folder, dtype, device, quantize, mapped)
        return model.eval()

    def save_pretrained(self, folder):
        """
        Write config.json and model.safetensors, as Hugging Face transformers loads them.

        Raises ValueError for an adapted or a quantised model: call `bidora.merge(model)` first.
        """
        hf_format.save(self, folder)


def sample(logits, temperature, top_k, top_p):
    """The next tokens, (B, 1), from logits (B, vocab); arguments as in Transformer.generate."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits[logits < least] = -torch.inf
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # never true for the likeliest token
        logits[torch.zeros_like(beyond).scatter(1, order, beyond)] = -torch.inf
    return torch.multinomial(logits.softmax(-1), 1)
