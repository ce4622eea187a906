"""Chat templates: conversations to text, and where in it the assistant's answers lie."""

import datetime
import json
from functools import cached_property

import jinja2
import jinja2.ext
import jinja2.sandbox

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}:\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
MARK = "\ue000the answer\ue000"  # stands in for an answer, to see where a template puts it


class ChatTemplate:
    """
    A model's chat template. source: its text, in jinja2's language; tokens: those that it may name, {"eos_token": "<|im_end|>"};
    added: the tokenizer's added tokens, one of which ends a turn.
    """

    def __init__(self, source, tokens, added):
        self.source, self.tokens, self.added = source, tokens, added

    def render(self, messages, add_generation_prompt=False):
        """
        The conversation as text. messages: list of {"role", "content"}; add_generation_prompt: open the assistant's turn.

        Runs in jinja2's sandbox. Raises ValueError when the template refuses the messages.
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
            raise ValueError(f"the chat template refuses the conversation: {error}") from None

    @cached_property
    def compiled(self):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationBlock],
        )

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        def to_json(
            x, ensure_ascii=False, indent=None, separators=None, sort_keys=False
        ):  # jinja2's own escapes HTML
            return json.dumps(
                x,
                ensure_ascii=ensure_ascii,
                indent=indent,
                separators=separators,
                sort_keys=sort_keys,
            )

        environment.filters["tojson"] = to_json
        environment.globals |= {
            "raise_exception": raise_exception,  # templates call these by name
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        return environment.from_string(self.source)

    def conversation(self, messages):
        """
        The conversation as text, and the assistant's parts of it: a list of (start, end), each with its end-of-turn token.

        A part begins where the template's generation prompt ends, so it is what the model itself has to write; in a template without
        such a prompt, with the answer and the space before it. Raises ValueError when the template refuses the messages, or leaves an answer out.
        """
        text, spans = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, found, after = self.render(
                [*messages[:i], message | {"content": MARK}, *messages[i + 1 :]]
            ).partition(MARK)
            start, end = len(before) if text.startswith(before) else None, len(text) - len(after)
            prompt = self.render(messages[:i], add_generation_prompt=True) if i > 0 else ""
            if prompt and text.startswith(prompt):
                opened = prompt != self.render(messages[:i])
                if (
                    start is None or opened or not text[len(prompt) : start].strip()
                ):  # a space before an answer is the model's to write
                    start = len(prompt)
            if not found or start is None or not text.endswith(after) or start >= end:
                raise ValueError(
                    "the chat template leaves an answer out, or changes the rest of the conversation with it, "
                    "so the assistant's part can't be told from the rest"
                )
            spans.append((start, end + len(self.end_of_turn) * after.startswith(self.end_of_turn)))
        return text, spans

    @cached_property
    def end_of_turn(self):
        """The added token that the template writes behind an answer, with white space before it if any; "" without one."""
        try:
            text = self.render(
                [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}]
            )
        except ValueError:  # a template that asks for more than these two turns
            return self.tokens["eos_token"]
        after = text.partition(MARK)[2]
        tokens = [token for token in self.added if after.lstrip().startswith(token)]
        return after[: len(after) - len(after.lstrip())] + max(tokens, key=len) if tokens else ""


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} in a template marks the assistant's part; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)
