"""What a run trains: from its config to a Task, its data as rows and its model with adapters."""

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

import bidora
import data
import tasks
from bidora import METHODS, adapter_layers
from bilevel import HYPERGRADIENTS, MicroBatches, create_bilevel_optimizer
from config import Config, is_bilevel, resolve, second_order
from support.run import distributed, hardware, progress, report, rules
from support.text.splits import Examples
from support.weights import quantized
from support.weights.hf_format import is_own
from support.weights.pretrained import find_model, read_run
from support.weights.regularisers import regulariser


@dataclass
class Task:
    """What a run trains and on which data, ready for its first step."""

    config: Config  # its automatic settings resolved, except device and dtype
    device: str
    dtype: str
    dtype_reason: str
    folder: Path  # of the base model
    name: str  # a key of tasks.TASKS
    family: tasks.LanguageTask | tasks.HeadTask  # what rows, losses and scores are here
    examples: Examples  # what is known of them; their texts are not kept
    encoded: dict  # {"train", "val", "test"}, and with held_fraction "held": lists of rows
    cut: int  # how many examples were too long
    labels: list  # sorted; [] where there are none
    model: nn.Module
    sizes: dict  # weight_bytes, local_weight_bytes (this process's), trainable_parameters

    def batches(self, rows):
        """A function of k: the k-th batch, as this process's micro-batches: (rows, share)."""
        c, count = self.config, self.family.supervised
        ranks = distributed.RANK, distributed.WORLD_SIZE
        batches = data.Batches(rows, c.batch_size, c.seed, c.group_by_length, c.shuffle)

        def micro_batches(k):
            return MicroBatches(data.micro_batches(batches[k], c.micro_batch_size, *ranks, count))

        return micro_batches

    def loss(self, model, micro_batch):
        rows, share = micro_batch
        return self.family.loss(model, rows) * share

    def lower_loss(self, model, micro_batch):
        loss, gram_weight = self.loss(model, micro_batch), self.config.gram_weight
        if gram_weight:
            loss = loss + gram_weight * micro_batch[1] * regulariser(adapter_layers(model).values())
        return loss

    create_optimizer = staticmethod(create_bilevel_optimizer)

    @property
    def evaluated(self):
        """The rows of each split that are evaluated, at most eval_size, the same every time."""
        most, rng = self.config.eval_size, random.Random
        return {n: rng(0).sample(rows, min(most, len(rows))) for n, rows in self.encoded.items()}

    @property
    def tested(self):
        """The evaluated rows of the last split that has any: test, unless there is none."""
        return dict([pair for pair in self.evaluated.items() if pair[1]][-1:])

    @property
    def watched(self):
        """The rows whose loss eval_every asks for: held's, or where there are none test's."""
        return self.evaluated.get("held") or self.evaluated["test"]

    @property
    def layers(self):
        """The layers that fine-tuning changes, {name: module}."""
        adapted = adapter_layers(self.model)
        return adapted or bidora.linear_layers(self.model, self.config.target_modules)

    def save(self, out):
        """Write the adapter, or for full fine-tuning the model, into the folder `out`."""
        if self.config.method == "ft":
            self.family.save_pretrained(self.model, self.folder, out)
        else:
            bidora.save_adapter(self.model, out, self.config.model)

    def summary(self):
        """What summary.json holds besides the run's own numbers."""
        return report.summary(self)


def prepare(config, device, resuming=False, task_class=Task, began=None):
    """
    The Task of a config: data, tokens, and the model with its adapters. began: see tasks.build.

    Raises ValueError or FileNotFoundError for data, a tokenizer or a model that can't be used.
    """
    if distributed.LOCAL_RANK > 0:
        distributed.wait()  # until this machine's first process has downloaded the files
    splits, question, labels, glue = data.load_splits(config)
    folder = find_model(config.model)
    shape = tasks.read_shape(folder)
    name = tasks.choose(config.task, splits["train"][0], shape)
    family = tasks.build(name, config, folder, question, labels, glue, began)
    if distributed.LOCAL_RANK == 0:
        distributed.wait()  # lets the others continue

    rules.refuse(rules.task(config, name, name in tasks.HEADS, not is_own(folder)))
    known = tasks.TASKS, Config.__annotations__
    run = read_run(Path(config.adapter), *known) if config.adapter else {}
    rules.refuse(rules.start(config, run, name, tasks.HEADS, labels))
    rules.refuse(rules.splits(config, splits, is_bilevel(config)))
    precise = is_bilevel(config) and HYPERGRADIENTS[config.hypergradient].float32
    dtype, dtype_reason = hardware.choose_dtype(config, device, precise)

    encode = functools.partial(encode_splits, family, splits)
    if config.auto_hardware and not resuming:
        method = METHODS.get(config.method)
        config = hardware.fit_memory(config, method, device, dtype, shape, encode)
    config = resolve(config, shape)
    examples = Examples.of(splits, config)
    encoded, cut = encode(config.block_size)
    config = rules.with_steps(config, len(encoded["train"]) + len(encoded["val"]))
    splits.clear()  # frees the texts
    data.check_vocabulary(encoded, shape.vocab_size, folder)
    family.rehearse(encoded["train"])

    model, sizes = build_model(config, folder, dtype, device, family, encoded["train"])
    own = dict(config=config, device=device, dtype=dtype, dtype_reason=dtype_reason, folder=folder)
    own |= dict(name=name, family=family, examples=examples, encoded=encoded, cut=cut)
    return task_class(**own, labels=labels, model=model, sizes=sizes)


def encode_splits(family, splits, block_size):
    """({split: its rows}, how many examples were too long) of {split: examples}."""
    rows, cut = {}, 0
    for name, examples in splits.items():
        shown = progress.over(examples, f"tokenise {name}", "example")
        rows[name], longer = family.encode(shown, block_size)
        cut += longer
    return rows, cut


def build_model(config, folder, dtype, device, family, rows):
    """
    Returns the model with its adapters, and its sizes, those of a Task. rows: the train split's.
    """
    torch.manual_seed(config.seed)
    if config.fsdp:
        distributed.give_memory_back()
    place = "cpu" if config.fsdp else device  # sharded weights move to the device in shares
    quantize = None if config.quantize == "none" else config.quantize
    options = dict(quantize=quantize, mapped=config.fsdp)
    model = tasks.load_model(family, folder, getattr(torch, dtype), place, rows, **options)
    model.gradient_checkpointing = config.gradient_checkpointing
    weight_bytes = quantized.nbytes(model)

    if config.method == "ft":
        model.requires_grad_(True)
    elif config.adapter:
        bidora.load_adapter(model, config.adapter, config.method)
        for layer in adapter_layers(model).values():
            layer.norm_grad = config.norm_grad
    else:
        fixed, targets = config.magnitude_only, config.target_modules
        sizes = config.rank, config.alpha, config.dropout, (*targets, *fixed), config.method
        names = ("norm_grad", "magnitude_axis", "init", "alpha_pattern")
        options = {name: getattr(config, name) for name in names}
        options["rank_pattern"] = dict.fromkeys(fixed, 1) | config.rank_pattern
        bidora.replace_linear_with_bidora(model, *sizes, **options)
        for layer in bidora.linear_layers(model, fixed).values():  # B stays 0: W0's direction
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)

    if config.fsdp:
        distributed.shard(model, device, second_order(config))
    if config.compile:
        for block in model.model.layers:
            block.compile()  # the blocks share their code, so it is compiled once

    levels = {"lower": bidora.lower_parameters(model), "upper": bidora.upper_parameters(model)}
    return model, {
        "weight_bytes": weight_bytes,
        "local_weight_bytes": distributed.local_bytes(model) if config.fsdp else weight_bytes,
        "trainable_parameters": {k: sum(p.numel() for p in own) for k, own in levels.items()},
    }
