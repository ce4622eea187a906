"""
The results of research/: a line for each run in runs.jsonl, and all trajectories in one file.

A line of runs.jsonl is a JSON object: the run's name; its set, "main", "tune" (the runs that chose
the learning rates) or a set of its own; domain, size, method, seed and rates; the command; and what
the run measured. trajectories.safetensors holds, in float32, <name>.magnitude (layers),
<name>.delta_m and <name>.delta_d (snapshots × layers). Axis and snapshots are in the run's line;
the layers' names, which many runs share, are in the file's metadata, under a key that it gives.

Several processes may write to one folder: each locks runs.jsonl, replaces the safetensors file and
appends one whole line. Windows has no such lock: run one program at a time there.
"""

import contextlib
import json
from pathlib import Path

import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from support.run.files import make_folder, malformed, replacing, written
from support.weights.weight_changes import Trajectory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NUMBERS = ("magnitude", "delta_m", "delta_d")


@contextlib.contextmanager
def opened(folder, mode):
    """Yield runs.jsonl, open in a binary mode and locked: readers share it, a writer is alone."""
    with open(Path(folder) / "runs.jsonl", mode) as file:
        if fcntl:  # released when the file is closed
            fcntl.flock(file, fcntl.LOCK_SH if mode == "rb" else fcntl.LOCK_EX)
        yield file


def whole_lines(file):
    """
    (the lines of an open runs.jsonl as dicts, the bytes that hold them). A torn last line, of a
    process that was killed or on a full disk, is left out with a note. Raises ValueError for any
    other line that is not a JSON object with a name.
    """
    file.seek(0)
    content, runs, end = file.read(), [], 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        where = f"{file.name}, line {number}"
        try:
            runs.append(json.loads(line))
        except ValueError as error:
            if line.endswith(b"\n"):
                raise ValueError(f"{where}: not valid JSON ({error})") from None
            tqdm.write(f"{file.name}: the last line is torn and dropped; its run is made again")
            break
        if not isinstance(runs[-1], dict) or "name" not in runs[-1]:
            raise ValueError(f"{where}: not a JSON object with a name")
        end += len(line)
    return runs, content[:end]


def read_trajectories(folder):
    """({key: array}, metadata) of trajectories.safetensors, both empty if there is no such file."""
    path = Path(folder) / "trajectories.safetensors"
    if not path.exists():
        return {}, {}
    try:
        with safe_open(path, "numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def mend(folder):
    """Make the folder if it is missing, and remove a torn last line."""
    make_folder(folder, "choose another --results")
    if (Path(folder) / "runs.jsonl").exists():
        with opened(folder, "r+b") as file:
            file.truncate(len(whole_lines(file)[1]))


def save(folder, result, trajectory=None):
    """Add a run, and its Trajectory if any, unless its name is there. result: a line's dict."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with written(folder / "runs.jsonl"), opened(folder, "a+b") as file:
        runs, content = whole_lines(file)
        if any(run["name"] == result["name"] for run in runs):
            return

        if trajectory:  # first, so that a line always finds its numbers
            arrays, metadata = read_trajectories(folder)
            layers = json.dumps(trajectory.layers)
            known = {text: key for key, text in metadata.items()}
            key = known.get(layers, f"layers {len(metadata)}")
            for what in NUMBERS:
                values = numpy.array(getattr(trajectory, what), dtype=numpy.float32)
                arrays[f"{result['name']}.{what}"] = values
            with replacing(folder / "trajectories.safetensors") as temporary:
                save_file(arrays, temporary, metadata | {key: layers})
            kept = {"axis": trajectory.axis, "snapshots": trajectory.snapshots, "layers": key}
            result = result | {"trajectory": kept}

        file.truncate(len(content))
        newline = b"\n" if content and not content.endswith(b"\n") else b""
        file.write(newline + json.dumps(result).encode() + b"\n")


def read_results(folder):
    """{name: result} of a folder's runs. result['trajectory'] holds a Trajectory's fields."""
    try:
        with opened(folder, "rb") as file:
            runs, _ = whole_lines(file)
            arrays, metadata = read_trajectories(folder)
    except (FileNotFoundError, NotADirectoryError):
        return {}

    with malformed(f"{folder}: runs.jsonl or trajectories.safetensors"):
        for run in runs:
            if kept := run.get("trajectory"):
                kept["layers"] = json.loads(metadata[kept["layers"]])
                kept |= {what: arrays[f"{run['name']}.{what}"].tolist() for what in NUMBERS}
        return {run["name"]: run for run in runs}


def load_results(folder, which="main"):
    """The results of one set in a folder, in the order of domains, sizes and seeds."""
    with malformed(f"a line of {folder}/runs.jsonl"):
        chosen = [r for r in read_results(folder).values() if r["set"] == which]
        return sorted(chosen, key=lambda r: (r["domain"], r.get("size", 0), r.get("seed", 0)))


def trajectory_of(result):
    """The Trajectory that a result holds."""
    return Trajectory(**result["trajectory"])
