"""
Use a trained model: answer a prompt, hold a conversation, or classify.

    python sample.py --adapter=out/small --prompt="Dull, clumsy and far too long."      each label's probability
    python sample.py --adapter=out/mine --prompt="Explain rainbows."                    generate an answer
    python sample.py --adapter=out/mine --chat                                          talk, until an empty line
    python sample.py --model=smollm2-135m --chat                                        the base model, for comparison
"""

import argparse
import sys
from pathlib import Path

import torch

from bidora import load_adapter
from data import LABEL_PROMPT, tokenize_labels, tokenize_question
from model import Transformer
from support.files import read_json
from support.pretrained import find_model
from support.quantized import KINDS
from support.tokenizer import Tokenizer


def own_dtype(folder):
    """The dtype that a model's config.json names; float32 without one, or for float16, which CPUs are slow in."""
    config = read_json(folder / "config.json")
    return (
        torch.bfloat16
        if "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
        else torch.float32
    )


def read_run(folder):
    """The settings of the run that wrote a folder, {} for a folder from elsewhere."""
    return read_json(folder / "run.json") if (folder / "run.json").exists() else {}


def load(adapter="", model_name="", device="cpu", revision="", quantize=""):
    """
    The model, its tokenizer, and the settings of the run that trained it ({} for a model or an adapter from elsewhere).

    What is not given is as the run had it. Raises FileNotFoundError or ValueError, saying what is wrong.
    """
    if not adapter:
        folder = find_model(model_name, revision)
        model = Transformer.from_pretrained(
            folder, own_dtype(folder), device, None if quantize in ("", "none") else quantize
        )
        return model, Tokenizer.from_pretrained(folder), read_run(folder)
    adapter = Path(adapter)
    if not adapter.is_dir():
        raise FileNotFoundError(f"no folder {adapter}: give the out_dir of a finished run")
    run = read_run(adapter)
    if not (adapter / "adapter_config.json").exists():  # full fine-tuning leaves a whole model
        if not (adapter / "config.json").exists():
            raise FileNotFoundError(
                f"{adapter} holds neither an adapter (adapter_config.json) nor a model (config.json)"
            )
        return load("", str(adapter), device, "", quantize)
    config = read_json(adapter / "adapter_config.json")
    base = model_name or run.get("model") or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} does not name its base model: give it with --model=...")
    folder = find_model(
        base, revision or (None if model_name else run.get("revision") or config.get("revision"))
    )
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        str(run.get("dtype")), own_dtype(folder)
    )
    quantize = quantize or run.get("quantize", "none")
    model = Transformer.from_pretrained(
        folder, dtype, device, None if quantize == "none" else quantize
    )
    return load_adapter(model, adapter).eval(), Tokenizer.from_pretrained(folder), run


def answer(model, tokenizer, messages, args):
    """The assistant's next turn, as text. messages: the conversation, or a string to continue as it stands."""
    text = (
        messages
        if isinstance(messages, str)
        else tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    )
    prefix = tokenizer.prefix_ids if isinstance(messages, str) else []  # a template writes its own
    ids = torch.tensor([prefix + tokenizer.encode(text)], device=args.device)
    out = model.generate(
        ids, args.max_new_tokens, args.temperature, args.top_k, args.top_p, tokenizer.stop_ids
    )
    return tokenizer.decode(out[0, ids.size(1) :].tolist())


def classify(model, tokenizer, text, labels, label_prompt):
    """(probability, label) of every label, likeliest first; the probabilities are among the labels, so they sum to 1."""
    prompt = tokenize_question(text, tokenizer, label_prompt, labels)
    p = model.score([prompt], list(tokenize_labels(labels, tokenizer).values()))[0].softmax(-1)
    return sorted(zip(p.tolist(), labels), reverse=True)


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--adapter", default="", help="out_dir of a run, or any adapter folder in PEFT's format"
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
        help="pack the base; by default as in the adapter's training",
    )
    parser.add_argument("--prompt", help="the text to answer, continue or classify")
    parser.add_argument("--chat", action="store_true", help="hold a conversation")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it stands, without the chat template",
    )
    parser.add_argument(
        "--labels",
        default="",
        help="classify among these, separated by commas; by default the run's own",
    )
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0 always takes the likeliest token"
    )
    parser.add_argument(
        "--top_k", type=int, default=None, help="sample among the k likeliest tokens"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=0.95,
        help="sample among the likeliest tokens of this total probability",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if not (args.adapter or args.model):
        parser.error("give --adapter=out/..., or --model=... for a base model")
    if args.chat == (args.prompt is not None):
        parser.error('give either --prompt="..." or --chat')
    if (
        args.max_new_tokens < 1
        or args.temperature < 0
        or (args.top_k or 1) < 1
        or not 0 < args.top_p <= 1
    ):
        parser.error(
            "max_new_tokens and top_k must be positive, temperature at least 0, top_p above 0 and at most 1"
        )
    try:
        torch.manual_seed(args.seed)
        model, tokenizer, run = load(
            args.adapter, args.model, args.device, args.revision, args.quantize
        )
        labels = [label.strip() for label in args.labels.split(",") if label.strip()] or run.get(
            "labels", []
        )
        if args.chat:
            messages = []
            print("An empty line ends the conversation.")
            while text := input("you: ").strip():
                messages.append({"role": "user", "content": text})
                messages.append(
                    {"role": "assistant", "content": answer(model, tokenizer, messages, args)}
                )
                print("model:", messages[-1]["content"])
        elif labels and not args.raw:
            for p, label in classify(
                model, tokenizer, args.prompt, labels, run.get("label_prompt", LABEL_PROMPT)
            ):
                print(f"{p:6.1%}  {label}")
        else:
            print(
                answer(
                    model,
                    tokenizer,
                    args.prompt if args.raw else [{"role": "user", "content": args.prompt}],
                    args,
                )
            )
    except (
        ValueError,
        OSError,
        RuntimeError,
        AssertionError,
    ) as error:  # torch raises the last two for a device it lacks
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
