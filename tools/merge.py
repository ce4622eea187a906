"""
Hand a trained adapter on to another program, alone or folded into its base model.

    python -m tools.merge --adapter=out/small --out_dir=out/small-merged

    --to=transformers    the merged model, a Hugging Face folder, for vLLM and SGLang too
    --to=gguf            the merged model as one file, for llama.cpp and Ollama
    --to=mlx             the adapter in mlx-lm's layout
    --to=peft-lora       with --lora_rank=64, the nearest plain LoRA adapter, for servers without
                         DoRA: each change's largest singular values (Eckart and Young, 1936)
"""

import math
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bidora import BiDoRALinear, adapter_layers, merge, save_adapter
from sample import load
from support.run import rules, settings
from support.run.files import make_folder, write_json
from support.tasks.head_task import HeadTask
from support.weights.gguf_format import write_gguf
from support.weights.hf_format import is_own, own_dtype
from support.weights.other_formats import write_mlx
from support.weights.pretrained import find_base, is_hub_name
from support.weights.quantized import KINDS, dequantize, kind_of

FORMS = ("transformers", "gguf", "mlx", "peft-lora")


@dataclass
class Merge:
    adapter: str = ""  # out_dir of a run, or an adapter's folder: PEFT's, mlx-lm's or torchtune's
    out_dir: str = ""  # the folder to write; it must be new or empty
    to: str = "transformers"  # or gguf, mlx, peft-lora
    model: str = ""  # the base model, a folder or owner/name@revision; empty: as in training
    lora_rank: int = 0  # of the adapter, with to=peft-lora
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


def check(config, out):
    """Raise ValueError for settings that make no sense."""
    if not config.adapter or not config.out_dir:
        raise ValueError("give --adapter and --out_dir")
    rules.refuse(rules.values(config, {"quantize": ("", "none", *KINDS), "to": FORMS}))
    if (config.to == "peft-lora") != (config.lora_rank > 0):
        raise ValueError("--to=peft-lora and --lora_rank=... go together")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another --out_dir")


def write(config):
    """Write the folder, and print what it holds. Raises ValueError or OSError."""
    out, to = Path(config.out_dir), config.to
    check(config, out)
    model, tokenizer, run = load(config.adapter, config.model, "cpu", config.quantize)
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(f"{config.adapter} is a whole model already: there is nothing to merge")

    name = config.model or run.get("model", "")
    base = find_base(Path(config.adapter), name)
    name = name if is_hub_name(name) else str(base)
    dtype = str(own_dtype(base)).removeprefix("torch.")
    beside = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    if to in ("gguf", "mlx") and (isinstance(tokenizer, HeadTask) or not is_own(base)):
        raise ValueError(f"--to={to} is for language models that model.py computes")
    if to == "mlx" and (beside or any(kind_of(p) for p in model.parameters())):
        problem = "modules trained beside the adapter, or a packed base: use --to=transformers"
        raise ValueError(f"mlx-lm's adapters can't hold {problem}")
    if dtype != run.get("dtype", dtype) and to in ("transformers", "gguf"):
        print(f"the base's weights are in {dtype}, the merged ones in {run['dtype']}, as trained")

    if to == "peft-lora":
        as_lora(model, config.lora_rank)
        save_adapter(model, out, name)
    elif to == "mlx":
        write_mlx(out, layers, name)
    elif to == "gguf":
        with tempfile.TemporaryDirectory(dir=make_folder(out)) as folder:
            write_merged(merge(model), tokenizer, base, Path(folder))
            write_gguf(Path(folder), out / "model.gguf")
    else:
        write_merged(merge(model), tokenizer, base, out)
    if run and to in ("transformers", "peft-lora"):
        write_json(out / "run.json", run)  # by which sample.py asks as training did

    print(f"saved in {out}:", ", ".join(sorted(path.name for path in out.iterdir())))
    more = ' --prompt_b="..."' * bool(run.get("pairs")) + " --raw" * run.get("raw", False)
    model = shlex.quote(f"--{'model' if to == 'transformers' else 'adapter'}={out}")
    program = f'python sample.py {model} --prompt="..."{more}'
    if to == "gguf":
        program = f"llama-cli -m {shlex.quote(str(out / 'model.gguf'))}"
    print(f"next:\n  {program}")


def write_merged(model, tokenizer, base, out):
    """Write a merged model and its tokenizer as a Hugging Face folder."""
    if isinstance(tokenizer, HeadTask):
        return tokenizer.save_pretrained(model, base, out)
    model.save_pretrained(out)
    if (base / "generation_config.json").exists():  # the tokenizer may be the adapter's own
        shutil.copyfile(base / "generation_config.json", out / "generation_config.json")
    tokenizer.save_pretrained(out)


def main(arguments):
    return settings.program(arguments or ["--help"], Merge, write, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
