"""Hugging Face's tokenizer files: tokenizer.json, or vocab.json and merges.txt, and what they say."""

import regex

from support.files import read_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits cut out first, then GPT-2's split of what lies between: a digit ends a run of spaces as the text's end does.
DIGITS_THEN_GPT2_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

FLAGS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}  # an added token's, if not given


def flat(step, inside):
    """A normalizer's or pre-tokenizer's steps as one list, Sequences in Sequences opened."""
    if step is None:
        return []
    return (
        [inner for part in step[inside] for inner in flat(part, inside)]
        if step.get("type") == "Sequence"
        else [step]
    )


def split_pattern(steps):
    """One regular expression that splits text as tokenizer.json's pre-tokenizers do. Raises NotImplementedError where there is none."""
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        gpt2_after = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"]:
            return GPT2_SPLIT if gpt2_after else r"[\s\S]+"
        if kinds == ["Digits", "ByteLevel"] and gpt2_after:
            return (
                DIGITS_THEN_GPT2_SPLIT
                if steps[0].get("individual_digits")
                else DIGITS_THEN_GPT2_SPLIT.replace(r"|\p{N}|", r"|\p{N}+|")
            )
        if kinds == ["Split", "ByteLevel"] and not gpt2_after:
            pattern = steps[0]["pattern"].get("Regex") or regex.escape(
                steps[0]["pattern"]["String"]
            )
            if regex.search(r"(?<![\\\[])[\^$]", pattern) or regex.match(pattern, ""):
                raise NotImplementedError(
                    f"its pre-tokenizer {pattern!r} has anchors or matches nothing, which differs between libraries"
                )
            if steps[0]["behavior"] == "Isolated":  # what lies between two matches is a piece too
                return rf"{pattern}|(?:(?!{pattern})[\s\S])+"
            if steps[0]["behavior"] == "Removed" and steps[0].get("invert"):
                return pattern
    raise NotImplementedError(
        f"its pre-tokenizer is {' + '.join(kinds) or 'missing'}, in a form that is no single regular expression"
    )


def post_processed(step):
    """The ids that a tokenizer's post-processor puts before and behind a text."""
    for part in flat(step, "processors"):
        if part["type"] in ("RobertaProcessing", "BertProcessing"):
            return [part["cls"][1]], [part["sep"][1]]
        if part["type"] == "TemplateProcessing":
            ids = {name: token["ids"] for name, token in part["special_tokens"].items()}
            around, side = ([], []), 0
            for item in part["single"]:
                if "Sequence" in item:  # the text itself: what follows goes behind it
                    side = 1
                else:
                    around[side].extend(ids[item["SpecialToken"]["id"]])
            return around
    return [], []


def read_spec(folder, settings):
    """tokenizer.json's path and content; or the same made of vocab.json and merges.txt, by the rules of their tokenizer class."""
    path, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if path.exists() or not (vocab.exists() and merges.exists()):
        if not path.exists() and (folder / "tokenizer.model").exists():
            raise FileNotFoundError(
                f"{path} is missing; tokenizer.model alone is not read: load it with transformers' AutoTokenizer and "
                f"save_pretrained(folder), which writes tokenizer.json"
            )
        return path, read_json(path)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": bool(settings.get("add_prefix_space")),
        "trim_offsets": True,
        "use_regex": True,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": QWEN2_SPLIT},
        "behavior": "Isolated",
        "invert": False,
    }
    known = {
        "GPT2Tokenizer": (None, byte_level),
        "Qwen2Tokenizer": (
            {"type": "NFC"},
            {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]},
        ),
    }
    kind = str(settings.get("tokenizer_class", "missing")).removesuffix("Fast")
    if kind not in known:
        raise ValueError(
            f"{folder}: tokenizer_class is {kind}; vocab.json and merges.txt without tokenizer.json are read for "
            f"{' and '.join(known)}"
        )
    ids = read_json(vocab)
    settings.setdefault("eos_token", "<|endoftext|>")  # as these classes have it
    added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    more = (
        read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    )
    contents = {token["content"] for token in added.values()} | more.keys()
    tokens = [
        settings.get(name) for name in ("eos_token", "bos_token", "unk_token", "pad_token")
    ] + settings.get("additional_special_tokens", [])
    for content in [token.get("content") if isinstance(token, dict) else token for token in tokens]:
        if content and content not in contents:  # one that the vocabulary lacks gets the next id
            more[content] = ids.get(content, max([*ids.values(), *added, *more.values()]) + 1)
            contents.add(content)
    for content, i in more.items():
        added.setdefault(i, {"content": content, "special": True})
    normalizer, pre_tokenizer = known[kind]
    lines = merges.read_text(encoding="utf-8").split("\n")
    return vocab, {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [FLAGS | token | {"id": i} for i, token in sorted(added.items())],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [line for line in lines if line and not line.startswith("#version")],
        },
    }
