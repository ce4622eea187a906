"""
Chat templates: conversations to text, and where in that text the assistant's answers are.

A template is a program in jinja2's language that comes with a model, so it runs in a sandbox.
Source: https://huggingface.co/docs/transformers/chat_templating
"""

import datetime
import json
from functools import cached_property

import jinja2
import jinja2.ext
import jinja2.sandbox

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
        try:
            return self.compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise ValueError(f"the chat template rejects the conversation: {error}") from None

    @cached_property
    def compiled(self):
        """The template, compiled, with the functions that transformers gives to templates."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationBlock],
        )

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        def strftime_now(form):
            return datetime.datetime.now().strftime(form)

        # jinja2's own tojson escapes HTML.
        def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            return json.dumps(
                x,
                ensure_ascii=ensure_ascii,
                indent=indent,
                separators=separators,
                sort_keys=sort_keys,
            )

        environment.filters["tojson"] = to_json
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        return environment.from_string(self.source)

    def conversation(self, messages):
        """
        Return the conversation as text, and a list of spans (start, end), one for each answer.

        A span holds what the model itself has to write: it starts where the generation prompt ends,
        and ends after the end-of-turn token. In a template without a generation prompt it starts at
        the answer, with the space before it. Raises ValueError when the template rejects the
        messages, or when an answer can't be found in the text.
        """
        text = self.render(messages)
        spans = [
            self.answer_span(text, messages, i)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        return text, spans

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


class GenerationBlock(jinja2.ext.Extension):
    """
    {% generation %} … {% endgeneration %}, by which some templates mark the assistant's text.

    It changes nothing here: ChatTemplate.conversation finds that text in any template.
    """

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)
