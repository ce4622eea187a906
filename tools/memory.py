"""
What a training run takes, by the formulas in support/hardware.py: tables over models, and over numbers of devices.

    python -m tools.memory                                          sizes of Qwen 2.5, from 0.5B to 32B
    python -m tools.memory --model=path/to/a/folder --rank=64       another model, other settings
    python -m tools.memory --devices=8,64                           memory of each of several devices, and what it sends
"""

import dataclasses
import sys
from dataclasses import dataclass

from model import ModelConfig
from support import settings
from support.files import read_json
from support.hardware import linear_shapes, need, sent
from support.pretrained import find_model

# Published config.json values: hidden_size, intermediate_size, layers, heads, key-value heads, head_dim, vocab_size, tied
QWEN25 = {
    "0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 128, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 128, 152064, False),
}
LLAMA2 = {
    "7B": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "70B": (8192, 28672, 80, 64, 8, 128, 32000, False),
}
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


def published(model_type, values):
    """The ModelConfig of one of QWEN25's or LLAMA2's values."""
    return ModelConfig.from_hf({"model_type": model_type, **dict(zip(NAMES, values))})


@dataclass
class Table:
    # what the table is made for
    model: str = ""  # a folder, hub name or built-in; empty: the sizes of Qwen 2.5
    rank: int = 8  # of the adapters, in all seven linear layers
    length: int = 512  # tokens a row
    batch_size: int = 4  # rows a step
    hvp_batch: int = 0  # rows differentiated twice at once (bidora); 0: all
    gradient_checkpointing: bool = False  # compute activations twice
    optimizer: str = "adamw"  # or adamw8bit
    devices: tuple = ()  # numbers of devices: what each of them holds and sends instead, for LLaMA 2 or the model


def spread(models, table):
    """Print, for each model and number of devices, what a device holds and sends: every device with the whole base, and with --fsdp=True."""
    print(
        f"computed, not measured: GB that each device holds, and sends a step (dora, bfloat16, rank {table.rank}, {table.batch_size} rows of {table.length} "
        f"tokens a device)\n\n{'':14}{'devices':>8}{'holds':>16}{'sends':>9}{'--fsdp=True holds':>20}{'sends':>9}"
    )
    for name, c in models.items():
        for devices in map(int, table.devices):
            n = need(
                c,
                "dora",
                2,
                table.length,
                table.batch_size,
                rank=table.rank,
                optimizer=table.optimizer,
                gradient_checkpointing=table.gradient_checkpointing,
            )
            whole = 2 * (
                sum(out * into for out, into in linear_shapes(c)) + c.vocab_size * c.hidden_size
            )  # at a time: a block, and the embeddings or the head
            shared = n.total - n.weights * (1 - 1 / devices) + whole
            print(
                f"{name:14}{devices:8}{n.total / 1e9:16.1f}{sent(c, 'dora', devices, 2, table.rank) / 1e9:9.2f}"
                f"{shared / 1e9:20.1f}{sent(c, 'dora', devices, 2, table.rank, True) / 1e9:9.1f}"
            )


def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip(), settings.help_text(Table), sep="\n\n")
        return 0
    try:
        table, _ = settings.read(Table, arguments)
        if (
            min(table.rank, table.length, table.batch_size) < 1
            or table.hvp_batch < 0
            or table.optimizer not in ("adamw", "adamw8bit")
        ):
            raise ValueError(
                "rank, length and batch_size must be positive, hvp_batch at least 0, optimizer adamw or adamw8bit"
            )
        if not all(number.isdigit() and int(number) > 1 for number in table.devices):
            raise ValueError(f"devices={','.join(table.devices)} must be whole numbers above 1")
        if table.model:
            models = {
                table.model: ModelConfig.from_hf(read_json(find_model(table.model) / "config.json"))
            }
        elif table.devices:
            models = {
                f"LLaMA 2 {size}": published("llama", values) for size, values in LLAMA2.items()
            }
        else:
            models = {
                f"Qwen2.5-{size}": published("qwen2", values) for size, values in QWEN25.items()
            }
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if table.devices:
        spread(models, table)
        return 0
    options = {
        field.name: getattr(table, field.name)
        for field in dataclasses.fields(table)
        if field.name not in ("model", "devices")
    }
    print(
        "computed, not measured: GB of weights, and in all (bfloat16; "
        f"{', '.join(f'{name} {value}' for name, value in options.items())})\n"
    )
    heads = [
        f"{method} {kind}"
        for kind in ("none", "int8", "nf4")
        for method in ("lora", "dora", "bidora")
    ]
    print(f"{'':14}" + "".join(f"{head:>16}" for head in heads))
    for name, c in models.items():
        needs = [
            need(c, method, 2, quantize=kind, **options) for method, kind in map(str.split, heads)
        ]
        print(f"{name:14}" + "".join(f"{n.weights / 1e9:8.1f}{n.total / 1e9:8.1f}" for n in needs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
