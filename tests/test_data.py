"""Loss masks by hand and against transformers, and the readers' messages."""

import collections
import itertools

import pytest
import torch
from test_tokenizer import trained_tokenizer

import data
from data import Tokenizer, batches, encode, load_examples, split
from support.pretrained import find_model

# -------------------------------------------------------------------------------------------- loss
# masks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model's tokenizer: one token a byte, so masks can be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIDORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Tokenizer.from_pretrained(find_model("tiny-random"))


def masked(tokenizer, example, **options):
    """(the whole row as text, the part that counts as text)"""
    rows, _ = encode([example], tokenizer, 400, **options)
    (row,) = rows
    assert len(row.input_ids) == len(row.labels)
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels))
    return tokenizer.decode(row.input_ids, skip_special=False), tokenizer.decode(
        [t for t in row.labels if t != -100], skip_special=False
    )


def test_loss_masks_by_hand(tiny):
    end, user, assistant = "<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n"
    assert masked(tiny, {"text": "A film."}) == (f"A film.{end}",) * 2
    assert masked(tiny, {"code": "x = 1\n"}) == (f"x = 1\n{end}",) * 2
    assert masked(tiny, {"prompt": "1+1=", "completion": "2"}) == (f"1+1=2{end}", f"2{end}")
    assert masked(tiny, {"instruction": "Add.", "input": "1 1", "output": "2"}) == (
        f"{user}Add.\n\n1 1{end}\n{assistant}2{end}",
        f"2{end}",
    )
    assert masked(tiny, {"instruction": "Hi", "output": "Ho"}) == (
        f"{user}Hi{end}\n{assistant}Ho{end}",
        f"Ho{end}",
    )
    assert masked(
        tiny,
        {"text": "Nice.", "label": "good"},
        label_prompt="{labels}? {text}",
        label_ids=data.tokenize_labels(["bad", "good"], tiny),
    ) == (f"{user}bad, good? Nice.{end}\n{assistant}good", "good")
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    assert masked(tiny, {"messages": talk}) == (
        f"<|im_start|>system\nS{end}\n{user}a{end}\n{assistant}b{end}\n"
        f"{user}c{end}\n{assistant}d{end}",
        f"b{end}d{end}",
    )


def test_train_on_prompt_counts_everything(tiny):
    whole, counted = masked(tiny, {"prompt": "1+1=", "completion": "2"}, train_on_prompt=True)
    assert whole == counted


def test_a_tokenizer_without_chat_template_uses_a_plain_one(tmp_path):
    trained_tokenizer(tmp_path, "smollm", template=None)
    whole, counted = masked(
        Tokenizer.from_pretrained(tmp_path), {"instruction": "Hi", "output": "Ho"}
    )
    assert (whole, counted) == ("User:\nHi<|im_end|>\nAssistant:\nHo<|im_end|>", "Ho<|im_end|>")


def test_long_examples_lose_the_left_of_the_prompt_never_the_answer(tiny):
    rows, cut = encode(
        [{"prompt": "p" * 50, "completion": "answer"}, {"prompt": "p", "completion": "a"}], tiny, 20
    )
    assert cut == 1 and len(rows[0].input_ids) == 20
    assert tiny.decode(rows[0].input_ids, skip_special=False) == "p" * 13 + "answer<|im_end|>"
    with pytest.raises(ValueError, match="begins with 'aaaa.*block_size=20"):
        encode([{"prompt": "p", "completion": "a" * 30}], tiny, 20)


def test_long_plain_text_is_laid_out_in_rows(tiny):
    text = "".join(chr(97 + i % 26) for i in range(50))
    rows, cut = encode([{"text": text}], tiny, 20)
    assert cut == 0 and [len(row.input_ids) for row in rows] == [20, 20, 13]
    predicted = rows[0].input_ids[:1] + [token for row in rows for token in row.labels[1:]]
    assert tiny.decode(predicted, skip_special=False) == text + "<|im_end|>"  # each token once
    rows, _ = encode([{"text": "a" * 39}], tiny, 20)  # 40 tokens with the end: none may fall off
    assert sum(len(row.labels) - 1 for row in rows) == 39


def test_a_label_that_begins_another_gets_an_end(tiny):
    assert [
        tiny.decode(ids, skip_special=False)
        for ids in data.tokenize_labels(["bad", "good"], tiny).values()
    ] == ["bad", "good"]
    ended = data.tokenize_labels(["1", "10"], tiny)
    assert [tiny.decode(ids, skip_special=False) for ids in ended.values()] == [
        "1<|im_end|>",
        "10<|im_end|>",
    ]


def test_batches_pad_on_the_right_and_show_every_row_each_epoch(tiny):
    rows, _ = encode([{"prompt": "p" * n, "completion": "c"} for n in range(1, 11)], tiny, 64)
    stream = batches(rows, 5, pad_id=0, seed=0)
    seen = []
    for _ in range(4):
        input_ids, labels = next(stream)
        lengths = (input_ids != 0).sum(1)
        seen += lengths.tolist()
        for row, target, length in zip(input_ids, labels, lengths):
            assert (
                (row[length:] == 0).all()
                and (target[length:] == -100).all()
                and target[length - 1] == tiny.eos_id
            )
    assert (
        sorted(seen[:10]) == sorted(seen[10:]) == [n + 2 for n in range(1, 11)]
        and seen[:10] != seen[10:]
    )
    assert torch.equal(next(batches(rows, 5, 0, seed=3))[0], next(batches(rows, 5, 0, seed=3))[0])
    assert next(batches(rows, 100, 0, 0))[0].size(0) == 10


# ------------------------------------------------------------------------------------- files and
# splits


def test_jsonl_formats_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "label": 1}\r\n\n{"text": "b", "label": 0}')
    assert load_examples(path) == [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}]


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
        (b'{"prompt": "a", "completion": "b"}', "one format per file"),
        (b"[" * 100000, "not JSON"),
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
    assert load_examples(tmp_path / "a.jsonl") == [{"prompt": "a", "completion": "b"}]


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
    with pytest.raises(ValueError, match="2 examples of label 'rare' leaves an empty split"):
        split(examples[:6], 0.2)


def test_toy_sentiment_is_balanced():
    labels = [example["label"] for example in data.BUILT_IN["toy-sentiment"].load()]
    assert labels.count("yes") == labels.count("no") == 1000


def test_batches_grouped_by_length_hold_every_row_once_an_epoch_with_less_padding():
    rows = [data.Encoded([i] * (5 + i * 7 % 40), [1] * (5 + i * 7 % 40)) for i in range(1, 43)]

    def epoch(seed=0, skip=0, **options):
        return list(
            itertools.islice(data.batches(rows, 4, 0, seed, skip, **options), 21 - skip)
        )  # two epochs of 42 rows

    grouped = epoch(group_by_length=True)
    for half in (grouped[:10], grouped[11:]):
        assert len({row[0].item() for ids, _ in half for row in ids}) == 40
    counts = collections.Counter(row[0].item() for ids, _ in grouped for row in ids)
    assert set(counts.values()) == {2} and len(counts) == 42
    cells = [sum(ids.numel() for ids, _ in found) for found in (epoch(), grouped)]
    assert cells[1] < 0.85 * cells[0]
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(epoch(skip=5, group_by_length=True), grouped[5:])
    )
    assert [ids.shape for ids, _ in epoch(seed=1, group_by_length=True)] != [
        ids.shape for ids, _ in grouped
    ]
