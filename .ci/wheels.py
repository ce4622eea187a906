"""
Build this project: setuptools, but for the place of the files that bidora.py imports.

An installed bidora.py lies beside a program that may have a support/ or a data.py of its own. So a
wheel holds ours in a private package, and its imports say so. In an editable wheel each file reads,
changes and runs the one of the checkout, so that edits take effect at the next start.
"""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from setuptools import build_meta

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = ("bidora.py", "hypergrad.py", "bilevel.py")
PRIVATE = [Path("data.py"), *(path.relative_to(ROOT) for path in ROOT.glob("support/**/*.py"))]
OURS = r'(?m)^( *from |.*import_module\(")(?=(?:support|data)(?: import |\.))'
THERE = r"\1_bidora."

RUN = """import re
import sys
from importlib.machinery import SourceFileLoader

__file__ = {path!r}


class Loader(SourceFileLoader):
    def get_code(self, name):
        text = re.sub({ours!r}, {there!r}, self.get_source(name))
        return compile(text, self.path, "exec")


Loader(__name__, __file__).exec_module(sys.modules[__name__])
"""


@contextlib.contextmanager
def staged(editable):
    """A copy of the project, laid out as a wheel lays it out, as the working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        for path in (*map(Path, PUBLIC), *PRIVATE):
            copy = Path(folder, path if path.name in PUBLIC else "_bidora" / path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = re.sub(OURS, THERE, (ROOT / path).read_text(encoding="utf-8"))
            if editable:
                text = RUN.format(path=str(ROOT / path), ours=OURS, there=THERE)
            copy.write_text(text, encoding="utf-8")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def build_wheel(folder, settings=None, metadata=None, editable=False):
    folder = os.path.abspath(folder)
    with staged(editable):
        return build_meta.build_wheel(folder, settings)


def build_editable(folder, settings=None, metadata=None):
    return build_wheel(folder, settings, editable=True)
