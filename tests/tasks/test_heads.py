"""From text to a head's rows, against transformers' tokenizers; and what a head refuses."""

import json
import random

import pytest
import torch
import transformers
from test_any_model import checkpoint, load, refused
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from support.tasks.any_model import AnyWithHead
from support.tasks.head_task import encode_pairs, encode_words
from support.tasks.heads import IGNORED

LETTERS = "abcdeéß ,.'-"


def texts(count, longest, seed=0):
    """Random texts of words and punctuation."""
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randint(0, longest))) for _ in range(count)]


def tokenizers(folder, family, **options):
    """Transformers' tokenizer of a family, and the tokenizers library's of the file it writes."""
    if family == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = [*"abcde,.'-", *(f"##{c}" for c in "abcde"), "ab", "##cd", "abc", "##ee"]
        vocab = {piece: i for i, piece in enumerate([*special, *pieces])}
        peer = transformers.BertTokenizerFast(vocab=vocab)
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts(200, 60, seed=9), 300, 2, False, special)
        content = json.loads(bpe.to_str())["model"]
        merges = [tuple(pair) for pair in content["merges"]]
        peer = transformers.RobertaTokenizerFast(vocab=content["vocab"], merges=merges)
    peer.save_pretrained(folder)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if family == "roberta" and options:
        peer = transformers.RobertaTokenizerFast(vocab=content["vocab"], merges=merges, **options)
    return ours, peer


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pairs_are_encoded_and_truncated_as_by_transformers(family, tmp_path):
    """Single texts and pairs of any lengths, in rows of 5 to 30 tokens."""
    ours, peer = tokenizers(tmp_path, family)
    ours.enable_padding(length=64)  # which a file may ask for
    rng = random.Random(1)
    for text, other in zip(texts(300, 40), texts(300, 40, seed=1)):
        # For transformers, an empty second text is none.
        other, size = rng.choice([None, f"{other}a"]), rng.randint(5, 30)
        row = peer(text, other, truncation=True, max_length=size, return_token_type_ids=True)
        whole = len(peer(text, other)["input_ids"])
        expected = row["input_ids"], row["token_type_ids"], whole > size
        assert encode_pairs(ours, [(text, other)], size) == [expected]
        assert len(row["input_ids"]) <= size


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_words_stand_on_their_first_tokens_by_transformers_word_ids(family, tmp_path):
    """RoBERTa's file has no space before the first word; transformers demands the option."""
    ours, peer = tokenizers(tmp_path, family, add_prefix_space=True)
    rng = random.Random(2)
    for text in texts(300, 60):
        words, size = text.split(), rng.randint(4, 30)
        row = peer(words, is_split_into_words=True, truncation=True, max_length=size)
        places = row.word_ids()
        seen = [place is None or place in places[:i] for i, place in enumerate(places)]
        expected = [IGNORED if again else place for place, again in zip(places, seen)]
        assert encode_words(ours, words, size) == (row["input_ids"], expected)


UNFIT = {
    "unknown kind": ("sorting", 2, "unknown kind 'sorting': choose classification, multi_label"),
    "one class": ("classification", 1, "labels=1 must be an integer from 2 to 100000 for class"),
    "one tag": ("tagging", 1, "labels=1 must be an integer from 2"),
    "two numbers": ("regression", 2, "labels=2 must be 1 for regression"),
    "no labels": ("multi_label", 0, "labels=0 must be an integer from 1"),
    "a fraction": ("classification", 2.0, "labels=2.0 must be an integer"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_head_that_does_not_exist_is_refused_in_one_line(case, tmp_path):
    kind, labels, message = UNFIT[case]
    checkpoint(tmp_path, "bert")
    with refused(message):
        AnyWithHead.from_pretrained(tmp_path, kind, labels)


NONE = [[IGNORED] * 4] * 2
WRONG = {
    "too large": ("classification", [0, 3], "target 3: classification needs integers from 0 to 2"),
    "negative": ("classification", [0, -100], "target -100: classification needs integers"),
    "a float": ("classification", [0.0, 1.0], "target 0.0: classification needs integers"),
    "wrong shape": ("classification", [[0], [1]], r"targets are \(2, 1\): .* needs \(2,\) here"),
    "too few": ("multi_label", [[0, 1], [1, 0]], r"\(2, 2\): multi_label needs \(2, 3\) here"),
    "two": ("multi_label", [[0, 1, 2]] * 2, "target 2: multi_label needs from 0 to 1"),
    "not a number": ("regression", [0.5, float("nan")], "target nan: regression needs finite"),
    "no row": ("regression", [0.5], r"targets are \(1,\): regression needs \(2,\) here"),
    "a tag too large": ("tagging", [[0, 1, 2, 3]] * 2, "target 3: .* from 0 to 2, or -100"),
    "no tags": ("tagging", NONE, "all targets are -100: a batch needs at least one tag"),
    "tags a row": ("tagging", [0, 1], r"targets are \(2,\): tagging needs \(2, 4\) here"),
}


@pytest.mark.parametrize("case", WRONG)
def test_targets_that_do_not_fit_are_refused_in_one_line(case, tmp_path):
    kind, targets, message = WRONG[case]
    checkpoint(tmp_path, "bert")
    with refused(message):
        load(tmp_path, kind)(torch.full((2, 4), 5), targets=torch.tensor(targets))


def test_rows_that_begin_with_padding_are_refused_where_the_first_token_is_read(tmp_path):
    checkpoint(tmp_path, "bert")
    ids, mask = torch.full((2, 4), 5), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    load(tmp_path, "tagging")(ids, mask)
    with pytest.raises(ValueError, match="a row begins with padding: pad the end"):
        load(tmp_path, "classification")(ids, mask)


def test_text_that_can_not_be_encoded_as_asked_is_refused(tmp_path):
    ours, _ = tokenizers(tmp_path, "bert")
    with pytest.raises(ValueError, match="block_size=3 leaves no room beside 3 special tokens"):
        encode_pairs(ours, [("ab", "cd")], 3)
