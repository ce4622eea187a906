"""Data sets in the layouts that are given out, written here by hand, and those of a local hub."""

import builtins

import datasets
import pyarrow
import pyarrow.parquet
import pytest

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


def one_line(error, *said):
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    for part in map(str, said):
        assert part in message


# ----------------------------------------------------------------------------------------- GLUE

PAIR = "index\tsentence1\tsentence2\tlabel\n0\tIt {0}s.\tIs it {0}?\t{1}"
A, B = ("rain", "1"), ("snow", "0")
PAIRS = [
    {"text": "It rains.", "text_b": "Is it rain?", "label": "1"},
    {"text": "It snows.", "text_b": "Is it snow?", "label": "0"},
]
GLUE = [  # name of the folder, task, a file with two placeholders, its example
    ("CoLA", "cola", "gj04\t{1}\t\tIt {0}s.", {"text": "It rains.", "label": "1"}),
    ("SST-2", "sst2", "sentence\tlabel\nIt {0}s.\t{1}", {"text": "It rains.", "label": "1"}),
    (
        "MRPC",
        "mrpc",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n{1}\t7\t8\tIt {0}s.\tIs it {0}?",
        PAIRS[0],
    ),
    (
        "STS-B",
        "stsb",
        PAIR.replace("label", "score"),
        {"text": "It rains.", "text_b": "Is it rain?", "score": 1.0},
    ),
    (
        "QQP",
        "qqp",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tIt {0}s.\tIs it {0}?\t{1}",
        PAIRS[0],
    ),
    ("QNLI", "qnli", PAIR.replace("sentence1\tsentence2", "question\tsentence"), PAIRS[0]),
    ("RTE", "rte", PAIR, PAIRS[0]),
    ("WNLI", "wnli", PAIR, PAIRS[0]),
    ("rte", "rte", PAIR, PAIRS[0]),
    ("Sst2", "sst2", "sentence\tlabel\nIt {0}s.\t{1}", {"text": "It rains.", "label": "1"}),
]


@pytest.mark.parametrize("name, task, text, example", GLUE, ids=[g[0] for g in GLUE])
def test_a_glue_folder_s_name_is_its_task_and_its_test_file_has_no_labels(
    folder, name, task, text, example
):
    files = {"train.tsv": text.format(*A), "dev.tsv": text.format(*B), "test.tsv": "index\tx\n0\ty"}
    splits, found = read_folder(folder(name, files))
    assert found == task and splits["test"] == []
    assert splits["train"] == [example]
    assert [x["text"] for x in splits["dev"]] == ["It snows."]


def test_mnli_has_two_kinds_of_dev_examples(folder):
    text = "index\tsentence1\tsentence2\tgold_label\n0\tIt {0}s.\tIs it {0}?\t{1}"
    files = {"train": A, "dev_matched": B, "dev_mismatched": ("hail", "2")}
    path = folder("MNLI", {f"{name}.tsv": text.format(*row) for name, row in files.items()})
    splits, task = read_folder(path)
    assert task == "mnli"
    texts = {split: [x["text"] for x in examples] for split, examples in splits.items()}
    assert texts == {
        "train": ["It rains."],
        "dev": ["It snows."],
        "mismatched": ["It hails."],
        "test": [],
    }


def test_mrpc_is_also_read_as_microsoft_gives_it_out(folder):
    files = {"msr_paraphrase_train.txt": GLUE[2][2].format(*A)}
    files |= {"msr_paraphrase_test.txt": GLUE[2][2].format(*B)}
    splits = {"train": PAIRS[:1], "dev": [], "test": PAIRS[1:]}
    assert read_folder(folder("MSRParaphraseCorpus", files)) == (splits, "mrpc")


def test_a_folder_is_found_from_inside_and_from_home(folder, monkeypatch):
    path = folder("RTE", {"train.tsv": PAIR.format(*A), "dev.tsv": PAIR.format(*B)})
    monkeypatch.chdir(path)
    monkeypatch.setenv("HOME", str(path.parent))
    splits = {"train": PAIRS[:1], "dev": PAIRS[1:], "test": []}
    assert read_folder(".") == read_folder("~/RTE/") == (splits, "rte")


# ------------------------------------------------------------------------- tags, E2E, any files


@pytest.mark.parametrize(
    "names",
    [
        ("eng.train", "eng.testa", "eng.testb"),
        ("train.txt", "valid.txt", "test.txt"),
        ("train.txt", "dev.txt", "test.txt"),
        ("train.tsv", "devel.tsv", "test.tsv"),
    ],
)
def test_sentences_with_tags_are_read_from_conll_s_three_files(folder, names):
    text = "-DOCSTART-\tO\n\n{}\tI-PER\nsat\tO\n\n"
    people = dict(zip(("train", "dev", "test"), ("Ann", "Bob", "Cy")))
    path = folder("set", {n: text.format(p) for n, p in zip(names, people.values())})
    expected = {s: [{"words": [p, "sat"], "tags": ["B-PER", "O"]}] for s, p in people.items()}
    assert read_folder(path) == (expected, None)


def test_jnlpba_has_a_line_before_each_abstract_and_no_dev_examples(folder):
    text = "###MEDLINE:1234\n\nThe\tO\nIL-2\tB-DNA\ngene\tI-DNA\n\n###MEDLINE:5678\n\nNone\tO\n\n"
    files = {"Genia4ERtask1.iob2": text, "Genia4EReval1.iob2": "Some\tO\n", "README": "x"}
    splits, _ = read_folder(folder("jnlpba", files))
    assert splits == {
        "train": [
            {"words": ["The", "IL-2", "gene"], "tags": ["O", "B-DNA", "I-DNA"]},
            {"words": ["None"], "tags": ["O"]},
        ],
        "dev": [],
        "test": [{"words": ["Some"], "tags": ["O"]}],
    }


def test_e2e_s_references_are_joined_in_each_of_its_files(folder):
    row = 'mr,ref\n"name[{0}], area[x]",{0} one.\n"name[{0}], area[x]",{0} two.\n'
    names = {"trainset.csv": "A", "devset.csv": "B", "testset_w_refs.csv": "C"}
    files = {name: row.format(letter) for name, letter in names.items()}
    splits, _ = read_folder(folder("e2e", files | {"testset.csv": "MR\n"}))
    for split, letter in zip(("train", "dev", "test"), "ABC"):
        assert splits[split] == [
            {
                "prompt": f"name[{letter}], area[x]",
                "references": [f"{letter} one.", f"{letter} two."],
            }
        ]


def test_files_called_train_dev_and_test_may_each_be_of_another_kind(folder):
    path = folder(
        "own", {"train.jsonl": '{"text": "a", "label": 1}\n', "test.csv": "text,label\nc,3"}
    )
    table = pyarrow.table({"text": ["b"], "label": [2]})
    pyarrow.parquet.write_table(table, path / "validation.parquet")
    splits, task = read_folder(path)
    assert task is None and splits == {
        "train": [{"text": "a", "label": "1"}],
        "dev": [{"text": "b", "label": "2"}],
        "test": [{"text": "c", "label": "3"}],
    }


def test_train_alone_is_enough(folder):
    splits, _ = read_folder(folder("own", {"train.csv": "text,label\na,1"}))
    assert splits == {"train": [{"text": "a", "label": "1"}], "dev": [], "test": []}


# -------------------------------------------------------------------------------------- Reuters


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
    files["reut2-021.sgm"] = "".join(documents[7:])
    files["reut2-000.sgm"] = "".join(documents[:7])
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


@pytest.mark.parametrize("cut", ["</REUTERS>", "</TEXT>", "<TOPICS>", 'LEWISSPLIT="TRAIN"'])
def test_a_broken_document_of_reuters_is_named_by_file_and_line(folder, cut):
    good = document("TRAIN", ">text", "tin")
    path = folder("reuters21578", reuters([good, good.replace(cut, ""), good]))
    line = 1 + good.count("\n") + 1  # after the file's first one
    with pytest.raises(ValueError) as error:
        read_folder(path)
    one_line(error, f"{path / 'reut2-000.sgm'}:{line}: the document that begins here is broken")


def test_reuters_without_some_of_its_files_or_documents_is_refused(folder):
    files = reuters()
    with pytest.raises(ValueError) as error:
        read_folder(folder("a", files | {"reut2-007.sgm": b"<html>404</html>"}))
    one_line(error, "reut2-007.sgm holds no documents")
    del files["reut2-004.sgm"]
    with pytest.raises(FileNotFoundError) as error:
        read_folder(folder("b", files))
    one_line(error, "b holds 21 of Reuters-21578's 22 files")


# -------------------------------------------------------------------------------- wrong folders


@pytest.mark.parametrize(
    "name, files, kind, said",
    [
        ("RTE", ["train.tsv"], FileNotFoundError, ["RTE lacks dev.tsv"]),
        ("RTE", ["dev.tsv", "test.tsv"], FileNotFoundError, ["RTE lacks train.tsv"]),
        ("MNLI", ["train.tsv", "dev.tsv"], FileNotFoundError, ["MNLI lacks dev_matched.tsv"]),
        ("glue", ["train.tsv", "dev.tsv"], ValueError, ["glue has GLUE's files, but", "SST-2"]),
        ("e", ["devset.csv"], FileNotFoundError, ["lacks testset_w_refs.csv, trainset.csv"]),
        ("c", ["eng.train", "eng.testb"], FileNotFoundError, ["c lacks eng.testa"]),
        ("own", ["test.csv", "dev.csv"], ValueError, ["own is in no layout that is known"]),
        ("own", [], ValueError, ["GLUE", "eng.train", "Genia4", "trainset", "reut2", ".jsonl"]),
        (
            "own",
            ["train.csv", "train.jsonl"],
            ValueError,
            ["holds train.jsonl and train.csv: keep"],
        ),
        ("own", ["train.csv", "dev.csv", "val.csv"], ValueError, ["dev.csv and val.csv: keep"]),
    ],
)
def test_what_a_folder_lacks_is_said_in_one_line(folder, name, files, kind, said):
    path = folder(name, dict.fromkeys(files, "text,label\na,b"))
    with pytest.raises(kind) as error:
        read_folder(path)
    one_line(error, path, *said)


def test_a_missing_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("none", "file"):
        with pytest.raises(FileNotFoundError) as error:
            read_folder(tmp_path / name)
        one_line(error, f"{tmp_path / name} is not a folder")


def test_a_bad_row_in_a_folder_is_named_by_file_and_line(folder):
    path = folder("RTE", {"train.tsv": PAIR.format(*A), "dev.tsv": PAIR.format(*B) + "\n1\tx"})
    with pytest.raises(ValueError) as error:
        read_folder(path)
    one_line(error, f"{path / 'dev.tsv'}:3: 2 cells, but 4 columns")


# ------------------------------------------------------------------------------------------ hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """
    A function that writes a data set in a hub's layout: parquet files, and a README.md that says
    which, and the columns' features. `datasets` reads such a folder by owner/name too, as here.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def written(name, config, splits, features):
        folder = tmp_path / name
        lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
        for split, columns in splits.items():
            file = f"{config}/{split}-00000-of-00001.parquet"
            lines += [f"  - split: {split}", f"    path: {file}"]
            (folder / config).mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / file)
        lines += ["dataset_info:", f"- config_name: {config}", "  features:"]
        for column, feature in features.items():
            lines += [f"  - name: {column}", *feature]
        (folder / "README.md").write_text("\n".join([*lines, "---", ""]))

    return written


def kind(dtype):
    return [f"    dtype: {dtype}"]


def classes(*names, indent="    ", key="dtype"):
    lines = [f"{indent}{key}:", f"{indent}  class_label:", f"{indent}    names:"]
    return lines + [f"{indent}      '{i}': '{name}'" for i, name in enumerate(names)]


TEXTS = {"sentence1": kind("string"), "sentence2": kind("string"), "idx": kind("int32")}


def rows(label, **columns):
    columns = columns or {"sentence1": ["It rains."], "sentence2": ["Is it rain?"]}
    return columns | {"label": label, "idx": list(range(len(label)))}


def test_a_glue_task_of_the_hub_has_its_classes_names_and_no_unlabelled_test(hub):
    splits = {"train": rows([0]), "validation": rows([1]), "test": rows([-1])}
    names = classes("entailment", "not_entailment")
    hub("nyu-mll/glue", "rte", splits, TEXTS | {"label": names})
    example = {"text": "It rains.", "text_b": "Is it rain?"}
    expected = {
        "train": [example | {"label": "entailment"}],
        "dev": [example | {"label": "not_entailment"}],
        "test": [],
    }
    assert read_hub("nyu-mll/glue:rte") == (expected, "rte")


def test_mrpc_of_the_hub_is_that_of_the_archive(hub, folder):
    """GLUE's F1 is that of class "1", which the hub calls "equivalent"."""
    columns = {"sentence1": ["It rains."], "sentence2": ["Is it rain?"]}
    splits = {"train": rows([1], **columns), "validation": rows([0]), "test": rows([-1])}
    hub("nyu-mll/glue", "mrpc", splits, TEXTS | {"label": classes("not_equivalent", "equivalent")})
    text = GLUE[2][2]
    files = {"train.tsv": text.format("rain", 1), "dev.tsv": text.format("rain", 0)}
    assert read_hub("nyu-mll/glue:mrpc") == read_folder(folder("MRPC", files))


def test_sts_b_of_the_hub_becomes_scores(hub):
    splits = {"train": rows([3.5]), "validation": rows([0.0]), "test": rows([-1.0])}
    hub("nyu-mll/glue", "stsb", splits, TEXTS | {"label": kind("float32")})
    splits, task = read_hub("nyu-mll/glue:stsb")
    assert task == "stsb" and splits["test"] == []
    assert [x["score"] for x in splits["train"] + splits["dev"]] == [3.5, 0.0]


def test_a_number_of_minus_one_among_others_is_a_score(hub):
    columns = {"text": ["a", "b"], "label": [-1.0, 1.0]}
    hub("me/set", "default", {"train": columns}, {"text": kind("string"), "label": kind("float64")})
    splits, _ = read_hub("me/set")
    assert [x["score"] for x in splits["train"]] == [-1.0, 1.0]


def test_mnli_of_the_hub_has_both_kinds_of_dev_examples(hub):
    pair = {"premise": ["It rains."], "hypothesis": ["Is it rain?"]}
    names = ("train", "validation_matched", "validation_mismatched", "test_matched")
    splits = {name: rows([label], **pair) for name, label in zip(names, (2, 1, 0, -1))}
    features = {"premise": kind("string"), "hypothesis": kind("string"), "idx": kind("int32")}
    features["label"] = classes("entailment", "neutral", "contradiction")
    hub("nyu-mll/glue", "mnli", splits, features)
    splits, task = read_hub("nyu-mll/glue:mnli")
    assert task == "mnli" and splits["test"] == []
    labels = [splits[name][0]["label"] for name in ("train", "dev", "mismatched")]
    assert labels == ["contradiction", "neutral", "entailment"]


@pytest.mark.parametrize(
    "columns, example",
    [
        ({"sentence": ["a"], "label": [1]}, {"text": "a", "label": "yes"}),
        ({"text": ["a"], "label": [1]}, {"text": "a", "label": "yes"}),
        (
            {"question": ["a"], "sentence": ["b"], "label": [0]},
            {"text": "a", "text_b": "b", "label": "no"},
        ),
        (
            {"question1": ["a"], "question2": ["b"], "label": [0]},
            {"text": "a", "text_b": "b", "label": "no"},
        ),
        (
            {"instruction": ["a"], "input": ["b"], "output": ["c"], "label": [1]},
            {"instruction": "a", "input": "b", "output": "c"},
        ),
    ],
)
def test_the_columns_of_a_hub_s_set_decide_an_example_s_keys(hub, columns, example):
    features = {name: kind("string") for name in columns} | {"label": classes("no", "yes")}
    hub("me/set", "default", {"train": columns}, features)
    assert read_hub("me/set")[0]["train"] == [example]


def test_rows_without_a_label_or_without_words_are_left_out(hub):
    features = {"text": kind("string"), "label": classes("no", "yes")}
    hub("me/a", "default", {"train": {"text": ["a", "b"], "label": [-1, 1]}}, features)
    assert read_hub("me/a")[0]["train"] == [{"text": "b", "label": "yes"}]


def test_tags_of_the_hub_become_their_names(hub):
    columns = {"tokens": [["Ann", "sat"], [], ["Hm"]], "ner_tags": [[1, 0], [], [0]]}
    inner = classes("O", "B-PER", indent="      ", key="dtype")
    features = {"tokens": ["    sequence: string"], "ner_tags": ["    sequence:", *inner]}
    hub("me/ner", "default", {"train": columns, "test": columns}, features)
    expected = [{"words": ["Ann", "sat"], "tags": ["B-PER", "O"]}, {"words": ["Hm"], "tags": ["O"]}]
    assert read_hub("me/ner") == ({"train": expected, "dev": [], "test": expected}, None)


def test_several_labels_of_the_hub_become_their_names(hub):
    inner = classes("joy", "fear", indent="      ")
    features = {"text": kind("string"), "labels": ["    sequence:", *inner]}
    hub("me/feel", "default", {"train": {"text": ["a", "b"], "labels": [[1, 0], []]}}, features)
    assert read_hub("me/feel")[0]["train"] == [
        {"text": "a", "labels": ["fear", "joy"]},
        {"text": "b", "labels": []},
    ]


def test_e2e_of_the_hub_has_its_references_joined(hub):
    columns = {"meaning_representation": ["m", "n", "m"], "human_reference": ["1", "2", "3"]}
    features = {name: kind("string") for name in columns}
    hub("me/e2e", "default", {"train": columns}, features)
    expected = [{"prompt": "m", "references": ["1", "3"]}, {"prompt": "n", "references": ["2"]}]
    assert read_hub("me/e2e")[0]["train"] == expected
    columns = {"meaning_representation": ["m", "n"], "human_references": [["1", "3"], ["2"]]}
    features = {"meaning_representation": kind("string")}
    features["human_references"] = ["    sequence: string"]
    hub("me/e2e-lists", "default", {"train": columns}, features)
    assert read_hub("me/e2e-lists")[0]["train"] == expected


def test_name_config_and_revision_reach_the_library_and_code_is_never_trusted(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((*arguments, options["revision"], options["trust_remote_code"]))
        return {"train": datasets.Dataset.from_dict({"text": ["a"], "label": ["b"]})}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("o/n", "o/n:c", "o/n@v1", "o/n:c-1.0@refs/pr/2"):
        assert read_hub(name)[0]["train"] == [{"text": "a", "label": "b"}]
    assert calls == [
        ("o/n", None, None, False),
        ("o/n", "c", None, False),
        ("o/n", None, "v1", False),
        ("o/n", "c-1.0", "refs/pr/2", False),
    ]


# ----------------------------------------------------------------------------------- wrong sets


def test_a_name_that_is_no_hub_s_is_refused():
    for name in ("glue", "a/b/c", "a/b:", "a/b@", "/a", "a b/c", "a/b:c@"):
        with pytest.raises(ValueError) as error:
            read_hub(name)
        one_line(error, f"{name!r} is not owner/name or owner/name:config")


def test_an_unknown_config_is_named_with_the_ones_there_are(hub):
    hub("nyu-mll/glue", "rte", {"train": rows([0])}, TEXTS | {"label": classes("a", "b")})
    with pytest.raises(ValueError) as error:
        read_hub("nyu-mll/glue:rtee")
    one_line(error, "data set 'nyu-mll/glue:rtee' could not be read: ", "'rtee' not found", "'rte'")


def test_a_set_that_is_neither_here_nor_reachable_is_said_in_one_line(hub):
    with pytest.raises(ValueError) as error:
        read_hub("nobody/nothing")
    one_line(error, "data set 'nobody/nothing' could not be read: ", "Hub")


def test_a_damaged_file_s_own_reason_is_given(hub, tmp_path):
    columns = {"text": ["a"], "label": ["x"]}
    hub("me/set", "default", {"train": columns}, dict.fromkeys(columns, kind("string")))
    (tmp_path / "me/set/default/train-00000-of-00001.parquet").write_bytes(b"PAR1, cut off")
    with pytest.raises(ValueError) as error:
        read_hub("me/set")
    one_line(error, "data set 'me/set' could not be read: ", "magic bytes not found")


def test_a_label_outside_its_classes_is_named(hub):
    features = {"text": kind("string"), "label": classes("no", "yes")}
    hub("me/set", "default", {"train": {"text": ["a", "b"], "label": [0, 7]}}, features)
    with pytest.raises(ValueError) as error:
        read_hub("me/set")
    one_line(error, "me/set, train, row 2: 'label' is 7, but its classes are 0 to 1")


@pytest.mark.parametrize(
    "columns, features, said",
    [
        ({"title": ["a"]}, {}, "me/set, train: the columns are title; these are needed: "),
        (
            {"text": ["a", ""], "label": ["x", " "]},
            {},
            "me/set, train, row 2: the answer is empty: fill in 'label'",
        ),
        ({"text": ["a", None], "label": ["x", "y"]}, {}, "row 2: 'text' is NoneType, not a string"),
        (
            {"text": ["a", "b"], "label": [0, None]},
            {"label": classes("no", "yes")},
            "me/set, train, row 2: 'label' is None, but its classes are 0 to 1",
        ),
        (
            {"tokens": [["a"]], "ner_tags": [[3]]},
            {"tokens": ["    sequence: string"], "ner_tags": ["    sequence: int64"]},
            "me/set, train, row 1: 'ner_tags' is int, not a string",
        ),
        ({"text": ["a"], "labels": ["joy"]}, {}, "row 1: 'labels' is str, not a list of strings"),
        (
            {"tokens": [["a", "b"]], "ner_tags": [["O"]]},
            {"tokens": ["    sequence: string"], "ner_tags": ["    sequence: string"]},
            "me/set, train, row 1: 2 words and 1 tags",
        ),
        (
            {"meaning_representation": ["a"], "human_references": [[""]]},
            {"human_references": ["    sequence: string"]},
            "me/set, train, row 1: the answer is empty: fill in 'human_references'",
        ),
        (
            {"text": ["a"], "label": [-1]},
            {"label": classes("no", "yes")},
            "no labelled examples in a split called train; its splits are train",
        ),
    ],
)
def test_a_bad_row_of_a_hub_s_set_is_named_by_split_and_number(hub, columns, features, said):
    strings = {name: kind("string") for name in columns}
    hub("me/set", "default", {"train": columns}, strings | features)
    with pytest.raises(ValueError) as error:
        read_hub("me/set")
    one_line(error, "me/set", said)


def test_without_a_train_split_the_splits_are_named(hub):
    columns = {"text": ["a"], "label": ["x"]}
    hub(
        "me/set",
        "default",
        {"test": columns, "extra": columns},
        {n: kind("string") for n in columns},
    )
    with pytest.raises(ValueError) as error:
        read_hub("me/set")
    one_line(error, "no labelled examples in a split called train; its splits are test, extra")


def test_without_the_library_the_pip_command_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="'a/b' needs datasets .*: pip install datasets$"):
        read_hub("a/b")
