"""
What a run works on, made ready before its first step: examples, tokens, the model with its adapters, and every automatic setting decided.

Whatever is wrong with data, tokenizer or model shows here.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import bidora
import data
from config import BILEVEL, Config, differences, second_order
from model import ModelConfig, Transformer
from support import distributed, hardware, quantized
from support.files import read_json
from support.pretrained import find_model
from support.tokenizer import Tokenizer


def load_data(config):
    """The raw examples as {"train", "val", "test"}, and the classification question. Raises ValueError where they don't fit."""
    if config.train_file:
        parts = {
            "train": data.load_examples(config.train_file),
            "val": data.load_examples(config.val_file) if config.val_file else [],
            "test": data.load_examples(config.test_file) if config.test_file else [],
        }
        question = config.label_prompt or data.LABEL_PROMPT
    else:
        examples = data.load_examples(config.data)
        if (
            config.train_size + config.test_size >= len(examples)
            or min(config.train_size, config.test_size) < 10
        ):
            raise ValueError(
                f"train_size={config.train_size} and test_size={config.test_size} must be at least 10 each, and together "
                f"less than the {len(examples)} examples of {config.data}"
            )
        rest, test = data.split(
            examples, config.test_size / len(examples), seed=0
        )  # the same test for every seed
        train, _ = data.split(rest, 1 - config.train_size / len(rest), seed=config.seed)
        parts = {"train": train, "val": [], "test": test}
        question = config.label_prompt or data.BUILT_IN[config.data]
    if not config.val_file and config.val_fraction > 0:
        parts["train"], parts["val"] = data.split(parts["train"], config.val_fraction, config.seed)
    formats = {data.format_of(part[0]) for part in parts.values() if part}
    if len(formats) > 1:
        raise ValueError(f"the files differ in format: {', '.join(sorted(formats))}")
    labels = {
        name: {example.get("label") for example in part} for name, part in parts.items() if part
    }
    if formats == {"classification"} and len(labels["train"]) < 2:
        raise ValueError(
            f"all train examples have the label {labels['train'].pop()!r}: classification needs two labels or more"
        )
    for name, found in labels.items():
        if unseen := found - labels["train"]:
            raise ValueError(f"{name} has the label {sorted(unseen)[0]!r}, which train lacks")
        if name == "val" and (lacking := labels["train"] - found):
            raise ValueError(
                f"val lacks the label {sorted(lacking)[0]!r}: give it examples of every label"
            )
    return parts, question


def choose_dtype(config, device):
    """The base's dtype, as a name, and, in words, why."""
    if config.dtype != "auto":
        return config.dtype, "as set"
    if config.method == "ft":
        return "float32", "full fine-tuning needs it"
    if differences(config):
        return "float32", "finite differences need it"
    dtype, why = hardware.fast_dtype(device)
    return str(dtype).removeprefix("torch."), why


@dataclass
class Task:
    """A run's data and model. parts, encoded: the examples, and the same as rows of tokens, both as {"train", "val", "test"}."""

    config: Config  # nothing automatic left in it, but for what stands below: device, dtype, label_prompt
    device: str
    dtype: str
    why: str  # this dtype
    folder: Path  # of the base model
    tokenizer: Tokenizer
    model: Transformer
    parts: dict
    label_prompt: str
    label_ids: dict  # {label: its tokens}, in order
    encoded: dict
    cut: int  # how many examples were too long
    fingerprint: str  # of encoded
    weight_bytes: int
    local_weight_bytes: int  # of them, what this process holds
    sizes: dict  # how many parameters each level trains

    @property
    def phases(self):
        """[(name, lower-level steps, rows to train on)]"""
        config, train, both = (
            self.config,
            self.encoded["train"],
            self.encoded["train"] + self.encoded["val"],
        )
        phases = [("search", config.search_steps, train), ("retrain", config.retrain_steps, both)]
        if config.method not in BILEVEL:
            phases = [("train", config.search_steps + config.retrain_steps, both)]
        return [phase for phase in phases if phase[1] > 0]


def prepare(config, device, source=None, fingerprint=None):
    """
    The Task of a config.Config on a device. source: the folder of the run that goes on; fingerprint: its data's, if it has a checkpoint.

    Raises ValueError or FileNotFoundError for what is wrong with the data, the tokenizer or the model.
    """
    lower_lr = config.lower_lr or (2e-5 if config.method == "ft" else 1e-3)
    config = dataclasses.replace(
        config,
        lower_lr=lower_lr,
        unroll_lr=config.unroll_lr or lower_lr,
        gradient_checkpointing=str(config.gradient_checkpointing),
    )
    if distributed.LOCAL_RANK > 0:
        distributed.wait()  # for the first process of this machine, which downloads
    parts, label_prompt = load_data(config)
    labels = sorted({example["label"] for example in parts["train"] if "label" in example})
    folder = find_model(config.model, config.revision)
    tokenizer = Tokenizer.from_pretrained(folder)
    label_ids = data.tokenize_labels(labels, tokenizer)
    if distributed.LOCAL_RANK == 0:
        distributed.wait()
    dtype, why = distributed.from_first(lambda: choose_dtype(config, device), device)
    shape = ModelConfig.from_hf(read_json(folder / "config.json"))

    def encode(block_size):
        done = {
            name: data.encode(
                examples, tokenizer, block_size, label_prompt, label_ids, config.train_on_prompt
            )
            for name, examples in parts.items()
        }
        return {name: rows for name, (rows, _) in done.items()}, sum(
            cut for _, cut in done.values()
        )

    if config.auto_hardware and not source:
        free = distributed.from_first(lambda: hardware.free_memory(device), device)
        if free is None:
            raise ValueError(
                "auto_hardware=True: this system does not say how much memory is free; set quantize, accumulate, "
                "gradient_checkpointing and block_size yourself"
            )
        rows = [
            row
            for part in encode(config.block_size or shape.max_position_embeddings)[0].values()
            for row in part
        ]
        longest, answer = (
            max(len(row.labels) for row in rows),
            max(sum(label != -100 for label in row.labels) for row in rows),
        )
        shortest = (
            2 if data.format_of(parts["train"][0]) in ("text", "code") else answer + 1
        )  # an answer is never cut
        picked, lines = hardware.choose(
            shape, config, getattr(torch, dtype).itemsize, longest, answer, free, shortest
        )
        config = dataclasses.replace(config, **picked)
        print(*lines, sep="\n")
    config = dataclasses.replace(
        config,
        block_size=config.block_size or 256,
        accumulate=config.accumulate or 1,
        quantize="none" if config.quantize == "auto" else config.quantize,
        gradient_checkpointing="False"
        if config.gradient_checkpointing == "auto"
        else config.gradient_checkpointing,
    )
    if config.block_size > shape.max_position_embeddings:
        raise ValueError(
            f"block_size={config.block_size} is more than the {shape.max_position_embeddings} positions of {config.model}"
        )
    encoded, cut = encode(config.block_size)
    found = hashlib.sha256(repr(encoded).encode()).hexdigest()
    if fingerprint not in (None, found):
        raise ValueError(f"{source} can't be resumed: its data or its tokenizer has changed since")

    torch.manual_seed(config.seed)
    if config.fsdp:
        distributed.give_memory_back()
    model = Transformer.from_pretrained(
        folder,
        getattr(torch, dtype),
        "cpu" if config.fsdp else device,
        None if config.quantize == "none" else config.quantize,
        mapped=config.fsdp,
    )
    model.gradient_checkpointing = config.gradient_checkpointing == "True"
    weight_bytes = quantized.nbytes(model)
    largest = max(max(row.input_ids) for rows in encoded.values() for row in rows)
    if largest >= shape.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer writes token {largest}, but the model's vocabulary ends at {shape.vocab_size}"
        )
    if config.method != "ft":
        model.requires_grad_(False)
        bidora.replace_linear_with_bidora(
            model,
            config.rank,
            config.target_modules,
            config.alpha,
            config.dropout,
            config.method,
            config.norm_grad,
            config.magnitude_axis,
            config.lambda_kind,
        )
    if config.fsdp:
        distributed.shard(model, device)
    if config.compile:
        for block in model.model.layers:
            block.compile()  # they share their code, so that it is compiled once
    return Task(
        config,
        device,
        dtype,
        why,
        folder,
        tokenizer,
        model,
        parts,
        label_prompt,
        label_ids,
        encoded,
        cut,
        found,
        weight_bytes,
        distributed.local_bytes(model) if config.fsdp else weight_bytes,
        {
            "lower": sum(p.numel() for p in bidora.lower_parameters(model)),
            "upper": sum(p.numel() for p in bidora.upper_parameters(model)),
        },
    )


def announce(task):
    """Print what a run is about to do, and on what."""
    config, tokenizer = task.config, task.tokenizer
    packed = "" if config.quantize == "none" else f"{config.quantize} and "
    print(
        f"{config.method} on {config.model}, {packed}{task.dtype} on {task.device} ({task.why}): {task.weight_bytes / 1e6:.0f} MB of weights"
    )
    if distributed.WORLD_SIZE > 1:
        print(
            f"{distributed.WORLD_SIZE} processes, each with its share of every batch"
            + (f", and {task.local_weight_bytes / 1e6:.0f} MB of weights" if config.fsdp else "")
        )
    print(
        f"data: {config.train_file or config.data}: {', '.join(f'{len(examples)} {name}' for name, examples in task.parts.items())}"
        + (f"; labels {', '.join(task.label_ids)}" if task.label_ids else "")
    )
    if task.cut:
        print(
            f"{task.cut} examples were longer than block_size={config.block_size} tokens: cut on the left, their answers kept"
        )
    if tokenizer.library_reason:
        print(
            f"the tokenizers library splits the text, since tiktoken can't: {tokenizer.library_reason}"
        )
    if not tokenizer.has_chat_template:
        print("the tokenizer has no chat template: a plain one (User: … Assistant: …) is used")
    print(
        f"trainable parameters: {task.sizes['lower']:,} lower level, {task.sizes['upper']:,} upper level"
    )
    if second_order(config):
        together = config.hvp_batch or math.ceil(config.batch_size / config.accumulate)
        longest = max(len(row.labels) for row in task.encoded["train"])
        scores = together * hardware.score_bytes(task.model.config, longest)
        if scores > 1e9:
            print(
                f"second derivatives keep attention's scores, which grow with the square of the length: up to {scores / 1e9:.0f} GB for {together} rows "
                f"of {longest} tokens; --hvp_batch=1 or a smaller --block_size lowers that"
            )
    start = "a fresh start" if config.final_init == "fresh" else "where search ended"
    below, above = (
        ("direction", "magnitude")
        if config.method == "bidora"
        else ("singular vectors", "singular values")
    )
    for phase, steps, _ in task.phases:
        print(
            f"{phase}: {steps} steps, "
            + {
                "search": f"{below} on train, {above} on val by the {config.hypergradient} hypergradient",
                "retrain": f"{below} on train + val from {start}, {above} fixed",
                "train": "on train + val",
            }[phase]
        )
