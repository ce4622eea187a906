"""
Fold a trained adapter into its base model: a plain Hugging Face folder, for transformers or vLLM.

    python -m tools.merge --adapter=out/small --out_dir=out/small-merged
"""

import argparse
import sys
from pathlib import Path

from bidora import adapter_layers, merge
from sample import load
from support.files import write_json
from support.head_task import HeadTask
from support.pretrained import find_model
from support.quantized import KINDS

HELP = {
    "adapter": "out_dir of a run, or any LoRA or DoRA adapter folder in PEFT's format",
    "out_dir": "the folder to write; it must be new or empty",
    "model": "the base model, a folder or owner/name@revision; by default as in training",
    "quantize": "how to pack the base; by default as in training, because an adapter fits the base "
    "that it was trained on",
}


def write_merged(args):
    """Write the merged folder and return its path. Raises ValueError or OSError."""
    out = Path(args.out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another --out_dir")

    model, tokenizer, run = load(args.adapter, args.model, "cpu", args.quantize)
    if not adapter_layers(model):
        raise ValueError(f"{args.adapter} is a whole model already: there is nothing to merge")

    if isinstance(tokenizer, HeadTask):
        base = find_model(args.model or run["model"])
        tokenizer.save_pretrained(merge(model), base, out)
    else:
        merge(model).save_pretrained(out)
        tokenizer.save_pretrained(out)
    if run:  # sample.py reads its labels and its question
        write_json(out / "run.json", run)
    return out


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in ("adapter", "out_dir"):
        parser.add_argument(f"--{name}", required=True, help=HELP[name])
    parser.add_argument("--model", default="", help=HELP["model"])
    choices = ["", "none", *KINDS]
    parser.add_argument("--quantize", default="", choices=choices, help=HELP["quantize"])

    args = parser.parse_args(arguments)
    try:
        out = write_merged(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    files = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f'saved in {out}: {files}\nnext:\n  python sample.py --model={out} --prompt="..."')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
