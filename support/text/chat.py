"""
Chat templates write conversations as text; this file also finds the answers in that text. A
template is a program that comes with a model, so it runs in a sandbox in a process of its own
(support/text/render.py). Source: https://huggingface.co/docs/transformers/chat_templating
"""

import json
import os
import re
import subprocess
import sys
import threading
from functools import cached_property
from pathlib import Path

from support.text.jsonl import LEARNT, is_learnt

# For a model without a template
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{{ m['role'] | capitalize }}:\n{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
MARK = "\ue000the answer\ue000"  # stands in for an answer, and shows where a template puts it


class ChatTemplate:
    """
    A model's chat template. source: its text. names: the special tokens that it may name,
    {"eos_token": "<|im_end|>"}. added: the added tokens, one of which usually ends a turn.
    with_tools: another text, for conversations with tools. now: the time for the template, in
    ISO 8601; None: the clock's.
    """

    def __init__(self, source, names, added, with_tools=None, now=None):
        self.source, self.names, self.added, self.now = source, names, added, now
        self.with_tools = with_tools or source

    def given(self, **lists):
        """The template for a conversation that comes with lists of tools, documents or both."""
        source = self.with_tools if lists.get("tools") else self.source
        return ChatTemplate(source, self.names | lists, self.added, now=self.now)

    def render(self, messages, add_generation_prompt=False):
        """
        A conversation, [{"role", "content"}, …], as text. add_generation_prompt: open the
        assistant's turn. Raises ValueError if the template rejects it or exceeds its limits.
        """
        return self.render_all((messages, add_generation_prompt))[0]

    def render_all(self, *conversations):
        """Several (messages, add_generation_prompt) as a list of texts, by one request."""
        answers = self.answers(conversations)
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise ValueError(f"the chat template rejects the conversation: {errors[0]}")
        return [answer["text"] for answer in answers]

    def answers(self, conversations):
        """[{"text"} or {"error"}, …] of (messages, add_generation_prompt) pairs, by one request."""
        request = {"source": self.source, "names": self.names, "now": self.now}
        return ask(json.dumps(request | {"conversations": conversations}))

    def conversation(self, messages):
        """
        (the conversation as text, a span (start, end) for each answer, notes on what is lost).

        A span is what the model has to write: from the end of the generation prompt to the end of
        the end-of-turn token. Without a generation prompt, it starts with the space before the
        answer. Raises ValueError if the template rejects the messages or an answer is not found.
        """
        text = self.render(messages)
        places, written = self.places(text, messages)
        openings, spans, notes = {}, [], self.lost(text, messages, written)
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            start = end = 0
            if places and not messages[i].get("tool_calls"):
                # After the same text, a template opens all answers alike.
                past, (begin, end) = places[i - 1][1] if i else 0, places[i]
                between = i > 0, text[past:begin]
                opening = openings.get(between) or self.opening(text[:past], messages[:i])
                openings[between] = opening
                start = after_prompt(text, past, *opening, begin) if opening else end
                if opening and opening[1] and not text.startswith(opening[0], past):
                    common = len(os.path.commonprefix([opening[0], text[past:]]))
                    asked = f"the prompt for an answer ends with {opening[0][common:]!r:.60}"
                    notes.add(f"{asked}, after which no answer is learnt")
            if start >= end:  # an empty answer, or no simple case: render all of it with a mark
                start, end = self.answer_span(text, messages, i)
            closed = text.startswith(self.end_of_turn, end)
            spans.append((start, end + len(self.end_of_turn) * closed))
        return text, spans, notes

    def places(self, text, messages):
        """
        ([(begin, end)] of each message's content in the text, or None if the template omits, moves
        or changes one by more than the white space around it; the numbers of those it writes).
        """
        marked = [m | {"content": f"\ue000message {i}\ue000"} for i, m in enumerate(messages)]
        try:
            parts = re.split("\ue000message ([0-9]+)\ue000", self.render(marked))
        except ValueError:
            return None, range(len(messages))
        written = [*map(int, parts[1::2])]
        if written != [*range(len(messages))]:
            return None, written

        places, end = [], 0
        for message, before, after in zip(messages, parts[::2], parts[2::2]):
            content = message.get("content") or ""
            contents = content, content.strip()
            fitting = [c for c in contents if text.startswith(before + c + after, end)]
            if not fitting:
                return None, written
            begin = end + len(before)
            end = begin + len(fitting[0])
            places.append((begin, end))
        return places if end + len(parts[-1]) == len(text) else None, written

    def lost(self, text, messages, written):
        """
        A set of lines on what the text lacks of a conversation: "the chat template drops the system
        turn". It lacks contents that are not `written`, strings that it does not hold, and keys
        without which it would be the same.
        """
        lists = [name for name in ("tools", "documents") if self.names.get(name)]
        others = [self.given(**{name: None}).answers([(messages, False)])[0] for name in lists]
        keys = {key for message in messages for key in message} - {"role", "content"}
        without = [([{k: m[k] for k in m if k != key} for m in messages], False) for key in keys]
        others += self.answers(without) if keys else []
        unused = {name for name, other in zip([*lists, *keys], others) if other.get("text") == text}

        lost = {repr(name) for name in unused.intersection(lists)}
        for i, message in enumerate(messages):
            role = message["role"]
            for key in message.keys() - {"role", *(LEARNT if role == "assistant" else ())}:
                value, name = message[key], f"the {role} turn"
                whole = i not in written if key == "content" else key in unused
                partly = isinstance(value, str) and not holds(text, value)
                if (whole or partly) and str(value or "").strip():
                    name = name if key == "content" else f"{key!r} of {name}"
                    lost.add(name if whole else f"a part of {name}")
        return {f"the chat template drops {name}" for name in lost}

    def opening(self, text, messages):
        """
        (the prompt for an answer after `messages`, without the `text` that it begins with; whether
        it ends with a generation prompt), or None if it does not begin with the text.
        """
        if not messages:
            return "", False
        prompt, plain = self.render_all((messages, True), (messages, False))
        return (prompt[len(text) :], prompt != plain) if prompt.startswith(text) else None

    def answer_span(self, text, messages, i):
        """(start, end) of message i, an answer, in the text, by rendering a mark in its place."""
        prompt = self.opening("", messages[:i])
        if messages[i].get("tool_calls"):  # they follow the content, up to the end of the turn
            start = after_prompt(text, 0, *prompt, None)
            answer, mark, after = text[start or 0 :].partition(self.end_of_turn.strip() or "\0")
            end = len(text) - len(after) if answer.strip() else 0
        else:
            marked = [*messages[:i], messages[i] | {"content": MARK}, *messages[i + 1 :]]
            before, mark, after = self.render(marked).partition(MARK)
            start = after_prompt(text, 0, *prompt, len(before) if text.startswith(before) else None)
            end = len(text) - len(after)

        empty = start is not None and start >= end + (not is_learnt(messages[i]))
        if not mark or start is None or not text.endswith(after) or empty:
            raise ValueError(
                "the chat template omits an answer, or changes the rest of the conversation along "
                "with it, so the assistant's tokens can't be told from the others"
            )
        return start, end

    @cached_property
    def end_of_turn(self):
        """The added token after an answer, with the white space before it; or ""."""
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}
        try:
            text = self.render([question, answer])
        except ValueError:  # the template needs other turns than these two
            return self.names["eos_token"]

        after = text.partition(MARK)[2]
        stripped = after.lstrip()
        tokens = [token for token in self.added if stripped.startswith(token)]
        return after[: len(after) - len(stripped)] + max(tokens, key=len) if tokens else ""


def holds(text, value):
    """Whether a text holds a string, as it stands but for white space around it, or as JSON."""
    value = value.strip()
    return value in text or json.dumps(value, ensure_ascii=False)[1:-1] in text


def after_prompt(text, past, prompt, opened, start):
    """
    Where the model starts to write: after the prompt at text[past:], or else at `start`. Without a
    generation prompt (`opened`), it also writes the space before the answer.
    """
    end = past + len(prompt)
    if not prompt or not text.startswith(prompt, past):
        return start
    return end if start is None or opened or not text[end:start].strip() else start


LOCK = threading.Lock()  # threads take turns at the renderer
renderers = {}  # {a process's id: its render.py}, since a forked process starts its own


def ask(request):
    """The answers of render.py to a request; the first request starts it."""
    with LOCK:
        renderer = renderers.get(os.getpid())
        if renderer is None or renderer.poll() is not None:
            command = [sys.executable, str(Path(__file__).with_name("render.py"))]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            renderer = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)
            renderers[os.getpid()] = renderer
        line = ""
        try:
            renderer.stdin.write(request + "\n")
            renderer.stdin.flush()
            line = renderer.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not line:  # a limit ended it, or Ctrl-C came: no later request may get this answer
                renderer.kill()
                renderer.wait()
    if not line:
        return [{"error": "rendering takes more than 5 seconds or 1 GB of memory, or crashes"}]
    return json.loads(line)
