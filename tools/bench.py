"""
What a training step costs, by each method and each hypergradient, side by side.

    python -m tools.bench                    SmolLM2-135M, 8 rows of 64 tokens, 9 rounds: some 8 minutes on two CPU cores
    python -m tools.bench --quick=True       the main methods in under a minute, and noisier
    python -m tools.bench --peer=True        transformers with PEFT too, on the same weights and batch
    python -m tools.bench --scaling=True     time and memory of a step over rank, length and depth

All kinds are timed in turn, round by round in one process, so that a busy moment hits all of them; medians count. They share the frozen weights. Peak memory beyond
the loaded model comes from one process each. A LoRA step can't be cheaper than two forward passes: one forward, and one backward for the
activations. An iteration of search is a lower and an upper step.
"""

import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import bidora
import data
from hypergrad import create_bilevel_optimizer
from model import ModelConfig, Transformer
from support import settings
from support.files import read_json, replacing, write_json
from support.hardware import fast_dtype, peak_memory
from support.pretrained import find_model
from tools.memory import QWEN25, published


@dataclass
class Bench:
    # what is measured
    model: str = "smollm2-135m"  # a folder, hub name or built-in, or random-0.5b: random weights in the shape of Qwen2.5-0.5B
    kinds: tuple = ()  # only these, of those in the table
    rounds: int = 9  # timed rounds, after one to warm up
    batch_size: int = 8  # rows a step, at either level
    length: int = 64  # tokens a row
    labels: str = (
        "last"  # all tokens have labels, or only the last of each row, as in classification
    )
    rank: int = 8  # of the adapters, in all seven linear layers
    layers: int = 0  # keep only the first ones; 0: all
    dtype: str = "auto"  # float32, bfloat16, or auto: what is fast here
    upper_every: int = 4  # of the amortised column
    peer: bool = False  # transformers and PEFT too (pip install -r requirements-dev.txt)
    compile: bool = False  # torch.compile each block of the kinds without second derivatives
    quick: bool = False  # three rounds of forward, lora, dora and unrolled
    scaling: bool = (
        False  # instead of all that: a LoRA, a DoRA and a search step over rank, length and depth
    )
    out: str = "bench.json"  # where the numbers are written; a chart goes beside
    only: str = ""  # time this one kind in a process of its own, print its seconds and peak memory, and nothing else


KINDS = {  # name: (method, options of create_bilevel_optimizer)
    "forward": ("none", {}),
    "ft": ("ft", {}),
    "lora": ("lora", {}),
    "dora": ("dora", {}),
    "lora one label": ("lora", {}),  # a row, whatever `labels` says
    "dora one label": ("dora", {}),
    "dora norm detached": ("dora", {}),
    "retrain": ("bidora", {}),
    "first_order": ("bidora", {"hypergradient": "first_order"}),
    "unrolled": ("bidora", {"hypergradient": "unrolled"}),
    "unrolled adam": ("bidora", {"hypergradient": "unrolled", "precondition": "adam"}),
    "unrolled differences": ("bidora", {"hypergradient": "unrolled", "mode": "finite_difference"}),
    "neumann 3 terms": ("bidora", {"hypergradient": "neumann", "terms": 3}),
    "cg 3 iterations": ("bidora", {"hypergradient": "conjugate_gradient", "iterations": 3}),
    "unrolled hvp_batch 2": ("bidora", {"hypergradient": "unrolled"}),
    "peft lora": ("peft", {"use_dora": False}),
    "peft dora": ("peft", {"use_dora": True}),
}
SEARCH = [name for name, (method, options) in KINDS.items() if "hypergradient" in options]
SECOND = [
    name for name in SEARCH if name not in ("first_order", "unrolled differences")
]  # take second derivatives
SINGLE = (
    "ft",
    "unrolled differences",
)  # only in float32: in bfloat16 small updates round to nothing, and differences are noise


def shape(bench):
    """The model's ModelConfig."""
    if bench.model == "random-0.5b":
        return published("qwen2", QWEN25["0.5B"])
    return ModelConfig.from_hf(read_json(find_model(bench.model) / "config.json"))


def load(bench, dtype):
    """The frozen base."""
    if bench.model == "random-0.5b":
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Transformer(shape(bench))
        model = model.to(dtype).to_empty(
            device="cpu"
        )  # never in float32: what is measured is the peak beyond the loaded model
        model.lm_head.weight = model.model.embed_tokens.weight
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    else:
        model = Transformer.from_pretrained(find_model(bench.model), dtype)
    if bench.layers:
        model.model.layers = model.model.layers[: bench.layers]
        model.config = dataclasses.replace(
            model.config,
            num_hidden_layers=bench.layers,
            windows=model.config.windows[: bench.layers],
        )
    return model.requires_grad_(False)


def peft_model(base, bench, use_dora):
    """transformers' model with PEFT's adapters, over the weights of `base`."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**base.config.hf | {"num_hidden_layers": len(base.model.layers)})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(base.state_dict(), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is in no state_dict
    return get_peft_model(
        model,
        LoraConfig(
            r=bench.rank, lora_alpha=16, use_dora=use_dora, target_modules=list(bidora.ALL_LINEAR)
        ),
    )


def step(bench, name, base):
    """A function that does one step, or one iteration of search, of a kind on a random batch."""
    method, options = KINDS[name]
    torch.manual_seed(0)
    model = (
        base
        if method == "none"
        else copy.deepcopy(base, {} if method == "ft" else {id(p): p for p in base.parameters()})
    )
    if method == "ft":
        model.requires_grad_(True)
    elif method == "peft":
        model = peft_model(base, bench, **options)
        peft_optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], 1e-3, fused=True
        )
    elif method != "none":
        bidora.replace_linear_with_bidora(
            model,
            bench.rank,
            bidora.ALL_LINEAR,
            method=method,
            norm_grad="detach" if "detached" in name else "exact",
        )
    if name == "retrain":
        bidora.freeze_magnitude(model)
    if bench.compile and name not in SECOND:
        for block in (model.get_base_model() if method == "peft" else model).model.layers:
            block.compile()
    optimizer = (
        create_bilevel_optimizer(model, 1e-3, 1e-2, **options)
        if method not in ("none", "peft")
        else None
    )
    count = bench.batch_size // 2 if "hvp_batch" in name else 1

    def batch():
        ids = torch.randint(base.config.vocab_size, (bench.batch_size, bench.length))
        labels = torch.full_like(ids, -100)
        asked = slice(0 if bench.labels == "all" and "one label" not in name else -1, None)
        labels[:, asked] = ids[:, asked]
        return ids, labels

    def loss_fn(model, part):
        input_ids, labels, share = part
        return model(input_ids, labels) * share

    def run():
        if method == "none":
            with torch.no_grad():
                return model(*batch())
        if method == "peft":
            ids, labels = batch()
            peft_optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            return peft_optimizer.step()
        optimizer.lower_step(loss_fn, *data.parts(batch(), count), keep=name in SEARCH)
        if name in SEARCH:
            optimizer.upper_step(loss_fn, None, data.parts(batch(), 1))

    return run


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alone(bench, name, dtype, **changes):
    """A kind's seconds, after one round to warm up, and its peak memory in GB beyond the loaded model, in a process of its own."""
    given = (
        vars(bench)
        | {
            "only": name,
            "dtype": str(dtype).removeprefix("torch."),
            "kinds": ",".join(bench.kinds),
            "quick": False,
            "scaling": False,
        }
        | changes
    )
    command = [
        sys.executable,
        "-m",
        "tools.bench",
        *(f"--{key}={value}" for key, value in given.items() if value != ""),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    if done.returncode != 0:
        raise ValueError(
            f"{name}: {(done.stderr.strip() or 'no message').splitlines()[-1].removeprefix('error: ')}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def table(bench, seconds, peaks):
    """Lines of text: each kind's median and what it is in units of others."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = bench.batch_size * bench.length
    dora, forward = median.get("dora"), median.get("forward")
    lines = [
        f"{'':24}{'seconds':>9}{'spread':>14}{'tokens/s':>10}{'2 forwards':>12}{'DoRA steps':>12}{f'every {bench.upper_every}th':>11}{'peak GB':>9}"
    ]
    for name, value in median.items():
        spread = f"{min(seconds[name]):.2f}–{max(seconds[name]):.2f}"
        count = tokens * (2 if name in SEARCH else 1)
        cells = [
            f"{value / 2 / forward:.2f}" if forward and name not in SEARCH else "",
            f"{value / dora:.2f}" if dora else "",
            f"{(value / dora + bench.upper_every - 1) / bench.upper_every:.2f}"
            if dora and name in SEARCH
            else "",
        ]
        lines.append(
            f"{name:24}{value:9.2f}{spread:>14}{count / value:10.0f}{cells[0]:>12}{cells[1]:>12}{cells[2]:>11}{peaks[name]:9.2f}"
        )
    for ours in ("lora", "dora"):
        if ours in median and f"peft {ours}" in median:
            lines.append(
                f"{ours}: {median[f'peft {ours}'] / median[ours]:.2f} × as fast as PEFT's, with {peaks[ours] / peaks[f'peft {ours}']:.2f} of its memory"
            )
    return lines


def draw(path, title, seconds):
    """A bar a kind: the median, and the fastest and slowest round as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.3 * len(seconds) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, (name, times) in enumerate(seconds.items()):
        value = statistics.median(times)
        color = (
            "tab:gray"
            if name.startswith("peft")
            else "tab:orange"
            if name in SEARCH
            else "tab:blue"
        )
        axes.barh(y, value, color=color, height=0.7)
        axes.plot([min(times), max(times)], [y, y], color="black", linewidth=1)
        axes.text(max(times), y, f" {value:.2f}", va="center")
    axes.set_yticks(range(len(seconds)), seconds)
    axes.invert_yaxis()
    axes.set(
        xlabel="seconds a step (median, fastest and slowest); orange: an iteration of search",
        title=title,
        xlim=(0, 1.15 * max(map(max, seconds.values()))),
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def scaling(bench, dtype):
    """Print and return seconds and peak memory over rank, length and depth, everything else as bench says."""
    c = shape(bench)
    depth, widest = (
        c.num_hidden_layers,
        min(256, c.num_key_value_heads * c.head_dim),
    )  # no rank above a layer's outputs
    results = []
    print(
        f"{'':16}"
        + "".join(f"{f'{name}, s':>14}{'GB':>7}" for name in ("lora", "dora", "unrolled"))
    )
    for what, values in (
        ("rank", (4, 16, 64, widest)),
        ("length", (64, 256, 512, 1024, 2048)),
        ("layers", (depth // 4, depth // 2, depth)),
    ):
        for value in values:
            changes = {what: value} | ({"batch_size": 2} if what == "length" else {})
            cells = ""
            for name in ("lora", "dora", "unrolled"):
                if name == "unrolled" and changes.get("length", 0) > 512:
                    cells += f"{'':21}"  # attention's scores would fill the memory
                    continue
                found = alone(bench, name, dtype, **changes)
                results.append({"kind": name, **changes, **found})
                cells += f"{statistics.median(found['seconds']):14.2f}{found['peak_gb']:7.2f}"
            print(f"{f'{what} {value}':16}{cells}", flush=True)
    return results


def measure(bench, dtype):
    """Time all kinds in turn, then the memory of each; returns ({kind: seconds of each round}, {kind: peak GB})."""
    names = [
        name
        for name in bench.kinds or KINDS
        if (dtype == torch.float32 or name not in SINGLE)
        and (bench.peer or KINDS[name][0] != "peft")
        and (bench.labels == "all" or "one label" not in name)
    ]
    if not names:
        raise ValueError(
            f"of kinds={','.join(bench.kinds)} none can be measured so: {', '.join(SINGLE)} need dtype=float32, PEFT's peer=True, "
            f"those with one label labels=all"
        )
    base = load(bench, dtype)
    runs = {name: step(bench, name, base) for name in names}
    seconds = {name: [] for name in names}
    for _ in tqdm(range(bench.rounds + 1), desc="rounds"):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    runs.clear()
    peaks = {
        name: alone(bench, name, dtype, rounds=1)["peak_gb"]
        for name in tqdm(names, desc="peak memory")
    }
    return {name: times[1:] for name, times in seconds.items()}, peaks


def measure_here(bench, dtype):
    """What `alone` asks a process of its own: one kind's seconds, and its peak memory in GB beyond the loaded model."""
    base = load(bench, dtype)
    before = peak_memory("cpu")
    run = step(bench, bench.only, base)
    times = [timed(run) for _ in range(bench.rounds + 1)][1:]
    return {"seconds": times, "peak_gb": peak_memory("cpu") - before}


def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip(), settings.help_text(Bench), sep="\n\n")
        return 0
    try:
        bench, _ = settings.read(Bench, arguments)
        if (
            min(
                bench.rounds,
                bench.batch_size // 2,
                bench.length // 2,
                bench.rank,
                bench.upper_every,
                bench.layers + 1,
            )
            < 1
        ):
            raise ValueError(
                "rounds, rank and upper_every must be positive, batch_size and length at least 2"
            )
        for name, known in (
            ("kinds", KINDS),
            ("only", ("", *KINDS)),
            ("labels", ("all", "last")),
            ("dtype", ("auto", "float32", "bfloat16")),
        ):
            for value in [getattr(bench, name)] if name != "kinds" else bench.kinds:
                if value not in known:
                    raise ValueError(f"unknown {name} {value!r}" + settings.suggest(value, known))
        if (
            Path(bench.out).suffix != ".json"
            or Path(bench.out).is_dir()
            or not os.access(Path(bench.out).absolute().parent, os.W_OK)
        ):
            raise ValueError(
                f"out={bench.out} must be a .json file in a folder that is there and can be written"
            )
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
            bench.dtype
        ) or fast_dtype("cpu")[0]
        if bench.only:
            print(json.dumps(measure_here(bench, dtype)))
            return 0
        if bench.quick:
            bench = dataclasses.replace(
                bench, rounds=3, kinds=("forward", "lora", "dora", "unrolled")
            )
        what = (
            f"{bench.model}, {str(dtype).removeprefix('torch.')}, {bench.batch_size} rows of {bench.length} tokens, {bench.labels} labels, "
            f"rank {bench.rank}{', compiled' if bench.compile else ''}"
        )
        print(what, flush=True)
        chart = Path(bench.out).with_suffix(".png")
        if bench.scaling:
            found = {"scaling": scaling(bench, dtype)}
        else:
            seconds, peaks = measure(bench, dtype)
            found = {"seconds": seconds, "peak_gb": peaks}
            print("", *table(bench, seconds, peaks), sep="\n")
            draw(chart, what, seconds)
        write_json(bench.out, {"settings": vars(bench) | {"dtype": str(dtype)}, **found})
    except ImportError as error:
        print(
            f"error: {error.name} is not installed: pip install -r requirements-dev.txt",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nsaved in {bench.out}" + ("" if bench.scaling else f" and {chart}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
