"""
JSONL files of examples, checked line by line. The keys decide an example's format:

    {"text"}, {"code"}                              plain text
    {"messages": [{"role", "content"}, ...]}        a conversation
    {"instruction", "input"?, "output"}             an instruction and its answer
    {"prompt", "completion"}                        used without a chat template
    {"text", "label"}                               classification

Any of them may also have a "group": data.split keeps the examples of a group together.
"""

import json

from support.files import unique

FORMATS = {  # an example has the first format whose keys it has
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "code": ("code",),
    "classification": ("text", "label"),
    "text": ("text",),
}


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
        example = parse(line, where)
        for key in ("label", "group"):  # 0, 1 are common
            if isinstance(example, dict) and isinstance(example.get(key), int):
                example[key] = str(example[key])
        check_example(example, where)
        if kind not in (None, format_of(example)):
            raise ValueError(
                f"{where}: format {format_of(example)!r}, but the lines before are {kind!r}: "
                f"use one format per file"
            )

        kind = format_of(example)
        if kind != "classification":
            example.pop("label", None)  # only classification has labels; here it is a note
        examples.append(example)

    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def count_shared(examples, others):
    """How many of the examples are also among the others, by the keys that training uses."""

    def used(example):
        keys = (*FORMATS[format_of(example)], "input")
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

    strings = () if kind == "messages" else (*FORMATS[kind], "input")
    for key in (*strings, "group"):
        if key in example and not isinstance(example[key], str):
            name = type(example[key]).__name__
            raise ValueError(f"{where}: {key!r} is {name}, not a string")

    if kind == "messages":
        answers = assistant_turns(example["messages"], where)
    else:
        answers = [example[FORMATS[kind][-1]]]

    if not all(answer.strip() for answer in answers):
        raise ValueError(f"{where}: the answer is empty")


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
