"""
The losses of several runs in one picture, side by side on train, val and held-out examples.

    python -m tools.curves out/a out/b
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from support.run import settings
from support.run.files import make_folder, replacing

COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
PLOTS = {"train_loss": "train batches", "val_loss": "val batches", "held_loss": "held-out examples"}


@dataclass
class Curves:
    runs: tuple = ()  # the folders of one to seven runs; --runs= may be left out
    out: str = "out/curves.png"  # the picture


def draw(curves):
    """Write the picture. Raises ValueError or OSError."""
    if not 0 < len(curves.runs) <= len(COLORS):
        raise ValueError(f"give the folders of one to {len(COLORS)} runs")
    paths = {run: Path(run, "metrics.jsonl") for run in curves.runs}
    if missing := [run for run, path in paths.items() if not path.exists()]:
        raise ValueError(f"{missing[0]} is no run's folder: it lacks metrics.jsonl")
    logs = {run: [*map(json.loads, path.read_text().splitlines())] for run, path in paths.items()}
    shown = [key for key in PLOTS if any(key in line for log in logs.values() for line in log)]
    figure = Figure(figsize=(1 + 4 * len(shown), 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for (run, log), color in zip(logs.items(), COLORS):
            points = [(line["step"], line[key]) for line in log if key in line]
            axes.plot(*zip(*points or [(0, None)]), color=color, label=run, linewidth=1.2)
        axes.set(xlabel="lower-level step", ylabel="loss", title=PLOTS[key])
    axes.legend()
    make_folder(Path(curves.out).parent)
    with replacing(curves.out) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    print(f"saved {curves.out}")


def main(arguments):
    folders = [*itertools.takewhile(lambda word: not word.startswith("--"), arguments)]
    if folders:
        arguments = [f"--runs={','.join(folders)}", *arguments[len(folders) :]]
    return settings.program(arguments or ["--help"], Curves, draw, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
