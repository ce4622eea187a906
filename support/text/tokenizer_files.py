"""
Hugging Face's tokenizer files, for the tokenizers library or as a tiktoken encoding.

tokenizer.json describes all of a tokenizer (https://huggingface.co/docs/tokenizers/components);
transformers reads the files beside it.
"""

import contextlib
import json
import os
import sys

import tiktoken
import tokenizers

from support.run.files import read_json

TOOL_USE = "additional_chat_templates/tool_use.jinja"
FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt chat_template.jinja generation_config.json spm.model spiece.model"
).split() + [TOOL_USE]

# GPT-2 writes each byte as one character: a printable byte as itself, the others from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
CHAR_TO_BYTE = dict(zip(map(chr, [*PRINTABLE, *range(256, 512)]), PRINTABLE + OTHERS))

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut out first, and GPT-2's split applies between them: so a digit ends a run of spaces,
# like the end of the text.
SMOLLM2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


MOST_IDS = 2**24  # the library writes a tokenizer as text with memory for all ids up to the largest


def read_files(folder):
    """
    (tokenizers.Tokenizer, {name: a special token}, {name: a chat template}) of a folder, whose
    files may contradict each other, as transformers reads them. A built-in model's files are read
    without transformers, whose import takes seconds. Raises FileNotFoundError or ValueError.
    """
    path, more = folder / "tokenizer.json", any((folder / name).exists() for name in FILES[2:])
    built_in = (folder / "digests.json").exists() and not more
    if not path.exists() and not (folder / "vocab.json").exists():
        alone = "tokenizer.model alone is not supported: " * (folder / "tokenizer.model").exists()
        raise FileNotFoundError(
            f"{path} is missing; {alone}load the tokenizer with transformers' AutoTokenizer and "
            f"call save_pretrained(folder), which writes it"
        )
    with library_errors(f"{folder / 'tokenizer_config.json'} or tokenizer.json is damaged"):
        if built_in:
            settings = read_json(folder / "tokenizer_config.json")
            library = tokenizers.Tokenizer.from_file(str(path))
            templates = settings.get("chat_template")
            named = {name: text for name, text in settings.items() if name.endswith("_token")}
        else:
            from support.tasks.any_model import library as transformers

            peer = transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            library, templates = peer.backend_tokenizer, peer.chat_template
            named = dict(peer.special_tokens_map)
    if (largest := max(library.get_vocab().values(), default=0)) >= MOST_IDS:
        raise ValueError(f"{path} is damaged: a token's id, {largest}, is above {MOST_IDS}")
    # A file may ask for truncation and padding, which are meant for batches.
    library.no_truncation()
    library.no_padding()
    return library, named, templates if isinstance(templates, dict) else {"default": templates}


def unknown_id(library):
    """The id of the token that stands for what a tokenizers.Tokenizer does not know, or None."""
    if type(library.model).__name__ == "Unigram":
        return json.loads(library.to_str())["model"]["unk_id"]
    return library.token_to_id(library.model.unk_token or "")


@contextlib.contextmanager
def library_errors(message):
    """
    Turn an error of the tokenizers library into a ValueError that begins with `message`. When Rust
    panics, it writes to file descriptor 2, which leads nowhere in the meantime.
    """
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{message}: {error}") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def tiktoken_encoding(spec):
    """
    tokenizer.json's content as a tiktoken encoding, or None if that would give other tokens.
    tiktoken needs an id for each byte: a byte without a token gets one past the vocabulary.
    """
    model, added, normalizer = spec["model"], spec["added_tokens"], spec.get("normalizer")
    more = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    plain = (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(option) for option in more)
        and normalizer in (None, {"type": "NFC"})
        # Tokenizer.encode searches for added tokens in the raw text, anywhere.
        and not any(token[flag] for token in added for flag in ("single_word", "lstrip", "rstrip"))
        and {token["normalized"] for token in added} in ({False}, {normalizer is None})
        and all(token["content"] for token in added)
        and spec.get("pre_tokenizer")
    )
    pattern = plain and split_pattern(spec["pre_tokenizer"])
    vocab = pattern and mergeable_vocab(model, added)
    if not vocab:
        return None

    special = {token["content"]: token["id"] for token in added}
    free = 1 + max([*vocab.values(), *special.values()])
    ranks = {bytes(CHAR_TO_BYTE[c] for c in token): i for token, i in vocab.items()}
    ranks = {bytes([b]): free + b for b in range(256)} | ranks
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def split_pattern(pre_tokenizer):
    """The regular expression that equals a known model's pre-tokenizers; None for others."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    types, first, last = [step["type"] for step in steps], steps[0], steps[-1]
    gpt2 = last.get("use_regex", True)
    if last.get("add_prefix_space"):
        return None
    if types == ["ByteLevel"] and gpt2:
        return GPT2_SPLIT
    if types == ["Digits", "ByteLevel"] and gpt2 and first["individual_digits"]:
        return SMOLLM2_SPLIT
    if types == ["Split", "ByteLevel"] and not gpt2 and first["behavior"] == "Isolated":
        pattern = first["pattern"].get("Regex")
        return pattern if pattern in (QWEN2_SPLIT, LLAMA3_SPLIT) else None
    return None


def mergeable_vocab(model, added):
    """
    A BPE's {token: id} without its added tokens, or None if tiktoken would merge differently: it
    merges the pair whose token has the lowest id, and takes a whole piece that is a token as it is.
    """
    merges, contents = model["merges"], {token["content"] for token in added}
    merged = ["".join(m.split(" ", 1) if isinstance(m, str) else m) for m in merges]
    made = set(merged)
    vocab = {t: i for t, i in model["vocab"].items() if t in made or t not in contents}
    ids = [vocab[token] for token in merged]

    unmade = [token for token in vocab.keys() - made if len(token) > 1]
    if model.get("ignore_merges"):
        pairs = ((token[:i], token[i:]) for token in unmade for i in range(1, len(token)))
        unmade = [pair for pair in pairs if vocab.keys() >= set(pair)]
    unique = len(set(vocab.values())) == len(vocab)  # else tiktoken would panic
    return vocab if unique and ids == sorted(ids) and not unmade else None
