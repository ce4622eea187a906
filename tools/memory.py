"""
The memory that training takes, by the formulas in support/run/hardware.py, for one or many devices.

    python -m tools.memory                                        Qwen 2.5, from 0.5B to 32B
    python -m tools.memory --model=path/to/a/folder --rank=64     another model, other settings
    python -m tools.memory --devices=8,64                         what each device holds and sends
"""

import itertools
import sys
from dataclasses import dataclass, replace

from bidora import METHODS
from config import Config
from model import ModelConfig
from support.run import settings
from support.run.files import read_json
from support.run.hardware import need
from support.weights.pretrained import find_model

# The values of the published config.json files, in the order of NAMES
NAMES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "vocab_size tie_word_embeddings model_type"
).split()
QWEN25 = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True, "qwen2"),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True, "qwen2"),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False, "qwen2"),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False, "qwen2"),
    "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 152064, False, "qwen2"),
}
LLAMA2 = {
    "LLaMA 2 7B": (4096, 11008, 32, 32, 32, 32000, False, "llama"),
    "LLaMA 2 70B": (8192, 28672, 80, 64, 8, 32000, False, "llama"),
}


@dataclass
class Memory:
    # what the table is made for
    model: str = ""  # a folder, hub name or built-in; empty: the sizes of Qwen 2.5
    rank: int = 8  # of the adapters, in all seven linear layers
    length: int = 512  # tokens a row
    batch_size: int = 4  # rows a step
    gradient_checkpointing: bool = True  # keep one activation a block, compute the others again
    devices: tuple = ()  # a table over these numbers of devices, for LLaMA 2 or the model


def models_of(memory):
    """{name: ModelConfig} of the models in the table. Raises ValueError or OSError."""
    if memory.model:
        configs = {memory.model: read_json(find_model(memory.model) / "config.json")}
    else:
        published = LLAMA2 if memory.devices else QWEN25
        configs = {name: dict(zip(NAMES, values)) for name, values in published.items()}
    return {name: ModelConfig.from_hf(config) for name, config in configs.items()}


def print_devices(models, memory, config):
    """Print a table over numbers of devices: what each holds and sends, also with --fsdp=True."""
    print(
        "computed, not measured: GB that each device holds, and sends a step (dora, bfloat16, "
        f"rank {memory.rank}, {memory.batch_size} rows of {memory.length} tokens a device)\n\n"
        f"{'':14}{'devices':>8}{'holds':>16}{'sends':>9}{'--fsdp=True holds':>20}{'sends':>9}"
    )
    for name, c in models.items():
        n = need(c, METHODS["dora"], 2, memory.length, config)
        for devices in map(int, memory.devices):
            print(
                f"{name:14}{devices:8}{n.total / 1e9:16.1f}{n.sent(devices) / 1e9:9.2f}"
                f"{n.held(devices) / 1e9:20.1f}{n.sent(devices, fsdp=True) / 1e9:9.1f}"
            )


def print_methods(models, memory, config):
    """Print a table over methods and packed weights: GB of weights, and in all."""
    options = {key: value for key, value in vars(memory).items() if key not in ("model", "devices")}
    shown = ", ".join(f"{key} {value}" for key, value in options.items())
    print(f"computed, not measured: GB of weights, and in all (bfloat16; {shown})\n")

    columns = list(itertools.product(("none", "int8", "nf4"), ("lora", "dora", "bidora")))
    print(f"{'':14}" + "".join(f"{f'{method} {packed}':>16}" for packed, method in columns))
    for name, c in models.items():
        line = f"{name:14}"
        for packed, method in columns:
            n = need(c, METHODS[method], 2, memory.length, replace(config, quantize=packed))
            line += f"{n.weights / 1e9:8.1f}{n.total / 1e9:8.1f}"
        print(line)
    print("\nbidora: exact second derivatives. --hypergradient=first_order takes as much as dora")


def estimate(memory):
    """Print the table over devices or the one over methods. Raises ValueError or OSError."""
    settings.at_least(memory, rank=1, length=1, batch_size=1)
    if not all(number.isdigit() and int(number) > 1 for number in memory.devices):
        raise ValueError(f"devices={','.join(memory.devices)} must be integers above 1")
    shared = ("rank", "batch_size", "gradient_checkpointing")
    config = Config(**{name: getattr(memory, name) for name in shared})
    (print_devices if memory.devices else print_methods)(models_of(memory), memory, config)


def main(arguments):
    return settings.program(arguments, Memory, estimate, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
