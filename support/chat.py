"""
Chat templates: conversations to text, and where in that text the assistant's answers are.

A template is a program in jinja2's language that comes with a model, so it runs in a sandbox, in a
process of its own (support/render.py).
Source: https://huggingface.co/docs/transformers/chat_templating
"""

import json
import subprocess
import sys
import threading
from functools import cached_property
from pathlib import Path

# For a model without a template
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{{ m['role'] | capitalize }}:\n{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
MARK = "\ue000the answer\ue000"  # stands in for an answer, to see where a template puts it


class ChatTemplate:
    """
    A model's chat template.

    source: its text. tokens: the special tokens that it may name, {"eos_token": "<|im_end|>"}.
    added: the tokenizer's added tokens, one of which usually ends a turn.
    """

    def __init__(self, source, tokens, added):
        self.source, self.tokens, self.added = source, tokens, added

    def render(self, messages, add_generation_prompt=False):
        """
        The conversation as text.

        messages: list of {"role", "content"}; add_generation_prompt: open the assistant's turn.
        Raises ValueError when the template rejects the messages.
        """
        variables = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self.tokens,
        }
        answer = ask(json.dumps({"source": self.source, "variables": variables}))
        if "error" in answer:
            raise ValueError(f"the chat template rejects the conversation: {answer['error']}")
        return answer["text"]

    def conversation(self, messages):
        """
        Return the conversation as text, and a list of spans (start, end), one for each answer.

        A span holds what the model itself has to write: it starts where the generation prompt ends,
        and ends after the end-of-turn token. In a template without a generation prompt it starts at
        the answer, with the space before it. Raises ValueError when the template rejects the
        messages, or when an answer can't be found in the text.
        """
        text = self.render(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        places = self.places(text, messages, answers) if len(answers) > 3 else None
        if not places:
            return text, [self.answer_span(text, messages, i) for i in answers]

        # answer_span renders the whole conversation three times, which a long one can't afford for
        # each answer: where the template opens an answer as it does the first, the span is known.
        before = messages[: answers[0]]
        opened = self.render(before, add_generation_prompt=True).removeprefix(self.render(before))
        gap = text[self.answer_span(text, messages, answers[0])[0] : places[0][0]]
        spans = []
        for i, (begin, end) in zip(answers, places):
            start = begin - len(gap)
            if opened and text.startswith(gap, start) and text.endswith(opened, 0, start):
                closed = text.startswith(self.end_of_turn, end)
                spans.append((start, end + len(self.end_of_turn) * closed))
            else:
                spans.append(self.answer_span(text, messages, i))
        return text, spans

    def places(self, text, messages, answers):
        """Where the answers' contents are in the text: [(begin, end)]; None if they are changed."""
        marks = {i: f"{MARK}{i};" for i in answers}
        marked = self.render(
            [m | {"content": marks.get(i, m["content"])} for i, m in enumerate(messages)]
        )
        places, begin = [], 0
        for i in answers:
            piece, _, marked = marked.partition(marks[i])
            end = begin + len(piece) + len(messages[i]["content"])
            if text[begin:end] != piece + messages[i]["content"]:
                return None
            places.append((begin + len(piece), end))
            begin = end
        return places if text[begin:] == marked else None

    def answer_span(self, text, messages, i):
        """Where message i, an answer, is in the text of the conversation: (start, end)."""
        # Render again with a mark in the answer's place: the text around it stays the same.
        marked = [*messages[:i], messages[i] | {"content": MARK}, *messages[i + 1 :]]
        before, found, after = self.render(marked).partition(MARK)
        start = len(before) if text.startswith(before) else None
        end = len(text) - len(after)

        # The model starts to write where the generation prompt ends. A template without such a
        # prompt (not `opened`) may put a space before the answer: the model writes that, too.
        prompt = self.render(messages[:i], add_generation_prompt=True) if i > 0 else ""
        if prompt and text.startswith(prompt):
            opened = prompt != self.render(messages[:i])
            if start is None or opened or not text[len(prompt) : start].strip():
                start = len(prompt)

        if not found or start is None or not text.endswith(after) or start >= end:
            raise ValueError(
                "the chat template omits an answer, or changes the rest of the conversation along "
                "with it, so the assistant's tokens can't be told from the others"
            )
        return start, end + len(self.end_of_turn) * after.startswith(self.end_of_turn)

    @cached_property
    def end_of_turn(self):
        """The added token after an answer, with any white space before it; "" without one."""
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}
        try:
            text = self.render([question, answer])
        except ValueError:  # the template needs other turns than these two
            return self.tokens["eos_token"]

        after = text.partition(MARK)[2]
        stripped = after.lstrip()
        tokens = [token for token in self.added if stripped.startswith(token)]
        return after[: len(after) - len(stripped)] + max(tokens, key=len) if tokens else ""


# ------------------------------------------------------------------------ the renderer's process

renderer = None  # started when a template is first rendered; it ends with this process


def ask(request, seconds=5):
    """The answer of support/render.py to a request; an error if it takes too long."""
    global renderer
    if renderer is None or renderer.poll() is not None:
        command = [sys.executable, str(Path(__file__).with_name("render.py"))]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        renderer = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)

    late = threading.Timer(seconds, renderer.kill)
    late.start()
    try:
        renderer.stdin.write(request + "\n")
        renderer.stdin.flush()
        line = renderer.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        late.cancel()
    if not line:
        renderer.wait()
        return {"error": f"it needs more than {seconds} seconds, or more than 1 GB of memory"}
    return json.loads(line)
