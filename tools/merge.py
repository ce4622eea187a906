"""
Fold a trained adapter into its base model: a plain Hugging Face folder, for transformers, vLLM and other servers.

    python -m tools.merge --adapter=out/small --out_dir=out/small-merged
"""

import argparse
import sys
from pathlib import Path

from bidora import adapter_layers, merge
from sample import load
from support.files import write_json
from support.quantized import KINDS


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--adapter",
        required=True,
        help="out_dir of a run, or any LoRA or DoRA adapter folder in PEFT's format",
    )
    parser.add_argument(
        "--out_dir", required=True, help="the folder to write; it must be new or empty"
    )
    parser.add_argument(
        "--model",
        default="",
        help="the base model; by default the one that the adapter was trained on",
    )
    parser.add_argument(
        "--revision", default="", help="a branch, tag or commit, for a base model from the hub"
    )
    parser.add_argument(
        "--quantize",
        default="",
        choices=["", "none", *KINDS],
        help="how the base was packed in training; by default as the run says. An adapter fits the base that it was trained on",
    )
    args = parser.parse_args(arguments)
    out = Path(args.out_dir)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and is not an empty folder: choose another --out_dir")
        model, tokenizer, run = load(args.adapter, args.model, "cpu", args.revision, args.quantize)
        if not adapter_layers(model):
            raise ValueError(f"{args.adapter} is a whole model already: there is nothing to merge")
        merge(model).save_pretrained(out)
        tokenizer.save_pretrained(out)
        if run:
            write_json(
                out / "run.json", run
            )  # for sample.py: the labels and the question that it was trained on
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"saved in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}\n"
        f'next:\n  python sample.py --model={out} --prompt="..."'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
