"""
From examples to batches: the splits, what counts in the loss, padding.

    load_examples(path or name)  ->  list of dicts, all of one format (support/text/jsonl.py)
    load_splits(config)          ->  Splits: {"train", "val", "test"} of them, and what is asked
    encode(examples, ...)        ->  list of Encoded: token ids, and labels (-100: not supervised)
    batches(encoded, ...)        ->  (input_ids, labels), padded on the right

The answer is supervised (a completion, an output, a label, the assistant's turns); of plain text,
everything is.
"""

import bisect
import itertools
import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from support.text import official, tables
from support.text.datasets import BUILT_IN
from support.text.jsonl import Example, format_of, read_jsonl
from support.text.tokenizer import Tokenizer  # noqa: F401  (also data.Tokenizer)

LABEL_PROMPT = (
    "Which of these labels fits the text: {labels}? Answer with the label only.\n\n{text}"
)


def load_examples(path_or_name):
    """
    Read a file (JSONL; CSV or parquet; CoNLL's columns, if its name ends in .conll or .bio), or a
    built-in data set (a key of BUILT_IN), as a list of dicts.

    Raises FileNotFoundError for a missing file; ValueError, naming file and line, for content that
    can't be trained on.
    """
    if path_or_name in BUILT_IN:
        return BUILT_IN[path_or_name].load()
    path = Path(os.path.expanduser(path_or_name))
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file, or --data={path_or_name} for all of it")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: give a JSONL, CSV or parquet file, or a built-in set with "
            f"--data={'|'.join(BUILT_IN)}"
        )
    # of these tables, read_table refuses the last two, by name
    readers = dict.fromkeys((".csv", ".parquet", ".tsv", ".xlsx"), tables.read_table)
    readers |= {".conll": tables.read_conll, ".bio": tables.read_conll}
    return readers.get(path.suffix.lower(), read_jsonl)(path)


# ---------------------------------------------------------------------------------- splits


def split(examples, val_fraction=0.2, seed=0, grouped=True):
    """
    Shuffle and split into (train, val), label by label (stratified).

    grouped: keep examples with the same "group" (sentences of one review) together; val may then be
    a little smaller than asked. Raises ValueError when train or val would be empty, or would lack a
    label that the other has.
    """
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    labels, groups, first = {}, {}, {}
    for i in order:
        labels.setdefault(examples[i].get("label"), []).append(i)
    for i, example in enumerate(examples):
        leader = first.setdefault(example.get("group", i), i) if grouped else i
        groups.setdefault(leader, []).append(i)

    # A group's turn comes with its first example; it joins val if that lacks as many of each label.
    lacking = Counter({label: round(val_fraction * len(rows)) for label, rows in labels.items()})
    chosen = set()
    for members in (groups[i] for i in order if i in groups):
        counts = Counter(examples[i].get("label") for i in members)
        if counts <= lacking:
            lacking -= counts
            chosen.update(members)

    train, val = [], []
    for label, rows in labels.items():
        if not 0 < len(chosen.intersection(rows)) < len(rows):
            what = f"label {label!r}" if label is not None else "the data"
            raise ValueError(
                f"val_fraction={val_fraction} of the {len(rows)} examples of {what} leaves an "
                f"empty split: give more examples (groups stay whole), or another val_fraction"
            )
        val += [examples[i] for i in rows if i in chosen]
        train += [examples[i] for i in rows if i not in chosen]
    return train, val


class Splits(NamedTuple):
    """What load_splits returns."""

    splits: dict  # {"train", "val", "test"}: lists of examples, all of one format
    question: str  # the prompt of a classification example, with {text}
    labels: list  # all labels or tags, sorted; [] where there are none
    glue: str | None  # the key of scores.GLUE, if the data is one of its tasks


def load_splits(config):
    """
    A config's Splits. Where the data has no val split, val_fraction of train becomes val.

    Raises ValueError when the splits don't fit together.
    """
    question, glue = LABEL_PROMPT, None
    if config.train_file:
        files = {"train": config.train_file, "val": config.val_file, "test": config.test_file}
        splits = {name: load_examples(file) if file else [] for name, file in files.items()}
        whole = splits["train"]
    elif config.data in BUILT_IN:
        whole, question = load_examples(config.data), BUILT_IN[config.data].question
        splits = sample_built_in(config, whole)
    else:
        folder = os.path.isdir(os.path.expanduser(config.data))
        parts, glue = (official.read_folder if folder else official.read_hub)(config.data)
        parts.pop("mismatched", None)  # MNLI's second dev set
        splits, whole = sample_official(config, parts), parts["train"]

    if not splits["val"] and config.val_fraction > 0:
        splits["train"], splits["val"] = split(splits["train"], config.val_fraction, config.seed)
    # Of a published data set, all labels are known; a small sample may lack some.
    labels = sorted({label for example in whole for label in labels_of(example)})
    check_splits(splits, labels)
    for name in ("train", "val"):
        splits[name] = [single for example in splits[name] for single in one_reference(example)]
    return Splits(splits, config.label_prompt or question, labels, glue)


def sample_built_in(config, examples):
    """A built-in data set's train and test examples; val is split off later."""
    half = len(examples) // 2
    train_size, test_size = config.train_size or min(200, half), config.test_size or min(400, half)
    taken = train_size + test_size + config.tune_size
    if taken >= len(examples) or min(train_size, test_size) < 10:
        raise ValueError(
            f"train_size={train_size} and test_size={test_size} must be at least 10 each and, "
            f"together with tune_size={config.tune_size}, fewer than the {len(examples)} examples "
            f"of {config.data}"
        )

    # The test split is the same for every seed.
    rest, test = split(examples, test_size / len(examples), seed=0)
    if config.tune_size:
        rest, test = split(rest, config.tune_size / len(rest), seed=0)
    train, _ = split(rest, 1 - train_size / len(rest), config.seed, grouped=False)
    return {"train": train, "val": [], "test": test}


def sample_official(config, parts):
    """
    The splits of a data set that has its own: {"train", "dev", "test"}. With a val_fraction, the
    papers' rule: val is a part of train, and dev, unless there is a test set, is the test. Without
    one, val is dev.
    """
    if config.val_fraction > 0:
        splits = {"train": parts["train"], "val": [], "test": parts["test"] or parts["dev"]}
    else:
        splits = {"train": parts["train"], "val": parts["dev"], "test": parts["test"]}

    sizes = {"train": (config.train_size, config.seed), "test": (config.test_size, 0)}
    for name, (size, seed) in sizes.items():
        if 0 < size < len(splits[name]):
            rows = splits[name]
            try:
                _, splits[name] = split(rows, size / len(rows), seed, grouped=False)
            except ValueError:
                raise ValueError(
                    f"{name}_size={size} of {len(rows)} examples, drawn label by label, leaves "
                    f"out a label, or takes all examples of one: choose another {name}_size"
                ) from None
    return splits


def labels_of(example):
    """The labels or tags of an example, a list; [] where its format has none."""
    key = {"classification": "label", "multi_label": "labels", "tagging": "tags"}
    found = example.get(key.get(format_of(example)), [])
    return [found] if isinstance(found, str) else found


def one_reference(example):
    """Copies of an example, each with one of its references; of another format, the example."""
    if "references" not in example:
        return [example]
    where = getattr(example, "where", "an example")
    return [Example(example | {"references": [text]}, where) for text in example["references"]]


def check_splits(splits, labels):
    """
    Raise ValueError unless all splits have one format and no label that is not among `labels`; and,
    for classification, train has two of them or more, and val has all that train has.
    """
    firsts = {name: examples[0] for name, examples in splits.items() if examples}
    formats = {format_of(example) for example in firsts.values()}
    if len(formats) > 1:
        which = ", ".join(f"{name} is {format_of(first)}" for name, first in firsts.items())
        raise ValueError(f"the files differ in format: {which}")
    with_b = [name for name, first in firsts.items() if "text_b" in first]
    if 0 < len(with_b) < len(firsts):
        raise ValueError(f"text_b, for pairs, is only in the examples of {' and '.join(with_b)}")

    for name, example in ((name, e) for name, part in splits.items() for e in part):
        if unseen := set(labels_of(example)).difference(labels):
            where = f"{example.where}: " if hasattr(example, "where") else ""
            raise ValueError(f"{where}{name} has the label {min(unseen)!r}, which train lacks")

    if formats != {"classification"}:
        return
    found = {label for example in splits["train"] for label in labels_of(example)}
    if len(found) < 2:
        raise ValueError(
            f"all train examples have the label {found.pop()!r}: "
            f"classification needs two labels or more"
        )
    lacking = found.difference(*(labels_of(example) for example in splits["val"]))
    if splits["val"] and lacking:
        raise ValueError(f"val lacks the label {min(lacking)!r}: give it examples of every label")


# ----------------------------------------------------------------------- tokens and labels


@dataclass
class Encoded:
    input_ids: list  # prompt and answer
    labels: list  # as long; -100 where not supervised
    label: str = None  # classification: the right answer
    prompt_ids: list = field(default_factory=list)  # the prompt alone, unless plain text
    references: list = field(default_factory=list)  # data to text: the right answers


def prefix_of(tokenizer):
    """The token ids before a conversation: a chat template writes its own, the plain one none."""
    return [] if tokenizer.has_chat_template else tokenizer.prefix_ids


def tokenize_prompt(messages, tokenizer):
    """A conversation up to where the assistant's next turn goes, as token ids."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return prefix_of(tokenizer) + tokenizer.encode(text)


def tokenize_question(text, tokenizer, label_prompt, label_ids, block_size, text_b=""):
    """
    The prompt of a classification example, up to where the label goes: (token ids, whether it was
    cut). label_ids: from tokenize_labels. text_b: the second text of a pair, which follows the
    first one where label_prompt has no {text_b}.

    Of a prompt that leaves no room for every label in block_size tokens, the left of the text is
    cut, of a pair that of the longer one first, and nothing else. Raises ValueError if that is not
    enough.
    """

    if text_b and "{text_b}" not in label_prompt:
        label_prompt = label_prompt.replace("{text}", "{text}\n{text_b}")
    longer, both = len(text) - len(text_b), len(text) + len(text_b)

    def prompt(cut):
        """With `cut` characters less."""
        first = min(cut, abs(longer))  # all of these from the longer text
        start, start_b = (cut - first + 1) // 2, (cut - first) // 2
        start, start_b = (start + first, start_b) if longer > 0 else (start, start_b + first)
        values = {"text": text[start:], "text_b": text_b[start_b:], "labels": ", ".join(label_ids)}
        question = re.sub(r"\{(labels|text|text_b)\}", lambda m: values[m[1]], label_prompt)
        return tokenize_prompt([{"role": "user", "content": question}], tokenizer)

    room = block_size - max(map(len, label_ids.values()))
    ids = prompt(0)
    if len(ids) <= room:
        return ids, False

    cut = bisect.bisect_left(range(both), True, key=lambda i: len(prompt(i)) <= room)
    ids = prompt(cut)
    if len(ids) > room:
        raise ValueError(
            f"block_size={block_size} must hold the classification question, which takes "
            f"{len(ids)} tokens without any text, and a label ({block_size - room}): raise "
            f"block_size, or shorten label_prompt"
        )
    return ids, True


def tokenize_labels(labels, tokenizer):
    """
    {label: its token ids}. One token per label is fastest, so no end-of-turn token follows, unless
    one label begins another ("1" and "10"): then the shorter one would always be the likelier.
    """
    ids = {label: tokenizer.encode(label) for label in labels}
    if any(a != b and ids[b][: len(ids[a])] == ids[a] for a in labels for b in labels):
        ids = {label: tokens + [tokenizer.eos_id] for label, tokens in ids.items()}
    return ids


def segments(example, tokenizer):
    """An example of any format but classification, as a list of (token ids, if supervised)."""
    kind, eos = format_of(example), [tokenizer.eos_id]
    if kind in ("text", "code"):
        return [(tokenizer.prefix_ids, False), (tokenizer.encode(example[kind]) + eos, True)]
    if kind in ("prompt", "generation"):
        answer = example["completion"] if kind == "prompt" else "\n" + example["references"][0]
        whole, cut = example["prompt"] + answer, len(example["prompt"])
        prompt, completion = tokenizer.encode_cut(whole, [cut])
        return [(tokenizer.prefix_ids + prompt, False), (completion + eos, True)]

    if kind == "instruction":
        request = "\n\n".join(filter(None, (example["instruction"], example.get("input"))))
        messages = [
            {"role": "user", "content": request},
            {"role": "assistant", "content": example["output"]},
        ]
    else:
        messages = example["messages"]  # up to the last answer: nothing is learnt from the rest
        last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
        messages = messages[: last + 1]
    try:
        text, spans = tokenizer.chat.conversation(messages)
    except ValueError as error:
        quoted = json.dumps(example, ensure_ascii=False)
        raise ValueError(f"{error}; the example is {quoted:.80}…") from None

    pieces = tokenizer.encode_cut(text, [cut for span in spans for cut in span])
    pieces[0] = prefix_of(tokenizer) + pieces[0]
    pieces.pop()  # the end that the template writes after the last answer
    # The model must learn to stop, also where the template does not mark the end of an answer.
    if not tokenizer.chat.end_of_turn:
        pieces[-1] += eos
    return [(tokens, i % 2 == 1) for i, tokens in enumerate(pieces)]


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

    block_size: most tokens per row. A longer example is cut on the left, so its last answer stays
    whole; of a classification example, only the text is cut; plain text fills several rows.
    label_ids: from tokenize_labels, for classification. Raises ValueError for an answer without
    room for a prompt, for a question without room, or if the chat template refuses.
    """
    encoded, cut, asking = [], 0, (tokenizer, label_prompt, label_ids, block_size)
    for example in examples:
        kind, question, shortened = format_of(example), [], False
        if kind == "classification":
            text_b = example.get("text_b", "")
            question, shortened = tokenize_question(example["text"], *asking, text_b)
            pieces = [(question, False), (label_ids[example["label"]], True)]
        else:
            pieces = segments(example, tokenizer)

        ids = [token for tokens, _ in pieces for token in tokens]
        learnt = [supervised or train_on_prompt for tokens, supervised in pieces for _ in tokens]
        targets = [token if yes else -100 for token, yes in zip(ids, learnt)]
        if kind in ("text", "code"):
            # A row's first token is the last of the row before, so that each is predicted once.
            for start in range(0, len(ids) - 1, block_size - 1):
                row = slice(start, start + block_size)
                encoded.append(Encoded(ids[row], targets[row]))
            continue

        answer = len(pieces[-1][0])
        if answer >= block_size:
            begin = tokenizer.decode(pieces[-1][0][:20])
            raise ValueError(
                f"the answer that begins with {begin!r} has {answer} tokens, and "
                f"block_size={block_size} must hold it and some prompt: raise block_size"
            )
        cut += shortened or len(ids) > block_size
        row = Encoded(ids[-block_size:], targets[-block_size:], example.get("label"), question)
        if kind in ("prompt", "generation"):
            row.prompt_ids = row.input_ids[:-answer]
            row.references = example.get("references") or [example["completion"].strip()]
        encoded.append(row)
    return encoded, cut


def check_vocabulary(encoded, vocab_size, tokenizer):
    """Raise ValueError for a token in any split, or for padding, that the model does not have."""
    largest = max(max(row.input_ids) for rows in encoded.values() for row in rows)
    if largest >= vocab_size:
        raise ValueError(
            f"{tokenizer.folder}: the tokenizer produced token {largest}, but the model's "
            f"vocabulary has only {vocab_size} tokens"
        )
    if tokenizer.pad_id >= vocab_size:
        token = next(text for text, i in tokenizer.added.items() if i == tokenizer.pad_id)
        raise ValueError(
            f"{tokenizer.folder}: the padding token {token!r} has the id {tokenizer.pad_id}, but "
            f"the model's vocabulary has only {vocab_size} tokens: set pad_token in "
            f"tokenizer_config.json to an added token with a lower id"
        )


# --------------------------------------------------------------------------------- batches


def pad(rows, value):
    """Lists of ids as one tensor, (rows, longest row), padded with value on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def collate(encoded, pad_id):
    """A list of Encoded as (input_ids, labels), both (B, T)."""
    return pad([e.input_ids for e in encoded], pad_id), pad([e.labels for e in encoded], -100)


def batches(rows, batch_size, collate, seed, skip=0, group_by_length=False, shuffle=True):
    """
    Yield batches without end, collate(list of rows) each, shuffled anew each epoch, or without
    shuffle once for all epochs.

    batch_size: rows per batch, or all if there are fewer. skip: leave out that many batches, for a
    resumed run. group_by_length: sort the rows of 16 batches at a time by length, so that each
    batch has rows of similar length.
    """
    rng = random.Random(seed)
    queue, order = [], None
    for number in itertools.count():
        batch = []
        while len(batch) < min(batch_size, len(rows)):
            if not queue:
                if shuffle or order is None:
                    order = rng.sample(rows, len(rows))
                queue = grouped(order, batch_size, rng) if group_by_length else order.copy()
            batch.append(queue.pop())
        if number >= skip:
            yield collate(batch)


def grouped(rows, batch_size, rng):
    """
    Shuffled rows in groups of similar length, the groups in random order. A group of less than
    batch_size comes first, since `batches` takes rows from the end: it would shift later groups.
    """
    size = 16 * batch_size
    groups = []
    for i in range(0, len(rows), size):
        pool = sorted(rows[i : i + size], key=lambda row: len(row.input_ids))
        groups += [pool[j : j + batch_size] for j in range(0, len(pool), batch_size)]
    short = [group for group in groups if len(group) < batch_size]
    groups = rng.sample(groups, len(groups))
    return list(itertools.chain(*short, *(g for g in groups if len(g) == batch_size)))


def supervised(batch):
    """How many positions of a batch, (input_ids, labels), count in its mean loss."""
    return (batch[1][:, 1:] != -100).sum().item()


def micro_batches(batch, size=0, rank=0, world_size=1, count=supervised):
    """
    Split a batch, a tuple of tensors, into a list of (*tensors, share). share: the fraction of the
    batch's supervised positions, so that losses times shares add up to the batch's loss. size: most
    rows per micro-batch; 0 means all. count: counts the supervised positions.

    With several processes, process `rank` gets its own rows, in as many micro-batches as the others
    get, since all must compute in step; one without rows gets any row, with share 0.
    """
    total = count(batch)
    own = [tensor.tensor_split(world_size)[rank] for tensor in batch]
    most = math.ceil(len(batch[0]) / world_size)  # rows of a process
    number = math.ceil(most / (size or most))

    found = []
    for part in zip(*(tensor.tensor_split(number) for tensor in own)):
        if len(part[0]):
            found.append((*part, count(part) / total))
        else:
            found.append((*(tensor[:1] for tensor in batch), 0.0))
    return found
