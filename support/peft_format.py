"""
Adapters as PEFT saves them: adapter_model.safetensors and adapter_config.json.

Call bidora.save_adapter and bidora.load_adapter; this file has the format. The scale s is saved as
alpha = s · rank, so it is right for any formula by which a method computes s. PEFT's format has no
magnitude per column: such an adapter gets a peft_type of our own, which PEFT refuses.
"""

import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.files import read_json, replacing, write_json
from support.pretrained import split_revision

COLUMN_DORA = "COLUMN_DORA"  # the peft_type of an adapter with a magnitude per column
PREFIX = "base_model.model."  # of PEFT's tensor names
NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
# Settings of PEFT's LoraConfig that these layers know, or that have no effect once an adapter is
# trained. Any other setting that is switched on means a variant of LoRA that computes something
# else; numbers switch nothing on by themselves.
KNOWN = set(
    "peft_type peft_version task_type auto_mapping parent_library base_model_name_or_path revision "
    "inference_mode r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern "
    "target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights "
    "eva_config runtime_config megatron_core ensure_weight_tying".split()
)


@dataclass
class Adapter:
    """The content of an adapter folder."""

    folder: Path
    tensors: dict  # {layer: {"lora_A": tensor, …}}
    sizes: dict  # {layer: (rank, alpha)}
    dropout: float
    magnitude: bool  # whether the layers have one
    axis: str  # of the magnitude: "row" or "column"


def named_tensors(layers):
    """The adapter parameters under PEFT's names for them; BiLoRA's λ is folded into B."""
    return {
        f"{PREFIX}{name}.{NAMES[key]}": (
            layer.folded_B() if key == "lora_B" else getattr(layer, key)
        ).detach()
        for name, layer in layers.items()
        for key in NAMES
        if getattr(layer, key) is not None
    }


def write(folder, layers, linears, base_model):
    """
    Write the adapters of layers, {name: BiDoRALinear}, each file atomically.

    linears: the names of all the model's linear layers; base_model: name, name@revision or folder.
    Raises ValueError without layers, or for several kinds of them; OSError when the folder can't be
    written.
    """
    if not layers:
        raise ValueError("the model has no adapters to save")
    kinds = {(layer.method.magnitude, layer.magnitude_axis) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(
            "the model's adapters differ in having a magnitude, or in its axis; "
            "one file holds one kind"
        )

    [(magnitude, axis)] = kinds
    alphas = {name: layer.scaling * layer.rank for name, layer in layers.items()}
    rank, alpha, dropout = statistics.mode(
        (layer.rank, alphas[name], layer.dropout.p) for name, layer in layers.items()
    )

    base, revision = split_revision(base_model)
    config = {
        "peft_type": COLUMN_DORA if magnitude and axis == "column" else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": short_names(layers, linears),
        "use_dora": magnitude,
        "rank_pattern": {n: layer.rank for n, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
        "bias": "none",
        "inference_mode": True,
    }

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as temporary:
        tensors = {name: t.cpu().contiguous() for name, t in named_tensors(layers).items()}
        save_file(tensors, temporary)
    write_json(folder / "adapter_config.json", config)


def short_names(layers, linears):
    """The layers' names for target_modules: short ones ("q_proj") if they match no other layer."""
    ends = {name.rpartition(".")[2] for name in layers}
    others = [name for name in linears if name not in layers]
    if any(name.rpartition(".")[2] in ends for name in others):
        return list(layers)
    return sorted(ends)


def read(folder, parameters):
    """
    The Adapter in a folder that `write` or PEFT wrote. parameters: the base's, {name: tensor}.

    rsLoRA's scale alpha / √rank (arXiv 2312.03732) becomes the alpha that gives the same scale.
    Raises FileNotFoundError for a missing file, ValueError for a damaged one and for variants of
    LoRA that BiDoRALinear does not compute.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder / 'adapter_model.safetensors'} is missing "
            f"(adapters are read from safetensors only)"
        ) from None
    except SafetensorError as error:
        raise ValueError(f"{folder / 'adapter_model.safetensors'} is damaged: {error}") from None
    check_config(config, folder / "adapter_config.json")

    found = by_layer(tensors, folder, parameters)
    magnitude = bool(config.get("use_dora"))
    if {"lora_magnitude_vector" in parts for parts in found.values()} != {magnitude}:
        raise ValueError(
            f"{folder}: adapter_config.json has use_dora={magnitude}, which the tensors contradict"
        )

    sizes = {}
    for name, parts in found.items():
        # Any rank will do for a damaged file: copy_into reports the misshapen tensor.
        matrix = "lora_A" in parts and parts["lora_A"].dim() == 2
        rank = len(parts["lora_A"]) if matrix else 1
        alpha = alpha_of(name, config, folder / "adapter_config.json")
        sizes[name] = rank, alpha * (rank**0.5 if config.get("use_rslora") else 1)
    axis = "column" if config.get("peft_type") == COLUMN_DORA else "row"
    return Adapter(folder, found, sizes, config.get("lora_dropout") or 0.0, magnitude, axis)


def check_config(config, where):
    """Raise ValueError for an adapter_config.json that BiDoRALinear does not support."""
    if config.get("peft_type", "LORA") not in ("LORA", COLUMN_DORA):
        raise ValueError(
            f"{where}: peft_type {config['peft_type']!r} is not supported; "
            f"'LORA', with or without use_dora, is"
        )

    # "pissa", "olora", "loftq" and the like change the base's weights before training, and the file
    # does not contain the changed weights.
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"{where}: init_lora_weights {config['init_lora_weights']!r} changes the base itself: "
            f"have PEFT convert it to plain LoRA (save_pretrained with "
            f"path_initial_model_for_weight_conversion)"
        )

    unsupported = [
        key
        for key, value in config.items()
        if key not in KNOWN
        and (key, value) != ("bias", "none")
        and (value is True or (value and not isinstance(value, (int, float))))
    ]
    if unsupported:
        raise ValueError(f"{where}: {', '.join(unsupported)} is not supported")

    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{where}: lora_dropout={dropout!r} must be at least 0 and below 1")
    for alpha in (config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()):
        if not isinstance(alpha, (int, float)):
            raise ValueError(
                f"{where}: lora_alpha, or a value of alpha_pattern, is missing or not a number "
                f"({alpha!r})"
            )


def by_layer(tensors, folder, parameters):
    """The file's tensors as {layer: {"lora_A": tensor, …}}."""
    found = {}
    for key, tensor in tensors.items():
        # PEFT also saves the base weight of an adapted head.
        if key.endswith(".base_layer.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
            if torch.equal(parameters.get(f"{name}.weight", tensor).to(tensor.dtype), tensor):
                continue
            raise ValueError(f"{folder}: the adapter holds another weight of {name} than the base")

        kinds = r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?"
        match = re.fullmatch(re.escape(PREFIX) + kinds, key)
        if not match:
            raise ValueError(
                f"{folder}: {key} belongs to no LoRA or DoRA adapter of linear layers, "
                f"which is not supported"
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    return found


def alpha_of(name, config, where):
    """A layer's alpha, by PEFT's rule: that of the first pattern that matches, else lora_alpha."""
    patterns = config.get("alpha_pattern") or {}
    try:
        fitting = [key for key in patterns if re.match(rf"(.*\.)?({key})$", name)]
    except re.error as error:
        raise ValueError(
            f"{where}: alpha_pattern holds an invalid regular expression ({error})"
        ) from None
    return patterns[fitting[0]] if fitting else config["lora_alpha"]


@torch.no_grad()
def copy_into(layers, adapter):
    """Copy an Adapter's tensors into layers, {name: BiDoRALinear}. Raises ValueError if unfit."""
    folder = adapter.folder
    if any(layer.method.singular_values for layer in layers.values()):
        raise ValueError(
            "the model has BiLoRA adapters, whose λ a saved adapter holds folded: "
            "load it into a model without adapters"
        )

    own = named_tensors(layers)
    tensors = {
        f"{PREFIX}{name}.{NAMES[key]}": tensor
        for name, parts in adapter.tensors.items()
        for key, tensor in parts.items()
    }
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            shapes = [
                tuple(side[name].shape) if name in side else "none" for side in (tensors, own)
            ]
            raise ValueError(
                f"{folder}: the adapter does not fit the model: {name} is {shapes[0]} in the file, "
                f"{shapes[1]} in the model"
            )
    for name, layer in layers.items():
        alphas = adapter.sizes[name][1], layer.scaling * layer.rank
        if not math.isclose(*alphas):
            raise ValueError(
                f"{folder}: the adapter does not fit the model: {name} has alpha {alphas[0]:g} "
                f"in the file, {alphas[1]:g} in the model"
            )

    for name, tensor in own.items():
        tensor.copy_(tensors[name])
