"""
From files to batches: the JSONL formats, the built-in data sets, the split, what counts in the loss, padding.

    load_examples(path or name)  ->  list of dicts, all of one format:
        {"text"}, {"code"}                              plain text, every token counts in the loss
        {"messages": [{"role", "content"}, ...]}        a conversation, the assistant's turns count
        {"instruction", "input"?, "output"}             the output counts
        {"prompt", "completion"}                        taken as they stand, without a chat template; the completion counts
        {"text", "label"}                               classification: the label is the answer, scored among all labels
    encode(examples, tokenizer, ...)  ->  list of Encoded: token ids, and labels with -100 where nothing counts
    batches(encoded, ...)  ->  (input_ids, labels), padded on the right
"""

import itertools
import json
import math
import random
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from support.files import fetch
from support.tokenizer import Tokenizer  # noqa: F401  (also data.Tokenizer, for those who look for it here)

# ---------------------------------------------------------------------------------------------- data sets

SNIPPETS = dict(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    size="2.5 MB",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
BUILT_IN = {  # name: how its classification question is put
    "movie-sentiment": "Is the sentiment of this movie review positive or negative? Answer with one word.\n\n{text}",
    "product-sentiment": "Is the sentiment of this product review positive or negative? Answer with one word.\n\n{text}",
    "toy-sentiment": "{text}",
}
LABEL_PROMPT = (
    "Which of these labels fits the text: {labels}? Answer with the label only.\n\n{text}"
)
FORMATS = {  # format: the keys that it needs; the first that fits is it
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "code": ("code",),
    "classification": ("text", "label"),
    "text": ("text",),
}


def format_of(example):
    """The name of an example's format, a key of FORMATS, or None."""
    return next(
        (name for name, keys in FORMATS.items() if all(key in example for key in keys)), None
    )


def load_examples(path_or_name):
    """
    Read a JSONL file (UTF-8, one example a line, all of one format) or a built-in set: a key of BUILT_IN.

    Returns a list of dicts. Raises FileNotFoundError, or ValueError naming file and line, for what can't be trained on.
    """
    if path_or_name == "movie-sentiment":
        return rated_snippets("movieReviewSnippets")
    if path_or_name == "product-sentiment":
        return rated_snippets("amazonReviewSnippets")
    if path_or_name == "toy-sentiment":
        return toy_sentiment()
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a JSONL file")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: give a JSONL file or a built-in set ({', '.join(BUILT_IN)})"
        )
    examples, kind = [], None
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            example = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique)
            if (
                b"\\ud" in line.lower()
            ):  # such escapes come in pairs; half a pair is no character, and no tokenizer takes it
                json.dumps(example, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where}: half a surrogate pair (\\ud800 … \\udfff alone) is no character: remove it"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}): write one JSON object a line") from None
        if isinstance(example, dict) and isinstance(
            example.get("label"), int
        ):  # 0 and 1 are common labels
            example["label"] = str(example["label"])
        check_example(example, where)
        if kind not in (None, format_of(example)):
            raise ValueError(
                f"{where}: format {format_of(example)!r}, but the lines before are {kind!r}: use one format a file"
            )
        kind = format_of(example)
        if kind != "classification":
            example.pop("label", None)  # some other note of the file's author
        examples.append(example)
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def unique(pairs):
    """A JSON object as a dict. Raises ValueError for a key that stands twice: which one did the author mean?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice"
        )
    return found


def check_example(example, where):
    """Raise ValueError, beginning with `where`, for an example that is none of the formats or has an empty answer."""
    kind = format_of(example) if isinstance(example, dict) else None
    if kind is None:
        needed = "; ".join(" + ".join(keys) for keys in FORMATS.values())
        have = (
            f"has the keys {', '.join(example) or '(none)'}"
            if isinstance(example, dict)
            else "is no JSON object"
        )
        raise ValueError(f"{where}: the line {have}; needed are: {needed}")
    if kind == "messages":
        turns = example["messages"]
        if not isinstance(turns, list) or not all(
            isinstance(t, dict)
            and isinstance(t.get("role"), str)
            and isinstance(t.get("content"), str)
            for t in turns
        ):
            raise ValueError(
                f"{where}: messages must be a list of objects with the strings role and content"
            )
        answers = [t["content"] for t in turns if t["role"] == "assistant"]
        if not answers:
            raise ValueError(
                f"{where}: no message has the role 'assistant', so there is nothing to learn"
            )
    else:
        for key in [*FORMATS[kind], *(["input"] if "input" in example else [])]:
            if not isinstance(example[key], str):
                raise ValueError(f"{where}: {key!r} is {type(example[key]).__name__}, not a string")
        answers = [example[FORMATS[kind][-1]]]
    if not all(answer.strip() for answer in answers):
        raise ValueError(f"{where}: the answer is empty")


def rated_snippets(name):
    """
    Snippets, 'positive' or 'negative' by the sign of their mean human rating (-4 … 4, |rating| ≥ 0.5): 10,070 out of movie reviews, or
    2,977 sentences of product reviews.

    Hutto & Gilbert, "VADER", ICWSM 2014; the ratings lie in an archive inside the package's source archive (MIT).
    """
    with tarfile.open(fetch(**SNIPPETS)) as outer:
        inner = outer.extractfile(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
        with tarfile.open(fileobj=inner) as archive:
            lines = (
                archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                .read()
                .decode("utf-8")
                .splitlines()
            )
    ratings = {}  # by text, so that no snippet stands twice
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= 0.5:
            ratings.setdefault(text.strip(), float(rating))
    return [
        {"text": text, "label": "positive" if rating > 0 else "negative"}
        for text, rating in ratings.items()
    ]


def toy_sentiment(size=2000):
    """A made-up language for configs/tiny.py: three cheerful or gloomy syllables among five plain ones; needs no download."""
    rng = random.Random(0)
    examples = []
    for i in range(size):
        label, marked = (("yes", "aeae"), ("no", "uouo"))[i % 2]
        syllables = [marked] * 3 + [
            rng.choice(("ti", "lim", "nik", "pil", "kit")) for _ in range(5)
        ]
        rng.shuffle(syllables)
        examples.append({"text": " ".join(syllables), "label": label})
    return examples


def split(examples, val_fraction=0.2, seed=0):
    """
    Shuffle and split into (train, val); with labels, each label is split by itself (stratified).

    Raises ValueError when the val part would be empty, or lack a label that train has.
    """
    groups = {}
    for example in random.Random(seed).sample(examples, len(examples)):
        groups.setdefault(example.get("label"), []).append(example)
    train, val = [], []
    for label, group in groups.items():
        count = round(val_fraction * len(group))
        if not 0 < count < len(group):
            what = f"label {label!r}" if label is not None else "the data"
            raise ValueError(
                f"val_fraction={val_fraction} of the {len(group)} examples of {what} leaves an empty part: "
                f"give more examples, or another val_fraction"
            )
        val += group[:count]
        train += group[count:]
    return train, val


# ------------------------------------------------------------------------------------------ tokens and labels


@dataclass
class Encoded:
    input_ids: list  # prompt and answer
    labels: list  # as long; -100 where the loss does not look
    label: str = None  # classification: the right answer
    prompt_ids: list = field(default_factory=list)  # classification: the prompt alone


def tokenize_question(text, tokenizer, label_prompt, labels):
    """The prompt of a classification example, up to where the label goes, as token ids."""
    message = label_prompt.replace("{labels}", ", ".join(labels)).replace("{text}", text)
    return tokenizer.encode(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True
        )
    )


def tokenize_labels(labels, tokenizer):
    """
    {label: its token ids}. One token a label is best: no end-of-turn token is put behind, unless one label begins another
    ("1" and "10"), where the shorter would always be the likelier.
    """
    ids = {label: tokenizer.encode(label) for label in labels}
    if any(a != b and ids[b][: len(ids[a])] == ids[a] for a in labels for b in labels):
        ids = {label: tokens + [tokenizer.eos_id] for label, tokens in ids.items()}
    return ids


def segments(example, tokenizer, label_prompt, label_ids):
    """The example as a list of (token ids, counts in the loss)."""
    kind = format_of(example)
    if kind in ("text", "code"):
        return [
            (tokenizer.prefix_ids, False),
            (tokenizer.encode(example[kind]) + [tokenizer.eos_id], True),
        ]
    if kind == "prompt":
        prompt, completion = tokenizer.encode_cut(
            example["prompt"] + example["completion"], [len(example["prompt"])]
        )
        return [(tokenizer.prefix_ids + prompt, False), (completion + [tokenizer.eos_id], True)]
    if kind == "classification":
        return [
            (tokenize_question(example["text"], tokenizer, label_prompt, label_ids), False),
            (label_ids[example["label"]], True),
        ]
    if kind == "instruction":
        request = "\n\n".join(filter(None, (example["instruction"], example.get("input"))))
        messages = [
            {"role": "user", "content": request},
            {"role": "assistant", "content": example["output"]},
        ]
    else:
        messages = example["messages"]
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[: last + 1]  # nothing is learnt from what comes behind
    text, spans = tokenizer.conversation(messages)
    parts = tokenizer.encode_cut(text, [cut for span in spans for cut in span])
    if (
        not tokenizer.end_of_turn
    ):  # the template writes nothing behind an answer, but a model must learn to stop
        parts[-2:] = [parts[-2] + [tokenizer.eos_id]]
    return [(tokens, i % 2 == 1) for i, tokens in enumerate(parts)]


def encode(
    examples,
    tokenizer,
    block_size,
    label_prompt=LABEL_PROMPT,
    label_ids=None,
    train_on_prompt=False,
):
    """
    Turn examples into (list of Encoded, how many were cut).

    block_size: the most tokens a row may have. A longer example is cut on the left, its last answer kept whole; plain text is
    laid out in several rows instead. label_ids: from tokenize_labels, for a classification task.
    Raises ValueError, quoting the example, when its answer leaves no room for a prompt, or the chat template refuses it.
    """
    encoded, cut = [], 0
    for example in examples:
        try:
            parts = segments(example, tokenizer, label_prompt, label_ids)
        except ValueError as error:
            raise ValueError(
                f"{error}; the example is {json.dumps(example, ensure_ascii=False):.80}…"
            ) from None
        if len(parts) > 1 and not parts[-1][1]:
            parts.pop()  # what the template writes behind the last answer
        ids = [token for tokens, _ in parts for token in tokens]
        targets = [
            token if counts or train_on_prompt else -100
            for tokens, counts in parts
            for token in tokens
        ]
        if format_of(example) in ("text", "code"):
            # A row's first token is the last of the row before, so that each token is predicted once.
            for start in range(0, len(ids) - 1, block_size - 1):
                encoded.append(
                    Encoded(ids[start : start + block_size], targets[start : start + block_size])
                )
            continue
        answer = len(parts[-1][0])
        if answer >= block_size:
            raise ValueError(
                f"the answer that begins with {tokenizer.decode(parts[-1][0][:20])!r} has {answer} tokens, and "
                f"block_size={block_size} must hold it and some prompt: raise block_size"
            )
        cut += len(ids) > block_size
        ids, targets = ids[-block_size:], targets[-block_size:]
        label = example["label"] if format_of(example) == "classification" else None
        encoded.append(Encoded(ids, targets, label, ids[:-answer] if label is not None else []))
    return encoded, cut


def pad(rows, value):
    """Lists of ids as one tensor, (rows, longest row), filled with value on the right."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )


def collate(encoded, pad_id):
    """A list of Encoded as (input_ids, labels), both (B, T)."""
    return pad([e.input_ids for e in encoded], pad_id), pad([e.labels for e in encoded], -100)


def batches(encoded, batch_size, pad_id, seed, skip=0, group_by_length=False):
    """
    Yield (input_ids, labels) without end: shuffled anew each epoch, in batches of batch_size (fewer if there are fewer rows), from
    the one after the first `skip` on. group_by_length: each of rows that are next to each other in length, among 16 batches' at a time.
    """
    rng = random.Random(seed)
    queue = []

    def grouped(rows):
        pools = [
            sorted(rows[i : i + 16 * batch_size], key=lambda row: len(row.input_ids))
            for i in range(0, len(rows), 16 * batch_size)
        ]
        groups = [
            pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)
        ]
        rest = [group for group in groups if len(group) < batch_size]
        groups = rng.sample(groups, len(groups))
        return list(
            itertools.chain(*rest, *(group for group in groups if len(group) == batch_size))
        )

    for number in itertools.count():
        batch = []
        while len(batch) < min(batch_size, len(encoded)):
            if not queue:
                queue = rng.sample(encoded, len(encoded))
                queue = grouped(queue) if group_by_length else queue
            batch.append(queue.pop())
        if number >= skip:
            yield collate(batch, pad_id)


def parts(batch, count, rank=0, world_size=1):
    """
    A batch in at most `count` parts, each with its share of the labels that count: (input_ids, labels, share).

    Of several processes, number `rank` gets its own rows, in as many parts as the others; where rows are short of that, a part is a row whose share
    is 0, since all must compute in step.
    """
    total = (batch[1][:, 1:] != -100).sum().item()
    own = [tensor.tensor_split(world_size)[rank] for tensor in batch]
    number = min(count, math.ceil(len(batch[0]) / world_size))
    return [
        (ids, targets, (targets[:, 1:] != -100).sum().item() / total)
        if len(ids)
        else (batch[0][:1], batch[1][:1], 0.0)
        for ids, targets in zip(*(tensor.tensor_split(number) for tensor in own))
    ]
