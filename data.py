"""
Text to tokens: the tokenizer, the chat template, the JSONL formats, the built-in data sets, the split, the batches.

    load_examples(path or name)  ->  list of dicts, all of one format:
        {"text"}, {"code"}                              plain text, every token counts in the loss
        {"messages": [{"role", "content"}, ...]}        a conversation, the assistant's turns count
        {"instruction", "input"?, "output"}             the output counts
        {"prompt", "completion"}                        taken as they stand, without a chat template; the completion counts
        {"text", "label"}                               classification: the label is the answer, scored among all labels
    encode(examples, tokenizer, ...)  ->  list of Encoded: token ids, and labels with -100 where nothing counts
    batches(encoded, ...)  ->  (input_ids, labels), padded on the right
"""

import json
import random
import shutil
import tarfile
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.sandbox
import regex
import tiktoken
import torch

from files import fetch, read_json, replacing

# ---------------------------------------------------------------------------------------------- tokenizer

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# GPT-2 writes each byte as one printable character: these as themselves, the others from 256 on.
CHAR_TO_BYTE = {chr(b): b for b in PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits cut out one by one first, then GPT-2's split of what lies between: a digit ends a run of spaces as the text's end does.
DIGITS_THEN_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

PLAIN_TEMPLATE = ("{% for m in messages %}{{ m['role'] | capitalize }}:\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
                  "{% if add_generation_prompt %}Assistant:\n{% endif %}")


class Tokenizer:
    """
    A byte-level BPE tokenizer read from Hugging Face's tokenizer.json and run by tiktoken; equal, token for token, to the
    tokenizers library, without what a post-processor adds (chat templates write such tokens themselves). eos_id ends a turn,
    pad_id fills batches (no loss falls on it).
    """

    def __init__(self, folder):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        spec = read_json(path)
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        model = spec.get("model", {})
        if model.get("type") != "BPE" or model.get("byte_fallback"):
            raise ValueError(f"{path}: only byte-level BPE tokenizers are supported, not {model.get('type')!r}")
        normalizer = (spec.get("normalizer") or {}).get("type")
        if normalizer not in (None, "NFC"):
            raise ValueError(f"{path}: normalizer {normalizer!r} is not supported")
        self.nfc = normalizer == "NFC"
        self.folder = folder
        added = spec.get("added_tokens", [])
        for token in added:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise ValueError(f"{path}: added token {token['content']!r} swallows spaces or asks for whole words, "
                                 f"which is not supported")
        self.special = {token["content"]: token["id"] for token in added}
        vocab = {token: i for token, i in model.get("vocab", {}).items() if token not in self.special}
        # tiktoken merges the pair of lowest id, tokenizers the pair that stands first in the list: these must agree.
        merged = [vocab.get("".join(pair.split(" ") if isinstance(pair, str) else pair), -1) for pair in model.get("merges", [])]
        if not vocab or -1 in merged:
            raise ValueError(f"{path} is damaged: vocab is empty, or lacks a token that merges make")
        if merged != sorted(merged):
            raise ValueError(f"{path}: merges and ids stand in different orders, so tiktoken can't reproduce this tokenizer")
        ranks = {bytes(CHAR_TO_BYTE[c] for c in token): i for token, i in vocab.items()}
        # SmolLM2 has no token for some bytes, and drops them. tiktoken needs an id for every byte: these lie past the vocabulary.
        first_missing = max([*vocab.values(), *self.special.values()]) + 1
        self.missing = {bytes([b]): first_missing + b for b in range(256) if bytes([b]) not in ranks}
        self.pattern = split_pattern(spec.get("pre_tokenizer") or {}, path)
        self.encoding = tiktoken.Encoding(folder.name, pat_str=self.pattern, mergeable_ranks=ranks | self.missing,
                                          special_tokens=self.special)
        self.vocab_size = first_missing

        def named(name):  # a token is written as text, or as an object with its flags
            token = settings.get(name)
            return token.get("content") if isinstance(token, dict) else token

        self.eos_token, self.bos_token = named("eos_token"), named("bos_token")
        self.eos_id = self.special.get(self.eos_token)
        if self.eos_id is None:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: eos_token is missing or no added token")
        self.pad_id = self.special.get(named("pad_token"), self.eos_id)
        template = settings.get("chat_template")
        if isinstance(template, list):  # several templates by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.has_chat_template = template is not None
        self.chat_template = template or PLAIN_TEMPLATE

    @classmethod
    def from_pretrained(cls, folder):
        """Read tokenizer.json and tokenizer_config.json. Raises FileNotFoundError, or ValueError for an unsupported kind."""
        return cls(folder)

    def save_pretrained(self, folder):
        """Copy the tokenizer's files into a model's folder."""
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (self.folder / name).exists():
                with replacing(Path(folder) / name) as temporary:
                    shutil.copyfile(self.folder / name, temporary)

    def encode(self, text):
        """Token ids of text, a list; special tokens written in the text count as themselves."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        ids = self.encoding.encode(text, allowed_special="all", disallowed_special=())
        if self.missing and max(ids, default=0) >= self.vocab_size:
            ids = self.encode_without_missing(text)
        return ids

    def encode_without_missing(self, text):
        """The rare case: drop the bytes that have no token, then merge what is left of each piece, as tokenizers does."""
        ids = []
        specials = "|".join(map(regex.escape, sorted(self.special, key=len, reverse=True)))
        for part in regex.split(f"({specials})", text) if specials else [text]:
            if part in self.special:
                ids.append(self.special[part])
                continue
            for piece in regex.findall(self.pattern, part):
                kept = b"".join(bytes([b]) for b in piece.encode() if bytes([b]) not in self.missing)
                ids += self.encoding._encode_single_piece(kept) if kept else []
        return ids

    def decode(self, ids, skip_special=True):
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        special = set(self.special.values()) if skip_special else ()
        return self.encoding.decode([i for i in ids if i not in special and i < self.vocab_size], errors="replace")

    def apply_chat_template(self, messages, add_generation_prompt=False):
        """
        The conversation as text. messages: list of {"role", "content"}; add_generation_prompt: open the assistant's turn.

        Runs in jinja2's sandbox. Raises ValueError when the template refuses the messages.
        """
        try:
            return self.compiled_template.render(messages=messages, add_generation_prompt=add_generation_prompt,
                                                 eos_token=self.eos_token or "", bos_token=self.bos_token or "")
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None

    @cached_property
    def compiled_template(self):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                                   extensions=["jinja2.ext.loopcontrols"])

        def raise_exception(message):  # templates call it by this name
            raise jinja2.TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        return environment.from_string(self.chat_template)


def split_pattern(pre_tokenizer, path):
    """One regular expression that splits text as tokenizer.json's pre-tokenizer does."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return GPT2_SPLIT
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            return DIGITS_THEN_GPT2_SPLIT
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and "Regex" in steps[0]["pattern"] \
                and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return steps[0]["pattern"]["Regex"]
    raise ValueError(f"{path}: pre-tokenizer {' + '.join(map(str, kinds))} is not supported; these are: ByteLevel, "
                     f"Digits (individual) + ByteLevel, Split (isolated) + ByteLevel")


# ---------------------------------------------------------------------------------------------- data sets

MOVIES = dict(requirement="vaderSentiment==3.3.2", filename="vaderSentiment-3.3.2.tar.gz", size="2.5 MB",
              sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
BUILT_IN = {  # name: how its classification question is put
    "movie-sentiment": "Is the sentiment of this movie review positive or negative? Answer with one word.\n\n{text}",
    "toy-sentiment": "{text}",
}
LABEL_PROMPT = "Which of these labels fits the text: {labels}? Answer with the label only.\n\n{text}"
FORMATS = {  # format: the keys that it needs; the first that fits is it
    "messages": ("messages",), "instruction": ("instruction", "output"), "prompt": ("prompt", "completion"),
    "code": ("code",), "classification": ("text", "label"), "text": ("text",),
}


def format_of(example):
    """The name of an example's format, a key of FORMATS, or None."""
    return next((name for name, keys in FORMATS.items() if all(key in example for key in keys)), None)


def load_examples(path_or_name):
    """
    Read a JSONL file (UTF-8, one example a line, all of one format) or a built-in set: 'movie-sentiment', 'toy-sentiment'.

    Returns a list of dicts. Raises FileNotFoundError, or ValueError naming file and line, for what can't be trained on.
    """
    if path_or_name == "movie-sentiment":
        return movie_sentiment()
    if path_or_name == "toy-sentiment":
        return toy_sentiment()
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a JSONL file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a JSONL file or a built-in set ({', '.join(BUILT_IN)})")
    examples, kind = [], None
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            example = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error}): write one JSON object a line") from None
        if isinstance(example, dict) and isinstance(example.get("label"), int):  # 0 and 1 are common labels
            example["label"] = str(example["label"])
        check_example(example, where)
        if kind not in (None, format_of(example)):
            raise ValueError(f"{where}: format {format_of(example)!r}, but the lines before are {kind!r}: use one format a file")
        kind = format_of(example)
        if kind != "classification":
            example.pop("label", None)  # some other note of the file's author
        examples.append(example)
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def check_example(example, where):
    """Raise ValueError, beginning with `where`, for an example that is none of the formats or has an empty answer."""
    kind = format_of(example) if isinstance(example, dict) else None
    if kind is None:
        needed = "; ".join(" + ".join(keys) for keys in FORMATS.values())
        have = f"has the keys {', '.join(example) or '(none)'}" if isinstance(example, dict) else "is no JSON object"
        raise ValueError(f"{where}: the line {have}; needed are: {needed}")
    if kind == "messages":
        turns = example["messages"]
        if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("role"), str)
                                                  and isinstance(t.get("content"), str) for t in turns):
            raise ValueError(f"{where}: messages must be a list of objects with the strings role and content")
        answers = [t["content"] for t in turns if t["role"] == "assistant"]
        if not answers:
            raise ValueError(f"{where}: no message has the role 'assistant', so there is nothing to learn")
    else:
        for key in [*FORMATS[kind], *(["input"] if "input" in example else [])]:
            if not isinstance(example[key], str):
                raise ValueError(f"{where}: {key!r} is {type(example[key]).__name__}, not a string")
        answers = [example[FORMATS[kind][-1]]]
    if not all(answer.strip() for answer in answers):
        raise ValueError(f"{where}: the answer is empty")


def movie_sentiment():
    """
    10,070 movie-review snippets, 'positive' or 'negative' by the sign of their mean human rating (-4 … 4, |rating| ≥ 0.5).

    Hutto & Gilbert, "VADER", ICWSM 2014; the ratings lie in an archive inside the package's source archive (MIT).
    """
    with tarfile.open(fetch(**MOVIES)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as archive:
            lines = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("utf-8").splitlines()
    ratings = {}  # by text, so that no snippet stands twice
    for line in lines:
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= 0.5:
            ratings.setdefault(text.strip(), float(rating))
    return [{"text": text, "label": "positive" if rating > 0 else "negative"} for text, rating in ratings.items()]


def toy_sentiment(size=2000):
    """A made-up language for configs/tiny.py: three cheerful or gloomy syllables among five plain ones; needs no download."""
    rng = random.Random(0)
    examples = []
    for i in range(size):
        label, marked = (("yes", "aeae"), ("no", "uouo"))[i % 2]
        syllables = [marked] * 3 + [rng.choice(("ti", "lim", "nik", "pil", "kit")) for _ in range(5)]
        rng.shuffle(syllables)
        examples.append({"text": " ".join(syllables), "label": label})
    return examples


def split(examples, val_fraction=0.2, seed=0):
    """
    Shuffle and split into (train, val); with labels, each label is split by itself (stratified).

    Raises ValueError when the val part would be empty, or lack a label that train has.
    """
    groups = {}
    for example in random.Random(seed).sample(examples, len(examples)):
        groups.setdefault(example.get("label"), []).append(example)
    train, val = [], []
    for label, group in groups.items():
        count = round(val_fraction * len(group))
        if not 0 < count < len(group):
            what = f"label {label!r}" if label is not None else "the data"
            raise ValueError(f"val_fraction={val_fraction} of the {len(group)} examples of {what} leaves an empty part: "
                             f"give more examples, or another val_fraction")
        val += group[:count]
        train += group[count:]
    return train, val


# ------------------------------------------------------------------------------------------ tokens and labels


@dataclass
class Encoded:
    input_ids: list  # prompt and answer
    labels: list  # as long; -100 where the loss does not look
    label: str = None  # classification: the right answer
    prompt_ids: list = field(default_factory=list)  # classification: the prompt alone


def tokenize_question(text, tokenizer, label_prompt, labels):
    """The prompt of a classification example, up to where the label goes, as token ids."""
    message = label_prompt.replace("{labels}", ", ".join(labels)).replace("{text}", text)
    return tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True))


def tokenize_labels(labels, tokenizer):
    """
    {label: its token ids}. One token a label is best: no end-of-turn token is put behind, unless one label begins another
    ("1" and "10"), where the shorter would always be the likelier.
    """
    ids = {label: tokenizer.encode(label) for label in labels}
    if any(a != b and ids[b][:len(ids[a])] == ids[a] for a in labels for b in labels):
        ids = {label: tokens + [tokenizer.eos_id] for label, tokens in ids.items()}
    return ids


def segments(example, tokenizer, label_prompt, label_ids):
    """
    The example as a list of (token ids, counts in the loss). Each segment is tokenized by itself, as in generation,
    where the prompt is there before the answer.
    """
    tokens = tokenizer.encode
    kind = format_of(example)
    if kind in ("text", "code"):
        return [(tokens(example[kind]) + [tokenizer.eos_id], True)]
    if kind == "prompt":
        return [(tokens(example["prompt"]), False), (tokens(example["completion"]) + [tokenizer.eos_id], True)]
    if kind == "classification":
        return [(tokenize_question(example["text"], tokenizer, label_prompt, label_ids), False), (label_ids[example["label"]], True)]
    if kind == "instruction":
        request = "\n\n".join(filter(None, (example["instruction"], example.get("input"))))
        messages = [{"role": "user", "content": request}, {"role": "assistant", "content": example["output"]}]
    else:
        messages = example["messages"]
    parts, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[:i + 1])
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError("the chat template rewrites earlier turns, so the assistant's part can't be told from the rest")
        answer = tokens(after[len(before):])
        # What the template writes behind the end-of-turn token (a newline, say) is no part of the answer.
        end = max((j + 1 for j, token in enumerate(answer) if token == tokenizer.eos_id), default=len(answer))
        parts += [(tokens(before[len(done):]), False), (answer[:end], True), (answer[end:], False)]
        done = after
    return parts


def encode(examples, tokenizer, block_size, label_prompt=LABEL_PROMPT, label_ids=None, train_on_prompt=False):
    """
    Turn examples into (list of Encoded, how many were cut).

    block_size: the most tokens a row may have. A longer example is cut on the left, its last answer kept whole; plain text is
    laid out in several rows instead. label_ids: from tokenize_labels, for a classification task.
    Raises ValueError, quoting the example, when its answer leaves no room for a prompt, or the chat template refuses it.
    """
    encoded, cut = [], 0
    for example in examples:
        try:
            parts = segments(example, tokenizer, label_prompt, label_ids)
        except ValueError as error:
            raise ValueError(f"{error}; the example is {json.dumps(example, ensure_ascii=False):.80}…") from None
        if len(parts) > 1 and not parts[-1][1]:
            parts.pop()  # what the template writes behind the last answer
        ids = [token for tokens, _ in parts for token in tokens]
        targets = [token if counts or train_on_prompt else -100 for tokens, counts in parts for token in tokens]
        if format_of(example) in ("text", "code"):
            # A row's first token is the last of the row before, so that each token is predicted once.
            for start in range(0, len(ids) - 1, block_size - 1):
                encoded.append(Encoded(ids[start:start + block_size], targets[start:start + block_size]))
            continue
        answer = len(parts[-1][0])
        if answer >= block_size:
            raise ValueError(f"the answer that begins with {tokenizer.decode(parts[-1][0][:20])!r} has {answer} tokens, and "
                             f"block_size={block_size} must hold it and some prompt: raise block_size")
        cut += len(ids) > block_size
        ids, targets = ids[-block_size:], targets[-block_size:]
        label = example["label"] if format_of(example) == "classification" else None
        encoded.append(Encoded(ids, targets, label, ids[:-answer] if label is not None else []))
    return encoded, cut


def pad(rows, value):
    """Lists of ids as one tensor, (rows, longest row), filled with value on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def collate(encoded, pad_id):
    """A list of Encoded as (input_ids, labels), both (B, T)."""
    return pad([e.input_ids for e in encoded], pad_id), pad([e.labels for e in encoded], -100)


def batches(encoded, batch_size, pad_id, seed):
    """Yield (input_ids, labels) without end: shuffled anew each epoch, in batches of batch_size (fewer if there are fewer rows)."""
    rng = random.Random(seed)
    queue = []
    while True:
        batch = []
        while len(batch) < min(batch_size, len(encoded)):
            if not queue:
                queue = rng.sample(encoded, len(encoded))
            batch.append(queue.pop())
        yield collate(batch, pad_id)
