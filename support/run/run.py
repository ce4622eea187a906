"""
A run and its folder: step count, log, progress bar, checkpoints, the stop at a signal, and recovery
from a loss that is not finite. If there are several processes, only the first one writes.

    with Run(config, device, may_change) as run:           locks out_dir, reads a resumed run
        run.start(task)                                    writes the folder, restores a resumed run
        with run.phase("search", 12, optimizer) as steps:
            for step in steps:                             the steps that are still to do
                ...
                run.record(step, losses)                   logs, takes snapshots, checkpoints, stops
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch

from support.run import checkpoint, distributed, hardware, interrupt, progress, report, run_folder
from support.run.files import read_sealed, replacing, seal, write_json, written
from support.text.packed import digest_of_rows
from support.weights.pretrained import fingerprints
from support.weights.weight_changes import Trajectory

LOG_EVERY = 0.25  # seconds between writes at least, since Python waits for the GPU to read a loss
LEVELS = {"train_loss": "lower", "val_loss": "upper"}
SHOWN = LEVELS | {"held_loss": "held"}  # on the bar


def digest_of(lines):
    """A digest of the log's lines, in bytes."""
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


class Run:
    """The run of a config, or of an earlier one, from whose settings only may_change may differ."""

    def __init__(self, config, device, may_change):
        self.started, self.memory_at_start = time.time(), hardware.peak_memory(device)
        self.device = distributed.start(device)
        self.is_first = distributed.RANK == 0
        self.out, self.asked = Path(config.out_dir or "out/run"), dataclasses.asdict(config)
        self.state, self.earlier_run = None, {}
        self.opened = False  # whether the folder holds this run

        with contextlib.ExitStack() as locks:
            # A folder can be locked only once, so the first process does this for all.
            def find_folder():
                run_folder.check_writable(self.out)
                locks.enter_context(run_folder.locked(self.out))
                now = datetime.datetime.now().isoformat(timespec="seconds")
                return *run_folder.find_run(config, self.out), now

            self.resuming, self.replaces, now = distributed.from_first(find_folder)
            if self.resuming:
                self.earlier_run = read_sealed(self.out / "run.json")
                config = run_folder.resumed_config(config, self.out, self.earlier_run, may_change)
                self.state = checkpoint.load(self.out)
                none = f"{self.out} has no checkpoint yet: starting from its first step"
                print(self.state and f"resuming {self.out} after step {self.state[1]['n']}" or none)
            self.config, self.locks = config, locks.pop_all()
        # A chat template may write the date. A run keeps the one on which it began.
        self.began = self.earlier_run.get("began", now)

    def __enter__(self):
        return self

    def __exit__(self, error_type, *error):
        self.locks.close()
        if error_type is KeyboardInterrupt:  # between phases, or the second signal within a step
            raise self.interrupted() from None

    def interrupted(self):
        """The error that replaces a KeyboardInterrupt and says what has been saved."""
        if not self.opened or run_folder.is_untrained(self.out):
            return interrupt.Stopped("interrupted before the first step", how=interrupt.START_AGAIN)
        if (self.out / "summary.json").exists():
            return interrupt.Stopped(f"interrupted; the run in {self.out} has finished", how="")
        if sum(self.done.values()) == self.config.search_steps + self.config.retrain_steps:
            text = "interrupted after the last step: all are saved, only the evaluation is repeated"
            return interrupt.Stopped(text)
        saved = max(checkpoint.steps(self.out), default=0)
        return interrupt.Stopped(f"interrupted; {saved} steps are saved")

    def start(self, task):
        """Restore a resumed run or set an earlier one aside; write the folder. task: a Task."""
        self.config, self.task = task.config, task
        self.parameters = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
        axis, snapshots = self.config.magnitude_axis, self.config.snapshots
        self.trajectory = Trajectory.start(task.layers, axis) if snapshots else None

        distributed.from_first(self.check_inputs)
        # n: steps so far; done: {phase: its steps so far}; before: the results before training
        self.n, self.done, self.seconds, self.before, self.metrics = 0, {}, {}, None, []
        if self.state:
            self.restore(*self.state)

        distributed.from_first(self.open_folder)
        self.opened = True
        # Each process draws its own dropout masks, after a resume too.
        if not self.is_first:
            torch.manual_seed(hash((self.config.seed, distributed.RANK, self.n)))

    def check_inputs(self):
        """Raise ValueError if the base or the data of a resumed run have changed."""
        folder, data = self.task.folder, digest_of_rows(self.task.encoded)
        self.inputs = fingerprints(folder) | {"the data": data}
        before = self.earlier_run.get("inputs", self.inputs)
        if changed := ", ".join(name for name in before if self.inputs.get(name) != before[name]):
            reason = f"{changed} changed since the run began, on {folder}"
            raise ValueError(f"{self.out} can't be resumed: {reason}")

    def restore(self, tensors, state):
        """Restore a checkpoint. phase() restores the optimizers."""
        self.n, self.done, self.before = state["n"], state["done"], state["before"]
        self.seconds, self.started = state["seconds"], self.started - state["elapsed"]

        # Steps after the checkpoint will be done again, so their lines in the log are dropped.
        log = self.out / "metrics.jsonl"
        lines = log.read_bytes().splitlines()[: self.n]
        if digest_of(lines) != state["log"]:
            problem = f"{log} lacks lines of the first {self.n} steps, or was edited"
            raise ValueError(f"{problem}: the run can't be resumed")
        self.metrics = [json.loads(line) for line in lines]

        self.load_parameters(tensors)
        if self.trajectory:
            self.trajectory = dataclasses.replace(self.trajectory, **state["trajectory"])
        checkpoint.set_random_states(state["random"])

    def load_parameters(self, tensors):
        """Give the trained parameters a checkpoint's values."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"parameter.{name}"])

    def open_folder(self):
        """Write run.json, the log and the weights, so that a full disk shows before any work."""
        if self.replaces:
            run_folder.set_aside(self.out)
            if not self.out.exists():
                self.locks.enter_context(run_folder.locked(self.out))  # the new folder

        try:
            settings = dataclasses.asdict(self.config) | report.metadata(self.task)
            settings |= {"asked": self.asked, "inputs": self.inputs, "began": self.began}
            settings["files"] = self.earlier_run.get("files")
            write_json(self.out / "run.json", seal(settings))
            with replacing(self.out / "metrics.jsonl") as temporary:
                lines = "".join(json.dumps(line) + "\n" for line in self.metrics)
                temporary.write_text(lines, encoding="utf-8")
            before = set(self.out.iterdir())
            self.save()
            if not self.resuming:  # --overwrite will remove these files and no others
                settings["files"] = sorted(path.name for path in {*self.out.iterdir()} - before)
                write_json(self.out / "run.json", seal(settings))
        except OSError as error:
            if not self.resuming:
                run_folder.remove_run(self.out)
            if self.replaces:
                run_folder.put_back(self.out)
            raise OSError(f"{error}; out_dir={self.out} needs room for the run") from None

    @contextlib.contextmanager
    def phase(self, name, steps, optimizer):
        """Yield the steps up to `steps` that are to do. Raises Stopped or FloatingPointError."""
        self.name, self.steps, self.optimizer = name, steps, optimizer
        self.step = self.last_kept = self.done.get(name, 0)
        self.phase_start = time.time() - self.seconds.get(name, 0)
        # The last weights with a finite loss: how many steps made them, and copies (not for ft)
        self.good, self.last_finite, self.before_step = self.n - bool(self.step), {}, {}
        # The lowest held-out loss, its step, and with keep=best that step's weights
        self.best, self.best_step, self.best_tensors = math.inf, 0, {}
        count = self.config.snapshots
        self.marks = {math.ceil(steps * i / count) for i in range(1, count + 1)}

        distributed.same_everywhere(p.data for p in optimizer.lower + optimizer.upper)
        if self.step:
            tensors, state = self.state
            checkpoint.load_optimizer_state(optimizer, tensors)
            self.best, self.best_step = state["best"]
            self.best_tensors = {n[5:]: x for n, x in tensors.items() if n.startswith("best.")}

        # Lines of the log that are not yet written, when it was written, and what the bar shows
        self.unwritten, self.last_written, self.shown = [], 0.0, {}
        log = self.out / "metrics.jsonl" if self.is_first else os.devnull
        try:
            with (
                written(log),
                progress.bar(name, steps, "step", self.step) as self.bar,
                open(log, "a", buffering=1, encoding="utf-8") as self.log,  # a kill tears no line
                interrupt.stop_signals() as self.signals,
            ):
                try:
                    yield self.remaining()
                finally:
                    self.write_log()
                self.choose()
                self.save()
                self.write_checkpoint()
                if stop := self.stop_asked():
                    raise interrupt.Stopped(f"stopped at the end of {name}", stop)
        except FloatingPointError as error:
            self.roll_back(error)
        except OSError as error:
            resumes = "; then add --resume=True (--out_dir=… too for a copied folder)"
            raise OSError(f"{error}{resumes if checkpoint.steps(self.out) else ''}") from None

    def remaining(self):
        for step in range(self.step + 1, self.steps + 1):
            waited = self.step - self.best_step
            if self.config.patience and waited >= self.config.patience * self.config.eval_every:
                return
            self.step, self.step_start, self.n = step, time.time(), self.n + 1
            if self.config.method != "ft":  # whose copies would be two whole models
                self.before_step = self.copies()
            yield step
            self.bar.update()

    def copies(self):
        """Copies of the trained parameters, as load_parameters takes them."""
        return {f"parameter.{n}": p.detach().clone() for n, p in self.parameters.items()}

    def record(self, step, losses):
        """Log a step; if due, take a snapshot, save, stop. losses: {name: a scalar}."""
        # If the loss before this step were not finite, the step would have raised.
        self.good, self.last_finite = self.n - 1, self.before_step
        line = {"step": self.n, "phase": self.name}
        for key, level in LEVELS.items():
            if key in losses:
                rate = self.optimizer.optimizers[level].param_groups[0]["lr"]
                line |= {key: losses[key], f"{level}_lr": rate}
        if "held_loss" in losses:
            line["held_loss"] = losses["held_loss"]
            if line["held_loss"] < self.best:
                self.best, self.best_step = line["held_loss"], step
                self.best_tensors = self.copies() if self.config.keep == "best" else {}
        if step in self.marks and self.is_first:
            self.trajectory.record(self.task.model, self.name, self.n)

        line["seconds"] = round(time.time() - self.step_start, 4)
        self.unwritten.append(line)
        if time.time() - self.last_written >= LOG_EVERY:
            self.write_log()

        stop = self.stop_asked()
        due = step - self.last_kept >= self.config.checkpoint_every
        # A checkpoint can't hold the lower-level steps that wait for the upper level's next step.
        if not self.optimizer.past and step < self.steps and (stop or due):
            self.last_kept = step
            self.write_checkpoint()
            if stop:
                self.save()
                raise interrupt.Stopped(f"stopped at {self.name} step {step} of {self.steps}", stop)

    def choose(self):
        """At a phase's end, say what the held-out losses decided; with keep=best, go back."""
        if self.best_tensors or self.step < self.steps:
            kept = ", whose weights are kept" * bool(self.best_tensors)
            lowest = f"the lowest held-out loss, {self.best:.3f}, came after step {self.best_step}"
            print(f"{self.name}: {self.step} of {self.steps} steps; {lowest}{kept}")
        if self.best_tensors:
            self.load_parameters(self.best_tensors)
        self.step = self.steps  # done, if patience ended it too

    def roll_back(self, error):
        """Save the last weights with a finite loss; raise FloatingPointError."""
        tensors, last = self.last_finite, "step"
        if not tensors:  # without a checkpoint, the folder holds the weights from before this phase
            tensors, _ = checkpoint.load(self.out, self.good) or ({}, {})
            last = "checkpoint"
        if tensors:
            self.load_parameters(tensors)
            self.save()
        raise FloatingPointError(
            f"{self.name} step {self.step} of {self.steps} is not finite ({error}): "
            f"lower lower_lr or upper_lr; the weights of the last good {last} are in {self.out}"
        ) from None

    def stop_asked(self):
        """The highest signal number of any process, or 0, since all must stop at the same step."""
        return distributed.highest(self.signals[0] if self.signals else 0)

    def write_log(self):
        """Write the lines of the steps since the last call; show the last losses."""
        lines, self.unwritten, self.last_written = self.unwritten, [], time.time()
        if not lines:
            return

        places = [(line, key) for line in lines for key in LEVELS if key in line]
        values = torch.stack([line[key] for line, key in places]).tolist()  # one copy from the GPU
        for (line, key), value in zip(places, values):
            line[key] = value
        self.metrics += lines
        for line in lines:
            self.log.write(json.dumps(line) + "\n")
            self.shown |= {SHOWN[key]: f"{line[key]:.3f}" for key in SHOWN if key in line}
        self.bar.set_postfix(self.shown, refresh=False)

    def save(self):
        """Write the present weights, and the trajectory."""
        if self.is_first:
            self.task.save(self.out)
            if self.trajectory:
                self.trajectory.save(self.out)

    def write_checkpoint(self):
        """Write the log, then all that the run needs to resume after this step."""
        self.write_log()
        self.seconds[self.name] = time.time() - self.phase_start
        self.done[self.name] = self.step
        if not self.is_first:
            return

        tensors = {f"parameter.{name}": p for name, p in self.parameters.items()}
        if self.step < self.steps:  # the next phase begins with optimizers of its own
            tensors |= checkpoint.optimizer_state(self.optimizer)
            tensors |= {f"best.{name}": tensor for name, tensor in self.best_tensors.items()}

        keys = ("snapshots", "delta_m", "delta_d") if self.trajectory else ()
        state = {
            "n": self.n,
            "done": self.done,
            "seconds": self.seconds,
            "before": self.before,
            "best": [self.best, self.best_step],
            "elapsed": time.time() - self.started,
            "trajectory": {key: getattr(self.trajectory, key) for key in keys},
            "random": checkpoint.random_states(),
            "log": digest_of(json.dumps(line).encode() for line in self.metrics),
        }
        checkpoint.save(self.out, self.n, tensors, state)

    def finish(self, results):
        """Add the run's numbers to results, write summary and curves, and print the table."""
        peak = hardware.peak_memory(self.device)
        results |= {
            "before": self.before,
            "first_train_loss": self.metrics[0]["train_loss"],
            "trained_on": report.trained_on(self.task, [*self.done], self.n),
            "seconds": self.seconds | {"total": time.time() - self.started},
            "peak_memory_gb": peak,
            "peak_memory_beyond_start_gb": peak - self.memory_at_start,
            "processes": distributed.WORLD_SIZE,
            "out_dir": str(self.out),
        }
        if self.config.keep == "best":
            last = [line for line in self.metrics if line["phase"] == self.metrics[-1]["phase"]]
            held = {line["step"]: line["held_loss"] for line in last if "held_loss" in line}
            results["kept_step"] = min(held, key=held.get)
        if self.is_first:
            report.plot_losses(self.out / "loss.png", self.metrics, results)
            write_json(self.out / "summary.json", results)
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
            run_folder.remove_previous(self.out)
            print(report.table(results))
        return results
