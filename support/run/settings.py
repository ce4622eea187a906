"""
A command line for a dataclass: its fields are the settings, their comments the help.

The command line (--name=value or --name value) overrides a config file (Python or JSON), which
overrides a field's default. In the dataclass, `# …` heads a group, `#: …` continues a comment.
"""

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import runpy
import signal
import sys
import traceback
import types
from pathlib import Path

import torch

from support.run import distributed
from support.run.files import read_json

CONFIGS = Path(__file__).parents[2] / "configs"
TEXTS = ("prompt", "prompt_b", "label_prompt")  # settings in which ~ is no home folder
IN_WORDS = {
    tuple: "a list of names, separated by commas",
    dict: 'a JSON object of positive numbers, such as {"down_proj": 16}',
    bool: "True or False",
    str: "text",
    int: "an integer",
    float: "a finite number",
}


def suggest(name, known):
    """The end of a message about an unknown name: the closest known names, or all if few."""
    many = len(known) > 20
    close = difflib.get_close_matches(str(name), known, n=2 if many else 1)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return "; --help lists them all" if many else f"; there are: {', '.join(filter(None, known))}"


def check_names(setting, values, known):
    """Raise ValueError unless a setting's value, or each of its values, is known."""
    for value in [values] if isinstance(values, str) else values:
        if value not in known:
            raise ValueError(f"unknown {setting} {value!r}" + suggest(value, known))


def typed(field, value, where):
    """A value converted to the field's type. Raises ValueError, which begins with `where`."""
    wanted = field.type
    try:
        if wanted is tuple:
            # A comma within brackets belongs to a pattern of names.
            names = re.split(r",(?![^({[]*[]})])", value) if isinstance(value, str) else value
            listed = isinstance(names, (list, tuple)) and names
            if listed and all(isinstance(name, str) and name for name in names):
                return tuple(names)
        elif wanted is dict:
            pairs = json.loads(value) if isinstance(value, str) else value
            numbers = [number for number in pairs.values() if type(number) in (int, float)]
            if len(numbers) == len(pairs) and all(0 < number < math.inf for number in numbers):
                return pairs
        elif wanted is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        elif wanted is str and isinstance(value, (str, Path)) and "\0" not in str(value):
            # The shell does not expand ~ after --name=.
            return str(value) if field.name in TEXTS else os.path.expanduser(value)
        elif wanted in (int, float) and not isinstance(value, bool):
            number = wanted(value)
            if math.isfinite(number) and (isinstance(value, str) or number == value):
                return number  # 8.5 is not an int
    except (AttributeError, TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: {field.name}={value!r} is not {IN_WORDS[wanted]}")


def parse(schema, arguments):
    """{name: text} of a command line: --name=value, --name value, or for a bool --name alone."""
    type_of = {field.name: field.type for field in dataclasses.fields(schema)}
    given, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"argument {argument!r}: write --name=value or --name value")
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        follows = rest and not rest[0].startswith("--")
        if type_of.get(name) is bool and not equals:
            value = rest.pop(0) if follows and rest[0].lower() in ("true", "false") else "True"
        elif not equals and follows:
            value = rest.pop(0)
        elif not equals and name in {*type_of, "config"}:
            raise ValueError(f"--{name} needs a value: write --{name}=value or --{name} value")
        if name in given:
            shown = repr(f"--{name}")
            raise ValueError(f"{shown} is given twice, as {given[name]!r} and as {value!r}")
        given[name] = value
    return given


def read(schema, arguments, other_names=()):
    """
    (an instance of the dataclass `schema`, the path of its config file or None, `parse` of the
    command line). other_names: {another program's setting: what to write}. Raises ValueError or
    FileNotFoundError.
    """
    given, path, contents = parse(schema, arguments), None, {}
    if "config" in given:
        path = find_config(given["config"])
        contents = read_json(path) if path.suffix.lower() == ".json" else run(path)

    fields, values = {field.name: field for field in dataclasses.fields(schema)}, {}
    flags = {name: text for name, text in given.items() if name != "config"}
    sources = (flags, "command line", ["config", *fields]), (contents, path, [*fields])
    for source, where, known in sources:
        for name, value in source.items():
            if name in other_names:
                raise ValueError(f"{where}: {name} is not a setting here: {other_names[name]}")
            if name not in fields:
                raise ValueError(f"{where}: unknown setting {name!r}" + suggest(name, known))
            values.setdefault(name, typed(fields[name], value, where))
    return schema(**values), path, given


def at_least(config, **least):
    """Raise ValueError for a setting below its least value. least: {name: value}."""
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {value}")


def program(arguments, schema, do, text, resumes=False, reader=None):
    """
    Read the command line by `reader`, or `read`, and run do(settings); for --help, print text and
    settings. resumes: whether the same command goes on after Ctrl-C. Returns the exit status: 0,
    128 + a signal's number, or 2 after one line about wrong input, a missing library or memory.
    """
    if {"--help", "-h"} & set(arguments):
        print(text.strip(), help_text(schema), sep="\n\n")
        return 0
    status = 2
    try:
        do(reader(arguments) if reader else read(schema, arguments)[0])
        return 0
    except ModuleNotFoundError as error:
        line = f"error: {error.name} is not installed: pip install -r requirements-dev.txt"
    except (ValueError, OSError, FloatingPointError) as error:
        line = " ".join(f"error: {error}".split())
    except RuntimeError as error:
        line = f"error: {of_torch(error)}"
    except KeyboardInterrupt as error:
        line = str(error) or "interrupted" + "; the same command resumes" * resumes
        status = 128 + getattr(error, "signum", signal.SIGINT)
    if distributed.LOCAL_RANK == 0:  # once on each machine
        print(line, file=sys.stderr)
    return status


def of_torch(error):
    """A message about short memory or a process that has ended; else the error is raised."""
    line = str(error).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"out of memory ({line}): lower batch_size or the rows' length, or see docs/using.md"
    lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    if distributed.WORLD_SIZE > 1 and lost:
        return "another process of this run has ended; --resume=True resumes the run"
    raise error


def find_config(name):
    """The path of a config file, here or in configs/. Raises FileNotFoundError or ValueError."""
    path = Path(os.path.expanduser(name))
    path = path if path.exists() else CONFIGS / name
    if not path.is_file():
        known = sorted(file.name for file in CONFIGS.iterdir() if file.suffix in (".py", ".json"))
        problem = f"no config file {path.name!r}, here or in {CONFIGS.name}/"
        raise FileNotFoundError(problem + suggest(path.name, known))
    if path.suffix.lower() not in (".py", ".json"):
        raise ValueError(f"config file {path}: its name must end in .py or .json")
    return path


def run(path):
    """{name: value} of what a Python config file sets. Raises ValueError, which names the line."""
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    modules = {name for name, value in names.items() if isinstance(value, types.ModuleType)}
    return {n: x for n, x in names.items() if n not in modules and not n.startswith("_")}


def help_text(schema):
    """Each field's default and comment, in groups, from the dataclass's source."""
    lines = ["settings:", "  --config=file"]
    lines += ["        Python or JSON that sets any of these: a path, here or in configs/"]
    for line in inspect.getsource(schema).splitlines()[2:]:
        if match := re.fullmatch(r"    (\w+): \w+ = .*?  # (.*)", line):
            default = getattr(schema, match[1], {})  # a dict has none in the class
            shown = ",".join(default) if isinstance(default, tuple) else default
            lines += [f"  --{match[1]}={shown}", f"        {match[2]}"]
        elif match := re.fullmatch(r"    #: (.*)", line):
            lines.append(f"        {match[1]}")
        elif match := re.fullmatch(r"    # (.*)", line):
            begins = lines[-1].startswith(" ")  # else this is the second line of a headline
            lines += ["", match[1]] if begins else [match[1]]
    return "\n".join(lines)
