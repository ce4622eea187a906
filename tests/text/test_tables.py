"""Tables in each layout, written here by hand, and the messages for those that can't be read."""

import csv
import io
import json
import sys
from functools import partial

import pyarrow
import pyarrow.parquet
import pytest

from data import load_examples
from support.text.tables import read_conll, read_glue, read_table


@pytest.fixture
def write(tmp_path):
    """A function that writes text (or bytes) to a file of that name, and returns its path."""

    def written(text, name="data.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def refused(read, path, place, said):
    """Reading the file raises an error of one line that begins with the place and says that."""
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}{place}") and said in message
    assert "\n" not in message and len(message) < 1000


EMPTY = "the answer is empty: fill in"
CHOICE = {"prompt": "x", "choices": ["y", "z"], "answer": 1}


@pytest.mark.parametrize(
    "text, example",
    [
        ("text,label\nHi,a", {"text": "Hi", "label": "a"}),
        ("id,Label , TEXT\n7,a,Hi", {"text": "Hi", "label": "a"}),
        ("prompt,completion\n1+1=,2", {"prompt": "1+1=", "completion": "2"}),
        ("instruction,output\nAdd,2", {"instruction": "Add", "output": "2"}),
        ("instruction,input,output\nA,1,2", {"instruction": "A", "input": "1", "output": "2"}),
        ("instruction,system,output\nA,S,2", {"instruction": "A", "system": "S", "output": "2"}),
        ("text_a,text_b,label\nx,y,no", {"text": "x", "text_b": "y", "label": "no"}),
        ("text,text_b,label\nx,y,no", {"text": "x", "text_b": "y", "label": "no"}),
        ("text,score\nx,-1.5", {"text": "x", "score": -1.5}),
        ("text_a,text_b,score\nx,y,3", {"text": "x", "text_b": "y", "score": 3.0}),
        ("text,label,group\nHi,a,g1", {"text": "Hi", "label": "a", "group": "g1"}),
        ("text,labels\nHi,a | b", {"text": "Hi", "labels": ["a", "b"]}),
        ("text,labels\nHi,", {"text": "Hi", "labels": []}),
        ("mr,ref\nname[Aida],Aida.", {"prompt": "name[Aida]", "references": ["Aida."]}),
        ("prompt,choice_0,choice_1,answer\nx,y,z,1", CHOICE),
        ("choice_1,answer,choice_2,prompt,choice_0\nz,1,,x,y", CHOICE),
    ],
)
def test_the_columns_decide_an_example_s_keys(write, text, example):
    assert read_table(write(text)) == [example]


def test_quotes_a_byte_order_mark_and_windows_line_ends_are_read(write):
    path = write('\ufefftext,label\r\n"He said ""no"",\r\ntwice.",a\r\n\r\n"é\u2028",b\r\n')
    first = {"text": 'He said "no",\r\ntwice.', "label": "a"}
    assert read_table(path) == [first, {"text": "é\u2028", "label": "b"}]


LONG = "x" * 200_000


@pytest.mark.parametrize(
    "text, example, notes",
    [
        ("text,label\n Hi ,good", {"text": "Hi", "label": "good"}, ["text"]),
        ("text,label\nHi,good\t", {"text": "Hi", "label": "good"}, ["label"]),
        ('text,label\n"Hi", "so ""b"""  ', {"text": "Hi", "label": 'so "b"'}, ["label"]),
        ("text,label,group\nHi,a, b", {"text": "Hi", "label": "a", "group": "b"}, ["group"]),
        ("text,label,group\nHi,a, ", {"text": "Hi", "label": "a"}, ["group"]),
        ("prompt,completion\n1+1=, 2", {"prompt": "1+1=", "completion": " 2"}, []),
        ('prompt,completion\n1+1=, "2"', {"prompt": "1+1=", "completion": "2"}, ["completion"]),
        ('text,label\n" Hi ""you""",a', {"text": 'Hi "you"', "label": "a"}, ["text"]),
        (f"text,label\n{LONG},a", {"text": LONG, "label": "a"}, []),
    ],
)
def test_blanks_around_cells_are_left_out_and_noted(write, text, example, notes):
    """Not those of a prompt and what completes it, where a blank is a part of a token."""
    [read] = read_table(write(text))
    assert read == example
    assert read.notes == tuple(f"blanks around {key!r} are left out" for key in notes)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.CSV"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("first", ["", "sep="])
@pytest.mark.parametrize("separator", ",\t;|")
def test_columns_are_parted_as_the_header_or_a_line_before_says(write, separator, first, end, name):
    """As csv.writer writes them, which quotes a cell that holds the separator."""
    rows = [["label", "text", "id"], ["a", "x, y; z|\tw", "1"], ["b", "u", "2"]]
    content = io.StringIO()
    csv.writer(content, delimiter=separator, lineterminator=end).writerows(rows)
    path = write(first and first + separator + end + content.getvalue() or content.getvalue(), name)
    examples = read_table(path)
    assert examples == [dict(text="x, y; z|\tw", label="a"), dict(text="u", label="b")]
    assert examples[1].where == f"{path}:{3 + bool(first)}"


COLUMNS = {"text": "Review", "label": "stars"}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_columns_that_settings_name_go_before_those_of_the_same_name(write, tmp_path, name):
    """What is left out is counted; a name that the file lacks is refused with those it has."""
    row = {"Review": "fine", "stars": "5", "text": "t", "label": "l"}
    content = {"a.csv": "Review,stars,text,label\nfine,5,t,l", "a.json": json.dumps([row])}
    path = write(content.get(name, json.dumps(row)), name)
    if name == "a.parquet":
        path = parquet(tmp_path, **{key: [value] for key, value in row.items()})
    [example] = load_examples(path, COLUMNS)
    assert example == {"text": "fine", "label": "5"} and "text" in "".join(example.notes)
    with pytest.raises(ValueError, match=r"no '.rade', which the settings name, but .+tex"):
        load_examples(path, COLUMNS | {"label": "Grade"})


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("text", ["", None])
def test_an_empty_text_is_used_and_said_in_every_kind_of_file(write, tmp_path, name, text):
    row = {"text": text, "label": "a"}
    path = write("text,label\n,a" if name == "a.csv" else json.dumps(row), name)
    path = parquet(tmp_path, text=[text], label=["a"]) if name == "a.parquet" else path
    [example] = load_examples(path)
    assert example == {"text": "", "label": "a"} and example.notes == ("the text is empty",)


def test_a_json_array_is_read_like_lines_and_whole_floats_are_classes(write):
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": "x"}]
    path = write("\ufeff \n" + json.dumps(rows, indent=1), "a.json")
    examples = load_examples(path)
    assert examples == [{"text": "a", "label": "1"}, {"text": "b", "label": "x"}]
    assert examples[1].where == f"{path}, item 2"
    path = write(json.dumps([{"text": "a", "label": 0.5}]), "a.json")
    refused(load_examples, path, ", item 1: ", "'label' is float, not a string")
    refused(load_examples, write("[1]", "a.json"), ", item 1: ", "this is not a JSON object")
    refused(load_examples, write("[{}\n[]", "a.jsonl"), ": not JSON", "write one JSON object")


def test_a_blank_word_is_said_since_nothing_of_it_is_learnt(tmp_path):
    [example] = load_examples(parquet(tmp_path, words=[["a", " "]], tags=[["O", "B-X"]]))
    assert example.notes == ("a blank word has no token, and its tag is not learnt",)


def test_e2e_s_references_are_joined_by_meaning(write):
    path = write('mr,ref\n"a[1], b[2]",One.\nc[3],Three.\n"a[1], b[2]","Two, too."\n')
    first = {"prompt": "a[1], b[2]", "references": ["One.", "Two, too."]}
    assert read_table(path) == [first, {"prompt": "c[3]", "references": ["Three."]}]


@pytest.mark.parametrize(
    "text, line, said",
    [
        ("text,answer\nx,y", 1, "the columns are text, answer; these are needed: "),
        ('"text\nx",label\na,b', 1, "the columns are text x, label; these are needed: "),
        ("text,label,text\nx,y,z", 1, "the column 'text' occurs twice"),
        ("text,label\na,b\n\nx", 4, "1 cells, but 2 columns"),
        ("text,label\na,b\nx,y,z", 3, "3 cells, but 2 columns"),
        ('text,label\nx, "y, z"', 2, "and those no blank before"),
        ('text,label\n"a\nb",c\nx, ', 4, f"{EMPTY} 'label'"),
        ("prompt,completion\nx,", 2, f"{EMPTY} 'completion'"),
        ("instruction,output\nx,", 2, f"{EMPTY} 'output'"),
        ("mr,ref\nx,", 2, f"{EMPTY} 'ref'"),
        ("prompt,choice_0,choice_2,answer\nx,y,z,0", 2, "the choices are ['y', '', 'z']"),
        ("prompt,choice_0,choice_1,answer\nx,y,z,2", 2, "'answer' is 2: give the right choice's"),
        ("prompt,choice_1,choice_2,answer\nx,y,z,1", 1, "prompt + choices (or choice_0, c"),
        ("text,score\nx,high", 2, "'score' is 'high', not a number"),
        ("text,score\nx,1_0", 2, "'score' is '1_0', not a number"),
        ("text,score\nx,３", 2, "'score' is '３', not a number"),
        ("text,score\nx,nan", 2, "'score' is nan, not a number"),
        ("text,score\nx,", 2, "'score' is '', not a number"),
        ('text,label\na,b\n"x,y\nz,w\n', 3, "unexpected end of data"),
        ('text,label\n"x"y,z', 2, "expected after"),
        (b"text,label\na,b\n\xff,y", 3, "not UTF-8"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write, text, line, said):
    refused(read_table, write(text), f":{line}: ", said)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "text,score\nx,1e400"),
        ("a.csv", "text,score\nx,1" + "0" * 400),
        ("a.jsonl", '{"text": "x", "score": 1e300}'),
        ("a.jsonl", f'{{"text": "x", "score": {10**400}}}'),
        ("a.jsonl", '{"text": "x", "score": -Infinity}'),
    ],
)
def test_a_score_beyond_the_floats_is_refused(write, name, text):
    with pytest.raises(ValueError, match=r":[12]: 'score' is -?(1000|1e|inf).*, not a number"):
        load_examples(write(text, name))


def test_missing_empty_and_unknown_files_are_named(write, tmp_path):
    for name in ("none.csv", "none.tsv", "none.parquet"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            load_examples(tmp_path / name)
    with pytest.raises(ValueError, match="data.csv holds no examples"):
        read_table(write("text,label\n\n"))
    with pytest.raises(ValueError, match=r"data.csv: the columns are \(none\)"):
        read_table(write(""))
    with pytest.raises(ValueError, match="must end in .csv, .tsv, .parquet"):
        load_examples(write("text,label\na,b", "data.xlsx"))


def parquet(tmp_path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    return tmp_path / "data.parquet"


def test_parquet_columns_become_texts_and_numbers(tmp_path):
    path = parquet(tmp_path, text=["a", "b"], label=[0, 1], idx=[7, 8])
    assert read_table(path) == [{"text": "a", "label": "0"}, {"text": "b", "label": "1"}]
    for choices in ({"choices": [["y", "z"]]}, {"choice_0": ["y"], "choice_1": ["z"]}):
        assert read_table(parquet(tmp_path, prompt=["x"], answer=[1], **choices)) == [CHOICE]
    path = parquet(tmp_path, text_a=["a"], text_b=["b"], score=[2.5])
    assert read_table(path) == [{"text": "a", "text_b": "b", "score": 2.5}]


def test_parquet_holds_words_with_tags_and_lists_of_labels(tmp_path):
    path = parquet(tmp_path, words=[["a", "b"]], tags=[["O", "B-X"]])
    assert read_table(path) == [{"words": ["a", "b"], "tags": ["O", "B-X"]}]
    path = parquet(tmp_path, text=["a", "b"], labels=[["x", "y"], []])
    assert [example["labels"] for example in read_table(path)] == [["x", "y"], []]
    path = parquet(tmp_path, text=["a"], text_b=["b"], labels=[["x"]])
    assert read_table(path) == [{"text": "a", "text_b": "b", "labels": ["x"]}]
    pairs = pyarrow.array([[["q", "a"]]])
    path = parquet(tmp_path, instruction=["i"], output=["o"], input=[None], history=pairs)
    assert read_table(path) == [{"instruction": "i", "output": "o", "history": [["q", "a"]]}]


@pytest.mark.parametrize("name, place", [("note", None), ("text", ", row 2: a cell can't be read")])
def test_of_a_parquet_file_only_the_columns_that_are_used_are_read(tmp_path, name, place):
    """One holds a string that is not UTF-8, the other one a date that Python does not know."""
    broken = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    dates = pyarrow.array([0, 2**40]).view(pyarrow.timestamp("s"))
    columns = dict(text=["a", "b"], label=["x", "y"]) | {name: broken, "day": dates}
    path = parquet(tmp_path, **columns)
    if place:
        refused(read_table, path, place, "utf-8")
    else:
        examples = read_table(path)
        assert examples == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
        assert examples[0].notes == ("columns are not used (note, day)",)


def test_a_parquet_file_s_folder_adds_no_column(tmp_path):
    folder = tmp_path / "label=1"
    folder.mkdir()
    refused(read_table, parquet(folder, text=["a"], idx=[1]), ": ", "the columns are text, idx;")


@pytest.mark.parametrize(
    "columns, place, said",
    [
        (dict(text=["a"], score=[None]), ", row 1", "'score' is None, not a number"),
        (dict(text=["a", "b"], label=[["x"], ["y"]]), ", row 1", "'label' is list, not a string"),
        (dict(text=["a", "b"], label=["x", " "]), ", row 2", f"{EMPTY} 'label'"),
        (dict(text=["a"], score=[float("nan")]), ", row 1", "'score' is nan, not a number"),
        (dict(words=[["a", "b"]], tags=[["O"]]), ", row 1", "2 words and 1 tags"),
        (dict(text=["a"]), "", "the columns are text; these are needed"),
    ],
)
def test_a_bad_parquet_row_is_named_by_file_and_number(tmp_path, columns, place, said):
    refused(read_table, parquet(tmp_path, **columns), place, f": {said}")


def test_a_damaged_parquet_file_is_named_in_one_line(write, tmp_path):
    whole = parquet(tmp_path, text=["a"], label=["b"]).read_bytes()
    for content in (b"", b"text,label\na,b", whole[:-20], b"X" * 40 + whole[40:]):
        refused(read_table, write(content, "bad.parquet"), " is not a parquet file, or is", "")


def test_without_pyarrow_the_pip_command_is_named(monkeypatch, tmp_path):
    path = parquet(tmp_path, text=["a"], label=["b"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(read_table, path, ": parquet needs pyarrow ", "): pip install pyarrow")


PARSED = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\t"
)
ROW = "0\t1\t1n\tfiction\t( a )\t( b )\t(R)\t(R)\tIt is.\tIs it?\tneutral\t"
MNLI = f"{PARSED}gold_label\n{ROW}neutral"
MNLI_DEV = f"{PARSED}label2\tlabel3\tlabel4\tlabel5\tgold_label\n{ROW}x\tx\tx\tx\tentailment"
STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tmain-news\tx\t2012\t1\tnone\tnone\tIt is.\tIs it?\t3.800"
)
MRPC = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t70\t71\tIt is.\tIs "it"?\r\n'
QQP = 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t6\t7\tIt is.\tIs "it"?\t0'
QNLI = "index\tquestion\tsentence\tlabel\n0\tWho?\tNobody.\tnot_entailment"
RTE = "index\tsentence1\tsentence2\tlabel\n0\tIt is.\tIs it?\t{}"
GLUE = [  # task, content, the example that it holds
    ("cola", 'gj04\t0\t*\tSay "no.', {"text": 'Say "no.', "label": "0"}),
    ("cola", "gj04\t1\t\tThey slept.", {"text": "They slept.", "label": "1"}),
    ("sst2", "sentence\tlabel\na fine film \t1", {"text": "a fine film ", "label": "1"}),
    ("mrpc", MRPC, {"text": "It is.", "text_b": 'Is "it"?', "label": "1"}),
    ("qqp", QQP, {"text": "It is.", "text_b": 'Is "it"?', "label": "0"}),
    ("stsb", STSB, {"text": "It is.", "text_b": "Is it?", "score": 3.8}),
    ("mnli", MNLI, {"text": "It is.", "text_b": "Is it?", "label": "neutral"}),
    ("mnli", MNLI_DEV, {"text": "It is.", "text_b": "Is it?", "label": "entailment"}),
    ("qnli", QNLI, {"text": "Who?", "text_b": "Nobody.", "label": "not_entailment"}),
    ("rte", RTE.format("yes"), {"text": "It is.", "text_b": "Is it?", "label": "yes"}),
    ("wnli", RTE.format("1"), {"text": "It is.", "text_b": "Is it?", "label": "1"}),
]


@pytest.mark.parametrize("task, text, example", GLUE)
def test_glue_s_files_are_read_in_their_own_layouts(write, task, text, example):
    assert read_glue(write(text, "train.tsv"), task) == [example]


def qqp(whole, broken):
    rows = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"]
    rows += [f"{i}\t1\t2\tq{i}\tr{i}\t1" for i in range(whole)]
    return "\n".join(rows[:5] + ["9\t1\t2\thalf a question"] * broken + rows[5:])


def test_a_few_broken_rows_of_qqp_are_left_out_and_many_refused(write):
    examples = read_glue(write(qqp(99, 1), "train.tsv"), "qqp")
    assert [example["text"] for example in examples] == [f"q{i}" for i in range(99)]
    with pytest.raises(ValueError, match="train.tsv: 2 of 101 rows lack cells"):
        read_glue(write(qqp(99, 2), "train.tsv"), "qqp")


@pytest.mark.parametrize(
    "task, text, line, said",
    [
        ("rte", "index\tsentence1\tsentence2\n0\ta\tb", 1, "these are needed: text + label; "),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tc\n1\ta\tb", 3, "3 cells, but 4"),
        ("sst2", "sentence\tlabel\na\t1\nb\t", 3, f"{EMPTY} 'label'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tc", 2, "'score' is 'c', not a number"),
        ("cola", "index\tsentence\n0\tThey slept.", 1, "2 cells, but 4 columns"),
    ],
)
def test_a_bad_row_of_glue_is_named_by_file_and_line(write, task, text, line, said):
    refused(partial(read_glue, task=task), write(text, "train.tsv"), f":{line}: ", said)


def test_conll_s_iob1_becomes_bio(write):
    """Of IOB1's tags, B- only parts two neighbours of one type."""
    path = write(
        "-DOCSTART- -X- -X- O\n\n"
        "EU NNP I-NP I-ORG\nof IN I-PP O\nJohn NNP I-NP I-PER\nDoe NNP I-NP I-PER\n"
        "Jane NNP B-NP B-PER\nRoe NNP I-NP I-PER\nParis NNP I-NP I-LOC\n. . O O\n\n\n"
        "-DOCSTART- -X- O O\n\nRome NNP I-NP I-LOC"
    )
    words = ["EU", "of", "John", "Doe", "Jane", "Roe", "Paris", "."]
    tags = ["B-ORG", "O", "B-PER", "I-PER", "B-PER", "I-PER", "B-LOC", "O"]
    second = {"words": ["Rome"], "tags": ["B-LOC"]}
    assert read_conll(path) == [{"words": words, "tags": tags}, second]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\ufeff"])
def test_conll_s_bio_stays_as_it_is(write, end):
    """With any line ends, and where each line was a file that began with a byte order mark."""
    tags = ["B-A", "I-A", "B-A", "O", "B-B", "I-B", "B-A"]
    [sentence] = read_conll(write("".join(f"w{i}\t{tag}{end}" for i, tag in enumerate(tags))))
    assert sentence["tags"] == tags and sentence["words"] == [f"w{i}" for i in range(7)]


def test_a_word_may_hold_any_character_but_blanks(write):
    [sentence] = read_conll(write('a\u00a0b O\n" O\n\u2028 O'))
    assert sentence["words"] == ["a\u00a0b", '"', "\u2028"]


@pytest.mark.parametrize(
    "text, line, said",
    [
        ("EU NNP O\nof", 2, "1 columns, not 3"),
        ("EU\n", 1, "1 columns, not 2"),
        ("\nEU O\n\nof IN O", 4, "3 columns, not 2"),
        ("EU O\nParis S-LOC", 2, "the tag 'S-LOC' is not O, B-… or I-…"),
        ("EU NNP", 1, "the tag 'NNP' is not O"),
        (b"EU O\n\xe9 O", 2, "not UTF-8"),
    ],
)
def test_a_bad_line_of_conll_is_named_by_file_and_line(write, text, line, said):
    refused(read_conll, write(text), f":{line}: ", said)


def test_a_conll_file_without_words_is_refused(write):
    with pytest.raises(ValueError, match="train.txt holds no examples"):
        read_conll(write("-DOCSTART- -X- -X- O\n\n", "train.txt"))
