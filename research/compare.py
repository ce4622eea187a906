"""
The methods side by side on SmolLM2, over seeds, sizes and domains, each with tuned learning rates.

    python -m research.compare                  make every run that has no result yet
    python -m research.compare --report=True    print the tables of the results so far, in Markdown
    python -m research.compare --lower_lr=1e-3  the same at one rate for all, a set of its own
    python -m research.compare --quick=True     a toy in two minutes, in folders of its own

Stop it at any time: the same command resumes. In each domain, 300 examples are the test set and
200 the tuning set, the same for all runs; the seed draws a training sample from the rest. With n
examples, every method takes 50·√(n/100) lower-level steps, one with two phases a fifth of them in
search. Each point of a method's grid of learning rates is trained with three seeds, on 100
film-review snippets; the point with the lowest mean loss on the tuning set serves all sizes and
domains.
A run is one call of train.py. Its result and command are one line of results/runs.jsonl; ΔM and ΔD
of its query and value matrices, four snapshots a phase, are in results/trajectories.safetensors.
"""

import dataclasses
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
from tqdm import tqdm

import data
from bidora import METHODS
from config import Config, is_bilevel
from research.arms import ARMS
from research.differences import row, tables
from research.results import COMPARED, load_results, mend, read_results, save
from support.run import settings
from support.run.files import make_folder, read_json, replacing
from support.run.hardware import processor
from support.text.datasets import BUILT_IN
from support.weights.weight_changes import Trajectory

LOWER_RATES, UPPER_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (3e-3, 3e-2)
FT_RATES = (7e-6, 2e-5, 6e-5)  # ft moves every weight, so its rates are smaller
KNOWN = {name: {"method": name} for name in (*METHODS, "ft")}  # the settings of each
KNOWN["dora-two-phases"] = ARMS["dora-two-phases"].settings  # BiDoRA's phases, nothing held out
TUNING = ("movie-sentiment", 100, (1000, 1001, 1002))  # domain, size, seeds
TOY_TUNING = ("toy-sentiment", 40, (1000,))
TARGETS = ("q_proj", "v_proj")  # whose ΔM and ΔD are kept


@dataclass
class Compare:
    domains: tuple = ("movie-sentiment", "product-sentiment")  # built-in data sets
    sizes: tuple = ("100", "400")  # training examples, train and val together
    methods: tuple = COMPARED  # what is compared
    lower_lr: float = 0.0  # of all methods, which are then not tuned; 0: each takes its chosen one
    upper_lr: float = 3e-2  # beside such a lower_lr, of the methods that have an upper level
    seeds: int = 10  # each draws the sample, the split, the initial adapter and the batches
    model: str = "smollm2-135m"  # the base model
    workers: int = 2  # runs at a time, which share the CPU's cores
    results: str = "results"  # folder of the results
    out_dir: str = "out/compare"  # folder of the runs
    report: bool = False  # only print the tables
    quick: bool = False  # two seeds of a toy on a tiny random model


def write_examples(compare, domain, size, seed, tuning):
    """
    Write a run's train and test JSONL files where they are missing; returns their paths.

    With `tuning`, the test file holds the tuning set.
    """
    folder = Path(compare.out_dir) / "data"
    make_folder(folder, "choose another --out_dir")
    train = folder / f"{domain}-{size}-{seed}.jsonl"
    test = folder / f"{domain}-{'tune' if tuning else 'test'}.jsonl"
    if train.exists() and test.exists():
        return train, test

    examples = data.load_examples(domain)
    rest, kept = data.split(examples, 300 / len(examples), seed=0)
    rest, tune = data.split(rest, 200 / len(rest), seed=0)
    _, sample = data.split(rest, size / len(rest), seed, grouped=False)  # from any other review

    for path, chosen in ((train, sample), (test, tune if tuning else kept)):
        lines = "".join(json.dumps(example) + "\n" for example in chosen)
        with replacing(path) as temporary:
            temporary.write_text(lines, encoding="utf-8")
    return train, test


RUNNING, STOPPED = [], threading.Event()  # the processes of the runs; set when they are to end


def launch(command, threads):
    """Run train.py on this many CPU cores; returns its exit status and its standard error."""
    with subprocess.Popen(
        [sys.executable, Path(__file__).parents[1] / "train.py", *command],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        RUNNING.append(process)
        if STOPPED.is_set():  # the signal came while this process started
            process.terminate()
        _, errors = process.communicate()
        RUNNING.remove(process)
    return process.returncode, errors


def stop(signum, frame):
    """At SIGTERM, end the runs too; Ctrl-C reaches them without help."""
    STOPPED.set()
    for process in list(RUNNING):
        process.terminate()
    raise KeyboardInterrupt


def queries_and_values(trajectory):
    """The part of a Trajectory that a result keeps."""
    keep = [
        i
        for target in TARGETS
        for i, name in enumerate(trajectory.layers)
        if name.endswith(f".{target}")
    ]
    return dataclasses.replace(
        trajectory,
        layers=[trajectory.layers[i] for i in keep],
        magnitude=[trajectory.magnitude[i] for i in keep],
        delta_m=[[row[i] for i in keep] for row in trajectory.delta_m],
        delta_d=[[row[i] for i in keep] for row in trajectory.delta_d],
    )


def saved_result(compare, name, rates):
    """An earlier result, or None. Raises ValueError if it had other rates or another model."""
    found = read_results(compare.results).get(name)
    if found:
        wanted = {f"--{key}={value}" for key, value in (rates | {"model": compare.model}).items()}
        missing = wanted - set(shlex.split(found.get("command", "")))
        if missing:
            raise ValueError(
                f"{name} in {compare.results}/runs.jsonl was made without "
                f"{', '.join(sorted(missing))}: remove its line, or choose another --results"
            )
    return found


def run(compare, domain, size, seed, method, rates, tuning=False):
    """
    Train once, unless there is a result already; returns the result.

    Raises ValueError for an earlier result with other rates or another model, or for a run that
    fails. A tuning run that diverges returns {"method", rates, "diverged": message}.
    """
    which = "tune" if tuning else set_of(compare)
    shown = [f"{rate:g}" for rate in rates.values()]
    parts = [method, *shown] if tuning else [domain, str(size), method]
    name = "-".join([*parts, str(seed)] if which == "main" else [which, *parts, str(seed)])
    found = saved_result(compare, name, rates)
    if found:
        return found

    train, test = write_examples(compare, domain, size, seed, tuning)
    search, out = round(10 * (size / 100) ** 0.5), f"{compare.out_dir}/{name}"
    options = {"model": compare.model, **KNOWN[method], "train_file": train, "test_file": test}
    options |= {"seed": seed, "search_steps": search, "retrain_steps": 4 * search, **rates}
    options |= {"label_prompt": BUILT_IN[domain].question, "eval_size": 300, "snapshots": 4}
    options |= {"out_dir": out, "overwrite": True}
    command = [f"--{key}={value}" for key, value in options.items()]
    threads = max(1, (os.cpu_count() or 1) // compare.workers)

    status, errors = launch(command, threads)
    if status != 0:
        message = (errors.strip() or "no message").splitlines()[-1]
        if not (tuning and "not finite" in message):
            raise ValueError(f"{name}: {message}")
        tqdm.write(f"{name}: {message}")  # a rate that is too high: the grid is there to find it
        return {"method": method, **rates, "diverged": message}

    summary = read_json(Path(out) / "summary.json")
    result = {"name": name, "set": which, "domain": domain, "size": size}
    result |= {"method": method, "seed": seed, **rates}
    result |= {"command": shlex.join(["python", "train.py", *command]), "threads": threads}
    for key in ("metric", "before", "after", "seconds", "dtype", "peak_memory_beyond_start_gb"):
        result[key] = summary[key]
    parts = processor().split(", ")
    result["processor"] = ", ".join(part for part in parts if not part.endswith(" threads"))
    save(compare.results, result, queries_and_values(Trajectory.load(out)))
    return read_results(compare.results)[name]


def set_of(compare):
    """The set of a comparison's results: "main", or that of its one rate."""
    return f"rate-{compare.lower_lr:g}" if compare.lower_lr else "main"


def given_rates(compare, method):
    """The rates of a method where all have one, {name: rate}."""
    upper = {"upper_lr": compare.upper_lr} if is_bilevel(Config(**KNOWN[method])) else {}
    return {"lower_lr": compare.lower_lr} | upper


def grid(method):
    """The learning rates to try for a method, as a list of {name: rate}."""
    if not is_bilevel(Config(**KNOWN[method])):
        return [{"lower_lr": rate} for rate in (FT_RATES if method == "ft" else LOWER_RATES)]
    pairs = itertools.product(LOWER_RATES, UPPER_RATES)
    return [{"lower_lr": lower, "upper_lr": upper} for lower, upper in pairs]


def chosen_rates(results):
    """The rates with the lowest mean loss of tuning runs. Raises ValueError if all diverged."""
    losses = {}
    for r in results:
        rates = tuple((name, r[name]) for name in ("lower_lr", "upper_lr") if name in r)
        loss = numpy.inf if "diverged" in r else r["after"]["test"]["loss"]
        losses.setdefault(rates, []).append(loss)
    best = min(losses, key=lambda rates: numpy.mean(losses[rates]))
    if numpy.inf in losses[best]:
        raise ValueError(f"all rates of {results[0]['method']}'s grid diverged: lower them in GRID")
    return dict(best)


def report(results):
    """Lines of Markdown: the tables of research/differences.py, and the median seconds of a run."""
    methods = list(dict.fromkeys(r["method"] for r in results))
    seconds = {}
    for r in results:
        where = r.get("processor", "unrecorded"), r.get("dtype"), r.get("threads")
        times = seconds.setdefault((r["size"], *where), {}).setdefault(r["method"], [])
        times.append(r["seconds"]["total"])

    yield from tables(results, methods, 1)
    yield from ("**median seconds of a run**, to be compared within a row", "")
    yield row("examples", "processor, dtype, threads", *(f"`{method}`" for method in methods))
    yield row(*["---"] * (2 + len(methods)))
    for (size, *where), times in seconds.items():
        cells = [f"{numpy.median(times[m]):.0f}" if m in times else "–" for m in methods]
        yield row(size, ", ".join(map(str, where)), *cells)


def tune(compare, pool):
    """Train every point of the methods' grids; returns {method: rates}."""
    toy = compare.quick or compare.model == "tiny-random"
    domain, size, seeds = TOY_TUNING if toy else TUNING
    for seed in seeds:
        write_examples(compare, domain, size, seed, tuning=True)  # before two runs want it
    points = [(method, rates) for method in compare.methods for rates in grid(method)]
    jobs = list(itertools.product(seeds, points))
    runs = pool.map(lambda job: run(compare, domain, size, job[0], *job[1], tuning=True), jobs)
    tuned = list(tqdm(runs, total=len(jobs), desc="tuning", unit="run"))

    rates = {}
    for method in compare.methods:
        rates[method] = chosen_rates([r for r in tuned if r["method"] == method])
    texts = (
        f"{method} {', '.join(f'{name}={rate:g}' for name, rate in found.items())}"
        for method, found in rates.items()
    )
    print("rates:", "; ".join(texts), flush=True)
    return rates


def make_runs(compare):
    """Tune the learning rates, unless they are given, and make every run that has no result yet."""
    for name in compare.domains:
        data.load_examples(name)  # a missing download shows now, and happens once
    mend(compare.results)

    with ThreadPoolExecutor(compare.workers) as pool:
        if compare.lower_lr:
            rates = {method: given_rates(compare, method) for method in compare.methods}
        else:
            rates = tune(compare, pool)
        jobs = [
            (domain, int(size), seed, method)
            for size in compare.sizes
            for seed in range(compare.seeds)
            for domain in compare.domains
            for method in compare.methods
        ]
        for domain, size, seed, _ in jobs:
            write_examples(compare, domain, size, seed, tuning=False)
        runs = pool.map(lambda job: run(compare, *job, rates[job[3]]), jobs)
        list(tqdm(runs, total=len(jobs), desc="runs", unit="run"))


def check(compare):
    """Raises ValueError for settings that make no sense."""
    for name, known in (("methods", KNOWN), ("domains", BUILT_IN)):
        for value in set(getattr(compare, name)) - set(known):
            raise ValueError(f"unknown {name} {value!r}" + settings.suggest(value, known))
    if not all(size.isdigit() and int(size) >= 20 for size in compare.sizes):
        raise ValueError(f"sizes={','.join(compare.sizes)} must be integers of at least 20")
    settings.at_least(compare, seeds=1, workers=1, lower_lr=0, upper_lr=0)


def run_all(compare):
    """Make the runs that are missing, and print the tables."""
    check(compare)
    if compare.quick:
        compare = dataclasses.replace(
            compare,
            domains=("toy-sentiment",),
            sizes=("40",),
            seeds=2,
            model="tiny-random",
            results=f"{compare.results}-quick",
            out_dir=f"{compare.out_dir}-quick",
        )
    if not compare.report:
        make_runs(compare)
    results = load_results(compare.results, set_of(compare))
    if not results:
        raise FileNotFoundError(
            f"no results in {compare.results}: run python -m research.compare first"
        )
    print(*report(results), sep="\n")


def main(arguments):
    return settings.program(arguments, Compare, run_all, __doc__, resumes=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main(sys.argv[1:]))
