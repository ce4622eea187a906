"""
Examples from JSONL files, checked line by line, or from JSON arrays. An example's keys decide its
format. Any example may also have a "group": data.split keeps the examples of a group together. An
example's notes name all that was left out of it or changed.
"""

import functools
import json
import re

from support.run.files import unique

FORMATS = {  # an example has the first format whose keys it holds; the last key is the answer's
    "messages": ("messages",),  # a conversation: [{"role", "content"}, …]
    "instruction": ("instruction", "output"),  # written by a chat template
    "generation": ("prompt", "references"),  # data to text: a list of right answers
    "prompt": ("prompt", "completion"),  # used without a chat template
    "multiple_choice": ("prompt", "choices", "answer"),  # a list; the right one counts from 0
    "code": ("code",),
    "tagging": ("words", "tags"),  # lists: a BIO tag for each word
    "classification": ("text", "label"),
    "multi_label": ("text", "labels"),  # a list of any number of labels
    "regression": ("text", "score"),
    "text": ("text",),
}
OPTIONAL = {  # what an example may have besides; text_b: the second text of a pair
    "messages": ("tools", "documents"),
    "instruction": ("input", "system", "history"),
    **dict.fromkeys(("classification", "multi_label", "regression"), ("text_b",)),
}
LISTS = dict.fromkeys(("references", "choices", "labels", "words", "tags"), str)  # of items
LISTS |= {"tools": dict, "documents": dict, "history": list}
DECODER = json.JSONDecoder(object_pairs_hook=unique)
LARGEST = 1e38  # of scores: float32's range
MOST_BYTES = 2**28  # of a JSON array, which is read as a whole
LEARNT = ("weight", "train", "training", "loss")  # 0 or false: an assistant's turn is not learnt


class Example(dict):
    """One example. where: its file and line. notes: what was left out, for splits.left_out."""

    def __init__(self, fields, where="an example", notes=()):
        super().__init__(fields)
        self.where, self.notes = where, notes


def format_of(example):
    """The name of an example's format, a key of FORMATS, or None."""
    return format_with(tuple(example))


@functools.lru_cache(1000)  # examples by the million have a few sets of keys
def format_with(keys):
    return next((name for name, needed in FORMATS.items() if {*needed} <= {*keys}), None)


def read_jsonl(path, columns=None):
    """
    The examples of a UTF-8 file with one JSON object per line, or with one array of objects, all of
    one format: a list of dicts. columns: as in `renamed`. Raises ValueError, which names file and
    line, for an example that can't be trained on.
    """
    columns = columns or {}
    rows = ((where, renamed(fields, columns, where), ()) for where, fields in objects_of(path))
    return examples_of(path, rows, columns)


def examples_of(path, rows, names):
    """
    The list of a file's examples. rows: (file and line, {key: value}, notes) of each. names: {key:
    its name in messages}. Raises ValueError.
    """
    examples, first = [], None
    for where, fields, notes in rows:
        try:
            name, example = read_example(fields, where, names)
            first = first or name
            if name != first:
                now, before = (" + ".join(FORMATS[name]) for name in (name, first))
                raise ValueError(
                    f"the line has {now}, but the lines before have {before}: use one format per "
                    f"file"
                )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

        example.notes += notes
        examples.append(example)

    if not examples:
        raise ValueError(f"{path} holds no examples")
    pairs = [example for example in examples if "text_b" in example]
    if 0 < len(pairs) < len(examples):
        single = next(example for example in examples if "text_b" not in example)
        problem = f"text_b is missing, but {pairs[0].where} is a pair"
        raise ValueError(f"{single.where}: {problem}: give every line two texts, or one")
    return examples


def objects_of(path):
    """Yield (file and line, dict) of each JSONL line, or (file and item, dict) of an array's."""
    content = path.read_bytes()
    if content[:1000].decode(errors="replace").lstrip("\ufeff \t\r\n").startswith("["):
        if len(content) > MOST_BYTES:
            raise ValueError(f"{path}: a JSON array above 256 MB: write one JSON object per line")
        items = enumerate(parse(content, path), start=1)
        values = ((f"{path}, item {number}", item) for number, item in items)
    else:
        lines = enumerate(content.split(b"\n"), start=1)
        places = ((f"{path}:{number}", line) for number, line in lines if line.strip())
        values = ((where, parse(line, where)) for where, line in places)
    for where, value in values:
        if not isinstance(value, dict):
            form = '{"text": …, "label": …}, or the keys of another format'
            raise ValueError(f"{where}: this is not a JSON object: write {form}")
        yield where, value


def count_shared(examples, others):
    """How many examples are among the others, too, compared by the keys that training uses."""

    def used(example):
        name = format_of(example)
        keys = (*FORMATS[name], *OPTIONAL.get(name, ()))
        return json.dumps([example.get(key) for key in keys], sort_keys=True)

    known = set(map(used, others))
    return sum(used(example) in known for example in examples)


def parse(content, where):
    """The JSON value that some bytes hold. Raises ValueError, which begins with `where`."""
    try:
        value = DECODER.decode(content.decode("utf-8-sig"))
        # An escape like \ud83d is half a pair; alone, it encodes no character.
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        problem = "half a surrogate pair (\\ud800 … \\udfff alone) is not a character: remove it"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON ({error}): write one JSON object per line"
    raise ValueError(f"{where}: {problem}")


def columns_of(settings):
    """{key: its name in a file} of the columns that a run's settings, a dict, name."""
    keys = FORMATS.get(settings.get("task"), FORMATS["classification"])
    names = {keys[0]: "text_column", "text_b": "text_b_column", keys[-1]: "label_column"}
    return {key: settings[name] for key, name in names.items() if settings.get(name)}


def renamed(fields, columns, where):
    """
    A dict whose keys have an example's names. columns: {key of an example: its name here}. Raises
    ValueError, which begins with `where`, if one is missing.
    """
    if not columns:
        return fields
    if missing := {*columns.values()} - fields.keys():
        have = " ".join(", ".join(fields).split())
        problem = f"there is no {min(missing)!r}, which the settings name, but {have:.300}"
        raise ValueError(f"{where}: {problem}")
    keys = {key: f"the file's {key}" for key in columns} | {n: key for key, n in columns.items()}
    return {keys.get(name, name): value for name, value in fields.items()}


def read_example(fields, where, columns):
    """
    (the name of its format, the Example) of a line's or a row's fields. columns: {key: its name in
    messages}. Raises ValueError, without the line's number, for an unknown format, a value of the
    wrong type or an empty answer.
    """
    name = format_of(fields)
    if name is None:
        have = ", ".join(fields) or "(none)"
        needed = "; ".join(" + ".join(keys) for keys in FORMATS.values())
        raise ValueError(f"the line has the keys {have}; use one of these sets of keys: {needed}")

    optional = (*OPTIONAL.get(name, ()), "group")
    example = Example({}, where)
    for key, value in fields.items():
        if key not in FORMATS[name] and key not in optional:
            example.notes += (f"the key {key!r} is not used",)
            continue
        if key in ("label", "labels", "group"):
            value = of_each(value, class_name)
            if (bare := clean(value)) != value:
                example.notes += (f"blanks around {key!r} are left out",)
            value = bare
        if key == "text" and key != FORMATS[name][-1] and value in (None, ""):
            value = ""
            example.notes += ("the text is empty",)
        if key == "words" and isinstance(value, list) and not all(map(str.strip, map(str, value))):
            example.notes += ("a blank word has no token, and its tag is not learnt",)
        if key == "messages" and isinstance(value, list):
            value = list(map(with_one_text, value))
        # A pair's second text may be empty. Any other optional key counts as missing if empty.
        if key in FORMATS[name] or value not in ((None,) if key == "text_b" else (None, "")):
            example[key] = value
            if key not in ("messages", "score", "answer"):
                check_type(value, LISTS.get(key), columns.get(key, key))
    check_answer(example, name, columns.get(FORMATS[name][-1], FORMATS[name][-1]))
    return name, example


def of_each(value, function):
    """A function of a value, or of each item of a list."""
    return [function(item) for item in value] if isinstance(value, list) else function(value)


def clean(value):
    """A label, or each of a list, without blanks around it."""
    return of_each(value, lambda name: name.strip() if isinstance(name, str) else name)


def class_name(value):
    """A label or a group, as a string if it is an integer: 2, 2.0 or true."""
    whole = isinstance(value, int) or isinstance(value, float) and value.is_integer()
    return str(value if isinstance(value, bool) else int(value)) if whole else value


def with_one_text(turn):
    """
    A turn whose content is one text. A list of parts, OpenAI's form, is joined by blanks, as in
    transformers. Raises ValueError for a part that is not a text.
    """
    parts = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(parts, list):
        return turn
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            named = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"a turn's content has a part {named!r:.40}: only texts can be learnt")
    return turn | {"content": " ".join(part["text"] for part in parts)}


def check_type(value, items, column):
    """Raise ValueError unless a value is a string, or a list of items of this type."""
    wanted = {None: "string", str: "string", dict: "JSON object", list: "list"}[items]
    if items and not isinstance(value, list):
        raise ValueError(f"{column!r} is {type(value).__name__}, not a list of {wanted}s")
    for item in value if items else [value]:
        if not isinstance(item, items or str):
            raise ValueError(f"{column!r} is {type(item).__name__}, not a {wanted}")


def check_answer(example, name, column):
    """Raise ValueError for an answer that can't be learnt."""
    answers = example[FORMATS[name][-1]]
    if name == "tagging":
        check_tags(example["words"], answers)
    elif name == "regression":
        check_score(answers)
    elif name == "multiple_choice":
        check_choices(example["choices"], answers)
    else:
        answers = learnt_answers(answers) if name == "messages" else answers
        answers = [answers] if isinstance(answers, str) else answers
        if not all(map(str.strip, answers)) or not (answers or name == "multi_label"):
            raise ValueError(f"the answer is empty: fill in {column!r}")
        if name == "multi_label" and len(set(answers)) < len(answers):
            raise ValueError(f"a label occurs twice in {answers}")
    if any([*map(type, pair)] != [str, str] for pair in example.get("history", ())):
        raise ValueError("'history' is not a list of pairs [question, answer] of strings")


def check_tags(words, tags):
    """Raise ValueError unless each word has a BIO tag."""
    if not words or len(words) != len(tags):
        counts = f"{len(words)} words and {len(tags)} tags"
        raise ValueError(f"{counts}: give each word one, and at least one word")
    for tag in tags:
        if not re.fullmatch(r"O|[BI]-\S.*", tag):
            raise ValueError(f"the tag {tag!r} is not O, B-… or I-…: convert the tags to BIO")


def check_choices(choices, answer):
    """Raise ValueError unless there are two choices or more, and answer is the place of one."""
    if len(choices) < 2 or not all(map(str.strip, choices)):
        raise ValueError(f"the choices are {choices!r:.80}: give two or more, and none empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        places = f"0 to {len(choices) - 1}"
        raise ValueError(f"'answer' is {answer!r:.40}: give the right choice's place, {places}")


def check_score(score):
    """Raise ValueError for a score that is not a number within float32's range."""
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if not number or not abs(score) <= LARGEST:
        raise ValueError(f"'score' is {score!r:.40}, not a number of at most {LARGEST:g}, as 2.5")


def learnt_answers(turns):
    """
    A conversation's answers that are to be learnt, as strings. An answer may have tool_calls in
    place of a content. Raises ValueError if there are none.
    """
    if not isinstance(turns, list) or not all(map(is_turn, turns)):
        raise ValueError("messages must be a list of objects with the strings role and content")
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("no message has the role 'assistant', so there is nothing to learn")
    learnt = [turn for turn in answers if is_learnt(turn)]
    if not learnt:
        raise ValueError("every answer is marked as not to be learnt: there is nothing to learn")
    return [turn.get("content") or str(turn.get("tool_calls") or "") for turn in learnt]


def is_turn(turn):
    """Whether this is a turn: a role and a content, both strings. An answer may lack a content."""
    role, content = map(turn.get, ("role", "content")) if isinstance(turn, dict) else (None, None)
    may_lack = role == "assistant" and content is None
    return isinstance(role, str) and (may_lack or isinstance(content, str))


def is_learnt(turn):
    """Whether an assistant's turn is to be learnt. Raises ValueError if its marks don't tell."""
    marks = {key: turn[key] for key in LEARNT if turn.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise ValueError(f"{key!r} of a turn is {mark!r:.40}: give 0 or 1, or false or true")
    return all(marks.values())
