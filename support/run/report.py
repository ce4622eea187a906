"""What a run prints: its plan, the final table and what to try next; and its loss curves."""

import contextlib
import shlex
from pathlib import Path

from support.run import distributed, interrupt
from support.run.files import replacing
from support.text.datasets import BUILT_IN
from support.text.splits import compared, left_out

SHARES = "accuracy f1 f1_micro f1_macro precision recall acc acc_norm acc_token".split()  # in %
START = """Start with:
    python train.py --config=small.py    (downloads 95 MB, takes about 3 minutes on two CPU cores)
    python train.py --config=tiny.py     (downloads nothing, takes seconds)"""


def announce(task, method):
    """Print a run's plan. method: its entry of bidora.METHODS; None for ft."""
    config = task.config
    packed = "" if config.quantize == "none" else f"{config.quantize} and "
    place = f"{packed}{task.dtype} on {task.device} ({task.dtype_reason})"
    size = f"{task.sizes['weight_bytes'] / 1e6:.0f} MB of weights"
    print(f"{config.method} on {config.model}, {place}: {size}")
    if distributed.WORLD_SIZE > 1:
        held = f", and {task.sizes['local_weight_bytes'] / 1e6:.0f} MB of weights" * config.fsdp
        print(f"{distributed.WORLD_SIZE} processes, each with its share of every batch{held}")

    counts = ", ".join(f"{count} {name}" for name, count in task.examples.counts.items())
    total = sum(task.examples.labels.values())
    shares = {name: f" ({n / total:.0%})" for name, n in task.examples.labels.items()}
    labels = ", ".join(name + shares.get(name, "") for name in task.labels)
    labels = f"; labels {labels}" * bool(labels)
    source = config.train_file or config.data
    source += f" (licence: {BUILT_IN[source].licence})" if source in BUILT_IN else ""
    if max(task.examples.counts.values()) > config.eval_size:
        counts += f" (evaluated: {config.eval_size} of each at most)"
    print(f"data: {source}: {counts}{labels:.300}")
    for line in task.examples.shared:
        print(line)
    print(f"task: {task.name}, scored by {task.family.metric}")
    notes = [*getattr(task.model, "notes", ()), *left_out(task.examples, task.encoded, task.labels)]
    notes += compared(task.encoded, task.family.unknown_id)
    notes += task.family.notes(task.cut, config.block_size)
    notes += ["device=mps is untested: watch the losses"] * (task.device == "mps")
    print(*notes, trainable(task.sizes["trainable_parameters"]), *plan(task, method), sep="\n")


def trainable(sizes):
    return f"trainable parameters: {sizes['lower']:,} lower level, {sizes['upper']:,} upper level"


def plan(task, method):
    """Lines about the phases: their steps, what learns in them, and how often it sees its data."""
    c, bilevel = task.config, method is not None and method.upper is not None
    search, retrain, both = c.search_steps, c.retrain_steps, "train + val"

    def line(phase, steps, learn):
        most = sum(len(task.encoded[name]) for name in ("train", "val"))
        return f"{phase}: {steps} steps of {min(c.batch_size, most)} examples, {learn}"

    def on(split, steps):
        return f"on {split} ({epochs(task, split, steps):.2f} epochs)"

    if bilevel or c.two_phases:
        lower, upper = method.names
        learn = f"{lower} and {upper} {on(both, search)}"
        if bilevel:
            turns = search // c.upper_every * c.upper_steps
            learn = f"{lower} {on('train', search)}, {upper} {on(c.upper_data, turns)}"
            learn += f" by the {c.hypergradient} hypergradient"
        start = "a fresh start" if c.final_init == "fresh" else "where search ended"
        yield line("search", search, learn)
        if retrain:
            learn = f"{lower} {on(both, retrain)} from {start}, {upper} fixed"
            yield line("retrain", retrain, learn)
    else:
        unused = "; retrain_lr is for a final phase" if c.retrain_lr else ""
        yield line("train", search + retrain, on(both, search + retrain) + unused)
    if epochs(task, both, search + retrain) < 1:
        yield "warning: that is below one epoch: --epochs=1 draws as many examples as there are"


def epochs(task, splits, steps):
    """How often `steps` steps see the rows of `splits`, names joined by " + "."""
    rows = sum(len(task.encoded[name]) for name in splits.split(" + "))
    return steps * min(task.config.batch_size, rows) / rows


def announce_before(before, metric):
    """Print the results before training, {split: results}. metric: the score that is shown."""
    for split, scores in before.items():
        score, loss = in_form(metric, scores[metric]), scores["loss"]
        print(f"before training: {split} {metric} {score}, loss {loss:.3f}", flush=True)


def in_form(name, score):
    """A score as text; a dash if it is undefined or was not computed."""
    if score is None:
        return "–"
    if name in ("bleu", "chrf"):
        return f"{score:.1f}"
    return f"{score:.1%}" if name in SHARES else f"{score:.3f}"


def plot_losses(path, metrics, results):
    """Draw the losses over the steps, the phases, and the test loss before and after."""
    from matplotlib.figure import Figure  # pyplot would open windows and change a notebook's style

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colors = {"train": "#0072B2", "val": "#E69F00", "held": "#009E73"}
    for (split, color), style in zip(colors.items(), ("-", "--", "o:")):
        key, label = f"{split}_loss", "held out" if split == "held" else f"{split} batch"
        if points := [(line["step"], line[key]) for line in metrics if key in line]:
            axes.plot(*zip(*points), style, label=label, color=color, linewidth=1.2, markersize=4)

    if results["after"]["test"] and results["before"]:
        losses = [results[when]["test"]["loss"] for when in ("before", "after")]
        end = results.get("kept_step", len(metrics))
        axes.plot([0, end], losses, "k^", label="test, before and after")

    begins = {line["phase"]: line["step"] for line in reversed(metrics)}
    for phase, first in begins.items():
        axes.axvline(first - 0.5, color="gray", linewidth=0.8, linestyle=":")
        axes.text(first, 1.01, phase, transform=axes.get_xaxis_transform(), color="gray")

    axes.set(xlabel="lower-level step", ylabel="loss", ylim=(0, None))
    title = f"{results['method']} on {Path(results['model']).name}"  # without a long folder
    axes.set_title(title, fontsize=10, pad=18)  # above the phases' names
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def table(results):
    """The final table and the lines below it. results: the content of summary.json."""
    splits = [split for split, scores in results["after"].items() if scores]
    rows = {"": splits}
    for row in ("examples", "trained on", "evaluated"):
        rows[row] = [results[row.replace(" ", "_")][split] for split in splits]
    names = [name for name in results["after"][splits[-1]] if name != "loss"]
    for name in (*names, "loss"):
        for when in ("before", "after") if results["before"] else ("after",):
            scores = [results[when].get(split) or {} for split in splits]
            rows[f"{name} {when}"] = [in_form(name, of_split.get(name)) for of_split in scores]
    lines = ["".join(f"{cell:>16}" for cell in (name, *row)) for name, row in rows.items()]
    if "kept_step" in results:
        lines.append(f"the weights are those of step {results['kept_step']}, by held-out loss")
    if "test" not in splits:
        lines.append("no test set: --test_file names examples that training does not see")

    seconds = ", ".join(f"{phase} {value:.0f}" for phase, value in results["seconds"].items())
    peak, beyond = results["peak_memory_gb"], results["peak_memory_beyond_start_gb"]
    files = ", ".join(sorted(path.name for path in Path(results["out_dir"]).iterdir()))
    lines += ["", trainable(results["trainable_parameters"]), f"seconds: {seconds}"]
    lines += [f"peak memory: {peak:.2f} GB, {beyond:.2f} GB of it beyond Python and torch", ""]
    lines += [f"saved in {results['out_dir']}: {files}", *warnings(results)]
    return "\n".join(["", *lines])


def trained_on(task, phases, steps):
    """{split: the table's words on whether these phases, of so many steps, trained on it}."""
    config, seen = task.config, epochs(task, "train + val", steps)
    yes = "yes" if seen >= 1 else f"{seen:.1%} at most"
    val = yes if "train" in phases else f"in {phases[-1]}"
    if phases == ["search"] and config.upper_data == "train":
        val = "no"
    held = "to choose" if config.keep == "best" or config.patience else "no"
    return {"train": yes, "val": val, "held": held, "test": "no"}


def warnings(results):
    """Lines about a run that learnt nothing, or nothing that helps on held-out data."""
    first, last = results["first_train_loss"], results["after"]["train"]["loss"]
    before = results["before"] or {}
    worse = [s for s in before if results["after"][s]["loss"] >= before[s]["loss"]]
    rates = "--lower_lr" + " or --upper_lr" * (results["trainable_parameters"]["upper"] > 0)
    # The first loss is one batch's: if test has improved, that batch was a lucky one.
    if last >= first and (worse or not before):
        losses = f"train loss {first:.3f} at the first step, {last:.3f} at the end"
        return [f"warning: training ended no better than it began ({losses}): lower {rates}"]
    return [f"warning: the loss on {name} is higher than before: lower {rates}" for name in worse]


def flags(given, *omitted, **more):
    """A command line: the settings in `given`, {name: text}, but for those omitted; and `more`."""
    kept = {name: text for name, text in given.items() if name not in {*omitted, *more}}
    return [f"--{name}={text}" for name, text in (kept | more).items()]


def metadata(task):
    """What run.json holds besides the settings. sample.py reads it."""
    free = task.examples.form in ("prompt", "code", "text")
    return {
        "task": task.name,
        "labels": task.labels,
        "label_prompt": task.family.question if task.name == "label_words" else "",
        "pairs": task.examples.pairs,
        "raw": task.name == "language_model" and free,  # free text, which no chat template frames
        "dtype": task.dtype,
    }


def summary(task):
    """The part of summary.json that describes the task."""
    known = {name: getattr(task.config, name) for name in ("method", "model", "seed", "quantize")}
    known |= metadata(task) | task.sizes
    return known | {
        "metric": task.family.metric,
        "examples": task.examples.counts,
        "evaluated": {name: len(rows) for name, rows in task.evaluated.items()},
    }


def next_commands(results, given, config, other, check):
    """Commands to try next. One has the method `other`, unless `check` refuses it."""
    out, prompts = results["out_dir"], ("...", "..." * bool(results["pairs"]))
    if config.data in BUILT_IN and not config.train_file:
        built_in = BUILT_IN[config.data]
        prompts = built_in.sample_prompt, built_in.sample_prompt_b
    names = zip(("prompt", "prompt_b"), prompts)
    shown = " ".join(f'--{name}="{text}"' for name, text in names if text)
    shown += " --raw" * results["raw"]
    shown += ' --labels="..., ..."' * (results["task"] == "multiple_choice")
    commands = [f"python sample.py {shlex.quote(f'--adapter={out}')} {shown}"]

    # Settings that only some methods or several processes take are reset; dtype=auto is pinned.
    names = ("two_phases", "upper_data", "upper_weight_decay", "compile", "fsdp")
    changed = {name: getattr(type(config), name) for name in names}
    changed |= {"dtype": results["dtype"]} if config.dtype == "auto" else {}
    if other == "bidora" and not results["examples"]["val"]:
        changed["val_fraction"] = type(config).val_fraction
    more = {name: value for name, value in changed.items() if getattr(config, name) != value}
    more |= {"method": other, "out_dir": f"{out}-{other}"}
    again = flags(given, "overwrite", "resume", *changed, **more)
    with contextlib.suppress(ValueError):
        check(again)
        commands.append(f"python train.py {shlex.join(again)}    # the same data and budget")
    return "\n  ".join(["next:", *commands])


def stopped(error, given):
    """The Stopped of a KeyboardInterrupt that ended a run. Its text also says how to go on."""
    how = getattr(error, "how", interrupt.START_AGAIN)
    resumes = how.startswith("resume")
    if distributed.WORLD_SIZE > 1:
        command = "the same torchrun command" + " and --resume=True" * resumes
    else:
        again = flags(given, "overwrite", resume=True) if resumes else flags(given)
        command = f"python train.py {shlex.join(again)}"
    text, number = str(error) or "interrupted", getattr(error, "signum", interrupt.signal.SIGINT)
    return interrupt.Stopped(f"{text}; {how}: {command}" if how else text, number)
