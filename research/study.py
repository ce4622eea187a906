"""
Arms side by side on a small encoder, over tasks and many seeds: --group is one of research/arms.py.

    python -m research.study             make every run of the group that has no result yet
    python -m research.study --report    print the tables of the results so far, in Markdown
    python -m research.study --list      one command a job that is still to do, for GNU parallel or
                                         a job array: ... --list | parallel -j 2. First it lists the
                                         choices of rates; when these are done, the runs
    python -m research.study --job=NAME  do one job

Stop it at any time: the same command resumes. Several machines may work on one folder: a run that
another process holds is left to it. In each domain 300 examples are the test set, the same for all
runs; the seed draws a training sample from the rest. With n examples every arm takes
50·√(n/100) lower-level steps, those with two phases a fifth of them in search.

Rates are chosen for each arm and domain by the loss on 200 other examples, at 100 training
examples, mean over three seeds: from a first guess the search goes to the best neighbour on a grid,
half a decade apart, until none is better by half a percent. So no choice lies at an edge. For more
examples the search goes on from there, where the domain has enough of them. Arms without rates of
their own take another's. A run is one call of train.py, or of research.published; its result and
command are one line of results/study/runs.jsonl.
"""

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from tqdm import tqdm

from research.arms import ARMS, EFFECTS, GROUPS
from research.differences import of_group, tables
from research.results import mend, read_results, save
from support.run import settings
from support.text.datasets import BUILT_IN

GRID = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0]  # of every rate
TUNING_SEEDS = (1000, 1001, 1002)
SMALL = ("similarity",)  # domains with too few examples to choose rates with more than 100


@dataclass
class Study:
    group: str = "methods"  # the comparison: methods, controls, paper, published, network
    #: or hypergradients
    arms: tuple = ()  # what is compared; empty: the group's
    domains: tuple = ()  # built-in data sets; empty: the group's
    sizes: tuple = ()  # training examples, train and val together; empty: the group's
    seeds: int = 0  # each draws the sample, the split, the initial adapter and the batches; 0: the
    #: group's
    model: str = "minilm"  # the base model
    target_modules: tuple = ("query", "value")  # the adapted layers, as in the paper
    dtype: str = "float32"  # of the base
    workers: int = 2  # runs at a time, which share the CPU's cores
    results: str = "results/study"  # folder of the results
    out_dir: str = "out/study"  # folder of the runs
    report: bool = False  # only print the tables
    list: bool = False  # only print the jobs that are still to do
    job: str = ""  # do this one alone


def options_of(study, name, domain, size, arm, seed, rates):
    """The settings of a run, {name: value}."""
    steps = round(50 * (size / 100) ** 0.5)
    options = {"model": study.model, "data": domain, "train_size": size, "test_size": 300}
    options |= {"rank": 4, "alpha": 8.0} | ARMS[arm].settings | rates
    options |= {"seed": seed, "search_steps": steps // 5, "retrain_steps": steps - steps // 5}
    options |= {"target_modules": ",".join(study.target_modules)}
    options |= {"batch_size": 8, "block_size": 48, "dtype": study.dtype}
    options |= {"eval_size": 300, "eval_before": False, "checkpoint_every": 10**6}
    return options | {"out_dir": f"{study.out_dir}/{name}", "overwrite": True}


def train_once(arguments):
    """One run, in a worker process: (its summary, ""), or (None, why it failed)."""
    from research import published

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return published.train(published.read_config(arguments)), ""
        except (ValueError, OSError, FloatingPointError) as error:
            return None, str(error)


def results_of(study):
    """read_results of the study's folder, again only when the file has changed."""
    path = Path(study.results) / "runs.jsonl"
    about = path.stat() if path.exists() else None
    return read_at(study.results, about and (about.st_mtime_ns, about.st_size))


@functools.lru_cache(maxsize=1)
def read_at(folder, version):
    return read_results(folder)


def run(study, pool, name, domain, size, arm, seed, rates, **more):
    """
    Train once, unless there is a result already; returns the result, or None if another process
    makes it. Raises ValueError for a run that fails, unless it diverges: {"diverged": message};
    LookupError without a pool.
    """
    if found := results_of(study).get(name):
        return found
    if pool is None:
        raise LookupError(name)
    options = options_of(study, name, domain, size, arm, seed, rates) | more
    arguments = [f"--{key}={value}" for key, value in options.items()]
    own = {*EFFECTS, "trace"} & ARMS[arm].settings.keys()
    program = ["-m", "research.published"] if own else ["train.py"]
    summary, error = pool.submit(train_once, arguments).result()

    result = {"name": name, "set": "tune" if "tune_size" in more else "main", "domain": domain}
    result |= {"size": size, "method": arm, "seed": seed, **rates}
    result |= {"command": shlex.join(["python", *program, *arguments])}
    if error:
        if "another run" in error:  # it holds the folder
            return None
        if "not finite" not in error:
            raise ValueError(f"{name}: {error}")
        result["diverged"] = error
    else:
        for key in ("metric", "after", "seconds", "dtype", "trace"):
            if key in summary:
                result[key] = summary[key]
    save(study.results, result, None)
    return result


# ------------------------------------------------------------------------------ learning rates


def neighbours(rates):
    """
    The points of the grid around one, each with one rate moved by one place. Raises ValueError at
    the grid's edge.
    """
    for name, value in rates.items():
        place = GRID.index(value)
        if place in (0, len(GRID) - 1):
            raise ValueError(f"{name}={value:g} is at the edge of GRID: extend it")
        for near in (place - 1, place + 1):
            yield rates | {name: GRID[near]}


def tuning_of(domain, size, arm):
    """The choice of rates for an arm's runs with so many examples: (its name, where it is made)."""
    if size <= 100 or domain in SMALL:
        return f"tune-{domain}-{arm}", (domain, 100, arm)
    return f"tune-{domain}-{size}-{arm}", (domain, size, arm)


def climb(study, pool, domain, size, arm):
    """
    The rates of an arm on a domain, {name: rate}: from a first guess, or from those for 100
    examples, to a local optimum. Without a pool, LookupError is raised where a run is missing.
    """
    tuning, (_, size, _) = tuning_of(domain, size, arm)

    def loss_of(seed, rates):
        shown = "-".join(f"{rate:g}" for rate in rates.values())
        name = f"{tuning}-{shown}-{seed}"
        while True:
            found = run(study, pool, name, domain, size, arm, seed, rates, tune_size=200)
            if found:
                break
            time.sleep(5)  # another process makes it
        return numpy.inf if "diverged" in found else found["after"]["test"]["loss"]

    def loss(rates):
        return numpy.mean([loss_of(seed, rates) for seed in TUNING_SEEDS])

    best = ARMS[arm].rates if size == 100 else climb(study, pool, domain, 100, arm)
    while best:
        near = min(neighbours(best), key=loss)
        if loss(near) > 0.995 * loss(best):  # or it would wander over a plateau
            break
        best = near
    return best


def source_of(arm):
    """The arm whose rates an arm takes: most take their own."""
    rates = ARMS[arm].rates
    return rates if isinstance(rates, str) else arm


def tuned(study, pool, domain, size, arm):
    """The rates of an arm, those of its source; of them, DoRA takes the lower level's alone."""
    rates = dict(climb(study, pool, domain, size, source_of(arm)))
    if upper := ARMS[arm].upper_from:
        rates["upper_lr"] = climb(study, pool, domain, size, upper)["upper_lr"]
    if ARMS[arm].settings["method"] == "dora":
        rates.pop("upper_lr", None)
    elif "upper_lr" in rates:
        rates["upper_lr"] *= ARMS[arm].upper_factor
    return rates


# ---------------------------------------------------------------------------------- the jobs


def jobs(study):
    """{name: (domain, size, arm, seed)} of all runs, in the order in which they are made."""
    found = {}
    for size, seed in itertools.product(map(int, study.sizes), range(study.seeds)):
        for domain, arm in itertools.product(study.domains, study.arms):
            found[f"{domain}-{size}-{arm}-{seed}"] = (domain, size, arm, seed)
    return found


def to_do(study):
    """The jobs without a result."""
    done = results_of(study)
    return {name: job for name, job in jobs(study).items() if name not in done}


def tunings(study):
    """{name: (domain, size, arm)} of all choices of rates."""
    arms = dict.fromkeys(map(source_of, study.arms))
    return dict(
        tuning_of(domain, size, arm)
        for size, domain, arm in itertools.product(map(int, study.sizes), study.domains, arms)
    )


def to_tune(study):
    """Those of `tunings` that are not finished."""
    found = {}
    for name, choice in tunings(study).items():
        try:
            climb(study, None, *choice)
        except LookupError:
            found[name] = choice
    return found


def start_pool(workers):
    """A pool of processes that share the CPU's cores."""
    # Of the workers, which start afresh: they read it when torch is imported.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, which ends the workers
    return ProcessPoolExecutor(workers, context, signal.signal, ignore)


@contextlib.contextmanager
def ended_with(pool):
    """End the pool's processes with the block, at once if it fails or is interrupted."""
    try:
        yield
    except BaseException as error:
        for child in multiprocessing.active_children():
            child.kill()
        if isinstance(error, BrokenProcessPool):
            message = "a worker was killed, perhaps for want of memory (try --workers=1)"
            raise ValueError(f"{message}; the same command resumes") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def interrupt(signum, frame):
    raise KeyboardInterrupt


def work(study, chosen, tuning=()):
    """
    Do the chosen jobs, {name: job}. The rates that they need are chosen first, and those of the
    (domain, size, arm) in tuning.
    """
    mend(study.results)
    pool = start_pool(study.workers)

    def do(job, rates):
        name, (domain, size, arm, seed) = job
        return run(study, pool, name, domain, size, arm, seed, rates[domain, size, arm])

    with ThreadPoolExecutor(study.workers) as threads, ended_with(pool):  # a thread a worker
        choices = (*tuning, *((domain, size, arm) for domain, size, arm, _ in chosen.values()))
        needed = list(dict.fromkeys(choices))
        found = threads.map(lambda choice: tuned(study, pool, *choice), needed)
        rates = dict(zip(needed, tqdm(found, desc="tuning", total=len(needed))))
        made = threads.map(lambda job: do(job, rates), chosen.items())
        skipped = sum(result is None for result in tqdm(made, desc="runs", total=len(chosen)))
    if skipped:
        print(f"{skipped} runs are being made by other processes; the same command adds them")


# -------------------------------------------------------------------------------- the program


def work_on(study, missing):
    """Do the job that study.job names, unless it is done. Raises ValueError for an unknown one."""
    name, choices = study.job, tunings(study)
    if name in choices:
        work(study, {}, [choices[name]])
    elif name in missing:
        work(study, {name: missing[name]})
    elif name not in jobs(study):
        raise ValueError(f"unknown job {name!r}: --list shows those that are still to do")


def check(study):
    """The study with what it leaves to its group. Raises ValueError for unfit settings."""
    if study.group not in GROUPS:
        raise ValueError(f"unknown group {study.group!r}" + settings.suggest(study.group, GROUPS))
    group = GROUPS[study.group]
    study = replace(study, arms=study.arms or group.arms, domains=study.domains or group.domains)
    study = replace(study, seeds=study.seeds or group.seeds, sizes=study.sizes or group.sizes)
    for name, known in (("arms", ARMS), ("domains", BUILT_IN)):
        for value in set(getattr(study, name)) - set(known):
            raise ValueError(f"unknown {name} {value!r}" + settings.suggest(value, known))
    if not all(size.isdigit() and int(size) >= 20 for size in study.sizes):
        raise ValueError(f"sizes={','.join(study.sizes)} must be integers of at least 20")
    settings.at_least(study, seeds=1, workers=1)
    if study.list + study.report + bool(study.job) > 1:
        raise ValueError("list, report and job are three things to do: choose one")

    own = {f"--model={study.model}", f"--dtype={study.dtype}"}
    own.add(f"--target_modules={','.join(study.target_modules)}")
    for name, result in results_of(study).items():
        if missing := own - set(shlex.split(result["command"])):
            raise ValueError(
                f"{name} in {study.results}/runs.jsonl was made without "
                f"{', '.join(sorted(missing))}: choose another --results"
            )
    return study


def do_all(study, arguments):
    """List or do what is missing, and print the tables. arguments: the command line."""
    study = check(study)
    missing = to_do(study)
    if study.list:
        given = settings.split(Study, arguments)
        kept = [a for a in given if not a.startswith("--list=")] + ["--list=False"]
        for name in to_tune(study) or missing:
            print(shlex.join(["python", "-m", "research.study", *kept, f"--job={name}"]))
        return
    if study.job:
        work_on(study, missing)
        return
    if not study.report:
        print(f"{len(missing)} runs to do, for {study.results}", file=sys.stderr)
        work(study, missing)
    results = of_group(results_of(study).values(), study)
    if not results:
        raise FileNotFoundError(f"no results in {study.results}: run research.study first")
    print(*tables(results, study.arms, GROUPS[study.group].sign), sep="\n")


def main(arguments):
    do = functools.partial(do_all, arguments=arguments)
    return settings.program(arguments, Study, do, __doc__, resumes=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(main(sys.argv[1:]))
