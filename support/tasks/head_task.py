"""
The tasks of a head (heads.py): examples as rows of tokens, answers as labels, and scores.

    classification   {"text", "text_b"?, "label"}    one of the labels
    multi_label      {"text", "text_b"?, "labels"}   any of them
    regression       {"text", "text_b"?, "score"}    a number
    tagging          {"words", "tags"}               a BIO tag a word, on the word's first token
"""

import functools
import itertools
import shutil
import sys
from dataclasses import dataclass
from statistics import fmean

import torch
from torch.nn.utils.rnn import pad_sequence

from support.run.files import read_json
from support.tasks import scores
from support.tasks.any_model import in_one_line, library
from support.tasks.heads import IGNORED, DecoderWithHead
from support.text.packed import Packed
from support.text.tokenizer_files import FILES, unknown_id

BATCH = 1000  # examples that are tokenised at once


@dataclass
class Row:
    input_ids: list = Packed()
    types: list = Packed()  # the text, 0 or 1, of each token
    target: object  # a class, a list of 0 and 1, a number, or a class or -100 for each token
    answer: object  # the example's own, to compare with predictions
    words: list = None  # tagging: the word of each token that begins one, else -100


@dataclass
class HeadTask:
    """A family of tasks with the methods of tasks.LanguageTask."""

    kind: str  # a key of heads.KINDS
    names: list  # the labels, in the order of their numbers
    tokenizer: object  # a tokenizers.Tokenizer
    pad_id: int
    glue: str | None = None  # the key of scores.GLUE that names the scores

    @property
    def metric(self):
        """The score that a run is judged by."""
        metrics = {"multi_label": "f1_micro", "regression": "pearson", "tagging": "f1"}
        return scores.GLUE[self.glue][0] if self.glue else metrics.get(self.kind, "accuracy")

    def notes(self, cut, block_size):
        """Lines about the data. cut: the number of examples that were too long."""
        if cut:
            yield f"{cut} examples were longer than block_size={block_size}: cut on the right"

    def encode(self, examples, block_size):
        """(list of Row, how many were cut on the right) of examples. Raises ValueError."""
        encode = self.encode_tags if self.kind == "tagging" else self.encode_texts
        examples, encoded = iter(examples), []
        while batch := [*itertools.islice(examples, BATCH)]:
            encoded += encode(batch, block_size)
        return [row for row, _ in encoded], sum(cut for _, cut in encoded)

    def encode_texts(self, examples, block_size):
        """Yield (Row, whether it was cut) of texts or pairs."""
        pairs = [(example["text"], example.get("text_b")) for example in examples]
        encoded = encode_pairs(self.tokenizer, pairs, block_size)
        for example, (ids, types, cut) in zip(examples, encoded):
            self.check_known(ids, example, example["text"])
            if self.kind == "regression":
                answer = target = example["score"]
            elif self.kind == "multi_label":
                answer = example["labels"]
                target = [float(name in answer) for name in self.names]
            else:
                target = self.places[example["label"]]
                answer = self.names[target]
            yield Row(ids, types, target, answer), cut

    def encode_tags(self, examples, block_size):
        """Yield (Row, whether it was cut) of words."""
        for example in examples:
            words, tags = example["words"], [self.places[tag] for tag in example["tags"]]
            ids, places = encode_words(self.tokenizer, words, block_size)
            known = [i for i, place in zip(ids, places) if place != IGNORED]
            self.check_known(known, example, words)
            targets = [IGNORED if i == IGNORED else tags[i] for i in places]
            answer = [self.names[tag] for tag in tags]
            left_out = "".join(words[max(places) + 1 :])
            yield Row(ids, [0] * len(ids), targets, answer, places), bool(left_out.strip())

    @functools.cached_property
    def places(self):
        return {name: place for place, name in enumerate(self.names)}

    @functools.cached_property
    def unknown_id(self):
        return unknown_id(self.tokenizer)

    def check_known(self, ids, example, text):
        """Raise ValueError if a text has no tokens but unknown and special ones."""
        added = self.tokenizer.get_added_tokens_decoder() if self.unknown_id in ids else {}
        special = {self.unknown_id, *(i for i, token in added.items() if token.special)}
        if not ids and not "".join(text).strip():
            problem = "the text is empty, and this tokenizer has no token for that"
            raise ValueError(f"{place_of(example)}: {problem}: fill it in, or leave it out")
        if not ids or self.unknown_id in ids and special.issuperset(ids):
            raise ValueError(
                f"{place_of(example)}: the tokenizer leaves nothing of {text!r:.60} but unknown "
                f"tokens: take a model for such texts, or put blanks between the units it knows"
            )

    def collate(self, rows):
        """Rows as (input_ids, attention_mask, token_type_ids, targets), padded on the right."""

        def pad(lists, value):
            return pad_sequence([torch.tensor(x) for x in lists], True, value)

        ids = pad([row.input_ids for row in rows], self.pad_id)
        mask = pad([[1] * len(row.input_ids) for row in rows], 0)
        targets = [row.target for row in rows]
        targets = pad(targets, IGNORED) if self.kind == "tagging" else torch.tensor(targets)
        return ids, mask, pad([row.types for row in rows], 0), targets

    def loss(self, model, rows):
        """The mean loss of a list of rows, a scalar tensor."""
        return model(*self.collate(rows))

    def supervised(self, rows):
        """How many targets of rows count in their mean loss."""
        if self.kind != "tagging":
            return len(rows)
        return sum(target != IGNORED for row in rows for target in row.target)

    def rehearse(self, rows):
        """Raise ValueError now if a library is missing that the scores will need."""
        if self.kind == "tagging":
            scores.library("seqeval")
        self.scores([(row.answer, row.answer) for row in rows[:2]])

    @property
    def form(self):
        """The head's kind, and its number of labels, or 1."""
        return self.kind, len(self.names) or 1

    def start(self, model, rows):
        """Start a regression's bias, if any, at the mean score of rows."""
        if rows and self.kind == "regression" and model.output.bias is not None:
            model.output.bias.data.fill_(fmean(row.target for row in rows))

    def save_pretrained(self, model, base, folder):
        """Write a model with its head, and base's tokenizer. Raises ValueError for model.py's."""
        if isinstance(model, DecoderWithHead):
            raise ValueError(
                "model.py's language models with a head can't be written as a whole: keep the "
                "adapter, which holds the head, and use it with its base"
            )
        model.save_pretrained(folder, self.names)
        for name in FILES:
            if (base / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(base / name, folder / name)

    @torch.no_grad()
    def evaluate(self, model, rows, scored=True):
        """(summed loss, number of targets, [(prediction, answer)]) of a few rows."""
        *inputs, targets = self.collate(rows)
        logits, count = model(*inputs), self.supervised(rows)
        predictions = model.predict(logits).tolist()
        pairs = [(self.in_words(row, x), row.answer) for row, x in zip(rows, predictions)]
        return count * model.loss(logits, targets).item(), count, pairs

    def in_words(self, row, prediction):
        """A prediction in the form of the examples' answers."""
        if self.kind == "regression":
            return prediction
        if self.kind == "classification":
            return self.names[prediction]
        if self.kind == "multi_label":
            return [name for name, chosen in zip(self.names, prediction) if chosen]
        tags = ["O"] * len(row.answer)  # words beyond block_size keep it
        for place, tag in zip(row.words, prediction):
            if place != IGNORED:
                tags[place] = self.names[tag]
        return tags

    @torch.no_grad()
    def describe(self, model, text, text_b, block_size):
        """Lines with the prediction for a text or a pair; text_b: "" for one text."""
        if self.kind == "tagging":
            words = text.split()
            ids, places = encode_words(self.tokenizer, words, block_size)
            prediction = model.predict(model(torch.tensor([ids])))[0].tolist()
            tags = self.in_words(Row(ids, [], None, words, places), prediction)
            return [f"{word}\t{tag}" for word, tag in zip(words, tags)]

        [(ids, types, _)] = encode_pairs(self.tokenizer, [(text, text_b or None)], block_size)
        logits = model(torch.tensor([ids]), None, torch.tensor([types]))[0]
        if self.kind == "regression":
            return [f"{logits.item():.3f}"]
        p = logits.softmax(-1) if self.kind == "classification" else logits.sigmoid()
        ranked = sorted(zip(p.tolist(), self.names), reverse=True)
        return [f"{share:6.1%}  {name}" for share, name in ranked]

    def scores(self, pairs):
        """The task's metrics, {name: number}, of (prediction, answer) pairs."""
        predictions, answers = zip(*pairs)
        if self.glue:
            return scores.glue(self.glue, predictions, answers)
        return getattr(scores, self.kind)(predictions, answers)


def place_of(example):
    return getattr(example, "where", "an example")


def load_tokenizer(folder, adapter=None):
    """
    (tokenizers.Tokenizer, the id that pads rows) of a folder with tokenizer.json, ESM-2's
    vocab.txt, or what transformers can convert. adapter: a folder whose tokenizer.json, if any, is
    used instead, with a note. Raises FileNotFoundError or ValueError.
    """
    from tokenizers import Tokenizer, normalizers

    path, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    config = read_json(folder / "config.json")
    pad_id = config.get("pad_token_id") or 0  # any id will do if the model names none
    if adapter is not None and (adapter / path.name).exists():
        path = adapter / path.name
        print(f"note: the tokenizer is the adapter's own, of {adapter}", file=sys.stderr)
    if not path.exists():
        if vocabulary.exists() and config.get("model_type") == "esm":
            return letters(vocabulary), pad_id
        if vocabulary.exists() or any(folder.glob("*.model")):  # of BERT, or of SentencePiece
            with in_one_line(folder):
                return library().AutoTokenizer.from_pretrained(folder).backend_tokenizer, pad_id
        raise FileNotFoundError(f"{path} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    settings = path.with_name("tokenizer_config.json")
    settings = read_json(settings) if settings.exists() else {}
    if str(settings.get("tokenizer_class")) in ("BertTokenizer", "BertTokenizerFast"):
        tokenizer.normalizer = normalizers.BertNormalizer(  # as transformers reads such files
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
    if adapter is not None and (size := tokenizer.get_vocab_size()) > config["vocab_size"]:
        raise ValueError(
            f"{path} has {size} tokens, the model only {config['vocab_size']}: remove it"
        )
    return tokenizer, pad_id


def letters(path):
    """ESM-2's tokenizer, one token a letter, from its vocab.txt. Raises ValueError."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(path.read_text(encoding="utf-8").split())}
    special = ("<cls>", "<eos>", "<unk>", "<pad>", "<mask>")
    if missing := [token for token in special if token not in vocab]:
        raise ValueError(f"{path} lacks the token {missing[0]}: it is no vocabulary of ESM-2")
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in vocab if t[0] == "<"])
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    ends = [(token, vocab[token]) for token in ("<cls>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <eos>", pair="<cls> $A <eos> $B <eos>", special_tokens=ends
    )
    return tokenizer


def truncate(tokenizer, block_size, pair):
    """Make the tokenizer cut rows to block_size tokens, without padding. Raises ValueError."""
    special = tokenizer.num_special_tokens_to_add(pair)
    if block_size <= special:  # the library would silently not truncate
        raise ValueError(f"block_size={block_size} leaves no room beside {special} special tokens")
    tokenizer.enable_truncation(block_size)  # the longest text first
    tokenizer.no_padding()


def encode_pairs(tokenizer, pairs, block_size=512):
    """
    (token ids, token types, whether it was cut) of each text or pair, (text, None or text_b), with
    special tokens. The longer text is cut first. Raises ValueError, as `truncate` does.
    """
    for paired in {text_b is not None for _, text_b in pairs}:
        truncate(tokenizer, block_size, paired)
    texts = [text if text_b is None else (text, text_b) for text, text_b in pairs]
    encoded = tokenizer.encode_batch(texts)
    return [(each.ids, each.type_ids, bool(each.overflowing)) for each in encoded]


def encode_words(tokenizer, words, block_size=512):
    """
    (token ids, the word that each begins, else -100) of words, each after a space. Words without a
    token, such as "", and words beyond block_size are left out.
    """
    truncate(tokenizer, block_size, pair=False)
    encoding = tokenizer.encode([f" {word}" for word in words], is_pretokenized=True)
    places = encoding.word_ids  # each token's word; None for special tokens
    pairs = zip([None, *places], places)
    return encoding.ids, [IGNORED if word in (None, before) else word for before, word in pairs]
