"""Data sets in the layouts that are given out, written here by hand, and those of a local hub."""

import sys
from functools import partial

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, List, Value

from support.text.official import read_folder, read_hub


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder of that name with files, given as {name: text}."""

    def written(name, files):
        path = tmp_path / name
        path.mkdir()
        for file, text in files.items():
            (path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def refused(read, source, *said, error=ValueError):
    """Reading the source raises an error of one line that has each part of `said`."""
    with pytest.raises(error) as raised:
        read(source)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 1000
    for part in map(str, said):
        assert part in message


PAIR = "index\tsentence1\tsentence2\tlabel\n0\tIt {0}s.\tIs it {0}?\t{1}"
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n{1}\t7\t8\tIt {0}s.\tIs it {0}?"
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tIt {0}s.\tIs it {0}?\t{1}"
A, B = ("rain", "1"), ("snow", "0")
PAIRS = [{"text": f"It {x}s.", "text_b": f"Is it {x}?", "label": label} for x, label in (A, B)]
SCORED = {"text": "It rains.", "text_b": "Is it rain?", "score": 1.0}
SINGLE = {"text": "It rains.", "label": "1"}
GLUE = [  # name of the folder, task, a file with two placeholders, its example
    ("CoLA", "cola", "gj04\t{1}\t\tIt {0}s.", SINGLE),
    ("SST-2", "sst2", "sentence\tlabel\nIt {0}s.\t{1}", SINGLE),
    ("MRPC", "mrpc", MRPC, PAIRS[0]),
    ("STS-B", "stsb", PAIR.replace("label", "score"), SCORED),
    ("QQP", "qqp", QQP, PAIRS[0]),
    ("QNLI", "qnli", PAIR.replace("sentence1\tsentence2", "question\tsentence"), PAIRS[0]),
    ("RTE", "rte", PAIR, PAIRS[0]),
    ("WNLI", "wnli", PAIR, PAIRS[0]),
    ("rte", "rte", PAIR, PAIRS[0]),
    ("Sst2", "sst2", "sentence\tlabel\nIt {0}s.\t{1}", SINGLE),
]


@pytest.mark.parametrize("name, task, text, example", GLUE, ids=[g[0] for g in GLUE])
def test_a_glue_folder_s_name_is_its_task_and_test_has_no_labels(folder, name, task, text, example):
    files = {"train.tsv": text.format(*A), "dev.tsv": text.format(*B), "test.tsv": "index\tx\n0\ty"}
    splits, found = read_folder(folder(name, files))
    assert found == task and splits["test"] == []
    assert splits["train"] == [example]
    assert [x["text"] for x in splits["dev"]] == ["It snows."]


def test_mnli_s_dev_examples_are_the_matched_ones(folder):
    text = PAIR.replace("label", "gold_label")
    files = {"train": A, "dev_matched": B, "dev_mismatched": ("hail", "2")}
    path = folder("MNLI", {f"{name}.tsv": text.format(*row) for name, row in files.items()})
    splits, task = read_folder(path)
    texts = {split: [x["text"] for x in examples] for split, examples in splits.items()}
    assert task == "mnli" and texts == {"train": ["It rains."], "dev": ["It snows."], "test": []}


def test_mrpc_is_also_read_as_microsoft_gives_it_out(folder):
    files = {f"msr_paraphrase_{n}.txt": MRPC.format(*x) for n, x in (("train", A), ("test", B))}
    splits = {"train": PAIRS[:1], "dev": [], "test": PAIRS[1:]}
    assert read_folder(folder("MSRParaphraseCorpus", files)) == (splits, "mrpc")


def test_a_folder_is_found_from_inside_and_from_home(folder, monkeypatch):
    path = folder("RTE", {"train.tsv": PAIR.format(*A), "dev.tsv": PAIR.format(*B)})
    monkeypatch.chdir(path)
    monkeypatch.setenv("HOME", str(path.parent))
    splits = {"train": PAIRS[:1], "dev": PAIRS[1:], "test": []}
    assert read_folder(".") == read_folder("~/RTE/") == (splits, "rte")


@pytest.mark.parametrize(
    "names",
    ["eng.train eng.testa eng.testb", "train.tsv devel.tsv test.tsv"]
    + [f"train.txt {dev}.txt test.txt" for dev in ("valid", "dev")],
)
def test_sentences_with_tags_are_read_from_conll_s_three_files(folder, names):
    text = "-DOCSTART-\tO\n\n{}\tI-PER\nsat\tO\n\n"
    people = dict(zip(("train", "dev", "test"), ("Ann", "Bob", "Cy")))
    path = folder("set", {n: text.format(p) for n, p in zip(names.split(), people.values())})
    expected = {s: [{"words": [p, "sat"], "tags": ["B-PER", "O"]}] for s, p in people.items()}
    assert read_folder(path) == (expected, None)


def test_jnlpba_has_a_line_before_each_abstract_and_no_dev_examples(folder):
    text = "###MEDLINE:1234\n\nThe\tO\nIL-2\tB-DNA\ngene\tI-DNA\n\n###MEDLINE:5678\n\nNone\tO\n\n"
    files = {"Genia4ERtask1.iob2": text, "Genia4EReval1.iob2": "Some\tO\n", "README": "x"}
    splits, _ = read_folder(folder("jnlpba", files))
    first = {"words": ["The", "IL-2", "gene"], "tags": ["O", "B-DNA", "I-DNA"]}
    none, some = ({"words": [word], "tags": ["O"]} for word in ("None", "Some"))
    assert splits == {"train": [first, none], "dev": [], "test": [some]}


def test_e2e_s_references_are_joined_in_each_of_its_files(folder):
    row = 'mr,ref\n"name[{0}], area[x]",{0} one.\n"name[{0}], area[x]",{0} two.\n'
    names = {"trainset.csv": "A", "devset.csv": "B", "testset_w_refs.csv": "C"}
    files = {name: row.format(letter) for name, letter in names.items()}
    splits, _ = read_folder(folder("e2e", files | {"testset.csv": "MR\n"}))
    for split, x in zip(("train", "dev", "test"), "ABC"):
        expected = {"prompt": f"name[{x}], area[x]", "references": [f"{x} one.", f"{x} two."]}
        assert splits[split] == [expected]


def test_files_called_train_dev_and_test_may_each_be_of_another_kind(folder):
    files = {"train.jsonl": '{"text": "a", "label": 1}\n', "test.csv": "text,label\nc,3"}
    path = folder("own", files)
    table = pyarrow.table({"text": ["b"], "label": [2]})
    pyarrow.parquet.write_table(table, path / "validation.parquet")
    examples = dict(zip(("train", "dev", "test"), ("a1", "b2", "c3")))
    splits = {name: [{"text": x, "label": label}] for name, (x, label) in examples.items()}
    assert read_folder(path) == (splits, None)


@pytest.mark.parametrize("parts", [["train"], ["train", "validation", "test"], None])
def test_what_datasets_saved_on_disk_is_read_with_its_classes_names(tmp_path, parts):
    """A DatasetDict, or a Dataset alone, which is train; with columns by the settings' names."""
    features = datasets.Features({"review": Value("string"), "label": ClassLabel(names=["n", "y"])})
    one = datasets.Dataset.from_dict({"review": ["a"], "label": [1]}, features)
    whole = datasets.DatasetDict(dict.fromkeys(parts, one)) if parts else one
    whole.save_to_disk(tmp_path / "saved")
    splits, task = read_folder(tmp_path / "saved", {"text": "review"})
    example, others = [{"text": "a", "label": "y"}], parts and parts[1:]
    assert task is None and splits["train"] == example
    assert splits["dev"] == splits["test"] == (example if others else [])


def test_train_alone_is_enough(folder):
    splits, _ = read_folder(folder("own", {"train.csv": "text,label\na,1"}))
    assert splits == {"train": [{"text": "a", "label": "1"}], "dev": [], "test": []}


def document(lewis, text, *topics, has="YES", cgi="TRAINING-SET"):
    marked = "".join(f"<D>{topic}</D>" for topic in topics)
    return (
        f'<REUTERS TOPICS="{has}" LEWISSPLIT="{lewis}" CGISPLIT="{cgi}"  OLDID="1" NEWID="2">\n'
        f"<DATE>1-JAN-1987</DATE>\n<TOPICS>{marked}</TOPICS>\n<PLACES><D>usa</D></PLACES>\n"
        f"<UNKNOWN>&#5;&#22;reute</UNKNOWN>\n<TEXT{text}</TEXT>\n</REUTERS>\n"
    )


def full(title, body):
    date = "<DATELINE>  PARIS - </DATELINE>"
    return f">&#2;\n<TITLE>{title}</TITLE>\n{date}<BODY>{body}\n Reuter\n&#3;</BODY>"


DOCUMENTS = [
    document("TRAIN", full("GRAIN &lt;GRN>", "Rye &amp; oats\nrose."), "grain", "rye", "grain"),
    document("TRAIN", ' TYPE="BRIEF">&#2;\n<TITLE>GOLD FELL</TITLE>Ignored&#3;', "gold"),
    document("TRAIN", ' TYPE="UNPROC">&#2;\n&lt;Qtr 1\n  up\n&#3;', "gold", "grain"),
    document("TRAIN", full("RYE", "Only trained on."), "rye"),
    document("TRAIN", full("", "").replace("\n Reuter\n&#3;", ""), "gold"),  # no text
    document("TRAIN", full("NONE", "No topic.")),
    document("TRAIN", full("NO", "Topics not given."), "grain", has="NO"),
    document("TRAIN", full("BYPASS", "Passed by."), "gold", has="BYPASS"),
    document("TEST", full("OLD GOLD", "A caf\xe9&#127;."), "gold", "tin"),
    document("TEST", full("GRAIN NO", "Nothing."), "grain", has="NO"),
    document("TEST", full("CORN", "Grain again."), "grain"),
    document("NOT-USED", full("UNUSED", "Gold."), "gold", cgi="PUBLISHED-TESTSET"),
]


def reuters(documents=DOCUMENTS):
    files = {f"reut2-{i:03}.sgm": document("NOT-USED", full("x", "y")) for i in range(22)}
    files["reut2-021.sgm"] = "".join(documents[8:])
    files["reut2-000.sgm"] = "".join(documents[:8])
    top = '<!DOCTYPE lewis SYSTEM "lewis.dtd">\n'
    return {name: (top + text).encode("latin-1") for name, text in files.items()}


def test_reuters_modapte_keeps_the_topics_of_both_train_and_test(folder):
    splits, task = read_folder(folder("reuters21578", reuters()))
    assert task is None and splits == {
        "train": [
            {"text": "GRAIN <GRN>\nRye & oats\nrose.\n Reuter", "labels": ["grain"]},
            {"text": "GOLD FELL", "labels": ["gold"]},
            {"text": "<Qtr 1\n  up", "labels": ["gold", "grain"]},
        ],
        "dev": [],
        "test": [
            {"text": "OLD GOLD\nA caf\xe9.\n Reuter", "labels": ["gold"]},
            {"text": "CORN\nGrain again.\n Reuter", "labels": ["grain"]},
        ],
    }


def test_reuters_other_splits_are_those_of_the_folder_s_name(folder):
    def titles(name):
        splits, _ = read_folder(folder(name, reuters()))
        return [[x["text"].split("\n")[0] for x in splits[s]] for s in ("train", "test")]

    train = ["GRAIN <GRN>", "GOLD FELL", "<Qtr 1"]
    assert titles("ModLewis") == [train + ["NO"], ["OLD GOLD", "GRAIN NO", "CORN"]]
    gold = ["GOLD FELL", "<Qtr 1", "BYPASS", "OLD GOLD"]  # the one topic that the test has
    assert titles("modhayes") == [gold, ["UNUSED"]]


@pytest.mark.parametrize(
    "cut",
    ["</REUTERS>", "</TEXT>", "<TOPICS>", "</TITLE>", "<BODY>", 'LEWISSPLIT="TRAIN"', "<REUTERS"],
)
def test_a_broken_document_of_reuters_is_named_by_file_and_line(folder, cut):
    """One without an opening tag by that before it: neither gets a part of the other's."""
    good = document("TRAIN", full("T", "B"), "tin")
    path = folder("reuters21578", reuters([good, good.replace(cut, "", 1), good]))
    line = 2 if cut == "<REUTERS" else 1 + good.count("\n") + 1  # after the file's first one
    place = f"{path / 'reut2-000.sgm'}:{line}"
    refused(read_folder, path, f"{place}: the document that begins here is broken")


def test_reuters_without_some_of_its_files_or_documents_is_refused(folder):
    files = reuters()
    path = folder("a", files | {"reut2-007.sgm": b"<html>404</html>"})
    named = partial(read_folder, columns={"text": "story"})
    refused(named, path, "SGML has no columns: leave ['story'] out")
    refused(read_folder, path, "reut2-007.sgm holds no documents")
    del files["reut2-004.sgm"]
    said = "b holds 21 of Reuters-21578's 22 files"
    refused(read_folder, folder("b", files), said, error=FileNotFoundError)


@pytest.mark.parametrize(
    "name, files, error, said",
    [
        ("RTE", ["train.tsv"], FileNotFoundError, ["RTE lacks dev.tsv"]),
        ("RTE", ["dev.tsv", "test.tsv"], FileNotFoundError, ["RTE lacks train.tsv"]),
        ("MNLI", ["train.tsv", "dev.tsv"], FileNotFoundError, ["MNLI lacks dev_matched.tsv"]),
        ("glue", ["train.tsv", "dev.tsv"], ValueError, ["glue has GLUE's files, but", "SST-2"]),
        ("e", ["devset.csv"], FileNotFoundError, ["lacks testset_w_refs.csv, trainset.csv"]),
        ("c", ["eng.train", "eng.testb"], FileNotFoundError, ["c lacks eng.testa"]),
        ("own", ["test.csv", "dev.csv"], ValueError, ["own is in no layout that is known"]),
        ("own", [], ValueError, ["GLUE", "eng.train", "Genia4", "trainset", "reut2", ".jsonl"]),
        ("own", ["train.csv", "train.jsonl"], ValueError, ["train.jsonl and train.csv: keep"]),
        ("own", ["train.csv", "dev.csv", "val.csv"], ValueError, ["dev.csv and val.csv: keep"]),
    ],
)
def test_what_a_folder_lacks_is_said_in_one_line(folder, name, files, error, said):
    path = folder(name, dict.fromkeys(files, "text,label\na,b"))
    refused(read_folder, path, path, *said, error=error)


def test_a_missing_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "file"):
        refused(read_folder, path, f"{path} is not a folder", error=FileNotFoundError)


def test_a_bad_row_in_a_folder_is_named_by_file_and_line(folder):
    path = folder("RTE", {"train.tsv": PAIR.format(*A), "dev.tsv": PAIR.format(*B) + "\n1\tx"})
    refused(read_folder, path, f"{path / 'dev.tsv'}:3: 2 cells, but 4 columns")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """
    A function that writes a data set in a hub's layout, which `datasets` reads by owner/name:
    parquet files with the columns' features (by default, strings), and their splits in a README.md.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def written(name, splits, config="default", **features):
        folder = tmp_path / name
        (folder / config).mkdir(parents=True)
        lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
        for split, columns in splits.items():
            file = f"{config}/{split}-00000-of-00001.parquet"
            lines += [f"  - split: {split}", f"    path: {file}"]
            schema = {column: features.get(column, Value("string")) for column in columns}
            table = pyarrow.table(columns, datasets.Features(schema).arrow_schema)
            pyarrow.parquet.write_table(table, folder / file)
        (folder / "README.md").write_text("\n".join([*lines, "---", ""]))

    return written


YES = ClassLabel(names=["no", "yes"])


def glue(hub, config, labels, feature, one="sentence1", two="sentence2"):
    """Write a task of GLUE with one pair in each split. labels: by split. Returns what is read."""
    pair = {one: ["It rains."], two: ["Is it rain?"]}
    splits = {split: pair | {"label": [label], "idx": [0]} for split, label in labels.items()}
    hub("nyu-mll/glue", splits, config, label=feature, idx=Value("int32"))
    return read_hub(f"nyu-mll/glue:{config}")


def test_a_glue_task_of_the_hub_has_its_classes_names_and_no_unlabelled_test(hub):
    names = ClassLabel(names=["entailment", "not_entailment"])
    labels = {"train": 0, "validation": 1, "test": -1}
    train, dev = (PAIRS[0] | {"label": name} for name in ("entailment", "not_entailment"))
    assert glue(hub, "rte", labels, names) == ({"train": [train], "dev": [dev], "test": []}, "rte")


def test_mrpc_of_the_hub_is_that_of_the_archive(hub, folder):
    """GLUE's F1 is that of class "1", which the hub calls "equivalent"."""
    names = ClassLabel(names=["not_equivalent", "equivalent"])
    files = {"train.tsv": MRPC.format("rain", 1), "dev.tsv": MRPC.format("rain", 0)}
    labels = {"train": 1, "validation": 0, "test": -1}
    assert glue(hub, "mrpc", labels, names) == read_folder(folder("MRPC", files))


def test_sts_b_of_the_hub_becomes_scores(hub):
    labels = {"train": 3.5, "validation": 0.0, "test": -1.0}
    splits, task = glue(hub, "stsb", labels, Value("float32"))
    assert task == "stsb" and splits["test"] == []
    assert [x["score"] for x in splits["train"] + splits["dev"]] == [3.5, 0.0]


def test_a_number_of_minus_one_among_others_is_a_score(hub):
    hub("me/set", {"train": {"text": ["a", "b"], "label": [-1.0, 1.0]}}, label=Value("float64"))
    assert [x["score"] for x in read_hub("me/set")[0]["train"]] == [-1.0, 1.0]


def test_mnli_s_dev_examples_of_the_hub_are_the_matched_ones(hub):
    names = ClassLabel(names=["entailment", "neutral", "contradiction"])
    labels = {"train": 2, "validation_matched": 1, "validation_mismatched": 0, "test_matched": -1}
    splits, task = glue(hub, "mnli", labels, names, "premise", "hypothesis")
    assert task == "mnli" and splits["test"] == []
    assert [splits[name][0]["label"] for name in ("train", "dev")] == ["contradiction", "neutral"]


ADDED = dict(instruction="Add", input="1 1", output="2")


@pytest.mark.parametrize(
    "columns, example",
    [
        (dict(sentence="a", label=1), dict(text="a", label="yes")),
        (dict(text="a", label=1), dict(text="a", label="yes")),
        (dict(question="a", sentence="b", label=0), dict(text="a", text_b="b", label="no")),
        (dict(question1="a", question2="b", label=0), dict(text="a", text_b="b", label="no")),
        (ADDED | dict(label=1), ADDED),
    ],
)
def test_the_columns_of_a_hub_s_set_decide_an_example_s_keys(hub, columns, example):
    hub("me/set", {"train": {name: [value] for name, value in columns.items()}}, label=YES)
    assert read_hub("me/set")[0]["train"] == [example]


def test_rows_without_a_label_or_without_words_are_left_out(hub):
    hub("me/a", {"train": {"text": ["a", "b"], "label": [-1, 1]}}, label=YES)
    assert read_hub("me/a")[0]["train"] == [{"text": "b", "label": "yes"}]


def test_tags_of_the_hub_become_their_names(hub):
    columns = {"tokens": [["Ann", "sat"], [], ["Hm"]], "ner_tags": [[1, 0], [], [0]]}
    tags = List(ClassLabel(names=["O", "B-PER"]))
    hub("me/ner", dict(train=columns, test=columns), tokens=List(Value("string")), ner_tags=tags)
    expected = [{"words": ["Ann", "sat"], "tags": ["B-PER", "O"]}, {"words": ["Hm"], "tags": ["O"]}]
    assert read_hub("me/ner") == ({"train": expected, "dev": [], "test": expected}, None)


def test_several_labels_of_the_hub_become_their_names(hub):
    columns = {"text": ["a", "b"], "labels": [[1, 0], []]}
    hub("me/feel", {"train": columns}, labels=List(ClassLabel(names=["joy", "fear"])))
    expected = [{"text": "a", "labels": ["fear", "joy"]}, {"text": "b", "labels": []}]
    assert read_hub("me/feel")[0]["train"] == expected


@pytest.mark.parametrize(
    "prompts, texts",
    [
        (["m", "n", "m"], {"human_reference": ["1", "2", "3"]}),
        (["m", "n"], {"human_references": [["1", "3"], ["2"]]}),
    ],
)
def test_e2e_of_the_hub_has_its_references_joined(hub, prompts, texts):
    columns = {"meaning_representation": prompts} | texts
    hub("me/e2e", {"train": columns}, human_references=List(Value("string")))
    expected = [{"prompt": "m", "references": ["1", "3"]}, {"prompt": "n", "references": ["2"]}]
    assert read_hub("me/e2e")[0]["train"] == expected


def test_name_config_and_revision_reach_the_library_and_code_is_never_trusted(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((*arguments, options["revision"], options["trust_remote_code"]))
        return {"train": datasets.Dataset.from_dict({"text": ["a"], "label": ["b"]})}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("o/n", "o/n:c", "o/n@v1", "o/n:c-1.0@refs/pr/2"):
        assert read_hub(name)[0]["train"] == [{"text": "a", "label": "b"}]
    asked = [(None, None), ("c", None), (None, "v1"), ("c-1.0", "refs/pr/2")]
    assert calls == [("o/n", config, revision, False) for config, revision in asked]


@pytest.mark.parametrize("name", ["glue", "a/b/c", "a/b:", "a/b@", "/a", "a b/c", "a/b:c@"])
def test_a_name_that_is_no_hub_s_is_refused(name):
    refused(read_hub, name, f"{name!r} is not owner/name or owner/name:config")


def test_an_unknown_config_is_named_with_the_ones_there_are(hub):
    glue(hub, "rte", {"train": 0}, YES)
    name = "nyu-mll/glue:rtee"
    refused(read_hub, name, f"data set {name!r} could not be read: ", "'rtee' not found", "'rte'")


def test_a_set_that_is_neither_here_nor_reachable_is_said_in_one_line(hub):
    refused(read_hub, "nobody/none", "data set 'nobody/none' could not be read: ", "Hub")


def test_a_damaged_file_s_own_reason_is_given(hub, tmp_path):
    hub("me/set", {"train": {"text": ["a"], "label": ["x"]}})
    (tmp_path / "me/set/default/train-00000-of-00001.parquet").write_bytes(b"PAR1, cut off")
    refused(read_hub, "me/set", "data set 'me/set' could not be read: ", "magic bytes not found")


TEXT, TEXTS, NUMBERS = Value("string"), List(Value("string")), List(Value("int64"))
EMPTY, CLASSES = "the answer is empty: fill in", "but its classes are 0 to 1"
BAD = [  # columns, their features, a row, the message
    (dict(text=["a", ""], label=["x", " "]), [TEXT, TEXT], 2, f"{EMPTY} 'label'"),
    (dict(mr=["a", None], ref=["x", "y"]), [TEXT, TEXT], 2, "'mr' is NoneType, not a string"),
    (dict(text=["a", "b"], label=[0, None]), [TEXT, YES], 2, f"'label' is None, {CLASSES}"),
    (dict(text=["a", "b"], label=[0, 7]), [TEXT, YES], 2, f"'label' is 7, {CLASSES}"),
    (dict(tokens=[["a"]], ner_tags=[[3]]), [TEXTS, NUMBERS], 1, "'ner_tags' is int, not a string"),
    (dict(text=["a"], labels=["x"]), [TEXT, TEXT], 1, "'labels' is str, not a list of strings"),
    (dict(tokens=[["a", "b"]], ner_tags=[["O"]]), [TEXTS, TEXTS], 1, "2 words and 1 tags"),
    (dict(mr=["a"], ref=[[""]]), [TEXT, TEXTS], 1, f"{EMPTY} 'ref'"),
]  # fmt: skip


@pytest.mark.parametrize("columns, features, row, said", BAD)
def test_a_bad_row_of_a_hub_s_set_is_named_by_split_and_number(hub, columns, features, row, said):
    hub("me/set", {"train": columns}, **dict(zip(columns, features)))
    refused(read_hub, "me/set", f"me/set, train, row {row}: {said}")


def test_unknown_columns_are_named_with_the_known_ones(hub):
    hub("me/set", {"train": {"title": ["a"]}})
    refused(read_hub, "me/set", "me/set, train: the columns are title; these are needed: ")


@pytest.mark.parametrize(
    "splits, labels, names", [(["test", "extra"], [0], "test, extra"), (["train"], [-1], "train")]
)
def test_without_labelled_train_examples_the_splits_are_named(hub, splits, labels, names):
    hub("me/set", dict.fromkeys(splits, {"text": ["a"], "label": labels}), label=YES)
    said = f"no labelled examples in a split called train; its splits are {names}"
    refused(read_hub, "me/set", said)


def test_without_the_library_the_pip_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(read_hub, "a/b", "'a/b' needs datasets ", ": pip install datasets")
