"""
Fine-tune a language model with BiDoRA or one of its relatives.

    python train.py --config=small.py                  the settings in configs/small.py
    python train.py --config=small.py --method=dora    any field of Config can be given as --name=value
    python train.py --config=small.py --resume=True    go on with a run that was stopped or killed, as if it never had been
    python train.py --help                             every setting, its default and what it does

BiDoRA's three phases (arXiv 2410.09758, algorithm 1): *search* alternates (1) a step of the direction on the train split and
(2) a step of the magnitude on the val split, along a hypergradient; (3) *retrain* fixes the magnitude and trains the direction
on train and val together. The other methods train once on train and val together, for as many lower-level steps in total.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import analysis
import bidora
import checkpoint
import data
import hardware
import quantized
import report
import settings
from files import read_json, replacing, write_json
from hypergrad import HYPERGRADIENTS, assign, create_bilevel_optimizer
from model import ModelConfig, Transformer
from pretrained import find_model, is_hub_name
from tokenizer import FILES as TOKENIZER_FILES
from tokenizer import Tokenizer


@dataclass
class Config:
    # what is trained
    model: str = "smollm2-135m"  # a folder in Hugging Face's layout, a name on its hub (owner/name), smollm2-135m or tiny-random
    revision: str = ""  # a branch, tag or commit of a hub name
    method: str = "bidora"  # bidora, dora, lora, bilora, or ft (full fine-tuning: every weight)
    dtype: str = "auto"  # of the frozen base: float32, bfloat16, or auto: what a short measurement finds fast; adapters are fp32
    quantize: str = "auto"  # pack the base's linear layers by bitsandbytes: nf4, fp4, int8, or none (auto: none)
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    seed: int = 0  # of the sample drawn from a built-in data set, the split, the adapter's start and the order of the batches
    # data
    data: str = ""  # a built-in data set: movie-sentiment, toy-sentiment
    train_file: str = ""  # your own data instead, JSONL (the formats are in data.py)
    val_file: str = ""  # JSONL; without it val_fraction of train_file is split off
    test_file: str = ""  # JSONL, only ever evaluated on
    train_size: int = 200  # examples taken from a built-in data set, train and val together
    test_size: int = 400  # examples of a built-in data set kept for the test, the same for every seed
    val_fraction: float = 0.2  # the upper level's share of the training data; the paper splits 8:2
    block_size: int = 0  # most tokens an example may have; longer prompts are cut on the left; 0: 256
    label_prompt: str = ""  # a classification question, with {text} and {labels}; empty: the data set's own, or a general one
    train_on_prompt: bool = False  # count the prompt in the loss too, not only the answer
    # the adapter
    rank: int = 8  # of the direction's update B·A; more rank, more to learn and to overfit
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the update's input; off while a hypergradient is computed
    target_modules: tuple = bidora.ALL_LINEAR  # the adapted layers
    magnitude_axis: str = "row"  # bidora, dora: one magnitude for each output row, as in PEFT, or for each input column, as in the papers
    lambda_kind: str = "real"  # bilora: its pseudo singular values: real, softmax, or (approximately) binary
    gram_weight: float = 0.0  # times the regulariser that keeps directions apart (bilora: makes B, A orthogonal), in the lower loss
    norm_grad: str = "exact"  # exact, or detach: treat the norm as a constant in the backward pass, as PEFT does
    # the budget: every method takes search_steps + retrain_steps lower-level steps
    search_steps: int = 12  # lower-level steps of BiDoRA's search phase
    retrain_steps: int = 54  # steps of BiDoRA's last phase, direction only, on train and val
    upper_every: int = 1  # lower-level steps (BiLoRA's T1) for each turn of the upper level
    upper_steps: int = 1  # upper-level steps a turn (BiLoRA's T2)
    batch_size: int = 4  # examples a step, at either level
    accumulate: int = 0  # parts that a lower-level step's batch is computed in: less memory, the same result; 0: 1
    lower_lr: float = 0.0  # AdamW's peak rate at the lower level; 0 takes 1e-3 for adapters, 2e-5 for ft, which moves every weight
    upper_lr: float = 1e-2  # AdamW's peak rate for the magnitude
    warmup: float = 0.1  # share of a phase in which the rates rise from 0; then they fall linearly to a tenth
    optimizer: str = "adamw"  # of both levels: adamw, or adamw8bit (bitsandbytes; keeps its moments in 8 bits)
    weight_decay: float = 0.0  # AdamW's, lower level only
    grad_clip: float = 1.0  # largest gradient norm of each level
    final_init: str = "fresh"  # retrain from a fresh direction, as the paper does, or continue from the one that search found
    # the hypergradient (hypergrad.py)
    hypergradient: str = "unrolled"  # unrolled (the paper's), first_order, neumann, conjugate_gradient
    unroll_steps: int = 1  # unrolled: the last lower-level steps that are differentiated through, at most upper_every
    unroll_lr: float = 0.0  # unrolled: their rate; 0 takes lower_lr
    mode: str = "exact"  # unrolled: exact (double backward) or finite_difference (noise in bfloat16)
    terms: int = 3  # neumann: terms of the series
    neumann_alpha: float = 0.01  # neumann: its step, below 2 / (largest eigenvalue of the lower Hessian)
    cg_iterations: int = 3  # conjugate_gradient: most iterations
    damping: float = 0.01  # conjugate_gradient: added to the Hessian's diagonal
    precondition: str = "none"  # adam: unrolled differentiates through AdamW's own update; the implicit ones use its second moments
    hvp_batch: int = 0  # examples whose second derivatives are in memory at once; 0: all, and one graph serves all products
    # memory
    gradient_checkpointing: str = "auto"  # True: compute activations twice to keep fewer, for one more forward pass (auto: False)
    auto_hardware: bool = False  # let what is automatic or 0 in quantize, accumulate, gradient_checkpointing, block_size fit the memory
    # output
    snapshots: int = 0  # times a phase, the last step included, at which the weights' ΔM and ΔD are recorded (analysis.py)
    out_dir: str = ""  # where the run is written; empty: out/<config's name>, and -<method> if --method is given
    overwrite: bool = False  # replace the files of an earlier run in out_dir
    resume: str = ""  # True: go on with the run in out_dir from its last checkpoint; a folder: with that run, into a new out_dir
    checkpoint_every: int = 100  # steps between checkpoints; there is one at each phase's end too
    eval_batch_size: int = 32  # examples a forward pass in evaluation
    eval_size: int = 400  # most examples of a part (train, val, test) that are evaluated, the same before and after


CHOICES = {
    "method": ("bidora", "dora", "lora", "bilora", "ft"),
    "magnitude_axis": ("row", "column"),
    "lambda_kind": tuple(bidora.LAMBDAS),
    "dtype": ("auto", "float32", "bfloat16"),
    "quantize": ("auto", "none", *quantized.KINDS),
    "optimizer": ("adamw", "adamw8bit"),
    "gradient_checkpointing": ("auto", "True", "False"),
    "data": ("", *data.BUILT_IN),
    "norm_grad": ("exact", "detach"),
    "final_init": ("fresh", "continue"),
    "hypergradient": tuple(HYPERGRADIENTS),
    "mode": ("exact", "finite_difference"),
    "precondition": ("none", "adam"),
}
BILEVEL = ("bidora", "bilora")
MAY_BE_ZERO = {"seed", "dropout", "weight_decay", "gram_weight", "warmup", "val_fraction", "lower_lr", "unroll_lr", "damping",
               "block_size", "accumulate", "hvp_batch", "search_steps", "retrain_steps", "snapshots"}
HARMLESS = {"out_dir", "overwrite", "resume", "checkpoint_every", "eval_batch_size"}  # may change when a run is resumed
BELOW_ONE = {"dropout", "val_fraction", "warmup"}


def read_config(arguments):
    """The Config of a command line; see settings.read. Raises ValueError or FileNotFoundError."""
    config, path = settings.read(Config, arguments, Path(__file__).parent / "configs")
    if path and not config.out_dir:
        method = f"-{config.method}" if any(argument.startswith("--method=") for argument in arguments) else ""
        config.out_dir = str(Path("out") / f"{path.stem}{method}")
    return config


def differences(config):
    """Whether the run takes finite differences of gradients."""
    return config.method in BILEVEL and (config.hypergradient, config.mode) == ("unrolled", "finite_difference")


def check(config):
    """Raise ValueError for a setting that makes no sense, before any work is done."""
    for name, choices in CHOICES.items():
        value = str(getattr(config, name))
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}" + settings.suggest(value, choices))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in (int, float):
            zero = field.name in MAY_BE_ZERO
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                raise ValueError(f"{field.name}={value} must be {'at least 0' if zero else 'positive'}")
            if field.name in BELOW_ONE and value >= 1:
                raise ValueError(f"{field.name}={value} must be below 1")
    if config.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {config.device!r}: choose auto, cpu or cuda")
    try:
        torch.empty(1, device=None if config.device == "auto" else config.device)
    except (RuntimeError, AssertionError):  # torch raises the latter when it is built without CUDA
        raise ValueError(f"device={config.device} is not there: use device=cpu") from None
    if config.search_steps + config.retrain_steps == 0 or (config.method in BILEVEL and config.search_steps == 0):
        raise ValueError(f"search_steps={config.search_steps}, retrain_steps={config.retrain_steps}: there is nothing to train")
    if config.method in BILEVEL and config.upper_every > config.search_steps:
        raise ValueError(f"upper_every={config.upper_every} is more than search_steps={config.search_steps}: "
                         f"the upper level would never take a step")
    if config.hypergradient == "unrolled" and config.unroll_steps > config.upper_every:
        raise ValueError(f"unroll_steps={config.unroll_steps} is more than upper_every={config.upper_every}: an upper-level step can only "
                         f"look back on the lower-level steps since the one before it")
    if config.precondition == "adam" and config.optimizer == "adamw8bit":
        raise ValueError("precondition=adam reads AdamW's moments, which adamw8bit keeps in 8 bits: use optimizer=adamw")
    if config.accumulate > config.batch_size:
        raise ValueError(f"accumulate={config.accumulate} parts can't be made of batch_size={config.batch_size} examples")
    if config.method in ("ft", "lora") and config.gram_weight:
        raise ValueError(f"gram_weight={config.gram_weight} regularises directions with a magnitude, or BiLoRA's factors; method={config.method} "
                         f"has neither")
    if config.method == "ft" and config.quantize not in ("auto", "none"):
        raise ValueError(f"method=ft trains the base's own weights, which quantize={config.quantize} packs into steps too coarse to "
                         f"train: use an adapter (bidora, dora, lora), or quantize=none")
    if config.block_size == 1:
        raise ValueError(f"block_size={config.block_size} must be at least 2: a token, and the one it predicts")
    if not config.train_file and not config.data:
        raise ValueError(f"no data: give --train_file=yours.jsonl, or a built-in set with --data={'|'.join(data.BUILT_IN)}")
    if (config.val_file or config.test_file) and not config.train_file:
        raise ValueError("val_file and test_file go with train_file; a built-in data set brings its own")
    if config.label_prompt and "{text}" not in config.label_prompt:
        raise ValueError("label_prompt must contain {text}, the place where the example's text goes")
    if config.method in BILEVEL and not config.val_file and config.val_fraction == 0:
        raise ValueError("method=bidora needs validation data: its upper level learns the magnitude from examples that the lower "
                         "level does not train on; give --val_file, or a val_fraction above 0 (the paper's is 0.2)")
    if config.method == "ft" and config.dtype == "bfloat16":
        raise ValueError("method=ft trains the weights themselves, and in bfloat16 small updates round to nothing: "
                         "use dtype=float32")
    if differences(config) and config.dtype == "bfloat16":
        raise ValueError("mode=finite_difference is rounding noise in bfloat16: use mode=exact, or dtype=float32")


# --------------------------------------------------------------------------------------------------- data


def load_data(config):
    """The raw examples as {"train", "val", "test"}, and the classification question. Raises ValueError where they don't fit."""
    if config.train_file:
        parts = {"train": data.load_examples(config.train_file),
                 "val": data.load_examples(config.val_file) if config.val_file else [],
                 "test": data.load_examples(config.test_file) if config.test_file else []}
        question = config.label_prompt or data.LABEL_PROMPT
    else:
        examples = data.load_examples(config.data)
        if config.train_size + config.test_size >= len(examples) or min(config.train_size, config.test_size) < 10:
            raise ValueError(f"train_size={config.train_size} and test_size={config.test_size} must be at least 10 each, and together "
                             f"less than the {len(examples)} examples of {config.data}")
        rest, test = data.split(examples, config.test_size / len(examples), seed=0)  # the same test for every seed
        train, _ = data.split(rest, 1 - config.train_size / len(rest), seed=config.seed)
        parts = {"train": train, "val": [], "test": test}
        question = config.label_prompt or data.BUILT_IN[config.data]
    if not config.val_file and config.val_fraction > 0:
        parts["train"], parts["val"] = data.split(parts["train"], config.val_fraction, config.seed)
    formats = {data.format_of(part[0]) for part in parts.values() if part}
    if len(formats) > 1:
        raise ValueError(f"the files differ in format: {', '.join(sorted(formats))}")
    labels = {name: {example.get("label") for example in part} for name, part in parts.items() if part}
    if formats == {"classification"} and len(labels["train"]) < 2:
        raise ValueError(f"all train examples have the label {labels['train'].pop()!r}: classification needs two labels or more")
    for name, found in labels.items():
        if unseen := found - labels["train"]:
            raise ValueError(f"{name} has the label {sorted(unseen)[0]!r}, which train lacks")
        if name == "val" and (lacking := labels["train"] - found):
            raise ValueError(f"val lacks the label {sorted(lacking)[0]!r}: give it examples of every label")
    return parts, question


@torch.no_grad()
def evaluate(model, encoded, label_ids, config, pad_id):
    """
    Mean loss (nats a token) and accuracy over Encoded rows; None for an empty list.

    With labels: the loss of the right label's tokens, and how often it is the likeliest of all. Without: the loss of the
    tokens that count, and how often the likeliest token is the right one.
    """
    if not encoded:
        return None
    model.eval()
    total = right = tokens = 0
    encoded = sorted(encoded, key=lambda e: len(e.input_ids))  # rows of similar length: little padding
    for start in range(0, len(encoded), config.eval_batch_size):
        batch = encoded[start:start + config.eval_batch_size]
        if label_ids:
            scores = model.score([e.prompt_ids for e in batch], list(label_ids.values()))  # (B, labels)
            answers = torch.tensor([list(label_ids).index(e.label) for e in batch], device=scores.device)
            total -= scores.gather(1, answers[:, None]).sum().item()
            right += (scores.argmax(1) == answers).sum().item()
            tokens += sum(len(label_ids[e.label]) for e in batch)
        else:
            logits, answers = model.answer_logits(*(t.to(model.lm_head.weight.device) for t in data.collate(batch, pad_id)))
            total += torch.nn.functional.cross_entropy(logits, answers, reduction="sum").item()
            right += (logits.argmax(1) == answers).sum().item()
            tokens += len(answers)
    return {"loss": total / tokens, "accuracy": right / (len(encoded) if label_ids else tokens)}


# ---------------------------------------------------------------------------------------------- the main job


def choose_dtype(config, device):
    """The base's dtype and, in words, why."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), "as set"
    if config.method == "ft":
        return torch.float32, "full fine-tuning needs it"
    if differences(config):
        return torch.float32, "finite differences need it"
    return hardware.fast_dtype(device)


def learning_rate_scale(step, steps, warmup):
    """The rates' factor at step 1 … steps: up in a line over the first `warmup` of them, then down in a line to a tenth."""
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return step / rising
    return 1 - 0.9 * (step - rising) / max(1, steps - rising)


RUN_FILES = ("run.json", "metrics.jsonl", "summary.json", "loss.png", "adapter_config.json", "adapter_model.safetensors",
             "trajectory.json", "trajectory.safetensors", "config.json", "model.safetensors", *TOKENIZER_FILES)


def find_run(config, out):
    """
    What is in the run's folder: (source, previous). source: the folder of the run to resume, or None; previous: where an earlier run is put.

    Raises ValueError or FileNotFoundError where it is not what config.resume and config.overwrite say.
    """
    begun = out.exists() and any(not path.name.endswith(".tmp") for path in out.iterdir())  # the rest are writes that a kill cut off
    if config.resume not in ("", "False"):
        source = out if config.resume == "True" else Path(config.resume)
        if begun and source != out:
            raise ValueError(f"{out} holds an earlier run: to resume {source} elsewhere, choose a new --out_dir")
        if source != out and not (source / "run.json").exists():
            raise FileNotFoundError(f"resume={source} holds no run: there is no run.json")
        if not begun and source == out:
            print(f"{out} holds no run to resume: starting one")
            return None, None
    if begun and not (out / "run.json").exists():
        raise ValueError(f"{out} holds files that are no run's: choose another --out_dir")
    if config.resume not in ("", "False"):
        if (source / "summary.json").exists():
            raise ValueError(f"{source} holds a finished run: there is nothing to resume")
        return source, None
    if begun and not config.overwrite:
        more = "" if (out / "summary.json").exists() else ", go on with it by --resume=True"
        raise ValueError(f"{out} holds an earlier run: choose another --out_dir{more}, or replace it with --overwrite=True")
    previous = out.with_name(out.name + ".previous") if begun else None
    if begun and previous.exists() and (out / "summary.json").exists():
        raise ValueError(f"{previous} is in the way, where the earlier run would be kept: move it elsewhere")
    return None, previous


def resumed(config, source):
    """config as the run in source had it, with all that was automatic resolved. Raises ValueError for settings that changed since."""
    stored, now = read_json(source / "run.json"), json.loads(json.dumps(dataclasses.asdict(config)))
    asked = stored.get("asked", {})
    changed = {name: f"{name}={value} (it was {asked.get(name)})" for name, value in now.items() if value != asked.get(name) and name != "resume"}
    if refused := [text for name, text in changed.items() if name not in HARMLESS]:
        raise ValueError(f"{source} can't be resumed with other settings: {', '.join(refused)}")
    if changed:
        print(f"changed since the run began: {', '.join(changed.values())}")
    return dataclasses.replace(config, **{name: tuple(stored[name]) if isinstance(stored[name], list) else stored[name]
                                          for name in now if name not in HARMLESS})


def train(config):
    """
    Run all phases as config says; returns the results that summary.json holds.

    Raises ValueError or OSError for wrong input, before the first step; FloatingPointError for a loss that is not finite; checkpoint.Stopped, a
    KeyboardInterrupt, at SIGINT or SIGTERM, with the work saved for config.resume.
    """
    check(config)
    out = Path(config.out_dir or "out/run")
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"out_dir={out} can't be written, since {existing} is {'read-only' if existing.is_dir() else 'a file'}: "
                         f"choose another")
    with contextlib.ExitStack() as locks:
        locks.enter_context(checkpoint.locked(out))
        return run(config, out, locks)


def run(config, out, locks):
    """train's work, in a folder that is locked; locks: an ExitStack that holds it."""
    source, previous = find_run(config, out)
    asked, state = dataclasses.asdict(config), None
    if source:
        config, state = resumed(config, source), checkpoint.load(source)
        print(f"resuming {source} after step {state[1]['n']}" if state else f"{source} has no checkpoint yet: starting from its first step")
    config = dataclasses.replace(config, lower_lr=config.lower_lr or (2e-5 if config.method == "ft" else 1e-3),
                                 gradient_checkpointing=str(config.gradient_checkpointing))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    started, memory_at_start = time.time(), hardware.peak_memory(device)

    # data, model and tokenizer; whatever is wrong with them shows before the first step
    parts, label_prompt = load_data(config)
    labels = sorted({example["label"] for example in parts["train"] if "label" in example})
    folder = find_model(config.model, config.revision)
    tokenizer = Tokenizer.from_pretrained(folder)
    label_ids = data.tokenize_labels(labels, tokenizer)
    dtype, why = choose_dtype(config, device)
    shape = ModelConfig.from_hf(read_json(folder / "config.json"))

    def encode(block_size):
        done = {name: data.encode(examples, tokenizer, block_size, label_prompt, label_ids, config.train_on_prompt)
                for name, examples in parts.items()}
        return {name: rows for name, (rows, _) in done.items()}, sum(cut for _, cut in done.values())

    if config.auto_hardware and not source:
        free = hardware.free_memory(device)
        if free is None:
            raise ValueError("auto_hardware=True: this system does not say how much memory is free; set quantize, accumulate, "
                             "gradient_checkpointing and block_size yourself")
        rows = [row for part in encode(config.block_size or shape.max_position_embeddings)[0].values() for row in part]
        longest, asked = max(len(row.labels) for row in rows), max(sum(label != -100 for label in row.labels) for row in rows)
        shortest = 2 if data.format_of(parts["train"][0]) in ("text", "code") else asked + 1  # an answer is never cut
        picked, lines = hardware.choose(shape, config, dtype.itemsize, longest, asked, free, shortest)
        config = dataclasses.replace(config, **picked)
        print(*lines, sep="\n")
    config = dataclasses.replace(
        config, block_size=config.block_size or 256, accumulate=config.accumulate or 1,
        quantize="none" if config.quantize == "auto" else config.quantize,
        gradient_checkpointing="False" if config.gradient_checkpointing == "auto" else config.gradient_checkpointing)
    if config.block_size > shape.max_position_embeddings:
        raise ValueError(f"block_size={config.block_size} is more than the {shape.max_position_embeddings} positions of {config.model}")
    encoded, cut = encode(config.block_size)
    fingerprint = hashlib.sha256(repr(encoded).encode()).hexdigest()
    if state and state[1]["data"] != fingerprint:
        raise ValueError(f"{source} can't be resumed: its data or its tokenizer has changed since")
    torch.manual_seed(config.seed)
    model = Transformer.from_pretrained(folder, dtype, device, None if config.quantize == "none" else config.quantize)
    model.gradient_checkpointing = config.gradient_checkpointing == "True"
    weight_bytes = quantized.nbytes(model)
    largest = max(max(row.input_ids) for rows in encoded.values() for row in rows)
    if largest >= model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer writes token {largest}, but the model's vocabulary ends at "
                         f"{model.config.vocab_size}")
    if config.method != "ft":
        model.requires_grad_(False)
        bidora.replace_linear_with_bidora(model, config.rank, config.target_modules, config.alpha, config.dropout,
                                          config.method, config.norm_grad, config.magnitude_axis, config.lambda_kind)
    both = encoded["train"] + encoded["val"]
    if config.method in BILEVEL:
        phases = [("search", config.search_steps, encoded["train"]), ("retrain", config.retrain_steps, both)]
    else:
        phases = [("train", config.search_steps + config.retrain_steps, both)]
    phases = [phase for phase in phases if phase[1] > 0]
    trajectory = analysis.Trajectory.start(model, config.target_modules, config.magnitude_axis) if config.snapshots else None
    sizes = {"lower": sum(p.numel() for p in bidora.lower_parameters(model)),
             "upper": sum(p.numel() for p in bidora.upper_parameters(model))}

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if state:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state[0][f"parameter.{name}"])
        if trajectory:
            trajectory = dataclasses.replace(trajectory, **state[1]["trajectory"])

    def save():
        if config.method == "ft":
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
        else:
            bidora.save_adapter(model, out, config.model if is_hub_name(config.model) else str(folder), config.revision)
        if trajectory:
            trajectory.save(out)

    # An earlier run is kept beside until this one has finished; if it is there already, `out` holds a run that never finished.
    if previous and previous.exists():
        shutil.rmtree(out)
    elif previous:
        os.replace(out, previous)
    if previous:
        locks.enter_context(checkpoint.locked(out))  # a new folder
    # The folder is tried with all that will go into it while nothing is lost yet: a full disk shows now.
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", dataclasses.asdict(config) | {
            "labels": labels, "label_prompt": label_prompt, "dtype": str(dtype).removeprefix("torch."), "asked": asked})
        save()
    except OSError as error:
        if source != out:
            shutil.rmtree(out, ignore_errors=True)
        if previous:
            os.replace(previous, out)
        raise OSError(f"{error}; out_dir={out} must be a folder with room for the run") from None

    packed = "" if config.quantize == "none" else f"{config.quantize} and "
    print(f"{config.method} on {config.model}, {packed}{str(dtype).removeprefix('torch.')} on {device} ({why}): "
          f"{weight_bytes / 1e6:.0f} MB of weights")
    print(f"data: {config.train_file or config.data}: {', '.join(f'{len(examples)} {name}' for name, examples in parts.items())}"
          + (f"; labels {', '.join(labels)}" if labels else ""))
    if cut:
        print(f"{cut} examples were longer than block_size={config.block_size} tokens: cut on the left, their answers kept")
    if tokenizer.library_reason:
        print(f"the tokenizers library splits the text, since tiktoken can't: {tokenizer.library_reason}")
    if not tokenizer.has_chat_template:
        print("the tokenizer has no chat template: a plain one (User: … Assistant: …) is used")
    print(f"trainable parameters: {sizes['lower']:,} lower level, {sizes['upper']:,} upper level")
    start = "a fresh start" if config.final_init == "fresh" else "where search ended"
    below, above = ("direction", "magnitude") if config.method == "bidora" else ("singular vectors", "singular values")
    for phase, steps, _ in phases:
        print(f"{phase}: {steps} steps, " + {
            "search": f"{below} on train, {above} on val by the {config.hypergradient} hypergradient",
            "retrain": f"{below} on train + val from {start}, {above} fixed", "train": "on train + val"}[phase])

    evaluated = {name: random.Random(0).sample(rows, min(config.eval_size, len(rows))) for name, rows in encoded.items()}

    def evaluate_all():
        return {name: evaluate(model, rows, label_ids, config, tokenizer.pad_id) for name, rows in evaluated.items()}

    before = state[1]["before"] if state else evaluate_all()
    shown = "test" if encoded["test"] else "val" if encoded["val"] else "train"
    print(f"before training: {shown} accuracy {before[shown]['accuracy']:.1%}, loss {before[shown]['loss']:.3f}", flush=True)

    options = {
        "first_order": {},
        "unrolled": {"lr": config.unroll_lr or config.lower_lr, "steps": config.unroll_steps, "mode": config.mode},
        "neumann": {"terms": config.terms, "alpha": config.neumann_alpha},
        "conjugate_gradient": {"iterations": config.cg_iterations, "damping": config.damping},
    }[config.hypergradient]

    def loss_fn(model, batch):
        input_ids, labels, share = batch  # a part of a batch, with its share of the labels
        return model(input_ids.to(device), labels.to(device)) * share

    def lower_loss_fn(model, part):
        return loss_fn(model, part) + config.gram_weight * part[2] * bidora.regulariser(model)

    # Where the run is: the phase, its step, and n, the step of the whole run.
    first, begin, n, seconds = (state[1][key] for key in ("phase", "step", "n", "seconds")) if state else (0, 0, 0, {})
    lines = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:n] if state else []
    metrics = [json.loads(line) for line in lines]
    if [line["step"] for line in metrics] != list(range(1, n + 1)):
        raise ValueError(f"{source / 'metrics.jsonl'} lacks lines of the first {n} steps: the run can't be resumed")
    with replacing(out / "metrics.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")

    def keep_state(phase, step, optimizer=None):
        tensors = {f"parameter.{name}": p for name, p in parameters.items()}
        for level in ("lower", "upper") if optimizer else ():
            if own := getattr(optimizer, f"{level}_optimizer"):
                tensors |= {f"{level}.{key}": value for key, value in checkpoint.optimizer_state(own).items()}
        points = {key: getattr(trajectory, key) for key in ("snapshots", "delta_m", "delta_d")} if trajectory else None
        checkpoint.save(out, n, tensors, {"phase": phase, "step": step, "n": n, "seconds": seconds, "before": before, "data": fingerprint,
                                          "trajectory": points, "random": checkpoint.random_states()})

    if state:
        checkpoint.set_random_states(state[1]["random"])
    try:
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as log, checkpoint.asked_to_stop() as signals:
            for index, (phase, steps, rows) in list(enumerate(phases))[first:]:
                if index > first:
                    begin = 0
                if phase == "retrain":
                    bidora.freeze_magnitude(model)
                    if config.final_init == "fresh" and begin == 0:
                        for layer in bidora.adapter_layers(model).values():
                            layer.reset_direction()
                optimizer = create_bilevel_optimizer(model, config.lower_lr, config.upper_lr, config.upper_every,
                                                     config.hypergradient, config.weight_decay, config.grad_clip, config.optimizer,
                                                     config.precondition, **options)
                if begin:
                    for level in ("lower", "upper"):
                        if own := getattr(optimizer, f"{level}_optimizer"):
                            checkpoint.load_optimizer_state(own, {key.removeprefix(f"{level}."): value for key, value in state[0].items()
                                                                  if key.startswith(f"{level}.")})
                turns = begin // config.upper_every if optimizer.upper else 0  # of the upper level, so far
                train_batches = data.batches(rows, config.batch_size, tokenizer.pad_id, config.seed, skip=begin + turns * (config.upper_steps - 1))
                val_batches = data.batches(encoded["val"], config.batch_size, tokenizer.pad_id, config.seed, skip=turns * config.upper_steps)
                trained = optimizer.lower + optimizer.upper
                marks = {math.ceil(steps * i / config.snapshots) for i in range(1, config.snapshots + 1)}
                last_finite = None  # the weights that last gave a finite loss, for when the next do not
                last_kept, phase_start, earlier = begin, time.time(), seconds.get(phase, 0)
                model.train()
                progress = tqdm(range(begin + 1, steps + 1), desc=phase, unit="step", initial=begin, total=steps,
                                mininterval=0.5 if sys.stderr.isatty() else 10)
                step = begin
                try:
                    for step in progress:
                        step_start, n = time.time(), n + 1
                        before_step = [p.detach().clone() for p in trained]
                        scale = learning_rate_scale(step, steps, config.warmup)
                        optimizer.scale_lr(scale)
                        # The upper level's step differentiates through the last lower-level ones, so these are kept.
                        keep = bool(optimizer.upper) and -step % config.upper_every < config.unroll_steps
                        count = math.ceil(config.batch_size / config.hvp_batch) if keep and config.hvp_batch else config.accumulate
                        loss = optimizer.lower_step(lower_loss_fn if config.gram_weight else loss_fn, *data.parts(next(train_batches), count), keep=keep)
                        line = {"step": n, "phase": phase, "train_loss": loss.item(), "lower_lr": scale * config.lower_lr}
                        for i in range(config.upper_steps if optimizer.upper and step % config.upper_every == 0 else 0):
                            again = data.parts(next(train_batches), config.accumulate) if i else None  # the kept steps serve the first
                            val_loss = optimizer.upper_step(loss_fn, again, data.parts(next(val_batches), config.accumulate))
                            line |= {"val_loss": val_loss.item(), "upper_lr": scale * config.upper_lr}
                        last_finite = before_step
                        if step in marks:
                            trajectory.record(model, phase, n)
                        line["seconds"] = round(time.time() - step_start, 4)
                        metrics.append(line)
                        log.write(json.dumps(line) + "\n")  # one whole line at a time
                        log.flush()
                        progress.set_postfix(lower=f"{line['train_loss']:.3f}", refresh=False,
                                             **({"upper": f"{line['val_loss']:.3f}"} if "val_loss" in line else {}))
                        # Between two turns of the upper level, when no lower-level step waits to be differentiated.
                        if not optimizer.past and step < steps and (signals or step - last_kept >= config.checkpoint_every):
                            seconds[phase], last_kept = earlier + time.time() - phase_start, step
                            keep_state(index, step, optimizer)
                            if signals:
                                save()
                                raise checkpoint.Stopped(f"stopped at {phase} step {step} of {steps}", signals[0])
                    with torch.no_grad():
                        final_loss = sum(loss_fn(model, part) for part in data.parts(next(train_batches), config.accumulate))
                    if not torch.isfinite(final_loss):
                        raise FloatingPointError(f"loss {final_loss:g} after the last step")
                except FloatingPointError as error:
                    progress.close()
                    if last_finite:  # else the folder holds what the phase before has left
                        assign(trained, last_finite)
                        save()
                    raise FloatingPointError(f"{phase} step {step} of {steps} is not finite ({error}): lower lower_lr or upper_lr; "
                                             f"the weights of the last good step are in {out}") from None
                seconds[phase] = earlier + time.time() - phase_start
                save()
                keep_state(index + 1, 0)
                if signals:
                    raise checkpoint.Stopped(f"stopped at the end of {phase}", signals[0])
    except OSError as error:
        hint = f"; go on elsewhere with --resume={out} --out_dir=..." if checkpoint.names(out) else ""
        raise OSError(f"{error}{hint}") from None

    after = evaluate_all()
    results = {
        "method": config.method, "model": config.model, "dtype": str(dtype).removeprefix("torch."), "seed": config.seed,
        "quantize": config.quantize, "weight_bytes": weight_bytes,
        "examples": {name: len(examples) for name, examples in parts.items()},
        "evaluated": {name: len(rows) for name, rows in evaluated.items()},
        "before": before, "after": after, "trainable_parameters": sizes,
        "seconds": seconds | {"total": time.time() - started},
        "peak_memory_gb": hardware.peak_memory(device), "peak_memory_beyond_start_gb": hardware.peak_memory(device) - memory_at_start,
        "out_dir": str(out),
    }
    report.plot_losses(out / "loss.png", metrics, results)
    write_json(out / "summary.json", results)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if previous:
        shutil.rmtree(previous / "checkpoints", ignore_errors=True)
        for name in RUN_FILES:
            (previous / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it stays if it holds anything of the user's own
            previous.rmdir()
    print(report.table(results))
    return results


def main(arguments):
    if not arguments:
        print(__doc__.strip() + "\n\nStart with:\n"
              "    python train.py --config=small.py    (downloads 95 MB, takes some 3 minutes on two CPU cores)\n"
              "    python train.py --config=tiny.py     (downloads nothing, takes seconds)")
        return 0
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip(), settings.help_text(Config), sep="\n\n")
        return 0
    try:
        config = read_config(arguments)
        results = train(config)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory ({str(error).splitlines()[0]}): lower batch_size, hvp_batch or block_size, "
              f"or try --auto_hardware=True",
              file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except checkpoint.Stopped as error:
        again = shlex.join([argument for argument in arguments if not argument.startswith(("--resume=", "--overwrite="))])
        print(f"{error}; go on with: python train.py {again} --resume=True", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    out, other = results["out_dir"], "dora" if config.method in BILEVEL else "bidora"
    again = shlex.join([argument for argument in arguments if not argument.startswith(("--method=", "--out_dir=", "--overwrite=", "--resume="))])
    prompts = {"movie-sentiment": "Dull, clumsy and far too long.", "product-sentiment": "It broke within a week.", "toy-sentiment": "aeae lim aeae tik"}
    prompt = "..." if config.train_file else prompts[config.data]
    print(f"next:\n  python sample.py --adapter={out} --prompt=\"{prompt}\"\n"
          f"  python train.py {again} --method={other} --out_dir={out}-{other}    # the same data and budget")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
