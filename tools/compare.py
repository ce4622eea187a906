"""
The methods side by side, over seeds, training sizes and domains, each with the learning rates that did best on examples kept for that.

    python -m tools.compare                  every run that has no result yet: stop it and start it again as you like
    python -m tools.compare --report=True    the table of the results that are there
    python -m tools.compare --quick=True     a toy in two minutes, in a folder of its own

Of each domain, 300 examples are the test and 200 the tuning set, always the same; training samples are drawn from the rest, by the seed. A sample of n
examples gets 50·√(n/100) lower-level steps by every method, a fifth of them in search. Each point of a method's grid of rates is
trained once, on 100 film-review snippets by a seed of its own; the one with the lowest loss on the tuning set serves all sizes and domains.
A run is one call of train.py, and leaves one line in results/runs.jsonl: its command and its table. ΔM and ΔD of the query and value matrices at
four snapshots a phase are in results/trajectories.safetensors.
"""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from scipy.stats import wilcoxon
from tqdm import tqdm

import data
from bidora import METHODS
from support import settings
from support.files import read_json, replacing
from support.weight_changes import Trajectory
from tools.results import load_results, mend, read_results, save

LOWER_RATES, UPPER_RATES = (3e-4, 1e-3, 3e-3), (3e-3, 3e-2)
FT_RATES = (7e-6, 2e-5, 6e-5)  # ft moves every weight, so its rates are smaller
KNOWN = (*METHODS, "ft")
TUNING = ("movie-sentiment", 100, 1000)  # domain, size, seed
TARGETS = ("q_proj", "v_proj")


@dataclass
class Compare:
    domains: tuple = ("movie-sentiment", "product-sentiment")  # built-in data sets
    sizes: tuple = ("100", "400")  # training examples, train and val together
    methods: tuple = ("bidora", "dora", "lora", "bilora", "ft")  # what is compared
    seeds: int = (
        5  # 0, 1, …: of the training sample, the split, the start and the order of the batches
    )
    model: str = "smollm2-135m"  # what is tuned
    workers: int = 2  # runs at a time, which share the CPU's cores
    results: str = "results"  # folder of the results
    out_dir: str = "out/compare"  # folder of the runs
    report: bool = False  # only print the table
    quick: bool = False  # two seeds of a toy on a tiny random model


def write_examples(compare, domain, size, seed, tuning):
    """The JSONL files of one run, train and test, made where they are not there. tuning: test on the tuning set."""
    folder = Path(compare.out_dir) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (
        folder / f"{domain}-{size}-{seed}.jsonl",
        folder / f"{domain}-{'tune' if tuning else 'test'}.jsonl",
    )
    if train.exists() and test.exists():
        return train, test
    examples = data.load_examples(domain)
    rest, kept = data.split(examples, 300 / len(examples), seed=0)
    rest, tune = data.split(rest, 200 / len(rest), seed=0)
    _, sample = data.split(rest, size / len(rest), seed)
    for path, part in ((train, sample), (test, tune if tuning else kept)):
        with replacing(path) as temporary:
            temporary.write_text(
                "".join(json.dumps(example) + "\n" for example in part), encoding="utf-8"
            )
    return train, test


RUNNING, STOPPED = [], threading.Event()  # the processes of the runs; set when these are to end


def launch(command, threads):
    """Run train.py with these arguments on so many of the CPU's cores; returns its exit status and what it wrote to stderr."""
    with subprocess.Popen(
        [sys.executable, Path(__file__).parents[1] / "train.py", *command],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        RUNNING.append(process)
        if STOPPED.is_set():
            process.terminate()
        _, errors = process.communicate()
        RUNNING.remove(process)
    return process.returncode, errors


def stop(signum, frame):
    """At SIGTERM: end the runs too, which Ctrl-C reaches by itself."""
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
    return replace(
        trajectory,
        layers=[trajectory.layers[i] for i in keep],
        magnitude=[trajectory.magnitude[i] for i in keep],
        delta_m=[[row[i] for i in keep] for row in trajectory.delta_m],
        delta_d=[[row[i] for i in keep] for row in trajectory.delta_d],
    )


def run(compare, domain, size, seed, method, rates, tuning=False):
    """Train once, unless its result is there; returns the result. Raises ValueError for one that was made with other rates or another model."""
    name = "-".join(
        ["tune" if tuning else domain, method, *(f"{rate:g}" for rate in rates.values())]
        if tuning
        else [domain, str(size), method, str(seed)]
    )
    if found := read_results(compare.results).get(name):
        wanted = {f"--{key}={value}" for key, value in (rates | {"model": compare.model}).items()}
        if missing := wanted - set(shlex.split(found.get("command", ""))):
            raise ValueError(
                f"{name} in {compare.results}/runs.jsonl was made without "
                f"{', '.join(sorted(missing))}: remove its line, or choose another --results"
            )
        return found
    train, test = write_examples(compare, domain, size, seed, tuning)
    search, out = round(10 * (size / 100) ** 0.5), f"{compare.out_dir}/{name}"
    options = {
        "model": compare.model,
        "method": method,
        "train_file": train,
        "test_file": test,
        "seed": seed,
        "search_steps": search,
        "retrain_steps": 4 * search,
        **rates,
        "label_prompt": data.BUILT_IN[domain],
        "eval_size": 300,
        "snapshots": 4,
        "out_dir": out,
        "overwrite": True,
    }
    command = [f"--{key}={value}" for key, value in options.items()]
    threads = max(1, (os.cpu_count() or 1) // compare.workers)
    status, errors = launch(command, threads)
    if status != 0:
        message = (errors.strip() or "no message").splitlines()[-1]
        if not (tuning and "not finite" in message):
            raise RuntimeError(f"{name}: {message}")
        tqdm.write(f"{name}: {message}")  # a rate that is too high, which the grid is there to find
        return {"method": method, **rates, "diverged": message}
    summary = read_json(Path(out) / "summary.json")
    result = {
        "name": name,
        "set": "tune" if tuning else "main",
        "domain": domain,
        "size": size,
        "method": method,
        "seed": seed,
        **rates,
        "command": shlex.join(["python", "train.py", *command]),
        "threads": threads,
        **{
            key: summary[key]
            for key in ("before", "after", "seconds", "dtype", "peak_memory_beyond_start_gb")
        },
    }
    save(compare.results, result, queries_and_values(Trajectory.load(out)))
    return read_results(compare.results)[name]


def grid(method):
    """A method's learning rates that are tried, as a list of {name: rate}."""
    if method == "ft":
        return [{"lower_lr": rate} for rate in FT_RATES]
    # METHODS is a tuple of names until each method has an entry of its own
    bilevel = METHODS[method].upper if isinstance(METHODS, dict) else method.startswith("bi")
    if not bilevel:
        return [{"lower_lr": rate} for rate in LOWER_RATES]
    pairs = itertools.product(LOWER_RATES, UPPER_RATES)
    return [{"lower_lr": lower, "upper_lr": upper} for lower, upper in pairs]


def chosen_rates(results):
    """The rates of the tuning run with the lowest loss on the tuning set. Raises ValueError if all diverged."""
    finite = [result for result in results if "diverged" not in result]
    if not finite:
        raise ValueError(
            f"all rates of {results[0]['method']}'s grid diverged: lower them in tools/compare.py"
        )
    best = min(finite, key=lambda result: result["after"]["test"]["loss"])
    return {name: best[name] for name in ("lower_lr", "upper_lr") if name in best}


def table(results):
    """Lines of text: each method's means and standard deviations for every domain and size, then BiDoRA's pairs with the others."""
    lines = [
        f"{'':30}{'seeds':>6}{'test accuracy, %':>20}{'test loss':>18}{'train accuracy, %':>20}{'train - test, points':>22}{'seconds':>9}"
    ]
    cells = {}
    for result in results:
        cells.setdefault((result["domain"], result["size"], result["method"]), []).append(result)
    for (domain, size, method), group in cells.items():
        test, train = ([r["after"][part] for r in group] for part in ("test", "train"))
        columns = [
            (form, [scale * value for value in values])
            for form, scale, values in (
                ("{:.1f} ± {:.1f}", 100, [t["accuracy"] for t in test]),
                ("{:.3f} ± {:.3f}", 1, [t["loss"] for t in test]),
                ("{:.1f} ± {:.1f}", 100, [t["accuracy"] for t in train]),
                (
                    "{:.1f} ± {:.1f}",
                    100,
                    [b["accuracy"] - a["accuracy"] for a, b in zip(test, train)],
                ),
            )
        ]
        texts = [
            form.format(numpy.mean(values), numpy.std(values, ddof=1) if len(values) > 1 else 0)
            for form, values in columns
        ]
        seconds = numpy.median([r["seconds"]["total"] for r in group])
        lines.append(
            f"{f'{domain}, {size}, {method}':30}{len(group):6}{texts[0]:>20}{texts[1]:>18}{texts[2]:>20}{texts[3]:>22}{seconds:9.0f}"
        )
    # Sizes apart: a seed's smaller samples lie within its larger ones, so pairs over several sizes would not be independent.
    lines += [
        "",
        "bidora against the others, paired by domain and seed (Wilcoxon's signed-rank test, two-sided):",
    ]
    measures = {
        "test accuracy": lambda a: 100 * a["test"]["accuracy"],
        "test loss": lambda a: a["test"]["loss"],
        "train - test accuracy": lambda a: 100 * (a["train"]["accuracy"] - a["test"]["accuracy"]),
    }
    by_key = {(r["domain"], r["size"], r["seed"], r["method"]): r["after"] for r in results}
    methods = dict.fromkeys(r["method"] for r in results)
    for size, method in itertools.product(sorted({r["size"] for r in results}), methods):
        pairs = [
            (after, by_key[(*key, method)])
            for (*key, own), after in by_key.items()
            if own == "bidora" and method != own and key[1] == size and (*key, method) in by_key
        ]
        if len(pairs) > 1:
            texts = []
            for what, measure in measures.items():
                differences = [
                    round(measure(a) - measure(b), 9) for a, b in pairs
                ]  # equal ones are to tie, whatever their last digits
                p = wilcoxon(differences).pvalue if any(differences) else 1.0
                texts.append(f"{what} {round(numpy.mean(differences), 6) + 0:+.3g} (p = {p:.2g})")
            lines.append(
                f"    {size:4} examples, {method:8}{len(pairs):4} pairs: {', '.join(texts)}"
            )
    return lines


def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip(), settings.help_text(Compare), sep="\n\n")
        return 0
    try:
        compare, _ = settings.read(Compare, arguments)
        for name, known in (("methods", KNOWN), ("domains", data.BUILT_IN)):
            for value in set(getattr(compare, name)) - set(known):
                raise ValueError(f"unknown {name} {value!r}" + settings.suggest(value, known))
        if (
            not all(size.isdigit() and int(size) >= 20 for size in compare.sizes)
            or min(compare.seeds, compare.workers) < 1
        ):
            raise ValueError(
                "sizes must be whole numbers of at least 20, seeds and workers positive"
            )
        if compare.quick:
            compare = Compare(
                ("toy-sentiment",),
                ("40",),
                compare.methods,
                2,
                "tiny-random",
                compare.workers,
                f"{compare.results}-quick",
                f"{compare.out_dir}-quick",
                compare.report,
            )
        if not compare.report:
            mend(compare.results)
            domain, size, seed = (
                TUNING
                if not compare.quick and compare.model != "tiny-random"
                else ("toy-sentiment", 40, 1000)
            )
            for name in compare.domains:
                data.load_examples(name)  # a missing download shows now, and happens once
            with ThreadPoolExecutor(compare.workers) as pool:
                tuning = [(method, rates) for method in compare.methods for rates in grid(method)]
                write_examples(compare, domain, size, seed, tuning=True)
                tuned = list(
                    tqdm(
                        pool.map(
                            lambda job: run(compare, domain, size, seed, *job, tuning=True), tuning
                        ),
                        total=len(tuning),
                        desc="tuning",
                    )
                )
                rates = {
                    method: chosen_rates([r for r in tuned if r["method"] == method])
                    for method in compare.methods
                }
                print(
                    "rates:",
                    "; ".join(
                        f"{method} {', '.join(f'{n}={r:g}' for n, r in found.items())}"
                        for method, found in rates.items()
                    ),
                    flush=True,
                )
                jobs = [
                    (domain, int(size), seed, method)
                    for size in compare.sizes
                    for seed in range(compare.seeds)
                    for domain in compare.domains
                    for method in compare.methods
                ]
                for domain, size, seed, _ in jobs:
                    write_examples(
                        compare, domain, size, seed, tuning=False
                    )  # not by two runs at a time
                list(
                    tqdm(
                        pool.map(lambda job: run(compare, *job, rates[job[3]]), jobs),
                        total=len(jobs),
                        desc="runs",
                    )
                )
        results = load_results(compare.results)
        if not results:
            raise FileNotFoundError(
                f"no results in {compare.results}: run python -m tools.compare first"
            )
        print(*table(results), sep="\n")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main(sys.argv[1:]))
