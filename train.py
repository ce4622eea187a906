"""
Fine-tune a language model with BiDoRA or one of its relatives.

    python train.py --config=small.py                  the settings in configs/small.py
    python train.py --config=small.py --method=dora    any setting can be given as --name=value
    python train.py --config=small.py --resume=True    resume a run that was stopped or killed
    python train.py --help                             every setting, its default and what it does

BiDoRA's three phases (arXiv 2410.09758, algorithm 1): *search* alternates (1) a step of the
direction on the train split and (2) a step of the magnitude on the val split, along a
hypergradient; (3) *retrain* fixes the magnitude and trains the direction on train and val together.
The other methods train once on train and val together, for as many lower-level steps in total.
"""

import support.interrupt  # noqa: F401  (Ctrl-C in one line, during these imports too)

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import bidora
import data
from bidora import METHODS, adapter_layers
from config import MAY_CHANGE, Config, check, is_bilevel, read_config, resolve, second_order
from hypergrad import HYPERGRADIENTS, MicroBatches, create_bilevel_optimizer
from model import ModelConfig, Transformer
from support import distributed, hardware, quantized, report, settings
from support.checkpoint import Stopped
from support.datasets import BUILT_IN
from support.files import read_json
from support.pretrained import find_model, is_hub_name
from support.regularisers import regulariser
from support.run import Run
from support.tokenizer import Tokenizer


def train(config):
    """
    Run all phases of a config; return the results that summary.json holds.

    Raises ValueError or OSError for wrong input, before the first step; FloatingPointError for a
    loss that is not finite; Stopped, a KeyboardInterrupt, at SIGINT or SIGTERM, after saving the
    work for --resume.
    """
    check(config)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with Run(config, device, MAY_CHANGE) as run:
        check(run.config)  # that of a resumed run comes from a file
        task = prepare(run.config, run.device, run.resuming)
        config = task.config
        run.start(task)
        report.announce(task, METHODS.get(config.method))
        run.before = run.before or evaluate(task)  # a resumed run knows it already
        report.announce_before(run.before)

        train_rows, val_rows = task.encoded["train"], task.encoded["val"]
        if is_bilevel(config):
            # Phases 1 and 2 alternate: the direction on train, the magnitude on val.
            fit(run, task, "search", config.search_steps, train_rows, val_rows)
            # Phase 3: the magnitude is fixed; the direction is trained afresh on all the data.
            if config.retrain_steps:
                begins = "retrain" not in run.done
                bidora.start_retrain(task.model, fresh=begins and config.final_init == "fresh")
            fit(run, task, "retrain", config.retrain_steps, train_rows + val_rows)
        else:
            steps = config.search_steps + config.retrain_steps
            fit(run, task, "train", steps, train_rows + val_rows)
        return run.finish(task.summary() | {"after": evaluate(task)})


def fit(run, task, phase, steps, rows, val_rows=()):
    """Train one phase: the lower level on rows and, if there are val_rows, the upper on them."""
    begin, config, pad_id = run.done.get(phase, 0), task.config, task.tokenizer.pad_id
    if begin == steps:
        return

    optimizer = build_optimizer(task)
    every, turns = config.upper_every, config.upper_steps if val_rows else 0
    # A resumed phase skips the batches that it has used: one per step, and for each past round of
    # the upper level one val batch per turn and one train batch per turn after the first.
    past = begin // every if val_rows else 0
    shape, similar = (config.batch_size, pad_id, config.seed), config.group_by_length
    train_batches = data.batches(rows, *shape, begin + past * (turns - 1), similar)
    val_batches = data.batches(val_rows, *shape, past * turns, similar)

    def micro_batches(batch):
        size, ranks = config.micro_batch_size, (distributed.RANK, distributed.WORLD_SIZE)
        return MicroBatches(data.micro_batches(batch, size, *ranks))

    def loss_fn(model, micro_batch):
        input_ids, labels, share = micro_batch  # its share of the batch's supervised positions
        return model(input_ids, labels) * share

    def lower_loss_fn(model, micro_batch):
        loss = loss_fn(model, micro_batch)
        if config.gram_weight:
            layers = adapter_layers(model).values()
            loss = loss + config.gram_weight * micro_batch[2] * regulariser(layers)
        return loss

    with run.phase(phase, steps, optimizer) as remaining:
        task.model.train()
        for step in remaining:
            optimizer.scale_lr(learning_rate_scale(step, steps))
            # The upper level differentiates through the last lower-level steps, so they are kept.
            keep = turns and -step % every < optimizer.kept_steps
            lower_step = optimizer.lower_step_kept if keep else optimizer.lower_step
            losses = {"train_loss": lower_step(lower_loss_fn, micro_batches(next(train_batches)))}
            for turn in range(turns if step % every == 0 else 0):
                # The kept steps serve the first turn; each further one needs its own train batch.
                again = micro_batches(next(train_batches)) if turn else None
                val_batch = micro_batches(next(val_batches))
                losses["val_loss"] = optimizer.upper_step(loss_fn, again, val_batch)
            run.record(step, losses)
        with torch.no_grad():
            last = sum(loss_fn(task.model, part) for part in micro_batches(next(train_batches)))
        run.check_finite(distributed.add_up([last])[0])


def learning_rate_scale(step, steps):
    """
    The factor on both learning rates at a step, counted from 1 to `steps`: linear warm-up over the
    first tenth, then linear decay to 10 % of the peak.
    """
    warmup = max(1, round(0.1 * steps))
    if step <= warmup:
        return step / warmup
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


def build_optimizer(task):
    """The two-level optimizer of the config."""
    config = task.config
    # An option at 0 keeps the function's default; only for damping is 0 a value of its own.
    options = {
        option: getattr(config, setting)
        for option, setting in HYPERGRADIENTS[config.hypergradient].options.items()
        if getattr(config, setting) or setting == "damping"
    }
    return create_bilevel_optimizer(
        task.model,
        config.lower_lr,
        config.upper_lr,
        config.upper_every,
        config.weight_decay,
        config.hypergradient,
        grad_clip=config.grad_clip,
        optimizer=config.optimizer,
        precondition=config.precondition,
        reduce=distributed.add_up,
        **options,
    )


# ---------------------------------------------------------------------------- evaluation


# Each batch here has a shape of its own, and torch.compile would compile for each.
@torch.compiler.set_stance("force_eager")
def evaluate(task):
    """The results of evaluate_rows on at most eval_size rows of each split, {split: results}."""
    splits = task.evaluated
    with report.bar("evaluate", sum(map(len, splits.values())), "row") as bar:
        return {name: evaluate_rows(task, rows, bar) for name, rows in splits.items()}


@torch.no_grad()
def evaluate_rows(task, rows, bar=None):
    """
    Mean loss (nats per token) and accuracy over a list of Encoded; None for an empty list.

    With labels: the loss of the right label's tokens, and how often that label is the likeliest.
    Without: the loss at the supervised positions, and how often the likeliest token is right.
    """
    if not rows:
        return None
    model, label_ids, sharded = task.model.eval(), task.label_ids, task.config.fsdp
    device = model.lm_head.weight.device
    total = right = tokens = 0

    # Each process takes its share of the rows; but with sharded weights all must call the same
    # blocks in step, so each takes all rows.
    own = sorted(rows, key=lambda row: len(row.input_ids))  # similar lengths need little padding
    share = 1 if sharded else distributed.WORLD_SIZE
    own = own[distributed.RANK % share :: share]
    size = max(1, min(32, 8192 // max(len(row.input_ids) for row in rows)))  # rows per forward pass

    for start in range(0, len(own), size):
        batch = own[start : start + size]
        if label_ids:
            prompts = [row.prompt_ids for row in batch]
            scores = model.score(prompts, list(label_ids.values()))  # (B, labels)
            answers = [list(label_ids).index(row.label) for row in batch]
            answers = torch.tensor(answers, device=device)
            total -= scores.gather(1, answers[:, None]).sum().item()
            right += (scores.argmax(1) == answers).sum().item()
            tokens += sum(len(label_ids[row.label]) for row in batch)
        else:
            loss, hits, count = model.totals(*data.collate(batch, task.tokenizer.pad_id))
            total, right, tokens = total + loss, right + hits, tokens + count
        if bar is not None:
            bar.update(min(share * len(batch), bar.total - bar.n))

    sums = torch.tensor([total, right, tokens], dtype=torch.float64, device=device)
    total, right, tokens = (sums if sharded else distributed.add_up([sums])[0]).tolist()
    return {"loss": total / tokens, "accuracy": right / (len(rows) if label_ids else tokens)}


# --------------------------------------------------------------------------- preparation


@dataclass
class Task:
    """What a run trains and on which data, ready for its first step."""

    config: Config  # its automatic settings resolved, except device and dtype
    device: str
    dtype: str
    why: str  # the reason for this dtype
    folder: Path  # of the base model
    tokenizer: Tokenizer
    splits: dict  # {"train", "val", "test"}: lists of examples
    encoded: dict  # the same splits, as lists of data.Encoded
    cut: int  # how many examples were too long
    question: str  # classification: the prompt, with {text} for the example's text
    label_ids: dict  # classification: {label: its token ids}, sorted by label
    model: Transformer
    weight_bytes: int  # of the whole model
    local_weight_bytes: int  # the share of them that this process holds
    sizes: dict  # {"lower", "upper"}: how many parameters each level trains

    @property
    def evaluated(self):
        """The rows of each split that are evaluated, the same ones every time."""
        most, rng = self.config.eval_size, random.Random
        return {n: rng(0).sample(rows, min(most, len(rows))) for n, rows in self.encoded.items()}

    @property
    def layers(self):
        """The layers that fine-tuning changes, {name: module}."""
        adapted = adapter_layers(self.model)
        return adapted or bidora.linear_layers(self.model, self.config.target_modules)

    def about(self):
        """What run.json holds besides the settings; sample.py reads it."""
        labels = list(self.label_ids)
        return {"labels": labels, "label_prompt": self.question, "dtype": self.dtype}

    def save(self, out):
        """Write the adapter, or for full fine-tuning the model, into the folder `out`."""
        if self.config.method == "ft":
            self.model.save_pretrained(out)
            self.tokenizer.save_pretrained(out)
        else:
            name = self.config.model
            bidora.save_adapter(self.model, out, name if is_hub_name(name) else str(self.folder))

    def summary(self):
        """What summary.json holds besides the run's own numbers."""
        names = ("method", "model", "seed", "quantize")
        return {name: getattr(self.config, name) for name in names} | {
            "dtype": self.dtype,
            "weight_bytes": self.weight_bytes,
            "local_weight_bytes": self.local_weight_bytes,
            "examples": {name: len(examples) for name, examples in self.splits.items()},
            "evaluated": {name: len(rows) for name, rows in self.evaluated.items()},
            "trainable_parameters": self.sizes,
        }


def prepare(config, device, resuming=False):
    """
    The Task of a config: data, tokens, and the model with its adapters.

    Raises ValueError or FileNotFoundError for data, a tokenizer or a model that can't be used.
    """
    if distributed.LOCAL_RANK > 0:
        distributed.wait()  # until this machine's first process has downloaded the files
    splits, question = data.load_splits(config)
    labels = sorted({example["label"] for example in splits["train"] if "label" in example})
    folder = find_model(config.model)
    shape = ModelConfig.from_hf(read_json(folder / "config.json"))
    tokenizer = Tokenizer.from_pretrained(folder)
    label_ids = data.tokenize_labels(labels, tokenizer)
    if distributed.LOCAL_RANK == 0:
        distributed.wait()  # lets the others continue

    precise = is_bilevel(config) and HYPERGRADIENTS[config.hypergradient].float32
    dtype, why = hardware.choose_dtype(config, device, precise)

    def encode(block_size):
        options = (tokenizer, block_size, question, label_ids, config.train_on_prompt)
        found = {name: data.encode(examples, *options) for name, examples in splits.items()}
        rows = {name: rows for name, (rows, _) in found.items()}
        return rows, sum(cut for _, cut in found.values())

    if config.auto_hardware and not resuming:
        method = METHODS.get(config.method)
        config = hardware.fit_memory(config, method, device, dtype, shape, encode)
    config = resolve(config, shape.max_position_embeddings)
    encoded, cut = encode(config.block_size)
    data.check_vocabulary(encoded, shape.vocab_size, tokenizer)

    model, weight_bytes, local_weight_bytes, sizes = build_model(config, folder, dtype, device)
    base = dict(folder=folder, tokenizer=tokenizer, model=model, sizes=sizes)
    base |= dict(weight_bytes=weight_bytes, local_weight_bytes=local_weight_bytes)
    rows = dict(splits=splits, encoded=encoded, cut=cut, question=question, label_ids=label_ids)
    return Task(config, device, dtype, why, **base, **rows)


def build_model(config, folder, dtype, device):
    """
    Returns the model with its adapters, the bytes of its weights in all and in this process, and
    how many parameters each level trains.
    """
    torch.manual_seed(config.seed)
    if config.fsdp:
        distributed.give_memory_back()
    quantize = None if config.quantize == "none" else config.quantize
    place = "cpu" if config.fsdp else device  # sharded weights move to the device in shares
    dtype = getattr(torch, dtype)
    model = Transformer.from_pretrained(folder, dtype, place, quantize, mapped=config.fsdp)
    model.gradient_checkpointing = config.gradient_checkpointing
    weight_bytes = quantized.nbytes(model)

    if config.method != "ft":
        model.requires_grad_(False)
        bidora.replace_linear_with_bidora(
            model,
            config.rank,
            config.alpha,
            config.dropout,
            config.target_modules,
            config.method,
            norm_grad=config.norm_grad,
            magnitude_axis=config.magnitude_axis,
        )

    if config.fsdp:
        distributed.shard(model, device, second_order(config))
    if config.compile:
        for block in model.model.layers:
            block.compile()  # the blocks share their code, so it is compiled once

    lower, upper = bidora.lower_parameters(model), bidora.upper_parameters(model)
    sizes = {"lower": sum(p.numel() for p in lower), "upper": sum(p.numel() for p in upper)}
    own_bytes = distributed.local_bytes(model) if config.fsdp else weight_bytes
    return model, weight_bytes, own_bytes, sizes


# ------------------------------------------------------------------------ the command line


def main(arguments):
    if not arguments or {"--help", "-h"} & set(arguments):
        print(
            __doc__.strip(), settings.help_text(Config) if arguments else report.START, sep="\n\n"
        )
        return 0
    if distributed.RANK > 0:  # of several processes, only the first one prints
        sys.stdout = open(os.devnull, "w")

    try:
        config = read_config(arguments)
        results = train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        return report.failed(error)
    except RuntimeError as error:
        return report.failed_in_torch(error)
    except Stopped as error:
        return report.stopped(error, arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

    prompt = "..." if config.train_file else BUILT_IN[config.data].sample_prompt
    other = "dora" if is_bilevel(config) else "bidora"
    print(report.next_commands(results["out_dir"], arguments, prompt, other, config.fsdp))
    return 0


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
