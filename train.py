"""
Fine-tune a language model, or an encoder, with BiDoRA or one of its relatives.

    python train.py --config=small.py                  the settings in configs/small.py
    python train.py --config=small.py --method=dora    any setting can be given as --name=value
    python train.py --config=small.py --resume=True    resume a run that was stopped or killed
    python train.py --help                             every setting, its default and what it does

BiDoRA's three phases (arXiv 2410.09758, algorithm 1): *search* alternates (1) a step of the
direction on the train split and (2) a step of the magnitude on the val split, along a
hypergradient; (3) *retrain* fixes the magnitude and trains the direction on train and val together.
BiLoRA does the same with λ in place of the magnitude. The other methods train once on train and val
together, for as many lower-level steps in total.
"""

import support.run.interrupt  # noqa: F401  (Ctrl-C in one line, during these imports too)

import functools
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

import bidora
import data
import tasks
from bidora import METHODS, adapter_layers
from bilevel import HYPERGRADIENTS, MicroBatches, create_bilevel_optimizer
from config import MAY_CHANGE, Config, check, is_bilevel, read_config, resolve, second_order
from support.run import distributed, hardware, progress, report, rules, settings
from support.run.run import Run
from support.tasks.predict import evaluate_rows
from support.text.splits import Examples
from support.weights import quantized
from support.weights.hf_format import is_own
from support.weights.pretrained import find_model, read_run
from support.weights.regularisers import regulariser


def train(config, task_class=None):
    """
    Run all phases of a config; return the results that summary.json holds. task_class: a subclass
    of Task that does a part of this in another way.

    Raises ValueError or OSError for wrong input, before the first step; FloatingPointError for a
    loss that is not finite; Stopped, a KeyboardInterrupt, at SIGINT or SIGTERM, after saving the
    work for --resume.
    """
    check(config)
    device = hardware.choose_device(config.device)
    with hardware.attention(device), Run(config, device, MAY_CHANGE) as run:
        check(run.config)  # that of a resumed run comes from a file
        task = prepare(run.config, run.device, run.resuming, task_class or Task, run.began)
        config = task.config
        run.start(task)
        report.announce(task, METHODS.get(config.method))
        if config.eval_before:
            # Only the held-out split, to save time; a resumed run knows its scores already.
            run.before = run.before or evaluate(task, task.held_out)
            report.announce_before(run.before, task.family.metric)

        train_rows, val_rows = task.encoded["train"], task.encoded["val"]
        if is_bilevel(config):
            # Phases 1 and 2 alternate: the direction on train, the magnitude on val.
            upper_rows = train_rows if config.upper_data == "train" else val_rows
            fit(run, task, "search", config.search_steps, train_rows, upper_rows)
        elif config.two_phases:
            fit(run, task, "search", config.search_steps, train_rows + val_rows)
        else:
            steps = config.search_steps + config.retrain_steps
            fit(run, task, "train", steps, train_rows + val_rows)

        if is_bilevel(config) or config.two_phases:
            # Phase 3: the magnitude is fixed; the direction is trained afresh on all the data.
            if config.retrain_steps:
                first_time = "retrain" not in run.done  # else a resumed run goes on in it
                bidora.start_retrain(task.model, fresh=first_time and config.final_init == "fresh")
            fit(run, task, "retrain", config.retrain_steps, train_rows + val_rows)
        return run.finish(task.summary() | {"after": evaluate(task, task.evaluated)})


def fit(run, task, phase, steps, rows, val_rows=()):
    """
    One phase: every step trains the lower level on rows. If there are val_rows, a round is
    upper_every of these steps, then upper_steps of the upper level on val_rows.
    """
    if run.done.get(phase, 0) == steps:
        return

    config, optimizer = task.config, build_optimizer(task, phase)
    train_batch, val_batch = task.batches(rows), task.batches(val_rows)
    with run.phase(phase, steps, optimizer) as remaining:
        task.model.train()
        for step in remaining:
            optimizer.scale_lr(learning_rate_scale(step, steps, config.lr_floor))
            losses = {"train_loss": optimizer.lower_step(task.lower_loss, train_batch(step - 1))}
            for turn in upper_turns(step, config) if val_rows else ():
                losses["val_loss"] = optimizer.upper_step(task.loss, val_batch(turn))
            if config.eval_every and (step % config.eval_every == 0 or step == steps):
                losses["held_loss"] = evaluate_rows(task, task.watched, scored=False)["loss"]
            run.record(step, losses)
        # A loss is computed before its step: only one more can show that the last step went well.
        if not torch.isfinite(loss := optimizer.loss(task.loss, train_batch(steps))):
            raise FloatingPointError(f"loss {loss:g} after the last step")


def upper_turns(step, config):
    """The numbers of the val batches that follow a lower step: upper_steps at a round's end."""
    if step % config.upper_every:
        return range(0)
    end = step // config.upper_every * config.upper_steps
    return range(end - config.upper_steps, end)


def learning_rate_scale(step, steps, floor=0.1):
    """
    The factor on both learning rates at a step, counted from 1 to `steps`: linear warm-up over the
    first tenth, then linear decay to `floor` times the peak.
    """
    warmup = max(1, round(0.1 * steps))
    if step <= warmup:
        return step / warmup
    return 1 - (1 - floor) * (step - warmup) / max(1, steps - warmup)


def build_optimizer(task, phase):
    """The two-level optimizer of the config."""
    config = task.config
    lower_lr = (phase == "retrain" and config.retrain_lr) or config.lower_lr
    names = "upper_steps hypergradient weight_decay upper_weight_decay lora_plus grad_clip"
    names = (*names.split(), "optimizer", "precondition")
    same = {name: getattr(config, name) for name in names}
    same |= {"lower_steps": config.upper_every, "beta2": config.adam_beta2}
    # An option at 0 keeps the function's default; only for damping is 0 a value of its own.
    options = {
        option: getattr(config, setting)
        for option, setting in HYPERGRADIENTS[config.hypergradient].options.items()
        if getattr(config, setting) or setting == "damping"
    }
    rates, options = (lower_lr, config.upper_lr), options | {"reduce": distributed.add_up}
    return task.create_optimizer(task.model, *rates, **same, **options)


def evaluate(task, splits):
    """The results of evaluate_rows on each of the splits, {split: rows}, as {split: results}."""
    # Generated texts take long: only those of the last split are scored.
    last = [name for name, rows in splits.items() if rows][-1]
    with progress.bar("evaluate", sum(map(len, splits.values())), "row") as bar:
        return {n: evaluate_rows(task, rows, bar, n == last) for n, rows in splits.items()}


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
    encoded: dict  # {"train", "val", "test"}: lists of rows
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
    def held_out(self):
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


def main(arguments):
    if not arguments:
        print(__doc__.strip(), report.START, sep="\n\n")
        return 0
    if distributed.RANK > 0:  # of several processes, only the first one prints
        sys.stdout = open(os.devnull, "w")

    def do(config):
        given = settings.parse(Config, arguments)
        try:
            results = train(config)
        except KeyboardInterrupt as error:
            raise report.stopped(error, given) from None
        other = "dora" if is_bilevel(config) else "bidora"
        print(report.next_commands(results, given, config, other, lambda x: check(read_config(x))))

    return settings.program(arguments, Config, do, __doc__, reader=read_config)


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
