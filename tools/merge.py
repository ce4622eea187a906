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
    known = {"quantize": ("", "none", *KINDS), "to": FORMS}
    rules.refuse(rules.values(config, known))
    if (config.to == "peft-lora") != (config.lora_rank > 0):
        raise ValueError("--to=peft-lora and --lora_rank=... go together")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another --out_dir")


def write(config):
    """Write the folder, and print what it holds. Raises ValueError or OSError."""
    out = Path(config.out_dir)
    check(config, out)
    model, tokenizer, run = load(config.adapter, config.model, "cpu", config.quantize)
    if not adapter_layers(model):
        raise ValueError(f"{config.adapter} is a whole model already: there is nothing to merge")

    base = find_base(Path(config.adapter), config.model or run.get("model", ""))
    name = config.model or run.get("model", "")
    name = name if is_hub_name(name) else str(base)
    own = str(own_dtype(base)).removeprefix("torch.")
    if own != run.get("dtype", own) and config.to in ("transformers", "gguf"):
        print(f"the base's weights are in {own}, the merged ones in {run['dtype']}, as trained")
    if config.to in ("gguf", "mlx") and (isinstance(tokenizer, HeadTask) or not is_own(base)):
        raise ValueError(f"--to={config.to} is for language models that model.py computes")
    if config.to == "peft-lora":
        as_lora(model, config.lora_rank)
        save_adapter(model, out, name)
    elif config.to == "mlx":
        beside = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
        if beside or any(kind_of(p) for p in model.parameters()):
            problem = "modules trained beside the adapter, or a base that is packed"
            raise ValueError(f"mlx-lm's adapters can't hold {problem}: use --to=transformers")
        write_mlx(out, adapter_layers(model), name)
    elif config.to == "gguf":
        with tempfile.TemporaryDirectory(dir=make_folder(out)) as folder:
            write_merged(merge(model), tokenizer, base, Path(folder))
            write_gguf(Path(folder), out / "model.gguf")
    else:
        write_merged(merge(model), tokenizer, base, out)
    if run and config.to in ("transformers", "peft-lora"):
        write_json(out / "run.json", run)  # by which sample.py asks as training did
    report(config, out, run)


def write_merged(model, tokenizer, base, out):
    """Write a merged model and its tokenizer as a Hugging Face folder."""
    if isinstance(tokenizer, HeadTask):
        return tokenizer.save_pretrained(model, base, out)
    model.save_pretrained(out)
    if (base / "generation_config.json").exists():  # the tokenizer may be the adapter's own
        shutil.copyfile(base / "generation_config.json", out / "generation_config.json")
    tokenizer.save_pretrained(out)


def report(config, out, run):
    """Print what the folder holds, and the command that uses it."""
    print(f"saved in {out}:", ", ".join(sorted(path.name for path in out.iterdir())))
    if config.to == "gguf":
        return print(f"next:\n  llama-cli -m {shlex.quote(str(out / 'model.gguf'))}")
    more = ' --prompt_b="..."' * bool(run.get("pairs")) + " --raw" * run.get("raw", False)
    model = shlex.quote(f"--{'model' if config.to == 'transformers' else 'adapter'}={out}")
    print(f'next:\n  python sample.py {model} --prompt="..."{more}')


def main(arguments):
    return settings.program(arguments or ["--help"], Merge, write, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
