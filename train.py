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
import json
import math
import os
import random
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import bidora
import data
from config import BILEVEL, HARMLESS, Config, check, read_config
from hypergrad import assign, create_bilevel_optimizer
from prepare import announce, prepare
from support import checkpoint, distributed, hardware, report, settings
from support.files import replacing, write_json
from support.pretrained import is_hub_name
from support.weight_changes import Trajectory


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
    rows = sorted(encoded, key=lambda e: len(e.input_ids))  # rows of similar length: little padding
    if not config.fsdp:  # there, all must call the same blocks in step
        rows = rows[distributed.RANK :: distributed.WORLD_SIZE]
    for start in range(0, len(rows), config.eval_batch_size):
        batch = rows[start : start + config.eval_batch_size]
        if label_ids:
            scores = model.score(
                [e.prompt_ids for e in batch], list(label_ids.values())
            )  # (B, labels)
            answers = torch.tensor(
                [list(label_ids).index(e.label) for e in batch], device=scores.device
            )
            total -= scores.gather(1, answers[:, None]).sum().item()
            right += (scores.argmax(1) == answers).sum().item()
            tokens += sum(len(label_ids[e.label]) for e in batch)
        else:
            loss, hits, count = model.totals(
                *(t.to(model.lm_head.weight.device) for t in data.collate(batch, pad_id))
            )
            total, right, tokens = total + loss, right + hits, tokens + count
    sums = torch.tensor(
        [total, right, tokens], dtype=torch.float64, device=model.lm_head.weight.device
    )
    total, right, tokens = (sums if config.fsdp else distributed.add_up([sums])[0]).tolist()
    return {"loss": total / tokens, "accuracy": right / (len(encoded) if label_ids else tokens)}


def learning_rate_scale(step, steps, warmup):
    """The rates' factor at step 1 … steps: up in a line over the first `warmup` of them, then down in a line to a tenth."""
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return step / rising
    return 1 - 0.9 * (step - rising) / max(1, steps - rising)


class Run:
    """A run in its folder `out`: trains its phases, knows how far it is, and writes what it has come to. Of several processes, only the first writes."""

    def __init__(self, task, out, source, state, started):
        """source, state: the folder and the checkpoint, as checkpoint.load gives it, of a run that goes on, or None. started: when, in seconds."""
        config, self.task, self.out, self.state, self.started = (
            task.config,
            task,
            out,
            state,
            started,
        )
        self.parameters = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        layers = bidora.adapter_layers(task.model) or bidora.linear_layers(
            task.model, config.target_modules
        )
        self.trajectory = (
            Trajectory.start(layers, config.magnitude_axis) if config.snapshots else None
        )
        about = (
            state[1]
            if state
            else {"phase": 0, "step": 0, "n": 0, "seconds": {}, "elapsed": 0.0, "before": None}
        )
        self.first, self.begin = (
            about["phase"],
            about["step"],
        )  # the phase that it starts in, after which of its steps
        self.n, self.seconds, self.elapsed, self.before = (
            about["n"],
            about["seconds"],
            about["elapsed"],
            about["before"],
        )  # n: steps in all
        lines = (
            (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[: self.n]
            if state
            else []
        )
        self.metrics = [json.loads(line) for line in lines]
        if [line["step"] for line in self.metrics] != list(range(1, self.n + 1)):
            raise ValueError(
                f"{source / 'metrics.jsonl'} lacks lines of the first {self.n} steps: the run can't be resumed"
            )
        if state:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(state[0][f"parameter.{name}"])
            if self.trajectory:
                self.trajectory = dataclasses.replace(self.trajectory, **about["trajectory"])

    def open_folder(self, source, previous, asked, locks):
        """Put what a run starts with into its folder, the earlier run aside. asked: the settings as they were given; locks: train's. For the first process alone."""
        if previous:
            checkpoint.set_aside(self.out)
            if not self.out.exists():
                locks.enter_context(checkpoint.locked(self.out))  # a new folder
        # The folder is tried with all that will go into it while nothing is lost yet: a full disk shows now.
        try:
            write_json(
                self.out / "run.json",
                dataclasses.asdict(self.task.config)
                | {
                    "labels": list(self.task.label_ids),
                    "label_prompt": self.task.label_prompt,
                    "dtype": self.task.dtype,
                    "asked": asked,
                },
            )
            self.save()
        except OSError as error:
            if source != self.out:
                checkpoint.remove_run(self.out)
            if previous and not self.out.exists():
                os.replace(previous, self.out)
                (self.out / checkpoint.REPLACED).unlink(missing_ok=True)
            raise OSError(
                f"{error}; out_dir={self.out} must be a folder with room for the run"
            ) from None

    def save(self):
        """Write the adapter, or under full fine-tuning the model, as it is now."""
        if distributed.RANK > 0:
            return
        config, task = self.task.config, self.task
        if config.method == "ft":
            task.model.save_pretrained(self.out)
            task.tokenizer.save_pretrained(self.out)
        else:
            bidora.save_adapter(
                task.model,
                self.out,
                config.model if is_hub_name(config.model) else str(task.folder),
                config.revision,
            )
        if self.trajectory:
            self.trajectory.save(self.out)

    def write_checkpoint(self, phase, step, optimizer=None):
        """Write what the run needs to go on after that step of that phase."""
        if distributed.RANK > 0:
            return
        tensors = {f"parameter.{name}": p for name, p in self.parameters.items()}
        for level in ("lower", "upper") if optimizer else ():
            if own := getattr(optimizer, f"{level}_optimizer"):
                tensors |= {
                    f"{level}.{key}": value
                    for key, value in checkpoint.optimizer_state(own).items()
                }
        points = (
            {key: getattr(self.trajectory, key) for key in ("snapshots", "delta_m", "delta_d")}
            if self.trajectory
            else None
        )
        checkpoint.save(
            self.out,
            self.n,
            tensors,
            {
                "phase": phase,
                "step": step,
                "n": self.n,
                "seconds": self.seconds,
                "before": self.before,
                "data": self.task.fingerprint,
                "elapsed": self.elapsed + time.time() - self.started,
                "trajectory": points,
                "random": checkpoint.random_states(),
            },
        )

    def train_phase(self, index, begin, log, signals):
        """
        Train phase number `index`, from the step after `begin` on.

        log: metrics.jsonl, open; signals: from checkpoint.asked_to_stop. Raises checkpoint.Stopped, or FloatingPointError for a loss that is not finite.
        """
        config, model, pad_id, is_first = (
            self.task.config,
            self.task.model,
            self.task.tokenizer.pad_id,
            distributed.RANK == 0,
        )
        phase, steps, rows = self.task.phases[index]
        if phase == "retrain":
            bidora.freeze_magnitude(model)
            if config.final_init == "fresh" and begin == 0:
                for layer in bidora.adapter_layers(model).values():
                    layer.reset_direction()
        options = {
            "first_order": {},
            "unrolled": {"lr": config.unroll_lr, "steps": config.unroll_steps, "mode": config.mode},
            "neumann": {"terms": config.terms, "alpha": config.neumann_alpha},
            "conjugate_gradient": {"iterations": config.cg_iterations, "damping": config.damping},
        }[config.hypergradient]
        optimizer = create_bilevel_optimizer(
            model,
            config.lower_lr,
            config.upper_lr,
            config.upper_every,
            config.hypergradient,
            config.weight_decay,
            config.grad_clip,
            config.optimizer,
            config.precondition,
            distributed.add_up,
            **options,
        )
        trained = optimizer.lower + optimizer.upper
        distributed.same_everywhere(p.data for p in trained)
        if begin:
            for level in ("lower", "upper"):
                if own := getattr(optimizer, f"{level}_optimizer"):
                    checkpoint.load_optimizer_state(
                        own,
                        {
                            key.removeprefix(f"{level}."): value
                            for key, value in self.state[0].items()
                            if key.startswith(f"{level}.")
                        },
                    )
        turns = begin // config.upper_every if optimizer.upper else 0  # of the upper level, so far
        train_batches = data.batches(
            rows,
            config.batch_size,
            pad_id,
            config.seed,
            begin + turns * (config.upper_steps - 1),
            config.group_by_length,
        )
        val_batches = data.batches(
            self.task.encoded["val"],
            config.batch_size,
            pad_id,
            config.seed,
            turns * config.upper_steps,
            config.group_by_length,
        )

        def shares(batch, count=config.accumulate):
            if self.task.device.startswith("cuda"):
                batch = [
                    tensor.pin_memory() for tensor in batch
                ]  # copied to the GPU while that is still busy
            return data.parts(batch, count, distributed.RANK, distributed.WORLD_SIZE)

        def loss_fn(model, part):
            input_ids, labels, share = part  # a part of a batch, with its share of the labels
            return (
                model(
                    input_ids.to(self.task.device, non_blocking=True),
                    labels.to(self.task.device, non_blocking=True),
                )
                * share
            )

        def lower_loss_fn(model, part):
            return loss_fn(model, part) + config.gram_weight * part[2] * bidora.regulariser(model)

        marks = {math.ceil(steps * i / config.snapshots) for i in range(1, config.snapshots + 1)}
        last_finite = None  # the weights that last gave a finite loss, for when the next do not
        last_kept, phase_start, earlier = begin, time.time(), self.seconds.get(phase, 0)
        model.train()
        progress = tqdm(
            range(begin + 1, steps + 1),
            desc=phase,
            unit="step",
            initial=begin,
            total=steps,
            disable=not is_first,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        step = begin
        try:
            for step in progress:
                step_start, self.n = time.time(), self.n + 1
                before_step = [p.detach().clone() for p in trained]
                scale = learning_rate_scale(step, steps, config.warmup)
                optimizer.scale_lr(scale)
                # The upper level's step differentiates through the last lower-level ones, so these are kept.
                keep = bool(optimizer.upper) and -step % config.upper_every < config.unroll_steps
                count = (
                    math.ceil(config.batch_size / config.hvp_batch)
                    if keep and config.hvp_batch
                    else config.accumulate
                )
                loss = optimizer.lower_step(
                    lower_loss_fn if config.gram_weight else loss_fn,
                    *shares(next(train_batches), count),
                    keep=keep,
                )
                line = {
                    "step": self.n,
                    "phase": phase,
                    "train_loss": loss.item(),
                    "lower_lr": scale * config.lower_lr,
                }
                for i in range(
                    config.upper_steps if optimizer.upper and step % config.upper_every == 0 else 0
                ):
                    again = (
                        shares(next(train_batches)) if i else None
                    )  # the kept steps serve the first
                    val_loss = optimizer.upper_step(loss_fn, again, shares(next(val_batches)))
                    line |= {"val_loss": val_loss.item(), "upper_lr": scale * config.upper_lr}
                last_finite = before_step
                if step in marks and is_first:
                    self.trajectory.record(model, phase, self.n)
                line["seconds"] = round(time.time() - step_start, 4)
                self.metrics.append(line)
                log.write(json.dumps(line) + "\n")  # one whole line at a time
                log.flush()
                progress.set_postfix(
                    lower=f"{line['train_loss']:.3f}",
                    refresh=False,
                    **({"upper": f"{line['val_loss']:.3f}"} if "val_loss" in line else {}),
                )
                stop = asked_everywhere(signals, self.task.device)
                # Between two turns of the upper level, when no lower-level step waits to be differentiated.
                if (
                    not optimizer.past
                    and step < steps
                    and (stop or step - last_kept >= config.checkpoint_every)
                ):
                    self.seconds[phase], last_kept = earlier + time.time() - phase_start, step
                    self.write_checkpoint(index, step, optimizer)
                    if stop:
                        self.save()
                        raise checkpoint.Stopped(f"stopped at {phase} step {step} of {steps}", stop)
            with torch.no_grad():
                final_loss = distributed.add_up(
                    [sum(loss_fn(model, part) for part in shares(next(train_batches)))]
                )[0]
            if not torch.isfinite(final_loss):
                raise FloatingPointError(f"loss {final_loss:g} after the last step")
        except FloatingPointError as error:
            progress.close()
            if last_finite:  # else the folder holds what the phase before has left
                assign(trained, last_finite)
                self.save()
            raise FloatingPointError(
                f"{phase} step {step} of {steps} is not finite ({error}): lower lower_lr or upper_lr; "
                f"the weights of the last good step are in {self.out}"
            ) from None
        self.seconds[phase] = earlier + time.time() - phase_start
        self.save()
        self.write_checkpoint(index + 1, 0)
        if stop := asked_everywhere(signals, self.task.device):
            raise checkpoint.Stopped(f"stopped at the end of {phase}", stop)


def asked_everywhere(signals, device):
    """The largest signal that any process has got, or 0: all must stop at the same step."""
    own = torch.zeros(distributed.WORLD_SIZE, device=device)
    own[distributed.RANK] = signals[0] if signals else 0
    return int(distributed.add_up([own])[0].max())


def train(config):
    """
    Run all phases as config says; returns the results that summary.json holds.

    Raises ValueError or OSError for wrong input, before the first step; FloatingPointError for a loss that is not finite; checkpoint.Stopped, a
    KeyboardInterrupt, at SIGINT or SIGTERM, with the work saved for config.resume.
    """
    check(config)
    with contextlib.ExitStack() as locks:
        return train_in(Path(config.out_dir or "out/run"), config, locks)


def train_in(out, config, locks):
    """train's work; locks: an ExitStack that holds the folder `out` for this run."""
    device = (
        ("cuda" if torch.cuda.is_available() else "cpu")
        if config.device == "auto"
        else config.device
    )
    started, memory_at_start = time.time(), hardware.peak_memory(device)
    device, is_first = distributed.start(device), distributed.RANK == 0

    def find_folder():
        existing = next(path for path in (out, *out.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(
                f"out_dir={out} can't be written, since {existing} is {'read-only' if existing.is_dir() else 'a file'}: "
                f"choose another"
            )
        locks.enter_context(checkpoint.locked(out))
        return [str(path) if path else None for path in checkpoint.find_run(config, out)]

    source, previous = (
        Path(path) if path else None for path in distributed.from_first(find_folder, device)
    )
    asked, state = dataclasses.asdict(config), None
    if source:
        config, state = checkpoint.resumed(config, source, HARMLESS), checkpoint.load(source)
        print(
            f"resuming {source} after step {state[1]['n']}"
            if state
            else f"{source} has no checkpoint yet: starting from its first step"
        )
    task = prepare(config, device, source, state[1]["data"] if state else None)
    config = task.config
    run = Run(task, out, source, state, started)
    distributed.from_first(lambda: run.open_folder(source, previous, asked, locks), device)
    announce(task)

    evaluated = {
        name: random.Random(0).sample(rows, min(config.eval_size, len(rows)))
        for name, rows in task.encoded.items()
    }

    @torch.compiler.set_stance("force_eager")  # not compiled for each of evaluation's shapes
    def evaluate_all():
        return {
            name: evaluate(task.model, rows, task.label_ids, config, task.tokenizer.pad_id)
            for name, rows in evaluated.items()
        }

    run.before = run.before or evaluate_all()
    shown = "test" if evaluated["test"] else "val" if evaluated["val"] else "train"
    print(
        f"before training: {shown} accuracy {run.before[shown]['accuracy']:.1%}, loss {run.before[shown]['loss']:.3f}",
        flush=True,
    )

    if is_first:
        with replacing(out / "metrics.jsonl") as temporary:
            temporary.write_text(
                "".join(json.dumps(line) + "\n" for line in run.metrics), encoding="utf-8"
            )
        if state and source != out:  # from here on the new folder stands alone
            checkpoint.save(out, run.n, *state)
    if state:
        checkpoint.set_random_states(state[1]["random"])
    if distributed.RANK > 0:  # other dropout masks than the first process's, also after a resume
        torch.manual_seed(hash((config.seed, distributed.RANK, run.n)))
    try:
        with (
            open(out / "metrics.jsonl" if is_first else os.devnull, "a", encoding="utf-8") as log,
            checkpoint.asked_to_stop() as signals,
        ):
            for index in range(run.first, len(task.phases)):
                run.train_phase(index, run.begin if index == run.first else 0, log, signals)
    except OSError as error:
        hint = (
            f"; go on elsewhere with --resume={out} --out_dir=..." if checkpoint.names(out) else ""
        )
        raise OSError(f"{error}{hint}") from None

    after = evaluate_all()
    results = {
        "method": config.method,
        "model": config.model,
        "dtype": task.dtype,
        "seed": config.seed,
        "quantize": config.quantize,
        "weight_bytes": task.weight_bytes,
        "examples": {name: len(examples) for name, examples in task.parts.items()},
        "evaluated": {name: len(rows) for name, rows in evaluated.items()},
        "before": run.before,
        "after": after,
        "trainable_parameters": task.sizes,
        "seconds": run.seconds | {"total": run.elapsed + time.time() - started},
        "peak_memory_gb": hardware.peak_memory(device),
        "peak_memory_beyond_start_gb": hardware.peak_memory(device) - memory_at_start,
        "processes": distributed.WORLD_SIZE,
        "local_weight_bytes": task.local_weight_bytes,
        "out_dir": str(out),
    }
    if not is_first:
        return results
    report.plot_losses(out / "loss.png", run.metrics, results)
    write_json(out / "summary.json", results)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if (checkpoint.previous_of(out) / checkpoint.REPLACED).exists():
        checkpoint.remove_run(checkpoint.previous_of(out))
    print(report.table(results))
    return results


def main(arguments):
    if not arguments:
        print(
            __doc__.strip() + "\n\nStart with:\n"
            "    python train.py --config=small.py    (downloads 95 MB, takes some 3 minutes on two CPU cores)\n"
            "    python train.py --config=tiny.py     (downloads nothing, takes seconds)"
        )
        return 0
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip(), settings.help_text(Config), sep="\n\n")
        return 0
    try:
        config = read_config(arguments)
        if distributed.RANK > 0:
            sys.stdout = open(os.devnull, "w")
        results = train(config)
    except torch.OutOfMemoryError as error:
        print(
            f"error: out of memory ({str(error).splitlines()[0]}): lower batch_size, hvp_batch or block_size, "
            f"or try --auto_hardware=True",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        if distributed.LOCAL_RANK == 0:  # once for each machine, whose files and network may differ
            print(f"error: {error}", file=sys.stderr)
        return 2
    except checkpoint.Stopped as error:
        again = shlex.join(
            [
                argument
                for argument in arguments
                if not argument.startswith(("--resume=", "--overwrite="))
            ]
        )
        command = (
            f"python train.py {again}"
            if distributed.WORLD_SIZE == 1
            else "the same torchrun command and"
        )
        if distributed.LOCAL_RANK == 0:
            print(f"{error}; go on with: {command} --resume=True", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    out, other = results["out_dir"], "dora" if config.method in BILEVEL else "bidora"
    shown = [
        argument
        for argument in arguments
        if not argument.startswith(
            ("--method=", "--out_dir=", "--overwrite=", "--resume=", "--fsdp=")
        )
    ]
    again = shlex.join(shown + ["--fsdp=False"] * config.fsdp)
    prompts = {
        "movie-sentiment": "Dull, clumsy and far too long.",
        "product-sentiment": "It broke within a week.",
        "toy-sentiment": "aeae lim aeae tik",
    }
    prompt = "..." if config.train_file else prompts[config.data]
    print(
        f'next:\n  python sample.py --adapter={out} --prompt="{prompt}"\n'
        f"  python train.py {again} --method={other} --out_dir={out}-{other}    # the same data and budget"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
