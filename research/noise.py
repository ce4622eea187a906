"""
How much of the published program's hypergradient is the noise of dropout?

    python -m research.noise     measure what has no result yet, and print the table

Betty's darts takes the product ∂²L/∂m∂θ · v, v = ∂F/∂θ, from the difference of two passes, at
θ + ε·v and θ - ε·v. They draw different dropout masks, so their noise is divided by 2ε, with ε =
0.01 / ‖v‖. Here the batches stay the same, and each draw has other masks: MiniLM with the dropout
of its config.json, rank 4 on queries and values, the ordinary layer; at the start, and after some
steps of the whole network at full fine-tuning's rate. θ is A, B and the head, or every weight.

With draws c_i, S² = the mean of c_i·c_j over pairs is ‖E c‖² without bias, and N² = the mean of
‖c_i‖² minus S² is the noise. The mean of n draws is off its expectation by N / (S·√n) of its
length, and has a cosine of 0.9 with it from n = 4.26·N²/S² on. Brackets: two jackknife s.e.
"""

import functools
import itertools
import shlex
import sys
from dataclasses import dataclass

import numpy
import torch
from tqdm import tqdm

import data
from bidora import upper_parameters
from bilevel import in_training
from hypergrad import Step, central_difference, one_process, restored, val_gradients
from research import sweep
from research.arms import GROUPS
from research.differences import table
from research.results import mend, read_results, save
from support.run import settings

RADIUS = 0.01  # Betty's darts_alpha
BATCHES, DRAWS = (8, 32, 128), 24  # rows of the train and of the val batch, and draws of each
ENOUGH = 0.81 / 0.19  # n = ENOUGH · N²/S² draws have a cosine of 0.9


@dataclass
class Noise:
    domains: tuple = GROUPS["paper"].domains  # built-in data sets
    steps: tuple = ("0", "25")  # of the network, before the draws
    results: str = "results/noise"  # folder of the results


def signal(indirect):
    """S²/N² of some draws, a row each."""
    n = len(indirect)
    gram = indirect @ indirect.T
    inner = (gram.sum() - gram.trace()) / (n * (n - 1))
    return inner / (gram.trace() / n - inner)


def needed(ratio):
    """How many draws have a cosine of 0.9, or None where no number has it."""
    return float(ENOUGH / ratio) if ratio > 0 else None


def cosines(x, y):
    """The cosines between all rows of x and all rows of y."""
    return x @ y.T / numpy.outer(numpy.linalg.norm(x, axis=1), numpy.linalg.norm(y, axis=1))


def statistics(direct, indirect, without):
    """A result's numbers. direct, indirect: a row a draw; without: both without dropout."""
    n = len(indirect)
    pairs = ~numpy.eye(n, dtype=bool)
    ratio = signal(indirect)
    left_out = numpy.array([signal(numpy.delete(indirect, i, axis=0)) for i in range(n)])
    error = numpy.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())

    among = cosines(indirect, indirect)[pairs]
    mean, (direct0, indirect0) = indirect.mean(0), without
    lengths = numpy.linalg.norm(indirect, axis=1) / numpy.linalg.norm(direct, axis=1)
    return {
        "indirect": float(numpy.median(lengths)),
        "indirect_without": float(numpy.linalg.norm(indirect0) / numpy.linalg.norm(direct0)),
        "cosine": [float(among.mean()), float(among.min()), float(among.max())],
        "cosine_without": float(cosines(indirect, indirect0[None]).mean()),
        "mean_cosine_without": float(cosines(mean[None], indirect0[None])[0, 0]),
        "direct_cosine": float(cosines(direct, direct)[pairs].mean()),
        "mean_error": float((1 / (ratio * n)) ** 0.5) if ratio > 0 else None,
        "needed": [needed(ratio), needed(ratio + 2 * error), needed(ratio - 2 * error)],
    }


def draw(task, adapters, weights, batches, seed):
    """∂F/∂m and {"adapters", "all": indirect part}, flat. seed: of the masks; None: no dropout."""
    model, upper = task.model, upper_parameters(task.model)
    train_loss, val_loss = (functools.partial(task.family.loss, model, rows) for rows in batches)
    if seed is not None:
        torch.manual_seed(seed)

    def flat(tensors):
        return torch.cat([x.flatten() for x in tensors]).double().numpy()

    with in_training(model, () if seed is None else set(model.modules())), restored(weights):
        v, direct = val_gradients(val_loss, weights, upper)
        gradient = {id(p): x for p, x in zip(weights, v)}
        parts = {}
        for name, chosen in (("adapters", adapters), ("all", weights)):
            here = Step([p.data for p in chosen], [], [], None, train_loss)
            along = [gradient[id(p)] for p in chosen]
            with restored(chosen):
                cross = central_difference(here, along, upper, chosen, RADIUS, one_process)
            parts[name] = -flat(cross)
    return flat(direct), parts


def measure(domain, steps):
    """Yield a domain's results after some steps of the network, dicts."""
    given = sweep.Sweep(group="paper")
    rates = sweep.rates_of(given, domain, 100, "ft", make=False)
    changes = {"train_size": 2 * max(BATCHES), "val_fraction": 0.5}
    changes |= {"network": True, "noise": True}
    task = sweep.task_of(given, domain, "bidora", 0, rates, **changes)
    optimizer = task.create_optimizer(task.model, task.config.lower_lr)
    rows = data.Batches(task.encoded["train"], 8, seed=0)
    for step in range(steps):
        optimizer.lower_step(task.family.loss, rows[step])

    for size in BATCHES:
        batches = [task.encoded[split][:size] for split in ("train", "val")]
        seeds = tqdm([None, *range(DRAWS)], desc=f"{domain}, step {steps}, {size} rows")
        draws = [draw(task, optimizer.adapters, optimizer.lower, batches, seed) for seed in seeds]
        direct = numpy.array([d for d, _ in draws])
        for weights in ("adapters", "all"):
            indirect = numpy.array([parts[weights] for _, parts in draws])
            line = statistics(direct[1:], indirect[1:], (direct[0], indirect[0]))
            yield {"batch": size, "weights": weights, "draws": DRAWS} | line


def noise_table(results):
    """Lines of a Markdown table of the results."""

    def shown(value):
        return "never" if value is None else f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"

    def cells(r):
        yield from (f"`{r['domain']}`", r["steps"], r["batch"])
        yield "every weight" if r["weights"] == "all" else "A, B, head"
        yield from (shown(r["indirect"]), shown(r["indirect_without"]))
        yield "{:+.2f} ({:+.2f} … {:+.2f})".format(*r["cosine"])
        yield from (f"{r['cosine_without']:+.2f}", f"{r['mean_cosine_without']:+.2f}")
        yield "–" if r["mean_error"] is None else f"{r['mean_error']:.0%}"
        yield "{} ({} … {})".format(*map(shown, r["needed"]))
        yield f"{r['direct_cosine']:+.2f}"

    titles = ["task", "step", "rows", "θ", "indirect / direct", "without dropout"]
    titles += ["cosine of two draws", "of one with the value without", "of the mean with it"]
    titles += ["error of the mean", "draws for a cosine of 0.9", "∂F/∂m: cosine of two"]
    return table(titles, map(cells, results))


def do_all(noise):
    """Measure what is missing, and print the table."""
    mend(noise.results)
    for domain, steps in itertools.product(noise.domains, map(int, noise.steps)):
        name = f"{domain}-{steps}-"
        if any(known.startswith(name) for known in read_results(noise.results)):
            continue
        command = ["python", "-m", "research.noise", f"--domains={domain}", f"--steps={steps}"]
        for line in list(measure(domain, steps)):
            line |= {"name": f"{name}{line['batch']}-{line['weights']}", "set": "main"}
            line |= {"domain": domain, "steps": steps, "command": shlex.join(command)}
            save(noise.results, line)
    print("\n".join(noise_table(read_results(noise.results).values())))


def main(arguments):
    return settings.program(arguments, Noise, do_all, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
