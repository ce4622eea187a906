"""
Fold a trained adapter into its base model: a plain Hugging Face folder, for transformers or vLLM.

    python -m tools.merge --adapter=out/small --out_dir=out/small-merged
    python -m tools.merge --adapter=out/small --out_dir=out/small-lora --lora_rank=64

The second writes the plain LoRA adapter that is nearest to the adapter, for servers that take LoRA
and refuse DoRA: the largest singular values of each weight's change (Eckart and Young, 1936).
"""

import math
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bidora import BiDoRALinear, adapter_layers, merge, save_adapter
from sample import load
from support.run import rules, settings
from support.run.files import write_json
from support.tasks.head_task import HeadTask
from support.weights.hf_format import own_dtype
from support.weights.pretrained import find_base, is_hub_name
from support.weights.quantized import KINDS, dequantize


@dataclass
class Merge:
    adapter: str = ""  # out_dir of a run, or any LoRA or DoRA adapter folder in PEFT's format
    out_dir: str = ""  # the folder to write; it must be new or empty
    model: str = ""  # the base model, a folder or owner/name@revision; empty: as in training
    lora_rank: int = 0  # above 0: write no model, but a plain LoRA adapter of this rank
    quantize: str = ""  # how to pack the base: nf4, fp4, int8 or none; empty: as in training, since
    #: an adapter fits the base that it was trained on


@torch.no_grad()
def as_lora(model, rank):
    """Replace a model's adapters by the nearest plain LoRA ones; print how far they are off."""
    lost, whole = [], []
    for name, layer in adapter_layers(model).items():
        change = layer.merged_weight() - dequantize(layer.weight, layer.lora_A.dtype)  # (out, in)
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        r = min(rank, len(S))
        sizes = layer.in_features, layer.out_features, r, r, 0.0  # s = 1
        lora = BiDoRALinear(*sizes, layer.bias is not None, "lora", linear=layer)
        lora.lora_A.copy_(Vh[:r])
        lora.lora_B.copy_(U[:, :r] * S[:r])
        lora.transposed = layer.transposed
        model.set_submodule(name, lora)
        lost, whole = [*lost, *S[r:].tolist()], [*whole, *S.tolist()]
    missed = math.hypot(*lost) / (math.hypot(*whole) or 1)
    print(f"rank {rank} misses {missed:.2%} of the weights' change (Frobenius norm)")


def write_merged(config):
    """Write the merged folder, and print what it holds. Raises ValueError or OSError."""
    if not config.adapter or not config.out_dir:
        raise ValueError("give --adapter and --out_dir")
    rules.refuse(rules.values(config, {"quantize": ("", "none", *KINDS)}))
    out = Path(config.out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another --out_dir")

    model, tokenizer, run = load(config.adapter, config.model, "cpu", config.quantize)
    if not adapter_layers(model):
        raise ValueError(f"{config.adapter} is a whole model already: there is nothing to merge")

    base = find_base(Path(config.adapter), config.model or run.get("model", ""))
    own = str(own_dtype(base)).removeprefix("torch.")
    if own != run.get("dtype", own) and not config.lora_rank:
        print(f"the base's weights are in {own}, the merged ones in {run['dtype']}, as trained")
    if config.lora_rank:
        as_lora(model, config.lora_rank)
        name = config.model or run.get("model", "")
        save_adapter(model, out, name if is_hub_name(name) else str(base))
    elif isinstance(tokenizer, HeadTask):
        tokenizer.save_pretrained(merge(model), base, out)
    else:
        merge(model).save_pretrained(out)
        if (base / "generation_config.json").exists():  # the tokenizer may be the adapter's own
            shutil.copyfile(base / "generation_config.json", out / "generation_config.json")
        tokenizer.save_pretrained(out)
    if run:  # by which sample.py asks as training did
        write_json(out / "run.json", run)

    print(f"saved in {out}:", ", ".join(sorted(path.name for path in out.iterdir())))
    more = ' --prompt_b="..."' * bool(run.get("pairs")) + " --raw" * run.get("raw", False)
    model = shlex.quote(f"--{'adapter' if config.lora_rank else 'model'}={out}")
    print(f'next:\n  python sample.py {model} --prompt="..."{more}')


def main(arguments):
    return settings.program(arguments or ["--help"], Merge, write_merged, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
