"""
The rules for a run's settings: which values and combinations are refused. Each function yields a
message for each problem; `refuse` raises the first one. method, hypergradient: the entries that the
config names (method: None for ft). The rules read their fields, so a new entry needs no new rule.
"""

import dataclasses
import itertools
import math
import os
import shutil

import torch

from support.run import distributed, hardware, settings
from support.text.datasets import BUILT_IN
from support.text.official import HUB_NAME

# Besides the settings that are 0 by default
MAY_BE_ZERO = set(
    "val_fraction length_penalty search_steps retrain_steps lr_floor damping temperature".split()
)
BELOW_ONE = {"dropout", "val_fraction", "test_fraction", "adam_beta2", "lr_floor"}
MOST = {"snapshots": 1000, "num_beams": 1000, "length_penalty": 100}


def refuse(*rules):
    """Raise ValueError with the first message that a rule yields, if any."""
    for message in itertools.chain(*rules):
        raise ValueError(message)


def is_packed(config):
    return config.quantize not in ("auto", "none")


def values(config, choices):
    """choices: {setting: its allowed values}."""
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            yield f"unknown {name} {value!r}" + settings.suggest(value, known)
    for field in dataclasses.fields(config):
        if field.type in (int, float):
            yield from number(field.name, getattr(config, field.name), field.default)
    out = getattr(config, "out_dir", "")
    if out and os.path.basename(out.rstrip("/")) in ("", ".", ".."):
        yield f"out_dir={out}: name a folder for this run alone"


def number(name, value, default):
    may_be_zero = default == 0 or name in MAY_BE_ZERO
    if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        yield f"{name}={value} must be {'at least 0' if may_be_zero else 'positive'}"
    if name in BELOW_ONE and value >= 1:
        yield f"{name}={value} must be below 1"
    most = MOST.get(name, 2**62 if isinstance(value, int) else math.inf)
    if value > most:
        yield f"{name}={value} must be at most {most}"


def device(config):
    place, _, index = config.device.partition(":")
    if config.device not in ("auto", "cpu", "cuda") and not (place == "cuda" and index.isdigit()):
        yield f"unknown device {config.device!r}: choose auto, cpu or cuda"
    # A tensor would show this too, but make each process open the first GPU.
    if place == "cuda" and int(index or 0) >= torch.cuda.device_count():
        yield f"device={config.device} is not available: use device=cpu"


def budget(config, bilevel, hypergradient):
    search, every = config.search_steps, config.upper_every
    if search + config.retrain_steps == 0:
        yield "search_steps=0, retrain_steps=0: there is nothing to train"
    if bilevel and search == 0:
        yield f"search_steps=0: method={config.method} needs a search, where its upper level learns"
    if bilevel and every > search:
        more = f"upper_every={every} is more than search_steps={search}"
        yield f"{more}: the upper level would never take a step"
    steps = config.hypergradient_steps
    if bilevel and "steps" in hypergradient.options and steps > every:
        yield (
            f"hypergradient_steps={steps} is more than upper_every={every}: an upper-level step "
            f"can only differentiate through the lower-level steps since the last one"
        )
    yield from micro_batch(config)


def micro_batch(config):
    micro, batch = config.micro_batch_size, config.batch_size
    if micro > batch:
        yield f"micro_batch_size={micro} is more than batch_size={batch}"


def data(config, bilevel):
    name, own = config.data, config.train_file
    elsewhere = os.path.isdir(name) or HUB_NAME.fullmatch(name)
    if not name and not own:
        built_in = "|".join(BUILT_IN)
        yield f"no data: give --train_file=yours.jsonl, or a built-in set with --data={built_in}"
    if os.path.isfile(name) and not own:
        yield f"data={name} is a file: give it as --train_file={name}"
    if name and not own and name not in BUILT_IN and not elsewhere:
        close = settings.suggest(name, BUILT_IN)
        yield f"unknown data {name!r}: no folder, no owner/name on the hub, no built-in set{close}"
    if config.val_file and not own:
        yield "val_file needs train_file: val is split off a data set's train, by val_fraction"
    if config.test_fraction and (config.test_file or not own):
        yield "test_fraction is of train_file alone: set train_file, and leave out test_file"
    if config.tune_size and config.test_file:
        yield "tune_size and test_file both replace the test examples: choose one"
    named = [x for x in ("text_column", "text_b_column", "label_column") if getattr(config, x)]
    if named and not own and name in BUILT_IN:
        yield f"{named[0]} is for your own files and sets of the hub: {name} has its own"
    if config.train_size and own:
        yield f"train_size={config.train_size}: train_file is taken whole: shorten it, or set data"
    if config.tune_size and name not in BUILT_IN:
        yield "tune_size is for a built-in set: give your tuning examples as --test_file"
    if config.label_prompt and "{text}" not in config.label_prompt:
        yield "label_prompt must contain {text}, where the example's text goes"
    val = config.val_file or config.val_fraction or (elsewhere and not own)
    if bilevel and not val:
        yield (
            f"method={config.method} needs validation data: its upper level learns from examples "
            f"that the lower level does not train on; give --val_file, or a val_fraction above 0"
        )
    if config.block_size == 1:
        yield "block_size=1 must be at least 2: a token and its successor"


def combinations(config, method):
    bilevel = method is not None and method.upper is not None
    for setting, default in (("upper_data", "val"), ("upper_weight_decay", 0)):
        if getattr(config, setting) != default and not bilevel:
            yield f"{setting} is for bidora and bilora; {config.method} has no upper level"
    if config.two_phases and (method is None or method.upper or not method.magnitude):
        yield f"two_phases=True is for method=dora; {config.method} has two phases, or no magnitude"
    if config.lora_plus != 1 and (method is None or bilevel):
        yield f"lora_plus={config.lora_plus:g} is for lora and dora, not for {config.method}"
    if config.two_phases and config.search_steps == 0:
        yield "two_phases=True needs search_steps, in which the magnitude learns"
    if config.group_by_length and not config.shuffle:
        yield "group_by_length=True draws a new order each epoch, shuffle=False keeps one: choose"
    if config.gram_weight and not (method and (method.magnitude or method.upper)):
        yield f"gram_weight is for methods with magnitudes or BiLoRA's factors, not {config.method}"
    if method is None and is_packed(config):
        yield (
            f"method=ft trains the base's own weights, which quantize={config.quantize} packs too "
            f"coarsely to train: use an adapter (bidora, dora, lora), or quantize=none"
        )
    if method is None and config.dtype == "bfloat16":
        yield "method=ft: small updates of bfloat16 weights round to nothing: use dtype=float32"


def compiled(config, second_order):
    if not config.compile:
        return
    if second_order:
        yield (
            "compile=True: torch.compile has no second derivatives: use compile=False, or "
            "hypergradient=first_order or finite_difference"
        )
    if is_packed(config):
        yield "compile=True does not work with bitsandbytes' packed weights: use quantize=none"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if hardware.choose_device(config.device) == "cpu" and not compiler:
        yield "compile=True needs a C++ compiler on a CPU: install g++, or use compile=False"


def sharded(config, second_order):
    if not config.fsdp:
        return
    if distributed.WORLD_SIZE == 1:
        yield "fsdp=True needs several processes: torchrun --nproc_per_node=2 (or more) train.py"
    if second_order and not config.gradient_checkpointing:
        yield (
            "fsdp=True gives the collected weights back before second derivatives need them: use "
            "gradient_checkpointing=True, which collects them again, or hypergradient=first_order"
        )
    if config.method == "ft":
        yield "fsdp=True shards frozen weights only: use an adapter, not method=ft"
    if is_packed(config):
        yield "fsdp=True can't shard packed weights: use quantize=none"
    if config.gram_weight:
        yield "fsdp=True has no whole weights to regularise: use gram_weight=0"
    if config.snapshots:
        yield (
            "fsdp=True has no whole weights for ΔM and ΔD: use snapshots=0, and python -m "
            "tools.analysis --tuned= on the finished run"
        )
    if config.compile:
        yield "fsdp=True is not supported with torch.compile: use compile=False"


def task(config, name, head, borrowed):
    """name: the task's; head: whether it trains a head; borrowed: whether transformers computes."""
    what = "a model that transformers computes" if borrowed else "a head"
    if (head or borrowed) and config.fsdp:
        yield f"fsdp=True shards model.py's language models only, not {what}: leave it out"
    if (head or borrowed) and config.auto_hardware:
        yield (
            "auto_hardware=True knows the memory of model.py's language models only: set "
            "micro_batch_size"
        )
    if borrowed and is_packed(config):
        yield f"quantize={config.quantize} packs model.py's models only: use quantize=none"
    if (head or borrowed) and config.compile:
        yield f"compile=True does not work with {what}: use compile=False"
    if head and config.label_prompt:
        yield f"label_prompt is a question to a language model; task={name} reads the text alone"
    if not head and config.label_prompt and name != "label_words":
        yield f"label_prompt is for task=label_words, not task={name}: its prompts are in the data"
    if name != "generation" and (config.num_beams > 1 or config.no_repeat_ngram_size):
        yield f"num_beams and no_repeat_ngram_size are for task=generation, not task={name}"
    if head and not borrowed and config.method == "ft":
        yield "method=ft trains no head on a language model: use an adapter, or task=label_words"


STEPS = "set --search_steps and --retrain_steps"
OTHER_NAMES = {  # {a setting of another program: what to write here}
    name: instead
    for instead, names in {
        "use --lower_lr (and --upper_lr for the upper level)": "lr learning_rate",
        f"{STEPS}, each with --batch_size examples a step": "epochs num_epochs num_train_epochs",
        STEPS: "steps max_steps max_iters",
        "use --rank": "r lora_r lora_rank",
        "use --alpha": "lora_alpha",
        "use --dropout": "lora_dropout",
        "use --out_dir": "output_dir",
        "use --data, or --train_file for a file of your own": "dataset",
        "use --text_column": "text_column_name text_column_names",
        "use --label_column": "label_column_name",
        "use --model": "model_name_or_path",
        "write --model=owner/name@revision": "revision",
        "use --batch_size, of all processes together": "per_device_train_batch_size",
        "use --micro_batch_size, of examples in memory": "gradient_accumulation_steps accumulate",
        "use --block_size, in tokens": "max_length max_seq_length",
        "use --resume": "resume_from_checkpoint",
        "use --dtype=bfloat16": "bf16",
        "use --quantize=nf4": "load_in_4bit",
        "use --hypergradient_steps": "unroll_steps terms cg_iterations",
        "use --hypergradient_lr": "unroll_lr neumann_alpha",
        "use --method=bilora_softmax or bilora_binary": "lambda_kind",
        "edit learning_rate_scale in train.py, which warms up over a tenth of the steps": "warmup",
        "evaluation chooses its own batch size": "eval_batch_size",
    }.items()
    for name in names.split()
}
