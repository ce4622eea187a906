"""
Splits: which examples train each level, and which are tested.

    load_examples(path or name)  ->  list of dicts, all of one format (jsonl.py)
    split(examples, 0.2)         ->  (train, val), stratified, groups kept whole
    load_splits(config)          ->  Splits: {"train", "val", "test"}, question, labels
"""

import itertools
import os
import random
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from support.text import official, tables
from support.text.datasets import BUILT_IN
from support.text.jsonl import Example, columns_of, count_shared, format_of, read_jsonl

LABELS = {"classification": "label", "multi_label": "labels", "tagging": "tags"}
NUMBER = re.compile(r"-?\d*\.?\d+")
LABEL_PROMPT = (
    "Which of these labels fits the text: {labels}? Answer with the label only.\n\n{text}"
)


def load_examples(path_or_name, columns=None):
    """
    Read a file (JSONL, a JSON array, .csv, .tsv, .parquet, or CoNLL's columns in .conll or .bio) or
    a built-in data set (a key of BUILT_IN) as a list of dicts. columns: as in jsonl.renamed, for
    files whose columns have names. Raises FileNotFoundError, or ValueError, which names file and
    line, for content that can't be trained on.
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
    # read_table refuses .xlsx, with advice
    readers = dict.fromkeys((".csv", ".parquet", ".tsv", ".xlsx"), tables.read_table)
    readers |= {".conll": tables.read_conll, ".bio": tables.read_conll}
    return readers.get(path.suffix.lower(), read_jsonl)(path, columns)


def split(examples, val_fraction=0.2, seed=0, grouped=True, setting="val_fraction"):
    """
    Shuffle and split into (train, val), label by label (stratified). grouped: keep examples of one
    "group" together, which may make val a little smaller. setting: the fraction's name in messages.
    Raises ValueError if train or val would be empty, or would lack a label that the other has.
    """
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    labels, groups, first = {}, {}, {}
    for i in order:
        labels.setdefault(examples[i].get("label"), []).append(i)
    for i, example in enumerate(examples):
        leader = first.setdefault(example.get("group", i), i) if grouped else i
        groups.setdefault(leader, []).append(i)

    # In shuffled order, each group joins val if val still lacks that many examples of each label.
    lacking = Counter({label: round(val_fraction * len(rows)) for label, rows in labels.items()})
    chosen = set()
    for members in (groups[i] for i in order if i in groups):
        counts = Counter(examples[i].get("label") for i in members)
        if all(count <= lacking[label] for label, count in counts.items()):
            lacking.subtract(counts)
            chosen.update(members)

    train, val = [], []
    for label, rows in labels.items():
        if not 0 < len(chosen.intersection(rows)) < len(rows):
            what = f"label {label!r}" if label is not None else "the data"
            least = 0.5 / min(map(len, labels.values()))  # half an example is rounded to none
            fits = f", or a fraction above {least:.3g}" * (least < 0.5 and val_fraction <= least)
            none = "; methods without an upper level (dora, lora, ft) need none: --val_fraction=0"
            none *= setting == "val_fraction"
            number = "; for numbers give --task=regression" * bool(NUMBER.fullmatch(str(label)))
            raise ValueError(
                f"{setting}={val_fraction} of the {len(rows)} examples of {what} leaves an "
                f"empty split: give more examples (groups stay whole){fits}{none}{number}"
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
    """A config's Splits; val_fraction of train becomes a missing val split. Raises ValueError."""
    question, glue, columns = LABEL_PROMPT, None, columns_of(vars(config))
    if config.train_file:
        files = {"train": config.train_file, "val": config.val_file}
        splits = {n: load_examples(file, columns) if file else [] for n, file in files.items()}
        whole, splits["test"] = splits["train"], []
        if config.test_fraction:
            options = dict(seed=0, setting="test_fraction")
            splits["train"], splits["test"] = split(whole, config.test_fraction, **options)
    elif config.data in BUILT_IN:
        whole, question = load_examples(config.data), BUILT_IN[config.data].question
        splits = sample_built_in(config, whole)
    else:
        folder = os.path.isdir(os.path.expanduser(config.data))
        read = official.read_folder if folder else official.read_hub
        given, glue = read(config.data, columns)
        splits, whole = sample_official(config, given), given["train"]
    if config.test_file:
        splits["test"] = load_examples(config.test_file, columns)

    if not splits["val"] and config.val_fraction > 0:
        splits["train"], splits["val"] = split(splits["train"], config.val_fraction, config.seed)
    if config.held_fraction > 0:
        options = dict(seed=config.seed, setting="held_fraction")
        splits["train"], held = split(splits["train"], config.held_fraction, **options)
        splits = {"train": splits.pop("train"), "val": splits.pop("val"), "held": held, **splits}
    # From the whole data set, since a small sample may lack a label.
    labels = sorted({label for example in whole for label in labels_of(example)})
    check_splits(splits, labels)
    for name in ("train", "val"):
        splits[name] = [single for example in splits[name] for single in one_reference(example)]
    return Splits(splits, config.label_prompt or question, labels, glue)


def sample_built_in(config, examples):
    """The train and test examples of a built-in data set. val is split off later."""
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


def sample_official(config, given):
    """
    The splits for a run, from the `given` ones of its data set. With a val_fraction, by the papers'
    rule, val comes from train, and dev stands in for a missing test set. Without one, val is dev.
    """
    if config.val_fraction > 0:
        splits = {"train": given["train"], "val": [], "test": given["test"] or given["dev"]}
    else:
        splits = {"train": given["train"], "val": given["dev"], "test": given["test"]}

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
    """The list of an example's labels or tags; [] if its format has none."""
    labels = example.get(LABELS.get(format_of(example)), [])
    return [labels] if isinstance(labels, str) else labels


def one_reference(example):
    """Copies of an example, each with one of its references; or the example itself."""
    if "references" not in example:
        return [example]
    where, notes = getattr(example, "where", "an example"), getattr(example, "notes", ())
    texts = example["references"]
    return [Example(example | {"references": [text]}, where, notes) for text in texts]


def check_splits(splits, labels):
    """
    Raise ValueError unless all splits have one format and no label outside `labels`. Classification
    also needs two labels in train, and all of train's labels in val.
    """
    firsts = {name: examples[0] for name, examples in splits.items() if examples}
    formats = {format_of(example) for example in firsts.values()}
    if len(formats) > 1:
        which = ", ".join(f"{name} is {format_of(first)}" for name, first in firsts.items())
        raise ValueError(f"the files differ in format: {which}")
    with_b = [name for name, first in firsts.items() if "text_b" in first]
    if 0 < len(with_b) < len(firsts):
        raise ValueError(f"text_b, for pairs, is only in the examples of {' and '.join(with_b)}")

    known = set(labels)
    for name, example in ((name, e) for name, examples in splits.items() for e in examples):
        if unseen := set(labels_of(example)) - known:
            where = f"{example.where}: " if hasattr(example, "where") else ""
            raise ValueError(f"{where}{name} has the label {min(unseen)!r}, which train lacks")

    if formats & {"multi_label", "tagging"} and not set(labels) - {"O"}:
        raise ValueError("no example has a label" if not labels else "all words are tagged O")
    if formats != {"classification"}:
        return
    needed = {label for example in splits["train"] for label in labels_of(example)}
    if len(needed) < 2:
        only = f"all train examples have the label {needed.pop()!r}"
        raise ValueError(f"{only}: classification needs two labels or more")
    lacking = needed.difference(*(labels_of(example) for example in splits["val"]))
    if splits["val"] and lacking:
        raise ValueError(f"val lacks the label {min(lacking)!r}: give it examples of every label")


class Examples(NamedTuple):
    """What remains known of the examples when they have become rows."""

    counts: dict  # {split: how many}
    form: str  # their format, a key of jsonl.FORMATS
    pairs: bool | None  # whether they are pairs of texts; None if only some are
    labels: Counter  # {label: in how many examples}, of classification
    notes: Counter  # {what a file's reader left out or changed: in how many}
    shared: list  # a message for each file that holds lines of an earlier one

    @classmethod
    def of(cls, splits, config=None):
        notes = (getattr(x, "notes", ()) for examples in splits.values() for x in examples)
        pairs = {"text_b" in example for example in splits["train"]}
        labels = (x["label"] for examples in splits.values() for x in examples if "label" in x)
        return cls(
            {name: len(examples) for name, examples in splits.items()},
            format_of(splits["train"][0]),
            pairs.pop() if len(pairs) == 1 else None,
            Counter(labels),
            Counter(itertools.chain(*notes)),
            [*shared(splits, config)] if config else [],
        )


def shared(splits, config):
    """Messages on how many lines of val_file and test_file an earlier file also holds."""
    first = "train_file" if config.train_file else "the training data"
    files = {first: splits["train"] + splits.get("held", [])}
    if not config.val_file:  # then val is a part of it
        files[first] += splits["val"]
    others = {"val_file": "val", "test_file": "test", "test_fraction": "test"}
    files |= {n: splits[name] for n, name in others.items() if getattr(config, n)}
    for (name, earlier), (later_name, later) in itertools.combinations(files.items(), 2):
        if count := count_shared(later, earlier):
            yield f"{count} of {len(later)} lines of {later_name} are also in {name}"


def left_out(examples, encoded, labels):
    """
    Messages that count what files' readers and the chat template left out of examples or changed,
    and that name labels that look alike. examples: Examples; encoded: {split: rows}.
    """
    rows = itertools.chain(*encoded.values())
    counts = examples.notes + Counter(note for row in rows for note in getattr(row, "notes", ()))
    total = sum(examples.counts.values())
    for note, count in counts.items():
        yield f"{note} in {count} of {total} examples"
    for _, alike in itertools.groupby(sorted(labels, key=str.casefold), str.casefold):
        if len(names := [*alike]) > 1:
            yield f"labels that differ by case alone: {', '.join(names)}"


def compared(encoded, unknown_id):
    """Messages on many unknown tokens, and on splits, {name: rows}, of unlike lengths."""
    shares, lengths = {}, {}
    for name, rows in encoded.items():
        if len(rows) >= 10:  # fewer say little
            each = [(len(ids), ids.count(unknown_id)) for ids in (row.input_ids for row in rows)]
            sizes, unknown = zip(*each)
            shares[name], lengths[name] = sum(unknown) / sum(sizes), statistics.median(sizes)
    if max(shares.values(), default=0) > 0.05:
        listed = ", ".join(f"{share:.0%} of {name}" for name, share in shares.items())
        yield f"unknown tokens: {listed}: the model can't tell such texts apart"
    if max(lengths.values(), default=0) > 2 * min(lengths.values(), default=0):
        listed = ", ".join(f"{length:.0f} in {name}" for name, length in lengths.items())
        yield f"tokens in a row (median): {listed}: the splits are unlike"
