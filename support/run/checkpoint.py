"""
Checkpoints, from which a killed run resumes bit for bit.

After step 120, checkpoints/000120.safetensors holds the parameters and both optimizers' states.
000120.json, which is written after it, holds its digest and all else.
"""

import math
import random
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.run.files import digest, read_sealed, remove, replacing, seal, write_json, written


def random_states():
    """The random generators' states, for JSON. A GPU's is there if it is current and in use."""
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
            states[level]["state"].setdefault(int(i), {})[name] = value.item() if whole else value
    bilevel_optimizer.load_state_dict(states)


def place(run, step):
    """The path of a step's tensors."""
    return Path(run) / "checkpoints" / f"{step:06d}.safetensors"


def steps(run):
    """The steps after which a run has checkpoints, in order."""
    names = (path.stem for path in place(run, 0).parent.glob("*.json"))
    return sorted(int(name) for name in names if name.isdigit())


def save(run, step, tensors, state):
    """Write a step's checkpoint, then remove all but the last two. state: a dict for JSON."""
    path = place(run, step)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written(path):
        # Without parents=True, since a checkpoint is no use if the run's folder has vanished.
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            save_file(contiguous, temporary)
    write_json(path.with_suffix(".json"), seal(state | {"tensors": digest(path)}))

    # Later checkpoints were damaged, so the run resumed before them: they go, too.
    earlier = [other for other in steps(run) if other < step]
    for old in {*steps(run)} - {*earlier[-1:], step}:
        remove(place(run, old).with_suffix(".json"))
        remove(place(run, old))


def load(run, most=math.inf):
    """The newest intact checkpoint up to step `most`, (tensors, state), or None. Names bad ones."""
    untried = [step for step in steps(run) if step <= most]
    while untried:
        path = place(run, untried.pop())
        try:
            state = read_sealed(path.with_suffix(".json"))
            if digest(path) != state.get("tensors"):
                raise ValueError(f"{path.name} has changed since it was written")
            return load_file(path), state
        except (ValueError, OSError, SafetensorError) as error:
            next_try = "taking the one before it" if untried else "there is no other"
            print(f"the checkpoint {path} is damaged ({error}): {next_try}", flush=True)
    return None
