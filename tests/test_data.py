"""Tokens against the tokenizers library, loss masks by hand, and the readers' messages."""

import json
import random

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer as Peer, decoders, models, normalizers, pre_tokenizers, trainers

import data
from data import Tokenizer, batches, encode, load_examples, split
from pretrained import find_model

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CORPUS = ["the film's 1st half isn't bad, it's 100% good fun; we'll see   what he'd say in 2024",
          "le café était très bon", "电影很好看 电影", "good film bad film  ", "  the end.\n\n\tThe 3 films", "naïve façade 😀🎬 film", "don't I'M"] * 20


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def pre_tokenizer(kind):
    return {
        "smollm2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
        "gpt2": lambda: byte_level(),
        "qwen2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), byte_level(False)]),
    }[kind]()


def trained_tokenizer(folder, kind, alphabet=True, template=CHATML):
    """A small tokenizer of one family, trained here by the tokenizers library. alphabet=False: bytes not seen have no token."""
    peer = Peer(models.BPE())
    peer.pre_tokenizer, peer.decoder = pre_tokenizer(kind), decoders.ByteLevel()
    if kind == "qwen2":
        peer.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    peer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, special_tokens=[AddedToken(t, normalized=False) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [], show_progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    peer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"chat_template": template} if template else {})))
    return peer


NASTY = ["", " ", "  ", "\n", " \n\t ", "a  b   c", "  lead", "trail  ", "12345", "a1b2 3 44", " 5", "  5", "   55 ", "½ ² ٣ Ⅳ x²", "it's IT'S 'tis",
         "😀😀 👩‍👩‍👧‍👦🏳️‍🌈", "电影 很好看。電影！", "ﬁ ﬂ Å Å é", "مرحبا שלום", "a\u00a0b\u2003c\u200bd", "\x00\x04\x06\x13 a\x04b \x1d", "<|im_end|>", "x<|im_start|>user\n<|im_end|>y",
         "<|im_en", "<|im_start|><|im_start|> ", "\r\n\r\n x", "...!!! ?? --", "naïve\u0301", "\U000f0000\U00100000\U0003ffff", "'", "''s 'S", "e\u0301" * 5]


def random_texts(count):
    rng = random.Random(0)
    pieces = NASTY + ["film", " good", "the", "'re", "9", "é", "界", "\n", " ", "\t", "🎬", "ž", "Ω", "-", "don't"]
    return [
        "".join(rng.choice(pieces) if rng.random() < 0.7 else chr(rng.choice((rng.randrange(32, 127), rng.randrange(128, 0x3000), rng.randrange(0x1f300, 0x1fa00))))
                for _ in range(rng.randrange(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("alphabet", [True, False])
@pytest.mark.parametrize("kind", ["smollm2", "gpt2", "qwen2"])
def test_tokens_equal_the_tokenizers_library(tmp_path, kind, alphabet):
    """Also where some bytes have no token, as in SmolLM2: both drop them."""
    peer, ours = trained_tokenizer(tmp_path, kind, alphabet), Tokenizer.from_pretrained(tmp_path)
    for text in NASTY + random_texts(3000):
        ids = ours.encode(text)
        assert ids == peer.encode(text).ids, repr(text)
        assert ours.decode(ids, skip_special=False) == peer.decode(ids, skip_special_tokens=False), repr(text)


def test_decode_leaves_special_tokens_out_on_request(tmp_path):
    trained_tokenizer(tmp_path, "smollm2")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("good<|im_end|> film")
    assert tokenizer.decode(ids) == "good film" and tokenizer.decode(ids, skip_special=False) == "good<|im_end|> film"
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)


def test_chat_template_equals_transformers_and_runs_sandboxed(tmp_path):
    import transformers

    trained_tokenizer(tmp_path, "smollm2")
    ours, peer = Tokenizer.from_pretrained(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi {{ 7*7 }}"}, {"role": "assistant", "content": "Hello."}]
    for messages, prompt in ((talk, False), (talk[:2], True)):
        assert ours.apply_chat_template(messages, prompt) == peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    trained_tokenizer(tmp_path / "bad", "smollm2", template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="unsafe"):
        Tokenizer.from_pretrained(tmp_path / "bad").apply_chat_template(talk)
    trained_tokenizer(tmp_path / "picky", "smollm2", template="{{ raise_exception('no system please') }}")
    with pytest.raises(ValueError, match="no system please"):
        Tokenizer.from_pretrained(tmp_path / "picky").apply_chat_template(talk)


@pytest.mark.parametrize("change, named", [
    (lambda t: t["model"].update(type="Unigram"), "Unigram"), (lambda t: t.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"), (lambda t: t["model"]["merges"].reverse(), "orders"),
    (lambda t: t["model"].pop("vocab"), "damaged"), (lambda t: t["added_tokens"][0].update(lstrip=True), "swallows spaces")])
def test_a_tokenizer_that_cannot_be_exact_is_refused(tmp_path, change, named):
    trained_tokenizer(tmp_path, "smollm2")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=named):
        Tokenizer.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------- loss masks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model's tokenizer: one token a byte, so masks can be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIDORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Tokenizer.from_pretrained(find_model("tiny-random"))


def masked(tokenizer, example, **options):
    """(the whole row as text, the part that counts as text)"""
    rows, _ = encode([example], tokenizer, 400, **options)
    row, = rows
    assert len(row.input_ids) == len(row.labels)
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels))
    return tokenizer.decode(row.input_ids, skip_special=False), tokenizer.decode([t for t in row.labels if t != -100], skip_special=False)


def test_loss_masks_by_hand(tiny):
    end, user, assistant = "<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n"
    assert masked(tiny, {"text": "A film."}) == (f"A film.{end}",) * 2
    assert masked(tiny, {"code": "x = 1\n"}) == (f"x = 1\n{end}",) * 2
    assert masked(tiny, {"prompt": "1+1=", "completion": "2"}) == (f"1+1=2{end}", f"2{end}")
    assert masked(tiny, {"instruction": "Add.", "input": "1 1", "output": "2"}) == (f"{user}Add.\n\n1 1{end}\n{assistant}2{end}", f"2{end}")
    assert masked(tiny, {"instruction": "Hi", "output": "Ho"}) == (f"{user}Hi{end}\n{assistant}Ho{end}", f"Ho{end}")
    assert masked(tiny, {"text": "Nice.", "label": "good"}, label_prompt="{labels}? {text}", label_ids=data.tokenize_labels(["bad", "good"], tiny)) == (
        f"{user}bad, good? Nice.{end}\n{assistant}good", "good")
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    assert masked(tiny, {"messages": talk}) == (
        f"<|im_start|>system\nS{end}\n{user}a{end}\n{assistant}b{end}\n{user}c{end}\n{assistant}d{end}", f"b{end}d{end}")


def test_train_on_prompt_counts_everything(tiny):
    whole, counted = masked(tiny, {"prompt": "1+1=", "completion": "2"}, train_on_prompt=True)
    assert whole == counted


def test_a_tokenizer_without_chat_template_uses_a_plain_one(tmp_path):
    trained_tokenizer(tmp_path, "smollm2", template=None)
    whole, counted = masked(Tokenizer.from_pretrained(tmp_path), {"instruction": "Hi", "output": "Ho"})
    assert (whole, counted) == ("User:\nHi<|im_end|>\nAssistant:\nHo<|im_end|>", "Ho<|im_end|>")


def test_long_examples_lose_the_left_of_the_prompt_never_the_answer(tiny):
    rows, cut = encode([{"prompt": "p" * 50, "completion": "answer"}, {"prompt": "p", "completion": "a"}], tiny, 20)
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
    assert [tiny.decode(ids, skip_special=False) for ids in data.tokenize_labels(["bad", "good"], tiny).values()] == ["bad", "good"]
    ended = data.tokenize_labels(["1", "10"], tiny)
    assert [tiny.decode(ids, skip_special=False) for ids in ended.values()] == ["1<|im_end|>", "10<|im_end|>"]


def test_batches_pad_on_the_right_and_show_every_row_each_epoch(tiny):
    rows, _ = encode([{"prompt": "p" * n, "completion": "c"} for n in range(1, 11)], tiny, 64)
    stream = batches(rows, 5, pad_id=0, seed=0)
    seen = []
    for _ in range(4):
        input_ids, labels = next(stream)
        lengths = (input_ids != 0).sum(1)
        seen += lengths.tolist()
        for row, target, length in zip(input_ids, labels, lengths):
            assert (row[length:] == 0).all() and (target[length:] == -100).all() and target[length - 1] == tiny.eos_id
    assert sorted(seen[:10]) == sorted(seen[10:]) == [n + 2 for n in range(1, 11)] and seen[:10] != seen[10:]
    assert torch.equal(next(batches(rows, 5, 0, seed=3))[0], next(batches(rows, 5, 0, seed=3))[0])
    assert next(batches(rows, 100, 0, 0))[0].size(0) == 10


# ------------------------------------------------------------------------------------- files and splits


def test_jsonl_formats_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "label": 1}\r\n\n{"text": "b", "label": 0}')
    assert load_examples(path) == [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}]


@pytest.mark.parametrize("line, said", [
    (b'{"text": "a"', "not JSON"), (b'{"text": "\xff"}', "not UTF-8"), (b'{"question": "a"}', "has the keys question"), (b'["a"]', "no JSON object"),
    (b'{"prompt": "a", "completion": " "}', "answer is empty"), (b'{"instruction": "a", "output": ""}', "answer is empty"),
    (b'{"text": "a", "label": ""}', "answer is empty"), (b'{"text": 5}', "'text' is int"), (b'{"text": "a", "label": ["b"]}', "'label' is list"), (b'{"messages": []}', "assistant"),
    (b'{"messages": [{"role": "user"}]}', "role and content"), (b'{"messages": [{"role": "assistant", "content": ""}]}', "answer is empty"),
    (b'{"prompt": "a", "completion": "b"}', "one format a file"), (b'[' * 100000, "not JSON")])
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
    with pytest.raises(ValueError, match="2 examples of label 'rare' leaves an empty part"):
        split(examples[:6], 0.2)


def test_toy_sentiment_is_balanced():
    labels = [example["label"] for example in data.toy_sentiment()]
    assert labels.count("yes") == labels.count("no") == 1000
