"""
Checkpoints, from which a killed run resumes bit for bit; signals, delayed to the end of a step.

A checkpoint is a folder such as checkpoints/000120 in the run's folder. state.safetensors holds all
tensors (parameters, both optimizers' states), state.json the rest (phases, steps, random states,
snapshots). It is written under another name and then renamed, so it is complete or absent.
"""

import contextlib
import hashlib
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

from support.run.files import read_sealed, seal, write_json


def random_states():
    """
    The states of the random generators of torch, numpy and Python, in a form for JSON. Of the GPUs
    only the current one is asked, and only if it is in use.
    """
    numbers = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [numbers[0], numbers[1].tolist(), *numbers[2:]],
        "python": random.getstate(),
        "cuda": None if cuda is None else cuda.tolist(),
    }


def set_random_states(states):
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    numpy.random.set_state(tuple(states["numpy"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if states["cuda"]:
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


def levels(bilevel_optimizer):
    """The torch optimizers of both levels, {"lower": …, "upper": …}; no upper one if it is None."""
    found = {"lower": bilevel_optimizer.lower_optimizer, "upper": bilevel_optimizer.upper_optimizer}
    return {level: optimizer for level, optimizer in found.items() if optimizer}


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(bilevel_optimizer):
    """
    Both levels' states, {"<level>.<parameter's index>.<name>": tensor}; numbers become tensors.
    """
    return {
        f"{level}.{i}.{name}": torch.as_tensor(value).clone()
        for level, optimizer in levels(bilevel_optimizer).items()
        for i, parameter in enumerate(parameters_of(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(bilevel_optimizer, tensors):
    """Load the result of optimizer_state into fresh optimizers over the same parameters."""
    for level, optimizer in levels(bilevel_optimizer).items():
        parameters = parameters_of(optimizer)
        for key in [key for key in tensors if key.startswith(f"{level}.")]:
            _, i, name = key.split(".")
            value, parameter = tensors[key], parameters[int(i)]
            # The number of steps: torch keeps a tensor where the parameter is, bitsandbytes an int.
            whole = value.dim() == 0 and not value.is_floating_point()
            optimizer.state[parameter][name] = value.item() if whole else value.to(parameter.device)


def save(run, step, tensors, about):
    """
    Write the checkpoint of a step into the run's folder, then remove all but the last two.

    tensors: {name: tensor}; about: a dict for JSON. Raises OSError, naming the path, when it can't
    be written; the earlier checkpoints stay.
    """
    final = Path(run) / "checkpoints" / f"{step:06d}"
    temporary = final.with_suffix(".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        # Without parents=True: if the run's folder has vanished, a checkpoint in it is no use.
        temporary.parent.mkdir(exist_ok=True)
        temporary.mkdir()

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary / "state.safetensors")
        found = digest(temporary / "state.safetensors")
        write_json(temporary / "state.json", seal(about | {"tensors": found}))

        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"could not write the checkpoint {final} ({reason})") from None

    others = [path for path in names(run) if path != final]
    earlier = [path for path in others if int(path.name) < step]
    later = [path for path in others if int(path.name) > step]  # were damaged when `load` read them
    for old in [*earlier[:-1], *later]:
        shutil.rmtree(old, ignore_errors=True)


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names(run):
    """The folders of a run's checkpoints, oldest first."""
    folder = Path(run) / "checkpoints"
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def load(run):
    """
    The newest checkpoint of a run that is not damaged, as (tensors, about), or None. Prints a line
    for each damaged one.
    """
    for folder in reversed(names(run)):
        try:
            about = read_sealed(folder / "state.json")
            if digest(folder / "state.safetensors") != about.get("tensors"):
                raise ValueError("state.safetensors has changed since it was written")
            return load_file(folder / "state.safetensors"), about
        except (ValueError, OSError, SafetensorError) as error:
            last = folder == names(run)[0]
            what = "there is no other" if last else "taking the one before it"
            print(f"the checkpoint {folder} is damaged ({error}): {what}", flush=True)
    return None


START_AGAIN = "start it again with"


class Stopped(KeyboardInterrupt):
    """Raised when a run ends because of the signal `signum`. how: to go on, before the command."""

    def __init__(self, message, signum=signal.SIGINT, how="resume it with"):
        super().__init__(message)
        self.signum, self.how = signum, how


@contextlib.contextmanager
def stop_signals():
    """
    Yield a list to which each SIGINT or SIGTERM is appended, for the caller to check between steps;
    a SIGINT after another signal interrupts at once.

    Outside the main thread, where Python handles no signals, the list stays empty.
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
