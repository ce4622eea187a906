"""
Hugging Face's tokenizer files, for the tokenizers library or as a tiktoken encoding.

tokenizer.json describes a whole tokenizer: added tokens, normalizer, pre-tokenizer, model
(vocabulary and merges), post-processor and decoder. Older models have vocab.json and merges.txt
instead; their class, named in tokenizer_config.json, implies the rest. Source:
https://huggingface.co/docs/tokenizers/components
"""

import contextlib
import json
import os
import sys

import tiktoken

from support.run.files import malformed, read_json

TOOL_USE = "additional_chat_templates/tool_use.jinja"
FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt chat_template.jinja generation_config.json spm.model spiece.model"
).split() + [TOOL_USE]

# GPT-2 writes each byte as one character: a printable byte as itself, the others from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
CHAR_TO_BYTE = dict(zip(map(chr, [*PRINTABLE, *range(256, 512)]), PRINTABLE + OTHERS))

# An added token's flags, if the file does not give them
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
# The classes that take the vocabulary and the merges of tokenizer.json, and little more
BYTE_LEVEL = ("GPT2Tokenizer", "Qwen2Tokenizer")

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut out first, and GPT-2's split applies between them: so a digit ends a run of spaces,
# like the end of the text.
SMOLLM2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def read_settings(folder):
    """tokenizer_config.json's; without a list of tokens, special_tokens_map.json has priority."""
    paths = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, tokens = (read_json(path) if path.exists() else {} for path in paths)
    return config if "added_tokens_decoder" in config else config | tokens


def token_text(token):
    """A special token's text, from a string or from an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def read_chat_templates(folder, settings):
    """
    (the chat template's text, that for conversations with tools), either None without one; from
    chat_template.jinja or else the settings.
    """
    path, template = folder / "chat_template.jinja", settings.get("chat_template")
    if path.exists():
        tools = folder / TOOL_USE
        return tuple(x.read_text(encoding="utf-8") if x.exists() else None for x in (path, tools))
    if isinstance(template, list):  # several templates, each with a name
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default"), named.get("tool_use")
    return template, None


def read_spec(folder, settings):
    """
    (path, content) of tokenizer.json, or what vocab.json implies, with all added tokens, as
    transformers 5.24 reads files that contradict each other. Raises FileNotFoundError, ValueError.
    """
    path, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    name = str(settings.get("tokenizer_class", "missing")).removesuffix("Fast")
    if not path.exists() and vocab.exists() and merges.exists():
        path, spec = vocab, spec_from_merges(vocab, merges, settings, name)
    elif not path.exists() and (folder / "tokenizer.model").exists():
        raise FileNotFoundError(
            f"{path} is missing; tokenizer.model alone is not supported: load it with "
            f"transformers' AutoTokenizer and call save_pretrained(folder), which writes "
            f"tokenizer.json"
        )
    else:
        spec = read_json(path)

    listed, named = tokens_beside(folder, settings)
    with malformed(f"{path} is damaged: it"):
        added = {token["content"]: FLAGS | token for token in spec.get("added_tokens", [])}
        if name in BYTE_LEVEL:
            step = spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])[-1]
            if step["type"] == "ByteLevel":
                step["add_prefix_space"] = bool(settings.get("add_prefix_space"))
            added = {} if listed else added
        vocab = spec["model"]["vocab"]
        vocab = vocab if isinstance(vocab, dict) else {t: i for i, (t, _) in enumerate(vocab)}
        for token in listed + [token for token in named if token["content"] not in added]:
            text, free = token["content"], max([len(vocab), *(t["id"] + 1 for t in added.values())])
            known = added.get(text, {"id": vocab.get(text, free)})
            added[text] = FLAGS | token | {"id": known["id"]}
        return path, spec | {"added_tokens": [*added.values()]}


def tokens_beside(folder, settings):
    """
    The added tokens of the files beside tokenizer.json, two lists: those that replace its own, and
    those that are added if they are missing.
    """
    names = sorted((n for n in settings if n.endswith("_token")), key=[*NAMED, *settings].index)
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    more = more.values() if isinstance(more, dict) else more
    named = [*map(settings.get, names), *more]
    named = [{"content": t} if isinstance(t, str) else t for t in named]
    named = [t | {"special": True} for t in named if isinstance(t, dict) and t.get("content")]

    special = {token["content"] for token in named}
    decoder, path = settings.get("added_tokens_decoder"), folder / "added_tokens.json"
    if decoder is None:
        ids = read_json(path) if path.exists() else {}
        texts = [text for text in sorted(ids, key=ids.get) if text not in special]
        return [], [{"content": text, "normalized": True} for text in texts] + named
    if wrong := [i for i in decoder if not i.isdecimal()]:
        path = folder / "tokenizer_config.json"
        raise ValueError(f"{path}: an id in added_tokens_decoder is not an integer ({wrong[0]!r})")
    listed = [decoder[i] for i in sorted(decoder, key=int)]
    texts = {token["content"] for token in listed}
    listed = [t | {"special": t["content"] in special or t.get("special", False)} for t in listed]
    return listed, [token for token in named if token["content"] not in texts]


def spec_from_merges(vocab, merges, settings, name):
    """The tokenizer.json that vocab.json, merges.txt and the class imply. May set eos_token."""
    from tokenizers import ByteLevelBPETokenizer, Regex, pre_tokenizers

    if name not in BYTE_LEVEL:
        raise ValueError(
            f"{vocab.parent}: tokenizer_class is {name}; without tokenizer.json, only "
            f"GPT2Tokenizer and Qwen2Tokenizer are supported"
        )
    qwen2, spaced = name == "Qwen2Tokenizer", bool(settings.get("add_prefix_space"))
    options = {"add_prefix_space": spaced, "unicode_normalizer": "nfc" if qwen2 else None}
    with library_errors(f"{vocab} or merges.txt is damaged"):
        library = ByteLevelBPETokenizer.from_file(str(vocab), str(merges), **options)
    if qwen2:
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(spaced, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])

    settings.setdefault("eos_token", "<|endoftext|>")  # the default of both classes
    return json.loads(library.to_str())


def open_library(path, spec):
    """The tokenizers library's tokenizer for tokenizer.json's content. Raises ValueError."""
    import tokenizers

    with library_errors(f"{path} is damaged or of an unknown kind"):
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    # The file's truncation and padding are meant for batches.
    library.no_truncation()
    library.no_padding()
    return library


def unknown_id(library):
    """The id of the token that stands for what a tokenizers.Tokenizer does not know, or None."""
    if type(library.model).__name__ == "Unigram":
        return json.loads(library.to_str())["model"]["unk_id"]
    return library.token_to_id(library.model.unk_token or "")


@contextlib.contextmanager
def library_errors(message):
    """
    Turn an error of the tokenizers library into a ValueError that begins with `message`. Rust may
    panic, and reports that on file descriptor 2, which leads nowhere in the meantime.
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
