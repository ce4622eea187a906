"""
Examples from tables: CSV and parquet files, GLUE's TSV files, CoNLL-2003's columns.

    read_table(path)        CSV or parquet, by the names of its columns
    read_glue(path, task)   train.tsv or dev.tsv of a GLUE task
    read_conll(path)        one word and its tag a line

Each returns a list of dicts: {"text", "label"}, {"text", "text_b", "label"} for pairs, {"text",
"score"} or {"text", "text_b", "score"} for regression, {"prompt", "completion"}, {"prompt",
"references"}, {"instruction", "input"?, "output"}, {"text", "labels"}, or {"words", "tags"}.

Each raises FileNotFoundError for a missing file; ValueError, naming file and line, for one that
can't be read. Names of columns are matched in any case; columns with other names are left out.
"""

import csv
import io
import itertools
import math
import re
from pathlib import Path

from support.text.jsonl import Example, check_tag, check_tags

LAYOUTS = (  # {column: key}; a file has the first layout whose columns it has
    {"instruction": "instruction", "output": "output"},
    {"prompt": "prompt", "completion": "completion"},
    {"mr": "prompt", "ref": "references"},  # E2E (arXiv 1706.09254), one reference a row
    {"text_a": "text", "text_b": "text_b", "label": "label"},
    {"text": "text", "text_b": "text_b", "label": "label"},
    {"text": "text", "label": "label"},
    {"text_a": "text", "text_b": "text_b", "score": "score"},
    {"text": "text", "text_b": "text_b", "score": "score"},
    {"text": "text", "score": "score"},
    {"text": "text", "labels": "labels"},  # lists, which parquet has
    {"words": "words", "tags": "tags"},
)
OPTIONAL = ("input", "group")  # kept beside any layout of LAYOUTS
LISTS = ("words", "tags", "labels")  # of texts; references may be one
ANSWERS = ("output", "completion", "references", "label", "score")

# The TSV files that the GLUE benchmark gives out (arXiv 1804.07461). Each has more columns than
# these: numbers, STS-B's genres, MNLI's parses and single annotators' labels.
SENTENCES = {"sentence1": "text", "sentence2": "text_b"}
GLUE_LAYOUTS = {
    "cola": {"sentence": "text", "label": "label"},
    "sst2": {"sentence": "text", "label": "label"},
    "mrpc": {"#1 string": "text", "#2 string": "text_b", "quality": "label"},
    "stsb": SENTENCES | {"score": "score"},
    "qqp": {"question1": "text", "question2": "text_b", "is_duplicate": "label"},
    "mnli": SENTENCES | {"gold_label": "label"},
    "qnli": {"question": "text", "sentence": "text_b", "label": "label"},
    "rte": SENTENCES | {"label": "label"},
    "wnli": SENTENCES | {"label": "label"},
}
COLA_HEADER = ["source", "label", "annotation", "sentence"]  # its files do not name their columns


def read_table(path):
    """
    The examples of a CSV or parquet file, whose columns are those of one of LAYOUTS.

    CSV is UTF-8 with commas, quotes as in RFC 4180, and a header. Rows with the same "mr" become
    one example with several references.
    """
    readers = {".csv": csv_rows, ".parquet": parquet_rows}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: the name of a table must end in {' or '.join(readers)}")
    return join_references(examples_of(path, reader(path), LAYOUTS, OPTIONAL))


def read_glue(path, task):
    """
    The examples of a GLUE task's train.tsv or dev.tsv (MNLI: also dev_matched.tsv and
    dev_mismatched.tsv), task being a key of GLUE_LAYOUTS. Labels stay as they are written.

    Quotes mean nothing in these files. Some rows of QQP are broken in two; they are left out, as
    is usual, unless they are more than one in a hundred.
    """
    if task not in GLUE_LAYOUTS:
        raise ValueError(f"unknown GLUE task {task!r}: choose {', '.join(GLUE_LAYOUTS)}")
    rows = csv_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE)
    if task == "cola":
        rows = itertools.chain([(path, COLA_HEADER)], rows)
    return list(examples_of(path, rows, [GLUE_LAYOUTS[task]], broken=0.01 * (task == "qqp")))


def read_conll(path):
    """
    Sentences as {"words", "tags"}, from a file in the layout of CoNLL-2003 (Tjong Kim Sang & De
    Meulder, 2003): a word a line, blanks between its columns, the tag in the last one; an empty
    line after each sentence, and a line -DOCSTART- before each document (JNLPBA: ###MEDLINE:…).

    Tags are given as BIO. The original files are IOB1, where B- only parts two neighbours of one
    type; so I-X becomes B-X unless an entity of type X precedes it, which leaves BIO as it is.
    """
    sentences, words, tags, width, first = [], [], ["O"], None, 1
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        cells = re.findall(r"[^ \t\r]+", line)
        if not cells or cells[0] == "-DOCSTART-" or cells[0].startswith("###MEDLINE:"):
            if words:
                sentences.append(Example({"words": words, "tags": tags[1:]}, f"{path}:{first}"))
            words, tags = [], ["O"]
            continue

        first = first if words else number
        width, tag = width or len(cells), cells[-1]
        if len(cells) < 2 or len(cells) != width:
            raise ValueError(
                f"{path}:{number}: {len(cells)} columns, not {max(width, 2)}: give every line a "
                f"word, as many columns as the first line, and a tag in the last one"
            )
        check_tag(tag, f"{path}:{number}")
        begins = tag[0] == "I" and tag[2:] != tags[-1][2:]
        words.append(cells[0])
        tags.append("B" + tag[1:] if begins else tag)

    if not sentences:
        raise ValueError(f"{path} holds no examples")
    return sentences


# ------------------------------------------------------------------------------------------ rows


def read_text(path):
    """A file's text, without a byte order mark."""
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give the path of a file") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 ({error.reason}): save the file as UTF-8"
        ) from None


def csv_rows(path, **dialect):
    """Yield (file and line, list of cells) of each row. The first one is the header."""
    reader, end = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, **dialect), 0
    try:
        for cells in reader:
            where, end = f"{path}:{end + 1}", reader.line_num  # a quoted cell may have line breaks
            if cells:
                yield where, cells
    except csv.Error as error:
        raise ValueError(
            f"{path}:{end + 1}: the row that begins here can't be read ({error}): close every "
            f'quote, and write a quote inside quotes as ""; or use JSONL'
        ) from None


def parquet_rows(path):
    """Yield (file and row, list of cells) of each row. The first one is the header."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow ({error}): pip install pyarrow") from None
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: give the path of a file")
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a parquet file, or is damaged ({reason:.200})") from None

    yield path, table.column_names
    for number, cells in enumerate(zip(*(column.to_pylist() for column in table.columns)), 1):
        yield f"{path}, row {number}", cells


def examples_of(path, rows, layouts, optional=(), broken=0):
    """
    Yield an example for each row, by the first of the layouts whose columns are there.

    broken: the share of rows with another number of cells that may be left out.
    """
    where, header = next(rows, (path, []))
    names = [name.strip().lower() for name in header]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{where}: the column {twice[0]!r} occurs twice: rename or remove one")
    layout = next((layout for layout in layouts if layout.keys() <= set(names)), None)
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        raise ValueError(
            f"{where}: the only column is {names[0]!r:.300}: separate columns with commas"
        )
    if layout is None:
        needed = "; ".join(" + ".join(layout) for layout in layouts)
        have = " ".join(", ".join(names).split()) or "(none)"  # a quoted name may have line breaks
        raise ValueError(f"{where}: the columns are {have:.300}; these are needed: {needed}")
    layout = layout | {name: name for name in optional if name in names}

    read = left_out = 0
    for where, cells in rows:
        if len(cells) != len(names):
            left_out += 1
            if not broken:
                raise ValueError(
                    f"{where}: {len(cells)} cells, but {len(names)} columns: give each column one"
                )
            continue
        row = dict(zip(names, cells))
        values = {key: value_of(row[name], key, name, where) for name, key in layout.items()}
        if "tags" in values:
            check_tags(values["words"], values["tags"], where)
        yield Example(values, where)
        read += 1

    if left_out > broken * (read + left_out):
        raise ValueError(f"{path}: {left_out} of {read + left_out} rows lack cells: get it again")
    if not read:
        raise ValueError(f"{path} holds no examples")


def join_references(examples):
    """A list of the examples; those with references joined, so that each prompt occurs once."""
    examples, joined = list(examples), {}
    if "references" not in examples[0]:
        return examples
    for example in examples:
        whole = Example(example | {"references": []}, example.where)
        first = joined.setdefault(example["prompt"], whole)
        found = example["references"]
        first["references"] += [found] if isinstance(found, str) else found
    return list(joined.values())


def value_of(cell, key, name, where):
    """
    A cell's text; or its number, if the key is "score"; or its list of texts, if the key is one of
    LISTS. Raises ValueError, beginning with `where`.
    """
    if isinstance(cell, int):  # parquet: 0, 1 are common labels
        cell = str(cell)
    if key == "score" and isinstance(cell, float):
        cell = repr(cell)
    if key in LISTS and not isinstance(cell, list):
        raise ValueError(f"{where}: {name!r} is {type(cell).__name__}, not a list of texts")
    texts = cell if isinstance(cell, list) and key in (*LISTS, "references") else [cell]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where}: {name!r} is {type(text).__name__}, not text")
    if key in ANSWERS and not "".join(texts).strip():
        raise ValueError(f"{where}: {name!r} is empty: fill it in, or remove the row")
    if key != "score":
        return cell

    try:
        if math.isfinite(score := float(cell)):
            return score
    except ValueError:
        pass
    raise ValueError(f"{where}: {name!r} is {cell!r:.40}, not a number")
