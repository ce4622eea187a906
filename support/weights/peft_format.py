"""
Adapters as PEFT saves them: adapter_model.safetensors and adapter_config.json.

bidora.save_adapter and bidora.load_adapter call this file. It saves a method's factors A and B as
LoRA's, and its scale s as alpha = s · rank. PEFT has no magnitude per column: such an adapter gets
a peft_type of our own, which PEFT refuses. Other trained modules, such as a classifier, are saved
whole (modules_to_save), as are modules with running statistics, which training changes, too.

A module that is compiled, parallel or checkpointed is saved and loaded under its plain name.
"""

import math
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import regex
import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from support.run.files import make_folder, malformed, replacing, write_json
from support.weights.other_formats import NAMES, PREFIX, read_adapter
from support.weights.pretrained import split_revision

COLUMN_DORA = "COLUMN_DORA"  # the peft_type of an adapter with a magnitude per column
# What modules that compile, checkpoint, shard or copy another one call it
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
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
    sizes: dict  # {layer, by its name in the model: (rank, alpha)}
    dropout: float
    magnitude: bool  # whether the layers have one
    axis: str  # of the magnitude: "row" or "column"
    saved: dict  # {name: tensor} of the modules that were saved whole


def plain(model):
    """
    ({a module's name: its name without the modules that wrap others}, {plain name: tensor} of
    parameters and persistent buffers, tied ones under each name).
    """
    modules, names, state = dict(model.named_modules(remove_duplicate=False)), {}, {}
    for name, module in modules.items():  # the modules around it come first
        around, _, last = name.rpartition(".")
        wrapped = last in WRAPPERS and (last != "module" or isinstance(modules[around], PARALLEL))
        names[name] = names[around] if wrapped else f"{names.get(around, '')}.{last}".strip(".")
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                state[f"{names[name]}.{key}".strip(".")] = tensor
    return names, state


def without_wrappers(name, known=()):
    """A name or pattern from a wrapped model's file, without the wrappers, unless it is known."""
    wrappers = "|".join(WRAPPERS)
    inside = rf"(?<![\w.])(({wrappers})\\?\.)+|\\?\.({wrappers})\b"
    return name if name in known else re.sub(inside, "", name)


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

    names, state = plain(model)
    layers = {names[name]: layer for name, layer in layers.items()}
    modules = {names[name]: module for name, module in model.named_modules()}  # the wrapped ones
    task, heads = task_of(modules[""], layers)
    whole, lost = trained_beside(modules, state, layers, heads)
    config = config_of(modules, layers, base_model, task, whole)
    tensors = named_tensors(layers)
    for name, tensor in state.items():
        if set(whole) & set(parents(name)):
            tensors[f"{PREFIX}{name}"] = tensor.detach()
    # Copies, since safetensors refuses tensors that share memory, as tied weights do.
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


def config_of(modules, layers, base_model, task, whole):
    """adapter_config.json's content. modules: the model's, by name; whole: names of modules."""
    layer = next(iter(layers.values()))  # all have one kind of magnitude
    magnitude, axis = layer.method.magnitude, layer.magnitude_axis
    ranks = {name: len(layer.factors()[0]) for name, layer in layers.items()}
    alphas = {name: layer.scaling * ranks[name] for name, layer in layers.items()}
    of_layers = [(ranks[name], alphas[name], layer.dropout.p) for name, layer in layers.items()]
    rank, alpha, dropout = statistics.mode(of_layers)
    ends = {name: any(other.endswith(f".{name}") for other in layers) for name in layers}
    patterns = {name: f"^{name}" if shared else name for name, shared in ends.items()}
    base, revision = split_revision(base_model)
    # PEFT also takes a module whose name merely ends so ("pre_classifier"), unless it has a prefix.
    others = modules.keys() - {*whole}
    whole = [PREFIX * any(n.endswith(name) for n in others) + name for name in whole]
    return {
        "peft_type": COLUMN_DORA if magnitude and axis == "column" else "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": target_modules(layers, modules),
        "modules_to_save": whole or None,
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "use_dora": magnitude,
        "rank_pattern": {patterns[n]: other for n, other in ranks.items() if other != rank},
        "alpha_pattern": {patterns[n]: other for n, other in alphas.items() if other != alpha},
        "bias": "none",
        "inference_mode": True,
    }


def parents(name):
    """The modules around a parameter, outermost first: "a.b.weight" -> ["a", "a.b"]."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def task_of(model, layers):
    """(PEFT's task type for a model or None, the heads that PEFT expects in the file)."""
    name, known_task = type(model).__name__, getattr(model, "task_type", None)  # heads.py's
    parts = {part for layer in layers for part in layer.split(".")}
    for end, (task, heads) in TASKS.items():
        # PEFT adapts no layer in a head that it expects to find whole.
        adapted = any(part.endswith(tuple(heads)) for part in parts)
        if (name.endswith(end) or task == known_task) and not adapted:
            return task, heads
    return "CAUSAL_LM" if hasattr(model, "generate") else None, []


def trained_beside(modules, state, layers, heads):
    """
    (modules to save whole: the heads, those with running statistics, and the owners of trained
    parameters other than adapters'; the trained parameters that lie in none of these modules).
    """
    trained = {}  # {tensor: its first name}
    for name, tensor in state.items():
        owner, _, key = name.rpartition(".")
        adapters = owner in layers and key not in ("weight", "bias")
        if (tensor.requires_grad and not adapters) or key == "running_mean":
            trained.setdefault(id(tensor), name)

    around = {module for name in layers for module in parents(f"{name}.weight")}
    owners = {name.rpartition(".")[0] for name in trained.values()}
    heads = {m for m in modules if m.endswith(tuple(heads))}  # as PEFT finds them
    chosen = (owners - around - {""}) | heads
    whole = [m for m in sorted(chosen) if not chosen & set(parents(m))]
    return whole, [name for name in trained.values() if not set(whole) & set(parents(name))]


def ending(names, ends):
    """The names that are, or end with, one of several."""
    return {n for n in names if any(f".{n}".endswith(f".{end}") for end in ends)}


def target_modules(layers, modules):
    """What selects exactly these layers: short names ("q_proj"), full names, or a pattern."""
    short, whole = sorted({name.rpartition(".")[2] for name in layers}), list(layers)
    for targets in (short, whole):
        if ending(modules, targets) == set(layers):
            return targets
    return "|".join(map(re.escape, layers))


def read(folder, model, as_linear):
    """
    The Adapter for a model, from a folder that `write`, PEFT, mlx-lm or torchtune wrote. as_linear:
    bidora's, true of linear layers. rsLoRA's scale alpha / √rank (arXiv 2312.03732) becomes an
    alpha. Raises FileNotFoundError, or ValueError for a file that is damaged or does not fit the
    model, and for an unsupported variant of LoRA.
    """
    folder = Path(folder)
    settings = folder / "adapter_config.json"
    names, state = plain(model)
    in_model = {short: name for name, short in names.items()}  # the wrapped module, not its wrapper
    config, tensors = read_adapter(folder, *shape_of(model.get_submodule(in_model[""])))
    check_config(config, settings)
    linears = {short for short, name in in_model.items() if as_linear(model.get_submodule(name))}
    layers, saved = by_layer(tensors, folder, linears, state, config.get("modules_to_save") or [])
    magnitude = bool(config.get("use_dora"))
    if {"lora_magnitude_vector" in parts for parts in layers.values()} - {magnitude}:
        problem = f"use_dora={config.get('use_dora')!s:.40}, which the tensors contradict"
        raise ValueError(f"{settings} has {problem}: set it to what was trained")
    if strange := sorted(layers.keys() - linears):
        problem = f"the adapter does not fit the model: no linear layer {strange[0]}"
        raise ValueError(f"{folder}: {problem}")
    present = layers.keys() | {name.rpartition(".")[0] for name in saved}
    if missing := sorted(targeted(config, linears, settings) - present):
        problem = f"{len(missing)} of the layers that {settings.name} names, first {missing[0]}"
        raise ValueError(f"{folder}: the adapter is incomplete: it lacks {problem}")

    sizes, alphas = {}, alphas_of(layers, config, settings)
    for name, parts in layers.items():
        # A damaged file may get any rank here: copy_into reports the misshapen tensor.
        matrix = "lora_A" in parts and parts["lora_A"].dim() == 2
        rank = max(1, len(parts["lora_A"])) if matrix else 1
        sizes[in_model[name]] = rank, alphas[name] * (rank**0.5 if config.get("use_rslora") else 1)
    axis = "column" if config.get("peft_type") == COLUMN_DORA else "row"
    return Adapter(folder, layers, sizes, config.get("lora_dropout") or 0.0, magnitude, axis, saved)


def shape_of(model):
    """(a model's model_type, how many heads of queries and of keys it has, how many blocks)."""
    config = getattr(getattr(model, "decoder", model), "config", None)
    family = getattr(config, "hf", {}).get("model_type", getattr(config, "model_type", None))
    heads = [getattr(config, f"num_{n}_heads", None) for n in ("attention", "key_value")]
    return family, heads, getattr(config, "num_hidden_layers", 0)


def check_config(config, where):
    """Raise ValueError for an adapter_config.json that BiDoRALinear does not support."""
    form, start = config.get("peft_type", "LORA"), config.get("init_lora_weights", True)
    if form not in ("LORA", COLUMN_DORA):
        known = "'LORA', with or without use_dora, is"
        raise ValueError(f"{where}: peft_type {form!r} is not supported; {known}")
    # "pissa", "olora", "loftq" … change the base before training; the file lacks that base.
    if start not in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        raise ValueError(
            f"{where}: init_lora_weights {start!r} changes the base itself: have PEFT convert it "
            f"to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    off = (None, False, "none", "", [], {})
    more = {key: value for key, value in config.items() if key not in KNOWN and value not in off}
    unsupported = [k for k, x in more.items() if x is True or not isinstance(x, (int, float))]
    if unsupported:
        raise ValueError(f"{where}: {', '.join(unsupported)} is not supported")

    dropout, patterns = config.get("lora_dropout") or 0.0, config.get("alpha_pattern") or {}
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{where}: lora_dropout={dropout!r} must be at least 0 and below 1")
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


def by_layer(tensors, folder, linears, state, modules_to_save):
    """
    Sort a file's tensors: ({layer: {"lora_A": tensor, …}}, {name: tensor of a whole module}).
    linears: the names of the base's linear layers; state: its tensors.
    """
    layers, saved = {}, {}
    adapters = re.compile(rf"(?:.+\.)?{re.escape(PREFIX)}(.+)\.({'|'.join(NAMES)})(\.weight)?")
    for key, tensor in tensors.items():
        name = without_wrappers(key.rpartition(PREFIX)[2], state)
        base = state.get(name.replace(".base_layer.", "."))
        if match := adapters.fullmatch(key):
            layers.setdefault(without_wrappers(match[1], linears), {})[match[2]] = tensor
        elif any(f"{PREFIX}{m}".endswith(end) for m in parents(name) for end in modules_to_save):
            saved[name] = tensor
        elif base is None:
            problem = "belongs to no LoRA or DoRA adapter of linear layers, which is not supported"
            raise ValueError(f"{folder}: {key} {problem}")
        # PEFT also saves base weights: an adapted head's, and on request the embeddings'.
        elif not torch.equal(base.to(tensor.device, tensor.dtype), tensor):
            raise ValueError(f"{folder}: the adapter holds another {name} than the base")

    for end in modules_to_save:
        wanted = {n for n in state if any(f"{PREFIX}{m}".endswith(end) for m in parents(n))}
        if wanted and not wanted & saved.keys():
            problem = f"modules_to_save names {end}, of which the file holds nothing"
            raise ValueError(f"{folder}: {problem}")
    return layers, saved


def matching(pattern, names, where, end):
    """The names that a pattern matches as a whole. end: when to stop, on the monotonic clock."""
    try:
        compiled = regex.compile(pattern)
        seconds = (max(1e-6, end - time.monotonic()) for _ in names)
        return {n for n, left in zip(names, seconds) if compiled.fullmatch(n, timeout=left)}
    except (regex.error, RecursionError, TimeoutError) as error:
        problem = f"an invalid regular expression, or slow ones ({error})"
        raise ValueError(f"{where} holds {problem}") from None


def select(target, model, linears):
    """The names of {name: layer} that a string selects as PEFT's target_modules would."""
    if target.lower() != "all-linear":
        where = f"target_modules={target!r}"
        return [n for n in linears if n in matching(target, linears, where, time.monotonic() + 5)]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {"lm_head", *TASKS["ForSequenceClassification"][1]}  # of models without that function
    weights = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, layer in linears.items()
        if layer is not output and name not in heads and weights[id(layer.weight)] < 2
    ]


def targeted(config, names, where):
    """The names of a model's linear layers that an adapter_config.json selects, by PEFT's rule."""

    def by(targets):
        if isinstance(targets, str):
            return matching(targets, names, f"{where}: target_modules", time.monotonic() + 5)
        return ending(names, targets or ())

    with malformed(where):
        chosen = by(config.get("target_modules")) - by(config.get("exclude_modules"))
        numbers = config.get("layers_to_transform")
        if numbers not in (None, []):  # a layer's first number counts
            first = {n: re.match(r".*?\.[^.]*\.(\d+)\.", n) for n in chosen}
            wanted = [numbers] if isinstance(numbers, int) else numbers
            chosen = {n for n, number in first.items() if number and int(number[1]) in wanted}
    return set() if config.get("layers_pattern") else chosen


def first_matches(names, patterns, where):
    """
    By PEFT's rule, the first pattern that matches counts: ({layer: that pattern}, {layer: the
    number of a later one, if it differs}). patterns: {pattern: number}.
    """
    first, unclear, end = {}, {}, time.monotonic() + 5
    for pattern, number in patterns.items():
        plain = rf"(.*\.)?({pattern}|{without_wrappers(pattern)})"
        for name in matching(plain, names, where, end):
            if patterns[first.setdefault(name, pattern)] != number:
                unclear[name] = number
    return first, unclear


def by_patterns(sizes, rank_pattern, alpha_pattern):
    """{layer: (rank, alpha)} by a user's patterns. Raises ValueError for one without effect."""
    changed = []
    for where, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        first, _ = first_matches(sizes, patterns or {}, where)
        if idle := [pattern for pattern in patterns or {} if pattern not in first.values()]:
            reason = "no adapted layer matches it, or an earlier pattern matches first"
            raise ValueError(f"{where}: {idle[0]!r} has no effect: {reason}")
        changed.append({name: patterns[pattern] for name, pattern in first.items()})
    ranks, alphas = changed
    return {n: (ranks.get(n, rank), alphas.get(n, alpha)) for n, (rank, alpha) in sizes.items()}


def alphas_of(names, config, where):
    """{layer: alpha} of an adapter_config.json: its pattern's, else lora_alpha."""
    patterns = config.get("alpha_pattern") or {}
    first, unclear = first_matches(names, patterns, f"{where}: alpha_pattern")
    alphas = {name: patterns[pattern] for name, pattern in first.items()}
    for name, alpha in list(unclear.items())[:1]:
        both = f"patterns give {name} the alphas {alphas[name]:g}, which is taken, and {alpha:g}"
        lost = "PEFT sorts patterns when it saves, so the order that was meant is lost"
        print(f"note: {where}: {both} (layers: {len(unclear)}); {lost}", file=sys.stderr)
    return dict.fromkeys(names, config["lora_alpha"]) | alphas


@torch.no_grad()
def copy_into(model, layers, adapter):
    """Copy an Adapter into a model and its layers, {name: BiDoRALinear}. Raises ValueError."""
    unfit = f"{adapter.folder}: the adapter does not fit the model:"
    pairs = [(x.method.factors(x), (x.lora_A, x.lora_B)) for x in layers.values()]
    if any(a is not b for factors, parameters in pairs for a, b in zip(factors, parameters)):
        raise ValueError(
            "the model's adapters have other parameters, such as BiLoRA's λ, which a saved adapter "
            "holds folded into A and B: load it as lora, dora or bidora into one without adapters"
        )

    names, state = plain(model)
    ours = named_tensors({names[name]: layer for name, layer in layers.items()})
    ours |= {name: state[name] for name in adapter.saved if name in state}
    tensors = dict(adapter.saved)
    for name, parts in adapter.tensors.items():
        tensors |= {f"{PREFIX}{name}.{NAMES[key]}": tensor for key, tensor in parts.items()}
    for name in sorted(ours.keys() | tensors.keys()):
        shapes = [tuple(side[name].shape) if name in side else "none" for side in (tensors, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{unfit} {name} is {shapes[0]} in the file, {shapes[1]} in the model")
    for name, layer in layers.items():
        alphas = adapter.sizes[name][1], layer.scaling * layer.rank
        if not math.isclose(*alphas):
            raise ValueError(
                f"{unfit} {name} has alpha {alphas[0]:g} in the file, {alphas[1]:g} in the model"
            )

    for name, tensor in ours.items():
        tensor.copy_(tensors[name])
        if name in adapter.saved and tensor.is_floating_point():
            tensor.requires_grad_(isinstance(tensor, torch.nn.Parameter))
