"""
From text to tokens: Hugging Face's tokenizers, run by tiktoken or the tokenizers library.

A byte-level BPE tokenizer (GPT-2, Qwen, LLaMA 3, SmolLM) works in four steps:
    1. cut added tokens ("<|im_end|>") out of the text
    2. normalise the rest (Qwen: Unicode's NFC)
    3. split it into pieces by a regular expression: words, numbers, spaces
    4. merge neighbours in each piece, in the order of a list of merges
tiktoken does steps 3 and 4 three times as fast as the tokenizers library, which runs every other
tokenizer (SentencePiece: LLaMA 2, the first Mistral).
"""

import bisect
import contextlib
import json
import re
import shutil
import unicodedata
from functools import cached_property
from pathlib import Path

from support.run.files import malformed, read_json, replacing, write_json
from support.text import tokenizer_files
from support.text.chat import PLAIN_TEMPLATE, ChatTemplate

# Questions that show what a chat template does to any question
ODD = (
    "\ue000?\ue000",
    '\n \ta\\n <b>\'"é"</b> {{ 7*7 }}\n\n[INST]<think>x</think> y\u3000\n ',
    "<tool_response>\n?\n</tool_response>",
    "",
)


class Tokenizer:
    """
    A tokenizer and its chat template. Its tokens equal the tokenizers library's, except perhaps for
    code points that only the newer of two Unicode tables knows.

    added: the added tokens, {text: id}. eos_id ends a text. pad_id fills batches, without a loss.
    stop_ids end a generated answer. prefix_ids go before a text (LLaMA: <|begin_of_text|>); chat
    templates write them too. unknown_id is what text without a token becomes, if there is one.
    encoding: tiktoken's, or None if the tokenizers library is used.
    """

    def __init__(self, folder, now=None):
        self.folder = folder = Path(folder)
        self.library, named, templates = tokenizer_files.read_files(folder)
        spec = json.loads(self.library.to_str())
        self.nfc = spec.get("normalizer") is not None
        self.encoding = tokenizer_files.tiktoken_encoding(spec)
        self.unknown_id = None if self.encoding else tokenizer_files.unknown_id(self.library)

        vocab = spec["model"]["vocab"] if self.encoding else {}
        tokens = spec["added_tokens"]
        self.added = {token["content"]: token["id"] for token in tokens}
        self.special_ids = {token["id"] for token in tokens if token["special"]}
        self.ids = {*vocab.values(), *self.added.values()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

        if "eos_token" not in named and (folder / "config.json").exists():  # only there: GPT-2's
            end = read_json(folder / "config.json").get("eos_token_id")
            named["eos_token"] = next((text for text, i in self.added.items() if i == end), None)
        self.eos_id = self.added.get(named.get("eos_token"))
        if self.eos_id is None:
            path = folder / "tokenizer_config.json"
            raise ValueError(f"{path} names no eos_token that is an added token")
        self.pad_id = self.added.get(named.get("pad_token"), self.eos_id)
        template, with_tools = templates.get("default"), templates.get("tool_use")
        self.has_chat_template = template is not None
        self.chat = ChatTemplate(template or PLAIN_TEMPLATE, named, self.added, with_tools, now)

    @classmethod
    def from_pretrained(cls, folder, now=None):
        """A folder's Tokenizer. now: ChatTemplate's. Raises FileNotFoundError or ValueError."""
        with malformed(f"{Path(folder) / 'tokenizer_config.json'} or tokenizer.json"):
            return cls(folder, now)

    def encode(self, text):
        """The token ids of a text, a list. Added tokens in the text count as themselves."""
        if self.encoding:
            ids = []
            with contextlib.suppress(ValueError):  # tiktoken gives up on a million spaces
                for i, part in enumerate(self.added_pattern.split(text)):
                    if i % 2:
                        ids.append(self.added[part])
                    else:
                        part = unicodedata.normalize("NFC", part) if self.nfc else part
                        ids += self.encoding.encode(part, disallowed_special=())
                if self.ids.issuperset(ids):  # else a byte has no token
                    return ids
        return self.encode_by_library(text).ids

    def encode_by_library(self, text, add_special_tokens=False):
        with tokenizer_files.library_errors(f"{self.folder}: the tokenizer fails"):
            return self.library.encode(text, add_special_tokens=add_special_tokens)

    def encode_cut(self, text, cuts):
        """
        The token ids of a text's segments between cuts (ascending positions), a list for each.

        If all cuts lie between tokens, the tokens are the whole text's. Otherwise each segment is
        encoded by itself, since in generation the prompt is encoded before its answer exists. But
        if the tokenizer puts a space before each text (LLaMA 2: SentencePiece), the tokens are the
        whole text's, and each belongs to the segment that it ends in.
        """
        whole, added = self.encode(text), set(self.added.values())
        if not cuts:
            return [whole]
        # Text after an added token does not change the tokens before it, so the text before a cut
        # is encoded from the last added token on.
        begins = [0, *(match.start() for match in self.added_pattern.finditer(text))]
        counts = [0, *(n for n, token in enumerate(whole) if token in added)]
        if len(begins) != len(counts):  # an added token counts only as a whole word
            begins, counts = [0], [0]

        edges = [0]
        for cut in cuts:
            last = max(0, bisect.bisect_left(begins, cut) - 1)
            head = self.encode(text[begins[last] : cut])
            edges.append(counts[last] + len(head))
            if whole[counts[last] : edges[-1]] != head:
                return self.encode_apart(text, cuts)
        return [whole[a:b] for a, b in zip(edges, [*edges[1:], len(whole)])]

    def encode_apart(self, text, cuts):
        """encode_cut for a cut inside a token."""
        if self.encoding or self.encode_by_library("a").tokens == ["a"]:  # not "▁a"
            return [self.encode(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)])]

        segments, encoding = [[] for _ in range(len(cuts) + 1)], self.encode_by_library(text)
        for token, (_, end) in zip(encoding.ids, encoding.offsets):
            segments[bisect.bisect_right(cuts, end - 1)].append(token)
        return segments

    def decode(self, ids, skip_special=True):
        """The text of token ids. Broken UTF-8 becomes U+FFFD; ids without a token vanish."""
        if self.encoding:
            hidden = self.special_ids if skip_special else ()
            return self.encoding.decode([i for i in ids if i in self.ids and i not in hidden])
        with tokenizer_files.library_errors(f"{self.folder}: the tokenizer fails"):
            return self.library.decode(ids, skip_special_tokens=skip_special)

    def save_pretrained(self, folder):
        """Copy the tokenizer's files into a model's folder, and write there what ends an answer."""
        for name in tokenizer_files.FILES:
            if (self.folder / name).exists():
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                with replacing(Path(folder) / name) as temporary:
                    shutil.copyfile(self.folder / name, temporary)
        path = Path(folder) / "generation_config.json"  # which transformers' generate obeys
        settings = read_json(path) if path.exists() else {}
        write_json(path, settings | {"eos_token_id": self.stop_ids})

    def apply_chat_template(self, messages, add_generation_prompt=False):
        """ChatTemplate.render, under its name in transformers."""
        return self.chat.render(messages, add_generation_prompt)

    def turn(self, question):
        """The chat template's text for a question, up to the answer, mostly without rendering."""
        if self.frame is None:
            return self.chat.render([{"role": "user", "content": question}], True)
        before, edit, after = self.frame
        return before + edit(question) + after

    @cached_property
    def frame(self):
        """
        (the chat template's text before a question, the function that it applies to the question,
        str or str.strip, its text after it), or None if it does more to one of ODD.
        """
        answers = self.chat.answers([([{"role": "user", "content": odd}], True) for odd in ODD])
        texts = [answer.get("text", "") for answer in answers]
        before, mark, after = texts[0].partition(ODD[0])
        for edit in (str, str.strip):
            if mark and texts == [before + edit(odd) + after for odd in ODD]:
                return before, edit, after

    @cached_property
    def prefix_ids(self):
        text = next(iter(self.added))  # any text that has a token
        encoding = self.encode_by_library(text, add_special_tokens=True)
        return encoding.ids[: encoding.sequence_ids.index(0)]  # 0: a token of the text itself

    def prefix_of(self, ids):
        """prefix_ids, or [] if the token ids of a text begin with them already."""
        return [] if ids[: len(self.prefix_ids)] == self.prefix_ids else self.prefix_ids

    @cached_property
    def ends(self):
        """The texts of stop_ids, a tuple."""
        return tuple(text for text, i in self.added.items() if i in self.stop_ids)

    def without_end(self, text):
        """A text without the end token that it may have."""
        end = next(filter(text.rstrip().endswith, self.ends), "")
        return text.rstrip().removesuffix(end) if end else text

    @cached_property
    def stop_ids(self):
        """The tokens that end an answer: end of text, end of turn, generation_config.json's."""
        path = self.folder / "generation_config.json"
        named = (read_json(path) if path.exists() else {}).get("eos_token_id") or []
        named = [i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)]
        end_of_turn = self.added.get(self.chat.end_of_turn.strip(), self.eos_id)
        return sorted({self.eos_id, end_of_turn, *named})
