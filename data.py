"""
From examples to batches: the splits, what counts in the loss, padding.

    load_examples(path or name)  ->  list of dicts, all of one format (support/text/jsonl.py)
    load_splits(config)          ->  Splits: {"train", "val", "test"} of them, and what is asked
    encode(examples, ...)        ->  list of Encoded: token ids, and labels (-100: not supervised)
    Batches(encoded, ...)[k]     ->  the k-th batch, a list of Encoded
    collate(batch, pad_id)       ->  (input_ids, labels), padded on the right

The answer is supervised (a completion, a label, the assistant's turns); of plain text, all is.
"""

import itertools
import math
import random
import sys
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from support.text.jsonl import format_of
from support.text.packed import Packed
from support.text.question import Question, prefix_of
from support.text.segments import segments
from support.text.splits import LABEL_PROMPT, load_examples, load_splits, split  # noqa: F401
from support.text.tokenizer import Tokenizer  # noqa: F401  (also data.Tokenizer)


@dataclass
class Encoded:
    input_ids: list = Packed()  # prompt and answer
    labels: list = Packed()  # as long; -100 where not supervised
    label: str = None  # classification: the right answer
    prompt: int = 0  # how many tokens are the prompt; 0 in plain text
    references: list = ()  # data to text: the right answers
    notes: tuple = ()  # what of the example the chat template leaves out
    choices: list = None  # multiple choice: (token ids, text) of each
    answer: int = None  # the place of the right one

    @property
    def prompt_ids(self):
        return self.input_ids[: self.prompt]


def tokenize_prompt(messages, tokenizer):
    """A conversation up to where the assistant's next turn goes, as token ids."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return prefix_of(tokenizer) + tokenizer.encode(text)


def tokenize_labels(labels, tokenizer):
    """
    {label: its token ids}. One token per label is fastest, so no end-of-turn token follows, unless
    one label begins another ("1" and "10"): then the shorter one would always be the likelier.
    Raises ValueError for labels that are the same tokens.
    """
    ids = {label: tokenizer.encode(label) for label in labels}
    in_order = sorted(labels, key=ids.get)  # those that a label begins follow it at once
    for a, b in itertools.pairwise(in_order):
        if ids[a] == ids[b]:
            raise ValueError(f"to the tokenizer, the labels {a!r} and {b!r} are one: rename one")
    if any(ids[b][: len(ids[a])] == ids[a] for a, b in itertools.pairwise(in_order)):
        ids = {label: tokens + [tokenizer.eos_id] for label, tokens in ids.items()}
    return ids


def tokenize_choices(prompt, choices, tokenizer):
    """
    (token ids of a prompt, a list of those of each choice). A choice follows after a blank, without
    a chat template, and blanks at the prompt's end count with it, as in lm-evaluation-harness.
    """
    begin = prompt.rstrip()
    ids = tokenizer.encode(begin)
    ids = tokenizer.prefix_of(ids) + ids or [tokenizer.eos_id]
    return ids, [tokenizer.encode_cut(f"{prompt} {text}", [len(begin)])[1] for text in choices]


def joined(pieces, train_on_prompt):
    """(token ids, labels) of pieces, (token ids, whether they are learnt; None: in no case)."""
    ids, targets = [], []
    for tokens, yes in pieces:
        ids += tokens
        learnt = yes or train_on_prompt and yes is False
        targets += tokens if learnt else [-100] * len(tokens)
    return ids, targets


def encode(examples, tokenizer, block_size, label_prompt="", label_ids=None, train_on_prompt=False):
    """
    Turn examples into (list of Encoded, how many were cut).

    block_size: most tokens per row. A longer example is cut on the left, so its last answer stays
    whole; of a classification example, only the text is cut; plain text fills several rows.
    label_ids: from tokenize_labels. Raises ValueError without room, or if a chat template refuses.
    """
    encoded, cut = [], 0
    asked = label_ids and Question(tokenizer, label_prompt or LABEL_PROMPT, label_ids, block_size)
    for example in examples:
        kind, label = format_of(example), example.get("label")
        shortened, choices, notes = False, [], ()
        if kind == "classification":
            question, shortened = asked.tokenize(example["text"], example.get("text_b", ""))
            pieces, label = [(question, False), (label_ids[label], True)], sys.intern(label)
        elif kind == "multiple_choice":
            prompt, choices = tokenize_choices(example["prompt"], example["choices"], tokenizer)
            pieces = [(prompt, False), (choices[example["answer"]], True)]
        else:
            pieces, notes = segments(example, tokenizer)

        ids, targets = joined(pieces, train_on_prompt)
        if kind in ("text", "code"):
            # A row's first token is the last of the row before, so that each is predicted once.
            for i in range(0, len(ids) - 1, block_size - 1):
                encoded.append(Encoded(ids[i : i + block_size], targets[i : i + block_size]))
            continue

        answer = pieces[-1][0]
        longest = max(choices or [answer], key=len)
        if len(longest) >= block_size:
            begin = tokenizer.decode(longest[:20])
            raise ValueError(
                f"the answer that begins with {begin!r} has {len(longest)} tokens, and "
                f"block_size={block_size} must hold it and some prompt: raise block_size"
            )
        room = block_size - len(longest) + len(answer)
        cut += shortened or len(ids) > room
        row = Encoded(ids[-room:], targets[-room:], label, notes=notes)
        if kind != "messages":
            row.prompt = min(len(ids), room) - len(answer)
        if kind in ("prompt", "generation"):
            texts = example.get("references") or [example["completion"].strip()]
            row.references = list(map(tokenizer.without_end, texts))
        if choices:
            row.choices, row.answer = list(zip(choices, example["choices"])), example["answer"]
        encoded.append(row)
    return encoded, cut


def check_vocabulary(encoded, vocab_size, folder):
    """Raise ValueError for a token in any split that the folder's model does not have."""
    largest = max(max(row.input_ids) for rows in encoded.values() for row in rows)
    if largest >= vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer produced token {largest}, but the model's vocabulary has "
            f"only {vocab_size} tokens: take the model's own tokenizer"
        )


def collate(encoded, pad_id):
    """A list of Encoded as (input_ids, labels), (B, T) padded on the right, for other models."""
    columns = (([e.input_ids for e in encoded], pad_id), ([e.labels for e in encoded], -100))
    return tuple(pad_sequence(map(torch.tensor, rows), True, value) for rows, value in columns)


class Batches:
    """
    batches[k], k = 0, 1, 2, …, is a list of rows: a pure function of the arguments and k, so that a
    resumed run needs nothing but its step. Epochs follow each other without end; a batch may hold
    the end of one and the beginning of the next.

    batch_size: rows per batch, or all if there are fewer. group_by_length: sort the rows of 16
    batches at a time by length, so that each batch has rows of similar length. shuffle: draw the
    order anew each epoch, or once for all epochs.
    """

    def __init__(self, rows, batch_size, seed, group_by_length=False, shuffle=True):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.group_by_length, self.shuffle = group_by_length, shuffle
        self.epoch, self.order, self.orders = math.inf, [], None  # of the last that was asked for

    def __getitem__(self, k):
        size = min(self.batch_size, len(self.rows))
        places = (divmod(place, len(self.rows)) for place in range(k * size, (k + 1) * size))
        return [self.order_of(epoch)[place] for epoch, place in places]

    def order_of(self, epoch):
        """The rows in the order of an epoch, counted from 0."""
        if epoch < self.epoch:
            self.epoch, self.orders = -1, self.draw_orders()
        while self.epoch < epoch:
            self.epoch, self.order = self.epoch + 1, next(self.orders)
        return self.order

    def draw_orders(self):
        rng = random.Random(self.seed)
        order = rng.sample(self.rows, len(self.rows))
        while True:
            yield grouped(order, self.batch_size, rng) if self.group_by_length else order[::-1]
            if self.shuffle:
                order = rng.sample(self.rows, len(self.rows))


def grouped(rows, batch_size, rng):
    """
    Shuffled rows in groups of similar length, the groups in random order. A group of less than
    batch_size comes last: it would shift later groups.
    """
    size = 16 * batch_size
    groups = []
    for i in range(0, len(rows), size):
        pool = sorted(rows[i : i + size], key=lambda row: len(row.input_ids))
        groups += [pool[j : j + batch_size] for j in range(0, len(pool), batch_size)]
    short = [group for group in groups if len(group) < batch_size]
    groups = rng.sample(groups, len(groups))
    whole = [group for group in groups if len(group) == batch_size]
    return list(itertools.chain(*short, *whole))[::-1]


def supervised(rows):
    """How many positions of a list of Encoded count in its mean loss."""
    return sum(label != -100 for row in rows for label in row.labels[1:])


def micro_batches(rows, size=0, rank=0, world_size=1, count=supervised):
    """
    Split a batch into a list of (rows, share). share: the fraction of the batch's supervised
    positions, so that losses times shares add up to the batch's loss. size: most rows per
    micro-batch; 0 means all. count: counts the supervised positions of rows.

    With several processes, process `rank` gets its own rows, in as many micro-batches as the others
    get, since all must compute in step; one without rows gets any row, with share 0.
    """
    total = count(rows)
    most = math.ceil(len(rows) / world_size)  # rows of a process
    parts = cut(cut(rows, world_size)[rank], math.ceil(most / (size or most)))
    return [(part, count(part) / total) if part else (rows[:1], 0.0) for part in parts]


def cut(rows, number):
    """Rows in order, in a number of lists as equal in size as can be, the larger ones first."""
    size, larger = divmod(len(rows), number)
    ends = [0, *itertools.accumulate(size + (i < larger) for i in range(number))]
    return [rows[start:end] for start, end in itertools.pairwise(ends)]
