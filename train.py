"""
Fine-tune a language model with BiDoRA or one of its relatives.

    python train.py --config=small.py                  the settings in configs/small.py
    python train.py --config=small.py --method=dora    any field of Config can be given as --name=value
    python train.py --config=small.py --resume=True    go on with a run that was stopped or killed, as if it never had been
    python train.py --help                             every setting, its default and what it does

BiDoRA's three phases (arXiv 2410.09758, algorithm 1): *search* alternates (1) a step of the direction on the train split and
(2) a step of the magnitude on the val split, along a hypergradient; (3) *retrain* fixes the magnitude and trains the direction
on train and val together. The other methods train once on train and val together, for as many lower-level steps in total.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import analysis
import bidora
import checkpoint
import data
import distributed
import hardware
import quantized
import report
import settings
from config import BILEVEL, Config, check, differences, read_config, second_order
from files import read_json, replacing, write_json
from hypergrad import assign, create_bilevel_optimizer
from model import ModelConfig, Transformer
from pretrained import find_model, is_hub_name
from tokenizer import Tokenizer


def load_data(config):
    """The raw examples as {"train", "val", "test"}, and the classification question. Raises ValueError where they don't fit."""
    if config.train_file:
        parts = {"train": data.load_examples(config.train_file),
                 "val": data.load_examples(config.val_file) if config.val_file else [],
                 "test": data.load_examples(config.test_file) if config.test_file else []}
        question = config.label_prompt or data.LABEL_PROMPT
    else:
        examples = data.load_examples(config.data)
        if config.train_size + config.test_size >= len(examples) or min(config.train_size, config.test_size) < 10:
            raise ValueError(f"train_size={config.train_size} and test_size={config.test_size} must be at least 10 each, and together "
                             f"less than the {len(examples)} examples of {config.data}")
        rest, test = data.split(examples, config.test_size / len(examples), seed=0)  # the same test for every seed
        train, _ = data.split(rest, 1 - config.train_size / len(rest), seed=config.seed)
        parts = {"train": train, "val": [], "test": test}
        question = config.label_prompt or data.BUILT_IN[config.data]
    if not config.val_file and config.val_fraction > 0:
        parts["train"], parts["val"] = data.split(parts["train"], config.val_fraction, config.seed)
    formats = {data.format_of(part[0]) for part in parts.values() if part}
    if len(formats) > 1:
        raise ValueError(f"the files differ in format: {', '.join(sorted(formats))}")
    labels = {name: {example.get("label") for example in part} for name, part in parts.items() if part}
    if formats == {"classification"} and len(labels["train"]) < 2:
        raise ValueError(f"all train examples have the label {labels['train'].pop()!r}: classification needs two labels or more")
    for name, found in labels.items():
        if unseen := found - labels["train"]:
            raise ValueError(f"{name} has the label {sorted(unseen)[0]!r}, which train lacks")
        if name == "val" and (lacking := labels["train"] - found):
            raise ValueError(f"val lacks the label {sorted(lacking)[0]!r}: give it examples of every label")
    return parts, question


@torch.no_grad()
def evaluate(model, encoded, label_ids, config, pad_id):
    """
    Mean loss (nats a token) and accuracy over Encoded rows; None for an empty list.

    With labels: the loss of the right label's tokens, and how often it is the likeliest of all. Without: the loss of the
    tokens that count, and how often the likeliest token is the right one.
    """
    if not encoded:
        return None
    model.eval()
    total = right = tokens = 0
    rows = sorted(encoded, key=lambda e: len(e.input_ids))  # rows of similar length: little padding
    if not config.fsdp:  # there, all must call the same blocks in step
        rows = rows[distributed.RANK::distributed.WORLD_SIZE]
    for start in range(0, len(rows), config.eval_batch_size):
        batch = rows[start:start + config.eval_batch_size]
        if label_ids:
            scores = model.score([e.prompt_ids for e in batch], list(label_ids.values()))  # (B, labels)
            answers = torch.tensor([list(label_ids).index(e.label) for e in batch], device=scores.device)
            total -= scores.gather(1, answers[:, None]).sum().item()
            right += (scores.argmax(1) == answers).sum().item()
            tokens += sum(len(label_ids[e.label]) for e in batch)
        else:
            sums = model.totals(*(t.to(model.lm_head.weight.device) for t in data.collate(batch, pad_id)))
            total, right, tokens = total + sums[0], right + sums[1], tokens + sums[2]
    sums = torch.tensor([total, right, tokens], dtype=torch.float64, device=model.lm_head.weight.device)
    total, right, tokens = (sums if config.fsdp else distributed.add_up([sums])[0]).tolist()
    return {"loss": total / tokens, "accuracy": right / (len(encoded) if label_ids else tokens)}


def choose_dtype(config, device):
    """The base's dtype, as a name, and, in words, why."""
    if config.dtype != "auto":
        return config.dtype, "as set"
    if config.method == "ft":
        return "float32", "full fine-tuning needs it"
    if differences(config):
        return "float32", "finite differences need it"
    dtype, why = hardware.fast_dtype(device)
    return str(dtype).removeprefix("torch."), why


def learning_rate_scale(step, steps, warmup):
    """The rates' factor at step 1 … steps: up in a line over the first `warmup` of them, then down in a line to a tenth."""
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return step / rising
    return 1 - 0.9 * (step - rising) / max(1, steps - rising)


def train(config):
    """
    Run all phases as config says; returns the results that summary.json holds.

    Raises ValueError or OSError for wrong input, before the first step; FloatingPointError for a loss that is not finite; checkpoint.Stopped, a
    KeyboardInterrupt, at SIGINT or SIGTERM, with the work saved for config.resume.
    """
    check(config)
    with contextlib.ExitStack() as locks:
        return run(config, Path(config.out_dir or "out/run"), locks)


def run(config, out, locks):
    """train's work; locks: an ExitStack that holds the folder `out` for this run. Of several processes, only the first writes or prints."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    started, memory_at_start = time.time(), hardware.peak_memory(device)
    device, is_first = distributed.start(device), distributed.RANK == 0

    def open_folder():
        existing = next(path for path in (out, *out.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"out_dir={out} can't be written, since {existing} is {'read-only' if existing.is_dir() else 'a file'}: "
                             f"choose another")
        locks.enter_context(checkpoint.locked(out))
        return [str(path) if path else None for path in checkpoint.find_run(config, out)]

    source, previous = (Path(path) if path else None for path in distributed.from_first(open_folder, device))
    asked, state = dataclasses.asdict(config), None
    if source:
        config, state = checkpoint.resumed(config, source), checkpoint.load(source)
        print(f"resuming {source} after step {state[1]['n']}" if state else f"{source} has no checkpoint yet: starting from its first step")
    config = dataclasses.replace(config, lower_lr=config.lower_lr or (2e-5 if config.method == "ft" else 1e-3),
                                 gradient_checkpointing=str(config.gradient_checkpointing))

    # data, model and tokenizer; whatever is wrong with them shows before the first step
    if distributed.LOCAL_RANK > 0:
        distributed.wait()  # for the first process of this machine, which downloads
    parts, label_prompt = load_data(config)
    labels = sorted({example["label"] for example in parts["train"] if "label" in example})
    folder = find_model(config.model, config.revision)
    tokenizer = Tokenizer.from_pretrained(folder)
    label_ids = data.tokenize_labels(labels, tokenizer)
    if distributed.LOCAL_RANK == 0:
        distributed.wait()
    dtype_name, why = distributed.from_first(lambda: choose_dtype(config, device), device)
    dtype = getattr(torch, dtype_name)
    shape = ModelConfig.from_hf(read_json(folder / "config.json"))

    def encode(block_size):
        done = {name: data.encode(examples, tokenizer, block_size, label_prompt, label_ids, config.train_on_prompt)
                for name, examples in parts.items()}
        return {name: rows for name, (rows, _) in done.items()}, sum(cut for _, cut in done.values())

    if config.auto_hardware and not source:
        free = distributed.from_first(lambda: hardware.free_memory(device), device)
        if free is None:
            raise ValueError("auto_hardware=True: this system does not say how much memory is free; set quantize, accumulate, "
                             "gradient_checkpointing and block_size yourself")
        rows = [row for part in encode(config.block_size or shape.max_position_embeddings)[0].values() for row in part]
        longest, answer = max(len(row.labels) for row in rows), max(sum(label != -100 for label in row.labels) for row in rows)
        shortest = 2 if data.format_of(parts["train"][0]) in ("text", "code") else answer + 1  # an answer is never cut
        picked, lines = hardware.choose(shape, config, dtype.itemsize, longest, answer, free, shortest)
        config = dataclasses.replace(config, **picked)
        print(*lines, sep="\n")
    config = dataclasses.replace(
        config, block_size=config.block_size or 256, accumulate=config.accumulate or 1,
        quantize="none" if config.quantize == "auto" else config.quantize,
        gradient_checkpointing="False" if config.gradient_checkpointing == "auto" else config.gradient_checkpointing)
    if config.block_size > shape.max_position_embeddings:
        raise ValueError(f"block_size={config.block_size} is more than the {shape.max_position_embeddings} positions of {config.model}")
    encoded, cut = encode(config.block_size)
    fingerprint = hashlib.sha256(repr(encoded).encode()).hexdigest()
    if state and state[1]["data"] != fingerprint:
        raise ValueError(f"{source} can't be resumed: its data or its tokenizer has changed since")
    torch.manual_seed(config.seed)
    model = Transformer.from_pretrained(folder, dtype, "cpu" if config.fsdp else device,
                                        None if config.quantize == "none" else config.quantize, mapped=config.fsdp)
    model.gradient_checkpointing = config.gradient_checkpointing == "True"
    weight_bytes = quantized.nbytes(model)
    largest = max(max(row.input_ids) for rows in encoded.values() for row in rows)
    if largest >= model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer writes token {largest}, but the model's vocabulary ends at "
                         f"{model.config.vocab_size}")
    if config.method != "ft":
        model.requires_grad_(False)
        bidora.replace_linear_with_bidora(model, config.rank, config.target_modules, config.alpha, config.dropout,
                                          config.method, config.norm_grad, config.magnitude_axis, config.lambda_kind)
    if config.fsdp:
        distributed.shard(model, device)
    local_weight_bytes = distributed.local_bytes(model) if config.fsdp else weight_bytes
    if config.compile:
        for block in model.model.layers:
            block.compile()  # they share their code, so that it is compiled once
    both = encoded["train"] + encoded["val"]
    if config.method in BILEVEL:
        phases = [("search", config.search_steps, encoded["train"]), ("retrain", config.retrain_steps, both)]
    else:
        phases = [("train", config.search_steps + config.retrain_steps, both)]
    phases = [phase for phase in phases if phase[1] > 0]
    trajectory = analysis.Trajectory.start(model, config.target_modules, config.magnitude_axis) if config.snapshots else None
    sizes = {"lower": sum(p.numel() for p in bidora.lower_parameters(model)),
             "upper": sum(p.numel() for p in bidora.upper_parameters(model))}

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if state:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state[0][f"parameter.{name}"])
        if trajectory:
            trajectory = dataclasses.replace(trajectory, **state[1]["trajectory"])

    def save():
        if not is_first:
            return
        if config.method == "ft":
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
        else:
            bidora.save_adapter(model, out, config.model if is_hub_name(config.model) else str(folder), config.revision)
        if trajectory:
            trajectory.save(out)

    def begin_folder():
        if previous:
            checkpoint.set_aside(out)
            if not out.exists():
                locks.enter_context(checkpoint.locked(out))  # a new folder
        # The folder is tried with all that will go into it while nothing is lost yet: a full disk shows now.
        try:
            write_json(out / "run.json", dataclasses.asdict(config) | {
                "labels": labels, "label_prompt": label_prompt, "dtype": dtype_name, "asked": asked})
            save()
        except OSError as error:
            if source != out:
                checkpoint.remove_run(out)
            if previous and not out.exists():
                os.replace(previous, out)
                (out / checkpoint.REPLACED).unlink(missing_ok=True)
            raise OSError(f"{error}; out_dir={out} must be a folder with room for the run") from None

    distributed.from_first(begin_folder, device)
    packed = "" if config.quantize == "none" else f"{config.quantize} and "
    print(f"{config.method} on {config.model}, {packed}{dtype_name} on {device} ({why}): {weight_bytes / 1e6:.0f} MB of weights")
    if distributed.WORLD_SIZE > 1:
        print(f"{distributed.WORLD_SIZE} processes, each with its share of every batch"
              + (f", and {local_weight_bytes / 1e6:.0f} MB of weights" if config.fsdp else ""))
    print(f"data: {config.train_file or config.data}: {', '.join(f'{len(examples)} {name}' for name, examples in parts.items())}"
          + (f"; labels {', '.join(labels)}" if labels else ""))
    if cut:
        print(f"{cut} examples were longer than block_size={config.block_size} tokens: cut on the left, their answers kept")
    if tokenizer.library_reason:
        print(f"the tokenizers library splits the text, since tiktoken can't: {tokenizer.library_reason}")
    if not tokenizer.has_chat_template:
        print("the tokenizer has no chat template: a plain one (User: … Assistant: …) is used")
    print(f"trainable parameters: {sizes['lower']:,} lower level, {sizes['upper']:,} upper level")
    if second_order(config):
        together = config.hvp_batch or math.ceil(config.batch_size / config.accumulate)
        longest = max(len(row.labels) for row in encoded["train"])
        scores = together * hardware.score_bytes(shape, longest)
        if scores > 1e9:
            print(f"second derivatives keep attention's scores, which grow with the square of the length: up to {scores / 1e9:.0f} GB for {together} rows "
                  f"of {longest} tokens; --hvp_batch=1 or a smaller --block_size lowers that")
    start = "a fresh start" if config.final_init == "fresh" else "where search ended"
    below, above = ("direction", "magnitude") if config.method == "bidora" else ("singular vectors", "singular values")
    for phase, steps, _ in phases:
        print(f"{phase}: {steps} steps, " + {
            "search": f"{below} on train, {above} on val by the {config.hypergradient} hypergradient",
            "retrain": f"{below} on train + val from {start}, {above} fixed", "train": "on train + val"}[phase])

    evaluated = {name: random.Random(0).sample(rows, min(config.eval_size, len(rows))) for name, rows in encoded.items()}

    @torch.compiler.set_stance("force_eager")  # not compiled for each of evaluation's shapes
    def evaluate_all():
        return {name: evaluate(model, rows, label_ids, config, tokenizer.pad_id) for name, rows in evaluated.items()}

    before = state[1]["before"] if state else evaluate_all()
    shown = "test" if encoded["test"] else "val" if encoded["val"] else "train"
    print(f"before training: {shown} accuracy {before[shown]['accuracy']:.1%}, loss {before[shown]['loss']:.3f}", flush=True)

    options = {
        "first_order": {},
        "unrolled": {"lr": config.unroll_lr or config.lower_lr, "steps": config.unroll_steps, "mode": config.mode},
        "neumann": {"terms": config.terms, "alpha": config.neumann_alpha},
        "conjugate_gradient": {"iterations": config.cg_iterations, "damping": config.damping},
    }[config.hypergradient]

    def loss_fn(model, batch):
        input_ids, labels, share = batch  # a part of a batch, with its share of the labels
        return model(input_ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)) * share

    def shares(batch, count=config.accumulate):
        if device.startswith("cuda"):
            batch = [tensor.pin_memory() for tensor in batch]  # copied to the GPU while that is still busy
        return data.parts(batch, count, distributed.RANK, distributed.WORLD_SIZE)

    def asked_everywhere(signals):
        """The largest signal that any process has got, or 0: all must stop at the same step."""
        own = torch.zeros(distributed.WORLD_SIZE, device=device)
        own[distributed.RANK] = signals[0] if signals else 0
        return int(distributed.add_up([own])[0].max())

    def lower_loss_fn(model, part):
        return loss_fn(model, part) + config.gram_weight * part[2] * bidora.regulariser(model)

    # Where the run is: the phase, its step, and n, the step of the whole run.
    first, begin, n, seconds, elapsed = (state[1][key] for key in ("phase", "step", "n", "seconds", "elapsed")) if state else (0, 0, 0, {}, 0.0)
    lines = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:n] if state else []
    metrics = [json.loads(line) for line in lines]
    if [line["step"] for line in metrics] != list(range(1, n + 1)):
        raise ValueError(f"{source / 'metrics.jsonl'} lacks lines of the first {n} steps: the run can't be resumed")
    if is_first:
        with replacing(out / "metrics.jsonl") as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        if state and source != out:  # from here on the new folder stands alone
            checkpoint.save(out, n, *state)

    def keep_state(phase, step, optimizer=None):
        if not is_first:
            return
        tensors = {f"parameter.{name}": p for name, p in parameters.items()}
        for level in ("lower", "upper") if optimizer else ():
            if own := getattr(optimizer, f"{level}_optimizer"):
                tensors |= {f"{level}.{key}": value for key, value in checkpoint.optimizer_state(own).items()}
        points = {key: getattr(trajectory, key) for key in ("snapshots", "delta_m", "delta_d")} if trajectory else None
        checkpoint.save(out, n, tensors, {"phase": phase, "step": step, "n": n, "seconds": seconds, "before": before, "data": fingerprint,
                                          "elapsed": elapsed + time.time() - started,
                                          "trajectory": points, "random": checkpoint.random_states()})

    if state:
        checkpoint.set_random_states(state[1]["random"])
    if distributed.RANK > 0:  # other dropout masks than the first process's, also after a resume
        torch.manual_seed(hash((config.seed, distributed.RANK, n)))
    try:
        with open(out / "metrics.jsonl" if is_first else os.devnull, "a", encoding="utf-8") as log, checkpoint.asked_to_stop() as signals:
            for index, (phase, steps, rows) in list(enumerate(phases))[first:]:
                if index > first:
                    begin = 0
                if phase == "retrain":
                    bidora.freeze_magnitude(model)
                    if config.final_init == "fresh" and begin == 0:
                        for layer in bidora.adapter_layers(model).values():
                            layer.reset_direction()
                optimizer = create_bilevel_optimizer(model, config.lower_lr, config.upper_lr, config.upper_every,
                                                     config.hypergradient, config.weight_decay, config.grad_clip, config.optimizer,
                                                     config.precondition, distributed.add_up, **options)
                distributed.same_everywhere(p.data for p in optimizer.lower + optimizer.upper)
                if begin:
                    for level in ("lower", "upper"):
                        if own := getattr(optimizer, f"{level}_optimizer"):
                            checkpoint.load_optimizer_state(own, {key.removeprefix(f"{level}."): value for key, value in state[0].items()
                                                                  if key.startswith(f"{level}.")})
                turns = begin // config.upper_every if optimizer.upper else 0  # of the upper level, so far
                train_batches = data.batches(rows, config.batch_size, tokenizer.pad_id, config.seed, begin + turns * (config.upper_steps - 1), config.group_by_length)
                val_batches = data.batches(encoded["val"], config.batch_size, tokenizer.pad_id, config.seed, turns * config.upper_steps, config.group_by_length)
                trained = optimizer.lower + optimizer.upper
                marks = {math.ceil(steps * i / config.snapshots) for i in range(1, config.snapshots + 1)}
                last_finite = None  # the weights that last gave a finite loss, for when the next do not
                last_kept, phase_start, earlier = begin, time.time(), seconds.get(phase, 0)
                model.train()
                progress = tqdm(range(begin + 1, steps + 1), desc=phase, unit="step", initial=begin, total=steps, disable=not is_first,
                                mininterval=0.5 if sys.stderr.isatty() else 10)
                step = begin
                try:
                    for step in progress:
                        step_start, n = time.time(), n + 1
                        before_step = [p.detach().clone() for p in trained]
                        scale = learning_rate_scale(step, steps, config.warmup)
                        optimizer.scale_lr(scale)
                        # The upper level's step differentiates through the last lower-level ones, so these are kept.
                        keep = bool(optimizer.upper) and -step % config.upper_every < config.unroll_steps
                        count = math.ceil(config.batch_size / config.hvp_batch) if keep and config.hvp_batch else config.accumulate
                        loss = optimizer.lower_step(lower_loss_fn if config.gram_weight else loss_fn, *shares(next(train_batches), count), keep=keep)
                        line = {"step": n, "phase": phase, "train_loss": loss.item(), "lower_lr": scale * config.lower_lr}
                        for i in range(config.upper_steps if optimizer.upper and step % config.upper_every == 0 else 0):
                            again = shares(next(train_batches)) if i else None  # the kept steps serve the first
                            val_loss = optimizer.upper_step(loss_fn, again, shares(next(val_batches)))
                            line |= {"val_loss": val_loss.item(), "upper_lr": scale * config.upper_lr}
                        last_finite = before_step
                        if step in marks and is_first:
                            trajectory.record(model, phase, n)
                        line["seconds"] = round(time.time() - step_start, 4)
                        metrics.append(line)
                        log.write(json.dumps(line) + "\n")  # one whole line at a time
                        log.flush()
                        progress.set_postfix(lower=f"{line['train_loss']:.3f}", refresh=False,
                                             **({"upper": f"{line['val_loss']:.3f}"} if "val_loss" in line else {}))
                        stop = asked_everywhere(signals)
                        # Between two turns of the upper level, when no lower-level step waits to be differentiated.
                        if not optimizer.past and step < steps and (stop or step - last_kept >= config.checkpoint_every):
                            seconds[phase], last_kept = earlier + time.time() - phase_start, step
                            keep_state(index, step, optimizer)
                            if stop:
                                save()
                                raise checkpoint.Stopped(f"stopped at {phase} step {step} of {steps}", stop)
                    with torch.no_grad():
                        final_loss = distributed.add_up([sum(loss_fn(model, part) for part in shares(next(train_batches)))])[0]
                    if not torch.isfinite(final_loss):
                        raise FloatingPointError(f"loss {final_loss:g} after the last step")
                except FloatingPointError as error:
                    progress.close()
                    if last_finite:  # else the folder holds what the phase before has left
                        assign(trained, last_finite)
                        save()
                    raise FloatingPointError(f"{phase} step {step} of {steps} is not finite ({error}): lower lower_lr or upper_lr; "
                                             f"the weights of the last good step are in {out}") from None
                seconds[phase] = earlier + time.time() - phase_start
                save()
                keep_state(index + 1, 0)
                if stop := asked_everywhere(signals):
                    raise checkpoint.Stopped(f"stopped at the end of {phase}", stop)
    except OSError as error:
        hint = f"; go on elsewhere with --resume={out} --out_dir=..." if checkpoint.names(out) else ""
        raise OSError(f"{error}{hint}") from None

    after = evaluate_all()
    results = {
        "method": config.method, "model": config.model, "dtype": dtype_name, "seed": config.seed,
        "quantize": config.quantize, "weight_bytes": weight_bytes,
        "examples": {name: len(examples) for name, examples in parts.items()},
        "evaluated": {name: len(rows) for name, rows in evaluated.items()},
        "before": before, "after": after, "trainable_parameters": sizes,
        "seconds": seconds | {"total": elapsed + time.time() - started},
        "peak_memory_gb": hardware.peak_memory(device), "peak_memory_beyond_start_gb": hardware.peak_memory(device) - memory_at_start,
        "processes": distributed.WORLD_SIZE, "local_weight_bytes": local_weight_bytes, "out_dir": str(out),
    }
    if not is_first:
        return results
    report.plot_losses(out / "loss.png", metrics, results)
    write_json(out / "summary.json", results)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if (checkpoint.previous_of(out) / checkpoint.REPLACED).exists():
        checkpoint.remove_run(checkpoint.previous_of(out))
    print(report.table(results))
    return results


def main(arguments):
    if not arguments:
        print(__doc__.strip() + "\n\nStart with:\n"
              "    python train.py --config=small.py    (downloads 95 MB, takes some 3 minutes on two CPU cores)\n"
              "    python train.py --config=tiny.py     (downloads nothing, takes seconds)")
        return 0
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip(), settings.help_text(Config), sep="\n\n")
        return 0
    try:
        config = read_config(arguments)
        if distributed.RANK > 0:
            sys.stdout = open(os.devnull, "w")
        results = train(config)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory ({str(error).splitlines()[0]}): lower batch_size, hvp_batch or block_size, "
              f"or try --auto_hardware=True",
              file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        if distributed.LOCAL_RANK == 0:  # once for each machine, whose files and network may differ
            print(f"error: {error}", file=sys.stderr)
        return 2
    except checkpoint.Stopped as error:
        again = shlex.join([argument for argument in arguments if not argument.startswith(("--resume=", "--overwrite="))])
        command = f"python train.py {again}" if distributed.WORLD_SIZE == 1 else "the same torchrun command and"
        if distributed.LOCAL_RANK == 0:
            print(f"{error}; go on with: {command} --resume=True", file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    out, other = results["out_dir"], "dora" if config.method in BILEVEL else "bidora"
    again = shlex.join([argument for argument in arguments if not argument.startswith(("--method=", "--out_dir=", "--overwrite=", "--resume="))])
    prompts = {"movie-sentiment": "Dull, clumsy and far too long.", "product-sentiment": "It broke within a week.", "toy-sentiment": "aeae lim aeae tik"}
    prompt = "..." if config.train_file else prompts[config.data]
    print(f"next:\n  python sample.py --adapter={out} --prompt=\"{prompt}\"\n"
          f"  python train.py {again} --method={other} --out_dir={out}-{other}    # the same data and budget")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
