"""
The transformer: LLaMA and Qwen2 decoders that read and write Hugging Face safetensors folders.

What is notable about it:
- parameter names are Hugging Face's own, so a checkpoint loads without a table of names
- RMSNorm before each block, rotary positions, grouped-query attention, SwiGLU, no dropout
- forward(input_ids, labels) computes logits only where a label asks for them: with one answer token a row, the
  vocabulary's head (49k to 150k rows) costs almost nothing
- no padding mask: batches are padded on the right, and causal attention never looks there
- normalisation and loss in fp32, everything else in the weights' dtype

LLaMA: arXiv 2302.13971; rotary positions: 2104.09864; grouped queries: 2305.13245; Qwen2: 2407.10671.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files import read_json, replacing, write_json


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
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    hf: dict  # the whole config.json, so that save_pretrained loses nothing

    @classmethod
    def from_hf(cls, config_dict):
        """
        Read a Hugging Face config.json, given as a dict.

        Raises ValueError, naming the key, for what this model does not compute: another model_type, scaled rotary
        positions, a sliding window, another activation, or a missing size.
        """
        c = config_dict
        model_type = c.get("model_type")
        if model_type not in ("llama", "qwen2"):
            raise ValueError(f"config.json: model_type {model_type!r} is not supported; 'llama' and 'qwen2' are")
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # transformers 5, transformers 4
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"config.json: rotary scaling {rope} is not supported; only the unscaled kind is")
        if c.get("use_sliding_window"):
            raise ValueError("config.json: use_sliding_window=true is not supported")
        if c.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act {c['hidden_act']!r} is not supported; 'silu' is")
        try:
            heads = c["num_attention_heads"]
            return cls(
                vocab_size=c["vocab_size"],
                hidden_size=c["hidden_size"],
                intermediate_size=c["intermediate_size"],
                num_hidden_layers=c["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=c.get("num_key_value_heads") or heads,
                head_dim=c.get("head_dim") or c["hidden_size"] // heads,
                max_position_embeddings=c.get("max_position_embeddings", 2048),
                rms_norm_eps=c.get("rms_norm_eps", 1e-6),
                rope_theta=c.get("rope_theta") or rope.get("rope_theta") or 10000.0,
                tie_word_embeddings=c.get("tie_word_embeddings", False),
                qkv_bias=model_type == "qwen2" or c.get("attention_bias", False),
                o_bias=model_type == "llama" and c.get("attention_bias", False),
                mlp_bias=c.get("mlp_bias", False),
                hf=dict(c),
            )
        except KeyError as error:
            raise ValueError(f"config.json: {error} is missing") from None


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
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)

    def forward(self, x, cos, sin, cache):
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, -1, self.c.head_dim).transpose(1, 2), cos, sin)  # (B, H, T, head_dim)
        k = rotate(self.k_proj(x).view(B, T, -1, self.c.head_dim).transpose(1, 2), cos, sin)  # (B, Hkv, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.c.head_dim).transpose(1, 2)  # (B, Hkv, T, head_dim)
        if cache is not None:  # this layer's keys and values of the tokens before
            if cache:
                k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
            cache.update(k=k, v=v)
        S = k.size(2)  # all tokens so far: T new ones and those in the cache
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < T == S,
                                           enable_gqa=self.c.num_key_value_heads != self.c.num_attention_heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden_states(self, input_ids, caches=None):
        """The last layer's normalised output, (B, T, hidden_size). caches: one dict a layer, updated in place."""
        T = input_ids.size(1)
        past = caches[0]["k"].size(2) if caches and caches[0] else 0
        x = self.model.embed_tokens(input_ids)  # (B, T, hidden_size)
        half = torch.arange(0, self.config.head_dim, 2, device=x.device).float() / self.config.head_dim
        positions = torch.arange(past, past + T, device=x.device).float()
        angles = torch.outer(positions, self.config.rope_theta**-half)  # (T, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, head_dim)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, block in enumerate(self.model.layers):
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
        return F.cross_entropy(*self.answer_logits(input_ids, labels))

    def answer_logits(self, input_ids, labels):
        """Where labels ask for a token: its logits in fp32, (asked, vocab), and the token, (asked,). Arguments as forward's."""
        asked = labels[:, 1:] != -100
        return self.lm_head(self.hidden_states(input_ids)[:, :-1][asked]).float(), labels[:, 1:][asked]

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
        shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)  # leave each prompt its last token
        prefix = [{} for _ in self.model.layers]
        if shared:
            self.hidden_states(torch.tensor([prompts[0][:shared]], device=device), prefix)
        for head in {tuple(answer[:-1]) for answer in answers}:
            ids = [torch.tensor([*prompt[shared:], *head], device=device) for prompt in prompts]
            caches = [{name: t.expand(len(prompts), -1, -1, -1) for name, t in layer.items()} for layer in prefix]
            x = self.hidden_states(nn.utils.rnn.pad_sequence(ids, batch_first=True), caches)  # (P, T, hidden_size)
            first = torch.tensor([len(prompt) - shared - 1 for prompt in prompts], device=device)  # predicts the answer's first token
            log_p = [self.lm_head(x[rows, first + i]).float().log_softmax(-1) for i in range(len(head) + 1)]  # each (P, vocab)
            for column, answer in enumerate(answers):
                if tuple(answer[:-1]) == head:
                    scores[:, column] = sum(log_p[i][:, token] for i, token in enumerate(answer))
        return scores

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_ids=()):
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
                    logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -torch.inf
                if top_p is not None:
                    ordered, order = logits.softmax(-1).sort(descending=True)
                    beyond = ordered.cumsum(-1) - ordered >= top_p  # the likeliest token always stays
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
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """
        Load a Hugging Face folder: config.json and model.safetensors, or shards with their index.

        Raises FileNotFoundError when a file is missing, ValueError for an unsupported model, a damaged file, or a tensor
        that is missing, unexpected or misshapen.
        """
        folder = Path(folder)
        config = ModelConfig.from_hf(read_json(folder / "config.json"))
        index = folder / "model.safetensors.index.json"
        files = sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
        tensors = {}
        for name in files:
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder / name} is missing (weights are read from safetensors only)")
            try:
                with safe_open(folder / name, framework="pt") as file:
                    for key in file.keys():  # one at a time, so that the file's dtype is never held as a whole
                        tensors[key] = file.get_tensor(key).to(device, dtype)
            except SafetensorError as error:
                raise ValueError(f"{folder / name} is damaged or no safetensors file: {error}") from None
        if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        with torch.device("meta"):
            model = cls(config)
        for key, parameter in model.state_dict().items():
            if key not in tensors:
                raise ValueError(f"{folder}: tensor {key} is missing")
            if tensors[key].shape != parameter.shape:
                raise ValueError(f"{folder}: tensor {key} is {tuple(tensors[key].shape)}, but config.json asks for "
                                 f"{tuple(parameter.shape)}")
        unexpected = sorted(set(tensors) - set(model.state_dict()))
        if unexpected:
            raise ValueError(f"{folder}: unexpected tensor {unexpected[0]} (and {len(unexpected) - 1} more)")
        model.load_state_dict(tensors, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()

    def save_pretrained(self, folder):
        """
        Write config.json and model.safetensors, as Hugging Face transformers loads them.

        Raises ValueError for an adapted model: `bidora.merge(model)` first.
        """
        if any("lora_" in key for key in self.state_dict()):
            raise ValueError("the model holds adapters, which this format does not know: call merge(model) first")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        config = {key: value for key, value in self.config.hf.items() if key != "torch_dtype"}  # the older spelling of dtype
        config["dtype"] = str(self.lm_head.weight.dtype).removeprefix("torch.")
        with replacing(folder / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(folder / "config.json", config)
