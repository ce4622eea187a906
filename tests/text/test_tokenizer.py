"""Tokenizers trained here, against the tokenizers library; chat templates, against transformers."""

import json
import os
import random
import signal
import tracemalloc
import unicodedata

import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Peer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT

import data
import sample
from support.text import chat as chat_module
from support.text.chat import ChatTemplate
from support.text.tokenizer import Tokenizer


def per_turn(turn, opening="<|im_start|>assistant\n", before=""):
    """A chat template: `before`, then `turn` for each message m, then the generation prompt."""
    loop = f"{before}{{% for m in messages %}}{turn}{{% endfor %}}"
    return loop + f"{{% if add_generation_prompt %}}{{{{ '{opening}' }}}}{{% endif %}}"


def marked(answer, other):
    """The part of a chat template for message m, with {% generation %}: the assistant's."""
    mark = "{% if m.role == 'assistant' %}{% generation %}" + answer + "{% endgeneration %}"
    return mark + "{% else %}" + other + "{% endif %}"


CHATML = per_turn(
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    + marked(*["{{ m['content'] + '<|im_end|>' }}"] * 2)
    + "{{ '\n' }}"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CORPUS = [
    "the film's 1st half isn't bad, it's 100% good fun; we'll see   what he'd say in 2024",
    "aaaaaaa bbbbbbbb aabbaabb   abababab",
    "le café était très bon",
    "电影很好看 电影",
    "good film bad film  ",
    "  the end.\n\n\tThe 3 films",
    "naïve façade 😀🎬 film",
    "don't I'M",
] * 20


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split_then_bytes(pattern, behavior="isolated", invert=False):
    split = pre_tokenizers.Split(Regex(pattern), behavior, invert)
    return pre_tokenizers.Sequence([split, byte_level(False)])


def digits_then_bytes(individual):
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual), byte_level()])


PRE_TOKENIZERS = {
    "gpt2": byte_level(),
    "smollm": digits_then_bytes(True),
    "qwen": split_then_bytes(QWEN2_SPLIT),
    "llama3": split_then_bytes(LLAMA3_SPLIT),
    "whole digits": digits_then_bytes(False),
    "with gaps": split_then_bytes(r"\p{L}+|(\d)\d"),
    "matches only": split_then_bytes(r" ?\p{L}+|\p{N}", "removed", True),
    "no split": byte_level(False),
}
FAMILIES = ["gpt2", "smollm", "qwen", "llama3"]


def train(peer, vocab_size, special, alphabet=()):
    sizes = {"vocab_size": vocab_size, "initial_alphabet": list(alphabet)}
    trainer = BpeTrainer(**sizes, special_tokens=special, show_progress=False)
    peer.train_from_iterator(CORPUS, trainer)


def like_llama3(peer, added):
    """As converted from tiktoken's files, `added` ids free: two tokens that form a third merge."""
    before = {"single": "<|im_start|> $A", "special_tokens": [("<|im_start|>", 1)]}
    peer.post_processor = processors.TemplateProcessing(**before)
    spec = json.loads(peer.to_str())
    vocab = spec["model"]["vocab"]
    vocab["ĠxyzĠq"] = max(vocab.values()) + 1 + added  # no merge makes it
    merges = sorted(
        (vocab[t], vocab[t[:i]], vocab[t[i:]], t[:i], t[i:])
        for t in vocab
        for i in range(1, len(t))
        if t[:i] in vocab and t[i:] in vocab
    )
    spec["model"]["merges"] = [[left, right] for *_, left, right in merges]
    return Peer.from_str(json.dumps(spec))


def trained_tokenizer(folder, kind="smollm", alphabet=True, template=CHATML, added=(), **settings):
    """
    A small tokenizer of one family, trained and saved here by the tokenizers library; returns that.
    alphabet=False: bytes that the corpus lacks have no token. settings: of tokenizer_config.json.
    """
    peer = Peer(BPE(ignore_merges=kind == "llama3"))
    peer.pre_tokenizer, peer.decoder = PRE_TOKENIZERS[kind], decoders.ByteLevel()
    if kind == "qwen":
        peer.normalizer = normalizers.NFC()

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special = [AddedToken(token, normalized=False) for token in special]
    train(peer, 460, special, pre_tokenizers.ByteLevel.alphabet() if alphabet else [])
    for token in added:
        peer.add_special_tokens([token]) if token.special else peer.add_tokens([token])

    folder.mkdir(parents=True, exist_ok=True)
    if kind == "llama3":
        peer = like_llama3(peer, len(added))
    peer.save(str(folder / "tokenizer.json"))
    pad_token = {"__type": "AddedToken", "content": "<|endoftext|>"}
    settings = {"eos_token": "<|im_end|>", "pad_token": pad_token} | settings
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return peer


def both(folder, *options, **settings):
    """The library's tokenizer as trained by trained_tokenizer, and ours."""
    return trained_tokenizer(folder, *options, **settings), Tokenizer.from_pretrained(folder)


def change_json(path, change):
    """Rewrite a JSON file after a change in place of its content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


NASTY = [
    *["", " ", "  ", "\n", " \n\t ", "a  b   c", "  lead", "trail  ", "\r\n\r\n x"],
    *["12345", "a1b2 3 44", " 5", "  5", "   55 ", "½ ² ٣ Ⅳ x²", "1234567 12 1 1234"],
    *["it's IT'S 'tis", "'", "''s 'S", "'ſ 'S’s", "...!!! ?? --"],
    *[" xyz q", "aaaaaaaaaaa", "abaabbaab"],
    *["😀😀 👩‍👩‍👧‍👦🏳️‍🌈", "电影 很好看。電影！", "مرحبا שלום", "ｶﾞ", "ß ẞ ı İ", "ﬁ ﬂ Å Å é"],
    *["naïve\u0301", "e\u0301" * 5, "\u0301", "a\u00a0b\u2003c\u200bd", "a\x85b\u2028c\x1c \x1fd"],
    *["\x00\x04\x06\x13 a\x04b \x1d", "\U000f0000\U00100000\U0003ffff"],
    *["<|im_end|>", "x<|im_start|>user\n<|im_end|>y", "<|im_en", "<|im_start|><|im_start|> "],
    *["<|im_end|>\u0338 <|im_end|\u0338>"],
]


# Code points of Unicode 3.2, and emoji: of newer ones, Python's, tiktoken's and other tables differ
CHARACTERS = [
    [c for c in map(chr, range(*edges)) if unicodedata.ucd_3_2_0.category(c) != "Cn"]
    for edges in ((32, 127), (128, 0x3000), (0xAC00, 0xD7A4))
]
CHARACTERS.append([chr(c) for c in range(0x1F300, 0x1FA00)])


def random_texts(count, extra=()):
    """Random texts of these characters, of NASTY and of `extra`."""
    rng = random.Random(0)
    letters = ["film", " good", "the", "'re", "9", "é", "界", "\n", " ", "\t", "🎬", "ž", "Ω", "-"]
    pieces = [*NASTY, *letters, "don't", "\u0300", *extra, *extra]

    def piece():
        return rng.choice(pieces if rng.random() < 0.7 else rng.choice(CHARACTERS))

    return ["".join(piece() for _ in range(rng.randrange(1, 12))) for _ in range(count)]


def assert_equal(ours, peer, texts, decode=True):
    for text in texts:
        ids = ours.encode(text)
        assert ids == peer.encode(text, add_special_tokens=False).ids, repr(text)
        for skip in (False, True) if decode else ():
            assert ours.decode(ids, skip) == peer.decode(ids, skip), repr(text)


@pytest.mark.parametrize("alphabet", [True, False])
@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_20000_texts_equal_the_tokenizers_library(tmp_path, kind, alphabet):
    """3,000 texts for rarer kinds. Bytes without a token (not alphabet) vanish, as SmolLM2's do."""
    peer, ours = both(tmp_path, kind, alphabet)
    assert bool(ours.encoding) == (kind in FAMILIES)
    assert_equal(ours, peer, NASTY + random_texts(20000 if ours.encoding and alphabet else 3000))


@pytest.mark.parametrize("kind", ["gpt2", "qwen"])
@pytest.mark.parametrize("flags", [False, True])
def test_added_tokens_and_their_flags_equal_the_tokenizers_library(tmp_path, kind, flags):
    contents = ["<tool>", "<tool>s", "café", "film"]
    added = [AddedToken(t, special=False, normalized=flags and t != "<tool>") for t in contents]
    if flags:
        added += [
            AddedToken("<l>", lstrip=True, special=True, normalized=False),
            AddedToken("<r>", rstrip=True, special=True, normalized=False),
            AddedToken("<lr>", lstrip=True, rstrip=True, special=False, normalized=True),
            AddedToken("word", single_word=True, special=False, normalized=False),
            AddedToken("wordy", single_word=True, special=False, normalized=True),
        ]
    peer, ours = both(tmp_path, kind, added=added)
    texts = [
        *(t.content for t in added),
        *["cafe\u0301", " <l> <r> <lr> ", "<l>\u00a0\n<r>\x1c", "a\u2003<lr>\u200b b"],
        *["words word, a_word word1 wordé word\u0301", "wordyword word-wordy"],
        *["<tool>s<tool><tool>s", "\u3000<l>\u3000"],
    ]
    assert bool(ours.encoding) != flags
    # No comparison of decoded text: the library decodes the added "café" to "caf\ufffd".
    assert_equal(ours, peer, texts + random_texts(5000, texts), decode=False)
    if not flags:
        ids = ours.encode("<tool>s café <|im_end|>b")
        assert ours.decode(ids, skip_special=True) == "<tool>s café b"


def test_what_a_tokenizer_puts_before_a_text_is_known(tmp_path):
    peer, ours = both(tmp_path, "llama3")
    for text in ("", "a film", "<|im_start|>a"):
        assert ours.prefix_ids + ours.encode(text) == peer.encode(text).ids != ours.encode(text)
    # RoBERTa's puts a token after it, too.
    peer.post_processor = processors.RobertaProcessing(("<|im_end|>", 2), ("<|im_start|>", 1))
    peer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.prefix_ids + ours.encode("a film") == peer.encode("a film").ids[:-1]


def test_a_text_that_tiktoken_gives_up_on_is_tokenized(tmp_path):
    peer, ours = both(tmp_path, "gpt2")
    text = "film" + " " * 10**6 + "film"
    with pytest.raises(ValueError, match="backtracking"):
        ours.encoding.encode(text)
    assert ours.encode(text) == peer.encode(text).ids


def without_tokenizer_json(folder):
    """Write vocab.json and merges.txt in place of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


FLAGS = dict.fromkeys(("rstrip", "single_word", "normalized"), False) | {"special": True}
TAKES_SPACES = {"2": FLAGS | {"content": "<|im_end|>", "lstrip": True}}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    "name, fast, settings, files",
    [
        ("GPT2Tokenizer", True, {}, {}),
        ("Qwen2TokenizerFast", True, {}, {"special_tokens_map": {"eos_token": "<t>"}}),
        ("GPT2Tokenizer", False, {}, {"added_tokens": {"<t>": 900, "<u>": 800}}),
        ("GPT2Tokenizer", False, {"add_prefix_space": True}, {}),
        ("GPT2Tokenizer", False, {"added_tokens_decoder": TAKES_SPACES}, {}),
    ],
)
def test_the_files_beside_tokenizer_json_count(tmp_path, name, fast, settings, files, bare):
    """Tokens that they add or name, a space before the text: with tiktoken, or where it can't."""
    settings = settings | {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    settings["tokenizer_class"] = name
    trained_tokenizer(tmp_path, "qwen" if "Qwen" in name else "gpt2", **settings)
    for file, content in files.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    if bare:
        without_tokenizer_json(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path)
    assert bool(ours.encoding) == fast
    assert (ours.eos_id, ours.pad_id) == (peer.eos_token_id, peer.pad_token_id)
    for text in NASTY + random_texts(1000, [" <t> ", "<u>", " <|im_end|>", "<|im_end|> "]):
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False), repr(text)


def test_truncation_and_padding_in_a_file_are_ignored(tmp_path):
    peer = llama2_tokenizer(tmp_path)
    peer.enable_truncation(8)
    peer.enable_padding(length=12)
    peer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    peer.no_truncation()
    peer.no_padding()
    for text in ("good film " * 20, "a"):
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False).ids


LLAMA2_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def llama2_tokenizer(folder):
    """As LLaMA 2's: SentencePiece's BPE with byte fallback; a word includes the space before it."""
    peer = Peer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    peer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    peer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    train(peer, 600, ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])
    spec = json.loads(peer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    peer = Peer.from_str(json.dumps(spec))
    before = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
    peer.post_processor = processors.TemplateProcessing(**before)
    folder.mkdir(parents=True, exist_ok=True)
    peer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = tokens | {"chat_template": LLAMA2_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return peer


def test_sentencepiece_files_are_read_by_the_tokenizers_library(tmp_path):
    peer, ours = llama2_tokenizer(tmp_path), Tokenizer.from_pretrained(tmp_path)
    assert not ours.encoding
    assert_equal(ours, peer, NASTY + random_texts(300))
    assert ours.prefix_ids + ours.encode("a film") == peer.encode("a film").ids


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
ANCHORED = {"type": "Split", "pattern": {"Regex": r"film$|\p{L}+"}, "behavior": "Isolated"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model"]["merges"].reverse(),
        lambda t: t["model"]["merges"].pop(),  # then no merge makes one of its tokens
        lambda t: t["model"].update(end_of_word_suffix="</w>"),
        lambda t: t["model"].update(byte_fallback=True),
        lambda t: t.update(normalizer={"type": "Lowercase"}),
        lambda t: t.update(pre_tokenizer=METASPACE),
        lambda t: t["pre_tokenizer"].update(pretokenizers=[ANCHORED | {"invert": False}, BYTES]),
        lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    ],
)
def test_what_tiktoken_cannot_reproduce_is_left_to_the_library(tmp_path, change):
    trained_tokenizer(tmp_path)
    change_json(tmp_path / "tokenizer.json", change)
    peer = Peer.from_file(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert not ours.encoding
    assert_equal(ours, peer, NASTY)


def test_errors_name_the_missing_or_damaged_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="tokenizer.model alone"):
        Tokenizer.from_pretrained(tmp_path)

    for damage in (
        lambda t: t["model"].pop("vocab"),
        lambda t: t.pop("model"),
        lambda t: t["model"]["vocab"].pop("Ġfilm"),
        lambda t: t.update(added_tokens=[{}]),
        lambda t: t["model"]["vocab"].update(Ġfilm=2**25),
    ):
        trained_tokenizer(tmp_path)
        change_json(tmp_path / "tokenizer.json", damage)
        with pytest.raises(ValueError, match="tokenizer.json is damaged"):
            Tokenizer.from_pretrained(tmp_path)

    trained_tokenizer(tmp_path, added_tokens_decoder={"x": {"content": "<x>"}})
    with pytest.raises(ValueError, match="tokenizer_config.json or tokenizer.json is damaged"):
        Tokenizer.from_pretrained(tmp_path)

    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="tokenizer_config.json names no eos_token"):
        Tokenizer.from_pretrained(tmp_path)


def test_decode_skips_special_tokens_on_request(tmp_path):
    _, tokenizer = both(tmp_path)
    ids = tokenizer.encode("good<|im_end|> film")
    assert tokenizer.decode(ids) == "good film"
    assert tokenizer.decode(ids, skip_special=False) == "good<|im_end|> film"
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    assert tokenizer.decode([*ids, 99999, 10**9]) == "good film"


# Like those of Qwen 2.5 (a default system message), Qwen 3 (thoughts in the last turn only),
# LLaMA 3 (trimmed contents, a date), Mistral (turns must alternate), and plain JSON
TEMPLATES = {
    "chatml": CHATML,
    "default system": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}\n    {%- if message.role == 'tool' %}{% continue %}"
        "{% endif %}\n    "
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}\n"
        "{% endfor %}\n{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{% endif %}\n"
    ),
    "thoughts in the last turn": per_turn(
        "{{ '<|im_start|>' + m.role + '\n' }}"
        + marked(
            "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
            "{% if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
            "{{ content + '<|im_end|>' }}",
            "{{ m.content + '<|im_end|>' }}",
        )
        + "{{ '\n' }}",
        before="{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}",
    ),
    "trimmed, dated": per_turn(
        "{{ '<|im_start|>' + m['role'] + '<|im_start|>\n\n' }}"
        + marked(*["{{ m['content'] | trim + '<|im_end|>' }}"] * 2),
        "<|im_start|>assistant<|im_start|>\n\n",
        "{{ bos_token }}{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date }}{% if tools is not none %}{{ tools | tojson }}{% endif %}",
    ),
    "alternating": (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system message') }}{% elif m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "json": (
        "{% for m in messages %}{{ m | tojson(indent=1) }}{{ m.content | tojson }}\n"
        "{% endfor %}{{ pad_token }}"
    ),
}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi {{ 7*7 }} <b>'é'</b>"},
    {"role": "assistant", "content": "Hello film.\n"},
    {"role": "user", "content": " And\nnow? "},
    {"role": "assistant", "content": " Good <|im_start|> film"},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "list"])
def test_chat_templates_equal_transformers(tmp_path, name, place):
    template = TEMPLATES[name]
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    setting = {"tokenizer_config.json": template, "list": named}.get(place)
    trained_tokenizer(tmp_path, template=setting, bos_token="<|im_start|>")
    if place == "chat_template.jinja":
        (tmp_path / "chat_template.jinja").write_text(template)

    ours = Tokenizer.from_pretrained(tmp_path)
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for messages in (TALK, TALK[:2], TALK[:3], TALK[1:2], TALK[1:3], TALK[1:]):
        for prompt in (False, True):
            if name == "alternating" and messages[0]["role"] == "system":
                with pytest.raises(ValueError, match="no system message"):
                    ours.apply_chat_template(messages, prompt)
                continue
            text = ours.apply_chat_template(messages, prompt)
            options = {"add_generation_prompt": prompt}
            assert text == peer.apply_chat_template(messages, tokenize=False, **options)
            assert ours.encode(text) == peer.apply_chat_template(messages, **options)["input_ids"]


def test_stop_ids_include_the_end_of_turn_and_generation_config(tmp_path):
    # As in Qwen 2.5's base models: one token ends a turn, another a text.
    trained_tokenizer(tmp_path, eos_token="<|endoftext|>")
    assert Tokenizer.from_pretrained(tmp_path).stop_ids == [0, 2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert Tokenizer.from_pretrained(tmp_path).stop_ids == [0, 1, 2]


KINDS = {"chatml": FAMILIES, "thoughts in the last turn": FAMILIES}
KINDS["trimmed, dated"] = ["qwen", "llama3"]


@pytest.mark.parametrize("name, kind", [(name, kind) for name in KINDS for kind in KINDS[name]])
def test_the_assistants_tokens_are_the_ones_transformers_marks(tmp_path, kind, name):
    """By {% generation %} in the template."""
    _, ours = both(tmp_path, kind, template=TEMPLATES[name])
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    odd = [TALK[1], {"role": "assistant", "content": "<|im_end|> a 12 é"}]
    for messages in (TALK, TALK[1:], TALK[:3], TALK[1:3], odd):
        text, spans, _ = ours.chat.conversation(messages)
        segments = ours.encode_cut(text, [cut for span in spans for cut in span])
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        expected = peer.apply_chat_template(messages, **options)
        tokens = [(token, i % 2) for i, segment in enumerate(segments) for token in segment]
        assert tokens == list(zip(expected["input_ids"], expected["assistant_masks"], strict=True))


def test_llama2_answers_begin_where_generation_does(tmp_path):
    """The model writes an answer's space and </s>, so both count; what is masked is the prompt."""
    peer, ours = llama2_tokenizer(tmp_path), Tokenizer.from_pretrained(tmp_path)
    text, spans, _ = ours.chat.conversation(TALK[1:])
    segments = ours.encode_cut(text, [cut for span in spans for cut in span])
    assert sum(segments, []) == peer.encode(text, add_special_tokens=False).ids
    assert [text[a:b] for a, b in spans] == [" Hello film.\n </s>", "  Good <|im_start|> film </s>"]
    assert segments[0] == ours.encode(ours.apply_chat_template(TALK[1:2], True))


def test_answers_with_thoughts_and_templates_without_an_end(tmp_path):
    """Qwen 3 rewrites thoughts: all of an answer counts. Without an end, that of text is learnt."""
    thoughts = (
        "{% if loop.index0 > ns.last %}"
        "{{ '<think>\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
        "if '</think>' in m.content else '') + '\n</think>\n\n' }}"
        "{% endif %}"
    )
    no_thoughts = "{% if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    reasoning = TEMPLATES["thoughts in the last turn"].replace(no_thoughts, thoughts)
    trained_tokenizer(tmp_path, "qwen", template=reasoning)
    talk = [TALK[1], {"role": "assistant", "content": "<think>\n\nhm\n</think>\n\nSo."}]
    thought, bare = "<think>\nhm\n</think>\n\nSo.<|im_end|>", "So.<|im_end|>"
    for messages, expected in ((talk, [thought]), (talk + talk, [bare, thought])):
        text, spans, _ = Tokenizer.from_pretrained(tmp_path).chat.conversation(messages)
        assert [text[a:b] for a, b in spans] == expected

    endless = per_turn("{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}")
    _, ours = both(tmp_path, "qwen", template=endless)
    rows, _ = data.encode([{"messages": talk}], ours, 400)
    counted = [t for t in rows[0].labels if t != -100]
    assert ours.decode(counted, skip_special=False) == talk[1]["content"] + "<|im_end|>"
    assert rows[0].input_ids[-1] == ours.eos_id


def test_a_cut_inside_a_token_tokenizes_both_sides_as_generation_does(tmp_path):
    """GPT-2's split separates two line ends before a word, but not at the end of a prompt."""
    _, ours = both(tmp_path, "gpt2")
    for left, right in (("the end.\n\n", "film"), ("the ", "film"), ("the", " film")):
        assert ours.encode_cut(left + right, [len(left)]) == [ours.encode(left), ours.encode(right)]


PLAIN = "User:\nfilm<|im_end|>\nAssistant:\n"  # the plain template, up to an answer
TURNS = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}]
CONVERSATIONS = {
    "messages": {"messages": TURNS},
    "instruction": {"instruction": "film", "output": "good"},
    "classification": {"text": "film", "label": "good"},
}
BARE = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("kind, template", [("llama3", None), ("smollm", None), ("llama3", BARE)])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_chat_template_alone_or_else_the_tokenizer_begins_a_row(tmp_path, kind, template, name):
    """Here llama3's tokenizer puts <|im_start|> before a text, and smollm's puts nothing."""
    peer, ours = both(tmp_path, kind, template=template)
    label_ids = data.tokenize_labels(["bad", "good"], ours)
    [row], _ = data.encode([CONVERSATIONS[name]], ours, 400, "{text}", label_ids)
    answer = "good" if name == "classification" else "good<|im_end|>"
    text = ("film<|im_end|>" if template else PLAIN) + answer
    assert row.input_ids == peer.encode(text, add_special_tokens=not template).ids
    counted = [token for token in row.labels if token != -100]
    assert counted == peer.encode(answer, add_special_tokens=False).ids


class Listener(torch.nn.Module):
    """In a model's place: keeps the prompts that it is given."""

    def __init__(self):
        super().__init__()
        self.lm_head, self.heard = torch.nn.Linear(1, 1), []

    def generate(self, ids, *options):
        self.heard += ids.tolist()
        return ids

    def score(self, prompts, answers):
        self.heard += prompts
        return torch.zeros(len(prompts), len(answers))


@pytest.mark.parametrize("template", [None, CHATML])
def test_sample_prompts_a_model_as_training_did(tmp_path, template):
    (_, ours), model = both(tmp_path, "llama3", template=template), Listener()
    labels = data.tokenize_labels(["bad", "good"], ours)
    sample.answer(model, ours, TURNS[:1], sample.Sample())
    sample.classify(model, ours, "film", list(labels), "{text}", 400)
    for name, heard in zip(("messages", "classification"), model.heard, strict=True):
        [row], _ = data.encode([CONVERSATIONS[name]], ours, 400, "{text}", labels)
        assert heard == row.input_ids[: -sum(label != -100 for label in row.labels)]


@pytest.mark.parametrize(
    "pattern, text, said",
    [
        ("(", "film", "unmatched parenthesis"),
        (r"\p{Foo}", "film", "invalid character property"),
        ("(a|aa)+(?=b)|[^a]+", "a" * 100, "tokenizer fails.*retry-limit"),
        ("^(a|aa)+(?=b)", "a" * 100, "tokenizer fails.*retry-limit"),
        ("a{99999}{99999}", "film", "tokenizer"),
        ("(" * 5000 + "a" + ")" * 5000, "film", "tokenizer"),
    ],
)
def test_split_patterns_that_fail_or_never_end_are_one_line(tmp_path, capfd, pattern, text, said):
    trained_tokenizer(tmp_path, "qwen")
    change = {"pattern": {"Regex": pattern}}
    path = tmp_path / "tokenizer.json"
    change_json(path, lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(change))
    start = sum(os.times()[:4])
    with pytest.raises(ValueError, match=said) as caught:
        Tokenizer.from_pretrained(tmp_path).encode(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert capfd.readouterr().err == ""
    assert sum(os.times()[:4]) - start < 20  # CPU seconds, the children's too


def each_by_itself(tokenizer, text, cuts):
    """encode_cut in its plainest form: each head of the text is encoded from the beginning."""
    whole, edges = tokenizer.encode(text), [0]
    for cut in cuts:
        head = tokenizer.encode(text[:cut])
        if whole[: len(head)] != head:
            return [tokenizer.encode(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)])]
        edges.append(len(head))
    return [whole[a:b] for a, b in zip(edges, [*edges[1:], len(whole)])]


def spans_by_themselves(chat, text, messages):
    """The spans of ChatTemplate.conversation in their plainest form: each renders everything."""
    spans, mark = [], "\ue000the answer\ue000"
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        marked = [*messages[:i], messages[i] | {"content": mark}, *messages[i + 1 :]]
        before, found, after = chat.render(marked).partition(mark)
        start = len(before) if text.startswith(before) else None
        end = len(text) - len(after)
        prompt = chat.render(messages[:i], add_generation_prompt=True) if i > 0 else ""
        if prompt and text.startswith(prompt):
            opened = prompt != chat.render(messages[:i])
            if start is None or opened or not text[len(prompt) : start].strip():
                start = len(prompt)
        if not found or start is None or not text.endswith(after) or start >= end:
            raise ValueError("the answers can't be told from the rest")
        spans.append((start, end + len(chat.end_of_turn) * after.startswith(chat.end_of_turn)))
    return spans


# Like those of LLaMA 2 (the system message inside the first question), Gemma (other roles) and R1
# (the generation prompt begins the thoughts, which only the last answer keeps)
LONG_TEMPLATES = TEMPLATES | {
    "system inside": (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
        "{% if loop.index0 == 0 %}{% set c = system + m.content %}{% else %}"
        "{% set c = m.content %}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + c.strip() + "
        "' [/INST]' }}{% else %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "model": per_turn(
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}",
        "<|im_start|>model\n",
    ),
    "prompted thoughts": per_turn(
        "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}",
        "<|im_start|>assistant\n<think>\n",
    ),
}
PIECES = " film,Hello,\n, ,<|im_end|>,<|im_start|>,é,e\u0301,a 12,.,<think>\n,</think>\n,[/INST]"
PIECES = [*PIECES.split(","), "<|im_start|>assistant\n"]


def random_talk(rng):
    """3 to 20 turns, with contents that templates trim or that hold tokens."""
    roles = ["user", "assistant"] * rng.randint(1, 10)
    if rng.random() < 0.5:
        roles = [rng.choice(["user", "assistant", "tool"]) for _ in roles]
    roles = rng.choice([[], ["system"], ["assistant"]]) + roles + ["assistant"]
    few = rng.sample(PIECES, rng.randint(1, len(PIECES)))

    def content():
        return rng.choice(few + ["x"]) + "".join(rng.choices(few, k=rng.randint(0, 5)))

    return [{"role": role, "content": content()} for role in roles]


@pytest.mark.parametrize("kind", ["smollm", "qwen", "llama3"])
@pytest.mark.parametrize("name", LONG_TEMPLATES)
def test_conversations_are_cut_as_when_each_answer_is_looked_for_by_itself(tmp_path, kind, name):
    _, tokenizer = both(tmp_path, kind, template=LONG_TEMPLATES[name])
    chat, rng = tokenizer.chat, random.Random(f"{kind} {name}")
    for talk in (random_talk(rng) for _ in range(30)):
        try:
            text = chat.render(talk)
            expected = spans_by_themselves(chat, text, talk)
        except ValueError:
            with pytest.raises(ValueError, match="can't be told|rejects"):
                chat.conversation(talk)
            continue
        assert chat.conversation(talk)[:2] == (text, expected)
        cuts = [cut for span in expected for cut in span]
        assert tokenizer.encode_cut(text, cuts) == each_by_itself(tokenizer, text, cuts)


def test_a_cut_after_tokens_with_flags_is_as_when_everything_is_encoded(tmp_path):
    """Such a token takes spaces from its sides, or counts only as a word."""
    flags = [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}]
    added = [AddedToken(f"<{i}>", special=False, **flag) for i, flag in enumerate(flags)]
    (_, tokenizer), rng = both(tmp_path, added=added), random.Random(0)
    pieces = ["<0>", "<1>", "<2>", "<3>", " ", "  ", "film", "<", "2>", "<|im_end|>", "."]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 4)))
        assert tokenizer.encode_cut(text, cuts) == each_by_itself(tokenizer, text, cuts)


@pytest.mark.parametrize("name", ["chatml", "trimmed, dated", "alternating", "system inside"])
def test_the_work_of_a_conversation_grows_with_its_length_alone(tmp_path, monkeypatch, name):
    """Not with its square; counted in messages rendered and characters encoded, not seconds."""
    _, tokenizer = both(tmp_path, template=LONG_TEMPLATES[name])
    real, encode, work = chat_module.ask, tokenizer.encode, []

    def ask(request):
        work.append(sum(len(each[0]) for each in json.loads(request)["conversations"]))
        return real(request)

    def counted(text):
        work.append(len(text) / 100)
        return encode(text)

    monkeypatch.setattr(chat_module, "ask", ask)
    monkeypatch.setattr(tokenizer, "encode", counted)
    for turns in (250, 1000):
        roles = ["user", "assistant"] * (turns // 2)
        talk = [{"role": role, "content": f"film {i} "} for i, role in enumerate(roles)]
        [row], _ = data.encode([{"messages": talk}], tokenizer, 10**6)
        assert sum(label != -100 for label in row.labels) > turns
        assert sum(work) < 10 * turns
        work.clear()


def test_a_question_is_rendered_once_and_its_rows_take_few_bytes(tmp_path, monkeypatch):
    """Lists take 36 bytes a token."""
    (_, tokenizer), real, asked = both(tmp_path), chat_module.ask, []
    monkeypatch.setattr(chat_module, "ask", lambda request: asked.append(1) or real(request))
    labels = data.tokenize_labels(["bad", "good"], tokenizer)
    examples = [{"text": f"film {i}" * 9, "label": "good"} for i in range(500)]
    tracemalloc.start()
    rows, cut = data.encode(examples, tokenizer, 80, "{text}", labels)
    assert tracemalloc.get_traced_memory()[0] < 600 * len(rows) and cut and len(asked) == 1
    tracemalloc.stop()


# A template is anybody's program.
HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "",
    "{{ lipsum(n=10**8) }}": "",
    "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}": "",
    "{{ 'a' * 10**10 }}": "",
    "{{ '%1000000000d' % 1 }}": "",
    "{% for i in range(99999) %}" + "a" * 1000 + "{% endfor %}": "",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "",
    "{{ nothing.at.all }}": "",
    "{% nothing %}": "",
    "{% if %}": "Expected",
    "{{ ().__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ raise_exception('no system please') }}": "no system please",
    "{{ 1 / 0 }}": "division",
    "{{ messages + 1 }}": "concatenate",
}


@pytest.mark.parametrize("template, said", HOSTILE.items(), ids=range(len(HOSTILE)))
def test_hostile_templates_end_in_one_line_and_within_limits(template, said):
    start = sum(os.times()[:4])
    with pytest.raises(ValueError, match=f"the chat template rejects.*{said}") as caught:
        ChatTemplate(template, {"eos_token": "</s>"}, []).render(TALK)
    assert "\n" not in str(caught.value)
    assert sum(os.times()[:4]) - start < 20  # CPU seconds, the children's too
    # The next template is rendered as ever.
    assert ChatTemplate("{{ messages | length }}", {}, []).render(TALK) == "5"


def test_ctrl_c_while_a_template_is_rendered_leaves_no_answer_for_the_next_one():
    def interrupt(number, frame):
        raise KeyboardInterrupt

    slow = "{% for a in range(99) %}{% for b in range(9999) %}{% endfor %}{% endfor %}slow"
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                ChatTemplate(slow, {}, []).render(TALK)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ChatTemplate("quick", {}, []).render(TALK) == "quick"
