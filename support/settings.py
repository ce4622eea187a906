"""
A command line for a dataclass: its fields are the settings, their comments the help.

Values come from the field's default, then from a config file (Python that sets names, or a JSON object), then from --name=value, each
brought into the field's type. Wrong names get the closest right one suggested.
"""

import dataclasses
import difflib
import inspect
import re
import runpy
import traceback
import types
from pathlib import Path

from support.files import read_json

CONFIGS = Path(__file__).parents[1] / "configs"


def suggest(name, known):
    """The end of a message about an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return (
        f"; did you mean {close[0]!r}?"
        if close
        else f"; there are: {', '.join(filter(None, known))}"
    )


def typed(field, value, where):
    """A value from the command line (a string) or a config file, in the field's type. Raises ValueError."""
    kind = field.type
    try:
        if kind is tuple:
            value = value.split(",") if isinstance(value, str) else value
            if (
                isinstance(value, (list, tuple))
                and value
                and all(isinstance(v, str) and v for v in value)
            ):
                return tuple(value)
        elif kind is bool:
            if str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
        elif kind is str:
            if isinstance(value, (str, Path, bool)):  # True is a choice beside "auto"
                return str(value)
        elif not isinstance(value, bool) and kind(value) == float(value):  # 8.5 is no int
            return kind(value)
    except (TypeError, ValueError, OverflowError):
        pass
    words = {
        tuple: "a list of names",
        bool: "True or False",
        str: "text",
        int: "a whole number",
        float: "a number",
    }
    raise ValueError(f"{where}: {field.name}={value!r} is not {words[kind]}")


def read(kind, arguments):
    """
    Read a command line into an instance of the dataclass `kind`; returns it and the path of its config file, or None.

    arguments: a list of --name=value; --config=file is looked up as it stands, then in configs/.
    Raises ValueError or FileNotFoundError with one line that names what is wrong and where.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise ValueError(f"argument {argument!r}: write --name=value")
        if name not in fields and name != "config":
            raise ValueError(f"unknown setting --{name}" + suggest(name, ["config", *fields]))
        given[name] = value
    values, path = {}, None
    if "config" in given:
        path = Path(given.pop("config"))
        path = path if path.exists() else CONFIGS / path
        if not path.is_file():
            known = sorted(
                file.name for file in CONFIGS.iterdir() if file.suffix in (".py", ".json")
            )
            raise FileNotFoundError(
                f"no config file {path.name!r}, here or in {CONFIGS.name}/"
                + suggest(path.name, known)
            )
        for name, value in (read_json(path) if path.suffix == ".json" else run(path)).items():
            if name not in fields:
                raise ValueError(f"{path}: unknown setting {name!r}" + suggest(name, fields))
            values[name] = typed(fields[name], value, path)
    values |= {name: typed(fields[name], value, "command line") for name, value in given.items()}
    return kind(**values), path


def run(path):
    """The names that a config file sets, but modules and names that begin with _. Raises ValueError naming its line."""
    try:
        names = runpy.run_path(str(path))
    except Exception as error:  # whatever the user's file does
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    return {
        name: value
        for name, value in names.items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def help_text(kind):
    """Every field with its default and its comment, read from the dataclass's own source."""
    lines = ["settings:"]
    for line in inspect.getsource(kind).splitlines()[2:]:
        if match := re.fullmatch(r"    (\w+): \w+ = .*?  # (.*)", line):
            name, comment = match.groups()
            default = getattr(kind, name)
            lines += [
                f"  --{name}={','.join(default) if isinstance(default, tuple) else default}",
                f"        {comment}",
            ]
        elif match := re.fullmatch(r"    # (.*)", line):
            lines += ["", match.group(1)]
    return "\n".join(lines)
