"""
The rules for a run's settings: which values and combinations are refused. Each function gives a
message for each problem, and `refuse` raises them all. method, hypergradient: the entries that the
config names (method: None for ft). The rules read their fields, so a new entry needs no new rule.
"""

import dataclasses
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
BELOW_ONE = set("dropout val_fraction test_fraction held_fraction adam_beta2 lr_floor".split())
MOST = {"snapshots": 1000, "num_beams": 1000, "length_penalty": 100}


def refuse(*rules):
    """Raise ValueError with the messages that the rules yield, if any, in one line."""
    if messages := [message for rule in rules for message in rule]:
        raise ValueError("; ".join(messages))


def is_packed(config):
    return config.quantize in ("nf4", "fp4", "int8")


def changed(config, names):
    """The names of these settings that are not at their defaults, as text; "" if all are."""
    plain = type(config)()
    return ", ".join(n for n in names.split() if getattr(config, n) != getattr(plain, n))


def those(*cases, of=""):
    """The messages, each after `of`, of the cases that apply. A case: (whether, message)."""
    return [of + message for applies, message in cases if applies]


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
    zero = default == 0 or name in MAY_BE_ZERO
    below = not math.isfinite(value) or value < 0 or (value == 0 and not zero)
    most = MOST.get(name, 2**62 if isinstance(value, int) else math.inf)
    return those(
        (below, f"must be {'at least 0' if zero else 'positive'}"),
        (name in BELOW_ONE and value >= 1, "must be below 1"),
        (value > most, f"must be at most {most}"),
        of=f"{name}={value} ",
    )


def device(config):
    place, _, index = config.device.partition(":")
    known = config.device in ("auto", "cpu", "cuda", "mps") or place == "cuda" and index.isdigit()
    # A tensor would show this too, but with it each process would open the first GPU.
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    lacks = known and int(index or 0) >= counts.get(place, math.inf)
    return those(
        (not known, f"unknown device {config.device!r}: choose auto, cpu, cuda or mps"),
        (lacks, f"device={config.device} is not available: use device=cpu"),
    )


def budget(config, bilevel, hypergradient):
    search, every, steps = config.search_steps, config.upper_every, config.hypergradient_steps
    looks_back, chooses = "steps" in hypergradient.options, changed(config, "keep patience")
    never = f"upper_every={every} is more than search_steps={search}: the upper level never learns"
    gone = f"hypergradient_steps={steps} is more than upper_every={every}, and an upper-level step "
    gone += "can only look back on the lower-level steps since the last one"
    reason = "val is trained on, by the upper level or in the end, and test judges the result"
    micro, batch = config.micro_batch_size, config.batch_size
    return those(
        (micro > batch, f"micro_batch_size={micro} is more than batch_size={batch}"),
        (search + config.retrain_steps == 0, "search_steps=0, retrain_steps=0: nothing to train"),
        (bilevel and search == 0, "search_steps=0: the upper level needs a search to learn in"),
        (bilevel and every > search > 0, never),
        (bilevel and looks_back and steps > every, gone),
        (chooses and not config.eval_every, f"{chooses}: set eval_every, in steps, too"),
        (chooses and not config.held_fraction, f"{chooses}: set held_fraction, too: {reason}"),
    )


def with_steps(config, rows):
    """config with steps for its epochs of so many rows; search and retrain keep their ratio."""
    search, retrain = config.search_steps, config.retrain_steps
    if config.epochs:
        total = round(config.epochs * rows / min(config.batch_size, rows))
        share = round(total * search / (search + retrain))
        search = search and max(share, config.upper_every)  # one round at least
        retrain = retrain and max(total - search, 1)
    return dataclasses.replace(config, search_steps=search, retrain_steps=retrain)


def data(config, bilevel):
    c, name, own, built_in = config, config.data, config.train_file, config.data in BUILT_IN
    elsewhere = os.path.isdir(name) or HUB_NAME.fullmatch(name)
    is_file = os.path.isfile(name) and not own
    unknown = name and not (own or built_in or elsewhere or is_file)
    near = settings.suggest(name, BUILT_IN)
    named = changed(c, "text_column text_b_column label_column")
    columns = [x for x in (c.text_column, c.text_b_column, c.label_column) if x]
    sets, asks = "|".join(BUILT_IN), c.label_prompt and "{text}" not in c.label_prompt
    no_val = bilevel and not (c.val_file or c.val_fraction or elsewhere and not own)
    return those(
        (not name and not own and c.resume, "no data: repeat the run's command, and --resume=True"),
        (not name and not own, f"no data: give --train_file=yours.jsonl, or --data={sets}"),
        (unknown, f"unknown data {name!r}: no folder, hub name (owner/name) or built-in set{near}"),
        (is_file, f"data={name} is a file: give it as --train_file={name}"),
        (c.val_file and not own, "val_file needs train_file: other sets split val off their train"),
        (c.test_fraction and not own, "test_fraction is of train_file: set train_file"),
        (c.test_fraction and c.test_file, "test_fraction and test_file are both the test: choose"),
        (c.tune_size and c.test_file, "tune_size and test_file replace the test: choose one"),
        (named and built_in and not own, f"{named}: for your own files and sets of the hub"),
        (len({*columns}) < len(columns), f"{named} must name different columns"),
        (c.train_size and own, f"train_size={c.train_size}: train_file is taken whole: shorten it"),
        (c.tune_size and not built_in, "tune_size is for a built-in set: use --test_file"),
        (asks, "label_prompt must contain {text}, where the example's text goes"),
        (no_val, f"method={c.method} needs validation data: set val_file, or val_fraction above 0"),
        (c.block_size == 1, "block_size=1 must be at least 2: a token and its successor"),
    )


def splits(config, splits, bilevel):
    """splits: {name: examples}."""
    no_val = bilevel and not splits["val"] and config.upper_data == "val"
    unseen = splits.get("held") or splits["test"]
    return those(
        (no_val, f"{config.data} has no dev set for the upper level: set val_fraction above 0"),
        (config.eval_every and not unseen, "eval_every needs held_fraction or test_file"),
    )


def combinations(config, method):
    c, upper, magnitude = config, method and method.upper, method and method.magnitude
    uppers = changed(c, "upper_data upper_weight_decay")
    lacking = changed(c, "quantize precondition upper_every snapshots optimizer compile")
    sizes = "rank alpha dropout target_modules magnitude_only magnitude_axis init"
    sized = changed(c, f"{sizes} rank_pattern alpha_pattern")
    forgets = c.adapter and (upper or c.two_phases) and c.retrain_steps and c.final_init == "fresh"
    two, norms = c.two_phases, magnitude or upper
    rounds = "small updates of bfloat16 weights round to nothing"
    return those(
        (uppers and not upper, f"{uppers}: for bidora and bilora; {c.method} has no upper level"),
        (two and (upper or not magnitude), f"two_phases=True is for method=dora, not {c.method}"),
        (two and not c.search_steps, "two_phases=True needs search_steps, where magnitudes learn"),
        (c.group_by_length and not c.shuffle, "group_by_length=True shuffles: use shuffle=True"),
        (
            c.lora_plus != 1 and (not method or upper),
            f"lora_plus={c.lora_plus:g} is for lora and dora, not for {c.method}",
        ),
        (c.magnitude_only and not magnitude, f"magnitude_only: {c.method} has no magnitudes"),
        (c.gram_weight and not norms, f"gram_weight is for magnitudes or BiLoRA, not {c.method}"),
        (not method and is_packed(c), "method=ft trains the base's own weights: use quantize=none"),
        (not method and c.dtype == "bfloat16", f"method=ft: {rounds}: use dtype=float32"),
        (c.device == "mps" and lacking, f"device=mps lacks what {lacking} needs: leave it out"),
        (c.adapter and sized, f"{sized}: an adapter brings its own: leave out this, or --adapter"),
        (c.adapter and not method, "method=ft trains no adapter: merge it first (tools.merge)"),
        (forgets, "final_init=fresh would forget the adapter's directions: use continue"),
    )


def compiled(config, second):
    """second: whether second derivatives are needed."""
    cpu = hardware.choose_device(config.device) == "cpu"
    bare = cpu and not shutil.which(os.environ.get("CXX", "g++"))
    if not config.compile:
        return []
    return those(
        (second, "has no second derivatives: use hypergradient=first_order, or compile=False"),
        (is_packed(config), "does not work with bitsandbytes' packed weights: use quantize=none"),
        (bare, "needs a C++ compiler on a CPU: install g++, or use compile=False"),
        of="compile=True ",
    )


def sharded(config, second):
    """second: whether second derivatives are needed, which take the collected weights again."""
    lost = second and not config.gradient_checkpointing
    if not config.fsdp:
        return []
    return those(
        (distributed.WORLD_SIZE == 1, "needs processes: torchrun --nproc_per_node=2 train.py …"),
        (lost, "needs gradient_checkpointing=True (or first_order), for second derivatives"),
        (config.method == "ft", "shards frozen weights only: use an adapter, not method=ft"),
        (is_packed(config), "can't shard packed weights: use quantize=none"),
        (config.gram_weight, "has no whole weights to regularise: use gram_weight=0"),
        (config.snapshots, "has no whole weights for ΔM and ΔD: run tools.analysis afterwards"),
        (config.compile, "is not supported with torch.compile: use compile=False"),
        of="fsdp=True ",
    )


def task(config, name, head, borrowed):
    """name: the task's; head: whether it trains a head; borrowed: whether transformers computes."""
    c, other, asks = config, head or borrowed, bool(config.label_prompt)
    what = "a model that transformers computes" if borrowed else "a head"
    ours = "model.py's models only (LLaMA, Mistral, Qwen2, Qwen3)"
    own_prompts = f"task=label_words, not task={name}: its prompts are in the data"
    searches = name != "generation" and (c.num_beams > 1 or c.no_repeat_ngram_size)
    whole = head and not borrowed and c.method == "ft"
    return those(
        (other and c.fsdp, f"fsdp=True shards {ours}, without a head: leave it out"),
        (other and c.compile, f"compile=True does not work with {what}: use compile=False"),
        (other and c.auto_hardware, f"auto_hardware=True knows the memory of {ours}"),
        (borrowed and is_packed(c), f"quantize={c.quantize} packs {ours}: use quantize=none"),
        (asks and head, f"label_prompt is a question to a language model, not for task={name}"),
        (asks and not head and name != "label_words", f"label_prompt is for {own_prompts}"),
        (searches, f"num_beams and no_repeat_ngram_size are for task=generation, not task={name}"),
        (whole, "method=ft trains no head on a language model: use an adapter, or label_words"),
    )


def start(config, run, name, heads, labels):
    """run: config.adapter's; name: the task's; heads: the tasks with a head; labels: the data's."""
    was, learnt = run.get("task"), run.get("labels", labels)
    other = was in heads and was != name
    head = f"{config.adapter} has a head for"
    renamed = f"{head} {', '.join(learnt):.200}, not for {', '.join(labels):.200}: name them alike"
    return those(
        (other, f"{head} task={was}: give --task={was}, and data for it"),
        (was in heads and not other and learnt != labels, renamed),
    )


SCHEDULE = "edit learning_rate_scale in train.py, which warms up over a tenth of the steps"
OTHER_NAMES = {  # {a setting of another program: what to write here}
    name: instead
    for instead, names in {
        "use --lower_lr (and --upper_lr for the upper level)": "lr learning_rate",
        "use --epochs, of all phases together": "num_epochs num_train_epochs",
        "set --search_steps and --retrain_steps, or --epochs": "steps max_steps max_iters",
        "use --rank": "r lora_r lora_rank",
        "use --alpha; the update is scaled by alpha / rank": "lora_alpha use_rslora",
        "use --dropout": "lora_dropout",
        "use --target_modules": "lora_target_modules",
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
        "use --checkpoint_every": "save_steps",
        "use --eval_every": "eval_steps eval_strategy evaluation_strategy",
        "use --keep=best, with --eval_every and --held_fraction": "load_best_model_at_end",
        "use --patience, with --eval_every and --held_fraction": "early_stopping",
        "metrics.jsonl has every step, and python -m tools.curves draws it": "report_to",
        "use --dtype=bfloat16": "bf16",
        "use --quantize=nf4": "load_in_4bit",
        "use --hypergradient_steps": "unroll_steps terms cg_iterations",
        "use --hypergradient_lr": "unroll_lr neumann_alpha",
        "use --method=bilora_softmax or bilora_binary": "lambda_kind",
        SCHEDULE: "warmup warmup_steps warmup_ratio lr_scheduler_type",
        "evaluation chooses its own batch size": "eval_batch_size per_device_eval_batch_size",
    }.items()
    for name in names.split()
}
