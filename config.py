"""The settings of a run: defaults, meanings, and which combinations are refused."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import bidora
import bilevel
from bidora import METHODS
from bilevel import HYPERGRADIENTS
from support.run import rules, settings
from support.weights import quantized
from support.weights.pretrained import base_of
from tasks import TASKS


@dataclass
class Config:
    # the model and the method (most people set model and method)
    model: str = "smollm2-135m"  # a folder, owner/name or owner/name@revision on the hub, or the
    #: built-in smollm2-135m, minilm (an encoder) or tiny-random
    method: str = "bidora"  # bidora, dora, lora, bilora, bilora_softmax, bilora_binary, ft (full)
    dtype: str = "auto"  # of the base: float32, bfloat16, or auto (whichever is fast here)
    quantize: str = "auto"  # pack the base's linear layers: nf4, fp4, int8, or none (auto: none)
    device: str = "auto"  # cpu, cuda, auto (cuda if there is one), or mps (untested)
    seed: int = 0  # of the data sample, the split, the adapter's initial values and the batches

    # the data (most people set train_file, or data)
    data: str = ""  # a built-in data set, such as movie-sentiment (docs/using.md names all); a
    #: folder in an official layout (GLUE, CoNLL-2003, E2E, Reuters); owner/name:config on the hub
    train_file: str = ""  # or your own data: a JSONL, CSV or parquet file (docs/using.md: formats)
    text_column: str = ""  # the file's name for "text"
    text_b_column: str = ""  # and for "text_b", a pair's second text
    label_column: str = ""  # and for "label" (or what the task learns: score, labels, tags)
    val_file: str = ""  # without it, val_fraction of train_file is split off
    test_file: str = ""  # used for evaluation only; also instead of a data set's own test
    test_fraction: float = 0.0  # of train_file, if test_file is missing; the same for every seed
    train_size: int = 0  # drawn for train and val; 0: all, or 200 of a built-in set (at most half)
    test_size: int = 0  # tested, the same for every seed; 0: all, or 400 of a built-in set (half)
    tune_size: int = 0  # test on other examples of a built-in set instead, to choose settings on
    val_fraction: float = 0.2  # the upper level's share of the training data; the paper's is 0.2;
    #: 0: the data set's own validation set, which otherwise is the test set where there is no other
    task: str = "auto"  # label_words, language_model, generation, multiple_choice, classification,
    #: multi_label, regression, tagging; auto: what fits the examples (the last four train a head)
    block_size: int = 0  # most tokens of an example, others are cut; 0: 256, or the model's limit
    held_fraction: float = 0.0  # share of train held out from all, for eval_every, keep, patience
    label_prompt: str = ""  # a question with {text}, and {labels} if wanted; empty: the data set's
    train_on_prompt: bool = False  # count the prompt in the loss too, not only the answer

    # generated texts, of task=generation
    max_new_tokens: int = 64  # most tokens of a text
    num_beams: int = 1  # beams of the search; 1 always takes the likeliest token
    length_penalty: float = 1.0  # a text's log-probability is divided by its length to this power
    no_repeat_ngram_size: int = 0  # no sequence of so many tokens occurs twice in a text; 0: off

    # the adapter (most people set rank)
    adapter: str = ""  # start from an adapter's folder: it names the base, and has its own sizes
    rank: int = 8  # of the update B·A; a higher rank can learn more, and overfit more
    alpha: float = 16.0  # the update is scaled by alpha / rank
    rank_pattern: dict = field(default_factory=dict)  # {"down_proj": 16}: the first match counts
    alpha_pattern: dict = field(default_factory=dict)  # likewise; PEFT sorts both when it saves
    dropout: float = 0.0  # on the update's input; off in the new passes of a hypergradient
    target_modules: tuple = bidora.ALL_LINEAR  # the adapted layers: names, patterns or all-linear;
    #: by default all linear layers of the blocks (of BERT query, key, value and three dense ones)
    magnitude_only: tuple = ()  # layers, as in target_modules, whose magnitude alone is trained
    magnitude_axis: str = "row"  # a magnitude per output (row, PEFT) or per input (column, papers)
    init: str = "kaiming"  # of A, B = 0: kaiming (LoRA's), normal, orthogonal; normal_b: of B
    norm_grad: str = "exact"  # exact, or detach: a constant norm in the backward pass, as in PEFT
    gram_weight: float = 0.0  # weight of a regulariser in the lower loss: it keeps directions apart

    # the budget, of every method: search_steps + retrain_steps (most people set both, and lower_lr)
    search_steps: int = 12  # lower-level steps of the search phase
    retrain_steps: int = 54  # steps of the final phase: direction only, on train + val
    epochs: float = 0.0  # passes over train + val of all phases together, instead of these steps
    batch_size: int = 4  # examples per step, at either level
    micro_batch_size: int = 0  # examples in memory at once: fewer take less, with the same result;
    #: 0: the whole batch
    lower_lr: float = 0.0  # AdamW's peak learning rate, lower level; 0 means 1e-3, or 2e-5 for ft
    lora_plus: float = 1.0  # LoRA+ (arXiv 2402.12354): B's learning rate is so many times A's
    upper_lr: float = 1e-2  # AdamW's peak learning rate, upper level
    retrain_lr: float = 0.0  # AdamW's peak learning rate in the final phase; 0 means lower_lr
    lr_floor: float = 0.1  # each learning rate falls to this share of its peak
    weight_decay: float = 0.0  # AdamW's, lower level
    upper_weight_decay: float = 0.0  # AdamW's, upper level
    adam_beta2: float = 0.999  # AdamW's, both levels
    grad_clip: float = 1.0  # the norm to which each level's gradient is clipped
    optimizer: str = "adamw"  # of both levels: adamw, or adamw8bit (bitsandbytes, 8-bit moments)
    final_init: str = "fresh"  # retrain from a fresh direction, as in the paper, or continue
    two_phases: bool = False  # dora, as a control: train A, B, m; then fix m, retrain A, B afresh
    upper_data: str = "val"  # what the upper level learns from: val, or train, as a control

    # the hypergradient (hypergrad.py)
    hypergradient: str = "unrolled"  # unrolled (the paper's), first_order, finite_difference,
    #: neumann, conjugate_gradient or identity (the authors' program has identity_difference)
    hypergradient_steps: int = 0  # steps to differentiate through (unrolled, finite_difference),
    #: terms of the series (neumann) or iterations (conjugate_gradient); 0 means 1, 3 and 3
    hypergradient_lr: float = 0.0  # rate of these steps (0: lower_lr), or neumann's alpha (0: 0.01)
    damping: float = 0.01  # conjugate_gradient: added to the Hessian's diagonal
    precondition: str = "none"  # adam: unrolled differentiates through AdamW's own update; neumann
    #: and conjugate_gradient are preconditioned by its second moments
    upper_every: int = 1  # lower-level steps per round of the upper level (BiLoRA's T1)
    upper_steps: int = 1  # upper-level steps per round (BiLoRA's T2)

    # speed and memory
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    shuffle: bool = True  # the order of the batches is drawn anew each epoch, or once
    group_by_length: bool = False  # batches of similarly long rows: faster, but less random
    compile: bool = False  # torch.compile the blocks (half a minute); not with second derivatives
    fsdp: bool = False  # under torchrun: shard the frozen weights over the processes (FSDP2)
    auto_hardware: bool = False  # choose quantize, micro_batch_size, gradient_checkpointing and
    #: block_size, where they are at their defaults, so that the run fits in memory

    # output
    out_dir: str = ""  # the run's folder; empty: out/CONFIG, or out/CONFIG-METHOD with --method
    overwrite: bool = False  # replace an earlier run in out_dir
    resume: bool = False  # resume the run in out_dir from its last checkpoint
    checkpoint_every: int = 100  # steps between checkpoints; each phase also ends with one
    eval_size: int = 400  # most examples evaluated per split
    eval_every: int = 0  # steps between losses on held-out examples: held_fraction's, else test's
    keep: str = "last"  # weights of each phase: last, or best (the lowest held-out loss)
    patience: int = 0  # so many held-out losses without a lower one end a phase; 0: none do
    eval_before: bool = True  # evaluate the test examples before training, too
    snapshots: int = 0  # how often per phase the weights' ΔM and ΔD are recorded


CHOICES = {
    **bidora.CHOICES,
    **bilevel.CHOICES,
    "dtype": ("auto", "float32", "bfloat16"),
    "quantize": ("auto", "none", *quantized.KINDS),
    "final_init": ("fresh", "continue"),
    "keep": ("last", "best"),
    "upper_data": ("val", "train"),
    "task": ("auto", *TASKS),
}
MAY_CHANGE = {"out_dir", "overwrite", "resume", "checkpoint_every", "fsdp"}  # when a run is resumed


def read_config(arguments, kind=Config):
    """The Config of a command line, or a `kind` of it. Raises ValueError or FileNotFoundError."""
    config, path, given = settings.read(kind, arguments, rules.OTHER_NAMES)
    overrides = "train_file" in given and "data" not in given
    if config.data and config.train_file and not overrides:
        raise ValueError("data and train_file are two sources: choose one")
    if config.train_file and "test_size" in given:
        whole = "files are taken whole; give test examples as test_file"
        raise ValueError(f"test_size={config.test_size}: {whole}")
    if config.adapter and config.model == Config.model:
        config.model = base_of(Path(config.adapter))
    if path and not config.out_dir:
        suffix = f"-{config.method}" * ("method" in given)
        config.out_dir = str(Path("out") / (path.stem + suffix))
    return config


def is_bilevel(config):
    return config.method in METHODS and METHODS[config.method].upper is not None


def second_order(config):
    """Whether the run needs second derivatives."""
    return is_bilevel(config) and HYPERGRADIENTS[config.hypergradient].second_order


def resolve(config, shape):
    """config with automatic settings chosen. shape: from tasks.read_shape. Raises ValueError."""
    positions, targets = shape.max_position_embeddings, config.target_modules
    if targets == bidora.ALL_LINEAR and not config.adapter:
        targets = getattr(shape, "targets", targets)
    block_size = config.block_size or min(256, positions)
    if block_size > positions:
        more = f"block_size={block_size} is more than the {positions} positions"
        raise ValueError(f"{more} of {config.model}")
    return dataclasses.replace(
        config,
        lower_lr=config.lower_lr or (2e-5 if config.method == "ft" else 1e-3),
        quantize="none" if config.quantize == "auto" else config.quantize,
        target_modules=targets,
        block_size=block_size,
    )


def check(config):
    """Raise ValueError for settings that make no sense, before any work is done."""
    rules.refuse(rules.values(config, CHOICES | {"method": (*METHODS, "ft")}))
    two, coarse = is_bilevel(config), config.dtype == "bfloat16"
    budget = rules.budget(config, two, HYPERGRADIENTS[config.hypergradient])
    rules.refuse(rules.device(config), budget, rules.data(config, two))
    used = config.hypergradient if two else "first_order"  # else: unused
    bilevel.check_choices(used, config.optimizer, config.precondition, coarse)
    combined, second = rules.combinations(config, METHODS.get(config.method)), second_order(config)
    rules.refuse(combined, rules.compiled(config, second), rules.sharded(config, second))
