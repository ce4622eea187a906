"""
What a training run needs to go on after a kill, bit for bit: checkpoints, a lock on its folder, signals that wait for the step's end, and the rules of which
run is gone on with.

A checkpoint is a folder checkpoints/000120 inside the run's: state.safetensors with all tensors (parameters, both optimizers' states) and state.json
with the rest (phase, step, random states, snapshots). It is written under another name and renamed, so one that has its name is whole.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.files import read_json, write_json
from support.tokenizer import FILES as TOKENIZER_FILES

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, two runs in one folder are not noticed
    fcntl = None


REPLACED = "replaced-by-a-newer-run"
RUN_FILES = (
    "run.json",
    "metrics.jsonl",
    "summary.json",
    "loss.png",
    "adapter_config.json",
    "adapter_model.safetensors",
    "trajectory.json",
    "trajectory.safetensors",
    "config.json",
    "model.safetensors",
    REPLACED,
    *TOKENIZER_FILES,
)


def random_states():
    """The states of torch's, numpy's and Python's random numbers, as JSON can hold them."""
    numbers = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [numbers[0], numbers[1].tolist(), *numbers[2:]],
        "python": random.getstate(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def set_random_states(states):
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    numpy.random.set_state(tuple(states["numpy"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if states["cuda"]:
        torch.cuda.set_rng_state_all(
            [torch.tensor(state, dtype=torch.uint8) for state in states["cuda"]]
        )


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer):
    """An optimizer's state as {"<parameter's number>.<name>": tensor}; plain numbers become tensors."""
    return {
        f"{i}.{name}": torch.as_tensor(value).clone()
        for i, parameter in enumerate(parameters_of(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(optimizer, tensors):
    """Put what optimizer_state gave into a fresh optimizer over the same parameters."""
    parameters = parameters_of(optimizer)
    for key, tensor in tensors.items():
        i, name = key.split(".")
        if (
            tensor.dim() == 0
        ):  # a count of steps: a tensor on the CPU in torch's optimizers, an int in bitsandbytes'
            value = tensor if tensor.is_floating_point() else tensor.item()
        else:
            value = tensor.to(parameters[int(i)].device)
        optimizer.state[parameters[int(i)]][name] = value


def save(run, step, tensors, about):
    """
    Write the checkpoint of a step into the run's folder; then all but the last two are removed.

    tensors: {name: tensor}; about: what JSON can hold. Raises OSError, naming the place, when it can't be written; the earlier checkpoints stay.
    """
    final = Path(run) / "checkpoints" / f"{step:06d}"
    temporary = final.with_suffix(".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.parent.mkdir(
            exist_ok=True
        )  # not the run's folder: if that vanished, so did what a checkpoint needs
        temporary.mkdir()
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary / "state.safetensors",
        )
        write_json(
            temporary / "state.json", about | {"sha256": digest(temporary / "state.safetensors")}
        )
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"could not write the checkpoint {final} ({getattr(error, 'strerror', None) or error})"
        ) from None
    others = [path for path in names(run) if path != final]
    before = [path for path in others if int(path.name) < step]
    for old in [
        *before[:-1],
        *(path for path in others if int(path.name) > step),
    ]:  # the later ones were damaged, or not wanted
        shutil.rmtree(old, ignore_errors=True)


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names(run):
    """The folders of a run's checkpoints, the oldest first."""
    folder = Path(run) / "checkpoints"
    return (
        sorted(
            (path for path in folder.iterdir() if path.name.isdigit()),
            key=lambda path: int(path.name),
        )
        if folder.is_dir()
        else []
    )


def load(run):
    """The newest whole checkpoint of a run as (tensors, about), or None; a damaged one is named, and the one before it taken."""
    for folder in reversed(names(run)):
        try:
            about = read_json(folder / "state.json")
            if digest(folder / "state.safetensors") != about.get("sha256"):
                raise ValueError("state.safetensors is not what was written")
            return load_file(folder / "state.safetensors"), about
        except (ValueError, OSError, SafetensorError) as error:
            print(
                f"the checkpoint {folder} is damaged ({error}): "
                + ("taking the one before it" if folder != names(run)[0] else "there is no other"),
                flush=True,
            )
    return None


@contextlib.contextmanager
def locked(folder):
    """Hold a folder, made if need be, for this run alone; the system lets go when the process ends, however that is. Raises ValueError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{folder} is in use by another run: wait for its end, or choose another --out_dir"
                ) from None
        yield
    finally:
        if fcntl:
            os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was written


class Stopped(KeyboardInterrupt):
    """A run that ended at a signal, its work saved; signum says which."""

    def __init__(self, message, signum=signal.SIGINT):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def asked_to_stop():
    """
    A list that gets the number of a SIGINT or SIGTERM as soon as one comes, to be looked at between steps; a second SIGINT interrupts at once.

    Outside of the main thread, where Python has no signals, the list stays empty.
    """
    signals = []

    def note(signum, frame):
        if signals and signum == signal.SIGINT:
            raise KeyboardInterrupt("interrupted a second time: stopped at once")
        signals.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def find_run(config, out):
    """
    What is in the run's folder: (source, previous). source: the folder of the run to resume, or None; previous: where an earlier run is put.

    Raises ValueError or FileNotFoundError where it is not what config.resume and config.overwrite say.
    """
    begun = out.exists() and any(
        not path.name.endswith(".tmp") for path in out.iterdir()
    )  # the rest are writes that a kill cut off
    wanted = config.resume not in ("", "False", "false")
    if wanted:
        source = (
            out
            if config.resume in ("True", "true") or Path(config.resume).resolve() == out.resolve()
            else Path(config.resume)
        )
        if begun and source != out:
            raise ValueError(
                f"{out} holds an earlier run: to resume {source} elsewhere, choose a new --out_dir"
            )
        if source != out and not (source / "run.json").exists():
            raise FileNotFoundError(f"resume={source} holds no run: there is no run.json")
        if not begun and source == out:
            print(f"{out} holds no run to resume: starting one")
            return None, None
    if begun and not (out / "run.json").exists():
        raise ValueError(f"{out} holds files that are no run's: choose another --out_dir")
    if wanted:
        if (source / "summary.json").exists():
            raise ValueError(f"{source} holds a finished run: there is nothing to resume")
        return source, None
    if begun and not config.overwrite:
        more = "" if (out / "summary.json").exists() else ", go on with it by --resume=True"
        raise ValueError(
            f"{out} holds an earlier run: choose another --out_dir{more}, or replace it with --overwrite=True"
        )
    if begun and previous_of(out).exists() and not (previous_of(out) / REPLACED).exists():
        raise ValueError(
            f"{previous_of(out)} is in the way, where the earlier run would be kept: move it elsewhere"
        )
    return None, previous_of(out) if begun else None


def previous_of(out):
    """Where an earlier run of a folder is kept until a new one has finished."""
    return out.with_name(out.name + ".previous")


def set_aside(out):
    """
    Make room in `out` for a new run: an earlier one is kept beside, with a mark that says that it is ours to remove.

    If one is there already, either `out` holds a run that never finished, which goes, or it has finished, and the one before it goes.
    """
    previous = previous_of(out)
    if previous.exists() and (out / "summary.json").exists():
        remove_run(previous)
    if previous.exists() and (previous / REPLACED).exists():
        remove_run(out)
    else:
        (out / REPLACED).touch()
        os.replace(out, previous)


def remove_run(folder):
    """Remove what a run wrote; a folder that holds anything of the user's own stays, with that."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in [*(folder / name for name in RUN_FILES), *folder.glob("*.tmp")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def resumed(config, source, harmless):
    """
    config as the run in source had it, with all that was automatic resolved. harmless: the settings that may have changed.

    Raises ValueError for others that changed since.
    """
    stored, now = read_json(source / "run.json"), json.loads(json.dumps(dataclasses.asdict(config)))
    asked = stored.get("asked")
    if not isinstance(asked, dict) or now.keys() - stored.keys():
        raise ValueError(
            f"{source / 'run.json'} was written by another version, or edited: the run can't be resumed"
        )
    changed = {
        name: f"{name}={value} (it was {asked.get(name)})"
        for name, value in now.items()
        if value != asked.get(name) and name != "resume"
    }
    if refused := [text for name, text in changed.items() if name not in harmless]:
        raise ValueError(f"{source} can't be resumed with other settings: {', '.join(refused)}")
    if changed:
        print(f"changed since the run began: {', '.join(changed.values())}")
    return dataclasses.replace(
        config,
        **{
            name: tuple(stored[name]) if isinstance(stored[name], list) else stored[name]
            for name in now
            if name not in harmless
        },
    )
