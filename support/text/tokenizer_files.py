"""
Hugging Face's tokenizer files, and what tiktoken needs to know from them.

tokenizer.json describes a whole tokenizer: added tokens, normalizer, pre-tokenizer, model
(vocabulary and merges), post-processor and decoder. Older models have vocab.json and merges.txt
instead; their tokenizer class, named in tokenizer_config.json, implies the rest.

Source: https://huggingface.co/docs/tokenizers/components
"""

import regex

from support.run.files import read_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

# GPT-2 writes each byte as one printable character: printable ones as themselves, the others from
# 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR_TO_BYTE = {chr(b): b for b in PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut out first; GPT-2's split is applied to the text between them. So a digit ends a run
# of spaces as the end of the text does.
DIGITS_THEN_GPT2_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The flags of an added token where the file does not give them
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def read_settings(folder):
    """The settings in tokenizer_config.json, over those in special_tokens_map.json."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings |= read_json(folder / name)
    return settings


def token_text(token):
    """A special token's text: settings hold it as a string, or as an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def read_chat_template(folder, settings):
    """The chat template's text, from chat_template.jinja or else the settings; None without one."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")

    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates, each with a name
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def read_spec(folder, settings):
    """
    Return tokenizer.json's path and content.

    Without that file, the content is built from vocab.json and merges.txt, and the path is
    vocab.json's. Raises FileNotFoundError where both are missing.
    """
    path, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if not path.exists() and vocab.exists() and merges.exists():
        return vocab, spec_from_merges(folder, settings)

    if not path.exists() and (folder / "tokenizer.model").exists():
        raise FileNotFoundError(
            f"{path} is missing; tokenizer.model alone is not supported: load it with "
            f"transformers' AutoTokenizer and call save_pretrained(folder), which writes "
            f"tokenizer.json"
        )
    spec = read_json(path)

    # Some models name a few added tokens in tokenizer_config.json only.
    added = spec.get("added_tokens")
    known = {token.get("id") for token in added or []}
    for i, token in added_tokens_decoder(folder, settings).items():
        if i not in known and added is not None:
            added.append(FLAGS | token | {"id": i})
    return path, spec


def added_tokens_decoder(folder, settings):
    """The added tokens that tokenizer_config.json lists: {id: {"content", ...}}."""
    tokens = settings.get("added_tokens_decoder", {})
    try:
        return {int(i): token for i, token in tokens.items()}
    except ValueError as error:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: an id in added_tokens_decoder is not an integer "
            f"({error})"
        ) from None


def spec_from_merges(folder, settings):
    """The content of tokenizer.json that vocab.json, merges.txt and the tokenizer class imply."""
    kind = str(settings.get("tokenizer_class", "missing")).removesuffix("Fast")
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise ValueError(
            f"{folder}: tokenizer_class is {kind}; without tokenizer.json, only GPT2Tokenizer and "
            f"Qwen2Tokenizer are supported"
        )
    vocab = read_json(folder / "vocab.json")
    settings.setdefault("eos_token", "<|endoftext|>")  # the default of both classes

    decoder = byte_level(add_prefix_space=bool(settings.get("add_prefix_space")))
    normalizer, pre_tokenizer = None, decoder
    if kind == "Qwen2Tokenizer":
        pattern = {"Regex": QWEN2_SPLIT}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        steps = [split, decoder | {"use_regex": False}]
        normalizer, pre_tokenizer = {"type": "NFC"}, {"type": "Sequence", "pretokenizers": steps}

    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    added = added_tokens(folder, settings, vocab)
    return bpe_spec(vocab, merges, added, normalizer, pre_tokenizer, decoder)


def added_tokens(folder, settings, vocab):
    """The added tokens of a folder without tokenizer.json, in that file's form."""
    added = added_tokens_decoder(folder, settings)
    path = folder / "added_tokens.json"
    ids = read_json(path) if path.exists() else {}
    known = {token["content"] for token in added.values()} | ids.keys()

    tokens = [settings.get(f"{name}_token") for name in ("eos", "bos", "unk", "pad")]
    for text in map(token_text, tokens + settings.get("additional_special_tokens", [])):
        if text and text not in known:
            # A token that the vocabulary lacks gets the next free id.
            next_id = max([*vocab.values(), *added, *ids.values()]) + 1
            ids[text] = vocab.get(text, next_id)
            known.add(text)

    for text, i in ids.items():
        added.setdefault(i, {"content": text, "special": True})
    return [FLAGS | token | {"id": i} for i, token in sorted(added.items())]


def byte_level(use_regex=True, add_prefix_space=False):
    """The ByteLevel pre-tokenizer or decoder. use_regex: split as GPT-2 does."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def bpe_spec(vocab, merges, added, normalizer, pre_tokenizer, decoder):
    """A byte-level BPE tokenizer as tokenizer.json's content. vocab: {token: id}."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def flatten(step, inside):
    """The steps of a normalizer or the like as one list; a Sequence holds its steps in `inside`."""
    if step is None:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [inner for outer in step[inside] for inner in flatten(outer, inside)]


def uses_nfc(spec):
    """True for NFC, False for no normalizer. Raises NotImplementedError for any other."""
    normalizers = [step["type"] for step in flatten(spec.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise NotImplementedError(f"its normalizer is {' + '.join(normalizers)}")
    return bool(normalizers)


def split_pattern(spec):
    """
    One regular expression that splits text as tokenizer.json's pre-tokenizers do.

    Raises NotImplementedError, with the pre-tokenizers' names, where there is none.
    """
    steps = flatten(spec.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]

    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        gpt2_after = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"]:
            return GPT2_SPLIT if gpt2_after else r"[\s\S]+"

        if kinds == ["Digits", "ByteLevel"] and gpt2_after:
            if steps[0].get("individual_digits"):
                return DIGITS_THEN_GPT2_SPLIT
            return DIGITS_THEN_GPT2_SPLIT.replace(r"|\p{N}|", r"|\p{N}+|")

        if kinds == ["Split", "ByteLevel"] and not gpt2_after:
            source = steps[0]["pattern"]
            pattern = source.get("Regex") or regex.escape(source["String"])
            if not portable(pattern):
                raise NotImplementedError(
                    f"its pre-tokenizer's pattern {pattern[:100]!r} is one that libraries treat "
                    f"differently (anchors, an empty match) or refuse"
                )
            if steps[0]["behavior"] == "Isolated":
                # The text between two matches is a piece, too.
                return rf"{pattern}|(?:(?!{pattern})[\s\S])+"
            if steps[0]["behavior"] == "Removed" and steps[0].get("invert"):
                return pattern

    raise NotImplementedError(
        f"its pre-tokenizer is {' + '.join(kinds) or 'missing'}, in a form that no single regular "
        f"expression expresses"
    )


def portable(pattern):
    """Whether regular-expression libraries agree on a pattern, unless it is unusual otherwise."""
    try:
        empty = regex.match(pattern, "", timeout=1)
    except (regex.error, TimeoutError, RecursionError):
        return False
    return not empty and not regex.search(r"(?<![\\\[])[\^$]", pattern)


def check_byte_level(model):
    """Raise NotImplementedError, with the reason, unless tokenizer.json's model is a plain BPE."""
    kind, fallback = model.get("type", "BPE"), model.get("byte_fallback")
    if kind != "BPE" or fallback:
        raise NotImplementedError(
            f"its model is {kind}{' with byte fallback' * bool(fallback)}, not a byte-level BPE"
        )
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if any(model.get(option) for option in options):
        raise NotImplementedError("its BPE has a dropout, a prefix or a suffix")


def mergeable_vocab(model, added):
    """
    The vocabulary {token: id} of tokenizer.json's model, without `added`, {token: id}.

    tiktoken merges the pair whose token has the lowest id. Raises NotImplementedError where that is
    not the order of the file's merges, and ValueError for a damaged file.
    """
    merged = [
        pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)
        for pair in model["merges"]
    ]
    made = set(merged)
    vocab = {token: i for token, i in model["vocab"].items() if token not in added or token in made}
    if not vocab or made - vocab.keys():
        raise ValueError("vocab is empty, or lacks a token that a merge makes")

    # tiktoken would panic on other ids.
    for ids in (list(vocab.values()), list(added.values())):
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError("two tokens share an id, or an id is not an integer from 0 to 2³¹ - 1")

    order = [vocab[token] for token in merged]
    if order != sorted(order):
        raise NotImplementedError("its merges and its ids are in different orders")

    # tiktoken would take such a token for a whole piece, or merge it from any two tokens.
    for token in vocab.keys() - made:
        if len(token) > 1 and (
            not model.get("ignore_merges")
            or any(token[:i] in vocab and token[i:] in vocab for i in range(1, len(token)))
        ):
            raise NotImplementedError(f"no merge makes its token {token!r}")
    return vocab


def special_tokens_around(post_processor):
    """The ids that a tokenizer puts before and after a text: two lists."""
    for step in flatten(post_processor, "processors"):
        if step["type"] in ("RobertaProcessing", "BertProcessing"):
            return [step["cls"][1]], [step["sep"][1]]

        if step["type"] == "TemplateProcessing":
            ids = {name: token["ids"] for name, token in step["special_tokens"].items()}
            around, side = ([], []), 0
            for item in step["single"]:
                if "Sequence" in item:  # the text itself
                    side = 1
                else:
                    around[side].extend(ids[item["SpecialToken"]["id"]])
            return around
    return [], []
