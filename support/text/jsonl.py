"""
JSONL files of examples, checked line by line. The keys decide an example's format:

    {"text"}, {"code"}                              plain text
    {"messages": [{"role", "content"}, ...]}        a conversation
    {"instruction", "input"?, "output"}             an instruction and its answer
    {"prompt", "completion"}                        used without a chat template
    {"prompt", "references": [text, ...]}           data to text, with one or more right answers
    {"prompt", "choices": [text, ...], "answer"}    multiple choice; the right one counts from 0
    {"text", "text_b"?, "label"}                    classification, of one text or of a pair
    {"text", "text_b"?, "labels": [label, ...]}     any number of labels
    {"text", "text_b"?, "score"}                    regression
    {"words": [word, ...], "tags": [tag, ...]}      a BIO tag for each word

Any of them may also have a "group": data.split keeps the examples of a group together.
"""

import json
import re
import sys

from support.run.files import unique

FORMATS = {  # an example has the first format whose keys it holds; the last key is the answer's
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "generation": ("prompt", "references"),
    "prompt": ("prompt", "completion"),
    "multiple_choice": ("prompt", "choices", "answer"),
    "code": ("code",),
    "tagging": ("words", "tags"),
    "classification": ("text", "label"),
    "multi_label": ("text", "labels"),
    "regression": ("text", "score"),
    "text": ("text",),
}
LISTS = ("references", "choices", "labels", "words", "tags")


class Example(dict):
    """One example. where: its file and line, for messages."""

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
    The examples of a UTF-8 file with one JSON object per line, all of one format: a list of dicts.
    Raises ValueError, which names file and line, for an example that can't be trained on.
    """
    examples, first = [], None
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            example = parse(line)
            name = check_example(example, {})
            first = first or name
            if name != first:
                now, before = (" + ".join(FORMATS[name]) for name in (name, first))
                raise ValueError(
                    f"the line has {now}, but the lines before have {before}: use one format per "
                    f"file"
                )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

        if name != "classification":
            example.pop("label", None)  # a note of the user's: only classification has labels
        examples.append(Example(example, where))

    if not examples:
        raise ValueError(f"{path} holds no examples")
    check_pairs(examples)
    return examples


def check_pairs(examples):
    """Raise ValueError unless all of the examples are pairs, or none."""
    pairs = [example for example in examples if "text_b" in example]
    if 0 < len(pairs) < len(examples):
        single = next(example for example in examples if "text_b" not in example)
        problem = f"text_b is missing, but {pairs[0].where} is a pair"
        raise ValueError(f"{single.where}: {problem}: give every line two texts, or one")


def count_shared(examples, others):
    """How many examples are also among the others, compared by the keys that training uses."""

    def used(example):
        keys = (*FORMATS[format_of(example)], "input", "text_b")
        return json.dumps([example.get(key) for key in keys], sort_keys=True)

    known = set(map(used, others))
    return sum(used(example) in known for example in examples)


# ------------------------------------------------ one line; its errors don't name the line


def parse(line):
    """One line as a dict, with integer labels and groups as strings. Raises ValueError."""
    try:
        example = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique)
        # An escape like \ud83d is half a pair; alone, it encodes no character.
        if b"\\ud" in line.lower():
            json.dumps(example, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        problem = "half a surrogate pair (\\ud800 … \\udfff alone) is not a character: remove it"
        raise ValueError(problem) from None
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ValueError(f"not UTF-8 ({reason}): save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): write one JSON object per line") from None

    if not isinstance(example, dict):
        form = '{"text": …, "label": …}, or the keys of another format'
        raise ValueError(f"the line is not a JSON object: write {form}")

    def text(value):
        return str(value) if isinstance(value, int) else value

    for key in {"label", "group"} & example.keys():
        example[key] = text(example[key])
    if isinstance(example.get("labels"), list):
        example["labels"] = [text(label) for label in example["labels"]]
    return example


def check_example(example, columns):
    """
    The name of an example's format. columns: {key: its name in messages}. Raises ValueError for an
    unknown format, a value of the wrong type, and an empty answer.
    """
    name = format_of(example)
    if name is None:
        have = ", ".join(example) or "(none)"
        needed = "; ".join(" + ".join(keys) for keys in FORMATS.values())
        raise ValueError(f"the line has the keys {have}; use one of these sets of keys: {needed}")

    for key in (*FORMATS[name], "input", "text_b", "group"):
        if key in ("messages", "score", "answer"):
            continue
        value, column = example.get(key, ""), columns.get(key, key)
        if key in LISTS and not isinstance(value, list):
            raise ValueError(f"{column!r} is {type(value).__name__}, not a list of strings")
        for text in value if key in LISTS else [value]:
            if not isinstance(text, str):
                raise ValueError(f"{column!r} is {type(text).__name__}, not a string")

    key = FORMATS[name][-1]
    answers = example[key]
    if name == "tagging":
        check_tags(example["words"], answers)
    elif name == "regression":
        check_score(answers)
    elif name == "multiple_choice":
        check_choices(example["choices"], answers)
    else:
        answers = assistant_turns(answers) if name == "messages" else answers
        answers = [answers] if isinstance(answers, str) else answers
        if not all(map(str.strip, answers)) or not (answers or name == "multi_label"):
            raise ValueError(f"the answer is empty: fill in {columns.get(key, key)!r}")
        if name == "multi_label" and len(set(answers)) < len(answers):
            raise ValueError(f"a label occurs twice in {answers}")
    return name


def check_tags(words, tags):
    """Raise ValueError unless each word has a BIO tag."""
    if not words or len(words) != len(tags):
        counts = f"{len(words)} words and {len(tags)} tags"
        raise ValueError(f"{counts}: give each word one, and at least one word")
    for tag in tags:
        if not re.fullmatch("O|[BI]-.+", tag):
            raise ValueError(f"the tag {tag!r} is not O, B-… or I-…: convert the tags to BIO")


def check_choices(choices, answer):
    """Raise ValueError unless there are two choices or more, and answer is the place of one."""
    if len(choices) < 2 or not all(map(str.strip, choices)):
        raise ValueError(f"the choices are {choices!r:.80}: give two or more, and none empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        places = f"0 to {len(choices) - 1}"
        raise ValueError(f"'answer' is {answer!r:.40}: give the right choice's place, {places}")


def check_score(score):
    """Raise ValueError for a score that is not a number within a float's range."""
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if not number or not abs(score) <= sys.float_info.max:
        raise ValueError(f"'score' is {score!r:.40}, not a number")


def assistant_turns(turns):
    """The assistant's messages as strings. Raises ValueError if there are none."""
    well_formed = isinstance(turns, list) and all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str)
        for t in turns
    )
    if not well_formed:
        raise ValueError("messages must be a list of objects with the strings role and content")
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("no message has the role 'assistant', so there is nothing to learn")
    return answers
