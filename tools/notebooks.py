"""
Run the lessons from top to bottom and keep their outputs.

    python -m tools.notebooks                all of them, each in a kernel of its own
    python -m tools.notebooks --only=02      those whose name begins so
    QUICK=1 python -m tools.notebooks        briefly, on toys; their outputs are not kept

The texts quote the outputs of a full run, so a short run must not replace them. A lesson that fails
keeps its outputs. Needs requirements-dev.txt.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from support.run import settings
from support.run.files import replacing


@dataclass
class Notebooks:
    only: str = ""  # the beginning of a name; empty: all
    folder: str = "notebooks"  # where they lie, and run


def execute(path, timeout=3600):
    """A notebook with its new outputs. timeout: seconds for each cell."""
    import nbformat
    from nbclient import NotebookClient

    return NotebookClient(
        nbformat.read(path, 4),
        timeout=timeout,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,  # times of day would make every cell differ from its last run
    ).execute(env=os.environ | {"PYTHONWARNINGS": "ignore:IProgress"})  # of bars, with a path


def execute_all(notebooks):
    """Run the lessons, and keep their outputs unless QUICK is set."""
    import nbformat

    paths = sorted(Path(notebooks.folder).glob(f"{notebooks.only}*.ipynb"))
    if not paths:
        raise ValueError(f"{notebooks.folder} has no notebook {notebooks.only}*.ipynb")
    for path in paths:
        notebook = execute(path)
        if os.environ.get("QUICK"):
            print(f"{path}: runs; not kept, since QUICK is set")
            continue
        with replacing(path) as temporary:
            nbformat.write(notebook, temporary)
        print(f"{path}: runs, and has its new outputs")


def main(arguments):
    return settings.program(arguments, Notebooks, execute_all, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
