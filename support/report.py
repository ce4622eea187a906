"""What a run leaves for its reader: the curves of its losses, and the table at its end."""

from pathlib import Path

from support.files import replacing


def plot_losses(path, metrics, results):
    """Draw train and val loss over the steps, the phases marked, with the test loss before and after."""
    from matplotlib.figure import (
        Figure,  # without pyplot: no window, and a notebook's own settings stay
    )

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, color in (
        ("train_loss", "train batch", "tab:blue"),
        ("val_loss", "val batch", "tab:orange"),
    ):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points), label=label, color=color, linewidth=1.2)
    if results["after"]["test"]:
        losses = [results[when]["test"]["loss"] for when in ("before", "after")]
        axes.plot([0, len(metrics)], losses, "k^", label="test, before and after")
    for phase in dict.fromkeys(line["phase"] for line in metrics):
        first = next(line["step"] for line in metrics if line["phase"] == phase)
        axes.axvline(first - 0.5, color="gray", linewidth=0.8, linestyle=":")
        axes.text(first, 1.01, phase, transform=axes.get_xaxis_transform(), color="gray")
    axes.set(xlabel="lower-level step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def table(results):
    """The final table, and what to try next."""
    parts = [name for name in ("train", "val", "test") if results["after"][name]]
    lines = ["", "".join(f"{head:>16}" for head in ("", *parts))]
    lines.append(
        "".join(
            f"{cell:>16}" for cell in ("examples", *(results["evaluated"][part] for part in parts))
        )
    )
    for what, form in (("accuracy", "{:.1%}"), ("loss", "{:.3f}")):
        for when in ("before", "after"):
            values = [form.format(results[when][part][what]) for part in parts]
            lines.append("".join(f"{cell:>16}" for cell in (f"{what} {when}", *values)))
    sizes, seconds, out = results["trainable_parameters"], results["seconds"], results["out_dir"]
    lines += [
        "",
        f"trainable parameters: {sizes['lower']:,} lower level, {sizes['upper']:,} upper level",
        f"seconds: {', '.join(f'{phase} {value:.0f}' for phase, value in seconds.items())}",
        f"peak memory: {results['peak_memory_gb']:.2f} GB, "
        f"{results['peak_memory_beyond_start_gb']:.2f} GB of it beyond Python and torch",
        "",
        f"saved in {out}: {', '.join(sorted(p.name for p in Path(out).iterdir()))}",
    ]
    return "\n".join(lines)
