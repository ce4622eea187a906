"""
What research/sweep.py compares: the arms, each a run's settings, and the groups of them.

    smollm2          the methods and DoRA in BiDoRA's phases, on SmolLM2
    choices          the same on a task of multiple choice, at the rates for smollm2
    methods          the same arms, on MiniLM, as are all groups that follow
    controls         BiDoRA with one of its parts changed: what it holds out, and how much
    paper            from BiDoRA as written to its published program, one change at a time
    published        and back: the program without (a minus) one of its changes
    network          full fine-tuning, and the arms that train the whole network
    hypergradients   BiDoRA along each of them, and at other rates of its magnitudes
    rank             the methods at ranks 1 to 32, at their rates for rank 4 and with its scale
    tiny             the methods and DoRA in BiDoRA's phases, on 16 to 1,000 examples
    sensitivity      BiDoRA at rates around its chosen ones, other splits, and T1 and T2
    alpha            LoRA and DoRA at other alphas and rates
    relatives        VeRA and PiSSA under each magnitude, LoRA+, other starts and granularity
    cost             LoRA and DoRA with as many steps as take BiDoRA's time
"""

from dataclasses import dataclass, field

import bidora
from research import relatives

EFFECTS = ("transposed", "network", "all_weights", "noise")  # by research.published
# The settings of all runs on MiniLM; the paper adapts queries and values, too.
MINILM = {"model": "minilm", "target_modules": "query,value", "dtype": "float32"}
MINILM |= {"rank": 4, "alpha": 8.0, "batch_size": 8, "block_size": 48}
MINILM |= {"eval_before": False, "checkpoint_every": 10**6}


@dataclass(frozen=True)
class Arm:
    settings: dict  # of train.py or, with EFFECTS, of research.published
    # the first guess of its rates, {} if settings has them, or the name of an arm with its rates
    rates: dict | str
    upper_from: str = ""  # the arm whose upper_lr it takes, if another's
    steps: float = 1.0  # the factor on the number of steps
    lower_factor: float = 1.0  # on its lower_lr
    upper_factor: float = 1.0  # on its upper_lr


@dataclass(frozen=True)
class Group:
    arms: tuple  # the first is compared with each of the others
    domains: tuple  # built-in data sets
    seeds: int = 20
    sizes: tuple = ("100",)  # training examples, train and val together
    sign: int = -1  # 1: of the first minus another, -1: of another minus the first
    settings: dict = field(default_factory=MINILM.copy)  # of all runs
    # {arm or "others": {name: the rates to try}}, once for all domains; {}: each domain has rates
    # of its own, searched for from the arm's first guess
    grids: dict = field(default_factory=dict)
    results: str = "results/study"  # folder of the results
    out_dir: str = "out/study"  # folder of the runs


LOWER, BOTH = {"lower_lr": 3e-3}, {"lower_lr": 3e-3, "upper_lr": 1e-2}
BIDORA = {"method": "bidora"}
METHODS = {
    name: Arm({"method": name}, BOTH if method.upper else LOWER)
    for name, method in bidora.METHODS.items()
}
FAST = {"lower_lr": 0.1}  # for vectors
METHODS |= {"vera": Arm({"method": "vera"}, FAST), "dvora": Arm({"method": "dvora"}, FAST)}
METHODS["bidvora"] = Arm({"method": "bidvora"}, FAST | {"upper_lr": 1e-2})
METHODS["ft"] = Arm({"method": "ft"}, {"lower_lr": 1e-4})
CONTROLS = {
    "bidora-on-train": Arm(BIDORA | {"upper_data": "train"}, "bidora"),
    "dora-two-phases": Arm({"method": "dora", "two_phases": True}, LOWER),
    "dora-at-bidora-rate": Arm({"method": "dora"}, "bidora"),
}

# {tenths of the examples that are held out: BiDoRA's arm}
AT_SPLIT = {n: "bidora" if n == 2 else f"bidora-{10 - n}:{n}" for n in range(1, 6)}
SPLITS = {
    name: Arm(BIDORA | {"val_fraction": n / 10}, "bidora")
    for n, name in AT_SPLIT.items()
    if name != "bidora"
}
CONTROLS |= SPLITS

TRACED = BIDORA | {"trace": True}
WRITTEN = TRACED | {"magnitude_axis": "column"}
DIFFERENCE = {"hypergradient": "identity_difference"}
CHANGES = {  # {what the published program does instead: its settings}
    "identity": DIFFERENCE,
    "all-weights": DIFFERENCE | {"all_weights": True},
    "noise": DIFFERENCE | {"noise": True},
    "network": {"network": True},
    "transposed": {"transposed": True, "magnitude_axis": "row"},  # its columns scale outputs
    "unscaled": {"alpha": 4.0},  # as the rank, so that s = 1
    "normal": {"init": "normal"},
    "unshuffled": {"shuffle": False},
    "decay": {"upper_weight_decay": 0.1},
}
M_FIXED = 1e-9  # the factor on upper_lr that leaves m at its start, W0's norms


def changed(*names):
    """The settings of the written algorithm with some of CHANGES."""
    settings = WRITTEN.copy()
    for name in names:
        settings |= CHANGES[name]
    if {"transposed", "normal"} <= set(names):  # A of the transposed layer is B of its weight
        settings["init"] = "normal_b"
    return settings


def all_but(name):
    """The settings of the published program without one of CHANGES."""
    settings = changed(*(other for other in CHANGES if other != name))
    if name == "identity":  # the product is over what trains
        del settings["hypergradient"], settings["all_weights"]
    return settings


# Where the whole network trains, the lower level has full fine-tuning's rate.
WHOLE = dict(rates="ft", upper_from="bidora")
PAPER = {"as-written": Arm(WRITTEN, "bidora")}
PAPER |= {f"written+{name}": Arm(changed(name), "bidora") for name in CHANGES}
PAPER |= {
    "written+normal-tuned": Arm(changed("normal"), {"lower_lr": 3e-4, "upper_lr": 1e-2}),
    "written+network": Arm(changed("network"), **WHOLE),  # in place of BiDoRA's rates
    "written+network-m-fixed": Arm(changed("network"), **WHOLE, upper_factor=M_FIXED),
    "as-published": Arm(changed(*CHANGES), **WHOLE),
    "as-published-script-rates": Arm(
        changed(*CHANGES) | {"lower_lr": 5e-5, "upper_lr": 5e-5}, rates={}
    ),
}
PUBLISHED = {f"published-{name}": Arm(all_but(name), **WHOLE) for name in CHANGES}
PUBLISHED |= {
    "published-network": Arm(all_but("network"), "bidora"),  # in place of fine-tuning's rates
    "published-m-fixed": Arm(changed(*CHANGES), **WHOLE, upper_factor=M_FIXED),
}

NETWORK = ("written+network", "written+network-m-fixed", "as-published", "published-m-fixed")
NETWORK += ("published-transposed", "published-normal", "as-published-script-rates")

ALONG = {  # the settings of each hypergradient
    "first-order": {"hypergradient": "first_order"},
    "identity": {"hypergradient": "identity"},
    "unrolled-adam": {"precondition": "adam"},
    "unrolled-5": {"hypergradient_steps": 5, "upper_every": 5},
    "first-order-5": {"hypergradient": "first_order", "upper_every": 5},
    "neumann-10": {"hypergradient": "neumann", "hypergradient_steps": 10},
    "cg-10": {"hypergradient": "conjugate_gradient", "hypergradient_steps": 10},
}
HYPERGRADIENTS = {name: Arm(TRACED | settings, "bidora") for name, settings in ALONG.items()}
for name, factor in (("m-fixed", M_FIXED), ("m-rate-0.1", 0.1), ("m-rate-10", 10.0)):
    HYPERGRADIENTS[name] = Arm(TRACED, "bidora", upper_factor=factor)

AT_RANK = {  # {method: {rank: its arm}}
    method: {r: method if r == MINILM["rank"] else f"{method}-r{r}" for r in (1, 2, 4, 8, 16, 32)}
    for method in ("lora", "dora", "bidora")
}
RANK = {
    name: Arm({"method": method, "rank": r, "alpha": 2.0 * r}, method)
    for method, at in AT_RANK.items()
    for r, name in at.items()
    if name != method
}

FACTORS = (0.1, 0.3, 1, 3, 10)
AT_RATES = {  # {factor on BiDoRA's lower rate: {factor on its upper rate: its arm}}
    low: {up: "bidora" if low == up == 1 else f"rates-{low}-{up}" for up in FACTORS}
    for low in FACTORS
}
AT_RATES[1] |= {up: f"m-rate-{up}" for up in (0.1, 10)}
SENSITIVITY = {
    name: Arm(BIDORA, "bidora", lower_factor=low, upper_factor=up)
    for low, at in AT_RATES.items()
    for up, name in at.items()
    if name not in ("bidora", *HYPERGRADIENTS)
}
for setting in ("upper_every", "upper_steps"):  # T1 and T2
    SENSITIVITY |= {f"{setting}-{n}": Arm(BIDORA | {setting: n}, "bidora") for n in (2, 5)}

AT_ALPHA = {  # {method: {alpha: {factor on the method's rate: its arm}}}
    method: {
        a: {f: f"{method}-alpha-{a}-rate-{f}" if (a, f) != (8, 1) else method for f in (0.25, 1, 4)}
        for a in (2, 8, 32)
    }
    for method in ("lora", "dora")
}
ALPHA = {
    name: Arm({"method": method, "alpha": float(alpha)}, method, lower_factor=factor)
    for method, by_alpha in AT_ALPHA.items()
    for alpha, at in by_alpha.items()
    for factor, name in at.items()
    if name != method
}

MLP = {"magnitude_only": ".*[0-9].(intermediate|output).dense", "snapshots": 1}  # MiniLM's
RELATIVES = {
    "lora-plus": Arm({"method": "lora", "lora_plus": 16}, {"lower_lr": 1e-3}),
    "lora-orthogonal": Arm({"method": "lora", "init": "orthogonal"}, LOWER),
    "dora-granular": Arm({"method": "dora"} | MLP, LOWER),
    "bidora-granular": Arm(BIDORA | MLP, BOTH),
}
COST = {  # 3.92 times LoRA's time is what the paper's reviewers name
    "dora-same-time": Arm({"method": "dora"}, "dora", steps=1.5),
    "lora-same-time": Arm({"method": "lora"}, "lora", steps=1.8),
}

ARMS = METHODS | CONTROLS | PAPER | PUBLISHED | HYPERGRADIENTS | RANK | SENSITIVITY
ARMS |= RELATIVES | COST | ALPHA
COMPARED = ("bidora", "dora", "dora-two-phases", "lora", "bilora", "ft")
# bbc-topics is left out: all arms are within a point of each other there, and it takes longest
SOME = ("similarity", "movie-sentiment", "peptides")
GRIDS = {"others": {"lower_lr": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "upper_lr": (3e-3, 3e-2)}}
GRIDS |= {"ft": {"lower_lr": (7e-6, 2e-5, 6e-5)}}  # smaller, since it moves every weight
REVIEWS = ("movie-sentiment", "product-sentiment")
SMOLLM2 = dict(seeds=10, sign=1, grids=GRIDS, results="results", out_dir="out/smollm2")
REVIEWED = {"model": "smollm2-135m", "snapshots": 4}
CHOSEN = {"model": "smollm2-135m", "eval_before": False}  # an evaluation takes minutes
GROUPS = {
    "smollm2": Group(COMPARED, REVIEWS, sizes=("100", "400"), settings=REVIEWED, **SMOLLM2),
    "choices": Group(COMPARED[:4], ("social-iqa",), settings=CHOSEN, **SMOLLM2),
    "methods": Group(
        ("bidora", "dora", "lora", "bilora", "ft", "dora-two-phases"),
        ("similarity", "movie-sentiment", "bbc-topics", "movie-ratings", "peptides"),
        sizes=("100", "400"),
        sign=1,
    ),
    "controls": Group(("bidora", *CONTROLS), SOME, sign=1),
    "paper": Group((*PAPER, "bidora", "dora-two-phases", "ft"), SOME),
    "published": Group(("as-published", *PUBLISHED, "as-written", "ft"), SOME),
    "network": Group(("ft", *NETWORK), SOME),
    "hypergradients": Group(("bidora", *HYPERGRADIENTS, "dora-two-phases"), SOME),
    "rank": Group(("bidora", "dora", "lora", *RANK), SOME, sizes=("100", "400"), sign=1),
    "tiny": Group(
        ("bidora", "dora", "lora", "dora-two-phases"),
        ("movie-sentiment", "peptides", "movie-ratings", "similarity"),
        sizes=("16", "32", "64", "100", "200", "400", "1000"),
        sign=1,
    ),
    "sensitivity": Group(("bidora", "m-rate-0.1", "m-rate-10", *SENSITIVITY, *SPLITS), SOME),
    "alpha": Group(("lora", "dora", *ALPHA), SOME),
    "relatives": Group(("dora", "lora", "bidora", *relatives.METHODS, *RELATIVES), SOME),
    "cost": Group(("bidora", "dora", "lora", *COST), SOME, sign=1),
}
