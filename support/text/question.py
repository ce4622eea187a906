"""The prompt of a classification example, for a language model that answers with the label."""

import bisect
import re


def prefix_of(tokenizer):
    """The token ids before a conversation: a chat template writes its own, the plain one none."""
    return [] if tokenizer.has_chat_template else tokenizer.prefix_ids


class Question:
    """
    The prompt of classification examples, up to where the label goes. label_prompt: with {text},
    {text_b} and {labels}, or without the last two; label_ids: from tokenize_labels.
    """

    def __init__(self, tokenizer, label_prompt, label_ids, block_size):
        self.tokenizer, self.begin, self.block_size = tokenizer, prefix_of(tokenizer), block_size
        self.room = block_size - max(map(len, label_ids.values()))
        self.labels = ", ".join(label_ids)
        self.parts = re.split(r"\{(labels|text|text_b)\}", label_prompt)  # every second is a name

    def encode(self, text, text_b):
        """The prompt's token ids. text_b: that of a pair, or None. It follows text by default."""
        if text_b is not None and "text_b" not in self.parts[1::2]:
            text = f"{text}\n{text_b}"
        values = {"labels": self.labels, "text": text, "text_b": text_b or ""}
        parts = (values[part] if i % 2 else part for i, part in enumerate(self.parts))
        return self.begin + self.tokenizer.encode(self.tokenizer.turn("".join(parts)))

    def tokenize(self, text, text_b=""):
        """
        (token ids of the prompt, whether it was cut). text_b: the second text of a pair. To leave
        room for every label, the left of the text is cut, of a pair that of the longer one first.
        Raises ValueError if that is not enough.
        """
        ids = self.encode(text, text_b or None)
        if len(ids) <= self.room:
            return ids, False

        longer, both = len(text) - len(text_b), len(text) + len(text_b)

        def prompt(cut):
            """With `cut` characters less."""
            first = min(cut, abs(longer))  # all of these from the longer text
            start, start_b = (cut - first + 1) // 2, (cut - first) // 2
            start, start_b = (start + first, start_b) if longer > 0 else (start, start_b + first)
            return self.encode(text[start:], text_b[start_b:] if text_b else None)

        cut = bisect.bisect_left(range(both), True, key=lambda i: len(prompt(i)) <= self.room)
        ids = prompt(cut)
        if len(ids) > self.room:
            raise ValueError(
                f"block_size={self.block_size} must hold the classification question, which takes "
                f"{len(ids)} tokens without any text, and a label "
                f"({self.block_size - self.room}): raise block_size, or shorten label_prompt"
            )
        return ids, True
