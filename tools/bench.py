"""
What a training step costs, by each method and each hypergradient, side by side.

    python -m tools.bench                    SmolLM2-135M; about 8 minutes on two CPU cores
    python -m tools.bench --quick=True       the main methods in under a minute, with more noise
    python -m tools.bench --peer=True        transformers and PEFT too, on equal weights and batches
    python -m tools.bench --peer=True --data=movie-sentiment     the same on rows of a data set
    python -m tools.bench --scaling=True     time and memory over rank, length and depth

All kinds of step share the frozen weights and are timed in turn, round by round, in one process, so
that a busy moment of the machine hits all of them. Medians count. Each kind's peak memory, beyond
the loaded model, comes from a process of its own. A LoRA step is given relative to its lower bound,
two forward passes: one forward, and one backward for the activations. An iteration of search is a
lower-level and an upper-level step.
"""

import copy
import dataclasses
import functools
import json
import os
import random
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
from bilevel import HYPERGRADIENTS, MicroBatches, create_bilevel_optimizer
from model import ModelConfig, Transformer
from support.run import settings
from support.run.files import read_json, replacing, write_json
from support.run.hardware import fast_dtype, peak_memory, processor
from support.text.datasets import BUILT_IN
from support.text.tokenizer import Tokenizer
from support.weights.pretrained import find_model
from tools.memory import QWEN25, published


@dataclass
class Bench:
    # what is measured
    model: str = "smollm2-135m"  # a folder, hub name or built-in; random-0.5b: Qwen2.5-0.5B's shape
    kinds: tuple = ()  # only these kinds of step, of those in the table
    rounds: int = 9  # timed rounds, after one for warm-up
    batch_size: int = 8  # rows a step, at either level
    length: int = 64  # tokens a row
    labels: str = "last"  # supervised positions: all, or last, as in classification
    data: str = ""  # rows of this built-in data set, instead of random ones of one length
    rank: int = 8  # of the adapters, in all seven linear layers
    layers: int = 0  # keep only this many blocks; 0: all
    dtype: str = "auto"  # float32, bfloat16, or auto: what is fast here
    upper_every: int = 4  # lower-level steps for each upper-level step, in that column
    peer: bool = False  # transformers and PEFT too (pip install -r requirements-dev.txt)
    compile: bool = False  # torch.compile each block, where no second derivatives are taken
    quick: bool = False  # three rounds of forward, lora, dora and unrolled
    scaling: bool = False  # instead: LoRA, DoRA and search over rank, length and depth
    out: str = "bench.json"  # where the numbers are written; a chart goes beside
    only: str = ""  # print the seconds and the peak memory of this kind alone


KINDS = {  # name: (method, options of create_bilevel_optimizer)
    "forward": ("none", {}),
    "ft": ("ft", {}),
    "lora": ("lora", {}),
    "dora": ("dora", {}),
    "lora one label": ("lora", {}),  # a row, whatever `labels` says
    "dora one label": ("dora", {}),
    "dora norm detached": ("dora", {}),
    "dora recomputed": ("dora", {}),  # with gradient checkpointing
    "retrain": ("bidora", {}),
    "first_order": ("bidora", {"hypergradient": "first_order"}),
    "unrolled": ("bidora", {"hypergradient": "unrolled"}),
    "unrolled recomputed": ("bidora", {"hypergradient": "unrolled"}),
    "unrolled adam": ("bidora", {"hypergradient": "unrolled", "precondition": "adam"}),
    "unrolled differences": ("bidora", {"hypergradient": "finite_difference"}),
    "neumann 3 terms": ("bidora", {"hypergradient": "neumann", "terms": 3}),
    "cg 3 iterations": ("bidora", {"hypergradient": "conjugate_gradient", "iterations": 3}),
    "unrolled micro-batch 2": ("bidora", {"hypergradient": "unrolled"}),
    "peft lora": ("peft", {"use_dora": False}),
    "peft dora": ("peft", {"use_dora": True}),
}
SEARCH = [name for name, (method, options) in KINDS.items() if "hypergradient" in options]
ENTRIES = {name: HYPERGRADIENTS[KINDS[name][1]["hypergradient"]] for name in SEARCH}
SECOND = [name for name, entry in ENTRIES.items() if entry.second_order]  # take second derivatives
# Only in float32: in bfloat16, ft's small updates round to nothing and differences are noise
SINGLE = ["ft", *(name for name, entry in ENTRIES.items() if entry.float32)]


def shape(bench):
    """The model's ModelConfig."""
    if bench.model == "random-0.5b":
        return published("qwen2", QWEN25["0.5B"])
    return ModelConfig.from_hf(read_json(find_model(bench.model) / "config.json"))


def load(bench, dtype):
    """The frozen base model."""
    if bench.model == "random-0.5b":
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Transformer(shape(bench))
        # never in float32 on the way, which would raise the peak that is measured later
        model = model.to(dtype).to_empty(device="cpu")
        model.lm_head.weight = model.model.embed_tokens.weight
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    else:
        model = Transformer.from_pretrained(find_model(bench.model), dtype)

    if bench.layers:
        kept = slice(bench.layers)
        model.model.layers = model.model.layers[kept]
        model.config = dataclasses.replace(
            model.config, num_hidden_layers=bench.layers, windows=model.config.windows[kept]
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
    targets = list(bidora.ALL_LINEAR)
    options = LoraConfig(r=bench.rank, lora_alpha=16, use_dora=use_dora, target_modules=targets)
    return get_peft_model(model, options)


def model_of(bench, name, base):
    """The model that a kind of step trains; it shares the weights of `base` unless they train."""
    method, options = KINDS[name]
    torch.manual_seed(0)
    if method == "none":
        return base
    if method == "peft":
        model = peft_model(base, bench, **options)
    elif method == "ft":
        model = copy.deepcopy(base).requires_grad_(True)
    else:
        shared = {id(p): p for p in base.parameters()}
        model = bidora.replace_linear_with_bidora(
            copy.deepcopy(base, shared),
            bench.rank,
            target_modules=bidora.ALL_LINEAR,
            method=method,
            norm_grad="detach" if "detached" in name else "exact",
        )
    if name == "retrain":
        bidora.start_retrain(model)
    if "recomputed" in name:
        model.gradient_checkpointing = True
    if bench.compile and name not in SECOND:
        for block in (model.get_base_model() if method == "peft" else model).model.layers:
            block.compile()
    return model


@functools.cache
def rows_of(name, model):
    """The rows of a built-in data set as train.py encodes them, and the padding's id."""
    tokenizer, examples = Tokenizer.from_pretrained(find_model(model)), data.load_examples(name)
    labels = data.tokenize_labels(sorted({e["label"] for e in examples}), tokenizer)
    question = BUILT_IN[name].question
    return data.encode(examples[:400], tokenizer, 256, question, labels)[0], tokenizer.pad_id


def make_rows(bench, name, vocab_size, rng):
    """Rows of random token ids and their labels, or rows of the data set."""
    if bench.data:
        return rng.sample(rows_of(bench.data, bench.model)[0], bench.batch_size)
    ids = torch.randint(vocab_size, (bench.batch_size, bench.length))
    labels = ids
    if bench.labels != "all" or "one label" in name:
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
    return [data.Encoded(*row) for row in zip(ids.tolist(), labels.tolist())]


def step(bench, name, base):
    """A function that takes one step, or one iteration of search, of a kind on a random batch."""
    method, options = KINDS[name]
    model, rng = model_of(bench, name, base), random.Random(0)  # each kind sees the same rows

    pad_id = rows_of(bench.data, bench.model)[1] if bench.data else 0

    def rows():
        return make_rows(bench, name, base.config.vocab_size, rng)

    def batch():
        return data.collate(rows(), pad_id)

    def loss_fn(model, micro_batch):
        rows, share = micro_batch
        return model(*data.collate(rows, pad_id)) * share

    if method == "none":
        return torch.no_grad()(lambda: model(*batch()))

    if method == "peft":
        trained = [p for p in model.parameters() if p.requires_grad]
        peft_optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)

        def peft_step():
            ids, labels = batch()
            peft_optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            peft_optimizer.step()

        return peft_step

    optimizer = create_bilevel_optimizer(model, 1e-3, 1e-2, **options)
    size = 2 if "micro-batch" in name else 0

    def lower():
        optimizer.lower_step(loss_fn, MicroBatches(data.micro_batches(rows())))

    def search():
        optimizer.lower_step(loss_fn, MicroBatches(data.micro_batches(rows(), size)))
        optimizer.upper_step(loss_fn, MicroBatches(data.micro_batches(rows())))

    return search if name in SEARCH else lower


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alone(bench, name, dtype, **changes):
    """
    Measure one kind in a process of its own: {"seconds": of each round, "peak_gb": ...}.

    The peak memory is beyond the loaded model. Raises ValueError with the process's message.
    """
    given = vars(bench) | {"only": name, "dtype": str(dtype).removeprefix("torch.")}
    given |= {"kinds": ",".join(bench.kinds), "quick": False, "scaling": False} | changes
    arguments = [f"--{key}={value}" for key, value in given.items() if value != ""]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    if done.returncode != 0:
        message = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{name}: {message.removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def table(bench, seconds, peaks):
    """Lines of text: each kind's median, and the same relative to other kinds."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    dora, forward = median.get("dora"), median.get("forward")
    every = bench.upper_every
    lines = [
        f"{'':24}{'seconds':>9}{'spread':>14}{'tokens/s':>10}{'2 forwards':>12}"
        f"{'DoRA steps':>12}{f'every {every}th':>11}{'peak GB':>9}"
    ]
    for name, value in median.items():
        search = name in SEARCH
        spread = f"{min(seconds[name]):.2f}–{max(seconds[name]):.2f}"
        tokens = bench.batch_size * bench.length * (2 if search else 1)
        speed = "" if bench.data else f"{tokens / value:.0f}"
        bound = f"{value / 2 / forward:.2f}" if forward and not search else ""
        steps = f"{value / dora:.2f}" if dora else ""
        amortised = f"{(value / dora + every - 1) / every:.2f}" if dora and search else ""
        lines.append(
            f"{name:24}{value:9.2f}{spread:>14}{speed:>10}{bound:>12}"
            f"{steps:>12}{amortised:>11}{peaks[name]:9.2f}"
        )

    for ours in ("lora", "dora"):
        peer = f"peft {ours}"
        if ours in median and peer in median:
            lines.append(
                f"{ours}: {median[peer] / median[ours]:.2f} × as fast as PEFT's, "
                f"with {peaks[ours] / peaks[peer]:.2f} × its memory"
            )
    return lines


def draw(path, title, seconds):
    """A bar for each kind: the median, and a line from the fastest to the slowest round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.3 * len(seconds) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, (name, times) in enumerate(seconds.items()):
        value = statistics.median(times)
        color = "tab:orange" if name in SEARCH else "tab:blue"
        color = "tab:gray" if name.startswith("peft") else color
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
    """Print and return seconds and peak memory over rank, length and depth, one at a time."""
    c = shape(bench)
    depth = c.num_hidden_layers
    widest = min(256, c.num_key_value_heads * c.head_dim)  # no rank above a layer's outputs
    axes = {
        "rank": (4, 16, 64, widest),
        "length": (64, 256, 512, 1024, 2048),
        "layers": (depth // 4, depth // 2, depth),
    }
    kinds, results = ("lora", "dora", "unrolled"), []
    print(f"{'':16}" + "".join(f"{f'{name}, s':>14}{'GB':>7}" for name in kinds))

    for what, values in axes.items():
        for value in values:
            changes = {what: value} | ({"batch_size": 2} if what == "length" else {})
            cells = ""
            for name in kinds:
                if name == "unrolled" and changes.get("length", 0) > 512:
                    cells += f"{'':21}"  # it would take too long
                    continue
                found = alone(bench, name, dtype, **changes)
                results.append({"kind": name, **changes, **found})
                cells += f"{statistics.median(found['seconds']):14.2f}{found['peak_gb']:7.2f}"
            print(f"{f'{what} {value}':16}{cells}", flush=True)
    return results


def measure(bench, dtype):
    """
    Time all kinds in turn, then measure the peak memory of each.

    Returns ({kind: seconds of each round}, {kind: peak GB}). Raises ValueError if no kind is left.
    """
    names = [
        name
        for name in bench.kinds or KINDS
        if (dtype == torch.float32 or name not in SINGLE)
        and (bench.peer or KINDS[name][0] != "peft")
        and (bench.labels == "all" or "one label" not in name)
    ]
    if not names:
        raise ValueError(
            f"nothing to measure: of kinds={','.join(bench.kinds)}, {', '.join(SINGLE)} need "
            "dtype=float32, those of PEFT peer=True, those with one label labels=all"
        )

    base = load(bench, dtype)
    runs = {name: step(bench, name, base) for name in names}
    seconds = {name: [] for name in names}
    for _ in tqdm(range(bench.rounds + 1), desc="bench", unit="round"):
        for name, run in runs.items():
            seconds[name].append(timed(run))

    runs.clear()
    peaks = {}
    for name in tqdm(names, desc="peak memory", unit="method"):
        peaks[name] = alone(bench, name, dtype, rounds=1)["peak_gb"]
    return {name: times[1:] for name, times in seconds.items()}, peaks


def measure_here(bench, dtype):
    """What `alone` runs in its process: one kind's seconds, and its peak GB beyond the model."""
    base = load(bench, dtype)
    before = peak_memory("cpu")
    run = step(bench, bench.only, base)
    times = [timed(run) for _ in range(bench.rounds + 1)][1:]
    return {"seconds": times, "peak_gb": peak_memory("cpu") - before}


def check(bench):
    """Raises ValueError or OSError for settings that make no sense."""
    settings.at_least(bench, rounds=1, rank=1, upper_every=1, layers=0, batch_size=2, length=2)
    for name, known in (
        ("kinds", KINDS),
        ("only", ("", *KINDS)),
        ("labels", ("all", "last")),
        ("data", ("", *BUILT_IN)),
        ("dtype", ("auto", "float32", "bfloat16")),
    ):
        for value in bench.kinds if name == "kinds" else [getattr(bench, name)]:
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}" + settings.suggest(value, known))

    out = Path(bench.out)
    if out.suffix != ".json" or out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ValueError(
            f"out={bench.out} must be a .json file in an existing folder that can be written to"
        )
    shape(bench)  # raises for an unknown model


def run(bench):
    """Measure, print and write."""
    check(bench)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype = dtypes.get(bench.dtype) or fast_dtype("cpu")[0]
    if bench.only:
        print(json.dumps(measure_here(bench, dtype)))
        return
    if bench.quick:
        kinds = ("forward", "lora", "dora", "unrolled")
        bench = dataclasses.replace(bench, rounds=3, kinds=kinds)

    labels = {"all": "a label on each", "last": "one label a row"}[bench.labels]
    what = (
        f"{bench.model}, {str(dtype).removeprefix('torch.')}, {bench.batch_size} rows of "
        f"{bench.data or f'{bench.length} tokens, {labels}'}, rank {bench.rank}"
        f"{', compiled' if bench.compile else ''}"
    )
    about = {"settings": vars(bench) | {"dtype": str(dtype)}, "processor": processor()}
    print(what, about["processor"], sep="\n", flush=True)
    chart, saved = Path(bench.out).with_suffix(".png"), bench.out
    if bench.scaling:
        found = {"scaling": scaling(bench, dtype)}
    else:
        seconds, peaks = measure(bench, dtype)
        found = {"seconds": seconds, "peak_gb": peaks}
        print("", *table(bench, seconds, peaks), sep="\n")
        draw(chart, what, seconds)
        saved = f"{bench.out} and {chart}"
    write_json(bench.out, about | found)
    print(f"\nsaved in {saved}")


def main(arguments):
    return settings.program(arguments, Bench, run, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
