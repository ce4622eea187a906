"""
Checkpoints, from which a killed run resumes bit for bit.

A checkpoint is a folder, such as checkpoints/000120: state.safetensors holds parameters and both
optimizers' states, state.json the rest. A rename ends the writing: it is complete or absent.
"""

import math
import os
import random
import shutil
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.run.files import digest, read_sealed, seal, write_json


def random_states():
    """The states of the random generators, for JSON; a GPU's only if it is current and in use."""
    name, numbers, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [name, numbers.tolist(), *rest],
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states):
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    numpy.random.set_state(tuple(states["numpy"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if states["cuda"]:
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


def optimizer_state(bilevel_optimizer):
    """{"<level>.<parameter's index>.<name>": tensor} of both levels; numbers become tensors."""
    return {
        f"{level}.{i}.{name}": torch.as_tensor(value)
        for level, optimizer in bilevel_optimizer.optimizers.items()
        for i, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(bilevel_optimizer, tensors):
    """Load what optimizer_state returned into a fresh optimizer over the same parameters."""
    states = bilevel_optimizer.state_dict()
    for key, value in tensors.items():
        level, _, rest = key.partition(".")
        if level in states:
            i, name = rest.split(".")
            # The number of steps is a float tensor in torch, an int in bitsandbytes.
            whole = value.dim() == 0 and not value.is_floating_point()
            state = states[level]["state"].setdefault(int(i), {})
            state[name] = value.item() if whole else value
    bilevel_optimizer.load_state_dict(states)


def save(run, step, tensors, state):
    """Write a step's checkpoint, then remove all but the last two. state: a dict for JSON."""
    final = Path(run) / "checkpoints" / f"{step:06d}"
    temporary = final.with_suffix(".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        # No parents=True: if the run's folder has vanished, a checkpoint in it is no use.
        temporary.parent.mkdir(exist_ok=True)
        temporary.mkdir()

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary / "state.safetensors")
        state = state | {"tensors": digest(temporary / "state.safetensors")}
        write_json(temporary / "state.json", seal(state))

        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"could not write the checkpoint {final} ({reason})") from None

    earlier = [path for path in names(run) if int(path.name) < step]
    # A run that found later checkpoints damaged has begun before them.
    for old in {*names(run)} - {*earlier[-1:], final}:
        shutil.rmtree(old, ignore_errors=True)


def names(run):
    """The folders of a run's checkpoints, oldest first."""
    folders = [path for path in (Path(run) / "checkpoints").glob("*") if path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name))


def load(run, most=math.inf):
    """The newest intact checkpoint up to a step: (tensors, state), or None. Names damaged ones."""
    folders = [path for path in names(run) if int(path.name) <= most]
    for folder in reversed(folders):
        try:
            state = read_sealed(folder / "state.json")
            if digest(folder / "state.safetensors") != state.get("tensors"):
                raise ValueError("state.safetensors has changed since it was written")
            return load_file(folder / "state.safetensors"), state
        except (ValueError, OSError, SafetensorError) as error:
            last = folder == folders[0]
            what = "there is no other" if last else "taking the one before it"
            print(f"the checkpoint {folder} is damaged ({error}): {what}", flush=True)
    return None
