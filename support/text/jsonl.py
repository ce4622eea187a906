"""
JSONL files of examples, checked line by line. The keys decide an example's format:

    {"text"}, {"code"}                              plain text
    {"messages": [{"role", "content"}, ...]}        a conversation
    {"instruction", "input"?, "output"}             an instruction and its answer
    {"prompt", "completion"}                        used without a chat template
    {"prompt", "references": [text, ...]}           data to text, with one or more right answers
    {"text", "text_b"?, "label"}                    classification, of one text or of a pair
    {"text", "text_b"?, "labels": [label, ...]}     any number of labels
    {"text", "text_b"?, "score"}                    regression
    {"words": [word, ...], "tags": [tag, ...]}      a BIO tag for each word

Any of them may also have a "group": data.split keeps the examples of a group together.
"""

import json
import math
import re

from support.run.files import unique

FORMATS = {  # an example has the first format whose keys it has
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "generation": ("prompt", "references"),
    "prompt": ("prompt", "completion"),
    "code": ("code",),
    "tagging": ("words", "tags"),
    "classification": ("text", "label"),
    "multi_label": ("text", "labels"),
    "regression": ("text", "score"),
    "text": ("text",),
}
LISTS = ("references", "labels", "words", "tags")


class Example(dict):
    """One example. where: the file and line that it comes from, for messages."""

    def __init__(self, fields, where="an example"):
        super().__init__(fields)
        self.where = where


def format_of(example):
    """The name of an example's format, a key of FORMATS, or None."""
    for name, keys in FORMATS.items():
        if all(key in example for key in keys):
            return name
    return None


def read_jsonl(path):
    """
    The examples of a file, a list of dicts. The file is UTF-8 with one JSON object per line, all of
    one format.

    Raises ValueError, naming file and line, for an example that can't be trained on.
    """
    examples, kind = [], None
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue

        where = f"{path}:{number}"
        example = with_text_labels(parse(line, where))
        check_example(example, where)
        if kind not in (None, format_of(example)):
            now, before = (" + ".join(FORMATS[name]) for name in (format_of(example), kind))
            raise ValueError(
                f"{where}: the line has {now}, but the lines before have {before}: use one format "
                f"per file"
            )

        kind = format_of(example)
        if kind != "classification":
            example.pop("label", None)  # only classification has labels; here it is a note
        examples.append(Example(example, where))

    if not examples:
        raise ValueError(f"{path} holds no examples")
    check_pairs(examples)
    return examples


def with_text_labels(example):
    """The example, its labels as strings: 0, 1 are common."""

    def text(value):
        return str(value) if isinstance(value, int) else value

    if not isinstance(example, dict):
        return example
    for key in {"label", "group"} & example.keys():
        example[key] = text(example[key])
    if isinstance(example.get("labels"), list):
        example["labels"] = [text(label) for label in example["labels"]]
    return example


def check_pairs(examples):
    """Raise ValueError, naming file and line, unless all of the examples are pairs, or none."""
    for example in examples:
        if ("text_b" in example) != ("text_b" in examples[0]):
            missing, pair = sorted((example, examples[0]), key=lambda e: "text_b" in e)
            raise ValueError(
                f"{missing.where}: text_b is missing, but {pair.where} is a pair: give every line "
                f"two texts, or one"
            )


def count_shared(examples, others):
    """How many of the examples are also among the others, by the keys that training uses."""

    def used(example):
        keys = (*FORMATS[format_of(example)], "input", "text_b")
        return json.dumps([example.get(key) for key in keys], sort_keys=True)

    known = set(map(used, others))
    return sum(used(example) in known for example in examples)


def parse(line, where):
    """One line's JSON. Raises ValueError, beginning with `where`."""
    try:
        example = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique)
        # Such escapes come in pairs; half a pair encodes no character.
        if b"\\ud" in line.lower():
            json.dumps(example, ensure_ascii=False).encode()
        return example
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: half a surrogate pair (\\ud800 … \\udfff alone) is not a character: "
            f"remove it"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}): write one JSON object per line") from None


def check_example(example, where):
    """Raise ValueError, beginning with `where`, for an unknown format or an empty answer."""
    kind = format_of(example) if isinstance(example, dict) else None
    if kind is None:
        needed = "; ".join(" + ".join(keys) for keys in FORMATS.values())
        have = "is not a JSON object"
        if isinstance(example, dict):
            have = f"has the keys {', '.join(example) or '(none)'}"
        raise ValueError(f"{where}: the line {have}; use one of these sets of keys: {needed}")

    other = ("messages", "score", *LISTS)
    strings = [key for key in FORMATS[kind] if key not in other]
    for key in (*strings, "input", "text_b", "group"):
        if key in example and not isinstance(example[key], str):
            name = type(example[key]).__name__
            raise ValueError(f"{where}: {key!r} is {name}, not a string")
    for key in set(LISTS).intersection(FORMATS[kind]):
        check_list(example[key], key, where)

    if kind == "tagging":
        check_tags(example["words"], example["tags"], where)
    elif kind == "regression":
        check_score(example["score"], where)
    elif kind != "multi_label":
        answers = example[FORMATS[kind][-1]]
        if kind == "messages":
            answers = assistant_turns(answers, where)
        answers = [answers] if isinstance(answers, str) else answers
        if not answers or not all(answer.strip() for answer in answers):
            raise ValueError(f"{where}: the answer is empty")


def check_list(values, key, where):
    """Raise ValueError, beginning with `where`, unless values is a list of texts with content."""
    if not isinstance(values, list):
        raise ValueError(f"{where}: {key!r} is {type(values).__name__}, not a list of strings")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {key!r} holds {value!r:.40}, which is not a text")
    if key == "labels" and len(set(values)) < len(values):
        raise ValueError(f"{where}: a label occurs twice in {values}")


def check_tags(words, tags, where):
    """Raise ValueError, beginning with `where`, unless each word has a BIO tag."""
    if not words or len(words) != len(tags):
        raise ValueError(
            f"{where}: {len(words)} words and {len(tags)} tags: give each word one, and at least "
            f"one word"
        )
    for tag in tags:
        check_tag(tag, where)


def check_tag(tag, where):
    """Raise ValueError, beginning with `where`, for a text that is no BIO tag."""
    if not re.fullmatch("O|[BI]-.+", tag):
        raise ValueError(f"{where}: the tag {tag!r} is not O, B-… or I-…: convert the tags to BIO")


def check_score(score, where):
    """Raise ValueError, beginning with `where`, for a score that is not a finite number."""
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if not number or not math.isfinite(score):
        raise ValueError(f"{where}: 'score' is {score!r:.40}, not a number")


def assistant_turns(turns, where):
    """The assistant's messages, as strings. Raises ValueError, beginning with `where`."""
    well_formed = isinstance(turns, list) and all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str)
        for t in turns
    )
    if not well_formed:
        raise ValueError(
            f"{where}: messages must be a list of objects with the strings role and content"
        )

    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise ValueError(
            f"{where}: no message has the role 'assistant', so there is nothing to learn"
        )
    return answers
