"""What can be set, with each setting's default and meaning, and the combinations that make no sense."""

import dataclasses
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import bidora
import data
from hypergrad import HYPERGRADIENTS
from support import distributed, quantized, settings


@dataclass
class Config:
    # what is trained
    model: str = "smollm2-135m"  # a folder in Hugging Face's layout, a name on its hub (owner/name), smollm2-135m or tiny-random
    revision: str = ""  # a branch, tag or commit of a hub name
    method: str = "bidora"  # bidora, dora, lora, bilora, or ft (full fine-tuning: every weight)
    dtype: str = "auto"  # of the frozen base: float32, bfloat16, or auto: what a short measurement finds fast; adapters are fp32
    quantize: str = "auto"  # pack the base's linear layers by bitsandbytes: nf4, fp4, int8, or none (auto: none)
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    seed: int = 0  # of the sample drawn from a built-in data set, the split, the adapter's start and the order of the batches
    # data
    data: str = ""  # a built-in data set: movie-sentiment, product-sentiment, toy-sentiment
    train_file: str = ""  # your own data instead, JSONL (the formats are in data.py)
    val_file: str = ""  # JSONL; without it val_fraction of train_file is split off
    test_file: str = ""  # JSONL, only ever evaluated on
    train_size: int = 200  # examples taken from a built-in data set, train and val together
    test_size: int = (
        400  # examples of a built-in data set kept for the test, the same for every seed
    )
    val_fraction: float = 0.2  # the upper level's share of the training data; the paper splits 8:2
    block_size: int = (
        0  # most tokens an example may have; longer prompts are cut on the left; 0: 256
    )
    label_prompt: str = ""  # a classification question, with {text} and {labels}; empty: the data set's own, or a general one
    train_on_prompt: bool = False  # count the prompt in the loss too, not only the answer
    # the adapter
    rank: int = 8  # of the direction's update B·A; more rank, more to learn and to overfit
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the update's input; off while a hypergradient is computed
    target_modules: tuple = bidora.ALL_LINEAR  # the adapted layers
    magnitude_axis: str = "row"  # bidora, dora: one magnitude for each output row, as in PEFT, or for each input column, as in the papers
    lambda_kind: str = (
        "real"  # bilora: its pseudo singular values: real, softmax, or (approximately) binary
    )
    gram_weight: float = 0.0  # times the regulariser that keeps directions apart (bilora: makes B, A orthogonal), in the lower loss
    norm_grad: str = (
        "exact"  # exact, or detach: treat the norm as a constant in the backward pass, as PEFT does
    )
    # the budget: every method takes search_steps + retrain_steps lower-level steps
    search_steps: int = 12  # lower-level steps of BiDoRA's search phase
    retrain_steps: int = 54  # steps of BiDoRA's last phase, direction only, on train and val
    upper_every: int = 1  # lower-level steps (BiLoRA's T1) for each turn of the upper level
    upper_steps: int = 1  # upper-level steps a turn (BiLoRA's T2)
    batch_size: int = 4  # examples a step, at either level
    accumulate: int = 0  # parts that a lower-level step's batch is computed in: less memory, the same result; 0: 1
    lower_lr: float = 0.0  # AdamW's peak rate at the lower level; 0 takes 1e-3 for adapters, 2e-5 for ft, which moves every weight
    upper_lr: float = 1e-2  # AdamW's peak rate for the magnitude
    warmup: float = (
        0.1  # share of a phase in which the rates rise from 0; then they fall linearly to a tenth
    )
    optimizer: str = (
        "adamw"  # of both levels: adamw, or adamw8bit (bitsandbytes; keeps its moments in 8 bits)
    )
    weight_decay: float = 0.0  # AdamW's, lower level only
    grad_clip: float = 1.0  # largest gradient norm of each level
    final_init: str = "fresh"  # retrain from a fresh direction, as the paper does, or continue from the one that search found
    # the hypergradient (hypergrad.py)
    hypergradient: str = (
        "unrolled"  # unrolled (the paper's), first_order, neumann, conjugate_gradient
    )
    unroll_steps: int = 1  # unrolled: the last lower-level steps that are differentiated through, at most upper_every
    unroll_lr: float = 0.0  # unrolled: their rate; 0 takes lower_lr
    mode: str = (
        "exact"  # unrolled: exact (double backward) or finite_difference (noise in bfloat16)
    )
    terms: int = 3  # neumann: terms of the series
    neumann_alpha: float = (
        0.01  # neumann: its step, below 2 / (largest eigenvalue of the lower Hessian)
    )
    cg_iterations: int = 3  # conjugate_gradient: most iterations
    damping: float = 0.01  # conjugate_gradient: added to the Hessian's diagonal
    precondition: str = "none"  # adam: unrolled differentiates through AdamW's own update; the implicit ones use its second moments
    hvp_batch: int = 0  # examples whose second derivatives are in memory at once; 0: all, and one graph serves all products
    # speed and memory
    gradient_checkpointing: str = "auto"  # True: compute activations twice to keep fewer, for one more forward pass (auto: False)
    group_by_length: bool = False  # batches of rows of similar length: less padding (reviews have 15 to 40 %), but less random
    compile: bool = False  # torch.compile each block: worth its half a minute in runs of some hundred steps; not with second derivatives
    fsdp: bool = False  # under torchrun: share the frozen weights out over the processes (FSDP2), for a base larger than one device
    auto_hardware: bool = False  # let what is automatic or 0 in quantize, accumulate, gradient_checkpointing, block_size fit the memory
    # output
    snapshots: int = 0  # times a phase, the last step included, at which the weights' ΔM and ΔD are recorded (tools/analysis.py)
    out_dir: str = ""  # where the run is written; empty: out/<config's name>, and -<method> if --method is given
    overwrite: bool = False  # replace the files of an earlier run in out_dir
    resume: str = ""  # True: go on with the run in out_dir from its last checkpoint; a folder: with that run, into a new out_dir
    checkpoint_every: int = 100  # steps between checkpoints; there is one at each phase's end too
    eval_batch_size: int = 32  # examples a forward pass in evaluation
    eval_size: int = 400  # most examples of a part (train, val, test) that are evaluated, the same before and after


CHOICES = {
    "method": ("bidora", "dora", "lora", "bilora", "ft"),
    "magnitude_axis": ("row", "column"),
    "lambda_kind": tuple(bidora.LAMBDAS),
    "dtype": ("auto", "float32", "bfloat16"),
    "quantize": ("auto", "none", *quantized.KINDS),
    "optimizer": ("adamw", "adamw8bit"),
    "gradient_checkpointing": ("auto", "True", "False"),
    "data": ("", *data.BUILT_IN),
    "norm_grad": ("exact", "detach"),
    "final_init": ("fresh", "continue"),
    "hypergradient": tuple(HYPERGRADIENTS),
    "mode": ("exact", "finite_difference"),
    "precondition": ("none", "adam"),
}
BILEVEL = ("bidora", "bilora")
MAY_BE_ZERO = {
    "seed",
    "dropout",
    "weight_decay",
    "gram_weight",
    "warmup",
    "val_fraction",
    "lower_lr",
    "unroll_lr",
    "damping",
    "block_size",
    "accumulate",
    "hvp_batch",
    "search_steps",
    "retrain_steps",
    "snapshots",
}
HARMLESS = {
    "out_dir",
    "overwrite",
    "resume",
    "checkpoint_every",
    "eval_batch_size",
    "fsdp",
}  # may change when a run is resumed
BELOW_ONE = {"dropout", "val_fraction", "warmup"}


def read_config(arguments):
    """The Config of a command line; see settings.read. Raises ValueError or FileNotFoundError."""
    config, path = settings.read(Config, arguments)
    if path and not config.out_dir:
        method = (
            f"-{config.method}"
            if any(argument.startswith("--method=") for argument in arguments)
            else ""
        )
        config.out_dir = str(Path("out") / f"{path.stem}{method}")
    return config


def differences(config):
    """Whether the run takes finite differences of gradients."""
    return config.method in BILEVEL and (config.hypergradient, config.mode) == (
        "unrolled",
        "finite_difference",
    )


def second_order(config):
    """Whether the run differentiates gradients."""
    return (
        config.method in BILEVEL
        and config.hypergradient != "first_order"
        and not differences(config)
    )


def check(config):
    """Raise ValueError for a setting that makes no sense, before any work is done."""
    for name, choices in CHOICES.items():
        value = str(getattr(config, name))
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}" + settings.suggest(value, choices))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type in (int, float):
            zero = field.name in MAY_BE_ZERO
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                raise ValueError(
                    f"{field.name}={value} must be {'at least 0' if zero else 'positive'}"
                )
            if field.name in BELOW_ONE and value >= 1:
                raise ValueError(f"{field.name}={value} must be below 1")
    if config.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {config.device!r}: choose auto, cpu or cuda")
    try:
        torch.empty(1, device=None if config.device == "auto" else config.device)
    except (RuntimeError, AssertionError):  # torch raises the latter when it is built without CUDA
        raise ValueError(f"device={config.device} is not there: use device=cpu") from None
    if config.search_steps + config.retrain_steps == 0 or (
        config.method in BILEVEL and config.search_steps == 0
    ):
        raise ValueError(
            f"search_steps={config.search_steps}, retrain_steps={config.retrain_steps}: there is nothing to train"
        )
    if config.method in BILEVEL and config.upper_every > config.search_steps:
        raise ValueError(
            f"upper_every={config.upper_every} is more than search_steps={config.search_steps}: "
            f"the upper level would never take a step"
        )
    if config.hypergradient == "unrolled" and config.unroll_steps > config.upper_every:
        raise ValueError(
            f"unroll_steps={config.unroll_steps} is more than upper_every={config.upper_every}: an upper-level step can only "
            f"look back on the lower-level steps since the one before it"
        )
    if config.precondition == "adam" and config.optimizer == "adamw8bit":
        raise ValueError(
            "precondition=adam reads AdamW's moments, which adamw8bit keeps in 8 bits: use optimizer=adamw"
        )
    if config.accumulate > config.batch_size:
        raise ValueError(
            f"accumulate={config.accumulate} parts can't be made of batch_size={config.batch_size} examples"
        )
    if config.method in ("ft", "lora") and config.gram_weight:
        raise ValueError(
            f"gram_weight={config.gram_weight} regularises directions with a magnitude, or BiLoRA's factors; method={config.method} "
            f"has neither"
        )
    if config.method == "ft" and config.quantize not in ("auto", "none"):
        raise ValueError(
            f"method=ft trains the base's own weights, which quantize={config.quantize} packs into steps too coarse to "
            f"train: use an adapter (bidora, dora, lora), or quantize=none"
        )
    if config.block_size == 1:
        raise ValueError(
            f"block_size={config.block_size} must be at least 2: a token, and the one it predicts"
        )
    if not config.train_file and not config.data:
        raise ValueError(
            f"no data: give --train_file=yours.jsonl, or a built-in set with --data={'|'.join(data.BUILT_IN)}"
        )
    if (config.val_file or config.test_file) and not config.train_file:
        raise ValueError(
            "val_file and test_file go with train_file; a built-in data set brings its own"
        )
    if config.label_prompt and "{text}" not in config.label_prompt:
        raise ValueError(
            "label_prompt must contain {text}, the place where the example's text goes"
        )
    if config.method in BILEVEL and not config.val_file and config.val_fraction == 0:
        raise ValueError(
            "method=bidora needs validation data: its upper level learns the magnitude from examples that the lower "
            "level does not train on; give --val_file, or a val_fraction above 0 (the paper's is 0.2)"
        )
    if config.method == "ft" and config.dtype == "bfloat16":
        raise ValueError(
            "method=ft trains the weights themselves, and in bfloat16 small updates round to nothing: "
            "use dtype=float32"
        )
    if config.compile and second_order(config):
        raise ValueError(
            "compile=True: torch.compile takes no second derivatives, which this hypergradient needs: use hypergradient=first_order, "
            "mode=finite_difference, or compile=False"
        )
    if config.compile and config.quantize not in ("auto", "none"):
        raise ValueError(
            f"compile=True does not see into bitsandbytes' weights: use quantize=none, not {config.quantize}, or compile=False"
        )
    if (
        config.compile
        and config.device in ("auto", "cpu")
        and not torch.cuda.is_available()
        and not shutil.which(os.environ.get("CXX", "g++"))
    ):
        raise ValueError(
            "compile=True needs a C++ compiler on a CPU, and there is no g++: install one, or use compile=False"
        )
    if config.fsdp:
        if distributed.WORLD_SIZE == 1:
            raise ValueError(
                "fsdp=True shares a model out over processes, and there is one: start it by torchrun --nproc_per_node=2 (or more) train.py ..."
            )
        for is_set, what, instead in (
            (
                second_order(config),
                "takes no second derivatives, whose backward pass would find the weights given back",
                "hypergradient=first_order",
            ),
            (
                config.method == "ft",
                "shares out frozen weights only, and method=ft trains them",
                "an adapter (bidora, dora, lora)",
            ),
            (
                config.quantize not in ("auto", "none"),
                "can't cut bitsandbytes' packed weights",
                "quantize=none",
            ),
            (
                config.gram_weight,
                "has no whole weights for gram_weight's regulariser",
                "gram_weight=0",
            ),
            (
                config.snapshots,
                "has no whole weights for ΔM and ΔD",
                "snapshots=0, and python -m tools.analysis --tuned= on the finished run",
            ),
            (config.compile, "is not compiled here", "compile=False"),
        ):
            if is_set:
                raise ValueError(f"fsdp=True {what}: use {instead}")
    if differences(config) and config.dtype == "bfloat16":
        raise ValueError(
            "mode=finite_difference is rounding noise in bfloat16: use mode=exact, or dtype=float32"
        )
