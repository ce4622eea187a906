"""
Does the true hypergradient help? BiDoRA on a layer so small that its lower level can be solved.

    python -m research.resolved     measure what has no result yet, and print the tables

The layer is MiniLM's pooler, 384 × 384, on the mean of a text's tokens, with a head after it. All
below it is frozen and computed once. The lower level minimises the train loss plus RIDGE / 2 times
the squares of A, B and the head, in float64, so that L-BFGS finds V*(m), where its gradient is 0.

errors   of the hypergradients at m's start, after some lower-level steps and at V*(m): ‖h - truth‖
         / ‖truth‖, and the cosine of the two. The truth is the slope of F(V*(m), m) along 16 random
         directions of m, by central differences, with the lower level solved again at both ends.
         Here unrolled-K and adam-K simulate K further steps, adam-K from AdamW's present moments.
scores   after a search along each hypergradient: m is fixed, and A, B start afresh and are solved
         on train and val together. Between two upper-level steps the lower level takes 50 steps, or
         with …-solved is solved. m-fixed is not searched; m-joint learns with A and B on all the
         data, by as many steps. All batches are whole splits.
"""

import copy
import functools
import itertools
import signal
import sys
from dataclasses import dataclass

import numpy
import torch

import bidora
from bilevel import HYPERGRADIENTS, create_bilevel_optimizer
from hypergrad import LowerGradient, dot
from research.differences import table, tables
from research.results import load_results, mend, read_results, save
from research.sweep import Sweep, in_workers, task_of
from support.run import settings

MODEL = "minilm"  # the base model, an encoder with a pooler
DOMAINS = ("movie-sentiment", "peptides", "movie-ratings")  # built-in data sets
SEEDS = 20  # each draws the sample, the split, the adapter and the head
RIDGE = 0.1  # positive, or V*(m) might lie at infinity
SIZE = 100  # training examples of task_of, 80 of them in train and 20 in val
LOWER_LR, UPPER_LR = 1e-2, 1e-2  # of AdamW
UPPER_STEPS, LOWER_STEPS = 20, 50  # of a search, and before each of its upper-level steps
AFTER = (10, 30, 100, 300, 1000)  # lower-level steps before the errors are measured
DIRECTIONS, EPSILON = 16, 1e-3  # of the slopes: how many, and the step; m's mean is 0.2
SEARCHES = {  # arm: its hypergradient, with options of create_bilevel_optimizer
    "first-order": ("first_order", {}),
    "identity": ("identity", {}),
    "unrolled-1": ("unrolled", {}),
    "unrolled-5": ("unrolled", {"steps": 5}),
    "unrolled-20": ("unrolled", {"steps": 20}),
    "adam-1": ("unrolled", {"precondition": "adam"}),
    "adam-20": ("unrolled", {"precondition": "adam", "steps": 20}),
    "neumann-100": ("neumann", {"terms": 100}),  # with Problem.alpha
    "cg-100": ("conjugate_gradient", {"iterations": 100, "damping": 1e-6}),
}
SOLVED = "-solved"  # the end of an arm whose lower level is solved before each upper-level step
ARMS = (*SEARCHES, "first-order-solved", "cg-100-solved", "m-fixed", "m-joint")


@dataclass
class Resolved:
    workers: int = 2  # processes, which share the CPU's cores
    results: str = "results/resolved"  # folder of the results


def largest_eigenvalue(loss, parameters, products=200):
    """The eigenvalue of largest size of the Hessian of loss(), a float, by power iteration."""
    g = LowerGradient(loss, parameters)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    for _ in range(products):
        length = dot(vector, vector).sqrt()
        unit = [v / length for v in vector]
        vector = g.product(unit, parameters)
    return dot(unit, vector).item()


class Problem:
    """A domain's data for a seed, the model (adapted layer, tanh, head), and its losses."""

    def __init__(self, domain, seed):
        sweep = Sweep(model=MODEL, target_modules=("pooler.dense",))
        task = task_of(sweep, domain, "bidora", seed)
        self.task, self.whole, self.seed = task, task.model, seed
        self.rows = task.encoded | {"all": task.encoded["train"] + task.encoded["val"]}
        base, self.inputs = self.whole.hf.base_model, {}
        for split, rows in self.rows.items():
            ids, mask, types, targets = task.family.collate(rows)
            with torch.no_grad():
                hidden = base(ids, mask, types).last_hidden_state * mask[..., None]
            self.inputs[split] = (hidden.sum(1) / mask.sum(1, keepdim=True)).double(), targets
        layers = base.pooler.dense, torch.nn.Tanh(), self.whole.classifier
        self.model = torch.nn.Sequential(*layers).double()

    def loss(self, model, split):
        """The mean loss of a split; for train and all, with the ridge: the lower level's."""
        x, targets = self.inputs[split]
        loss = self.whole.loss(model(x), targets)
        if split in ("train", "all"):
            m = model[0].lora_magnitude_vector
            weights = [p for p in bidora.lower_parameters(model) if p is not m]
            loss = loss + RIDGE / 2 * sum(p.square().sum() for p in weights)
        return loss

    def solve(self, model, split="train", most=1e-5):
        """
        Bring the lower level to a gradient of 0. Raises FloatingPointError if a number of it stays
        above `most`: rounding stops the line search below 1e-7 to 1e-5, by how sharp the loss is.
        """
        lower = bidora.lower_parameters(model)
        limits = {"max_iter": 2000, "max_eval": 4000, "history_size": 50}
        exact = {"tolerance_grad": 1e-9, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}

        def closure():
            loss = self.loss(model, split)
            for p, g in zip(lower, torch.autograd.grad(loss, lower)):
                p.grad = g
            return loss

        for _ in range(10):  # each with a new memory
            torch.optim.LBFGS(lower, **limits, **exact).step(closure)
            closure()
            left = max(p.grad.abs().max().item() for p in lower)
            if left < most:
                return
        raise FloatingPointError(f"the lower level is not solved: its gradient is {left:.1e}")

    @functools.cached_property
    def alpha(self):
        """Neumann's alpha: half of 1 / λ_max of the Hessian at V*(m) and m's start."""
        model = copy.deepcopy(self.model)
        self.solve(model)
        lower = bidora.lower_parameters(model)
        return 0.5 / largest_eigenvalue(lambda: self.loss(model, "train"), lower)

    def choice(self, arm):
        """(an arm's hypergradient, a dict of its options); of an arm without one, first order."""
        name, options = SEARCHES.get(arm.removesuffix(SOLVED), ("first_order", {}))
        return name, options | ({"alpha": self.alpha} if name == "neumann" else {})

    @torch.no_grad()
    def scores(self, model, split):
        """The scores and the loss on a split, {name: number}."""
        x, targets = self.inputs[split]
        logits, family = model(x), self.task.family
        predicted = zip(self.rows[split], self.whole.predict(logits).tolist())
        pairs = [(family.in_words(row, value), row.answer) for row, value in predicted]
        return family.scores(pairs) | {"loss": self.whole.loss(logits, targets).item()}


def slopes(problem, model, directions):
    """The truth: how F(V*(m), m) changes along directions, (n, out), of m; (n,)."""

    def solved(change):
        changed = copy.deepcopy(model)
        bidora.upper_parameters(changed)[0].data += change
        problem.solve(changed, most=1e-7)
        return problem.loss(changed, "val").item()

    sides = [(solved(EPSILON * d), solved(-EPSILON * d)) for d in directions]
    return directions.new_tensor([(up - down) / (2 * EPSILON) for up, down in sides])


def hypergradient(problem, model, arm, adam):
    """dF/dm, (out,), by an arm's function at the model's present state. adam: the lower AdamW."""
    name, options = problem.choice(arm)
    if options.pop("precondition", None):
        options |= {"adam": adam, "grad_clip": 1.0}
    elif name == "unrolled":
        options["lr"] = LOWER_LR
    losses = (functools.partial(problem.loss, model, split) for split in ("train", "val"))
    levels = bidora.lower_parameters(model), bidora.upper_parameters(model)
    return HYPERGRADIENTS[name].function(*losses, *levels, **options)[0]


def errors(problem, seed):
    """{lower-level steps, or "solved": {arm: [its error, its cosine]}}."""
    model, measured = copy.deepcopy(problem.model), {}
    optimizer = create_bilevel_optimizer(model, LOWER_LR, weight_decay=0.0)

    def all_arms():
        adam = optimizer.lower_optimizer
        return {arm: hypergradient(problem, model, arm, adam) for arm in SEARCHES}

    for step in range(1, AFTER[-1] + 1):
        optimizer.lower_step(problem.loss, "train")
        if step in AFTER:
            measured[step] = all_arms()
    problem.solve(model, most=1e-7)
    measured["solved"] = all_arms()

    generator = torch.Generator().manual_seed(seed)
    sizes = DIRECTIONS, *optimizer.upper[0].shape
    directions = torch.randn(sizes, generator=generator, dtype=torch.float64)
    true = slopes(problem, model, directions)

    def beside_truth(h):
        ours = directions @ h
        if not h.isfinite().all():
            return [numpy.inf, 0.0]
        cosine = torch.nn.functional.cosine_similarity(ours, true, dim=0)
        return [((ours - true).norm() / true.norm()).item(), cosine.item()]

    return {n: {arm: beside_truth(h) for arm, h in hs.items()} for n, hs in measured.items()}


def search(problem, arm):
    """
    A dict: "moved", ‖m - m0‖ / ‖m0‖ after a search; "val", the val loss at V*(m); and "after", the
    scores after retraining. Raises FloatingPointError if a level diverges.
    """
    model = copy.deepcopy(problem.model)
    name, options = problem.choice(arm)
    if arm == "m-joint":
        model[0].method = bidora.METHODS["dora"]
    rates = LOWER_LR, UPPER_LR, LOWER_STEPS
    optimizer = create_bilevel_optimizer(model, *rates, 0.0, name, **options)

    for _ in range(0 if arm == "m-fixed" else UPPER_STEPS):
        if arm == "m-joint":
            for _ in range(LOWER_STEPS):
                optimizer.lower_step(problem.loss, "all")
        elif arm.endswith(SOLVED):
            problem.solve(model)
            optimizer.upper_step(problem.loss, "val", "train")
        else:
            optimizer.bilevel_step(problem.loss, "train", "val")

    m, start = (layers[0].lora_magnitude_vector.data for layers in (model, problem.model))
    model = copy.deepcopy(problem.model)  # the direction and the head begin alike for all
    model[0].lora_magnitude_vector.data.copy_(m)
    problem.solve(model)
    val = problem.loss(model, "val").item()

    torch.manual_seed(problem.seed)
    bidora.start_retrain(model)
    problem.solve(model, "all")
    after = {"train": problem.scores(model, "all"), "test": problem.scores(model, "test")}
    moved = ((m - start).norm() / start.norm()).item()
    return {"metric": problem.task.family.metric, "moved": moved, "val": val, "after": after}


def measure(results, domain, seed):
    """Make and save what a domain and a seed still lack; in a worker process."""
    problem = Problem(domain, seed)
    for arm in ("errors", *ARMS):
        name = f"{domain}-{arm}-{seed}"
        if name in read_results(results):  # perhaps another process made it
            continue
        result = {"name": name, "set": "errors" if arm == "errors" else "main"}
        result |= {"domain": domain, "size": SIZE, "method": arm, "seed": seed}
        result |= {"model": MODEL, "ridge": RIDGE}
        try:
            result |= {"errors": errors(problem, seed)} if arm == "errors" else search(problem, arm)
        except FloatingPointError as error:
            result["diverged"] = str(error)
        save(results, result)


def results_of(folder):
    """Yield the results with errors, then those with scores, for DOMAINS and SEEDS."""
    for which in ("errors", "main"):
        runs = (r for r in load_results(folder, which) if "diverged" not in r)
        yield [r for r in runs if r["domain"] in DOMAINS and r["seed"] < SEEDS]


def errors_of(results, arm):
    """{lower-level steps: (error, cosine)} of an arm, medians over domains and seeds."""
    steps = (*AFTER, "solved")
    each = [[r["errors"][str(n)][arm] for n in steps] for r in results]
    return dict(zip(steps, numpy.median(each, axis=0)))


def error_table(results):
    """Lines of Markdown: `errors_of` all arms, and for each domain those at V*(m)."""
    domains = list(dict.fromkeys(r["domain"] for r in results))
    of_domain = [[r for r in results if r["domain"] == domain] for domain in domains]
    rows = []
    for arm in SEARCHES:
        pairs = [*errors_of(results, arm).values()]
        pairs += [errors_of(own, arm)["solved"] for own in of_domain]
        rows.append([f"`{arm}`", *(f"{error:.2g}, {cosine:+.2f}" for error, cosine in pairs)])

    titles = ["lower-level steps", *AFTER, "solved", *(f"`{domain}`, solved" for domain in domains)]
    heading = "**Error relative to the truth, and cosine**: medians over tasks and seeds"
    return table(titles, rows, heading)


def loss_table(results):
    """Lines of Markdown: each arm's losses, and how far m moved, by domain."""
    titles, rows = ["arm"], {arm: [f"`{arm}`"] for arm in ARMS}
    for domain in dict.fromkeys(r["domain"] for r in results):
        values = {arm: {} for arm in ARMS}
        for r in (r for r in results if r["domain"] == domain):
            values[r["method"]][r["seed"]] = r["val"], r["after"]["test"]["loss"], r["moved"]
        seeds = sorted(set.intersection(*map(set, values.values())))
        titles.append(f"`{domain}` ({len(seeds)})")
        for arm, row in rows.items():
            each = [values[arm][seed] for seed in seeds] or [(numpy.nan,) * 3]
            row.append("{:.3f}, {:.3f}, {:.0%}".format(*numpy.mean(each, axis=0)))

    heading = "**Val loss at V*(m) after search, test loss after retraining, how far m moves**"
    return table(titles, rows.values(), f"{heading}: means over the seeds that all arms have")


def all_tables(folder):
    """Lines of Markdown: all results."""
    with_errors, results = results_of(folder)
    yield from (*error_table(with_errors), *loss_table(results), *tables(results, ARMS, -1))


def do_all(given):
    """Measure what is missing, and print the tables."""
    settings.at_least(given, workers=1)
    mend(given.results)
    done = read_results(given.results)
    missing = [
        (given.results, domain, seed)
        for seed, domain in itertools.product(range(SEEDS), DOMAINS)
        if any(f"{domain}-{arm}-{seed}" not in done for arm in ("errors", *ARMS))
    ]
    if missing:
        in_workers(given.workers, "problems", measure, missing)
    print(*all_tables(given.results), sep="\n")


def main(arguments):
    return settings.program(arguments, Resolved, do_all, __doc__, resumes=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
