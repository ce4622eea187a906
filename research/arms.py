"""
What research/study.py compares: the arms, each a run's settings, and the groups of them.

    methods          the methods, and DoRA in BiDoRA's phases
    controls         BiDoRA with one of its parts changed: what it holds out, and how much
    paper            from BiDoRA as written to its published program, one change at a time
    published        and back: the program without (a minus) one of its changes
    network          full fine-tuning, and the arms that train the whole network
    hypergradients   BiDoRA along each of them, and at other rates of its magnitudes
"""

from dataclasses import dataclass

EFFECTS = ("transposed", "network", "all_weights", "noise")  # by research.published


@dataclass(frozen=True)
class Arm:
    settings: dict  # of train.py or, with EFFECTS, of research.published
    rates: dict | str  # the first guess of its rates, {} where settings has them, or the arm whose
    #: rates it takes
    upper_from: str = ""  # the arm whose upper_lr it takes, if another's
    upper_factor: float = 1.0  # on that upper_lr


@dataclass(frozen=True)
class Group:
    arms: tuple  # the first is compared with each of the others
    domains: tuple  # built-in data sets
    seeds: int = 20
    sizes: tuple = ("100",)  # training examples, train and val together
    sign: int = -1  # 1: of the first minus another, -1: of another minus the first


LOWER, BOTH = {"lower_lr": 3e-3}, {"lower_lr": 3e-3, "upper_lr": 1e-2}
BIDORA = {"method": "bidora"}
METHODS = {
    "bidora": Arm(BIDORA, BOTH),
    "dora": Arm({"method": "dora"}, LOWER),
    "lora": Arm({"method": "lora"}, LOWER),
    "bilora": Arm({"method": "bilora"}, BOTH),
    "ft": Arm({"method": "ft"}, {"lower_lr": 1e-4}),
}
CONTROLS = {
    "bidora-on-train": Arm(BIDORA | {"upper_data": "train"}, "bidora"),
    "dora-two-phases": Arm({"method": "dora", "two_phases": True}, LOWER),
    "dora-at-bidora-rate": Arm({"method": "dora"}, "bidora"),
    "bidora-9:1": Arm(BIDORA | {"val_fraction": 0.1}, "bidora"),
    "bidora-7:3": Arm(BIDORA | {"val_fraction": 0.3}, "bidora"),
    "bidora-6:4": Arm(BIDORA | {"val_fraction": 0.4}, "bidora"),
    "bidora-5:5": Arm(BIDORA | {"val_fraction": 0.5}, "bidora"),
}

TRACED = BIDORA | {"trace": True}
WRITTEN = TRACED | {"magnitude_axis": "column"}
DIFFERENCE = {"hypergradient": "identity_difference"}
CHANGES = {  # what the published program does instead
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

HYPERGRADIENTS = {
    "first-order": Arm(TRACED | {"hypergradient": "first_order"}, "bidora"),
    "identity": Arm(TRACED | {"hypergradient": "identity"}, "bidora"),
    "unrolled-adam": Arm(TRACED | {"precondition": "adam"}, "bidora"),
    "unrolled-5": Arm(TRACED | {"hypergradient_steps": 5, "upper_every": 5}, "bidora"),
    "first-order-5": Arm(TRACED | {"hypergradient": "first_order", "upper_every": 5}, "bidora"),
    "neumann-10": Arm(TRACED | {"hypergradient": "neumann", "hypergradient_steps": 10}, "bidora"),
    "cg-10": Arm(
        TRACED | {"hypergradient": "conjugate_gradient", "hypergradient_steps": 10}, "bidora"
    ),
    "m-fixed": Arm(TRACED, "bidora", upper_factor=M_FIXED),
    "m-rate-0.1": Arm(TRACED, "bidora", upper_factor=0.1),
    "m-rate-10": Arm(TRACED, "bidora", upper_factor=10.0),
}

ARMS = METHODS | CONTROLS | PAPER | PUBLISHED | HYPERGRADIENTS
# bbc-topics is left out: all arms are within a point of each other there, and it takes longest
SOME = ("similarity", "movie-sentiment", "peptides")
GROUPS = {
    "methods": Group(
        (*METHODS, "dora-two-phases"),
        ("similarity", "movie-sentiment", "bbc-topics", "movie-ratings", "peptides"),
        sizes=("100", "400"),
        sign=1,
    ),
    "controls": Group(("bidora", *CONTROLS), SOME, sign=1),
    "paper": Group((*PAPER, "bidora", "dora-two-phases", "ft"), SOME),
    "published": Group(("as-published", *PUBLISHED, "as-written", "ft"), SOME),
    "network": Group(("ft", *NETWORK), SOME),
    "hypergradients": Group(("bidora", *HYPERGRADIENTS, "dora-two-phases"), SOME),
}
