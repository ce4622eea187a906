"""
From examples to batches: the splits, what counts in the loss, padding.

    load_examples(path or name)  ->  list of dicts, all of one format (support/jsonl.py)
    load_splits(config)          ->  {"train", "val", "test"} of them, and the question
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
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from support.datasets import BUILT_IN
from support.jsonl import format_of, read_jsonl
from support.tokenizer import Tokenizer  # noqa: F401  (also data.Tokenizer)

LABEL_PROMPT = (
    "Which of these labels fits the text: {labels}? Answer with the label only.\n\n{text}"
)


def load_examples(path_or_name):
    """
    Read a JSONL file, or a built-in data set (a key of BUILT_IN), as a list of dicts.

    Raises FileNotFoundError for a missing file; ValueError, naming file and line, for content that
    can't be trained on.
    """
    if path_or_name in BUILT_IN:
        return BUILT_IN[path_or_name].load()
    path = Path(os.path.expanduser(path_or_name))
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a JSONL file")
    if not path.exists():
        names = ", ".join(BUILT_IN)
        raise FileNotFoundError(
            f"{path} does not exist: give a JSONL file or a built-in set ({names})"
        )
    return read_jsonl(path)


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


def load_splits(config):
    """
    A config's examples as {"train", "val", "test"}, and its classification question.

    Raises ValueError when the splits don't fit together.
    """
    if config.train_file:
        files = {"train": config.train_file, "val": config.val_file, "test": config.test_file}
        splits = {name: load_examples(file) if file else [] for name, file in files.items()}
        question = LABEL_PROMPT
    else:
        splits = sample_built_in(config)
        question = BUILT_IN[config.data].question

    if not config.val_file and config.val_fraction > 0:
        splits["train"], splits["val"] = split(splits["train"], config.val_fraction, config.seed)
    check_splits(splits)
    return splits, config.label_prompt or question


def sample_built_in(config):
    """A built-in data set's train and test examples; val is split off later."""
    examples = load_examples(config.data)
    train_size, test_size = config.train_size, config.test_size
    if train_size + test_size >= len(examples) or min(train_size, test_size) < 10:
        raise ValueError(
            f"train_size={train_size} and test_size={test_size} must be at least 10 each, and "
            f"together less than the {len(examples)} examples of {config.data}"
        )

    # The test split is the same for every seed.
    rest, test = split(examples, test_size / len(examples), seed=0)
    train, _ = split(rest, 1 - train_size / len(rest), config.seed, grouped=False)
    return {"train": train, "val": [], "test": test}


def check_splits(splits):
    """
    Raise ValueError unless all splits have one format, train and val have the same labels, and test
    has no others.
    """
    formats = {format_of(examples[0]) for examples in splits.values() if examples}
    if len(formats) > 1:
        raise ValueError(f"the files differ in format: {', '.join(sorted(formats))}")

    labels = {
        name: {example.get("label") for example in examples}
        for name, examples in splits.items()
        if examples
    }
    if formats == {"classification"} and len(labels["train"]) < 2:
        raise ValueError(
            f"all train examples have the label {labels['train'].pop()!r}: "
            f"classification needs two labels or more"
        )

    for name, found in labels.items():
        if unseen := found - labels["train"]:
            raise ValueError(f"{name} has the label {sorted(unseen)[0]!r}, which train lacks")
        if name == "val" and (lacking := labels["train"] - found):
            raise ValueError(
                f"val lacks the label {sorted(lacking)[0]!r}: give it examples of every label"
            )


# ----------------------------------------------------------------------- tokens and labels


@dataclass
class Encoded:
    input_ids: list  # prompt and answer
    labels: list  # as long; -100 where not supervised
    label: str = None  # classification: the right answer
    prompt_ids: list = field(default_factory=list)  # classification: the prompt alone


def prefix_of(tokenizer):
    """The token ids before a conversation: a chat template writes its own, the plain one none."""
    return [] if tokenizer.has_chat_template else tokenizer.prefix_ids


def tokenize_prompt(messages, tokenizer):
    """A conversation up to where the assistant's next turn goes, as token ids."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return prefix_of(tokenizer) + tokenizer.encode(text)


def tokenize_question(text, tokenizer, label_prompt, label_ids, block_size):
    """
    The prompt of a classification example, up to where the label goes: (token ids, whether it was
    cut). label_ids: from tokenize_labels.

    Of a prompt that leaves no room for every label in block_size tokens, the left of the text is
    cut, and nothing else. Raises ValueError if that is not enough.
    """

    def prompt(start):
        question = label_prompt.replace("{labels}", ", ".join(label_ids))
        question = question.replace("{text}", text[start:])
        return tokenize_prompt([{"role": "user", "content": question}], tokenizer)

    room = block_size - max(map(len, label_ids.values()))
    ids = prompt(0)
    if len(ids) <= room:
        return ids, False

    start = bisect.bisect_left(range(len(text)), True, key=lambda i: len(prompt(i)) <= room)
    ids = prompt(start)
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
    if kind == "prompt":
        whole, cut = example["prompt"] + example["completion"], len(example["prompt"])
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
    encoded, cut = [], 0
    for example in examples:
        kind, question, shortened = format_of(example), [], False
        if kind == "classification":
            question, shortened = tokenize_question(
                example["text"], tokenizer, label_prompt, label_ids, block_size
            )
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
        label = example["label"] if kind == "classification" else None
        encoded.append(Encoded(ids[-block_size:], targets[-block_size:], label, question))
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


def batches(encoded, batch_size, pad_id, seed, skip=0, group_by_length=False):
    """
    Yield batches (input_ids, labels) without end, shuffled anew each epoch.

    batch_size: rows per batch, or all if there are fewer. skip: leave out that many batches, for a
    resumed run. group_by_length: sort the rows of 16 batches at a time by length, so that each
    batch has rows of similar length.
    """
    rng = random.Random(seed)
    queue = []
    for number in itertools.count():
        batch = []
        while len(batch) < min(batch_size, len(encoded)):
            if not queue:
                queue = rng.sample(encoded, len(encoded))
                queue = grouped(queue, batch_size, rng) if group_by_length else queue
            batch.append(queue.pop())
        if number >= skip:
            yield collate(batch, pad_id)


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


def micro_batches(batch, size=0, rank=0, world_size=1):
    """
    Split a batch into a list of (input_ids, labels, share). share: the fraction of the batch's
    supervised positions, so that losses times shares add up to the batch's loss. size: most rows
    per micro-batch; 0 means all.

    With several processes, process `rank` gets its own rows, in as many micro-batches as the others
    get, since all must compute in step; one without rows gets any row, with share 0.
    """
    total = (batch[1][:, 1:] != -100).sum().item()
    own = [tensor.tensor_split(world_size)[rank] for tensor in batch]
    most = math.ceil(len(batch[0]) / world_size)  # rows of a process
    count = math.ceil(most / (size or most))

    found = []
    for ids, labels in zip(*(tensor.tensor_split(count) for tensor in own)):
        share = (labels[:, 1:] != -100).sum().item() / total
        found.append((ids, labels, share) if len(ids) else (batch[0][:1], batch[1][:1], 0.0))
    return found
