"""
Adapters as mlx-lm (0.32.2) and torchtune (0.6.1) save them: both are read as if they were PEFT's,
and mlx-lm's are written.

    PEFT        lora_A.weight (rank, in), lora_B.weight (out, rank), lora_magnitude_vector (out,)
    mlx-lm      lora_a (in, rank), lora_b (rank, out), m (out,); its `scale` is s, not alpha
    torchtune   lora_a.weight (rank, in), lora_b.weight (out, rank), magnitude (out,)

A rotary embedding turns pairs of a head's rows. Hugging Face's files hold the first rows of all
pairs before the second rows. LLaMA's files of torchtune and of GGUF hold each pair together.
"""

import re

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.run.files import make_folder, malformed, read_json, replacing, write_json

PREFIX = "base_model.model."  # of PEFT's tensor names
NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
NAMES |= {"lora_magnitude_vector": "lora_magnitude_vector"}
THEIRS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}  # of mlx-lm and torchtune
THEIRS |= {"m": "lora_magnitude_vector", "magnitude": "lora_magnitude_vector"}
TORCHTUNE = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
TORCHTUNE_KEY = re.compile(r"(layers\.\d+)\.(.+)\.(lora_a|lora_b|magnitude)(?:\.weight)?")
TORCHTUNE_CONFIG = set("r lora_alpha target_modules peft_type base_model_name_or_path".split())


def read_adapter(folder, family, heads, blocks):
    """
    (adapter_config.json's content, {name: tensor}) of an adapter's folder, both as PEFT has them.
    family: the model_type of its base; heads: how many of queries and of keys; blocks: how many.
    Raises FileNotFoundError or ValueError.
    """
    settings = folder / "adapter_config.json"
    config = read_json(settings)
    if {"fine_tune_type", "lora_parameters"} & config.keys():
        with malformed(settings):
            return from_mlx(config, read_tensors(folder / "adapters.safetensors"), settings, blocks)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    if any(map(TORCHTUNE_KEY.fullmatch, tensors)):
        return from_torchtune(config, tensors, folder, family, heads)
    turned = any(re.search(r"\.[qk]_proj\.lora_B", name) for name in tensors)
    magnitudes = any(name.endswith("magnitude_vector") for name in tensors)
    if config.keys() <= TORCHTUNE_CONFIG and turned and (magnitudes or family == "qwen2"):
        raise ValueError(
            f"{settings} is as torchtune's, which writes some rows of q_proj and k_proj in another "
            f"order than PEFT: save the adapter_model.pt beside it as adapter_model.safetensors"
        )
    return config, tensors


def read_tensors(path):
    """{name: tensor} of a safetensors file. Raises FileNotFoundError or ValueError."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing (.bin and .pt files are not read)") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or empty: {error}") from None
    if not tensors:
        raise ValueError(f"{path} is empty: it holds no tensor")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            problem = f"{name} holds numbers that are infinite or not a number"
            remedy = "as after a run that diverged: train again with a lower rate"
            raise ValueError(f"{path}: {problem}, {remedy}")
    return tensors


def from_mlx(config, tensors, where, blocks):
    """mlx-lm's config and tensors as PEFT's: see read_adapter."""
    form, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters") or {}
    if form not in ("lora", "dora"):
        raise ValueError(f"{where}: fine_tune_type {form!r} is no adapter; 'lora' and 'dora' are")
    if "alpha" in settings or "scale" not in settings:
        problem = "must have a scale, and no alpha, which scales in mlx-lm up to 0.14 and not since"
        raise ValueError(f"{where}: lora_parameters {problem}")
    renamed, rank = {}, settings["rank"]
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part not in THEIRS or part == "lora_a" and tensor.shape[-1] != rank:
            raise ValueError(f"{where.parent}: {name} is no tensor of an adapter of rank {rank}")
        renamed[f"{PREFIX}{layer}.{THEIRS[part]}"] = tensor if part == "m" else tensor.T

    last = config.get("num_layers", config.get("lora_layers", 0))
    return {
        "lora_alpha": settings["scale"] * rank,
        "lora_dropout": settings.get("dropout", 0.0),
        "use_dora": form == "dora" or config.get("use_dora", False),
        "target_modules": settings.get("keys"),
        "layers_to_transform": list(range(max(0, blocks - last), blocks)) if last > 0 else None,
    }, renamed


def from_torchtune(config, tensors, folder, family, heads):
    """torchtune's config and tensors as PEFT's: see read_adapter."""
    if family not in ("llama", "mistral", "qwen2"):
        raise ValueError(f"{folder}: torchtune's layout of {family} is not read here")
    renamed = {}
    for name, tensor in tensors.items():
        match = TORCHTUNE_KEY.fullmatch(name)
        block, layer, part = match.groups() if match else ("", "", "")
        if layer not in TORCHTUNE:
            raise ValueError(f"{folder}: {name} is not read from torchtune")
        if family != "qwen2" and layer in ("attn.q_proj", "attn.k_proj") and part != "lora_a":
            count = heads[layer == "attn.k_proj"]
            if tensor.dim() == 0 or len(tensor) % (2 * count):
                raise ValueError(f"{folder}: {name} does not fit {count} heads")
            tensor = reordered(tensor, count, together=False)
        renamed[f"{PREFIX}model.{block}.{TORCHTUNE[layer]}.{THEIRS[part]}"] = tensor
    return config | {"use_dora": any(name.endswith("vector") for name in renamed)}, renamed


def reordered(rows, heads, together):
    """Rows of queries or keys in another order: each rotary pair together, or back to PEFT's."""
    shape = (heads, 2, -1) if together else (heads, -1, 2)
    return rows.unflatten(0, shape).transpose(1, 2).reshape(rows.shape)


def write_mlx(folder, layers, base):
    """
    Write adapters, {name: BiDoRALinear}, as mlx-lm does, for `mlx_lm.generate --adapter-path`.
    base: the model's name. All layers get one rank and one scale, 1: zeros fill A and B, B takes s.
    """
    if any(x.method.magnitude and x.magnitude_axis == "column" for x in layers.values()):
        raise ValueError("mlx-lm has no magnitudes per column: use --to=transformers")
    rank, tensors = max(layer.rank for layer in layers.values()), {}
    for name, layer in layers.items():
        A, sB = layer.factors()
        m, more = layer.lora_magnitude_vector, rank - layer.rank
        tensors[f"{name}.lora_a"] = F.pad(A.T, (0, more))
        tensors[f"{name}.lora_b"] = F.pad(sB.T, (0, 0, 0, more))
        tensors |= {} if m is None else {f"{name}.m": m}
    folder, order = make_folder(folder), torch.contiguous_format
    with replacing(folder / "adapters.safetensors") as temporary:
        copies = {n: x.detach().clone(memory_format=order) for n, x in tensors.items()}
        save_file(copies, temporary)
    config = {"model": base, "fine_tune_type": "lora" if m is None else "dora", "num_layers": 0}
    config["lora_parameters"] = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": list(layers)}
    write_json(folder / "adapter_config.json", config)
