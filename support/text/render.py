"""
Renders chat templates, programs that come with models, within limits of time, memory and output.
support/text/chat.py starts this process. Requests (stdin) and answers (stdout) are lines of JSON:

    {"source", "names", "now", "conversations": [[messages, add_generation_prompt], …]}
    ->  [{"text"} or {"error"}, …]

names: more variables that a template may use, such as "eos_token" and "tools". now: the time in
ISO 8601, or null for the clock's.
"""

import datetime
import functools
import json
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

MOST_SECONDS = 5  # for one request
MOST_MEMORY = 2**30  # bytes, Python's own included
MOST_TEXT = 10**7  # characters
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys, any of which holds thoughts


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, around the assistant's text, changes nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def raise_exception(message):
    raise jinja2.TemplateError(message)


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """tojson without jinja2's escapes for HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=8)
def compiled(source):
    """A template with the functions that transformers gives to templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", GenerationBlock],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def with_aliases(message):
    """A message without keys of value None, its thoughts under both names that templates use."""
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = next((message[key] for key in THOUGHTS if key in message), None)
    if thoughts is None:
        return message
    return {"thinking": thoughts} | message | {"reasoning_content": thoughts}


def render(source, messages, add_generation_prompt, names):
    try:
        text = compiled(source).render(
            {"tools": None, "documents": None} | names,
            messages=list(map(with_aliases, messages)),
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # the template is anybody's program
        return {"error": " ".join(f"{type(error).__name__} {error}".split())[:500]}
    if len(text) > MOST_TEXT:
        return {"error": f"it writes more than {MOST_TEXT} characters"}
    return {"text": text}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    except (ImportError, ValueError, OSError):  # Windows and some versions of macOS have no limits
        pass
    end_after = getattr(signal, "alarm", lambda seconds: None)  # Windows has no alarm
    for line in sys.stdin:
        end_after(MOST_SECONDS)
        request = json.loads(line)
        now = datetime.datetime.fromisoformat(request["now"] or datetime.datetime.now().isoformat())
        source, names = request["source"], request["names"] | {"strftime_now": now.strftime}
        answers = [render(source, *each, names) for each in request["conversations"]]
        end_after(0)
        print(json.dumps(answers), flush=True)
