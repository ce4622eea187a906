"""
Use a trained model: classify, answer a prompt, or hold a conversation.

    python sample.py --adapter=out/small --prompt="Dull, clumsy and far too long."
    python sample.py --adapter=out/pairs --prompt="A man sleeps." --prompt_b="Nobody is awake."
    python sample.py --adapter=out/mine --chat
    python sample.py --adapter=out/mine --file=test.csv --out=predictions.csv
    python sample.py --model=smollm2-135m --chat                    the base model, for comparison
"""

import support.run.interrupt  # noqa: F401  (Ctrl-C in one line, during these imports too)

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import tasks
from bidora import load_adapter
from config import Config
from data import LABEL_PROMPT, Question, encode, tokenize_labels, tokenize_prompt
from support.run import hardware, progress, rules, settings
from support.tasks import predict
from support.tasks.head_task import HeadTask, load_tokenizer
from support.text.tokenizer import Tokenizer
from support.weights import hf_format
from support.weights.pretrained import find_base, find_model, find_tokenizer, read_run
from support.weights.quantized import KINDS


@dataclass
class Sample:
    # the model (most people set adapter)
    adapter: str = ""  # a run's out_dir, or an adapter's folder: PEFT's, mlx-lm's, torchtune's
    model: str = ""  # the base model; empty: the one that the adapter was trained on
    quantize: str = ""  # pack the base: nf4, fp4, int8 or none; empty: as the adapter was trained
    device: str = "auto"  # cpu, cuda, or auto (cuda if there is one)

    # the task (give prompt, chat or file)
    prompt: str = ""  # the text to answer, continue, classify, rate or tag
    prompt_b: str = ""  # the second text of a pair
    chat: bool = False  # hold a conversation; an empty line ends it
    raw: bool = False  # continue the prompt itself, without chat template, as a run on texts does
    file: str = ""  # print the loss and scores of its examples, or with out:
    out: str = ""  # write their predictions, as CSV or JSONL; then answers may be missing
    labels: str = ""  # classify among these, separated by commas; empty: the run's own

    # generation (of free text: a run of another task, or of task=generation, has its own)
    max_new_tokens: int = 200  # most tokens of an answer
    temperature: float = 0.7  # higher is more random; 0 always takes the likeliest token
    top_k: int = 0  # sample among the k likeliest tokens; 0 means all
    top_p: float = 0.95  # sample among the likeliest tokens with this total probability
    seed: int = 0  # of the random numbers


def load(adapter="", model_name="", device="cpu", quantize=""):
    """
    The model, its tokenizer (with a head: its HeadTask), and the settings of its run, {} if it is
    from elsewhere, from which empty arguments are taken. Raises FileNotFoundError or ValueError.
    """
    if not adapter:
        if model_name == "minilm":
            raise ValueError("minilm is an encoder, which writes nothing: give --adapter=out/...")
        folder = find_model(model_name)
        run = read_run(folder, tasks.TASKS, Config.__annotations__)
        if run.get("task") in tasks.HEADS:  # full fine-tuning of an encoder
            task = HeadTask(run["task"], run["labels"], *load_tokenizer(folder))
            return tasks.load_model(task, folder, torch.float32, device, own_head=True), task, run
        packed = None if quantize in ("", "none") else quantize
        model = tasks.load_model(None, folder, hf_format.own_dtype(folder), device, quantize=packed)
        return model, Tokenizer.from_pretrained(folder), run

    adapter = Path(adapter)
    if not adapter.is_dir():
        raise FileNotFoundError(f"no folder {adapter}: give the out_dir of a finished run")
    run = read_run(adapter, tasks.TASKS, Config.__annotations__)
    if not (adapter / "adapter_config.json").exists():  # full fine-tuning leaves a whole model
        if not (adapter / "config.json").exists():
            neither = "no adapter (adapter_config.json) and no model (config.json)"
            raise FileNotFoundError(f"{adapter} holds {neither}")
        return load("", str(adapter), device, quantize)

    folder = find_base(adapter, model_name or run.get("model", ""))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtype = dtypes.get(str(run.get("dtype")), hf_format.own_dtype(folder))
    quantize = quantize or run.get("quantize", "none")
    packed = None if quantize == "none" else quantize
    family = None
    if run.get("task") in tasks.HEADS:
        family = HeadTask(run["task"], run["labels"], *load_tokenizer(folder, adapter))
    model = tasks.load_model(family, folder, dtype, device, quantize=packed)
    tokenizer = family or find_tokenizer(adapter, folder, model.config.vocab_size)
    return load_adapter(model, adapter).eval(), tokenizer, run


def answer(model, tokenizer, messages, config):
    """The assistant's next turn, as text. messages: a conversation, or a string to continue."""
    if isinstance(messages, str):
        ids = tokenizer.encode(messages)
        ids = tokenizer.prefix_of(ids) + ids
    else:
        ids = tokenize_prompt(messages, tokenizer)
    ids = torch.tensor([ids], device=model.lm_head.weight.device)
    options = (config.temperature, config.top_k or None, config.top_p, tokenizer.stop_ids)
    with progress.bar("answer", config.max_new_tokens, "token", delay=3, leave=False) as bar:
        hook = model.lm_head.register_forward_hook(lambda *_: bar.update() and None)
        out = model.generate(ids, config.max_new_tokens, *options)
        hook.remove()
    return tokenizer.decode(out[0, ids.size(1) :].tolist())


def classify(model, tokenizer, text, labels, label_prompt, block_size, text_b=""):
    """(probability, label) of every label, likeliest first; a long text is cut as in training."""
    label_ids = tokenize_labels(labels, tokenizer)
    prompt, _ = Question(tokenizer, label_prompt, label_ids, block_size).tokenize(text, text_b)
    p = model.score([prompt], list(label_ids.values()))[0].softmax(-1)
    return sorted(zip(p.tolist(), labels), reverse=True)


def chat(model, tokenizer, config):
    messages = []
    print("An empty line ends the conversation.")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while text := input("you: ").strip():
            messages.append({"role": "user", "content": text})
            content = answer(model, tokenizer, messages, config)
            messages.append({"role": "assistant", "content": content})
            print("model:", content)


def check(config):
    """Raise ValueError for settings that make no sense."""
    if not (config.adapter or config.model):
        raise ValueError("give --adapter=out/..., or --model=... for a base model")
    if [config.chat, bool(config.prompt), bool(config.file)].count(True) != 1:
        raise ValueError('give one of --prompt="...", --chat and --file=...')
    if config.out and not config.file:
        raise ValueError("--out=... is for the predictions of a --file=...")
    out = Path(config.out)
    if config.out and out.exists():
        raise ValueError(f"{out} exists: choose another --out")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder: make it, or choose another --out")
    rules.refuse(rules.values(config, {"quantize": ("", "none", *KINDS)}), rules.device(config))
    if config.top_p > 1:
        raise ValueError(f"top_p={config.top_p} must be at most 1")


def respond(model, tokenizer, run, config):
    """Print what is asked for. Arguments: what load returns, and a Sample."""
    labels = [label.strip() for label in config.labels.split(",") if label.strip()]
    labels = labels or run.get("labels", [])
    size, task, pairs = run.get("block_size"), run.get("task"), run.get("pairs")
    raw = config.raw or (run.get("raw") and not config.chat and not config.labels)
    scored = isinstance(tokenizer, HeadTask) or (labels and not raw and not config.chat)
    if config.prompt_b and not scored:
        raise ValueError("prompt_b is for a run that classifies pairs")
    if config.prompt and pairs is (not config.prompt_b) and not (raw or config.labels):
        wanted = "pairs of texts: give both --prompt and" if pairs else "single texts: omit"
        raise ValueError(f"the run is on {wanted} --prompt_b")
    if isinstance(tokenizer, HeadTask):
        if config.chat or config.raw or config.labels:
            raise ValueError(f"the run's task is {task}: give --prompt alone, and --prompt_b")
        print(*tokenizer.describe(model, config.prompt, config.prompt_b, size), sep="\n")
    elif config.chat:
        chat(model, tokenizer, config)
    elif task == "multiple_choice" and not raw:
        if not labels:
            raise ValueError(f'the run\'s task is {task}: give --labels="one choice,another"')
        example = {"prompt": config.prompt, "choices": labels, "answer": 0}  # any will do
        [row], _ = encode([example], tokenizer, size)
        shares = model.score([row.prompt_ids], [ids for ids, _ in row.choices])[0].softmax(-1)
        for p, choice in sorted(zip(shares.tolist(), labels), reverse=True):
            print(f"{p:6.1%}  {choice}")
    elif labels and not raw:
        if new := [label for label in labels if label not in (run.get("labels") or labels)]:
            print(f"note: the run did not learn {', '.join(new)}", file=sys.stderr)
        size = size or model.config.max_position_embeddings
        options = (labels, run.get("label_prompt") or LABEL_PROMPT, size, config.prompt_b)
        for p, label in classify(model, tokenizer, config.prompt, *options):
            print(f"{p:6.1%}  {label}")
    elif task == "generation" and not raw:
        ids = tokenizer.encode(config.prompt)
        print(*family_of(run, tokenizer).write(model, [tokenizer.prefix_of(ids) + ids]))
    else:
        turn = [{"role": "user", "content": config.prompt}]
        print(answer(model, tokenizer, config.prompt if raw else turn, config))


def family_of(run, tokenizer, writes=True):
    """The task of a run; writes: whether a language model's answers are written, or compared."""
    if isinstance(tokenizer, HeadTask):
        return tokenizer
    name = run.get("task")
    label_ids = tokenize_labels(run["labels"] if name == "label_words" else [], tokenizer)
    searches = name == "generation" or writes and not label_ids
    search = tasks.search_options(run) if searches and run else {}
    own = run.get("train_on_prompt", False)
    make = tasks.MultipleChoice if name == "multiple_choice" else tasks.LanguageTask
    return make(tokenizer, run.get("label_prompt", ""), label_ids, own, search, None)


def use_file(model, tokenizer, run, config):
    """Write a file's predictions to `out`, or without one evaluate it; print the scores."""
    family, file = family_of(run, tokenizer, writes=bool(config.out)), Path(config.file)
    if config.out:
        found = predict.predict(family, model, run, file, Path(config.out))
    else:
        found = predict.evaluate(family, model, run, file, tasks.TASKS)
    for name, score in found.items():
        print(f"{name:>10}  " + ("–" if score is None else f"{score:.4f}"))
    if config.out:
        print(f"saved {config.out}")


def use(config):
    """Load the model and respond. Raises ValueError or OSError."""
    check(config)
    torch.manual_seed(config.seed)
    device = hardware.choose_device(config.device)
    model, tokenizer, run = load(config.adapter, config.model, device, config.quantize)
    with hardware.attention(device):
        (use_file if config.file else respond)(model, tokenizer, run, config)


def main(arguments):
    again = any(argument.startswith("--file") for argument in arguments)
    return settings.program(arguments or ["--help"], Sample, use, __doc__, resumes=again)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
