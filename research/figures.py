"""
The pictures of README.md and docs/, drawn from committed files in a few seconds.

    python -m research.figures               all of them, into docs/
    python -m research.figures --only=study  one of them

phases           what trains on which data in BiDoRA's search and retrain
compare, study   BiDoRA minus each other method, on SmolLM2 and on an encoder
ablation, back, hypergradients     the groups paper, published and hypergradients
rank, tiny, sensitivity, alpha     score and gap over what these groups vary
search, truth    hypergradients in the course of a search, and beside a solved lower level
speed            two tables of docs/speed.md, as bars

Colours are Okabe and Ito's. Line styles, markers and hatching tell apart in black and white, too.
"""

import functools
import io
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from research import resolved
from research.arms import AT_ALPHA, AT_RANK, AT_RATES, AT_SPLIT, FACTORS, GROUPS
from research.differences import MEASURES, collect, differences, interval, of_group
from research.results import load_results
from support.run import settings
from support.run.files import make_folder, replacing

ORANGE, SKY, BLUE = "#E69F00", "#56B4E9", "#0072B2"
GREEN, VERMILION, PURPLE = "#009E73", "#D55E00", "#CC79A7"
DTYPES = {"bf16": (BLUE, ""), "fp32": (ORANGE, "////")}  # colour and hatching
# The colour and marker of each method and hypergradient, and each task's marker, in lessons too
LOOKS = dict(lora=(VERMILION, "^"), dora=(BLUE, "o"), bidora=(ORANGE, "s"), bilora=(PURPLE, "v"))
LOOKS |= {"dora-two-phases": (GREEN, "P"), "ft": ("black", "D")}
LOOKS |= dict(first_order=(VERMILION, "o"), unrolled=(ORANGE, "s"), neumann=(BLUE, "^"))
LOOKS |= dict(conjugate_gradient=("black", "D"), identity=(PURPLE, "v"))
MARKERS = {"similarity": "o", "movie-sentiment": "v", "movie-ratings": "^", "peptides": "s"}
MARKERS |= {"bbc-topics": "P", "product-sentiment": "X", "tweet-entities": "*"}
# {arm: (its hypergradient, a line of its own)}
CURVES = {"as-written": ("unrolled", "-"), "unrolled-adam": ("unrolled", "--")}
CURVES |= {"m-fixed": ("unrolled", ":"), "identity": ("identity", "-")}
CURVES |= {"written+identity": ("identity", "--"), "as-published": ("identity", ":")}
# {picture: the group of research/arms.py}, and the sets of SmolLM2's
STUDIED = {"study": "methods", "ablation": "paper", "back": "published"}
STUDIED |= {"hypergradients": "hypergradients"}
COMPARED = {"main": ",\neach at its chosen rate", "rate-0.001": ",\nall at 1e-3"}
# {group: {what it varies: (task, or "all" for their mean, examples, {line: {value: arm}})}}
# examples None: the value is their number
LOWER = {factor: f"bidora, lower rate × {factor}" for factor in FACTORS} | {1: "bidora"}
LOOKS |= {"alpha 2": (SKY, "v"), "alpha 8": (BLUE, "o"), "alpha 32": (VERMILION, "^")}
LOOKS |= dict(zip(LOWER.values(), zip((SKY, BLUE, ORANGE, VERMILION, PURPLE), "vospX")))
SIZES = [*map(int, GROUPS["tiny"].sizes)]
VARIED = {
    "rank": {f"rank, at {size} examples": ("all", size, AT_RANK) for size in (100, 400)},
    "tiny": {
        f"{task}, examples": (task, None, {a: dict.fromkeys(SIZES, a) for a in GROUPS["tiny"].arms})
        for task in GROUPS["tiny"].domains
    },
    "sensitivity": {
        "upper rate ×": ("all", 100, {line: AT_RATES[factor] for factor, line in LOWER.items()}),
        "tenths held out": ("all", 100, {"bidora": AT_SPLIT}),
        "T1": ("all", 100, {"bidora": {1: "bidora", 2: "upper_every-2", 5: "upper_every-5"}}),
        "T2": ("all", 100, {"bidora": {1: "bidora", 2: "upper_steps-2", 5: "upper_steps-5"}}),
    },
    "alpha": {
        f"{name}, rate ×": ("all", 100, {f"alpha {a}": at for a, at in by_alpha.items()})
        for name, by_alpha in AT_ALPHA.items()
    },
}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
DOTTED = {"color": "black", "linewidth": 1, "linestyle": ":"}
TITLE = {"size": 10, "weight": "bold"}
BAR = {"corners": "square,pad=0", "linewidth": 1}
ABOVE = {"loc": "outside upper center", "ncols": 3}  # where a legend is
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind text that crosses a line


@dataclass
class Figures:
    only: str = ""  # one picture, of those named above; empty: all of them
    results: str = "results"  # of research.sweep
    docs: str = "docs"  # where speed.md is read and the pictures are written


def write(axes, x, y, text, size=9, **style):
    """Centred text."""
    axes.text(x, y, text, size=size, ha="center", va="center", **style)


def box(axes, x, y, width, height, *texts, corners="round,pad=0,rounding_size=0.8", **style):
    """A box, its lower left corner at (x, y). texts: (middle, text, look) of each."""
    style = {"facecolor": "white", "edgecolor": "black", "linewidth": 1.2} | style
    axes.add_patch(FancyBboxPatch((x, y), width, height, corners, **style))
    for middle, text, look in texts:
        write(axes, x + width / 2, middle, text, **look)


def arrow(axes, start, end, color="black", width=1.4):
    """A straight arrow."""
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style | {"color": color, "linewidth": width})


def draw_stages(axes):
    """The two stages and their data, which search splits 8:2, and a box for each phase."""
    for x, width, name in ((1, 66, "SEARCH: 1 and 2 alternate"), (69, 30.5, "RETRAIN")):
        box(axes, x, 1, width, 46, (44.6, name, TITLE), facecolor="#F2F2F2", edgecolor="none")
    for x, width, color, text in (
        (3, 50, "white", "train split: 80 % of the examples"),
        (53, 12, "#BDBDBD", "val: 20 %"),
        (70.5, 28, "white", "train + val: 100 %"),
    ):
        box(axes, x, 38.5, width, 4, (40.5, text, {}), facecolor=color, **BAR)

    for x, title, learns, trained in (
        (3, "1  lower level", "A, B learn on train", {"A, B": ORANGE}),
        (37, "2  upper level", "m learns on val", {"m": SKY}),
        (70.5, "3  lower level", "A, B learn afresh on everything", {"A, B": ORANGE}),
    ):
        box(axes, x, 17, 28, 18, (32.6, title, TITLE | {"size": 11}), (29.2, learns, {}))
        for aside, name in ((0.9, "$W_0$"), (10, "A, B"), (19.1, "m")):
            state = "trains" if name in trained else "frozen" if aside == 0.9 else "fixed"
            look, color = {"linestyle": (0, (3, 2)), "edgecolor": "#767676"}, "#555555"
            if name in trained:
                look, color = {"facecolor": trained[name], "linewidth": 2.2}, "black"
            title = (23.7, name, {"size": 11, "weight": "bold", "color": color})
            box(axes, x + aside, 19, 8, 7, title, (21, state, {"size": 8, "color": color}), **look)

    for x in (16, 59, 84.5):
        arrow(axes, (x, 38.3), (x, 35.2))
    for start, end, name, x, y in (
        ((31.2, 26), (36.8, 26), "A, B", 34, 27.7),
        ((36.8, 22), (31.2, 22), "m", 34, 20.2),
        ((65.2, 24), (70.3, 24), "m", 67.8, 25.7),
    ):
        arrow(axes, start, end)
        write(axes, x, y, name)


def draw_formulas(axes):
    """The hypergradient, which passes through the direction on its way to m; the merged weight."""
    path = {"color": BLUE, "linewidth": 2.2, "linestyle": (0, (4, 1.5))}
    axes.plot([17, 17, 60.1, 60.1], [18.6, 12.5, 12.5, 16], **path)
    arrow(axes, (60.1, 16), (60.1, 18.9), BLUE, 2.2)
    write(axes, 38.5, 14.3, "hypergradient: how the val loss F changes with m", color=BLUE)
    arrow(axes, (84.5, 16.8), (84.5, 13.2))
    indirect = r"$\left(\dfrac{dV^*}{dm}\right)^{\!\top}\dfrac{\partial F}{\partial V}$"
    merged = r"$W' = m\,\dfrac{W_0 + s B A}{\Vert W_0 + s B A \Vert}$"
    for x, y, term, meaning in (
        (12, 8, r"$\dfrac{dF}{dm}\;=$", ""),
        (23, 8, r"$\dfrac{\partial F}{\partial m}$", "directly"),
        (31, 8, "$+$", ""),
        (47, 8, indirect, "through the factors, V = (A, B)"),
        (84.5, 8.6, merged, "merged: one ordinary weight"),
    ):
        write(axes, x, y, term, 12)
        write(axes, x, 3, meaning)


def phases():
    figure = Figure(figsize=(8.6, 4.13), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, 48))
    axes.axis("off")
    draw_stages(axes)
    draw_formulas(axes)
    return figure


def study(folder, name, notes):
    """
    A group's differences, in a row of panels for each of its sizes in each set: the mean over all
    domains with its 95 % interval, and each domain's mean. notes: {set: what it is}.
    """
    group, rows = GROUPS[name], []
    for (which, note), size in itertools.product(notes.items(), map(int, group.sizes)):
        of_size = (of_group(load_results(folder, which), group), size)
        pair = [differences(*of_size, measure, group.arms[0], group.sign) for measure in MEASURES]
        if complete := [arm for arm in group.arms if ("all", arm) in pair[0]]:
            rows.append((f"{size} examples{note}", complete, pair))
    if not rows:
        first = f"no arm has six seeds beside {group.arms[0]}"
        raise ValueError(f"{first}: run python -m research.sweep --group={name}")

    heights = [1 + len(complete) for _, complete, _ in rows]
    figure = Figure(figsize=(8.6, max(3.6, 1 + 0.3 * sum(heights))))
    options = {"sharex": "col", "sharey": "row", "squeeze": False, "height_ratios": heights}
    panels = figure.subplots(len(rows), 2, **options)
    for row, (label, complete, pair) in zip(panels, rows):
        for axes, by_arm in zip(row, pair):
            dots(axes, by_arm, complete)
        row[0].invert_yaxis()
        row[0].set_ylabel(label)

    first = group.arms[0]
    what = f"{first} minus the other" if group.sign == 1 else f"the arm minus {first}"
    for axes, measure in zip(panels[-1], MEASURES):
        axes.set_xlabel(f"{measure}, points:\n{what}")
    figure.legend(*unique_labels(panels[0, 0]), **ABOVE)
    return figure


def unique_labels(axes):
    """(handles, labels) of a panel's legend, each label once."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    return unique.values(), unique


def dots(axes, by_arm, arms):
    """Fill a panel with the `differences` of the arms in one measure."""
    for (domain, arm), (_, mean, half, *_) in by_arm.items():
        if arm not in arms:  # not yet in every domain
            continue
        y = arms.index(arm)
        if domain == "all":
            style = {"color": "black", "markersize": 7, "linewidth": 2, "zorder": 3}
            axes.errorbar(mean, y, xerr=half, fmt="D", label="mean, 95 % interval", **style)
        else:
            style = {"color": "none", "markeredgecolor": "#767676", "markersize": 6}
            axes.plot(mean, y, MARKERS.get(domain, "p"), label=domain, **style)
    axes.axvline(0, **DOTTED)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(-0.6, len(arms) - 0.4)


def curve(axes, hypergradient, line, *points, **style):
    """A line of a panel, in a hypergradient's colour and marker."""
    color, marker = LOOKS[hypergradient]
    axes.plot(*points, color=color, marker=marker, linestyle=line, markersize=5, **style)


def over(folder, name):
    """
    Test score and gap over what a group's arms vary: means over its tasks, or of one task, over the
    seeds that all arms share, but for arms without any result.
    """
    group, columns = GROUPS[name], VARIED[name]
    results, values = of_group(load_results(folder), group), {}
    for size, measure in itertools.product(map(int, group.sizes), MEASURES):
        for (domain, arm), by_seed in collect(results, size, measure).items():
            if by_seed:
                values[measure, size, domain, arm] = by_seed
    seeds = set.intersection(*map(set, values.values())) if values else ()
    if not seeds:
        raise ValueError(f"no seed of all arms: run python -m research.sweep --group={name}")

    figure = Figure(figsize=(8.6, 5))
    widths = [1 + len(lines) / 2 for *_, lines in columns.values()]
    options = {"sharex": "col", "squeeze": False, "width_ratios": widths}
    panels = figure.subplots(2, len(columns), **options)
    for row, measure in zip(panels, MEASURES):
        row[0].set_ylabel(f"{measure}, points")
        for axes, (label, (task, size, lines)) in zip(row, columns.items()):
            for line, arms in lines.items():
                keys = {x: (measure, size or x, task, arm) for x, arm in arms.items()}
                shown = [x for x, key in keys.items() if key in values]
                points = [interval([values[keys[x]][seed] for seed in seeds]) for x in shown]
                if points:
                    color, marker = LOOKS[line]
                    style = {"color": color, "marker": marker, "capsize": 2, "label": line}
                    axes.errorbar(shown, *zip(*points), **style)
            axes.set_xscale("log" if max(arms) > 5 * min(arms) else "linear")
            axes.set_xticks([*arms], arms, rotation=90 if len(arms) > 6 else 0)
            axes.minorticks_off()
            if measure != "test score":
                axes.set_xlabel(label)
    title = f"95 % intervals over {len(seeds)} seeds"
    figure.legend(*unique_labels(panels[0, 0]), **ABOVE, title=title)
    return figure


def search(folder):
    """The indirect part over ∂F/∂m, and their cosine, by upper-level step: medians over runs."""
    results = load_results(folder)
    runs = of_group(results, GROUPS["paper"]) + of_group(results, GROUPS["hypergradients"])
    figure = Figure(figsize=(8.6, 3.6))
    ratio, cosine = figure.subplots(1, 2)
    for arm, look in CURVES.items():
        traces = [r["trace"] for r in runs if r["method"] == arm and "trace" in r]
        if not traces:
            raise ValueError(f"no run of {arm} has a trace: python -m research.sweep makes them")
        for axes, key in ((ratio, "indirect"), (cosine, "cosine")):
            medians = numpy.median([trace[key] for trace in traces], axis=0)
            curve(axes, *look, range(1, 1 + len(medians)), medians, label=arm)

    ratio.set(yscale="log", ylabel="‖indirect part‖ / ‖∂F/∂m‖", xlabel="upper-level step")
    cosine.set(ylim=(-1, 1), ylabel="their cosine", xlabel="upper-level step")
    figure.legend(*ratio.get_legend_handles_labels(), **ABOVE)
    return figure


def truth(folder):
    """Each hypergradient's error against the truth, and the scores after a search along it."""
    runs, results = resolved.results_of(folder)
    by_arm = differences(results, 100, "test score", resolved.ARMS[0], -1)
    arms = [arm for arm in resolved.ARMS if ("all", arm) in by_arm]
    if not arms or not runs:
        raise ValueError("too few results: python -m research.resolved makes them")

    figure = Figure(figsize=(8.6, 4.4))
    left, right = figure.subplots(1, 2)
    for arm in (arm for arm in resolved.SEARCHES if arm not in ("unrolled-5", "adam-1")):
        look = resolved.SEARCHES[arm][0], {"unrolled-20": "--", "adam-20": ":"}.get(arm, "-")
        after = resolved.errors_of(runs, arm)
        curve(left, *look, [*map(str, after)], [error for error, _ in after.values()], label=arm)
    left.set(yscale="log", xlabel="lower-level steps before it is measured")
    left.set_ylabel("error / length of the truth")
    left.axhline(1, **DOTTED)
    left.legend(fontsize=8)

    dots(right, by_arm, arms)
    right.invert_yaxis()
    right.set_xlabel(f"test score minus that of {resolved.ARMS[0]}, points")
    right.legend(*unique_labels(right), loc=(0.02, 0.35), fontsize=8)
    return figure


def rows(path, section):
    """The first table below a heading of a Markdown file: {first cell: list of the others}."""
    table = rf"(?ms)^## {re.escape(section)}$.*?^((?:\|[^\n]*\n){{3,}})"
    if not (match := re.search(table, path.read_text(encoding="utf-8"))):
        raise ValueError(f"{path}: there is no table below '## {section}'")
    lines = match[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: values for name, *values in cells[2:]}


def bars(axes, title, label, limit, pairs):
    """Two bars, bf16 and fp32, for each of {name: (text, text)}, the cells of a table."""
    for y, pair in enumerate(pairs.values()):
        for text, aside, (color, hatch) in zip(pair, (-0.2, 0.2), DTYPES.values()):
            value = 0 if text == "refused" else float(text)
            axes.barh(y + aside, value, 0.38, color=color, hatch=hatch, edgecolor="white")
            axes.text(value + 0.01 * limit, y + aside, text, va="center", size=8, bbox=PLAIN)
    axes.axvline(1, **DOTTED)
    axes.set_yticks(range(len(pairs)), pairs)
    axes.set(xlim=(0, limit), xlabel=label)
    axes.set_title(title, size=10)
    axes.invert_yaxis()


def speed(path):
    """What an iteration of search costs, and a step's speed beside PEFT's, of docs/speed.md."""
    figure = Figure(figsize=(8.6, 4))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))

    costs = rows(path, "What a hypergradient costs").items()
    named = {name.replace("`", "").replace(", ", ",\n"): cells for name, cells in costs}
    shown = {name: (cells[0], cells[3]) for name, cells in named.items()}
    bars(left, "an iteration of search", "time, in DoRA steps (dotted: one step)", 9, shown)

    peer, steps = rows(path, "A training step, beside PEFT"), {}
    for labels in ("", " with one label a row (classification)"):
        for method in ("LoRA", "DoRA"):
            cells = peer[f"{method}{labels}, speed relative to PEFT"]
            name = f"{method}{labels.partition(' (')[0]}".replace(" with ", ",\n")
            steps[name] = (cells[0], cells[2])
    title, label = "a training step, beside PEFT", "speed relative to PEFT (dotted: equal)"
    bars(right, title, label, 2.4, steps)

    figure.legend(left.containers[:2], DTYPES, **ABOVE)
    return figure


def save(figure, path):
    """Write a PNG of 64 colours, which has a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    with replacing(path) as temporary:
        Image.open(buffer).convert("RGB").quantize(64).save(temporary, format="png", optimize=True)


def draw(figures):
    """Draw all pictures, or the one of --only."""
    make_folder(figures.docs, "choose another --docs")
    of_encoder = f"{figures.results}/study"
    pictures = {"phases": phases}
    pictures["compare"] = functools.partial(study, figures.results, "smollm2", COMPARED)
    for name, group in STUDIED.items():
        pictures[name] = functools.partial(study, of_encoder, group, {"main": ""})
    for name in VARIED:
        pictures[name] = functools.partial(over, of_encoder, name)
    pictures["search"] = functools.partial(search, of_encoder)
    pictures["truth"] = functools.partial(truth, f"{figures.results}/resolved")
    pictures["speed"] = functools.partial(speed, Path(figures.docs) / "speed.md")
    settings.check_names("picture", figures.only, ["", *pictures])
    for name in [figures.only] if figures.only else pictures:
        path = Path(figures.docs) / f"{name}.png"
        with matplotlib.rc_context(STYLE):
            save(pictures[name](), path)
        print(f"saved {path}")


def main(arguments):
    return settings.program(arguments, Figures, draw, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
