"""
A formula for a run's memory, by which --auto_hardware=True chooses settings. In bytes, for L layers
with widths h (hidden), q (queries), kv (keys, values) and f (feed-forward):

    weights        per number its dtype's size; in linear layers nf4 0.52, int8 1; embeddings, norms
                   and head are never quantised
    training state per trained number 24 (value, gradient, AdamW's two moments, two copies); of ft
                   12: no copies, and its values are the weights; with adamw8bit 6 less
    activations    per token 1.25 · L · (6h + 4q + 4kv + 6f) numbers; for LoRA and ft, which keep no
                   layer's output, 1.25 · L · (4h + 3q + 3kv + 4f)
    second order   4 times that, and per token 24 · L · heads · length, since attention is not
                   fused; beyond 256 tokens, scores of one layer and 256 tokens at a time
    checkpointed   per token L · h numbers and 6 blocks' 1.25 · (…); in second order 2 · L · h
                   numbers, 5 blocks' 1.25 · (…) and the scores of one layer
    logits         per logit at supervised positions 12; with a frozen head, 128 positions at a time

Each of N devices sends 2 (N - 1)/N of 4 bytes per trained number. With --fsdp=True it keeps 1/N of
the weights, a block, and embeddings or head, and sends (N - 1)/N of all weights twice per step.

Measured on SmolLM2-135M on a CPU, of 64 to 512 tokens; tests hold the formula to within 40 %.
"""

import contextlib
import dataclasses
import itertools
import math
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.fast.kernels import QUERIES, ROWS
from support.run import distributed

PROC = Path("/proc")  # where Linux describes the machine
UNITS = {  # a processor's flags (the last one ARM's): what they stand for
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "bf16 products",
    "amx_bf16": "AMX (bf16 matrices)",
    "bf16": "bf16 instructions",
}


def choose_device(name):
    """The device that a setting names; for auto, cuda if there is one, else cpu."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def attention(device):
    """A context in which attention is computed by plain products where fused ones are untried."""
    return sdpa_kernel(SDPBackend.MATH) if device == "mps" else contextlib.nullcontext()


def proc(path, name):
    """The text after "name:" in a file in PROC, or "". name: a pattern."""
    path = PROC / path
    line = path.exists() and re.search(rf"^(?:{name})\s*:\s*(.*)", path.read_text(), re.MULTILINE)
    return line[1] if line else ""


def peak_memory(device):
    """Peak memory so far in GB, allocated on a GPU, or the process's on a CPU (0 if unknown)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if peak := proc("self/status", "VmHWM"):  # getrusage's would include the parent process's
        return int(peak.split()[0]) * 1024 / 1e9
    if platform.system() == "Windows":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def vector_units():
    """The CPU's vector units, {flag of UNITS: words}; {} if the system does not name them."""
    flags = proc("cpuinfo", "flags|Features").split()
    return {flag: words for flag, words in UNITS.items() if flag in flags}


def processor():
    """The CPU in words: its name, torch's threads, and its vector units."""
    name = proc("cpuinfo", "model name") or platform.processor() or platform.machine()
    return ", ".join((name, f"{torch.get_num_threads()} threads", *vector_units().values()))


def free_memory(device):
    """Bytes that this process may still take: its share of the machine or container; or None."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    available, limit = proc("meminfo", "MemAvailable"), Path("/sys/fs/cgroup/memory.max")
    if not available:
        return None
    free = int(available.split()[0]) * 1024
    if limit.exists() and limit.read_text().strip().isdigit():
        used = int((limit.parent / "memory.current").read_text())
        free = min(free, int(limit.read_text()) - used)
    return free // distributed.LOCAL_WORLD_SIZE


def fast_dtype(device):
    """(float32 or bfloat16, whichever is fast on the device; the reason in words)."""
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU supports it"
        return torch.float32, "the GPU has no bfloat16, or only emulates it"
    if units := [words for flag, words in vector_units().items() if "bf16" in flag]:
        return torch.bfloat16, f"the CPU has {' and '.join(units)}"
    return torch.float32, "the processor names no bf16 instructions"


def choose_dtype(config, device, precise):
    """(the name of the base's dtype, the reason). precise: the hypergradient needs float32."""
    if config.dtype != "auto":
        return config.dtype, "as set"
    if config.method == "ft":
        return "float32", "full fine-tuning needs it"
    if precise:
        return "float32", "finite differences need it"
    dtype, reason = distributed.from_first(lambda: fast_dtype(device))
    return str(dtype).removeprefix("torch."), reason


@dataclass
class Need:
    """A run's memory in bytes by this file's formula, and how many numbers it trains."""

    weights: float
    state: float
    activations: float  # of the step that needs most
    collected: float  # the most weights that a device holds whole at once, with --fsdp=True
    trained: int

    @property
    def total(self):
        return self.weights + self.state + self.activations

    def held(self, devices):
        """Bytes on each of several devices, with --fsdp=True."""
        return self.total - self.weights * (1 - 1 / devices) + self.collected

    def sent(self, devices, fsdp=False):
        """Bytes that each of several devices sends per training step."""
        return (devices - 1) / devices * (2 * 4 * self.trained + 2 * self.weights * fsdp)


def need(c, method, itemsize, length, config, supervised=1):
    """
    The Need of training a model with all seven linear layers adapted. c: its ModelConfig; method:
    of bidora.METHODS, None for ft; itemsize: of the base's dtype; length, supervised: per row.
    """
    h, f, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = [(q, h), (kv, h), (kv, h), (h, q), (f, h), (f, h), (h, f)]  # (out, in)
    magnitude = method is not None and method.magnitude
    recomputes = config.gradient_checkpointing

    block, embeddings = sum(out * into for out, into in shapes), c.vocab_size * h
    others = embeddings * (1 if c.tie_word_embeddings else 2)
    linear_bytes = {"int8": 1, "nf4": 0.52, "fp4": 0.52}.get(config.quantize, itemsize)
    weights = L * block * linear_bytes + others * itemsize
    trained = L * sum(config.rank * (out + into) + magnitude * out for out, into in shapes)
    if method is None:
        trained = L * block + others
    per_number = 12 if method is None else 24
    state = trained * (per_number - 6 * (config.optimizer == "adamw8bit"))

    kept = 6 * h + 4 * q + 4 * kv + 6 * f if magnitude else 4 * h + 3 * q + 3 * kv + 4 * f
    layer = 1.25 * kept * itemsize  # bytes per token
    through = L * h * itemsize + 2 * layer if recomputes else L * layer
    rows = config.micro_batch_size or config.batch_size
    positions = rows * supervised if method is None else min(rows * supervised, ROWS)
    logits = 12 * c.vocab_size * positions
    activations = rows * length * through + logits
    if method is not None and method.upper:
        scores = 24 * c.num_attention_heads * min(length, QUERIES) * length  # of a layer
        if recomputes:
            second = (2 * L * h * itemsize + 5 * layer) * length + scores
        else:
            second = 4 * L * layer * length + (L if length <= QUERIES else 1) * scores
        activations = max(activations, rows * second + logits)
    return Need(weights, state, activations, (block + embeddings) * itemsize, trained)


def choose(c, config, method, itemsize, data, free):
    """
    (a dict of settings, lines that give the reason): the first choice that fits into 80 % of the
    free bytes, or the leanest. c, method: as in `need`. data: {"longest": tokens of the longest
    row, "supervised": most positions in a row, "shortest": least block_size that cuts no answer}.
    """
    floor, batch = max(128, data["shortest"]), config.batch_size
    most = min(c.max_position_embeddings, max(floor, 64 * math.ceil(data["longest"] / 64)))
    packs = not (method is None or config.fsdp or config.compile)
    options = {  # those that the user set stay
        "block_size": [max(min(most, floor), most >> i) for i in range(8)],
        "quantize": ["none", "int8", "nf4"] if packs else ["none"],
        "gradient_checkpointing": [False, True],
        "micro_batch_size": [batch // n for n in range(1, batch + 1) if batch % n == 0],
    }
    for name in options:
        if getattr(config, name) != getattr(type(config), name):
            options[name] = [getattr(config, name)]

    # The last setting varies fastest. First, micro-batches shrink, with the same result. Then
    # activations are recomputed, by one more forward pass. Then the base is packed, which changes
    # its weights; last, rows are cut.
    for values in itertools.product(*options.values()):
        best = dict(zip(options, values))
        length, supervised = (min(best["block_size"], data[n]) for n in ("longest", "supervised"))
        takes = need(c, method, itemsize, length, dataclasses.replace(config, **best), supervised)
        if fits := takes.total < 0.8 * free:
            break
    not_fit = "does not fit in 80 % of it, and nothing leaner is left to try"
    return best, [
        f"auto_hardware: {free / 1e9:.1f} GB free; about {takes.total / 1e9:.1f} GB needed "
        f"({takes.weights / 1e9:.1f} weights, {takes.state / 1e9:.1f} training state, "
        f"{takes.activations / 1e9:.1f} activations), which "
        f"{'fits in 80 % of it' if fits else not_fit}",
        f"auto_hardware: {', '.join(f'{name}={value}' for name, value in best.items())}",
    ]


def fit_memory(config, method, device, dtype, c, encode):
    """config with the settings of `choose`. encode: block_size -> (splits of rows, number cut)."""
    free = free_memory(device)
    if free is None:
        raise ValueError("auto_hardware=True: this system does not say how much memory is free")
    free = -distributed.highest(-free)  # the least, so that all processes choose alike

    splits, _ = encode(config.block_size or c.max_position_embeddings)
    rows = [row for split in splits.values() for row in split]
    supervised = max(sum(label != -100 for label in row.labels) for row in rows)
    # A row with unsupervised positions has an answer, which is never cut. Plain text may be cut.
    answers = any(label == -100 for row in rows for label in row.labels[1:])
    data = {
        "longest": max(len(row.labels) for row in rows),
        "supervised": supervised,
        "shortest": supervised + 1 if answers else 2,
    }
    picked, lines = choose(c, config, method, getattr(torch, dtype).itemsize, data, free)
    print(*lines, sep="\n")
    return dataclasses.replace(config, **picked)
