"""Loss masks by hand and against transformers, and the readers' messages."""

import collections
import json
import random
import re
import shutil
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from test_tokenizer import Listener, change_json, trained_tokenizer

import data
import sample
import train
from config import Config
from data import Tokenizer, encode, load_examples, split
from support.text import datasets
from support.text.splits import sample_built_in
from support.weights.pretrained import find_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model's tokenizer: one token a byte, so masks can be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIDORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Tokenizer.from_pretrained(find_model("tiny-random"))


END, USER, ASSISTANT = "<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n"


def masked(tokenizer, example, **options):
    """(the whole row as text, the part that counts as text)"""
    [row], _ = encode([example], tokenizer, 400, **options)
    assert len(row.input_ids) == len(row.labels)
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels))
    counted = [token for token in row.labels if token != -100]
    return tuple(tokenizer.decode(ids, skip_special=False) for ids in (row.input_ids, counted))


ADD = {"instruction": "Add.", "input": "1 1", "output": "2"}
TURNS = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


@pytest.mark.parametrize(
    "example, before, counted",
    [
        ({"text": "A film."}, "", f"A film.{END}"),
        ({"code": "x = 1\n"}, "", f"x = 1\n{END}"),
        ({"prompt": "1+1=", "completion": "2"}, "1+1=", f"2{END}"),
        (ADD, f"{USER}Add.\n\n1 1{END}\n{ASSISTANT}", f"2{END}"),
        ({"instruction": "Hi", "output": "Ho"}, f"{USER}Hi{END}\n{ASSISTANT}", f"Ho{END}"),
    ],
)
def test_loss_masks_by_hand(tiny, example, before, counted):
    assert masked(tiny, example) == (before + counted, counted)
    assert masked(tiny, example, train_on_prompt=True) == (before + counted, before + counted)


def test_the_label_alone_counts(tiny):
    question = dict(label_prompt="{labels}? {text}")
    question["label_ids"] = data.tokenize_labels(["bad", "good"], tiny)
    expected = f"{USER}bad, good? Nice.{END}\n{ASSISTANT}good"
    assert masked(tiny, {"text": "Nice.", "label": "good"}, **question) == (expected, "good")


INSTRUCTION = {"instruction": "c", "output": "d", "system": "S", "history": [["a", "b"]]}


@pytest.mark.parametrize(
    "talk",
    [{"messages": [{"role": role, "content": text} for role, text in TURNS]}, INSTRUCTION],
    ids=["messages", "instruction"],
)
def test_all_answers_of_a_conversation_count(tiny, talk):
    turns = f"{USER}a{END}\n{ASSISTANT}b{END}\n{USER}c{END}\n{ASSISTANT}d{END}"
    assert masked(tiny, talk) == (f"<|im_start|>system\nS{END}\n{turns}", f"b{END}d{END}")


def test_rows_keep_numbers_of_any_size():
    for ids in ([], [-100, 3, -100, 7], [-100, 255], [256], [65535], [65536, 5]):
        assert data.Encoded(ids, [-100, *ids]).labels == [-100, *ids]


def test_long_examples_lose_the_left_of_the_prompt_never_the_answer(tiny):
    long = {"prompt": "p" * 50, "completion": "answer"}
    rows, cut = encode([long, {"prompt": "p", "completion": "a"}], tiny, 20)
    assert cut == 1 and len(rows[0].input_ids) == 20
    assert tiny.decode(rows[0].input_ids, skip_special=False) == "p" * 13 + f"answer{END}"
    with pytest.raises(ValueError, match="begins with 'aaaa.*block_size=20"):
        encode([{"prompt": "p", "completion": "a" * 30}], tiny, 20)


# A question with the text in its middle, and the tiny model's chat template around a question
QUESTION, SCAFFOLD = "ok, bad? {text}!", USER + "{}" + f"{END}\n{ASSISTANT}"


def with_room_for(room, tokenizer):
    """(block_size, label_ids) that leave `room` tokens for a text: "bad" is the longest label."""
    label_ids = data.tokenize_labels(["bad", "ok"], tokenizer)
    around = tokenizer.encode(SCAFFOLD.format(QUESTION.replace("{text}", "")))
    return len(around) + len("bad") + room, label_ids


def test_a_long_classification_example_loses_the_left_of_its_text_and_nothing_else(tiny):
    """The tiny model has one token a byte, so what is left can be counted."""
    block_size, label_ids = with_room_for(16, tiny)
    examples = [{"text": "x" * 30 + "0123456789abcdef", "label": label} for label in ("bad", "ok")]
    examples.append({"text": "0123456789abcdef", "label": "ok"})
    rows, cut = encode(examples, tiny, block_size, QUESTION, label_ids)
    kept = SCAFFOLD.format(QUESTION.replace("{text}", "0123456789abcdef"))
    for row, example in zip(rows, examples):
        assert tiny.decode(row.prompt_ids, skip_special=False) == kept
        assert tiny.decode(row.input_ids, skip_special=False) == kept + example["label"]
        assert tiny.decode([t for t in row.labels if t != -100]) == example["label"]
    assert cut == 2


def test_a_text_is_cut_between_characters(tiny):
    """Of 16 tokens, each a byte, five euro signs take 15; a sixth would be cut in two."""
    block_size, label_ids = with_room_for(16, tiny)
    [row], _ = encode([{"text": "€" * 8, "label": "ok"}], tiny, block_size, QUESTION, label_ids)
    kept = SCAFFOLD.format(QUESTION.replace("{text}", "€" * 5))
    assert tiny.decode(row.prompt_ids, skip_special=False) == kept


def test_sample_cuts_a_long_text_as_training_does(tiny):
    block_size, label_ids = with_room_for(16, tiny)
    text, model = "a longer text than there is room for", Listener()
    sample.classify(model, tiny, text, list(label_ids), QUESTION, block_size)
    [row], _ = encode([{"text": text, "label": "ok"}], tiny, block_size, QUESTION, label_ids)
    assert model.heard == [row.prompt_ids]


def test_a_question_that_leaves_no_room_is_refused(tiny):
    block_size, label_ids = with_room_for(-1, tiny)
    for text in ("", "x" * 30):
        with pytest.raises(ValueError, match=f"block_size={block_size} must hold .* question"):
            encode([{"text": text, "label": "ok"}], tiny, block_size, QUESTION, label_ids)


def test_long_plain_text_is_laid_out_in_rows(tiny):
    text = "".join(chr(97 + i % 26) for i in range(50))
    rows, cut = encode([{"text": text}], tiny, 20)
    assert cut == 0 and [len(row.input_ids) for row in rows] == [20, 20, 13]
    predicted = rows[0].input_ids[:1] + [token for row in rows for token in row.labels[1:]]
    assert tiny.decode(predicted, skip_special=False) == text + "<|im_end|>"  # each token once
    rows, _ = encode([{"text": "a" * 39}], tiny, 20)  # 40 tokens with the end: none may fall off
    assert sum(len(row.labels) - 1 for row in rows) == 39


@pytest.mark.parametrize(
    "labels, written", [(["bad", "good"], ["bad", "good"]), (["1", "10"], [f"1{END}", f"10{END}"])]
)
def test_a_label_that_begins_another_gets_an_end(tiny, labels, written):
    rows = data.tokenize_labels(labels, tiny).values()
    assert [tiny.decode(ids, skip_special=False) for ids in rows] == written


def test_batches_pad_on_the_right_and_show_every_row_each_epoch(tiny):
    rows, _ = encode([{"prompt": "p" * n, "completion": "c"} for n in range(1, 11)], tiny, 64)
    batches, seen = data.Batches(rows, 5, seed=0), []
    for k in range(4):
        for ids, labels in zip(*data.collate(batches[k], pad_id=0)):
            length = int((ids != 0).sum())
            seen.append(length)
            assert (ids[length:] == 0).all() and (labels[length:] == -100).all()
            assert labels[length - 1] == tiny.eos_id
    assert sorted(seen[:10]) == sorted(seen[10:]) == [n + 2 for n in range(1, 11)]
    assert seen[:10] != seen[10:]
    assert len(data.Batches(rows, 100, seed=0)[0]) == 10


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_depends_on_its_number_alone(group_by_length, shuffle):
    rows = [data.Encoded([i] * (1 + i % 3), []) for i in range(7)]
    options = (3, 5, group_by_length, shuffle)
    batches = data.Batches(rows, *options)
    in_order = [batches[k] for k in range(12)]
    assert [batches[k] for k in range(12)[::-1]] == in_order[::-1]
    assert [data.Batches(rows, *options)[k] for k in range(12)] == in_order


def test_jsonl_formats_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "label": 1}\r\n\n{"text": "b", "label": 0}')
    assert load_examples(path) == [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}]


ANSWERED = b'{"messages": [{"role": "assistant", "content": "a"'
INSTRUCTED = b'{"instruction": "a", "output": "b"'


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"question": "a"}', "has the keys question"),
        (b'["a"]', "is not a JSON object"),
        (b'{"prompt": "a", "completion": " "}', "answer is empty"),
        (b'{"instruction": "a", "output": ""}', "answer is empty"),
        (b'{"text": "a", "label": ""}', "answer is empty"),
        (b'{"text": 5}', "'text' is int"),
        (b'{"text": "a", "label": ["b"]}', "'label' is list"),
        (b'{"messages": []}', "assistant"),
        (b'{"messages": [{"role": "user"}]}', "role and content"),
        (b'{"messages": [{"role": "assistant", "content": ""}]}', "answer is empty"),
        (ANSWERED + b', "weight": 0}]}', "not to be learnt"),
        (ANSWERED + b', "loss": 0.5}]}', "give 0 or 1"),
        (ANSWERED + b'}], "tools": "x"}', "list of JSON obj"),
        (INSTRUCTED + b', "history": [["c"]]}', "'history' is not a list of p"),
        (INSTRUCTED + b', "history": ["cd"]}', "'history' is str, not a list"),
        (b'{"prompt": "a", "completion": "b"}', "one format per file"),
        (b"[" * 100000, "not JSON"),
        (b'{"text": "' + b"a" * 10_000_000 + b'", "label": ' + b"9" * 5000 + b"}", "data.jsonl:3"),
        (b'{"text": "a", "text": "b"}', "occurs twice"),
        (b'{"text": NaN}', "not a string"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"\x00", "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, said):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(ValueError, match=said) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_a_label_beside_another_format_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b", "label": ["x"]}')
    [example] = load_examples(tmp_path / "a.jsonl")
    assert example == {"prompt": "a", "completion": "b"}
    assert example.notes == ("the key 'label' is not used",)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl.*movie-sentiment"):
        load_examples(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        load_examples(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no examples"):
        load_examples(tmp_path / "empty.jsonl")


def test_split_is_stratified_disjoint_and_repeatable():
    examples = [{"text": str(i), "label": "rare" if i % 5 == 0 else "common"} for i in range(100)]
    train, val = split(examples, 0.2, seed=1)
    assert (len(train), len(val)) == (80, 20) and sum(e["label"] == "rare" for e in val) == 4
    assert sorted(e["text"] for e in train + val) == sorted(e["text"] for e in examples)
    assert split(examples, 0.2, seed=1) == (train, val) != split(examples, 0.2, seed=2)
    few = [{"text": str(i), "label": ("3.5", "yes")[i > 1]} for i in range(9)]
    said = "^test_fraction=0.1 .* '3.5' leaves .* --task=regression$"
    with pytest.raises(ValueError, match=said):
        split(few, 0.1, setting="test_fraction")
    with pytest.raises(ValueError, match="2 examples of label 'rare' leaves an empty split"):
        split(examples[:6], 0.2)


def test_a_split_keeps_groups_whole_and_nearly_its_size_and_its_labels():
    """A quarter has 30 of a and 20 of b. Up to five may be missing: no group fits."""
    rng = random.Random(0)
    examples = [
        {"text": str(i), "label": "a" if i % 5 < 3 else "b", "group": str(rng.randrange(80))}
        for i in range(200)
    ]
    for seed in range(20):
        parts = split(examples, 0.25, seed)
        groups = [{example["group"] for example in part} for part in parts]
        assert not groups[0] & groups[1]
        assert sorted(e["text"] for e in sum(parts, [])) == sorted(e["text"] for e in examples)
        counts = collections.Counter(example["label"] for example in parts[1])
        assert 25 <= counts["a"] <= 30 and 15 <= counts["b"] <= 20
        assert split(examples, 0.25, seed) == parts


def test_a_large_group_is_as_often_in_val_as_a_small_one():
    """The ten fit into a val of 55 if among the first 46 groups. 0.1 is four standard errors."""
    examples = [{"text": str(i), "group": str(max(0, i - 9))} for i in range(110)]
    times = sum(any(e["group"] == "0" for e in split(examples, 0.5, s)[1]) for s in range(400))
    assert times / 400 == pytest.approx(46 / 101, abs=0.1)


TWO_GROUPS = [{"text": str(i), "group": str(i % 2)} for i in range(20)]


def test_a_sample_may_divide_groups():
    _, val = split(TWO_GROUPS, 0.2, seed=1, grouped=False)
    _, expected = split([{"text": example["text"]} for example in TWO_GROUPS], 0.2, seed=1)
    assert [e["text"] for e in val] == [e["text"] for e in expected]


def test_groups_that_are_too_large_to_be_split_are_refused():
    with pytest.raises(ValueError, match="groups stay whole"):
        split(TWO_GROUPS, 0.2)


def test_no_product_review_has_sentences_in_two_splits(model_cache):
    """The archive says which review a sentence is of: 1_3 is the third sentence of review 1."""
    path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(datasets.fetch(datasets.SNIPPETS)) as outer:
        with tarfile.open(fileobj=outer.extractfile(path)) as inner:
            file = inner.extractfile("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt")
            lines = [line.split("\t") for line in file.read().decode().splitlines()]
    reviews = collections.defaultdict(set)
    for name, rating, text in lines:
        if abs(float(rating)) >= 0.5:
            reviews[text.strip()].add(name.split("_")[0])

    for seed in (0, 1):
        config = Config(data="product-sentiment", train_size=200, test_size=300, seed=seed)
        splits = data.load_splits(config).splits
        sizes = [len(splits[name]) for name in ("train", "val", "test")]
        assert sizes == pytest.approx([160, 40, 300], abs=3)
        # "great phone." may be a sentence of two reviews: only those of one review are compared.
        of_one = [
            {review for e in part if len(reviews[e["text"]]) == 1 for review in reviews[e["text"]]}
            for part in splits.values()
        ]
        assert all(of_one) and len(set.union(*of_one)) == sum(map(len, of_one))


def test_of_a_small_built_in_set_each_half_is_taken_by_default():
    examples = [{"prompt": f"a {i}", "completion": "b"} for i in range(213)]
    splits = sample_built_in(Config(data="e2e"), examples)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [106, 0, 106]


def test_a_group_in_a_file_is_a_string_or_an_integer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "group": 1}\n{"text": "b", "group": "x"}\n')
    assert [example["group"] for example in load_examples(path)] == ["1", "x"]
    turns = [{"role": "assistant", "content": "a"}]
    for line in ({"text": "c", "group": [2]}, {"messages": turns, "group": 0.5}):
        path.write_text(json.dumps(line))
        with pytest.raises(ValueError, match=r"a.jsonl:1: 'group' is (list|float), not a string"):
            load_examples(path)


def test_toy_sentiment_is_balanced():
    labels = [example["label"] for example in datasets.BUILT_IN["toy-sentiment"].load()]
    assert labels.count("yes") == labels.count("no") == 1000


def test_batches_grouped_by_length_hold_every_row_once_an_epoch_with_less_padding():
    rows = [data.Encoded([i] * (5 + i * 7 % 40), [1] * (5 + i * 7 % 40)) for i in range(1, 43)]

    def two_epochs(seed=0, **options):
        batches = data.Batches(rows, 4, seed, **options)
        return [data.collate(batches[k], pad_id=0)[0] for k in range(21)]

    grouped = two_epochs(group_by_length=True)
    for half in (grouped[:10], grouped[11:]):
        assert len({row[0].item() for ids in half for row in ids}) == 40
    counts = collections.Counter(row[0].item() for ids in grouped for row in ids)
    assert set(counts.values()) == {2} and len(counts) == 42
    padded, less = (sum(ids.numel() for ids in batches) for batches in (two_epochs(), grouped))
    assert less < 0.85 * padded
    other = two_epochs(seed=1, group_by_length=True)
    assert [ids.shape for ids in other] != [ids.shape for ids in grouped]


class Begins(Exception):
    """Training would begin now."""


@pytest.fixture
def begin(elsewhere, monkeypatch):
    """A function that prepares a run of the tiny model, up to its first step."""

    def stop(*arguments):
        raise Begins

    def begin(**settings):
        options = dict(model="tiny-random", dtype="float32", out_dir="run", overwrite=True)
        with pytest.raises(Begins):
            train.train(Config(**options | settings))

    monkeypatch.setattr(train, "fit", stop)
    return begin


def test_lines_of_a_test_or_val_file_that_are_also_in_another_file_are_counted(begin, capsys):
    """Examples are compared: not the order of their keys, spaces, or keys that nobody reads."""
    for name, numbers, form in (
        ("train", range(20), '{{"text": "{}", "label": "{}"}}'),
        ("val", range(18, 28), '{{"label":  "{1}", "text": "{0}"}}'),
        ("test", [1, 2, 3, 20, 40, 41], '{{"text": "{}", "label": "{}", "source": "me"}}'),
    ):
        lines = [form.format(number, ("no", "yes")[number % 2]) for number in numbers]
        Path(f"{name}.jsonl").write_text("\n".join(lines))

    begin(train_file="train.jsonl", val_file="val.jsonl", test_file="test.jsonl")
    out = capsys.readouterr().out
    assert "2 of 10 lines of val_file are also in train_file" in out
    assert "3 of 6 lines of test_file are also in train_file" in out
    assert "1 of 6 lines of test_file are also in val_file" in out

    begin(train_file="train.jsonl", test_file="test.jsonl")  # val is split off from train_file
    assert "3 of 6 lines of test_file are also in train_file" in capsys.readouterr().out
    begin(train_file="train.jsonl")
    assert "are also in" not in capsys.readouterr().out
    Path("train.jsonl").write_text(2 * (Path("train.jsonl").read_text() + "\n"))
    begin(train_file="train.jsonl", test_fraction=0.5)
    said = re.search(r"(\d+) of (\d+) lines of test_fraction are also", capsys.readouterr().out)
    assert 0 < int(said[1]) <= int(said[2])


def test_what_a_run_leaves_out_of_its_examples_is_said_before_training(begin, capsys):
    """Each once, with its count over all files; a key by its file's own name."""
    labels = ["yes", " yes", "no", "Yes"] * 10
    lines = [{"text": str(i), "label": label} for i, label in enumerate(labels)]
    lines[0]["source"] = lines[1]["weight"] = lines[2]["source"] = None
    Path("train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Path("test.csv").write_text("id,Text,label\n1,a,no\n2, b,no\n")
    begin(train_file="train.jsonl", test_file="test.csv")
    out = capsys.readouterr().out.splitlines()
    assert "; labels Yes (24%), no (29%), yes (48%)" in "".join(out)
    for line in (
        "the key 'source' is not used in 2 of 42 examples",
        "the key 'weight' is not used in 1 of 42 examples",
        "columns are not used (id) in 2 of 42 examples",
        "blanks around 'label' are left out in 10 of 42 examples",
        "blanks around 'text' are left out in 1 of 42 examples",
        "labels that differ by case alone: Yes, yes",
    ):
        assert out.count(line) == 1


def test_labels_that_are_the_same_tokens_are_refused(model_cache, tmp_path):
    """A lower-casing normaliser makes Yes and YES one."""
    trained_tokenizer(tmp_path, "gpt2")
    change_json(tmp_path / "tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(ValueError, match="the labels 'YES' and 'Yes' are one: rename one"):
        data.tokenize_labels(["No", "YES", "Yes"], Tokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "line, said",
    [
        ({"text": "a", "labels": []}, "no example has a label"),
        ({"words": ["a"], "tags": ["O"]}, "all words are tagged O"),
    ],
)
def test_examples_without_any_label_are_refused(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(line)] * 20))
    with pytest.raises(ValueError, match=said):
        data.load_splits(Config(train_file=str(tmp_path / "a.jsonl")))


@pytest.fixture
def residues(model_cache, tmp_path):
    """The tiny model with WordPiece's vocabulary of five residues."""
    shutil.copytree(find_model("tiny-random"), tmp_path / "model")
    vocab = {token: i for i, token in enumerate(["[UNK]", "<|im_end|>", *"MKTAY"])}
    peer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    peer.add_special_tokens(["[UNK]", "<|im_end|>"])
    peer.save(str(tmp_path / "model/tokenizer.json"))


@pytest.mark.parametrize(
    "text, said",
    [
        ("MKTAY", "the tokenizer leaves nothing of 'MKTAY' but unknown"),
        ("M KTAY", "unknown tokens: 50% of train, 50% of val, 0% of test"),
        ("M K T A Y", "tokens in a row (median): 5 in train, 5 in val, 2 in test"),
    ],
)
def test_texts_that_the_tokenizer_lacks_are_counted_or_refused(begin, residues, capsys, text, said):
    for file, content in (("a.jsonl", text), ("b.jsonl", "M A")):
        lines = [json.dumps({"text": content, "label": "MK"[i % 2]}) for i in range(100)]
        Path(file).write_text("\n".join(lines))
    options = dict(model="model", task="classification", train_file="a.jsonl", test_file="b.jsonl")
    if "nothing" in said:
        with pytest.raises(ValueError, match=rf"a.jsonl:\d+: {said}"):
            begin(**options)
    else:
        begin(**options)
        assert said in capsys.readouterr().out


def test_a_padding_token_that_the_model_lacks_does_not_matter(elsewhere):
    """Rows are not padded: a step, and an evaluation, with one."""
    shutil.copytree(find_model("tiny-random"), "model")
    vocab_size = json.loads(Path("model/config.json").read_text())["vocab_size"]
    path = "model/tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.add_special_tokens(["<pad>"])
    assert tokenizer.token_to_id("<pad>") == vocab_size
    tokenizer.save(path)
    change_json(Path("model/tokenizer_config.json"), lambda c: c.update(pad_token="<pad>"))
    sizes = dict(test_size=40, train_size=40, search_steps=1, retrain_steps=0)
    config = Config(model="model", data="toy-sentiment", method="lora", out_dir="run", **sizes)
    assert train.train(config)["after"]["test"]["loss"] > 0


def test_files_are_read_by_the_ends_of_their_names(tmp_path):
    """The same example each time, with its place; an empty line ends a sentence."""
    example = {"text": "ab", "text_b": "cd", "label": "p"}
    (tmp_path / "a.jsonl").write_text(json.dumps(example))
    (tmp_path / "a.csv").write_text("text,text_b,label\nab,cd,p\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([example]), tmp_path / "a.parquet")
    places = {"jsonl": "a.jsonl:1", "csv": "a.csv:2", "parquet": "a.parquet, row 1"}
    for ending, place in places.items():
        [row] = load_examples(tmp_path / f"a.{ending}")
        assert row == example and row.where == f"{tmp_path}/{place}"
    for ending in ("conll", "bio"):
        path = tmp_path / f"a.{ending}"
        path.write_text("ab B-X\ncd O\n\n")
        assert load_examples(path) == [{"words": ["ab", "cd"], "tags": ["B-X", "O"]}]


def test_samples_of_a_published_set_are_drawn_and_its_dev_set_is_the_test(tmp_path):
    """By the papers' rule; with val_fraction=0 the dev set is val, and nothing is tested."""
    for name, count in (("train", 50), ("dev", 30)):
        lines = [json.dumps({"text": f"{name} {i}", "label": "pq"[i % 2]}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def sizes(**settings):
        splits = data.load_splits(Config(data=str(tmp_path), **settings)).splits
        return {part: len(rows) for part, rows in splits.items()}, splits

    counts, splits = sizes()
    assert counts == {"train": 40, "val": 10, "test": 30}
    assert all(row["text"].startswith("dev") for row in splits["test"])
    counts, _ = sizes(train_size=20, test_size=10, seed=3)
    assert counts == {"train": 16, "val": 4, "test": 10}
    assert sizes(train_size=20, seed=3)[1]["train"] != sizes(train_size=20, seed=4)[1]["train"]
    assert sizes(test_size=10, seed=3)[1]["test"] == sizes(test_size=10, seed=4)[1]["test"]
    counts, splits = sizes(val_fraction=0.0)
    assert counts == {"train": 50, "val": 30, "test": 0}
    with pytest.raises(ValueError, match="train_size=1 of 50 examples, drawn label by label"):
        sizes(train_size=1)
