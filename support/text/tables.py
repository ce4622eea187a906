"""
Examples from tables: CSV and parquet files, GLUE's TSV files, CoNLL-2003's columns.

    read_table(path)        CSV, TSV or parquet, by the names of its columns
    read_glue(path, task)   train.tsv or dev.tsv of a GLUE task
    read_conll(path)        a word and its tag in each line

Each returns a list of examples in a format of jsonl.py (not conversations or plain text). Each
raises FileNotFoundError, or ValueError, which names file and line. The case of a column's name does
not matter, and the examples' notes name unknown columns.
"""

import contextlib
import csv
import io
import re
from pathlib import Path

from support.text import jsonl

PAIRS = (  # the columns of two texts; MRPC's come last
    ("text_a", "text_b"), ("text", "text_b"), ("sentence1", "sentence2"),
    ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("#1 string", "#2 string"),
)  # fmt: skip
SAME = {  # {another name of a column: the key that it is}
    "sentence": "text",
    "tokens": "words",
    "ner_tags": "tags",
    **dict.fromkeys(("quality", "is_duplicate", "gold_label"), "label"),  # MRPC, QQP, MNLI
    **dict.fromkeys(("mr", "meaning_representation"), "prompt"),  # E2E (arXiv 1706.09254)
    **dict.fromkeys(("ref", "human_reference", "human_references"), "references"),
}
TABLES = {  # {format: its keys}; a table has the first format whose needed keys its columns are
    form: {*jsonl.FORMATS[form], *jsonl.OPTIONAL.get(form, ()), "group"}
    for form in "instruction prompt multiple_choice generation classification regression "
    "multi_label tagging".split()
}
COLA_HEADER = ["source", "label", "annotation", "sentence"]  # CoLA's files have no header
csv.field_size_limit(2**31 - 1)  # a cell may be as long as any text


def read_table(path, columns=None):
    """
    The examples of a CSV, TSV or parquet file. CSV is UTF-8 with a header and RFC 4180's quotes; it
    is separated by commas, tabs, semicolons or bars. Rows with the same "mr" become one example
    with several references. columns: as in jsonl.renamed.
    """
    ending, known = Path(path).suffix.lower(), (".csv", ".tsv", ".parquet")
    if ending not in known:
        ends = f"the name of a table must end in {', '.join(known)}: save it as CSV, in UTF-8"
        raise ValueError(f"{path}: {ends}")
    packed = ending == ".parquet"
    rows = parquet_rows(path, columns) if packed else csv_rows(path)
    return examples_of(path, rows, columns, tidy=not packed)


def read_glue(path, task, columns=None):
    """
    The examples of train.tsv or dev.tsv of the GLUE benchmark (arXiv 1804.07461). task: a key of
    scores.GLUE. Labels stay as written, and quotes mean nothing. QQP's rows that are broken in two
    are left out, if they are at most one in a hundred.
    """
    rows = list(csv_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE))
    if task == "cola":
        rows.insert(0, (path, COLA_HEADER))
    if task == "qqp" and rows:
        whole = [row for row in rows if len(row[1]) == len(rows[0][1])]
        total, broken = len(rows) - 1, len(rows) - len(whole)
        if broken > 0.01 * total:
            raise ValueError(f"{path}: {broken} of {total} rows lack cells: get it again")
        rows = whole
    return examples_of(path, iter(rows), columns)


def read_conll(path, columns=None):
    """
    Sentences as {"words", "tags"} from a file in CoNLL-2003's layout (Tjong Kim Sang & De Meulder,
    2003): a word a line, blanks between columns, the tag in the last one; an empty line after each
    sentence; and a line -DOCSTART- before each document (JNLPBA: ###MEDLINE:…).

    Tags become BIO. The original files are IOB1, where B- only parts two neighbours of one type: so
    I-X becomes B-X unless an entity of type X precedes it. BIO stays as it is.
    """
    if columns:
        raise ValueError(f"{path}: its columns have no names: leave out --text_column and others")
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
            jsonl.check_tags(cells[:1], [tag])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

        if sentence is None:
            sentence = jsonl.Example({"words": [], "tags": []}, where)
            sentences.append(sentence)
        words, tags = sentence["words"], sentence["tags"]
        begins = tag[0] == "I" and (not tags or tag[2:] != tags[-1][2:])
        words.append(cells[0])
        tags.append("B" + tag[1:] if begins else tag)

    if not sentences:
        raise ValueError(f"{path} holds no examples")
    return sentences


def read_text(path):
    """A file's text without byte order marks, of which joined files have one within."""
    content = Path(path).read_bytes()
    try:
        return re.sub(r"(^|[\r\n])\ufeff", r"\1", content.decode())
    except UnicodeDecodeError as error:
        line, reason = content.count(b"\n", 0, error.start) + 1, error.reason
        raise ValueError(f"{path}:{line}: not UTF-8 ({reason}): save the file as UTF-8") from None


def csv_rows(path, **dialect):
    """
    Yield (file and line, list of cells) of each row, the header first. Without a dialect, the
    header shows what separates columns, or Excel's line before it does: "sep=;".
    """
    text, end = read_text(path), 0
    if not dialect:
        if named := re.match(r"sep=(.)\r?\n", text):
            text, end = text[named.end() :], 1
        header = text.partition("\n")[0]
        dialect = {"delimiter": named[1] if named else max(",\t;|", key=header.count)}
    reader, before = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect), end
    try:
        for cells in reader:  # a quoted cell may have line breaks
            where, end = f"{path}:{end + 1}", before + reader.line_num
            if cells:
                yield where, cells
    except csv.Error as error:
        raise ValueError(
            f"{path}:{end + 1}: the row that begins here can't be read ({error}): close every "
            f'quote, and write a quote inside quotes as ""; or use JSONL'
        ) from None


def parquet_rows(path, columns=None):
    """Yield (file and row, list of cells) of each row, the header first."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow ({error}): pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        header = file.schema_arrow.names
        yield path, header
        used = [header[i] for i in layout_of(header, path, columns).values()]
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


def examples_of(path, rows, columns=None, tidy=False):
    """An example a row, or one for all references of a prompt. rows: as csv_rows yields them."""
    where, header = next(rows, (path, []))
    layout = layout_of(header, where, columns)
    names = {key: header[i].strip().lower() for key, i in layout.items()}
    unused = ", ".join(name for i, name in enumerate(header) if i not in layout.values())
    notes = (f"columns are not used ({unused})",) if unused else ()
    rows = fields_of(rows, layout, len(header), tidy, notes)
    examples = jsonl.examples_of(path, rows, names)
    if "references" not in layout:
        return examples
    joined = {}
    for example in examples:
        first = joined.setdefault(example["prompt"], example)
        if first is not example:
            first["references"] += example["references"]
    return list(joined.values())


def fields_of(rows, layout, width, tidy, notes=()):
    """Yield (file and line, {key: value}, notes). layout: {key: column}; tidy: rows are CSV's."""
    for where, cells in rows:
        if len(cells) != width:
            hint = "give each column one, texts with commas quotes, and those no blank before"
            raise ValueError(f"{where}: {len(cells)} cells, but {width} columns: {hint}")
        fields = {key: cells[i] for key, i in layout.items()}
        bare = {key: bare_cell(cell, key) for key, cell in fields.items()} if tidy else fields
        values = {key: value_of(cell, key, tidy) for key, cell in bare.items()}
        if "choice_0" in layout:
            gather_choices(values)
        changed = [key for key in bare if bare[key] != fields[key]] if bare != fields else ()
        yield where, values, (*notes, *(f"blanks around {key!r} are left out" for key in changed))


def gather_choices(fields):
    """Join choice_0, choice_1, … to one list, without empty ones at its end."""
    texts = {int(key[7:]): fields.pop(key) for key in [*fields] if key.startswith("choice_")}
    last = max((i for i, text in texts.items() if text), default=-1)
    fields["choices"] = [texts.get(i) or "" for i in range(last + 1)]


def places_of(header, where, columns=None):
    """{key of an example: its column's number}. columns: {key: its name}. Raises ValueError."""
    names = [name.strip().lower() for name in header]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{where}: the column {twice[0]!r} occurs twice: rename or remove one")
    columns = {key: name.lower() for key, name in (columns or {}).items()}
    names = list(jsonl.renamed(dict.fromkeys(names), columns, where))
    whole = [pair for pair in PAIRS if {*pair} <= {*names} and "text" not in columns]
    texts = dict(zip(*whole[:1], ("text", "text_b"))) if whole else {}
    known = "|".join(set.union(*TABLES.values()))
    exact = {name: name for name in names if re.fullmatch(rf"{known}|choice_\d{{1,2}}", name)}
    places = {}
    for keys in (texts, exact, SAME):
        for place, name in enumerate(names):
            if name in keys and place not in places.values():
                places.setdefault(keys[name], place)
    return places


def layout_of(header, where, columns=None):
    """places_of the keys of a table's format and of its optional keys. Raises ValueError."""
    places = places_of(header, where, columns)
    choices = {key for key in places if key.startswith("choice_")}
    needed = {form: {*jsonl.FORMATS[form]} for form in TABLES}
    if "choice_0" in places and "choices" not in places:
        needed["multiple_choice"] = {"prompt", "answer", "choice_0"}
    for form, keys in needed.items():
        if keys <= places.keys():
            used = TABLES[form] | (choices if "choice_0" in keys else set())
            return {key: place for key, place in places.items() if key in used}

    similar = [form for form in TABLES if needed[form] & places.keys()]
    sets = "; ".join(" + ".join(jsonl.FORMATS[form]) for form in similar or TABLES)
    sets = sets.replace("choices", "choices (or choice_0, choice_1, …)")
    have = " ".join(", ".join(header).lower().split()) or "(none)"  # a name may have line breaks
    more = "; --text_column and --label_column name others"
    raise ValueError(f"{where}: the columns are {have:.300}; these are needed: {sets}{more}")


def bare_cell(cell, key):
    """A cell of CSV: without quotes that follow a blank, or, of a text, without blanks around."""
    bare = cell.strip(" \t")
    if cell != bare and re.fullmatch('"([^"]|"")*"', bare):
        return bare[1:-1].replace('""', '"')
    return bare if key in ("text", "text_b") else cell


def value_of(cell, key, written):
    """A cell as JSONL has it. written: it comes from CSV, where numbers and lists are texts."""
    if key == "references" and isinstance(cell, str):
        return [cell]
    if key == "labels" and written:
        return [name.strip() for name in cell.split("|")] if cell.strip() else []
    # float() also takes "1_0" and other scripts' digits
    if key == "score" and isinstance(cell, str) and cell.isascii() and "_" not in cell:
        with contextlib.suppress(ValueError):
            return float(cell)
    if key == "answer" and isinstance(cell, str) and re.fullmatch("[0-9]+", cell):
        return int(cell)
    return str(cell) if isinstance(cell, int) and key not in ("score", "answer") else cell
