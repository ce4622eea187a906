"""
JSONL files of examples, checked line by line. The formats, by the keys that they need:

    {"text"}, {"code"}                              plain text
    {"messages": [{"role", "content"}, ...]}        a conversation
    {"instruction", "input"?, "output"}             an instruction and its answer
    {"prompt", "completion"}                        taken as they stand, without a chat template
    {"text", "label"}                               classification
"""

import json

FORMATS = {  # the first that fits is it
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
    The examples of a file, as a list of dicts: UTF-8, one JSON object a line, all of one format.

    Raises ValueError, naming file and line, for what can't be trained on.
    """
    examples, kind = [], None
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        example = parse(line, where)
        if isinstance(example, dict) and isinstance(example.get("label"), int):  # 0, 1 are common
            example["label"] = str(example["label"])
        check_example(example, where)
        if kind not in (None, format_of(example)):
            raise ValueError(
                f"{where}: format {format_of(example)!r}, but the lines before are {kind!r}: "
                f"use one format a file"
            )
        kind = format_of(example)
        if kind != "classification":
            example.pop("label", None)  # some other note of the file's author
        examples.append(example)
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def parse(line, where):
    """One line's JSON. Raises ValueError, beginning with `where`."""
    try:
        example = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique)
        if b"\\ud" in line.lower():  # such escapes come in pairs; half a pair encodes no character
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
        raise ValueError(f"{where}: not JSON ({error}): write one JSON object a line") from None


def unique(pairs):
    """
    A JSON object as a dict. Raises ValueError for a repeated key: which one did the author mean?
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return found


def check_example(example, where):
    """Raise ValueError, beginning with `where`, for an unknown format or an empty answer."""
    kind = format_of(example) if isinstance(example, dict) else None
    if kind is None:
        needed = "; ".join(" + ".join(keys) for keys in FORMATS.values())
        have = "is not a JSON object"
        if isinstance(example, dict):
            have = f"has the keys {', '.join(example) or '(none)'}"
        raise ValueError(f"{where}: the line {have}; needed are: {needed}")
    if kind == "messages":
        answers = assistant_turns(example["messages"], where)
    else:
        for key in [*FORMATS[kind], *(["input"] if "input" in example else [])]:
            if not isinstance(example[key], str):
                name = type(example[key]).__name__
                raise ValueError(f"{where}: {key!r} is {name}, not a string")
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
