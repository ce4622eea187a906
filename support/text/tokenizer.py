"""
Text to tokens: Hugging Face's tokenizers, run by tiktoken.

A byte-level BPE tokenizer (GPT-2, Qwen, LLaMA 3, SmolLM) works in four steps:
    1. cut added tokens ("<|im_end|>") out of the text
    2. normalise the rest (Qwen: Unicode's NFC)
    3. split it into pieces by a regular expression: words, numbers, spaces
    4. merge neighbours in each piece, in the order of a list of merges
tiktoken does steps 3 and 4 fast, but it merges the pair whose token has the lowest id. Where the
file has another rule or is of another kind (SentencePiece: LLaMA 2, the first Mistral), the
tokenizers library takes over if it is installed.
"""

import bisect
import contextlib
import json
import os
import shutil
import sys
import unicodedata
from functools import cached_property
from pathlib import Path

import regex
import tiktoken

from support.run.files import malformed, read_json, replacing
from support.text.chat import PLAIN_TEMPLATE, ChatTemplate
from support.text.tokenizer_files import (
    CHAR_TO_BYTE,
    FILES,
    check_byte_level,
    mergeable_vocab,
    read_chat_template,
    read_settings,
    read_spec,
    special_tokens_around,
    split_pattern,
    token_text,
    uses_nfc,
)

# What the tokenizers library counts as white space, and as part of a word
SPACES = "".join(regex.findall(r"\p{White_Space}", "".join(map(chr, range(0x3001)))))
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")


class Tokenizer:
    """
    A tokenizer and its chat template, token for token equal to the tokenizers library.

    (Unicode tables differ by version: code points that only the newer table knows may differ.)

    eos_id: ends a text. pad_id: fills batches; no loss falls on it. stop_ids: end a generated
    answer.
    library_reason: why the tokenizers library runs this tokenizer; None where tiktoken does.
    """

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        self.settings = read_settings(folder)
        path, spec = read_spec(folder, self.settings)

        self.library, self.library_reason = None, None
        try:
            added = spec.get("added_tokens") or []
            self.added = {token["content"]: token["id"] for token in added}
            self.special_ids = {token["id"] for token in added if token.get("special")}
            self.prefix_ids, self.suffix_ids = special_tokens_around(spec.get("post_processor"))
            self.make_encoding(spec)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or of an unknown kind ({type(error).__name__}: {error})"
            ) from None
        except NotImplementedError as error:
            self.library, self.library_reason = open_library(path, spec, error), str(error)

        named = {name: token_text(self.settings[name]) for name in self.settings}
        self.eos_id = self.added.get(named.get("eos_token"))
        if self.eos_id is None:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} is missing, or its eos_token is not an added "
                f"token"
            )
        self.pad_id = self.added.get(named.get("pad_token"), self.eos_id)

        template = read_chat_template(folder, self.settings)
        self.has_chat_template = template is not None
        tokens = {
            name: text
            for name, text in named.items()
            if name.endswith("_token") and isinstance(text, str)
        }
        self.chat = ChatTemplate(template or PLAIN_TEMPLATE, tokens, self.added)

    @classmethod
    def from_pretrained(cls, folder):
        """
        Read tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json.

        Raises FileNotFoundError for a missing file; ValueError for a damaged one, or for a kind
        that needs the tokenizers library where that is not installed.
        """
        with malformed(f"{Path(folder) / 'tokenizer_config.json'} or tokenizer.json"):
            return cls(folder)

    def make_encoding(self, spec):
        """
        Make the tiktoken encoding of tokenizer.json's content.

        Raises NotImplementedError, with the reason, where tiktoken would give other tokens.
        """
        self.nfc = uses_nfc(spec)
        check_byte_level(spec["model"])
        self.pattern = split_pattern(spec)
        vocab = mergeable_vocab(spec["model"], self.added)
        ranks = {bytes(CHAR_TO_BYTE[c] for c in token): i for token, i in vocab.items()}

        # SmolLM2 has no token for some bytes, and drops them. tiktoken needs an id for every byte,
        # so these get ids past the vocabulary.
        self.vocab_size = max([*vocab.values(), *self.added.values()]) + 1
        self.missing = {
            bytes([b]): self.vocab_size + b for b in range(256) if bytes([b]) not in ranks
        }
        if self.missing and spec["model"].get("unk_token") is not None:
            raise NotImplementedError("it maps some bytes to an unknown token")

        try:
            self.encoding = tiktoken.Encoding(
                self.folder.name,
                pat_str=self.pattern,
                mergeable_ranks=ranks | self.missing,
                special_tokens=self.added,
            )
        except ValueError as error:
            raise NotImplementedError(
                f"tiktoken can't compile its regular expression ({error})"
            ) from None
        self.unused = set(range(self.vocab_size)) - set(vocab.values()) - set(self.added.values())

        # Each added token is searched for in the raw text or in the normalised text.
        added = spec.get("added_tokens") or []
        raw = [token for token in added if not token.get("normalized")]
        normalised = [
            token | {"content": self.normalise(token["content"])}
            for token in added
            if token.get("normalized")
        ]
        self.added_raw, self.added_normalised = AddedTokens(raw), AddedTokens(normalised)

    def normalise(self, text):
        """Step 2."""
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode(self, text, add_special_tokens=False):
        """
        Token ids of a text, a list. Added tokens written in the text count as themselves.

        add_special_tokens: include what the tokenizer puts around a text (LLaMA:
        <|begin_of_text|>). Chat templates write such tokens themselves.
        """
        if self.library:
            with quiet_panics():
                ids = self.library.encode(text, add_special_tokens=False).ids
        else:
            ids = [i for _, _, part in self.parts(text) for i in part]
        return self.prefix_ids + ids + self.suffix_ids if add_special_tokens else ids

    def parts(self, text):
        """Step 1: (where it begins, whether it is an added token, ids) of each part of a text."""
        begin = 0
        for outer, token in self.added_raw.cut(text):
            ids = [token]
            if token is None:
                ids = []
                for piece, inner in self.added_normalised.cut(self.normalise(outer)):
                    ids += self.encode_ordinary(piece) if inner is None else [inner]
            yield begin, token is not None, ids
            begin += len(outer)

    def encode_ordinary(self, text):
        """Steps 3 and 4, for a text without added tokens."""
        try:
            # Unlike encode_ordinary, this says so where the regular expression takes too long.
            ids = self.encoding.encode(text, disallowed_special=())
            if not self.missing or max(ids, default=0) < self.vocab_size:
                return ids

            # Rare: drop the bytes that have no token first, then merge the rest of each piece.
            ids = []
            for match in regex.finditer(self.pattern, text, timeout=5):
                known = (bytes([b]) for b in match[0].encode() if bytes([b]) not in self.missing)
                kept = b"".join(known)
                ids += self.encoding._encode_single_piece(kept) if kept else []
            return ids
        except (ValueError, regex.error, TimeoutError) as error:
            raise ValueError(f"{self.folder}: the tokenizer fails: {error}") from None

    def encode_cut(self, text, cuts):
        """
        Token ids of a text cut at some positions (ascending): one list for each segment.

        Where all cuts lie between tokens, the tokens are those of the whole text. Otherwise each
        segment is tokenized by itself, as in generation, where the prompt comes before the answer
        exists. (SentencePiece makes a word's space part of its token: there, a token belongs to the
        segment that it ends in.)
        """
        if self.library:
            with quiet_panics():
                encoding = self.library.encode(text, add_special_tokens=False)
            segments = [[] for _ in range(len(cuts) + 1)]
            for token, (_, end) in zip(encoding.ids, encoding.offsets):
                segments[bisect.bisect_right(cuts, end - 1)].append(token)
            return segments

        # The text before a cut is encoded from an added token on: what comes before one is the same
        # whatever follows.
        whole, begins, counts, edges = [], [0], [0], [0]
        for begin, added, ids in self.parts(text):
            if added:
                begins.append(begin)
                counts.append(len(whole))
            whole += ids
        for cut in cuts:
            last = max(0, bisect.bisect_left(begins, cut) - 1)
            head = self.encode(text[begins[last] : cut])
            end = counts[last] + len(head)
            if whole[counts[last] : end] != head:
                return [self.encode(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)])]
            edges.append(end)
        return [whole[a:b] for a, b in zip(edges, [*edges[1:], len(whole)])]

    def decode(self, ids, skip_special=True):
        """Text of token ids. Bytes that are not UTF-8 become U+FFFD; ids without a token vanish."""
        if self.library:
            with quiet_panics():
                return self.library.decode(ids, skip_special_tokens=skip_special)
        skipped = self.unused | (self.special_ids if skip_special else set())
        kept = [i for i in ids if i not in skipped and i < self.vocab_size]
        return self.encoding.decode(kept, errors="replace")

    def save_pretrained(self, folder):
        """Copy the tokenizer's files into a model's folder."""
        for name in FILES:
            if (self.folder / name).exists():
                with replacing(Path(folder) / name) as temporary:
                    shutil.copyfile(self.folder / name, temporary)

    def apply_chat_template(self, messages, add_generation_prompt=False):
        """ChatTemplate.render, by the name that it has in transformers."""
        return self.chat.render(messages, add_generation_prompt)

    @cached_property
    def stop_ids(self):
        """The tokens that end an answer: end of text, end of turn, generation_config.json's."""
        path = self.folder / "generation_config.json"
        named = (read_json(path) if path.exists() else {}).get("eos_token_id") or []
        named = [i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)]
        end_of_turn = self.added.get(self.chat.end_of_turn.strip(), self.eos_id)
        return sorted({self.eos_id, end_of_turn, *named})


def open_library(path, spec, reason):
    """The tokenizers library's tokenizer of tokenizer.json's content. Raises ValueError."""
    try:
        import tokenizers

        with quiet_panics():
            library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except ImportError:
        raise ValueError(
            f"{path}: {reason}, so tiktoken can't reproduce it exactly; the tokenizers library "
            f"can: pip install tokenizers"
        ) from None
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is damaged or of an unknown kind ({error})") from None

    # A file's truncation and padding are meant for batches.
    library.no_truncation()
    library.no_padding()
    return library


@contextlib.contextmanager
def quiet_panics():
    """
    Turn a panic in the tokenizers library, of a regular expression that takes too long, into a
    ValueError. Rust reports panics on file descriptor 2 itself, which is closed in the meantime.
    """
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer fails: {error}") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


class AddedTokens:
    """Finds added tokens in a text as the tokenizers library does: leftmost first, then longest."""

    def __init__(self, tokens):
        self.tokens = {token["content"]: token for token in tokens}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.regex = regex.compile("|".join(map(regex.escape, longest_first))) if tokens else None

    def cut(self, text):
        """Yield (text, None) between added tokens, and (text, id) for each of these."""
        done = 0
        for match in self.regex.finditer(text) if self.regex else ():
            token, (start, stop) = self.tokens[match[0]], match.span()

            # The flags: a token may count only as a whole word, and may take the spaces beside it.
            if token.get("single_word") and (
                WORD.match(text[start - 1 : start]) or WORD.match(text[stop : stop + 1])
            ):
                continue
            if token.get("lstrip"):
                start = max(done, len(text[:start].rstrip(SPACES)))
            if token.get("rstrip"):
                stop = len(text) - len(text[stop:].lstrip(SPACES))

            if done < start:
                yield text[done:start], None
            yield text[start:stop], token["id"]
            done = stop
        if done < len(text):
            yield text[done:], None
