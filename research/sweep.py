"""
Arms side by side, over tasks and many seeds: --group is one of research/arms.py.

    python -m research.sweep --group=paper     make every run of the group that has no result yet,
                                               and print the group's tables
    ... --lower_lr=1e-3   the same with all arms at one rate, as a set of its own

Stop it at any time: the same command resumes. Several machines may work on one folder, each by the
same command: a run that another process holds comes last. In each domain 300 examples are the
test set, the same for all runs; the seed draws a training sample from the rest. With n examples
every arm takes 50·√(n/100) lower-level steps, those with two phases a fifth of them in search.

The loss on 200 other examples, the mean over three seeds, chooses the rates, with 100 training
examples. On MiniLM each arm and domain has its own rates: from a first guess the search goes to the
best neighbour on a grid, half a decade apart, until none is better by half a percent. So no choice
lies at an edge. For runs of 400 examples or more, the search goes on from there with 400, if the
domain has them. On SmolLM2 all points of an arm's grid are tried on film reviews, for all domains
and sizes. Arms without rates of their own take another's. A run is one call of train.py or of
research.published, whose result and command are one line of runs.jsonl. On SmolLM2, ΔM and ΔD of
the adapted matrices, four snapshots a phase, are in trajectories.safetensors.
"""

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from tqdm import tqdm

import data
import train
from research import published, relatives
from research.arms import ARMS, EFFECTS, GROUPS
from research.differences import of_group, seconds_table, tables
from research.results import load_results, mend, read_results, save
from support.run import settings
from support.run.files import make_folder, malformed, written
from support.run.hardware import processor
from support.text.datasets import BUILT_IN
from support.weights.weight_changes import Trajectory

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0]
TUNING_SEEDS = (1000, 1001, 1002)
MORE = 400  # training examples: with so many or more, rates are chosen with MORE, else with 100
SMALL = ("similarity",)  # domains with too few examples for that, or for runs with more


@dataclass
class Sweep:
    group: str = "methods"  # what is compared: one of those in research/arms.py
    arms: tuple = ()  # of the group; this and what follows, if empty: the group's
    domains: tuple = ()  # built-in data sets
    sizes: tuple = ()  # training examples, train and val together
    seeds: int = 0  # each draws the sample, the split, the initial adapter and the batches
    model: str = ""  # the base model
    target_modules: tuple = ()  # the adapted layers
    results: str = ""  # folder of the results
    out_dir: str = ""  # folder of the runs
    lower_lr: float = 0.0  # of all arms, which are then not tuned; 0: each takes its chosen one
    upper_lr: float = 3e-2  # beside such a lower_lr, of the arms that have an upper level
    workers: int = 2  # runs at a time, which share the CPU's cores

    def __post_init__(self):
        settings.check_names("group", self.group, GROUPS)
        group = GROUPS[self.group]
        for name in ("arms", "domains", "sizes", "seeds", "results", "out_dir"):
            setattr(self, name, getattr(self, name) or getattr(group, name))
        self.set = f"rate-{self.lower_lr:g}" if self.lower_lr else "main"
        given = {"model": self.model, "target_modules": ",".join(self.target_modules)}
        self.settings = group.settings | {name: value for name, value in given.items() if value}

        settings.check_names("arms", self.arms, ARMS)
        settings.check_names("domains", self.domains, BUILT_IN)
        if not all(size.isdigit() and int(size) >= 10 for size in self.sizes):
            raise ValueError(f"sizes={','.join(self.sizes)} must be integers of at least 10")
        settings.at_least(self, seeds=1, workers=1, lower_lr=0, upper_lr=0)


class Job(NamedTuple):
    """A run; without a seed, the choice of its rates."""

    domain: str
    size: int
    arm: str
    seed: int | None = None


def options_of(sweep, name, job, rates, tuning=False):
    """The settings of a run, {name: value}. tuning: the tuning set takes the test set's place."""
    steps = round(50 * (job.size / 100) ** 0.5 * ARMS[job.arm].steps)
    options = sweep.settings | ARMS[job.arm].settings | rates | {"seed": job.seed}
    options |= {"search_steps": steps // 5, "retrain_steps": steps - steps // 5, "eval_size": 300}
    if GROUPS[sweep.group].grids:
        options |= write_files(sweep, job, tuning)
    else:
        options |= {"data": job.domain, "train_size": job.size, "test_size": 300}
        options |= {"tune_size": 200} if tuning else {}
    return options | {"out_dir": f"{sweep.out_dir}/{name}", "overwrite": True}


def task_of(sweep, domain, arm, seed, rates=None, **changes):
    """The Task of an arm's run on 100 examples, on the CPU. changes: other settings for it."""
    options = options_of(sweep, "unused", Job(domain, 100, arm, seed), rates or {}) | changes
    config = published.read_config([f"--{name}={value}" for name, value in options.items()])
    return train.prepare(config, "cpu", task_class=published.PublishedTask)


def write_files(sweep, job, tuning):
    """Write a run's files and return their settings. Only tuning uses the tuning set's examples."""
    examples = data.load_examples(job.domain)
    rest, test = data.split(examples, 300 / len(examples), seed=0)
    rest, tune = data.split(rest, 200 / len(rest), seed=0)
    _, sample = data.split(rest, job.size / len(rest), job.seed, grouped=False)
    parts = {"train": (f"{job.size}-{job.seed}", sample)}
    parts["test"] = ("tune", tune) if tuning else ("test", test)

    files = {"label_prompt": BUILT_IN[job.domain].question}
    for split, (name, chosen) in parts.items():
        folder = make_folder(Path(sweep.out_dir) / "data", "choose another --out_dir")
        path = folder / f"{job.domain}-{name}.jsonl"
        temporary = path.with_name(f"{path.name}-{os.getpid()}")  # others may be writing it, too
        with written(path):
            lines = "".join(json.dumps(example) + "\n" for example in chosen)
            temporary.write_text(lines, "utf-8")
            os.replace(temporary, path)
        files[f"{split}_file"] = path
    return files


def results_of(sweep):
    """read_results of the sweep's folder; the file is read again only if it has changed."""
    path = Path(sweep.results) / "runs.jsonl"
    state = path.stat() if path.exists() else None
    return read_at(sweep.results, state and (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=1)
def read_at(folder, version):
    return read_results(folder)


def check_made(sweep, result, rates):
    """Raise ValueError unless a result's run had the sweep's model and layers, and these rates."""
    line = f"{result['name']} in {sweep.results}/runs.jsonl"
    if lacks := {"command", "diverged" if "diverged" in result else "after"} - result.keys():
        raise ValueError(f"{line} lacks {', '.join(sorted(lacks))}: remove its line")
    names = {"model", "target_modules", "dtype"} & sweep.settings.keys()
    wanted = {name: sweep.settings[name] for name in names} | rates
    options = {f"--{name}={value}" for name, value in wanted.items()}
    if missing := options - set(shlex.split(result["command"])):
        without = ", ".join(sorted(missing))
        raise ValueError(
            f"{line} was made without {without}: remove its line, or choose another --results"
        )


def run(sweep, name, job, rates, tuning=False, make=True):
    """
    The result of a run, which is made unless there is one; None if another process makes it. A run
    that diverges has "diverged", the message. Raises ValueError for a run that fails, and for an
    earlier result of other settings; without `make`, LookupError if there is no result.
    """
    if result := results_of(sweep).get(name):
        check_made(sweep, result, rates)
        return result
    if not make:
        raise LookupError(name)

    options = options_of(sweep, name, job, rates, tuning)
    arguments = [f"--{key}={value}" for key, value in options.items()]
    module = "relatives" if options["method"] in relatives.METHODS else ""
    module = "published" if {*EFFECTS, "trace"} & options.keys() else module
    program = ["-m", f"research.{module}"] if module else ["train.py"]
    command = ["python", *program, *arguments]
    result = {"name": name, "set": "tune" if tuning else sweep.set, "domain": job.domain}
    result |= {"size": job.size, "method": job.arm, "seed": job.seed, **rates}
    result |= {"command": shlex.join(command), "threads": torch.get_num_threads()}
    result |= {"processor": re.sub(r", \d+ threads", "", processor())}

    trajectory = None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            summary = published.train(published.read_config(arguments))
            kept = ("metric", "before", "after", "seconds", "dtype", "trace")
            result |= {key: summary[key] for key in kept if key in summary}
            if "snapshots" in options:
                trajectory = Trajectory.load(options["out_dir"])
        except FloatingPointError as error:
            result["diverged"] = str(error)
        except (ValueError, OSError) as error:
            if "in use by another run" in str(error):
                return None
            raise ValueError(f"{name}: {error}") from error
    save(sweep.results, result, trajectory)
    return results_of(sweep)[name]


def neighbours(rates):
    """Yield the points with one rate moved by one place in RATES. Raises ValueError at an edge."""
    for name, value in rates.items():
        place = RATES.index(value)
        if place in (0, len(RATES) - 1):
            raise ValueError(f"{name}={value:g} is at the edge of RATES: extend it")
        for near in (place - 1, place + 1):
            yield rates | {name: RATES[near]}


def climb(loss, best):
    """The local minimum of loss(point) to which descent from a point, {name: rate}, leads."""
    while best:
        near = min(neighbours(best), key=loss)
        if loss(near) > 0.995 * loss(best):  # else the search would wander over a plateau
            break
        best = near
    return best


def choice_of(sweep, domain, size, arm):
    """(name, Job) of the choice of rates for an arm that has rates of its own."""
    if GROUPS[sweep.group].grids:
        return f"tune-{arm}", Job("movie-sentiment", 100, arm)
    if size < MORE or domain in SMALL:
        return f"tune-{domain}-{arm}", Job(domain, 100, arm)
    return f"tune-{domain}-{MORE}-{arm}", Job(domain, MORE, arm)


def choose(sweep, domain, size, arm, make=True):
    """The rates, {name: rate}, of an arm that has its own. `make`: as in `run`."""
    if sweep.lower_lr:
        return {name: getattr(sweep, name) for name in ARMS[arm].rates}
    choice, job = choice_of(sweep, domain, size, arm)

    def loss_of(seed, rates):
        name = "-".join([choice, *(f"{rate:g}" for rate in rates.values()), str(seed)])
        while not (result := run(sweep, name, job._replace(seed=seed), rates, True, make)):
            time.sleep(5)  # another process makes it
        return numpy.inf if "diverged" in result else result["after"]["test"]["loss"]

    def loss(rates):
        return numpy.mean([loss_of(seed, rates) for seed in TUNING_SEEDS])

    if grids := GROUPS[sweep.group].grids:
        grid, names = grids.get(arm, grids["others"]), ARMS[arm].rates
        points = itertools.product(*(grid[name] for name in names))
        best = min((dict(zip(names, point)) for point in points), key=loss)
        if loss(best) == numpy.inf:
            raise ValueError(f"all rates of {arm}'s grid diverged: lower them in research/arms.py")
        return best
    start = ARMS[arm].rates if job.size == 100 else choose(sweep, domain, 100, arm, make)
    return climb(loss, start)


def sources_of(arm):
    """The arms whose rates an arm takes: itself or another, and perhaps one for the upper level."""
    rates = ARMS[arm].rates
    return [rates if isinstance(rates, str) else arm, *filter(None, [ARMS[arm].upper_from])]


def rates_of(sweep, domain, size, arm, make=True):
    """The rates of an arm's runs, from its sources. DoRA takes only the lower level's."""
    source, *upper = (choose(sweep, domain, size, other, make) for other in sources_of(arm))
    rates = source.copy()
    for other in upper:
        rates["upper_lr"] = other["upper_lr"]
    if ARMS[arm].settings["method"] == "dora":
        rates.pop("upper_lr", None)
    factors = {"lower_lr": ARMS[arm].lower_factor, "upper_lr": ARMS[arm].upper_factor}
    return {name: rate * factors[name] for name, rate in rates.items()}


def runs_of(sweep):
    """{name: Job} of all runs, in the order in which they are made."""
    prefix = "" if sweep.set == "main" else f"{sweep.set}-"
    parts = range(sweep.seeds), map(int, sweep.sizes), sweep.domains, sweep.arms
    return {
        f"{prefix}{domain}-{size}-{arm}-{seed}": Job(domain, size, arm, seed)
        for seed, size, domain, arm in itertools.product(*parts)
        if size <= MORE or domain not in SMALL
    }


def do(sweep, name, job, wait=False):
    """Make a run, in a worker. If another process makes it, return its name, or wait for it."""
    rates = rates_of(sweep, job.domain, job.size, job.arm)
    while not run(sweep, name, job, rates):
        if not wait:
            return name
        time.sleep(5)


def start_worker(workers):
    """Share the cores among the workers, unless the user has, and end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_workers(workers, title, function, jobs):
    """The results of function(*job) for all jobs, in any order, from worker processes."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (workers,))
    try:
        made = [pool.submit(function, *job) for job in jobs]
        return [one.result() for one in tqdm(as_completed(made), desc=title, total=len(made))]
    except BaseException as error:
        for child in multiprocessing.active_children():
            child.kill()
        if isinstance(error, BrokenProcessPool):
            message = "a worker was killed, perhaps for want of memory (try --workers=1)"
            raise ValueError(f"{message}; the same command resumes") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def make(sweep):
    """Choose the rates and make the runs that are missing; those of other processes come last."""
    mend(sweep.results)
    runs = {name: job for name, job in runs_of(sweep).items() if name not in results_of(sweep)}
    print(f"{len(runs)} runs to do, for {sweep.results}", file=sys.stderr)
    if not runs:
        return
    for domain in {job.domain for job in runs.values()}:
        data.load_examples(domain)  # a missing download shows now, and happens once

    if not sweep.lower_lr:
        needed = [(r.domain, r.size, arm) for r in runs.values() for arm in sources_of(r.arm)]
        choices = dict.fromkeys(choice_of(sweep, *place)[1][:3] for place in needed)
        in_workers(sweep.workers, "tuning", choose, [(sweep, *place) for place in choices])
    made = in_workers(sweep.workers, "runs", do, [(sweep, *run) for run in runs.items()])
    if left := [name for name in made if name]:
        print(f"{len(left)} runs are being made by other processes", file=sys.stderr)
        in_workers(sweep.workers, "runs", do, [(sweep, n, runs[n], True) for n in left])


def do_all(sweep):
    """Make what is missing, and print the tables."""
    for result in results_of(sweep).values():
        check_made(sweep, result, {})
    make(sweep)
    with malformed(f"a line of {sweep.results}/runs.jsonl"):
        results = of_group(load_results(sweep.results, sweep.set), sweep)
        sign = GROUPS[sweep.group].sign
        print(*tables(results, sweep.arms, sign), *seconds_table(results, sweep.arms), sep="\n")


def main(arguments):
    return settings.program(arguments, Sweep, do_all, __doc__, resumes=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
