"""
Data sets in their authors' own folders, and data sets of the hub.

    read_folder(path)    GLUE, CoNLL-2003, JNLPBA, E2E, Reuters-21578; train, dev, test files; what
                         the library `datasets` saved (save_to_disk)
    read_hub(name)       owner/name or owner/name:config, by that library

Both return (splits, task). splits: {"train", "dev", "test"}, each a list of examples in a format of
jsonl.py, empty for a missing or unlabelled split. task: a key of scores.GLUE, or None. columns:
{key of an example: its name in the files}, for the hub and a user's own files.
"""

import functools
import html
import os
import re
from pathlib import Path

from support.tasks.scores import GLUE
from support.text.jsonl import read_jsonl, renamed
from support.text.tables import examples_of, read_conll, read_glue, read_table

OFFICIAL = {  # a folder with one of these files must hold all of them
    "conll2003": dict(train="eng.train", dev="eng.testa", test="eng.testb"),
    "jnlpba": dict(train="Genia4ERtask1.iob2", test="Genia4EReval1.iob2"),
    "bionlp": dict(train="train.tsv", dev="devel.tsv", test="test.tsv"),
    "e2e": dict(train="trainset.csv", dev="devset.csv", test="testset_w_refs.csv"),
    # MRPC before GLUE, which takes its dev examples from train
    "mrpc": dict(train="msr_paraphrase_train.txt", test="msr_paraphrase_test.txt"),
}
NAMES = {  # of files and of the hub's splits
    "train": ["train"],
    "dev": ["validation", "dev", "valid", "val", "validation_matched"],
    "test": ["test", "test_matched"],
}
READERS = dict.fromkeys((".jsonl", ".json"), read_jsonl)
READERS |= {".csv": read_table, ".parquet": read_table, ".txt": read_conll}
GLUE_FOLDERS = "CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI"

# The splits of Reuters-21578 (its README, section VIII): the deciding attribute, its values for
# train and test, and the allowed values of TOPICS.
REUTERS = {
    "modapte": ("LEWISSPLIT", "TRAIN", "TEST", ("YES",)),
    "modlewis": ("LEWISSPLIT", "TRAIN", "TEST", ("YES", "NO")),
    "modhayes": ("CGISPLIT", "TRAINING-SET", "PUBLISHED-TESTSET", ("YES", "NO", "BYPASS")),
}
PART = r"<{0}\b[^>]*>(.*?)</{0}>"
REUTERS_TAGS = "<REUTERS <TOPICS </TOPICS <TEXT( <TITLE </TITLE)?( <BODY </BODY)? </TEXT </REUTERS"

HUB_NAME = re.compile(r"(?P<base>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[^@]+))?(@(?P<rev>.+))?")
NUMBERED = ("cola", "sst2", "mrpc", "qqp", "wnli")  # TSV files and scores.glue call classes 0 and 1


def read_folder(path, columns=None):
    """
    The (splits, task) of a data set's folder. A GLUE task's folder must be called one of
    GLUE_FOLDERS, in any case, with or without the dash. Raises FileNotFoundError for missing files,
    ValueError for an unknown layout or a file that can't be read.
    """
    folder = Path(os.path.abspath(os.path.expanduser(path)))  # "." has no name
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: give one that holds a data set")
    names = {file.name for file in folder.iterdir()}
    splits = {"train": [], "dev": [], "test": []}
    if names & {"dataset_dict.json", "state.json"}:
        return splits_of(loaded(folder, "load_from_disk", str(folder)), folder, None, columns), None
    if any(re.fullmatch(r"reut2-\d+\.sgm", name) for name in names):
        if columns:
            raise ValueError(f"{folder}: SGML has no columns: leave {[*columns.values()]} out")
        return splits | read_reuters(folder), None

    files, task = files_of(folder, names)
    if missing := sorted(set(files.values()) - names):
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: unpack the data set's archive again, or copy "
            f"what is missing there"
        )
    for split, name in files.items():
        by_name = READERS.get(Path(name).suffix, read_conll)
        read = functools.partial(read_glue, task=task) if task else by_name
        splits[split] = read(folder / name, columns=columns)
    return splits, task


def files_of(folder, names):
    """({split: its file's name}, GLUE task or None) of a folder that holds the files `names`."""
    if "devel.tsv" not in names and names & {"train.tsv", "dev.tsv", "dev_matched.tsv"}:
        task = re.sub("[-_ ]", "", folder.name).lower()
        if task not in GLUE:
            raise ValueError(f"{folder} has GLUE's files, but no task name: call it {GLUE_FOLDERS}")
        dev = "dev_matched.tsv" if task == "mnli" else "dev.tsv"
        return {"train": "train.tsv", "dev": dev}, task

    for name, files in OFFICIAL.items():
        if names & set(files.values()):
            return files, name if name in GLUE else None

    files = {}
    for split, stems in NAMES.items():
        present = [stem + suffix for stem in stems for suffix in READERS if stem + suffix in names]
        if len(present) > 1:
            raise ValueError(f"{folder} holds {' and '.join(present)}: keep one of them as {split}")
        if present:
            files[split] = present[0]
    if "train" not in files:
        known = "; ".join(" + ".join(files.values()) for files in OFFICIAL.values())
        raise ValueError(
            f"{folder} is in no layout that is known. Known are: GLUE (train.tsv and dev.tsv, in a "
            f"folder called {GLUE_FOLDERS}); {known}; Reuters-21578 (reut2-000.sgm to "
            f"reut2-021.sgm); train, and perhaps dev and test, in {', '.join(READERS)}"
        )
    return files, None


def read_reuters(folder):
    """
    Reuters-21578 (Lewis, distribution 1.0) as {"text": title and body, "labels": topics}, split by
    ModApte, or by the folder's name ModLewis or ModHayes.

    Yang & Liu (SIGIR 1999) and most work since keep the topics that occur in both train and test,
    and the documents that have one: for ModApte 90 topics, 7,770 documents in train (Yang & Liu:
    7,769) and 3,019 in test. Lewis' README asks to keep all 3,299, so results may not compare.
    """
    paths = sorted(folder.glob("reut2-*.sgm"))
    if len(paths) != 22:
        raise FileNotFoundError(
            f"{folder} holds {len(paths)} of Reuters-21578's 22 files, reut2-000.sgm to "
            f"reut2-021.sgm: unpack its archive again"
        )
    by, train, test, given = REUTERS.get(folder.name.lower(), REUTERS["modapte"])
    splits = {"train": [], "test": []}
    for path in paths:
        for attributes, example in reuters_documents(path):
            split = {train: "train", test: "test"}.get(attributes[by])
            if split and attributes["TOPICS"] in given:
                splits[split].append(example)

    topics = [{x for e in examples for x in e["labels"]} for examples in splits.values()]
    shared = set.intersection(*topics)
    for example in splits["train"] + splits["test"]:
        example["labels"] = [x for x in example["labels"] if x in shared]
    return {split: [e for e in examples if e["labels"]] for split, examples in splits.items()}


def reuters_documents(path):
    """Yield (attributes, {"text", "labels"}) of each document with a text in an SGML file."""
    content, line = path.read_bytes().decode("latin-1"), 1
    if "<REUTERS" not in content:
        raise ValueError(f"{path} holds no documents: get the file again")
    for document in re.split(r"(?=<REUTERS\b)", content):
        begins, line = line, line + document.count("\n")
        tags = re.findall(r"</?(?:REUTERS|TOPICS|TEXT|TITLE|BODY)\b", document)
        if not tags:  # the text before the first document
            continue
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', document.partition(">")[0]))
        parts = [re.search(PART.format(x), document, re.DOTALL) for x in ("TOPICS", "TEXT")]
        whole = re.fullmatch(REUTERS_TAGS, " ".join(tags))  # else a part is another document's
        if not (whole and all(parts) and {"TOPICS", "LEWISSPLIT", "CGISPLIT"} <= attributes.keys()):
            raise ValueError(
                f"{path}:{begins}: the document that begins here is broken: it needs its "
                f"attributes, TOPICS, TEXT and </REUTERS>; get the file again"
            )
        topics, text = (part[1] for part in parts)
        # A text of TYPE="UNPROC" has neither title nor body.
        fields = re.findall(r"<(TITLE|BODY)>(.*?)</\1>", text, re.DOTALL)
        text = "\n".join(field.strip() for _, field in fields) if fields else text
        text = html.unescape(text).strip()
        labels = list(dict.fromkeys(re.findall("<D>(.*?)</D>", topics)))  # a few occur twice
        if text:
            yield attributes, {"text": text, "labels": labels}


def read_hub(name, columns=None):
    """
    The (splits, task) of a data set of the Hugging Face hub, by the library `datasets`, whose cache
    keeps it; none of its code runs. name: owner/name or owner/name:config, either with @revision.

    A config with a GLUE task's name is that task. Classes become their names, or, for the tasks in
    NUMBERED, the "0" and "1" of GLUE's files. Rows without a label are left out. Raises ValueError.
    """
    match = HUB_NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is not owner/name or owner/name:config, or with @revision")
    options = dict(revision=match["rev"], trust_remote_code=False)
    parts = loaded(name, "load_dataset", match["base"], match["config"], **options)
    task = match["config"] if match["config"] in GLUE else None
    return splits_of(parts, name, task, columns), task


def loaded(name, function, *arguments, **options):
    """What a function of `datasets` loads, {split: a datasets.Dataset}. Raises ValueError."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"'{name}' needs datasets ({error}): pip install datasets") from None
    try:
        parts = getattr(datasets, function)(*arguments, **options)
    except Exception as error:  # anything that a network, a server or a damaged file causes
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # its own message only says that something went wrong
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"data set '{name}' could not be read: {reason:.400}") from None
    return {"train": parts} if isinstance(parts, datasets.Dataset) else parts


def splits_of(parts, name, task, columns):
    """{"train", "dev", "test"}: lists of examples, from {split: a datasets.Dataset}."""
    splits = {"train": [], "dev": [], "test": []}
    for split, sources in NAMES.items():
        if source := next((source for source in sources if source in parts), None):
            where = f"{name}, {source}"
            splits[split] = hub_examples(parts[source], where, task in NUMBERED, columns)
    if not splits["train"]:
        raise ValueError(
            f"data set '{name}' has no labelled examples in a split called train; its splits are "
            f"{', '.join(parts)}"
        )
    return splits


def hub_examples(data, where, numbered, columns=None):
    """The labelled examples of a datasets.Dataset. numbered: classes are called "0", "1", …"""
    from datasets import ClassLabel

    classes = {}  # a ClassLabel by column
    names = list(renamed(dict.fromkeys(data.column_names), columns or {}, where))
    data = data.rename_columns(dict(zip(data.column_names, names)))
    for column in {"label", "labels", "ner_tags", "tags"} & {*names}:
        feature = data.features[column]
        feature = getattr(feature, "feature", feature)  # a list's items have their own
        if isinstance(feature, ClassLabel):
            classes[column] = ClassLabel(feature.num_classes) if numbered else feature
    if str(getattr(data.features.get("label"), "dtype", "")).startswith("float"):
        if data.unique("label") == [-1.0]:  # STS-B without labels
            return []
        names[names.index("label")] = "score"

    rows = []
    for number, row in enumerate(data.to_list(), start=1):
        place = f"{where}, row {number}"
        if ("label" in classes and row["label"] == -1) or row.get("tokens") == []:
            continue
        for column, feature in classes.items():
            try:
                row[column] = feature.int2str(row[column])
            except (TypeError, ValueError):
                raise ValueError(
                    f"{place}: {column!r} is {row[column]!r:.60}, but its classes are 0 to "
                    f"{feature.num_classes - 1}"
                ) from None
        rows.append((place, list(row.values())))
    return examples_of(where, iter([(where, names), *rows])) if rows else []
