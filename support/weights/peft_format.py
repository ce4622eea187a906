"""
Adapters as PEFT saves them: adapter_model.safetensors and adapter_config.json.

bidora.save_adapter and bidora.load_adapter call this file. It saves a method's factors A and B as
LoRA's, and its scale s as alpha = s · rank. PEFT has no magnitude per column: such an adapter gets
a peft_type of our own, which PEFT refuses. Other trained modules, such as a classifier, are saved
whole (modules_to_save).
"""

import math
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import regex
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.run.files import make_folder, read_json, replacing, write_json
from support.weights.pretrained import split_revision

COLUMN_DORA = "COLUMN_DORA"  # the peft_type of an adapter with a magnitude per column
PREFIX = "base_model.model."  # of PEFT's tensor names
NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
# {end of a transformers class's name: (PEFT's task type, the heads that PEFT expects in the file)}
TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ["classifier", "score"]),
    "ForTokenClassification": ("TOKEN_CLS", ["classifier", "score"]),
    "ForQuestionAnswering": ("QUESTION_ANS", ["qa_outputs"]),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", []),
}
# The settings of PEFT's LoraConfig that are read here or have no effect after training. Another
# setting that is switched on means another variant of LoRA; a number switches nothing on.
KNOWN = set(
    "peft_type peft_version task_type auto_mapping parent_library base_model_name_or_path revision "
    "inference_mode r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern "
    "target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights "
    "eva_config runtime_config megatron_core ensure_weight_tying fan_in_fan_out "
    "modules_to_save".split()
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
    saved: dict  # {name: tensor} of the modules that were saved whole


def named_tensors(layers):
    """The layers' A, B and m under PEFT's names."""
    tensors = {}
    for name, layer in layers.items():
        parts = *layer.method.factors(layer), layer.lora_magnitude_vector
        for key, tensor in zip(NAMES.values(), parts):
            if tensor is not None:
                tensors[f"{PREFIX}{name}.{key}"] = tensor.detach()
    return tensors


def write(folder, model, layers, base_model):
    """Write the adapters of a model's layers, {name: BiDoRALinear}: see save_adapter."""
    if not layers:
        raise ValueError("the model has no adapters to save")
    if len({(layer.method.magnitude, layer.magnitude_axis) for layer in layers.values()}) > 1:
        raise ValueError("one file can't hold adapters that differ in having m, or in its axis")

    task, heads = task_of(model, layers)
    whole, lost = trained_beside(model, layers, heads)
    config = config_of(model, layers, base_model, task, whole)
    tensors = named_tensors(layers)
    for name, tensor in model.state_dict().items():
        if set(whole) & set(parents(name)):
            tensors[f"{PREFIX}{name}"] = tensor
    # Copies, because tied weights and shared factors share memory, which safetensors refuses.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    folder = make_folder(folder)
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / "adapter_config.json", config)

    if lost:
        raise ValueError(
            f"{folder}: saved without {', '.join(lost)}, trained parameters that belong to the "
            f"model itself or to a module with adapters, which PEFT's format can't hold: "
            f"save model.state_dict()"
        )


def config_of(model, layers, base_model, task, whole):
    """The content of adapter_config.json. whole: the modules that are saved whole."""
    layer = next(iter(layers.values()))  # all have one kind of magnitude
    magnitude, axis = layer.method.magnitude, layer.magnitude_axis
    alphas = {name: layer.scaling * layer.rank for name, layer in layers.items()}
    of_layers = [(layer.rank, alphas[name], layer.dropout.p) for name, layer in layers.items()]
    rank, alpha, dropout = statistics.mode(of_layers)
    ends = {name: any(other.endswith(f".{name}") for other in layers) for name in layers}
    patterns = {name: f"^{name}" if shared else name for name, shared in ends.items()}
    base, revision = split_revision(base_model)
    return {
        "peft_type": COLUMN_DORA if magnitude and axis == "column" else "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": target_modules(layers, dict(model.named_modules())),
        "modules_to_save": whole or None,
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "use_dora": magnitude,
        "rank_pattern": {patterns[n]: x.rank for n, x in layers.items() if x.rank != rank},
        "alpha_pattern": {patterns[n]: other for n, other in alphas.items() if other != alpha},
        "bias": "none",
        "inference_mode": True,
    }


def state_of(model):
    """A model's parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def parents(name):
    """The modules around a parameter, outermost first: "a.b.weight" -> ["a", "a.b"]."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def task_of(model, layers):
    """(PEFT's task type for a model or None, the heads that PEFT expects in the file)."""
    name, own = type(model).__name__, getattr(model, "task_type", None)  # that of heads.py
    for end, (task, heads) in TASKS.items():
        # PEFT adapts no layer in a head that it expects to find whole.
        adapted = any(head in layer.split(".") for layer in layers for head in heads)
        if (name.endswith(end) or task == own) and not adapted:
            return task, heads
    return "CAUSAL_LM" if hasattr(model, "generate") else None, []


def trained_beside(model, layers, heads):
    """
    (modules to save whole: the heads, and the owners of trained parameters other than adapters';
    the trained parameters that lie in none of these modules).
    """
    trained, owners = [], set()
    for name, parameter in model.named_parameters():
        owner, _, key = name.rpartition(".")
        adapters = owner in layers and key not in ("weight", "bias")
        if parameter.requires_grad and not adapters:
            trained.append(name)
            owners.add(owner)

    around = {module for name in layers for module in parents(f"{name}.weight")}
    modules = [name for name, _ in model.named_modules()]
    heads = {m for m in modules if m.endswith(tuple(heads))}  # as PEFT finds them
    chosen = (owners - around - {""}) | heads
    whole = [m for m in sorted(chosen) if not chosen & set(parents(m))]
    return whole, [name for name in trained if not set(whole) & set(parents(name))]


def target_modules(layers, modules):
    """What selects these layers alone: short names ("q_proj"), full names, or else a pattern."""

    def matched(targets):
        return {n for n in modules if any(f".{n}".endswith(f".{target}") for target in targets)}

    short, whole = sorted({name.rpartition(".")[2] for name in layers}), list(layers)
    for targets in (short, whole):
        if matched(targets) == set(layers):
            return targets
    return "|".join(map(re.escape, layers))


def read(folder, parameters):
    """
    The Adapter in a folder that `write` or PEFT wrote. parameters: the base's, {name: tensor}.
    rsLoRA's scale alpha / √rank (arXiv 2312.03732) is converted to an alpha. Raises
    FileNotFoundError, or ValueError for a damaged file or an unsupported variant of LoRA.
    """
    folder = Path(folder)
    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = read_json(settings)
    try:
        tensors = load_file(weights)
    except FileNotFoundError:
        problem = f"{weights} is missing (adapters are read from safetensors only)"
        raise FileNotFoundError(problem) from None
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from None
    check_config(config, settings)

    layers, saved = by_layer(tensors, folder, parameters, config.get("modules_to_save") or [])
    magnitude = bool(config.get("use_dora"))
    if {"lora_magnitude_vector" in parts for parts in layers.values()} != {magnitude}:
        problem = f"use_dora={magnitude}, which the tensors contradict"
        raise ValueError(f"{folder}: adapter_config.json has {problem}")

    sizes, alphas = {}, alphas_of(layers, config, settings)
    for name, parts in layers.items():
        # A damaged file may get any rank here: copy_into reports the misshapen tensor.
        matrix = "lora_A" in parts and parts["lora_A"].dim() == 2
        rank = max(1, len(parts["lora_A"])) if matrix else 1
        sizes[name] = rank, alphas[name] * (rank**0.5 if config.get("use_rslora") else 1)
    axis = "column" if config.get("peft_type") == COLUMN_DORA else "row"
    dropout = config.get("lora_dropout") or 0.0
    return Adapter(folder, layers, sizes, dropout, magnitude, axis, saved)


def check_config(config, where):
    """Raise ValueError for an adapter_config.json that BiDoRALinear does not support."""
    if config.get("peft_type", "LORA") not in ("LORA", COLUMN_DORA):
        problem = f"peft_type {config['peft_type']!r} is not supported"
        raise ValueError(f"{where}: {problem}; 'LORA', with or without use_dora, is")

    # "pissa", "olora", "loftq" … change the base before training; the file lacks that base.
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
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(len(pattern) > 1000 for pattern in patterns):
        problem = "is not a JSON object, or a pattern exceeds 1000 characters"
        raise ValueError(f"{where}: alpha_pattern {problem}")
    for alpha in (config.get("lora_alpha"), *patterns.values()):
        if not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
            problem = f"is missing or not a number below 1e9 ({str(alpha)[:40]})"
            raise ValueError(f"{where}: lora_alpha, or a value of alpha_pattern, {problem}")
    heads = config.get("modules_to_save") or []
    if not isinstance(heads, list) or not all(isinstance(head, str) for head in heads):
        raise ValueError(f"{where}: modules_to_save is not a list of names")


def by_layer(tensors, folder, parameters, modules_to_save):
    """Sort a file's tensors: ({layer: {"lora_A": tensor, …}}, {name: tensor of a whole module})."""
    layers, saved = {}, {}
    for key, tensor in tensors.items():
        # PEFT also saves the base weight of an adapted head.
        if key.endswith(".base_layer.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
            if torch.equal(parameters.get(f"{name}.weight", tensor).to(tensor.dtype), tensor):
                continue
            raise ValueError(f"{folder}: the adapter holds another weight of {name} than the base")

        name = key.removeprefix(PREFIX)
        if any(module.endswith(end) for module in parents(name) for end in modules_to_save):
            saved[name] = tensor
            continue

        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(NAMES)})(\.weight)?", key)
        if not match:
            problem = "belongs to no LoRA or DoRA adapter of linear layers, which is not supported"
            raise ValueError(f"{folder}: {key} {problem}")
        layers.setdefault(match[1], {})[match[2]] = tensor

    for end in modules_to_save:
        wanted = {n for n in parameters if any(module.endswith(end) for module in parents(n))}
        if wanted and not wanted & saved.keys():
            problem = f"modules_to_save names {end}, of which the file holds nothing"
            raise ValueError(f"{folder}: {problem}")
    return layers, saved


def alphas_of(names, config, where, seconds=5):
    """{layer: alpha} by PEFT's rule: the first matching pattern's, else lora_alpha."""
    alphas, end = dict.fromkeys(names, config["lora_alpha"]), time.monotonic() + seconds
    patterns = (config.get("alpha_pattern") or {}).items()
    try:
        compiled = [(regex.compile(rf"(.*\.)?({key})$"), alpha) for key, alpha in patterns]
        for name in names:
            for pattern, alpha in compiled:
                if pattern.match(name, timeout=max(1e-6, end - time.monotonic())):
                    alphas[name] = alpha
                    break
    except (regex.error, RecursionError, TimeoutError) as error:
        problem = f"an invalid regular expression, or slow ones ({error})"
        raise ValueError(f"{where}: alpha_pattern holds {problem}") from None
    return alphas


@torch.no_grad()
def copy_into(model, layers, adapter):
    """Copy an Adapter into a model and its layers, {name: BiDoRALinear}. Raises ValueError."""
    unfit = f"{adapter.folder}: the adapter does not fit the model:"
    for layer in layers.values():
        A, B = layer.method.factors(layer)
        if A is not layer.lora_A or B is not layer.lora_B:
            raise ValueError(
                "the model's adapters have other parameters, such as BiLoRA's λ, which a saved "
                "adapter holds folded into A and B: load it into a model without adapters"
            )

    own = named_tensors(layers)
    tensors = {
        f"{PREFIX}{name}.{NAMES[key]}": tensor
        for name, parts in adapter.tensors.items()
        for key, tensor in parts.items()
    }
    state = state_of(model)
    for name, tensor in adapter.saved.items():
        tensors[name] = tensor
        own |= {name: state[name]} if name in state else {}
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [tuple(side[name].shape) if name in side else "none" for side in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{unfit} {name} is {shapes[0]} in the file, {shapes[1]} in the model")
    for name, layer in layers.items():
        alphas = adapter.sizes[name][1], layer.scaling * layer.rank
        if not math.isclose(*alphas):
            raise ValueError(
                f"{unfit} {name} has alpha {alphas[0]:g} in the file, {alphas[1]:g} in the model"
            )

    for name, tensor in own.items():
        tensor.copy_(tensors[name])
        if name in adapter.saved and tensor.is_floating_point():
            tensor.requires_grad_(isinstance(tensor, torch.nn.Parameter))
