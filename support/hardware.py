"""
What fits: a run's memory by formula, and the settings that --auto_hardware=True picks by it.

Bytes, with h, q, kv, f the widths of the residual stream, queries, keys and feed-forward layer, and L layers:
    weights        one dtype each; linear layers in nf4 0.52, in int8 1 a weight; embeddings, norms and head never quantised
    adapters       24 for each trained number (value, gradient, AdamW's two moments, two copies to go back to), 18 with adamw8bit
    activations    1.25 · L · (6h + 4q + 4kv + 6f) numbers a token; LoRA and ft, which keep no layer's output: (4h + 3q + 3kv + 4f)
    second order   4 times that, and 24 · L · heads · length a token: attention without the fused kernel
    logits         12 for each number, where a label asks for them; over a frozen head of 128 labels at a time (loss.py)
Several devices, N (distributed.py): each sends the trained numbers' gradients once around, 2 (N - 1)/N of 4 bytes each; with --fsdp=True it keeps 1/N of
the weights, with a block and the embeddings or the head whole at a time, and sends its share to the others twice a step, (N - 1)/N of all weights' bytes each time.
The factors were measured on SmolLM2-135M on a CPU (float32 and bfloat16, 64 to 512 tokens); tests hold them to within 40 %.
"""

import itertools
import math
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from support.kernels import ROWS


def peak_memory(device):
    """Peak memory so far, in GB: allocated on a GPU; of the process on a CPU (0 on Windows, which keeps no such count)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage's count would include the parent process's
        return next(
            int(line.split()[1]) * 1024 / 1e9
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    if platform.system() == "Windows":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def free_memory(device):
    """Memory that a run may take, in bytes; of a CPU, what the system has available, or the container allows, or None if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():
        return None
    free = next(
        int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(
            free, int(limit.read_text()) - int((limit.parent / "memory.current").read_text())
        )
    return free


def fast_dtype(device):
    """float32 or bfloat16, whichever the device is fast in, and in words, why."""
    if device.startswith("cuda"):
        supported = torch.cuda.is_bf16_supported()
        return (
            (torch.bfloat16, "the GPU supports it")
            if supported
            else (torch.float32, "the GPU has no bfloat16")
        )
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - start)
        seconds[dtype] = statistics.median(times[1:])
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    return (
        torch.bfloat16 if ratio > 1.5 else torch.float32,
        f"a bfloat16 product runs at {ratio:.1f} × float32's speed here",
    )


@dataclass
class Need:
    """Bytes that a run takes, part by part."""

    weights: float
    adapters: float
    activations: float  # at the step that takes most

    @property
    def total(self):
        return self.weights + self.adapters + self.activations


def linear_shapes(c):
    """The (out, in) of a block's seven linear layers."""
    h, f, q, kv = (
        c.hidden_size,
        c.intermediate_size,
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
    )
    return [(q, h), (kv, h), (kv, h), (h, q), (f, h), (f, h), (h, f)]


def score_bytes(c, length):
    """Bytes that second derivatives keep of attention's scores, a row of `length` tokens: there is no fused kernel for them."""
    return 24 * c.num_hidden_layers * c.num_attention_heads * length**2


def need(
    c,
    method,
    itemsize,
    length,
    batch_size,
    hvp_batch=0,
    accumulate=1,
    quantize="none",
    gradient_checkpointing=False,
    rank=8,
    optimizer="adamw",
    asked=1,
):
    """
    The Need of training a model (a ModelConfig) by the file's formula, all seven linear layers adapted.

    itemsize: bytes of the base's dtype; length: tokens a row; asked: labels a row.
    """
    h, f, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = linear_shapes(c)
    linears = L * sum(out * into for out, into in shapes)
    others = c.vocab_size * h * (1 if c.tie_word_embeddings else 2)
    linear_bytes = {"none": itemsize, "int8": 1, "nf4": 0.52, "fp4": 0.52}[quantize]
    trained = (
        linears + others
        if method == "ft"
        else L
        * sum(rank * (out + into) + (method in ("dora", "bidora")) * out for out, into in shapes)
    )
    kept = (
        (4 * h + 3 * q + 3 * kv + 4 * f)
        if method in ("lora", "bilora", "ft")
        else (6 * h + 4 * q + 4 * kv + 6 * f)
    )
    layer = 1.25 * kept * itemsize  # bytes a token

    def plain(rows):
        through = L * h * itemsize + 6 * layer if gradient_checkpointing else L * layer
        return rows * length * through + 12 * c.vocab_size * (
            rows * asked if method == "ft" else min(rows * asked, ROWS)
        )

    activations = plain(math.ceil(batch_size / accumulate))
    if method in ("bidora", "bilora"):
        second = (4 * L * layer * length + score_bytes(c, length)) * (
            0.75 if gradient_checkpointing else 1
        )
        activations = max(
            activations,
            (hvp_batch or math.ceil(batch_size / accumulate))
            * (second + 12 * asked * c.vocab_size),
        )
    return Need(
        linears * linear_bytes + others * itemsize,
        trained * (18 if optimizer == "adamw8bit" else 24),
        activations,
    )


def sent(c, method, devices, itemsize=2, rank=8, fsdp=False):
    """Bytes that each of several devices sends in a training step, by the file's formula."""
    whole = need(c, method, itemsize, 1, 1, rank=rank)
    ring = (devices - 1) / devices
    return ring * (2 * 4 * whole.adapters / 24 + (2 * whole.weights if fsdp else 0))


def choose(c, config, itemsize, longest, asked, free, shortest=2):
    """
    What --auto_hardware=True picks: (a dict of settings, lines that say why).

    The rule: of all choices whose formula fits in 80 % of the free memory, the one that gives up least. First a step's gradient is
    taken in more parts (the same result), then activations are computed twice (one more forward pass), then the base is quantised
    (other weights), then rows are cut shorter (less text). What the user has set is not touched; neither is batch_size, so that a
    run has the same result on any machine.

    c: ModelConfig; config: a train.Config; longest: tokens of the longest example; asked: its labels; free: bytes; shortest: the
    least block_size that the data's answers allow.
    """
    block = min(c.max_position_embeddings, max(128, shortest, 64 * math.ceil(longest / 64)))
    blocks = (
        [config.block_size]
        if config.block_size
        else [max(min(block, max(128, shortest)), block >> i) for i in range(8)]
    )
    kinds = (
        [config.quantize]
        if config.quantize != "auto"
        else ["none"]
        if config.method == "ft"
        else ["none", "int8", "nf4"]
    )
    checkpointing = (
        [False, True]
        if config.gradient_checkpointing == "auto"
        else [config.gradient_checkpointing == "True"]
    )
    parts = (
        [config.accumulate]
        if config.accumulate
        else [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    )

    def needed(choice):
        block, kind, again, accumulate = choice
        return need(
            c,
            config.method,
            itemsize,
            min(block, longest),
            config.batch_size,
            config.hvp_batch,
            accumulate,
            kind,
            again,
            config.rank,
            config.optimizer,
            min(asked, block),
        )

    choices = list(
        itertools.product(blocks, kinds, checkpointing, parts)
    )  # the last changes fastest, so it is given up first
    best = next((choice for choice in choices if needed(choice).total < 0.8 * free), choices[-1])
    takes = needed(best)
    picked = dict(zip(("block_size", "quantize", "gradient_checkpointing", "accumulate"), best))
    picked["gradient_checkpointing"] = str(picked["gradient_checkpointing"])
    fits = "fits" if takes.total < 0.8 * free else "does not fit, and nothing leaner is left to try"
    lines = [
        f"auto_hardware: {free / 1e9:.1f} GB free; about {takes.total / 1e9:.1f} GB needed ({takes.weights / 1e9:.1f} weights, "
        f"{takes.adapters / 1e9:.1f} training state, {takes.activations / 1e9:.1f} activations), which {fits} in 80 % of it",
        f"auto_hardware: {', '.join(f'{name}={value}' for name, value in picked.items())}",
    ]
    return picked, lines
