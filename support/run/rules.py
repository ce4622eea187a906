"""
The rules for a run's settings: which values and which combinations are refused.

config.check calls these. method, hypergradient: the entries that the config names (method: None for
ft). The rules read these entries' fields, so a new entry needs no new rule.
"""

import dataclasses
import math
import os
import shutil

import torch

from support.run import distributed, hardware, settings
from support.text.datasets import BUILT_IN
from support.text.official import HUB_NAME

MAY_BE_ZERO = set(
    "seed dropout weight_decay upper_weight_decay gram_weight val_fraction lower_lr retrain_lr "
    "lr_floor damping block_size train_size test_size tune_size length_penalty "
    "no_repeat_ngram_size micro_batch_size hypergradient_steps hypergradient_lr search_steps "
    "retrain_steps snapshots".split()
)
BELOW_ONE = {"dropout", "val_fraction", "adam_beta2", "lr_floor"}
MOST = {"snapshots": 1000, "num_beams": 1000, "length_penalty": 100}


def refuse(problem, message):
    if problem:
        raise ValueError(message)


def check_values(config, choices):
    """Refuse a value that is none of its setting's choices, {name: choices}, or out of range."""
    for name, known in choices.items():
        value = getattr(config, name)
        refuse(value not in known, f"unknown {name} {value!r}" + settings.suggest(value, known))
    for name in (field.name for field in dataclasses.fields(config) if field.type in (int, float)):
        value, least = getattr(config, name), "at least 0" if name in MAY_BE_ZERO else "positive"
        wrong = value < 0 or (value == 0 and least == "positive") or not math.isfinite(value)
        refuse(wrong, f"{name}={value} must be {least}")
        refuse(name in BELOW_ONE and value >= 1, f"{name}={value} must be below 1")
        most = MOST.get(name, 2**62)
        large = (name in MOST or isinstance(value, int)) and value > most
        refuse(large, f"{name}={value} must be at most {most}")
    out = os.path.basename(config.out_dir.rstrip("/"))
    here = config.out_dir and out in ("", ".", "..")
    refuse(here, f"out_dir={config.out_dir}: name a folder for this run alone")


def check_device(config):
    kind, _, index = config.device.partition(":")
    known = config.device in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdigit())
    refuse(not known, f"unknown device {config.device!r}: choose auto, cpu or cuda")
    refuse(  # without a tensor there: each process would open the first GPU
        kind == "cuda" and int(index or 0) >= torch.cuda.device_count(),
        f"device={config.device} is not available: use device=cpu",
    )


def check_budget(config, bilevel, hypergradient):
    search, retrain, every = config.search_steps, config.retrain_steps, config.upper_every
    refuse(
        search + retrain == 0,
        f"search_steps={search}, retrain_steps={retrain}: there is nothing to train",
    )
    refuse(
        bilevel and search == 0,
        f"search_steps=0: method={config.method} needs a search, in which its upper level learns",
    )
    refuse(
        bilevel and every > search,
        f"upper_every={every} is more than search_steps={search}: "
        f"the upper level would never take a step",
    )
    steps = config.hypergradient_steps
    refuse(
        bilevel and "steps" in hypergradient.options and steps > every,
        f"hypergradient_steps={steps} is more than upper_every={every}: an upper-level step can "
        f"only differentiate through the lower-level steps since the previous one",
    )
    check_micro_batch(config)


def check_micro_batch(config):
    micro, batch = config.micro_batch_size, config.batch_size
    refuse(micro > batch, f"micro_batch_size={micro} is more than batch_size={batch}")


def check_data(config, bilevel):
    own, names = config.train_file, "|".join(BUILT_IN)
    refuse(
        not own and not config.data,
        f"no data: give --train_file=yours.jsonl, or a built-in set with --data={names}",
    )
    elsewhere = os.path.isdir(config.data) or HUB_NAME.fullmatch(config.data)
    refuse(
        config.data and not own and config.data not in BUILT_IN and not elsewhere,
        f"unknown data {config.data!r}: no folder, no owner/name on the hub, and no built-in set"
        + settings.suggest(config.data, BUILT_IN),
    )
    refuse(
        (config.val_file or config.test_file) and not own,
        "val_file and test_file need train_file; a built-in data set has its own splits",
    )
    refuse(
        config.train_size and own,
        f"train_size={config.train_size}: train_file is taken whole; make it as small as you want, "
        f"or use --data",
    )
    refuse(
        config.tune_size and config.data not in BUILT_IN,
        "tune_size is for a built-in set: give your tuning examples as --test_file",
    )
    refuse(
        config.label_prompt and "{text}" not in config.label_prompt,
        "label_prompt must contain {text}, where the example's text goes",
    )
    refuse(
        bilevel and not config.val_file and config.val_fraction == 0 and (own or not elsewhere),
        f"method={config.method} needs validation data: its upper level learns from examples that "
        f"the lower level does not train on; give --val_file, or a val_fraction above 0",
    )
    refuse(config.block_size == 1, "block_size=1 must be at least 2: a token and its successor")


def check_combinations(config, method, second_order):
    bilevel = method is not None and method.upper is not None
    refuse(
        config.upper_data != "val" and not bilevel,
        f"upper_data={config.upper_data} is for bidora and bilora; {config.method} has no upper "
        f"level",
    )
    refuse(
        config.two_phases and (method is None or method.upper or not method.magnitude),
        f"two_phases=True is for method=dora; {config.method} has no magnitude to fix, or has two "
        f"phases anyway",
    )
    refuse(
        config.two_phases and config.search_steps == 0,
        "two_phases=True needs search_steps, in which the magnitude learns",
    )
    refuse(
        config.group_by_length and not config.shuffle,
        "group_by_length=True draws a new order each epoch, and shuffle=False keeps one: choose",
    )
    refuse(
        config.upper_weight_decay and not bilevel,
        f"upper_weight_decay={config.upper_weight_decay} is for bidora and bilora; {config.method} "
        f"has no upper level",
    )
    packed, ft = config.quantize not in ("auto", "none"), method is None
    regularised = not ft and (method.magnitude or method.upper)
    refuse(
        config.gram_weight and not regularised,
        f"gram_weight={config.gram_weight} regularises directions with a magnitude, or BiLoRA's "
        f"factors; method={config.method} has neither",
    )
    refuse(
        ft and packed,
        f"method=ft trains the base's own weights, which quantize={config.quantize} packs too "
        f"coarsely to train: use an adapter (bidora, dora, lora), or quantize=none",
    )
    refuse(
        ft and config.dtype == "bfloat16",
        "method=ft trains the weights themselves, and in bfloat16 small updates round to nothing: "
        "use dtype=float32",
    )
    check_compile(config, packed, second_order)


def check_compile(config, packed, second_order):
    if not config.compile:
        return
    refuse(
        second_order,
        "compile=True: torch.compile has no second derivatives, which this hypergradient needs: "
        "use hypergradient=first_order or finite_difference, or compile=False",
    )
    refuse(
        packed,
        f"compile=True does not work with bitsandbytes' packed weights: use quantize=none, not "
        f"{config.quantize}, or compile=False",
    )
    refuse(
        hardware.choose_device(config.device) == "cpu"
        and not shutil.which(os.environ.get("CXX", "g++")),
        "compile=True needs a C++ compiler on a CPU, and there is no g++: install one, or use "
        "compile=False",
    )


def check_task(config, name, head, encoder):
    """name: the task's; head: whether it trains one; encoder: whether the model is one."""
    searched = config.num_beams > 1 or config.no_repeat_ngram_size
    what = "an encoder" if encoder else "a head"
    for problem, message in (
        (head and config.fsdp, f"fsdp=True shards language models only, not {what}: leave it out"),
        (
            head and config.auto_hardware,
            f"auto_hardware=True knows the memory of language models only, not of {what}: set "
            f"micro_batch_size or gradient_checkpointing yourself",
        ),
        (
            encoder and config.quantize not in ("auto", "none"),
            f"quantize={config.quantize} packs language models only: use quantize=none",
        ),
        (head and config.compile, f"compile=True does not work with {what}: use compile=False"),
        (
            head and config.label_prompt,
            f"label_prompt is a question to a language model; task={name} reads the text alone",
        ),
        (
            not head and config.label_prompt and name != "label_words",
            f"label_prompt is for task=label_words, not task={name}: its prompts are in the data",
        ),
        (
            searched and name != "generation",
            f"num_beams and no_repeat_ngram_size are for task=generation, not task={name}",
        ),
        (
            head and not encoder and config.method == "ft",
            "method=ft does not train a head on a language model: use an adapter (bidora, dora, "
            "lora), or task=label_words",
        ),
    ):
        refuse(problem, message)


def check_fsdp(config, second_order):
    refuse(
        distributed.WORLD_SIZE == 1,
        "fsdp=True shards a model over processes, but there is only one: start it with "
        "torchrun --nproc_per_node=2 (or more) train.py ...",
    )
    for problem, message in (
        (
            second_order and not config.gradient_checkpointing,
            "gives the collected weights back before second derivatives need them: use "
            "gradient_checkpointing=True, which collects them again, or hypergradient=first_order",
        ),
        (config.method == "ft", "shards frozen weights only: use an adapter, not method=ft"),
        (config.quantize not in ("auto", "none"), "can't shard packed weights: use quantize=none"),
        (config.gram_weight, "has no whole weights to regularise: use gram_weight=0"),
        (
            config.snapshots,
            "has no whole weights for ΔM and ΔD: use snapshots=0, and python -m tools.analysis "
            "--tuned= on the finished run",
        ),
        (config.compile, "is not supported with torch.compile: use compile=False"),
    ):
        refuse(problem, f"fsdp=True {message}")
