"""
Examples from tables: CSV and parquet files, GLUE's TSV files, CoNLL-2003's columns.

    read_table(path)        CSV or parquet, by the names of its columns
    read_glue(path, task)   train.tsv or dev.tsv of a GLUE task
    read_conll(path)        one word and its tag a line

Each returns a list of examples in a format of jsonl.py (not conversations or plain text). Each
raises FileNotFoundError, or ValueError, which names file and line. The case of a column's name does
not matter; the examples' notes name unknown columns.
"""

import contextlib
import csv
import io
import re
from pathlib import Path

from support.tasks.scores import GLUE
from support.text.jsonl import OPTIONAL, Example, check_pairs, check_tags, format_of, read_example

PAIRS = (  # the columns of two texts
    ("text_a", "text_b"), ("text", "text_b"), ("sentence1", "sentence2"),
    ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
)  # fmt: skip
KEYS = ("label", "score", "labels")  # labels are lists, which only parquet has
LAYOUTS = (  # {key: column}; a table has the first layout whose columns it has
    {"instruction": "instruction", "output": "output"},
    {"prompt": "prompt", "completion": "completion"},
    {"prompt": "prompt", "choices": "choices", "answer": "answer"},  # lists, as labels below
    {"prompt": "prompt", "choice_0": "choice_0", "answer": "answer"},  # and choice_1, …
    {"prompt": "mr", "references": "ref"},  # E2E (arXiv 1706.09254), one reference a row
    {"prompt": "meaning_representation", "references": "human_reference"},
    {"prompt": "meaning_representation", "references": "human_references"},
    *({"text": one, "text_b": two, key: key} for one, two in PAIRS for key in KEYS),
    {"text": "#1 string", "text_b": "#2 string", "label": "quality"},  # MRPC
    {"text": "question1", "text_b": "question2", "label": "is_duplicate"},  # QQP
    {"text": "sentence1", "text_b": "sentence2", "label": "gold_label"},  # MNLI
    *({"text": "text", key: key} for key in KEYS),
    {"text": "sentence", "label": "label"},
    {"words": "words", "tags": "tags"},
    {"words": "tokens", "tags": "ner_tags"},
)
COLA_HEADER = ["source", "label", "annotation", "sentence"]  # CoLA's files have no header
csv.field_size_limit(2**31 - 1)  # a cell may be as long as any text


def read_table(path):
    """
    The examples of a CSV or parquet file in one of LAYOUTS. CSV is UTF-8 with commas, RFC 4180's
    quotes and a header. Rows with the same "mr" become one example with several references.
    """
    readers = {".csv": csv_rows, ".parquet": parquet_rows}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: the name of a table must end in {' or '.join(readers)}")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: give the path of a file")
    return examples_of(path, reader(path), tidy=reader is csv_rows)


def read_glue(path, task):
    """
    The examples of a TSV file of the GLUE benchmark (arXiv 1804.07461): train.tsv, dev.tsv, MNLI's
    dev_matched.tsv and dev_mismatched.tsv. task: a key of scores.GLUE. Labels stay as written, and
    quotes mean nothing. Rows of QQP that are broken in two are left out, up to one in a hundred.
    """
    if task not in GLUE:
        raise ValueError(f"unknown GLUE task {task!r}: choose {', '.join(GLUE)}")
    rows = list(csv_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE))
    if task == "cola":
        rows.insert(0, (path, COLA_HEADER))
    if task == "qqp" and rows:
        whole = [row for row in rows if len(row[1]) == len(rows[0][1])]
        total, broken = len(rows) - 1, len(rows) - len(whole)
        if broken > 0.01 * total:
            raise ValueError(f"{path}: {broken} of {total} rows lack cells: get it again")
        rows = whole
    return examples_of(path, iter(rows))


def read_conll(path):
    """
    Sentences as {"words", "tags"} from a file in CoNLL-2003's layout (Tjong Kim Sang & De Meulder,
    2003): a word a line, blanks between columns, the tag in the last one; an empty line after each
    sentence; and a line -DOCSTART- before each document (JNLPBA: ###MEDLINE:…).

    Tags become BIO. The original files are IOB1, where B- only parts two neighbours of one type: so
    I-X becomes B-X unless an entity of type X precedes it. BIO stays as it is.
    """
    sentences, sentence, width = [], None, None
    for number, line in enumerate(re.split(r"\r\n?|\n", read_text(path)), start=1):
        cells = re.findall(r"[^ \t]+", line)
        if not cells or cells[0] == "-DOCSTART-" or cells[0].startswith("###MEDLINE:"):
            sentence = None
            continue

        where, tag = f"{path}:{number}", cells[-1]
        width = width or max(2, len(cells))
        if len(cells) != width:
            raise ValueError(
                f"{where}: {len(cells)} columns, not {width}: give every line a word, as many "
                f"columns as the first line, and a tag in the last one"
            )
        try:
            check_tags(cells[:1], [tag])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

        if sentence is None:
            sentence = Example({"words": [], "tags": []}, where)
            sentences.append(sentence)
        words, tags = sentence["words"], sentence["tags"]
        begins = tag[0] == "I" and (not tags or tag[2:] != tags[-1][2:])
        words.append(cells[0])
        tags.append("B" + tag[1:] if begins else tag)

    if not sentences:
        raise ValueError(f"{path} holds no examples")
    return sentences


# ------------------------------------------------------------------------------------------ rows


def read_text(path):
    """A file's text, without byte order marks: files that were joined have one within."""
    content = Path(path).read_bytes()
    try:
        return re.sub(r"(^|[\r\n])\ufeff", r"\1", content.decode())
    except UnicodeDecodeError as error:
        line, reason = content.count(b"\n", 0, error.start) + 1, error.reason
        raise ValueError(f"{path}:{line}: not UTF-8 ({reason}): save the file as UTF-8") from None


def csv_rows(path, **dialect):
    """Yield (file and line, list of cells) of each row, the header first."""
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
    """Yield (file and row, list of cells) of each row, the header first."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow ({error}): pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        header = file.schema_arrow.names
        yield path, header
        used = [header[i] for i in layout_of(header, path).values()]
        table = file.read(used)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a parquet file, or is damaged ({reason:.200})") from None

    for number, cells in enumerate(zip(*(table[name] for name in used)), 1):
        try:
            row = {name: cell.as_py() for name, cell in zip(used, cells)}
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}, row {number}: a cell can't be read ({error})") from None
        yield f"{path}, row {number}", [row.get(name) for name in header]


def examples_of(path, rows, tidy=False):
    """
    One example a row, or one for all references of a prompt. rows: the header first. tidy: leave
    out the blanks around texts, and the quotes that follow such a blank.
    """
    where, header = next(rows, (path, []))
    layout = layout_of(header, where)
    columns = {key: header[i].strip().lower() for key, i in layout.items()}
    unused = ", ".join(name for i, name in enumerate(header) if i not in layout.values())
    notes = (f"columns are not used ({unused})",) if unused else ()
    examples = {}  # {prompt or place: example}
    for where, cells in rows:
        if len(cells) != len(header):
            counts = f"{len(cells)} cells, but {len(header)} columns"
            hint = "give each column one, and put no blank before a quote"
            raise ValueError(f"{where}: {counts}: {hint}")
        fields = {key: cells[i] for key, i in layout.items()}
        bare = {key: bare_cell(cell, key) for key, cell in fields.items()} if tidy else fields
        values = {key: value_of(cell, key) for key, cell in bare.items()}
        if "choice_0" in layout:
            gather_choices(values)
        try:
            _, example = read_example(values, where, columns)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        changed = [key for key in bare if bare[key] != fields[key]] if bare != fields else ()
        example.notes += (*notes, *(f"blanks around {key!r} are left out" for key in changed))
        key = example["prompt"] if "references" in example else where
        if key in examples:
            examples[key]["references"] += example["references"]
        else:
            examples[key] = example

    if not examples:
        raise ValueError(f"{path} holds no examples")
    check_pairs([*examples.values()])
    return list(examples.values())


def gather_choices(fields):
    """Make one list of choice_0, choice_1, …, without empty ones at its end."""
    count = 1 + max(int(key[7:]) for key in fields if key.startswith("choice_"))
    choices = [fields.pop(f"choice_{i}", None) or "" for i in range(count)]
    while choices and not choices[-1]:
        choices.pop()
    fields["choices"] = choices


def layout_of(header, where):
    """{key: the number of its column}. Raises ValueError, which begins with `where`."""
    names = [name.strip().lower() for name in header]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{where}: the column {twice[0]!r} occurs twice: rename or remove one")
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        only = f"the only column is {names[0]!r:.300}"
        raise ValueError(f"{where}: {only}: separate columns with commas")
    for layout in LAYOUTS:
        if set(layout.values()) <= set(names):
            optional = (*OPTIONAL.get(format_of(layout), ()), "group")
            if "choice_0" in layout:
                optional += tuple(name for name in names if re.fullmatch(r"choice_\d{1,2}", name))
            layout = layout | {name: name for name in optional if name in names}
            return {key: names.index(column) for key, column in layout.items()}

    similar = [layout for layout in LAYOUTS if set(layout.values()) & set(names)]
    needed = "; ".join(" + ".join(layout.values()) for layout in similar or LAYOUTS)
    have = " ".join(", ".join(names).split()) or "(none)"  # a quoted name may have line breaks
    raise ValueError(f"{where}: the columns are {have:.300}; these are needed: {needed}")


def bare_cell(cell, key):
    """A cell of CSV without quotes that follow a blank, and a text without blanks around it."""
    bare = cell.strip(" \t")
    if cell != bare and re.fullmatch('"([^"]|"")*"', bare):
        return bare[1:-1].replace('""', '"')
    return bare if key in ("text", "text_b") else cell


def value_of(cell, key):
    """A cell as in JSONL: CSV has numbers as texts, and parquet has labels as numbers."""
    if key == "references" and isinstance(cell, str):
        return [cell]
    # float() also takes "1_0" and other scripts' digits
    if key == "score" and isinstance(cell, str) and cell.isascii() and "_" not in cell:
        with contextlib.suppress(ValueError):
            return float(cell)
    if key == "answer" and isinstance(cell, str) and re.fullmatch("[0-9]+", cell):
        return int(cell)
    return str(cell) if isinstance(cell, int) and key not in ("score", "answer") else cell
