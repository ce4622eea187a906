"""
Data sets as their authors give them out, in whole folders; and data sets of the hub.

    read_folder(path)    GLUE, CoNLL-2003, JNLPBA, E2E, Reuters-21578; or train, dev, test files
    read_hub(name)       owner/name or owner/name:config, by the library `datasets`

Both return (splits, task). splits: {"train", "dev", "test"}, each a list of examples as in
tables.py and jsonl.py, or {"text", "labels"} where a text may have any number of labels; the list
is empty where the set has no such split, or one without labels. MNLI has its mismatched dev
examples as "mismatched" too. task: the GLUE task, a key of GLUE in support/tasks/scores.py, or
None.
"""

import html
import os
import re
from functools import partial
from pathlib import Path

from support.tasks.scores import GLUE
from support.text import tables
from support.text.jsonl import read_jsonl
from support.text.tables import read_conll, read_glue, read_table

OFFICIAL = (  # files by split, what reads them, and the GLUE task
    (dict(train="eng.train", dev="eng.testa", test="eng.testb"), read_conll, None),  # CoNLL-2003
    (dict(train="Genia4ERtask1.iob2", test="Genia4EReval1.iob2"), read_conll, None),  # JNLPBA
    (dict(train="train.tsv", dev="devel.tsv", test="test.tsv"), read_conll, None),  # BioNLP's sets
    (  # E2E
        dict(train="trainset.csv", dev="devset.csv", test="testset_w_refs.csv"),
        read_table,
        None,
    ),
    (  # MRPC before GLUE, which takes its dev examples from train
        dict(train="msr_paraphrase_train.txt", test="msr_paraphrase_test.txt"),
        partial(read_glue, task="mrpc"),
        "mrpc",
    ),
)
STEMS = {"train": ["train"], "dev": ["dev", "valid", "validation", "val"], "test": ["test"]}
READERS = {".jsonl": read_jsonl, ".csv": read_table, ".parquet": read_table, ".txt": read_conll}
GLUE_FOLDERS = "CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI"
KNOWN = "; ".join(
    [
        f"GLUE (train.tsv and dev.tsv, in a folder called {GLUE_FOLDERS})",
        *(" + ".join(files.values()) for files, *_ in OFFICIAL),
        "Reuters-21578 (reut2-000.sgm to reut2-021.sgm)",
        f"train, dev (or valid) and test, of which train is needed, in {', '.join(READERS)}",
    ]
)

# The splits of Reuters-21578, by its README (section VIII): the attribute that decides, its values
# for train and test, and the values of TOPICS.
REUTERS = {
    "modapte": ("LEWISSPLIT", "TRAIN", "TEST", ("YES",)),
    "modlewis": ("LEWISSPLIT", "TRAIN", "TEST", ("YES", "NO")),
    "modhayes": ("CGISPLIT", "TRAINING-SET", "PUBLISHED-TESTSET", ("YES", "NO", "BYPASS")),
}

HUB_NAME = re.compile(r"(?P<base>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[^@]+))?(@(?P<rev>.+))?")
HUB_SPLITS = {
    "train": ["train"],
    "dev": ["validation", "validation_matched", "dev", "valid"],
    "test": ["test", "test_matched"],
    "mismatched": ["validation_mismatched"],
}
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
HUB_LAYOUTS = (  # beside those of read_table
    {"tokens": "words", "ner_tags": "tags"},
    {"meaning_representation": "prompt", "human_reference": "references"},
    {"meaning_representation": "prompt", "human_references": "references"},
    *({one: "text", two: "text_b", key: key} for one, two in PAIRS for key in ("label", "score")),
    *tables.LAYOUTS,
    {"sentence": "text", "label": "label"},
    {"text": "text", "labels": "labels"},
)
CLASSES = ("label", "labels", "ner_tags")  # columns that may hold classes by number
NUMBERED = ("cola", "sst2", "mrpc", "qqp", "wnli")  # their TSV files, and scores.glue, say 0 and 1


# --------------------------------------------------------------------------------------- folders


def read_folder(path):
    """
    The (splits, task) of a data set in the folder `path`.

    GLUE's task is told by the folder's name, one of GLUE_FOLDERS in any case, with or without the
    dash. Raises FileNotFoundError where files are missing; ValueError for a folder of no known
    layout, and as the files' readers do.
    """
    folder = Path(os.path.abspath(os.path.expanduser(path)))  # "." has no name
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: give one that holds a data set")
    names = {file.name for file in folder.iterdir()}
    if any(re.fullmatch(r"reut2-\d+\.sgm", name) for name in names):
        return read_reuters(folder), None

    files, read, task = layout_of(folder, names)
    if missing := sorted(set(files.values()) - names):
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: unpack the data set's archive again, or copy "
            f"what is missing there"
        )
    splits = {split: read(folder / name) for split, name in files.items()}
    return {"train": [], "dev": [], "test": []} | splits, task


def layout_of(folder, names):
    """
    How the files `names` of a folder are read: (their names by split, a function of a path, task).
    """
    if "devel.tsv" not in names and names & {"train.tsv", "dev.tsv", "dev_matched.tsv"}:
        task = re.sub("[-_ ]", "", folder.name).lower()
        if task not in GLUE:
            raise ValueError(
                f"{folder} has GLUE's files, but not the name of a task: call it {GLUE_FOLDERS}"
            )
        files = {"train": "train.tsv", "dev": "dev_matched.tsv" if task == "mnli" else "dev.tsv"}
        if "dev_mismatched.tsv" in names:
            files["mismatched"] = "dev_mismatched.tsv"
        return files, partial(read_glue, task=task), task

    for files, read, task in OFFICIAL:
        if names & set(files.values()):
            return files, read, task

    files = {}
    for split, stems in STEMS.items():
        found = [stem + suffix for stem in stems for suffix in READERS if stem + suffix in names]
        if len(found) > 1:
            raise ValueError(f"{folder} holds {' and '.join(found)}: keep one of them as {split}")
        if found:
            files[split] = found[0]
    if "train" not in files:
        raise ValueError(f"{folder} is in no layout that is known. Known are: {KNOWN}")
    return files, lambda path: READERS[path.suffix](path), None


# --------------------------------------------------------------------------------------- Reuters


def read_reuters(folder):
    """
    Reuters-21578 (Lewis, distribution 1.0), as {"text": title and body, "labels": topics}.

    Its split ModApte; in a folder called ModLewis or ModHayes, that one. As in Yang & Liu (SIGIR
    1999) and most work since, labels are the topics that occur in both train and test, and
    documents without any are left out: ModApte keeps 90 topics, 7,770 documents for train (Yang &
    Liu: 7,769) and 3,019 for test. Lewis' README asks to keep all 3,299: compare with results on
    the same documents only.
    """
    paths = sorted(folder.glob("reut2-*.sgm"))
    if len(paths) != 22:
        raise FileNotFoundError(
            f"{folder} holds {len(paths)} of Reuters-21578's 22 files, reut2-000.sgm to "
            f"reut2-021.sgm: unpack its archive again"
        )
    by, train, test, topics = REUTERS.get(folder.name.lower(), REUTERS["modapte"])
    splits = {"train": [], "dev": [], "test": []}
    for path in paths:
        for attributes, example in reuters_documents(path):
            split = {train: "train", test: "test"}.get(attributes[by])
            if split and attributes["TOPICS"] in topics:
                splits[split].append(example)

    topics = {split: {x for e in splits[split] for x in e["labels"]} for split in splits}
    shared = topics["train"] & topics["test"]
    for examples in splits.values():
        for example in examples:
            example["labels"] = [x for x in example["labels"] if x in shared]
        examples[:] = [example for example in examples if example["labels"]]
    return splits


def reuters_documents(path):
    """
    Yield (attributes, {"text", "labels"}) of each document of an SGML file, which is not XML: it
    has no root, and its control characters are entities that XML forbids; they are left out.
    """
    content = path.read_bytes().decode("latin-1")
    found = list(re.finditer(r"<REUTERS\b([^>]*)>(.*?)(?=<REUTERS\b|\Z)", content, re.DOTALL))
    if not found:
        raise ValueError(f"{path} holds no documents: get the file again")
    for match in found:
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
        parts = re.search(
            "<TOPICS>(.*?)</TOPICS>.*<TEXT[^>]*>(.*?)</TEXT>.*</REUTERS>", match[2], re.DOTALL
        )
        if not parts or not {"TOPICS", "LEWISSPLIT", "CGISPLIT"} <= attributes.keys():
            line = content.count("\n", 0, match.start()) + 1
            raise ValueError(
                f"{path}:{line}: the document that begins here is broken: it needs its attributes, "
                f"TOPICS, TEXT and </REUTERS>; get the file again"
            )
        # A text of TYPE="UNPROC" has neither title nor body.
        fields = re.findall(r"<(TITLE|BODY)>(.*?)</\1>", parts[2], re.DOTALL)
        text = "\n".join(field.strip() for _, field in fields) or parts[2]
        labels = list(dict.fromkeys(re.findall("<D>(.*?)</D>", parts[1])))  # a few occur twice
        yield attributes, {"text": html.unescape(text).strip(), "labels": labels}


# ------------------------------------------------------------------------------------------- hub


def read_hub(name):
    """
    The (splits, task) of a data set of the Hugging Face hub, by the library `datasets`, which keeps
    it in its cache; no code of the data set's is run.

    name: owner/name or owner/name:config, either with @revision; the task is the config's name
    where it is GLUE's. Classes become their names; but those of CoLA, SST-2, MRPC, QQP and WNLI "0"
    and "1", as in the benchmark's files. Rows without a label are left out. Raises ValueError.
    """
    match = HUB_NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is not owner/name or owner/name:config, or with @revision")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name!r} needs datasets ({error}): pip install datasets") from None
    try:
        found = datasets.load_dataset(
            match["base"], match["config"], revision=match["rev"], trust_remote_code=False
        )
    except Exception as error:  # anything that a network, a server or a damaged file causes
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # it only says that something went wrong
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"data set {name!r} could not be read: {reason:.400}") from None

    task = match["config"] if match["config"] in GLUE else None
    splits = {"train": [], "dev": [], "test": []}
    for split, there in HUB_SPLITS.items():
        if source := next((source for source in there if source in found), None):
            where = f"{name}, {source}"
            splits[split] = hub_examples(found[source], where, numbered=task in NUMBERED)
    if not splits["train"]:
        raise ValueError(
            f"data set {name!r} has no labelled examples in a split called train; its splits are "
            f"{', '.join(found)}"
        )
    return splits, task


def hub_examples(data, where, numbered):
    """The labelled examples of a datasets.Dataset. numbered: call the classes "0", "1", …"""
    columns = dict(zip(data.column_names, data.with_format("arrow")[:].columns))
    columns = {name: column.to_pylist() for name, column in columns.items()}
    classes = {}  # their names, by column
    for name in set(CLASSES) & set(columns):
        feature = data.features[name]
        if names := getattr(getattr(feature, "feature", feature), "names", None):
            classes[name] = list(map(str, range(len(names)))) if numbered else names

    header = list(columns)
    if str(getattr(data.features.get("label"), "dtype", "")).startswith("float"):
        if set(columns["label"]) == {-1.0}:  # how GLUE's STS-B has no labels
            return []
        header[header.index("label")] = "score"

    rows = [(where, header)]
    for number, cells in enumerate(zip(*columns.values()), start=1):
        row = dict(zip(columns, cells))
        if not ("label" in classes and row["label"] == -1 or row.get("tokens") == []):
            place = f"{where}, row {number}"
            for name, names in classes.items():
                row[name] = class_names(row[name], names, f"{place}: {name!r}")
            rows.append((place, list(row.values())))
    if len(rows) == 1:
        return []

    found = tables.examples_of(where, iter(rows), HUB_LAYOUTS, tables.OPTIONAL)
    return tables.join_references(found)


def class_names(cell, names, where):
    """The name of a class, or of each in a list. Raises ValueError, beginning with `where`."""
    if isinstance(cell, list):
        return [class_names(part, names, where) for part in cell]
    if cell not in range(len(names)):
        raise ValueError(f"{where} is {cell}, but its classes are 0 to {len(names) - 1}")
    return names[cell]
