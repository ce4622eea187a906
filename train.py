"""
Fine-tune a language model, or an encoder, with BiDoRA or one of its relatives.

    python train.py --config=small.py                  the settings in configs/small.py
    python train.py --config=small.py --method=dora    any setting can be given as --name=value
    python train.py --config=small.py --resume=True    resume a run that was stopped or killed
    python train.py --help                             every setting, its default and what it does

BiDoRA (arXiv 2410.09758, algorithm 1) has two phases. *Search* alternates a step of A and B on the
train split with a step of the magnitude m on the val split, along a hypergradient. *Retrain* fixes
m and trains A and B afresh on train and val together. BiLoRA does the same with λ in place of m.
The other methods train once on train and val together, for as many lower-level steps in total.
"""

import support.run.interrupt  # noqa: F401  (Ctrl-C in one line, during these imports too)

import os
import sys

import torch

import bidora
from bidora import METHODS
from bilevel import HYPERGRADIENTS
from config import MAY_CHANGE, Config, check, is_bilevel, read_config
from prepare import Task, prepare
from support.run import distributed, hardware, progress, report, settings
from support.run.run import Run
from support.tasks.predict import evaluate_rows


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
            # On test alone, to save time. A resumed run knows these scores already.
            run.before = run.before or evaluate(task, task.tested)
            report.announce_before(run.before, task.family.metric)

        train_rows, val_rows = task.encoded["train"], task.encoded["val"]
        if is_bilevel(config):
            # Steps alternate: A and B learn on train, the magnitude on val.
            upper_rows = train_rows if config.upper_data == "train" else val_rows
            fit(run, task, "search", config.search_steps, train_rows, upper_rows)
        elif config.two_phases:
            fit(run, task, "search", config.search_steps, train_rows + val_rows)
        else:
            steps = config.search_steps + config.retrain_steps
            fit(run, task, "train", steps, train_rows + val_rows)

        if is_bilevel(config) or config.two_phases:
            # The magnitude is fixed; A and B are trained afresh on all the data.
            if config.retrain_steps:
                first_time = "retrain" not in run.done  # else a resumed run goes on in it
                bidora.start_retrain(task.model, fresh=first_time and config.final_init == "fresh")
            fit(run, task, "retrain", config.retrain_steps, train_rows + val_rows)
        return run.finish(task.summary() | {"after": evaluate(task, task.evaluated)})


def fit(run, task, phase, steps, rows, upper_rows=()):
    """
    One phase: every step trains the lower level on rows. If there are upper_rows, a round is
    upper_every of these steps, then upper_steps of the upper level on upper_rows.

    run.done: {phase: the steps that are saved}; run.phase yields the numbers, from 1, of those
    still to do; run.record logs a step, and may save a checkpoint or stop (support/run/run.py).
    """
    if run.done.get(phase, 0) == steps:
        return

    config, optimizer = task.config, build_optimizer(task, phase)
    batch, upper_batch = task.batches(rows), task.batches(upper_rows)
    with run.phase(phase, steps, optimizer) as remaining:
        task.model.train()
        for step in remaining:
            optimizer.scale_lr(learning_rate_scale(step, steps, config.lr_floor))
            losses = {"train_loss": optimizer.lower_step(task.lower_loss, batch(step - 1))}
            for turn in upper_turns(step, config) if upper_rows else ():
                losses["val_loss"] = optimizer.upper_step(task.loss, upper_batch(turn))
            if config.eval_every and (step % config.eval_every == 0 or step == steps):
                losses["held_loss"] = evaluate_rows(task, task.watched, scored=False)["loss"]
            run.record(step, losses)
        # A loss is computed before its step: only one more can show that the last step went well.
        if not torch.isfinite(loss := optimizer.loss(task.loss, batch(steps))):
            raise FloatingPointError(f"loss {loss:g} after the last step")


def upper_turns(step, config):
    """The numbers of the upper level's batches after a lower step: upper_steps end a round."""
    if step % config.upper_every:
        return range(0)
    end = step // config.upper_every * config.upper_steps
    return range(end - config.upper_steps, end)


def learning_rate_scale(step, steps, floor=0.1):
    """
    The factor on both learning rates at a step of one phase, counted from 1 to `steps`: linear
    warm-up over the first tenth, then linear decay to `floor` times the peak.
    """
    warmup = max(1, round(0.1 * steps))
    if step <= warmup:
        return step / warmup
    return 1 - (1 - floor) * (step - warmup) / max(1, steps - warmup)


def build_optimizer(task, phase):
    """The two-level optimizer of the config."""
    c = task.config
    # An option at 0 keeps the function's default; only for damping is 0 a value of its own.
    options = {
        option: getattr(c, setting)
        for option, setting in HYPERGRADIENTS[c.hypergradient].options.items()
        if getattr(c, setting) or setting == "damping"
    }
    return task.create_optimizer(
        task.model,
        lower_lr=(phase == "retrain" and c.retrain_lr) or c.lower_lr,
        upper_lr=c.upper_lr,
        lower_steps=c.upper_every,  # of a round
        upper_steps=c.upper_steps,
        hypergradient=c.hypergradient,
        precondition=c.precondition,
        weight_decay=c.weight_decay,
        upper_weight_decay=c.upper_weight_decay,
        beta2=c.adam_beta2,
        lora_plus=c.lora_plus,
        grad_clip=c.grad_clip,
        optimizer=c.optimizer,
        reduce=distributed.add_up,
        **options,
    )


def evaluate(task, splits):
    """The results of evaluate_rows on each of the splits, {split: rows}, as {split: results}."""
    # Generated texts take long: only those of the last split are scored.
    last = [name for name, rows in splits.items() if rows][-1]
    with progress.bar("evaluate", sum(map(len, splits.values())), "row") as bar:
        return {n: evaluate_rows(task, rows, bar, n == last) for n, rows in splits.items()}


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
