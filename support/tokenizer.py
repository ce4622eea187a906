"""
Text to tokens, and conversations to text: Hugging Face's tokenizer files, run by tiktoken.

A byte-level BPE tokenizer (GPT-2, Qwen, LLaMA 3, SmolLM) works in four steps, which tokenizer.json describes:
    1. added tokens ("<|im_end|>") are cut out of the text
    2. the rest is normalised (Qwen: Unicode's NFC)
    3. a regular expression splits it into pieces: words, numbers, spaces
    4. in each piece, neighbours are merged in the order of a list of merges
tiktoken does 3 and 4, fast, but it takes the pair whose token has the lowest id. Where that is not the file's own rule, or the
file is of another kind (SentencePiece: LLaMA 2, the first Mistral), the tokenizers library takes over if it is installed.
"""

import bisect
import json
import shutil
import unicodedata
from functools import cached_property
from pathlib import Path

import regex
import tiktoken

from support.chat import PLAIN_TEMPLATE, ChatTemplate
from support.files import malformed, read_json, replacing
from support.tokenizer_files import FILES, FLAGS, flat, post_processed, read_spec, split_pattern

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# GPT-2 writes each byte as one printable character: these as themselves, the others from 256 on.
CHAR_TO_BYTE = {chr(b): b for b in PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}


class Tokenizer:
    """
    A tokenizer and its chat template. Token for token equal to the tokenizers library (up to code points that only the newer of
    two Unicode tables knows). eos_id ends a text, pad_id fills batches (no loss falls on it), stop_ids end a generated answer.
    library_reason: why the tokenizers library runs it, or None where tiktoken does.
    """

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        self.settings = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            self.settings |= read_json(folder / name) if (folder / name).exists() else {}
        path, spec = read_spec(folder, self.settings)
        known = {token.get("id") for token in spec.get("added_tokens") or []}
        for i, token in self.settings.get(
            "added_tokens_decoder", {}
        ).items():  # some files name tokens here alone
            if int(i) not in known and spec.get("added_tokens") is not None:
                spec["added_tokens"].append(FLAGS | token | {"id": int(i)})
        self.library, self.library_reason = None, None
        try:
            self.added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
            self.special_ids = {
                token["id"] for token in spec.get("added_tokens") or [] if token.get("special")
            }
            self.prefix_ids, self.suffix_ids = post_processed(spec.get("post_processor"))
            self.read_byte_level(spec)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or of an unknown kind ({type(error).__name__}: {error})"
            ) from None
        except NotImplementedError as error:
            try:
                import tokenizers

                self.library = tokenizers.Tokenizer.from_str(json.dumps(spec))
                self.library.no_truncation()
                self.library.no_padding()
            except ImportError:
                raise ValueError(
                    f"{path}: {error}, so tiktoken can't reproduce it exactly; the tokenizers library can: "
                    f"pip install tokenizers"
                ) from None
            except Exception as damage:  # the library's own class
                raise ValueError(f"{path} is damaged or of an unknown kind ({damage})") from None
            self.library_reason = str(error)
        self.eos_id = self.added.get(self.named("eos_token"))
        if self.eos_id is None:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} is missing, or its eos_token is no added token"
            )
        self.pad_id = self.added.get(self.named("pad_token"), self.eos_id)
        template = self.settings.get("chat_template")
        if isinstance(template, list):  # several templates by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.has_chat_template = template is not None
        tokens = {
            name: self.named(name)
            for name in self.settings
            if name.endswith("_token") and isinstance(self.named(name), str)
        }
        self.chat = ChatTemplate(template or PLAIN_TEMPLATE, tokens, self.added)

    @classmethod
    def from_pretrained(cls, folder):
        """
        Read tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json.

        Raises FileNotFoundError for a missing file; ValueError for a damaged one, or a kind that needs the tokenizers library
        where that is not installed.
        """
        with malformed(f"{Path(folder) / 'tokenizer_config.json'} or tokenizer.json"):
            return cls(folder)

    def named(self, name):
        """A token of tokenizer_config.json by its name there ("eos_token"); it is written as text, or as an object with flags."""
        token = self.settings.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def read_byte_level(self, spec):
        """Make the tiktoken encoding. Raises NotImplementedError with the reason where it would not be exact."""
        model, added = spec["model"], spec.get("added_tokens") or []
        normalizers = [step["type"] for step in flat(spec.get("normalizer"), "normalizers")]
        if set(normalizers) - {"NFC"}:
            raise NotImplementedError(f"its normalizer is {' + '.join(normalizers)}")
        self.nfc = bool(normalizers)
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            raise NotImplementedError(
                f"it is no byte-level BPE, but {model.get('type')}{' with byte fallback' * bool(model.get('byte_fallback'))}"
            )
        if (
            model.get("dropout")
            or model.get("continuing_subword_prefix")
            or model.get("end_of_word_suffix")
        ):
            raise NotImplementedError("its BPE has a dropout, a prefix or a suffix")
        self.pattern = split_pattern(flat(spec.get("pre_tokenizer"), "pretokenizers"))

        merged = [
            pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)
            for pair in model["merges"]
        ]
        made = set(merged)
        vocab = {
            token: i
            for token, i in model["vocab"].items()
            if token not in self.added or token in made
        }
        if not vocab or made - vocab.keys():
            raise ValueError("vocab is empty, or lacks a token that merges make")
        for ids in (list(vocab.values()), list(self.added.values())):  # tiktoken would panic
            if not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
                raise ValueError(
                    "two tokens have the same id, or an id is no whole number from 0 on"
                )
        order = [vocab[token] for token in merged]
        if order != sorted(order):
            raise NotImplementedError("its merges and ids stand in different orders")
        for token in (
            vocab.keys() - made
        ):  # tiktoken would find it as a whole piece, or merge it from any two tokens
            if len(token) > 1 and (
                not model.get("ignore_merges")
                or any(token[:i] in vocab and token[i:] in vocab for i in range(1, len(token)))
            ):
                raise NotImplementedError(f"no merge makes its token {token!r}")
        ranks = {bytes(CHAR_TO_BYTE[c] for c in token): i for token, i in vocab.items()}
        # SmolLM2 has no token for some bytes, and drops them. tiktoken needs an id for every byte: these lie past the vocabulary.
        self.vocab_size = max([*vocab.values(), *self.added.values()]) + 1
        self.missing = {
            bytes([b]): self.vocab_size + b for b in range(256) if bytes([b]) not in ranks
        }
        if self.missing and model.get("unk_token") is not None:
            raise NotImplementedError("some bytes become an unknown token")
        try:
            self.encoding = tiktoken.Encoding(
                self.folder.name,
                pat_str=self.pattern,
                mergeable_ranks=ranks | self.missing,
                special_tokens=self.added,
            )
        except ValueError as error:
            raise NotImplementedError(
                f"its regular expression is not tiktoken's kind ({error})"
            ) from None
        self.unused = set(range(self.vocab_size)) - set(vocab.values()) - set(self.added.values())
        # Added tokens are looked for in the text as it stands, or in the normalised one.
        self.added_raw = AddedTokens([token for token in added if not token.get("normalized")])
        self.added_normalised = AddedTokens(
            [
                token | {"content": self.normalise(token["content"])}
                for token in added
                if token.get("normalized")
            ]
        )

    def normalise(self, text):
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode(self, text, add_special_tokens=False):
        """
        Token ids of text, a list; added tokens written in the text count as themselves. add_special_tokens: with what the
        tokenizer puts around a text (LLaMA: <|begin_of_text|>); chat templates write such tokens themselves.
        """
        if self.library:
            ids = self.library.encode(text, add_special_tokens=False).ids
        else:
            ids = []
            for outer, token in self.added_raw.cut(text):
                if token is not None:
                    ids.append(token)
                    continue
                for piece, token in self.added_normalised.cut(self.normalise(outer)):
                    ids += self.encode_piece(piece) if token is None else [token]
        return self.prefix_ids + ids + self.suffix_ids if add_special_tokens else ids

    def encode_piece(self, text):
        """Steps 3 and 4, for a text without added tokens."""
        ids = self.encoding.encode_ordinary(text)
        if (
            self.missing and max(ids, default=0) >= self.vocab_size
        ):  # rare: drop the bytes that have no token, then merge the rest
            ids = []
            for match in regex.finditer(self.pattern, text):
                kept = b"".join(
                    bytes([b]) for b in match[0].encode() if bytes([b]) not in self.missing
                )
                ids += self.encoding._encode_single_piece(kept) if kept else []
        return ids

    def encode_cut(self, text, cuts):
        """
        Token ids of text as one list for each part between the cuts (places in the text, ascending).

        Tokens are those of the whole text wherever the cuts lie between tokens; otherwise each part is tokenized by itself, as in
        generation, where the prompt is there before the answer. (In SentencePiece, where a word's space is part of its token,
        a token counts to the part that it ends in.)
        """
        if self.library:
            encoding, parts = (
                self.library.encode(text, add_special_tokens=False),
                [[] for _ in range(len(cuts) + 1)],
            )
            for token, (_, end) in zip(encoding.ids, encoding.offsets):
                parts[bisect.bisect_right(cuts, end - 1)].append(token)
            return parts
        whole, edges = self.encode(text), [0]
        for cut in cuts:
            head = self.encode(text[:cut])
            if whole[: len(head)] != head:
                return [self.encode(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)])]
            edges.append(len(head))
        return [whole[a:b] for a, b in zip(edges, [*edges[1:], len(whole)])]

    def decode(self, ids, skip_special=True):
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        if self.library:
            return self.library.decode(ids, skip_special_tokens=skip_special)
        skipped = self.unused | (self.special_ids if skip_special else set())
        return self.encoding.decode(
            [i for i in ids if i not in skipped and i < self.vocab_size], errors="replace"
        )

    def save_pretrained(self, folder):
        """Copy the tokenizer's files into a model's folder."""
        for name in FILES:
            if (self.folder / name).exists():
                with replacing(Path(folder) / name) as temporary:
                    shutil.copyfile(self.folder / name, temporary)

    def apply_chat_template(self, messages, add_generation_prompt=False):
        """As ChatTemplate.render."""
        return self.chat.render(messages, add_generation_prompt)

    def conversation(self, messages):
        """As ChatTemplate.conversation."""
        return self.chat.conversation(messages)

    @property
    def end_of_turn(self):
        """As ChatTemplate.end_of_turn."""
        return self.chat.end_of_turn

    @cached_property
    def stop_ids(self):
        """The tokens that end an answer: end of text, end of turn, and those that generation_config.json names."""
        path = self.folder / "generation_config.json"
        named = (read_json(path) if path.exists() else {}).get("eos_token_id") or []
        named = [i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)]
        return sorted({self.eos_id, self.added.get(self.end_of_turn.strip(), self.eos_id), *named})


class AddedTokens:
    """Finds added tokens in a text, the leftmost and longest first, as the tokenizers library does, flags included."""

    def __init__(self, tokens):
        self.tokens = {token["content"]: token for token in tokens}
        self.regex = (
            regex.compile("|".join(map(regex.escape, sorted(self.tokens, key=len, reverse=True))))
            if tokens
            else None
        )

    def cut(self, text):
        """Yield (text, None) for what lies between added tokens, and (text, id) for each of these."""
        done = 0
        for match in self.regex.finditer(text) if self.regex else ():
            token, (start, stop) = self.tokens[match[0]], match.span()
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


SPACES = "".join(regex.findall(r"\p{White_Space}", "".join(map(chr, range(0x3001)))))
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
