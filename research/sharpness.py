"""
λ_max, the largest eigenvalue of the Hessian of the train loss in the weights of the lower level,
beside the learning rate that research.sweep chose for them.

    python -m research.sharpness                  LoRA, DoRA and BiDoRA on the five tasks of MiniLM
    python -m research.sharpness --arms=lora,dora --domains=similarity --seeds=3

Gradient descent on a quadratic diverges at rates above 2 / λ_max, so a sharper loss should want a
smaller rate. arXiv 2602.04998 explains by it why variants of LoRA have different best rates. Here
the loss is that of all 100 examples, and the weights are A and B, and for DoRA the magnitudes: at
the start of a run (B = 0), and after 50 steps at 1e-3, the same for all. The head learns beside
them, but is not among the weights, since its own curvature would hide theirs.
"""

import itertools
import sys
from dataclasses import dataclass

import numpy
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from tqdm import tqdm

import data
from bidora import adapter_layers, lower_parameters
from bilevel import create_bilevel_optimizer
from hypergrad import LowerGradient
from research.sweep import Sweep, rates_of, task_of
from support.run import settings


@dataclass
class Sharpness:
    arms: tuple = ("lora", "dora", "bidora")  # of research/arms.py
    domains: tuple = ()  # built-in data sets; empty: those of the group methods
    steps: int = 50  # of the lower level, between the two
    rate: float = 1e-3  # of these steps
    seeds: int = 1  # samples of the data, each with an initial adapter and head
    model: str = "minilm"  # the base model
    target_modules: tuple = ("query", "value")  # the adapted layers
    results: str = "results/study"  # where the chosen rates come from


def largest_eigenvalue(loss, parameters, tolerance=0.01):
    """
    The largest eigenvalue, a float, of the Hessian of loss(), a scalar, in a list of parameters: by
    Lanczos' method, to a relative tolerance.
    """
    g = LowerGradient(loss, parameters)
    sizes = [p.numel() for p in parameters]

    def product(x):
        parts = torch.from_numpy(x.ravel()).to(parameters[0]).split(sizes)
        vectors = [part.view_as(p) for part, p in zip(parts, parameters)]
        return torch.cat([y.flatten() for y in g.product(vectors, parameters)]).double().numpy()

    n = sum(sizes)
    hessian = LinearOperator((n, n), product, dtype=numpy.float64)
    start = numpy.random.default_rng(0).standard_normal(n)
    options = {"v0": start, "tol": tolerance, "ncv": min(n, 12), "return_eigenvectors": False}
    return float(eigsh(hessian, 1, which="LA", **options)[0])


def before_and_after(task, steps, rate):
    """λ_max before a Task's first step, and after some steps of its lower level at a rate."""
    examples = task.encoded["train"] + task.encoded["val"]
    layers = adapter_layers(task.model).values()
    weights = [p for layer in layers for p in lower_parameters(layer)]  # without the head's

    def loss():
        return task.family.loss(task.model, examples)

    before = largest_eigenvalue(loss, weights)
    optimizer = create_bilevel_optimizer(task.model, rate, hypergradient="first_order")
    batches = data.Batches(examples, task.config.batch_size, task.config.seed)
    for step in range(steps):
        optimizer.lower_step(task.family.loss, batches[step])
    return before, largest_eigenvalue(loss, weights)


def print_table(given):
    """Print λ_max of each domain and arm beside the chosen rate."""
    settings.at_least(given, steps=0, seeds=1)
    if given.rate <= 0:
        raise ValueError(f"rate={given.rate} must be positive")
    names = ("arms", "domains", "model", "target_modules", "results")
    sweep = Sweep(**{name: getattr(given, name) for name in names})

    columns = ("at the start", f"after {given.steps} steps", "chosen rate")
    print(f"{'λ_max':34}" + "".join(f"{name:>16}" for name in columns))
    unknown = 0
    for domain, arm in tqdm([*itertools.product(sweep.domains, sweep.arms)], unit="arm"):
        tasks = (task_of(sweep, domain, arm, seed) for seed in range(given.seeds))
        values = [before_and_after(task, given.steps, given.rate) for task in tasks]
        texts = [f"{value:.3g}" for value in numpy.mean(values, axis=0)]
        try:
            texts.append(f"{rates_of(sweep, domain, 100, arm, make=False)['lower_lr']:.3g}")
        except LookupError:
            texts.append("–")
            unknown += 1
        tqdm.write(f"{domain:16}{arm:18}" + "".join(f"{text:>16}" for text in texts))
    if unknown:
        print(f"–: {given.results} has no chosen rate yet: python -m research.sweep chooses it")


def main(arguments):
    return settings.program(arguments, Sharpness, print_table, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
