"""What a run prints: its plan, the final table and what to try next; and its loss curves."""

import shlex
import sys
from pathlib import Path

import torch

from support.run import distributed, interrupt
from support.run.files import replacing
from support.text.datasets import BUILT_IN
from support.text.splits import compared, left_out

SHARES = ("accuracy", "f1", "f1_micro", "f1_macro", "precision", "recall")  # shown in percent
SHARES += ("acc", "acc_norm", "acc_token")
START = """Start with:
    python train.py --config=small.py    (downloads 95 MB, takes about 3 minutes on two CPU cores)
    python train.py --config=tiny.py     (downloads nothing, takes seconds)"""


def announce(task, method):
    """Print a run's plan. method: its entry of bidora.METHODS; None for ft."""
    config = task.config
    packed = "" if config.quantize == "none" else f"{config.quantize} and "
    print(
        f"{config.method} on {config.model}, {packed}{task.dtype} on {task.device} "
        f"({task.dtype_reason}): {task.sizes['weight_bytes'] / 1e6:.0f} MB of weights"
    )
    if distributed.WORLD_SIZE > 1:
        own = f", and {task.sizes['local_weight_bytes'] / 1e6:.0f} MB of weights" * config.fsdp
        print(f"{distributed.WORLD_SIZE} processes, each with its share of every batch{own}")

    counts = ", ".join(f"{count} {name}" for name, count in task.examples.counts.items())
    labels = f"; labels {', '.join(task.labels)}" if task.labels else ""
    source = config.train_file or config.data
    if source in BUILT_IN:
        source += f" (licence: {BUILT_IN[source].licence})"
    if max(task.examples.counts.values()) > config.eval_size:
        counts += f" (evaluated: {config.eval_size} of each at most)"
    print(f"data: {source}: {counts}{labels:.300}")
    for line in task.examples.shared:
        print(line)
    print(f"task: {task.name}, scored by {task.family.metric}")
    notes = [*getattr(task.model, "notes", ()), *left_out(task.examples, task.encoded, task.labels)]
    notes += compared(task.encoded, task.family.unknown_id)
    notes += task.family.notes(task.cut, config.block_size)
    print(*notes, trainable(task.sizes["trainable_parameters"]), phases(config, method), sep="\n")


def trainable(sizes):
    return f"trainable parameters: {sizes['lower']:,} lower level, {sizes['upper']:,} upper level"


def phases(config, method):
    """The plan's lines about the phases."""
    bilevel = method is not None and method.upper is not None
    if not bilevel and not config.two_phases:
        unused = "; retrain_lr is for a final phase" if config.retrain_lr else ""
        return f"train: {config.search_steps + config.retrain_steps} steps, on train + val{unused}"

    lower, upper = method.names
    search = f"{lower} and {upper} on train + val"
    if bilevel:
        search = f"{lower} on train, {upper} on {config.upper_data} by the {config.hypergradient}"
        search += " hypergradient"
    start = "a fresh start" if config.final_init == "fresh" else "where search ended"
    retrain = f"{lower} on train + val from {start}, {upper} fixed"
    lines = [f"search: {config.search_steps} steps, {search}"]
    if config.retrain_steps:
        lines.append(f"retrain: {config.retrain_steps} steps, {retrain}")
    return "\n".join(lines)


def announce_before(before, metric):
    """Print the results before training, {split: results}. metric: the score that is shown."""
    [(split, scores)] = before.items()
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
    from matplotlib.figure import Figure  # not pyplot: no window, and a notebook's settings stay

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for split, color, style in (("train", "#0072B2", "-"), ("val", "#E69F00", "--")):
        key, label = f"{split}_loss", f"{split} batch"
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points), style, label=label, color=color, linewidth=1.2)

    if results["after"]["test"] and results["before"]:
        losses = [results[when]["test"]["loss"] for when in ("before", "after")]
        axes.plot([0, len(metrics)], losses, "k^", label="test, before and after")

    begins = {line["phase"]: line["step"] for line in reversed(metrics)}
    for phase, first in begins.items():
        axes.axvline(first - 0.5, color="gray", linewidth=0.8, linestyle=":")
        axes.text(first, 1.01, phase, transform=axes.get_xaxis_transform(), color="gray")

    axes.set(xlabel="lower-level step", ylabel="loss", ylim=(0, None))
    # Folders and hub names can be long. The title stands above the phases' names.
    title = f"{results['method']} on {Path(results['model']).name}"
    axes.set_title(title, fontsize=10, pad=18)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def table(results):
    """The final table and the lines below it. results: the content of summary.json."""
    splits = [split for split, scores in results["after"].items() if scores]
    rows = {"": splits}
    rows["examples"] = [results["evaluated"][split] for split in splits]
    rows["trained on"] = [results["trained_on"][split] for split in splits]
    names = [name for name in results["after"][splits[-1]] if name != "loss"]
    for name in (*names, "loss"):
        for when in ("before", "after") if results["before"] else ("after",):
            scores = [results[when].get(split) or {} for split in splits]
            rows[f"{name} {when}"] = [in_form(name, own.get(name)) for own in scores]
    lines = ["".join(f"{cell:>16}" for cell in (name, *row)) for name, row in rows.items()]
    if "test" not in splits:
        lines.append("no test set: --test_file names examples that training does not see")

    seconds = ", ".join(f"{phase} {value:.0f}" for phase, value in results["seconds"].items())
    peak, beyond = results["peak_memory_gb"], results["peak_memory_beyond_start_gb"]
    files = ", ".join(sorted(path.name for path in Path(results["out_dir"]).iterdir()))
    lines += [
        "",
        trainable(results["trainable_parameters"]),
        f"seconds: {seconds}",
        f"peak memory: {peak:.2f} GB, {beyond:.2f} GB of it beyond Python and torch",
        "",
        f"saved in {results['out_dir']}: {files}",
    ]
    return "\n".join(["", *lines, *warnings(results)])


def trained_on(config, phases):
    """{split: whether these phases trained on it, in words for the table}."""
    val = "yes" if "train" in phases else f"in {phases[-1]}"
    if phases == ["search"] and config.upper_data == "train":
        val = "no"
    return {"train": "yes", "val": val, "test": "no"}


def warnings(results):
    """Lines about a run that learnt nothing, or nothing that holds on held-out data."""
    first, last = results["first_train_loss"], results["after"]["train"]["loss"]
    before = results["before"] or {}
    worse = [s for s in before if results["after"][s]["loss"] >= before[s]["loss"]]
    rates = "--lower_lr" + " or --upper_lr" * (results["trainable_parameters"]["upper"] > 0)
    # The first loss is one batch's: if test has improved, that batch was a lucky one.
    if last >= first and (worse or not before):
        return [
            f"warning: training ended no better than it began (train loss {first:.3f} at the first "
            f"step, {last:.3f} at the end): lower {rates}"
        ]
    return [f"warning: the loss on {name} is higher than before: lower {rates}" for name in worse]


def without(arguments, *names):
    """A command line without the settings in `names`."""
    return [a for a in arguments if a.partition("=")[0].removeprefix("--") not in names]


def summary(task):
    """The part of summary.json that describes the task."""
    names = ("method", "model", "seed", "quantize")
    return {name: getattr(task.config, name) for name in names} | {
        **task.sizes,
        "task": task.name,
        "metric": task.family.metric,
        "pairs": task.examples.pairs,
        "raw": task.raw,
        "dtype": task.dtype,
        "examples": task.examples.counts,
        "evaluated": {name: len(rows) for name, rows in task.evaluated.items()},
    }


def next_commands(results, arguments, config, other):
    """Commands to try next. results: the run's summary. other: a method to compare with."""
    out, prompts = results["out_dir"], ("...", "..." * bool(results["pairs"]))
    if config.data in BUILT_IN and not config.train_file:
        built_in = BUILT_IN[config.data]
        prompts = built_in.sample_prompt, built_in.sample_prompt_b
    names = zip(("prompt", "prompt_b"), prompts)
    shown = " ".join(f'--{name}="{text}"' for name, text in names if text)
    shown += " --raw" * results["raw"]
    shown += ' --labels="..., ..."' * (results["task"] == "multiple_choice")
    adapter, again_in = shlex.quote(f"--adapter={out}"), shlex.quote(f"--out_dir={out}-{other}")
    controls = ("two_phases", "upper_data")  # of one method alone
    kept = without(arguments, "method", "out_dir", "overwrite", "resume", "fsdp", *controls)
    again = shlex.join(kept + ["--fsdp=False"] * config.fsdp)
    return (
        f"next:\n  python sample.py {adapter} {shown}\n"
        f"  python train.py {again} --method={other} {again_in}"
        f"    # the same data and budget"
    )


def failed(error):
    """Print an error once on each machine. Returns the exit status 2."""
    if distributed.LOCAL_RANK == 0:
        print("error:", *str(error).split(), file=sys.stderr)  # in one line
    return 2


def failed_in_torch(error):
    """`failed` if memory is short or another process has ended; else raise the error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        hint = "lower batch_size, micro_batch_size or block_size, or try --auto_hardware=True"
        return failed(f"out of memory ({text.splitlines()[0]}): {hint}")
    lost = isinstance(error, torch.distributed.DistError) or "gloo" in text
    if distributed.WORLD_SIZE > 1 and lost:
        return failed("another process of this run has ended; --resume=True resumes the run")
    raise error


def stopped(error, arguments):
    """Print how to resume a run that a signal ended. Returns the exit status."""
    if not isinstance(error, interrupt.Stopped):
        error = interrupt.Stopped("interrupted", how=interrupt.START_AGAIN)
    resumes = error.how.startswith("resume")
    if resumes:
        arguments = [*without(arguments, "resume", "overwrite"), "--resume=True"]
    command = f"python train.py {shlex.join(arguments)}"
    if distributed.WORLD_SIZE > 1:
        command = "the same torchrun command" + " and --resume=True" * resumes
    if distributed.LOCAL_RANK == 0:
        print(f"{error}; {error.how}: {command}" if error.how else error, file=sys.stderr)
    return 128 + error.signum
