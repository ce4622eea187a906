"""
The rules for a run's folder: who may write there, what is resumed, replaced and removed.

A folder is locked by the run that writes there. An earlier run is resumed, or kept beside as
….previous until a new one has finished, or left alone: only --resume and --overwrite touch it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

from support.files import read_json
from support.tokenizer import FILES as TOKENIZER_FILES

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, two runs in one folder go unnoticed
    fcntl = None

REPLACED = "replaced-by-a-newer-run"  # marks a run that is ours to remove
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


def check_writable(out):
    """Raise ValueError unless the folder can be made or written."""
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "read-only" if existing.is_dir() else "a file"
        raise ValueError(
            f"out_dir={out} can't be written, since {existing} is {what}: choose another"
        )


@contextlib.contextmanager
def locked(folder):
    """
    Hold a folder, made if need be, for this run alone; the system releases it when the process
    ends, however that is. Raises ValueError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{folder} is in use by another run: wait for its end, or choose another "
                    f"--out_dir"
                ) from None
        yield
    finally:
        if fcntl:
            os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was written


def find_run(config, out):
    """
    What the folder `out` is for a new run: (whether it holds a run to resume, where an earlier run
    is to be kept, or None).

    Raises ValueError where it is not what config.resume and config.overwrite say.
    """
    # Other .tmp files are writes that a kill cut off.
    begun = out.exists() and any(not path.name.endswith(".tmp") for path in out.iterdir())
    if not begun:
        if config.resume:
            print(f"{out} holds no run to resume: starting one")
        return False, None
    if not (out / "run.json").exists():
        raise ValueError(f"{out} holds files of no run: choose another --out_dir")
    finished = (out / "summary.json").exists()
    if config.resume:
        if finished:
            raise ValueError(f"{out} holds a finished run: there is nothing to resume")
        return True, None
    if not config.overwrite:
        more = "" if finished else ", resume it with --resume=True"
        raise ValueError(
            f"{out} holds an earlier run: choose another --out_dir{more}, or replace it with "
            f"--overwrite=True"
        )
    previous = previous_of(out)
    if previous.exists() and not (previous / REPLACED).exists():
        raise ValueError(
            f"{previous} is in the way, where the earlier run would be kept: move it elsewhere"
        )
    return False, previous


def previous_of(out):
    """Where an earlier run of a folder is kept until a new one has finished."""
    return out.with_name(out.name + ".previous")


def set_aside(out):
    """
    Make room in `out` for a new run: the earlier one is kept beside, marked as ours to remove.

    If one is there already, either `out` holds a run that never finished, which goes, or it has
    finished, and the one before it goes.
    """
    previous = previous_of(out)
    if previous.exists() and (out / "summary.json").exists():
        remove_run(previous)
    if previous.exists() and (previous / REPLACED).exists():
        remove_run(out)
    else:
        (out / REPLACED).touch()
        os.replace(out, previous)


def put_back(out):
    """Undo set_aside, where the new run could not even start."""
    previous = previous_of(out)
    if previous.exists() and not out.exists():
        os.replace(previous, out)
        (out / REPLACED).unlink(missing_ok=True)


def remove_previous(out):
    """Remove the earlier run beside `out`, once a newer one has finished."""
    if (previous_of(out) / REPLACED).exists():
        remove_run(previous_of(out))


def remove_run(folder):
    """Remove what a run wrote; a folder that holds anything of the user's own stays, with that."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in [*(folder / name for name in RUN_FILES), *folder.glob("*.tmp")]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def resumed_config(config, out, may_change):
    """
    config as the run in `out` had it, with all that was automatic resolved. may_change: the
    settings that may differ. Raises ValueError where others do.
    """
    stored = read_json(out / "run.json")
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    asked = stored.get("asked")
    if not isinstance(asked, dict) or now.keys() - stored.keys():
        raise ValueError(
            f"{out / 'run.json'} was written by another version, or edited: it can't be resumed"
        )
    changed = {
        name: f"{name}={value} (it was {asked.get(name)})"
        for name, value in now.items()
        if value != asked.get(name) and name != "resume"
    }
    if refused := [text for name, text in changed.items() if name not in may_change]:
        raise ValueError(f"{out} can't be resumed with other settings: {', '.join(refused)}")
    if changed:
        print(f"changed since the run began: {', '.join(changed.values())}")
    kept = {name: stored[name] for name in now if name not in may_change}
    return dataclasses.replace(
        config, **{name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
    )
