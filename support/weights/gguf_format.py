"""
Models as GGUF files, written by the library gguf, for llama.cpp and programs built on it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import torch
from safetensors import safe_open

from support.fast import rotary
from support.run.files import read_json, replacing
from support.text import tokenizer_files
from support.text.tokenizer import Tokenizer
from support.weights import hf_format
from support.weights.other_formats import reordered

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
SPLITS = {  # llama.cpp's names of the regular expressions that split a text
    tokenizer_files.GPT2_SPLIT: "gpt-2",
    tokenizer_files.SMOLLM2_SPLIT: "smollm",
    tokenizer_files.QWEN2_SPLIT: "qwen2",
    tokenizer_files.LLAMA3_SPLIT: "llama-bpe",
}


def write_gguf(folder, path):
    """
    Write a model as one file. folder: in Hugging Face's layout, of a family in ARCHITECTURES.
    Raises ValueError for scaled rotary positions other than LLaMA 3's.
    """
    import gguf

    config = read_json(folder / "config.json")
    c = hf_format.read_config(config)
    architecture, rope, windows = ARCHITECTURES[config["model_type"]], c["rope"], c["windows"]
    frequencies, _ = rotary.frequencies(rope, c["head_dim"])
    plain, _ = rotary.frequencies(rope | {"rope_type": "default"}, c["head_dim"])
    if rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"{folder}: rope type {rope['rope_type']} is not written to GGUF files")
    if any(windows):
        print(f"note: llama.cpp ignores the sliding window of {max(filter(None, windows))} tokens")
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_vocab_size(c["vocab_size"])
        writer.add_block_count(len(windows))
        writer.add_context_length(c["max_position_embeddings"])
        writer.add_embedding_length(c["hidden_size"])
        writer.add_feed_forward_length(c["intermediate_size"])
        writer.add_head_count(c["num_attention_heads"])
        writer.add_head_count_kv(c["num_key_value_heads"])
        writer.add_key_length(c["head_dim"])
        writer.add_value_length(c["head_dim"])
        writer.add_rope_dimension_count(c["head_dim"])
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
        if rope["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", (plain / frequencies).numpy())
        add_tokenizer(writer, folder, c["vocab_size"])
        add_tensors(writer, folder, architecture, c)
        for part in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{part}_to_file")()
        writer.close()


def add_tensors(writer, folder, architecture, c):
    """Add a folder's tensors under GGUF's names: bf16 matrices as they are, all else in fp32."""
    import gguf

    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, len(c["windows"]))
    heads = {"q_proj": c["num_attention_heads"], "k_proj": c["num_key_value_heads"]}
    for key, (file, shape) in hf_format.find_tensors(folder).items():
        with safe_open(file, "pt") as content:
            tensor = content.get_tensor(key)
        key, layer, end = key.rpartition(".")[0], *key.split(".")[-2:]
        if architecture == "llama" and layer in heads:
            tensor = reordered(tensor, heads[layer], together=True)
        bf16 = len(shape) > 1 and tensor.dtype == torch.bfloat16
        dtype = gguf.GGMLQuantizationType.BF16 if bf16 else gguf.GGMLQuantizationType.F32
        values = gguf.quantize(tensor.float().numpy(), dtype)
        writer.add_tensor(f"{names.get_name(key)}.{end}", values, raw_dtype=dtype)


def add_tokenizer(writer, folder, size):
    """Add a folder's tokenizer if it is a byte-level BPE that llama.cpp knows; else say so."""
    import gguf

    tokenizer = Tokenizer.from_pretrained(folder)
    split = SPLITS.get(tokenizer.encoding and tokenizer.encoding._pat_str)
    if not split:
        print("note: the file holds no tokenizer, since this one is no byte-level BPE known here")
        return
    texts = {i: token for token, i in tokenizer.library.get_vocab().items()}
    types = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    types |= dict.fromkeys(tokenizer.added.values(), gguf.TokenType.USER_DEFINED)
    types |= dict.fromkeys(tokenizer.special_ids, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([types.get(i, gguf.TokenType.UNUSED) for i in range(size)])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    special.add_special_token["bos"] = bool(tokenizer.prefix_ids)
    special.add_to_gguf(writer, quiet=True)
