"""
A run's folder: who may write there; what is resumed, replaced and removed.

A run locks its folder. --resume continues an earlier run; --overwrite keeps it as FOLDER.previous
until the new run has finished; nothing else touches it.
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from support.run.files import make_folder, malformed, read_sealed, remove

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, two runs in one folder go unnoticed
    fcntl = None

REPLACED = "replaced-by-a-newer-run"  # marks a run that is ours to remove
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# A run's files beside its weights, which run.json names; tools/analysis.py draws analysis.png
RUN_FILES = "run.json metrics.jsonl summary.json loss.png analysis.png trajectory.json".split()
RUN_FILES += ["trajectory.safetensors", REPLACED]


def check_writable(out):
    """Raise ValueError unless the folder can be created or written."""
    existing = next(path for path in (out, *out.parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "read-only" if existing.is_dir() else "not a folder"
        raise ValueError(f"out_dir={out} can't be written: {existing} is {what}; choose another")


@contextlib.contextmanager
def locked(folder):
    """Make and lock a folder. Raises ValueError if another run holds it; a kill frees the lock."""
    folder = Path(folder)
    handle = take_lock(folder)
    try:
        yield
    finally:
        # The folder goes before the lock, so that no other run takes it in between.
        if handle is None or is_at(handle, folder):
            with contextlib.suppress(OSError):
                folder.rmdir()  # works only on an empty folder
        if handle is not None:
            os.close(handle)


def take_lock(folder):
    """Make and lock a folder. Returns a handle, whose closing ends the lock, or None on Windows."""
    while True:
        with contextlib.suppress(FileExistsError):  # another run is just removing it
            make_folder(folder, "choose another --out_dir")
        if not fcntl:
            return None
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another run has just removed it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            remedy = "wait until it has ended, or choose another --out_dir"
            raise ValueError(f"{folder} is in use by another run: {remedy}") from None
        if is_at(handle, folder):
            return handle
        os.close(handle)  # of a folder that another run has removed or moved


def is_at(handle, folder):
    """Whether an open folder is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except FileNotFoundError:
        return False


def find_run(config, out):
    """(whether to resume the run in `out`, whether to replace it). Raises ValueError."""
    # A kill leaves .tmp files.
    if all(path.name.endswith(".tmp") for path in out.iterdir()):
        if config.resume:
            print(f"{out} holds no run to resume: starting one")
        return False, False

    if not (out / "run.json").exists():
        raise ValueError(f"{out} holds files but no run: choose another --out_dir")
    finished, untrained = (out / "summary.json").exists(), is_untrained(out)
    if config.resume:
        if finished:
            raise ValueError(f"{out} holds a finished run: there is nothing to resume")
        return True, False
    if not config.overwrite and not untrained:
        more = "choose another --out_dir" + ", resume it with --resume=True" * (not finished)
        raise ValueError(f"{out} holds an earlier run: {more}, or replace it by --overwrite=True")

    previous = previous_of(out)
    if previous.exists() and not (previous / REPLACED).exists() and not untrained:
        raise ValueError(f"{previous} is in the way of the earlier run: move it elsewhere")
    return False, True


def is_untrained(out):
    """Whether a folder holds a run that ended before its first step."""
    log = out / "metrics.jsonl"
    begun = any((out / name).exists() for name in ("checkpoints", "summary.json"))
    return log.is_file() and log.stat().st_size == 0 and not begun


def previous_of(out):
    """Where a folder's earlier run is kept until a new one has finished."""
    return out.with_name(out.name + ".previous")


def set_aside(out):
    """Keep the run in `out` at previous_of(out). An unfinished one gives way to one kept there."""
    previous = previous_of(out)
    if (out / "summary.json").exists():
        remove_previous(out)
    if is_untrained(out) or (previous / REPLACED).exists():
        remove_run(out)
    else:
        (out / REPLACED).touch()
        os.replace(out, previous)


def put_back(out):
    """Undo set_aside when the new run could not start."""
    previous = previous_of(out)
    if previous.exists() and not out.exists():
        os.replace(previous, out)
        (out / REPLACED).unlink(missing_ok=True)


def remove_previous(out):
    """Remove the earlier run that set_aside kept, once a newer one has finished."""
    if (previous_of(out) / REPLACED).exists():
        remove_run(previous_of(out))


def remove_run(folder):
    """Remove a run's files, and its folder if the user keeps no files of their own there."""
    names = {*ADAPTER_FILES}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        names = {*read_sealed(folder / "run.json")["files"]}
    names |= {*RUN_FILES}
    for path in list(folder.glob("*")):  # so no name in run.json can lead out of the folder
        if path.name.removesuffix(".tmp") in names:
            remove(path)
    for path in (folder / "checkpoints").glob("*"):
        if path.name.partition(".")[0].isdigit():
            remove(path)
    for place in (folder / "checkpoints", folder):
        with contextlib.suppress(OSError):
            place.rmdir()


def check_known(stored, known, folder):
    """Raise ValueError if a folder's run.json sets something that is not among `known`."""
    with malformed(folder / "run.json"):
        asked = stored.get("asked", {}).items()
        if more := ", ".join(f"{n}={x}" for n, x in asked if x and n not in known):
            raise ValueError(f"{folder} is the run of another program, with {more}: use that one")


def resumed_config(config, out, stored, may_change):
    """`config` with run.json's settings, except may_change. Raises ValueError if others differ."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples as lists
    asked = stored.get("asked")
    if not isinstance(asked, dict) or {*now, "inputs"} - stored.keys():
        raise ValueError(f"{out / 'run.json'} was written by another version: it can't be resumed")

    check_known(stored, now, out)
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
    kept |= {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
    return dataclasses.replace(config, **kept)
