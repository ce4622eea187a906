"""
What a training step costs, by each method and each hypergradient, side by side.

    python -m tools.bench                    SmolLM2-135M; about 8 minutes on two CPU cores
    python -m tools.bench --rounds=3 --kinds=forward,lora,dora,unrolled     in under a minute
    python -m tools.bench --peer=True        transformers and PEFT too, on equal weights and batches
    python -m tools.bench --peer=True --data=movie-sentiment     the same on rows of a data set
    python -m tools.bench --scaling=True     time and memory over rank, length and depth

All kinds of step share the frozen weights and take turns, round by round, in one process, so that a
busy moment of the machine hits them all. Medians count. Each kind's peak memory beyond the loaded
model comes from a process of its own. A LoRA step takes at least two forward passes: one forward,
one backward for the activations. An iteration of search is a lower- and an upper-level step.
"""

import copy
import dataclasses
import functools
import itertools
import multiprocessing
import random
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from tqdm import tqdm

import bidora
import data
from bilevel import HYPERGRADIENTS, MicroBatches, create_bilevel_optimizer
from model import ModelConfig, Transformer
from support.run import settings
from support.run.files import read_json
from support.run.hardware import fast_dtype, peak_memory, processor
from support.text.datasets import BUILT_IN
from support.text.tokenizer import Tokenizer
from support.weights.pretrained import find_model
from tools.memory import Memory, models_of


@dataclass
class Bench:
    # what is measured
    model: str = "smollm2-135m"  # a folder, hub name or built-in; random-0.5b: Qwen2.5-0.5B's shape
    kinds: tuple = ()  # only these kinds of step, of those in the table
    rounds: int = 9  # timed rounds, after one for warm-up
    batch_size: int = 8  # rows a step, at either level
    length: int = 64  # tokens a row
    labels: str = "last"  # supervised positions: all, or last (like classification)
    data: str = ""  # rows of this built-in data set, instead of random ones of one length
    rank: int = 8  # of the adapters, in all seven linear layers
    layers: int = 0  # keep only this many blocks; 0: all
    dtype: str = "auto"  # float32, bfloat16, or auto: what is fast here
    peer: bool = False  # transformers and PEFT too (pip install -r requirements-dev.txt)
    compile: bool = False  # torch.compile each block, where no second derivatives are taken
    scaling: bool = False  # instead: LoRA, DoRA and search over rank, length and depth


@dataclass(frozen=True)
class Kind:
    """A kind of step."""

    method: str = "bidora"  # of bidora.METHODS; none: a forward pass alone
    hypergradient: str = ""  # that of an iteration of search; empty: a lower-level step alone
    options: dict = dataclasses.field(default_factory=dict)  # of create_bilevel_optimizer
    peer: bool = False  # transformers and PEFT instead
    one_label: bool = False  # a row, whatever `labels` says
    recomputed: bool = False  # with gradient checkpointing
    micro_batch: int = 0  # rows of a search whose activations are in memory at once; 0: all


KINDS = {
    "forward": Kind("none"),
    "lora": Kind("lora"),
    "dora": Kind("dora"),
    "lora one label": Kind("lora", one_label=True),
    "dora one label": Kind("dora", one_label=True),
    "dora recomputed": Kind("dora", recomputed=True),
    "first_order": Kind(hypergradient="first_order"),
    "unrolled": Kind(hypergradient="unrolled"),
    "unrolled recomputed": Kind(hypergradient="unrolled", recomputed=True),
    "unrolled adam": Kind(hypergradient="unrolled", options={"precondition": "adam"}),
    "unrolled differences": Kind(hypergradient="finite_difference"),
    "neumann 3 terms": Kind(hypergradient="neumann", options={"terms": 3}),
    "cg 3 iterations": Kind(hypergradient="conjugate_gradient", options={"iterations": 3}),
    "unrolled micro-batch 2": Kind(hypergradient="unrolled", micro_batch=2),
    "peft lora": Kind("lora", peer=True),
    "peft dora": Kind("dora", peer=True),
}
SEARCH = {n: HYPERGRADIENTS[k.hypergradient] for n, k in KINDS.items() if k.hypergradient}
SECOND = [name for name, entry in SEARCH.items() if entry.second_order]  # with second derivatives
SINGLE = [name for name, entry in SEARCH.items() if entry.float32]  # in bfloat16 only noise


def shape(bench):
    """The model's ModelConfig."""
    if bench.model == "random-0.5b":
        return models_of(Memory())["Qwen2.5-0.5B"]
    return ModelConfig.from_hf(read_json(find_model(bench.model) / "config.json"))


def load(bench):
    """The base model, frozen."""
    dtype = getattr(torch, bench.dtype)
    if bench.model == "random-0.5b":
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Transformer(shape(bench))
        # A float32 copy would raise the peak that is measured later.
        model = model.to(dtype).to_empty(device="cpu")
        model.lm_head.weight = model.model.embed_tokens.weight
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    else:
        model = Transformer.from_pretrained(find_model(bench.model), dtype)

    if bench.layers:
        kept = slice(bench.layers)
        model.model.layers = model.model.layers[kept]
        sizes = {"num_hidden_layers": bench.layers, "windows": model.config.windows[kept]}
        model.config = dataclasses.replace(model.config, **sizes)
    return model.requires_grad_(False)


def peft_model(base, rank, use_dora):
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
    adapters = LoraConfig(r=rank, lora_alpha=16, use_dora=use_dora, target_modules=targets)
    return get_peft_model(model, adapters)


def model_of(bench, name, base):
    """The model that a kind of step trains, over the weights of `base`."""
    kind = KINDS[name]
    torch.manual_seed(0)
    if kind.method == "none":
        return base
    if kind.peer:
        model = peft_model(base, bench.rank, kind.method == "dora")
    else:
        model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        options = {"target_modules": bidora.ALL_LINEAR, "method": kind.method}
        bidora.replace_linear_with_bidora(model, bench.rank, **options)
        model.gradient_checkpointing = kind.recomputed
    if bench.compile and name not in SECOND:
        for block in (model.get_base_model() if kind.peer else model).model.layers:
            block.compile()
    return model


@functools.cache
def rows_of(name, model):
    """(rows of a built-in data set as train.py encodes them, the padding's id)."""
    tokenizer, examples = Tokenizer.from_pretrained(find_model(model)), data.load_examples(name)
    labels = data.tokenize_labels(sorted({e["label"] for e in examples}), tokenizer)
    question = BUILT_IN[name].question
    return data.encode(examples[:400], tokenizer, 256, question, labels)[0], tokenizer.pad_id


def drawing(bench, kind, vocab_size):
    """(a function that draws the rows of a batch, the same for all kinds; the padding's id)."""
    rng = random.Random(0)
    if bench.data:
        rows, pad_id = rows_of(bench.data, bench.model)
        return lambda: rng.sample(rows, bench.batch_size), pad_id

    def draw():
        labels = ids = torch.randint(vocab_size, (bench.batch_size, bench.length))
        if bench.labels != "all" or kind.one_label:
            labels = torch.full_like(ids, -100)
            labels[:, -1] = ids[:, -1]
        return [data.Encoded(*row) for row in zip(ids.tolist(), labels.tolist())]

    return draw, 0


def step(bench, name, base):
    """A function that takes a kind's step, or iteration of search, on random batches."""
    kind, model = KINDS[name], model_of(bench, name, base)
    draw, pad_id = drawing(bench, kind, base.config.vocab_size)
    if kind.method == "none":
        return torch.no_grad()(lambda: model(*data.collate(draw(), pad_id)))

    if kind.peer:
        trained = [p for p in model.parameters() if p.requires_grad]
        peft_optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)

        def peft_step():
            ids, labels = data.collate(draw(), pad_id)
            peft_optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            peft_optimizer.step()

        return peft_step

    options = kind.options | ({"hypergradient": kind.hypergradient} if name in SEARCH else {})
    optimizer = create_bilevel_optimizer(model, 1e-3, 1e-2, **options)

    def loss_fn(model, micro_batch):
        rows, share = micro_batch
        return model(*data.collate(rows, pad_id)) * share

    def take():
        optimizer.lower_step(loss_fn, MicroBatches(data.micro_batches(draw(), kind.micro_batch)))
        if name in SEARCH:
            optimizer.upper_step(loss_fn, MicroBatches(data.micro_batches(draw())))

    return take


def timed(take):
    start = time.perf_counter()
    take()
    return time.perf_counter() - start


def in_its_process(bench, name):
    """(seconds of each round, peak GB beyond the loaded model), measured in this process."""
    base = load(bench)
    before = peak_memory("cpu")
    take = step(bench, name, base)
    times = [timed(take) for _ in range(bench.rounds + 1)][1:]
    return times, peak_memory("cpu") - before


def alone(bench, name):
    """`in_its_process` in a new process. Raises ValueError if the process is killed."""
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    context.set_forkserver_preload(["torch"])  # which takes seconds to import
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(in_its_process, bench, name).result()
        except BrokenProcessPool:
            raise ValueError(f"{name}: its process was killed, perhaps for its memory") from None


def measure(bench):
    """({kind: seconds of each round}, {kind: peak GB}). Raises ValueError if no kind is left."""
    names = [
        name
        for name in bench.kinds or KINDS
        if (bench.dtype == "float32" or name not in SINGLE)
        and (bench.peer or not KINDS[name].peer)
        and (bench.labels == "all" or not KINDS[name].one_label)
    ]
    if not names:
        raise ValueError(
            f"nothing to measure: of kinds={','.join(bench.kinds)}, {', '.join(SINGLE)} need "
            "dtype=float32, those of PEFT peer=True, those with one label labels=all"
        )

    base = load(bench)
    steps = {name: step(bench, name, base) for name in names}
    seconds = {name: [] for name in names}
    for _ in tqdm(range(bench.rounds + 1), desc="bench", unit="round"):
        for name, take in steps.items():
            seconds[name].append(timed(take))

    del base, steps
    shown = tqdm(names, desc="peak memory", unit="method")
    peaks = {name: alone(dataclasses.replace(bench, rounds=1), name)[1] for name in shown}
    return {name: times[1:] for name, times in seconds.items()}, peaks


def table(bench, seconds, peaks):
    """Lines of text: each kind's median, and its ratio to other kinds."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    dora, forward = median.get("dora"), median.get("forward")
    lines = [
        f"{'':24}{'seconds':>9}{'spread':>14}{'tokens/s':>10}{'2 forwards':>12}"
        f"{'DoRA steps':>12}{'every 4th':>11}{'peak GB':>9}"
    ]
    for name, value in median.items():
        search = name in SEARCH
        spread = f"{min(seconds[name]):.2f}–{max(seconds[name]):.2f}"
        tokens = bench.batch_size * bench.length * (2 if search else 1)
        speed = "" if bench.data else f"{tokens / value:.0f}"
        bound = f"{value / 2 / forward:.2f}" if forward and not search else ""
        steps = f"{value / dora:.2f}" if dora else ""
        amortised = f"{(value / dora + 3) / 4:.2f}" if dora and search else ""
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


def scaling(bench):
    """Print seconds and peak memory over rank, length and depth, one at a time."""
    c = shape(bench)
    depth = c.num_hidden_layers
    widest = min(256, c.num_key_value_heads * c.head_dim)  # no rank above a layer's outputs
    changes = [{"rank": rank} for rank in (4, 16, 64, widest)]
    changes += [{"length": n, "batch_size": 2} for n in (64, 256, 512, 1024, 2048)]
    changes += [{"layers": n} for n in (depth // 4, depth // 2, depth)]

    print(f"{'':28}{'seconds':>9}{'GB':>7}")
    for change, name in itertools.product(changes, ("lora", "dora", "unrolled")):
        if name == "unrolled" and change.get("length", 0) > 512:
            continue  # it would take too long
        times, gb = alone(dataclasses.replace(bench, **change), name)
        what, value = next(iter(change.items()))
        seconds = statistics.median(times)
        print(f"{f'{what} {value}':16}{name:12}{seconds:9.2f}{gb:7.2f}", flush=True)


def check(bench):
    """Raise ValueError or OSError for settings that make no sense."""
    settings.at_least(bench, rounds=1, rank=1, layers=0, batch_size=2, length=2)
    dtypes, labels = ("auto", "float32", "bfloat16"), ("all", "last")
    choices = {"labels": labels, "data": ("", *BUILT_IN), "dtype": dtypes, "kinds": KINDS}
    for name, known in choices.items():
        settings.check_names(name, getattr(bench, name), known)
    shape(bench)  # raises for an unknown model


def run(bench):
    """Measure and print."""
    check(bench)
    if bench.dtype == "auto":
        bench = dataclasses.replace(bench, dtype=str(fast_dtype("cpu")[0]).removeprefix("torch."))

    labels = {"all": "a label on each", "last": "one label a row"}[bench.labels]
    what = (
        f"{bench.model}, {bench.dtype}, {bench.batch_size} rows of "
        f"{bench.data or f'{bench.length} tokens, {labels}'}, rank {bench.rank}"
        f"{', compiled' if bench.compile else ''}"
    )
    print(what, processor(), sep="\n", flush=True)
    if bench.scaling:
        scaling(bench)
    else:
        print("", *table(bench, *measure(bench)), sep="\n")


def main(arguments):
    return settings.program(arguments, Bench, run, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
