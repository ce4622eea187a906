"""The main job end to end on configs/tiny.py, its command line, and what it says to wrong input."""

import copy
import ctypes
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import bidora
import bilevel
import data
import sample
import train
from model import Transformer
from support.run import run_folder
from support.weights import quantized
from support.weights.pretrained import find_model
from support.weights.regularisers import regulariser
from tasks import LanguageTask
from tools import merge
from train import Config

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(train.__file__).parent
TINY = dict(model="tiny-random", data="toy-sentiment", dtype="float32", test_size=40)
TINY |= dict(search_steps=4, retrain_steps=3, eval_size=20)
SETTINGS = [f"--{name}={value}" for name, value in TINY.items()]


def command(*arguments, **options):
    """Run a program as a user does: train.py, if none is named. Code may import the project."""
    if arguments[0].startswith("--"):
        arguments = (str(ROOT / "train.py"), *arguments)
    options = dict(env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300) | options
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def trained(out_dir="run", **settings):
    """The results of a run on the tiny model."""
    return train.train(Config(**TINY | settings, out_dir=out_dir))


def learnt(results):
    return results["after"]["test"]["loss"] < results["before"]["test"]["loss"]


def same_loss(results, others, rel):
    ours, theirs = (each["after"]["test"]["loss"] for each in (results, others))
    return ours == pytest.approx(theirs, rel=rel)


def adapter(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


def metrics(folder="run"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def write(path, rows):
    """A file with a JSON object a line; returns its path."""
    Path(path).write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def refused(capsys, *arguments):
    """The one line that a wrong command line is answered with; a later setting takes over."""
    last = {argument.partition("=")[0]: argument for argument in arguments}
    assert train.main([*last.values()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum("error" in line.lower() or "Traceback" in line for line in lines) == 1
    return lines[-1]


HEAVY = {"torch._dynamo", "transformers", "matplotlib", "scipy", "sklearn", "pandas"}
HEAVY |= {"bitsandbytes", "datasets", "pyarrow", "support.weights.bidora_package"}
UNTIL_THE_SECOND_STEP = """
import sys
import train

class Watched(train.Task):
    def lower_loss(self, model, micro_batch):
        if hasattr(self, "stepped"):
            raise FloatingPointError("the second step")
        self.stepped = True
        return super().lower_loss(model, micro_batch)

try:
    train.train(train.Config(model="tiny-random", data="toy-sentiment", test_size=40), Watched)
except FloatingPointError as error:
    print(*sys.modules)
"""


def assert_light(script):
    """The modules that a script prints at its end hold torch, and no other large library."""
    done = command("-c", script)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.splitlines()[-1].split())
    assert "torch" in modules and not HEAVY & modules


@pytest.mark.parametrize("program, refused", [("train", "--rnak=4"), ("sample", "--top_p=-1")])
def test_help_and_refusals_import_torch_and_no_other_large_library(program, refused):
    assert_light(f"""
import sys, {program}
assert {program}.main(["--help"]) == 0
assert {program}.main(["--model=a", {refused!r}]) == 2
print(*sys.modules)
""")


def test_the_first_step_of_each_level_is_taken_without_other_large_libraries():
    assert_light(UNTIL_THE_SECOND_STEP)


def test_tiny_config_learns_and_leaves_all_its_files():
    done = command("--config=tiny.py")
    assert done.returncode == 0, done.stderr
    out = Path("out/tiny")
    adapters = {"adapter_config.json", "adapter_model.safetensors"}
    others = {"loss.png", "metrics.jsonl", "run.json", "summary.json"}
    assert {p.name for p in out.iterdir()} == adapters | others
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    config = json.loads((out / "run.json").read_text())
    assert summary["before"]["test"]["accuracy"] < 0.6 < 0.9 < summary["after"]["test"]["accuracy"]
    search, retrain, lines = config["search_steps"], config["retrain_steps"], metrics(out)
    assert [line["step"] for line in lines] == list(range(1, search + retrain + 1))
    assert [line["phase"] for line in lines] == ["search"] * search + ["retrain"] * retrain
    assert all("val_loss" in line for line in lines[:search]) and "val_loss" not in lines[-1]
    said = "bidora on tiny-random, before training: test accuracy, accuracy after, seconds: search"
    said += ", trainable parameters:, peak memory:, sample.py --adapter=out/tiny"
    assert all(words in done.stdout for words in said.split(", "))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-random"  # no folder of this machine


@pytest.mark.parametrize("method", ["ft", "lora", "dora", "bidora", "bilora"])
def test_every_method_takes_the_same_lower_steps_and_reports_alike(method):
    results, bilevel = trained(method=method), train.is_bilevel(Config(method=method))
    assert len(metrics()) == 7
    assert [*results["seconds"]] == [*(("search", "retrain") if bilevel else ["train"]), "total"]
    assert (results["trainable_parameters"]["upper"] > 0) == bilevel
    assert results["examples"] == {"train": 160, "val": 40, "test": 40} and learnt(results)


@pytest.mark.parametrize(
    "options",
    [
        dict(hypergradient="first_order"),
        dict(hypergradient="unrolled", hypergradient_steps=2, upper_every=2),
        dict(hypergradient="finite_difference"),
        dict(hypergradient="neumann"),
        dict(hypergradient="conjugate_gradient"),
        dict(upper_every=2, hypergradient_steps=2, precondition="adam"),
        dict(precondition="adam", hypergradient="neumann", hypergradient_lr=1e-6),
        dict(micro_batch_size=1),
        dict(upper_every=2),
        dict(final_init="continue"),
        dict(norm_grad="detach"),
        dict(magnitude_axis="column"),
        dict(method="bilora_softmax", gram_weight=0.01),
        dict(method="bilora_binary", upper_steps=2, upper_every=2),
        dict(gram_weight=1e-3),
        dict(gram_weight=1e-3, magnitude_axis="column", micro_batch_size=2),
        dict(optimizer="adamw8bit"),
    ],
)
def test_every_way_to_train_runs_through_all_phases(options):
    assert learnt(trained(**options))


def test_magnitude_only_moves_magnitudes_and_keeps_directions():
    """Of up_proj's rows; of q_proj's both move. PEFT reads the file."""
    adapted = dict(target_modules=("q_proj",), magnitude_only=("up_proj",))
    assert learnt(trained(**adapted, lower_lr=1e-2, upper_lr=0.1))
    base = transformers.AutoModelForCausalLM.from_pretrained(find_model("tiny-random"))
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(base), "run").merge_and_unload()
    for name, before in base.named_parameters():
        after = tuned.get_parameter(name)
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            assert not torch.allclose(after.norm(dim=1), before.norm(dim=1), rtol=1e-4)
            turns = 1 - torch.cosine_similarity(after, before).min().item()
            assert (turns > 1e-4) == ("q_proj" in name) and (turns < 1e-6) == ("up_proj" in name)
        else:
            assert torch.equal(after, before)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another():
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trained(name, seed=seed)
    a, b, c = map(adapter, "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_the_test_examples_never_change_and_are_never_trained_on():
    texts = []
    for seed in (0, 1):
        parts = data.load_splits(Config(**TINY, seed=seed)).splits
        sets = {name: {example["text"] for example in part} for name, part in parts.items()}
        assert not sets["test"] & (sets["train"] | sets["val"]) and not sets["train"] & sets["val"]
        texts.append(sets)
    assert texts[0]["test"] == texts[1]["test"] and texts[0]["train"] != texts[1]["train"]


def test_held_out_losses_choose_the_weights_and_end_a_phase(capsys):
    seen = []  # the weights before each step

    class Watched(train.Task):
        def lower_loss(self, model, micro_batch):
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
            return super().lower_loss(model, micro_batch)

    options = dict(method="lora", lower_lr=0.1, search_steps=12, retrain_steps=12)
    plain = Config(**TINY | options, held_fraction=0.2, eval_every=2, out_dir="plain")
    results = train.train(plain)
    losses = {line["step"]: line["held_loss"] for line in metrics("plain") if "held_loss" in line}
    assert [*losses] == [*range(2, 25, 2)] and losses[24] == results["after"]["held"]["loss"]
    lowest = {s: min(x for step, x in losses.items() if step <= s + 4) for s in losses}
    best = next(step for step, loss in losses.items() if loss == lowest[step])
    chosen = dataclasses.replace(plain, keep="best", patience=2, out_dir="chosen")
    results = train.train(chosen, Watched)
    assert [line["step"] for line in metrics("chosen")] == [*range(1, best + 5)] and best < 20
    assert results["after"]["held"]["loss"] == losses[best]
    for name, value in adapter("chosen").items():
        own = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(seen[best][own], value)
    said = f"train: {best + 4} of 24 steps; the lowest held-out loss, {losses[best]:.3f}, came"
    out = capsys.readouterr().out
    assert f"{said} after step {best}, whose weights are kept" in out
    assert results["kept_step"] == best and f"the weights are those of step {best}, by" in out


def test_held_out_examples_train_nothing_and_their_losses_change_nothing():
    parts = data.load_splits(Config(**TINY, held_fraction=0.2)).splits
    texts = {name: {example["text"] for example in part} for name, part in parts.items()}
    held, others = texts.pop("held"), set().union(*texts.values())
    assert len(held) == 32 and not held & others
    for every in (0, 1):
        trained(str(every), held_fraction=0.2, eval_every=every, dropout=0.1)
    ours, theirs = adapter("0"), adapter("1")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.parametrize("method, final_init", [("dora", "fresh"), ("bidora", "continue")])
def test_a_run_starts_from_an_adapter(method, final_init, capsys):
    first = trained("first", method="dora", rank=3, alpha=5.0)
    config = train.read_config(["--adapter=first", f"--method={method}", "--data=toy-sentiment"])
    assert config.model == "tiny-random"  # the base is the adapter's
    own = dict(method=method, adapter="first", final_init=final_init, norm_grad="detach")
    second = trained("second", **own, search_steps=9, retrain_steps=9)
    assert second["before"] == {"test": first["after"]["test"]} and learnt(second)
    assert json.loads(Path("second/adapter_config.json").read_text())["r"] == 3
    lora = ["--out_dir=third", "--adapter=first", "--method=lora"]
    assert "use_dora=True does not fit method=lora" in refused(capsys, *SETTINGS, *lora)


def test_the_next_run_is_not_refused_and_names_the_dtype(capsys):
    steps = ["--search_steps=1", "--retrain_steps=1", "--out_dir=run", "--overwrite"]
    lora = ["--method=lora", "--val_fraction=0", "--dtype=auto"]
    for arguments, method in ((lora, "bidora"), (["--upper_weight_decay=1"], "dora")):
        assert train.main([*SETTINGS[:2], *steps, *arguments]) == 0
        copied = re.search(r"  python train.py (.*)", capsys.readouterr().out)[1]
        config = train.read_config(shlex.split(copied, comments=True))
        train.check(config)
        dtype = json.loads(Path("run/run.json").read_text())["dtype"]
        assert (config.method, config.dtype, config.val_fraction) == (method, dtype, 0.2)


def test_magnitude_learns_in_search_and_rests_in_retrain(monkeypatch):
    """It is ‖W0‖ in the adapter saved at first; what search and the end save is another one."""
    saved, save = [], bidora.save_adapter

    def spy(model, folder, *names):
        save(model, folder, *names)
        saved.append(adapter(folder))

    monkeypatch.setattr(bidora, "save_adapter", spy)
    trained()
    start, searched, final = saved
    magnitudes = [key for key in start if "magnitude" in key]
    assert magnitudes
    for key in magnitudes:
        assert torch.equal(searched[key], final[key]) and not torch.equal(start[key], final[key])


def test_retrain_starts_afresh_or_continues():
    """Adam's first step moves no entry by more than the rate: B is no larger if it was zero."""
    largest = []
    for final_init in ("fresh", "continue"):
        trained(final_init, retrain_steps=1, lower_lr=1e-3, final_init=final_init)
        B = [t for key, t in adapter(final_init).items() if "lora_B" in key]
        largest.append(max(t.abs().max().item() for t in B))
    assert largest[0] <= 1.001e-3 < largest[1]


@pytest.mark.parametrize("method", ["bidora", "dora"])
def test_each_level_sees_its_own_examples_only(monkeypatch, method):
    """Search: V and second derivatives on train, m on val. Other phases: train + val."""
    seen, batch = [], data.Batches.__getitem__

    def spy(self, k):
        seen.append({tuple(row.input_ids) for row in self.rows})
        return batch(self, k)

    monkeypatch.setattr(data.Batches, "__getitem__", spy)
    trained(method=method)
    parts, question, *_ = data.load_splits(Config(**TINY))
    tokenizer = data.Tokenizer.from_pretrained(find_model("tiny-random"))
    label_ids = data.tokenize_labels(["no", "yes"], tokenizer)
    only_train, only_val = (
        {tuple(row.input_ids) for row in data.encode(part, tokenizer, 256, question, label_ids)[0]}
        for part in (parts["train"], parts["val"])
    )
    both = only_train | only_val
    # search: lower and val batches of four steps; three lower steps of retrain; a check at each end
    search = [only_train, only_val] * 4 + [only_train]
    assert seen == (search + [both] * 4 if method == "bidora" else [both] * 8)


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora", "bidora"])
def test_every_method_trains_on_a_packed_base(capsys, quantize, method):
    results = trained(method=method, quantize=quantize, lower_lr=1e-2)
    assert learnt(results) and results["quantize"] == quantize
    assert f"{quantize} and float32 on cpu" in capsys.readouterr().out
    plain = Transformer.from_pretrained(find_model("tiny-random"))
    assert results["weight_bytes"] < 0.65 * quantized.nbytes(plain)


def test_memory_settings_change_no_result():
    """Parts and checkpointing compute the same numbers, up to the order of fp32 sums."""
    whole = trained("whole", dropout=0.0)
    lean = trained("lean", dropout=0.0, micro_batch_size=1, gradient_checkpointing=True)
    assert same_loss(lean, whole, 1e-4)
    assert not same_loss(trained("dropped", dropout=0.1), whole, 1e-4)


def test_a_compiled_run_gives_the_same_adapter():
    """Within 1e-4: sums in another order, magnified by AdamW where gradients are near 0."""
    options = dict(hypergradient="first_order", target_modules=("down_proj",))  # all seven: 40 s
    plain, compiled = (trained(str(x), compile=x, **options) for x in (False, True))
    ours, theirs = adapter("True"), adapter("False")
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-4
    assert same_loss(compiled, plain, 1e-4)


def test_without_a_compiler_compile_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "C++ compiler" in refused(capsys, "--config=tiny.py", "--compile=True", "--method=dora")


def test_auto_hardware_says_what_it_picks_and_why(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("support.run.hardware.free_memory", lambda device: 2e6)  # next to nothing
        trained(auto_hardware=True, quantize="none")
    out = capsys.readouterr().out
    lean = dict(block_size=128, quantize="none", gradient_checkpointing=True, micro_batch_size=1)
    assert "auto_hardware: 0.0 GB free" in out and "nothing leaner is left" in out
    assert ", ".join(f"{name}={value}" for name, value in lean.items()) in out
    assert json.loads(Path("run/run.json").read_text()).items() >= lean.items()
    arguments = ["--auto_hardware=True", "--search_steps=2", "--retrain_steps=1"]
    assert train.main(["--config=tiny.py", *arguments]) == 0
    said = "quantize=none, gradient_checkpointing=False, micro_batch_size=4"
    assert said in capsys.readouterr().out


GREEDY = ["--temperature=0", "--max_new_tokens=5", "--raw"]


def assert_merged_as(model):
    """Transformers reads the folder `merged`, and computes the model's logits."""
    ids = torch.randint(3, 200, (2, 9))
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    torch.testing.assert_close(merged(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method,quantize", [("bidora", "none"), ("dora", "nf4"), ("lora", "none")])
def test_merge_makes_a_plain_model_that_answers_alike(capsys, method, quantize):
    trained(method=method, quantize=quantize, lower_lr=1e-2)
    assert merge.main(["--adapter=run", "--out_dir=merged"]) == 0
    out = capsys.readouterr().out
    assert ("the nf4 base was dequantised to float32" in out) == (quantize == "nf4")
    assert "sample.py --model=merged" in out
    answers = []
    for model in ("--adapter=run", "--model=merged"):
        assert sample.main([model, "--prompt=aeae lim", *GREEDY]) == 0
        assert sample.main([model, "--prompt=aeae lim"]) == 0  # among the run's labels
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and "%  yes" in answers[0]
    assert_merged_as(sample.load(adapter="run")[0])


def test_a_fully_tuned_model_can_be_packed_when_sampled():
    trained(method="ft")
    model, _, run = sample.load(adapter="run", quantize="nf4")
    assert quantized.kind_of(model.model.layers[0].mlp.up_proj.weight) == "nf4"
    assert run["labels"] == ["no", "yes"]


def test_micro_batches_of_any_size_are_made():
    """Of equal sizes where possible; 0 is the whole batch."""
    rows = [data.Encoded([1, 2], [1, 2])] * 8
    for size, sizes in ((0, [8]), (9, [8]), (3, [3, 3, 2]), (2, [2] * 4), (1, [1] * 8)):
        parts = data.micro_batches(rows, size)
        assert [len(part) for part, _ in parts] == sizes
        assert sum(share for _, share in parts) == pytest.approx(1)


def test_a_merged_model_in_another_dtype_than_its_base_is_said(capsys):
    trained(dtype="bfloat16")
    assert merge.main(["--adapter=run", "--out_dir=merged"]) == 0
    said = "the base's weights are in float32, the merged ones in bfloat16, as trained"
    assert said in capsys.readouterr().out
    assert load_file("merged/model.safetensors").popitem()[1].dtype == torch.bfloat16


def test_merge_refuses_what_it_cannot_do(refuses):
    trained("whole", method="ft")
    refuses(merge, ["--adapter=whole", "--out_dir=new"], "is a whole model already")
    refuses(merge, ["--adapter=none", "--out_dir=new"], "no folder none")
    for folder in ("whole", "whole/run.json"):
        refuses(merge, ["--adapter=whole", f"--out_dir={folder}"], "not an empty folder")
    assert not Path("new").exists()


def test_an_adapter_that_peft_trained_elsewhere_is_sampled_and_merged(refuses):
    base = transformers.AutoModelForCausalLM.from_pretrained(find_model("tiny-random"))
    options = dict(r=3, use_rslora=True, use_dora=True, target_modules="all-linear")
    peer = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    for name, parameter in peer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peer.save_pretrained("adapter")
    ours = ["--adapter=adapter", "--prompt=aeae"]
    assert sample.main([*ours, *GREEDY]) == 0  # the base is the one that it names
    assert sample.main([*ours, "--model=tiny-random", "--labels=yes,no"]) == 0
    assert merge.main(["--adapter=adapter", "--model=tiny-random", "--out_dir=merged"]) == 0
    assert_merged_as(lambda ids: peer(ids).logits)
    Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")
    refuses(sample, ours, "adapter_model.safetensors is missing")


def test_gram_weight_keeps_directions_apart():
    """The same run with a large weight ends with a smaller regulariser, and a higher train loss."""
    overlaps, losses = [], []
    for weight in (0.0, 1.0):
        results = trained(str(weight), retrain_steps=30, lower_lr=1e-2, gram_weight=weight)
        model, _, _ = sample.load(adapter=str(weight))
        overlaps.append(regulariser(bidora.adapter_layers(model).values()).item())
        losses.append(results["after"]["train"]["loss"])
    assert overlaps[1] < overlaps[0] and losses[1] > losses[0]


def test_evaluation_against_plain_forward_passes():
    """Loss and accuracy of labels that differ in length, row by row from the logits."""
    folder = find_model("tiny-random")
    model, tokenizer = Transformer.from_pretrained(folder), data.Tokenizer.from_pretrained(folder)
    label_ids = data.tokenize_labels(["good", "bad", "so-so"], tokenizer)
    examples = [{"text": "film " * i, "label": label} for i in range(1, 5) for label in label_ids]
    rows, _ = data.encode(examples, tokenizer, 256, "{text}", label_ids)
    total = right = tokens = 0
    for row in rows:
        scores = {}
        for label, ids in label_ids.items():
            with torch.no_grad():
                log_p = model(torch.tensor([row.prompt_ids + ids]))[0].log_softmax(-1)
            places = range(len(row.prompt_ids) - 1, len(row.prompt_ids) - 1 + len(ids))
            scores[label] = log_p[places, ids].sum().item()
        total -= scores[row.label]
        tokens += len(label_ids[row.label])
        right += max(scores, key=scores.get) == row.label
    family = LanguageTask(tokenizer, "{text}", label_ids, False, {}, None)
    task = SimpleNamespace(model=model, family=family, config=Config(), device="cpu")
    result = train.evaluate_rows(task, rows)
    assert result["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert result["accuracy"] == right / len(rows)
    family.label_ids = {}  # the same loss by the other branch
    assert train.evaluate_rows(task, rows)["loss"] == pytest.approx(result["loss"], rel=1e-4)


def test_learning_rate_rises_then_falls_to_a_tenth():
    scales = [train.learning_rate_scale(step, 50) for step in range(1, 51)]
    assert scales[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert scales[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(scales[4:], scales[5:]))
    assert train.learning_rate_scale(1, 1) == 1


@pytest.mark.parametrize(
    "name, steps, expected",
    [
        ("unrolled", 2, {"lr": 0.5, "steps": 2}),
        ("neumann", 7, {"terms": 7, "alpha": 0.5}),
        ("conjugate_gradient", 7, {"iterations": 7, "damping": 0.3}),
    ],
)
def test_hypergradient_options_reach_the_function(monkeypatch, name, steps, expected):
    given = []

    def spy(train_loss, val_loss, lower, upper, past, reduce, **options):
        given.append(options)
        assert len(past) == (2 if name == "unrolled" else 1)
        val_loss[0]()
        return [torch.zeros_like(m) for m in upper]

    entry = dataclasses.replace(bilevel.HYPERGRADIENTS[name], function=spy)
    monkeypatch.setitem(bilevel.HYPERGRADIENTS, name, entry)
    options = dict(hypergradient_steps=steps, hypergradient_lr=0.5, damping=0.3)
    trained(hypergradient=name, upper_every=2, **options)
    assert given == [expected] * 2


TALK = [("user", "{i}?"), ("assistant", "yes")]


@pytest.mark.parametrize(
    "row",
    [
        lambda i: {"text": f"the film {i} was fine"},
        lambda i: {"prompt": f"{i}+1=", "completion": str(i + 1)},
        lambda i: {"messages": [{"role": r, "content": x.format(i=i)} for r, x in TALK]},
        lambda i: {"instruction": "Say", "input": str(i), "output": str(i)},
        lambda i: {"code": f"x = {i}"},
        lambda i: {"text": f"{i}", "label": "odd" if i % 2 else "even number"},
    ],
)
def test_own_data_in_every_format(row):
    write("own.jsonl", map(row, range(20)))
    own = dict(data="", train_file="own.jsonl")
    results = trained(**own)
    assert results["examples"] == {"train": 16, "val": 4, "test": 0}
    assert results["after"]["test"] is None and 0 <= results["after"]["val"]["accuracy"] <= 1
    results = trained("files", **own, val_file="own.jsonl", test_file="own.jsonl")
    assert results["examples"] == {"train": 20, "val": 20, "test": 20}


def test_sample_classifies_generates_and_chats(capsys, monkeypatch, refuses):
    def sampled(*arguments):
        assert sample.main(arguments) == 0
        return capsys.readouterr()

    trained("labels")
    trained("whole", method="ft")
    write("own.jsonl", [{"prompt": "ab" * i, "completion": "ab"} for i in range(1, 11)])
    trained("free", data="", train_file="own.jsonl")
    capsys.readouterr()
    for folder in ("labels", "whole"):
        out = sampled(f"--adapter={folder}", "--prompt=aeae tik lim").out
        shown = dict(re.findall(r"([\d.]+)%  (\w+)", out))
        assert sorted(shown.values()) == ["no", "yes"] and abs(sum(map(float, shown)) - 100) < 0.2
    for folder in ("free", "labels"):
        shown = sampled(f"--adapter={folder}", "--prompt=abab", "--max_new_tokens=5", "--raw").out
        assert "%" not in shown
    shown = sampled("--adapter=free", "--prompt=abab", "--labels=good, bad,").out
    assert sorted(re.findall(r"%  (.*)", shown)) == ["bad", "good"]
    write("new.jsonl", [{"text": "aeae", "label": "perhaps"}])
    for file, said in (("own", "has the format 'prompt', and"), ("new", "label 'perhaps', which")):
        refuses(sample, ["--adapter=labels", f"--file={file}.jsonl"], said)
    shown = sampled("--adapter=labels", "--prompt=aeae", "--labels=yes,maybe")
    assert shown.err == "note: the run did not learn maybe\n"
    typed = iter(["hello", "and you?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    shown = sampled("--adapter=free", "--chat", "--max_new_tokens=5").out
    assert shown.count("model:") == 2
    refuses(sample, ["--adapter=nowhere", "--prompt=a"], "nowhere")


def test_config_file_then_command_line_then_defaults():
    lines = ["import math", "lower_lr = 1e-2", "rank = 2", "target_modules = ['q_proj']"]
    Path("mine.py").write_text("\n".join([*lines, "method = 'lora'"]))
    arguments = ["--config=mine.py", "--rank=3", "--overwrite=true", "--val_fraction=0.5"]
    mine = Config(lower_lr=1e-2, target_modules=("q_proj",), rank=3, out_dir="out/mine")
    theirs = dict(method="lora", overwrite=True, val_fraction=0.5)
    assert train.read_config(arguments) == dataclasses.replace(mine, **theirs)
    assert train.read_config(["--config=mine.py", "--method=dora"]).out_dir == "out/mine-dora"
    assert train.read_config(["--config=small.py"]).model == "smollm2-135m"
    patterns = train.read_config(["--target_modules=.*[0,1].q{1,2},k_proj"]).target_modules
    assert patterns == (".*[0,1].q{1,2}", "k_proj")  # a comma in brackets separates nothing
    for name in ("mine.json", "mine.JSON"):  # runs nothing
        Path(name).write_text('{"lower_lr": 0.01, "target_modules": ["q_proj"]}')
        assert train.read_config([f"--config={name}", "--rank=3"]) == mine
    with pytest.raises(ValueError, match="'--rank' is given twice, as '4' and as '8'"):
        train.read_config(["--rank=4", "--rank=8"])


def test_help_shows_every_field_with_default_and_comment_and_no_arguments_say_how_to_start(capsys):
    assert train.main([]) == 0
    assert "python train.py --config=small.py" in capsys.readouterr().out
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert re.search(rf"^  --{name}=.*\n        \S", text, re.MULTILINE), name


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--compile=True", "second derivatives"),
        ("--compile=True --quantize=nf4", "or compile=False; compile=True does not work with bits"),
        ("--adapter=a --rank=3 --target_modules=v_proj", "rank, target_modules: an adapter brings"),
        ("--adapter=a --method=ft", "method=ft trains no adapter: merge it first"),
        ("--adapter=a", "final_init=fresh would forget the adapter's directions"),
        ("--keep=best --eval_every=2", "keep: set held_fraction, too: val is trained on"),
        ("--patience=2 --held_fraction=0.2", "patience: set eval_every, in steps, too"),
        ("--method=ft --quantize=nf4", "method=ft trains the base's own weights"),
        ("--rank", "--rank needs a value: write --rank=value or --rank value"),
        ("rank=4", "write --name=value"),
        ("--rank=four", "rank='four' is not an integer"),
        ("--rank=2.5", "not an integer"),
        ("--rank=1e3", "rank='1e3' is not an integer"),
        ("--lower_lr=fast", "not a finite number"),
        ("--lower_lr=nan", "lower_lr='nan' is not a finite number"),
        ("--lower_lr=inf", "lower_lr='inf' is not a finite number"),
        ("--snapshots=1000000000", "snapshots=1000000000 must be at most 1000"),
        ("--seed=18446744073709551616", "seed=18446744073709551616 must be at most"),
        ("--out_dir=.", "out_dir=.: name a folder for this run alone"),
        ("--out_dir=a/..", "out_dir=a/..: name a folder for this run alone"),
        ("--data=nli --train_file=a.jsonl", "data and train_file are two sources: choose"),
        ("--data=file", "data=file is a file: give it as --train_file=file"),
        ("--test_fraction=0.2", "test_fraction is of train_file: set train_file"),
        ("--label_column=x", "label_column: for your own files and sets of the hub"),
        ("--text_column=x --text_b_column=x", "text_column, text_b_column must name different"),
        ("--overwrite=maybe", "not True or False"),
        ("--target_modules=", "not a list"),
        ("--method=bidoar", "did you mean 'bidora'"),
        ("--hypergradient=neuman", "did you mean 'neumann'"),
        ("--data=movie-sentimen", "did you mean 'movie-sentiment'"),
        ("--rank=0 --dropout=1", "rank=0 must be positive; dropout=1.0 must be below 1"),
        ("--lower_lr=-1 --upper_lr=0", "=-1.0 must be at least 0; upper_lr=0.0 must be positive"),
        ("--device=gpu", "unknown device"),
        ("--device=cuda:99", "is not available"),
        ("--device=mps", "device=mps is not available"),
        ("--rank=65", "rank 65 does not fit"),
        ("--method=lora --magnitude_only=up_proj", "magnitude_only: lora has no magnitudes"),
        ("--magnitude_only=qproj", "'qproj'"),
        ("--target_modules=q_proj,qproj", "'qproj' matches no linear layer; there are: down_proj"),
        ("--model=nowhere", "no model 'nowhere'"),
        ("--train_file=nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("--train_file=.", "is a folder"),
        ("--val_fraction=0 --block_size=1", "set val_file, or val_fraction above 0; block_size=1 "),
        ("--val_file=a.csv --label_prompt=hm", "val off their train; label_prompt must contain {t"),
        ("--block_size=1000", "512 positions"),
        ("--block_size=2", "raise block_size"),
        ("--upper_every=5 --hypergradient_steps=6", "level never learns; hypergradient_steps=6 is"),
        ("--precondition=sgd --magnitude_axis=rows", "did you mean 'row'?; unknown precondition"),
        ("--train_size=1960", "fewer than the 2000 examples"),
        ("--train_size=1", "at least 10"),
        ("--search_steps=0 --micro_batch_size=9", "more than batch_size=4; search_steps=0: the up"),
        ("--config=nowhere.py", "no config file 'nowhere.py'"),
        ("--val_fraction=0.001", "leaves an empty split"),
        ("--out_dir=file/run", "file"),
        ("--quantize=nf3", "did you mean 'nf4'"),
        ("--optimizer=adamw8", "did you mean 'adamw'"),
        ("--model=tiny-random@v1", "revision=v1 goes with a name on the hub"),
    ],
)
def test_a_wrong_setting_gets_one_line_and_exit_code_2(capsys, argument, said):
    Path("file").write_text("")
    own = ("--data=", "--test_size=") if argument.startswith("--train_file") else ()
    settings = [setting for setting in SETTINGS if not setting.startswith(own)]
    assert said in refused(capsys, *settings, "--out_dir=run", *argument.split())
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.py", "rank = = 2", "a.py, line 1: SyntaxError"),
        ("a.Py", "rank = 2\nx = 1 / 0", "a.Py, line 2: ZeroDivisionError"),
        ("a.py", "raise SystemExit(0)", "a.py, line 1: SystemExit: 0"),
        ("a.py", "raise ValueError('two\\n   lines')", "a.py, line 1: ValueError: two lines"),
        ("a.py", "lower_lrr = 2", "unknown setting 'lower_lrr'; did you mean 'lower_lr'"),
        ("a.py", "config = 'small.py'", "a.py: unknown setting 'config'; --help lists them all"),
        ("a.py", "rank = 'two'", "rank='two' is not an integer"),
        ("a.json", '{"rank":4, "rank":8}', "a.json is not valid JSON: the key 'rank' occurs twice"),
        ("a.json", '{"out_dir": "a\\u0000b"}', "a.json: out_dir='a\\x00b' is not text"),
        ("a.jsonc", "{}", "config file a.jsonc: its name must end in .py or .json"),
        ("a", "{}", "config file a: its name must end in .py or .json"),
    ],
)
def test_a_wrong_config_file_is_named(capsys, name, text, said):
    Path(name).write_text(text)
    assert said in refused(capsys, f"--config={name}")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "train_rows, val_rows, said",
    [
        ([("a", "x")] * 10, [], "two labels"),
        ([("a", "x"), ("b", "y")] * 5, [("c", "x")], "val lacks the label 'y'"),
        ([("a", "x"), ("b", "y")] * 5, [("c", "x"), ("d", "z")], "label 'z', which train lacks"),
        ([("a", "x")] * 9 + [("b", "y")], [], "label 'y' leaves an empty split"),
    ],
)
def test_labels_that_do_not_fit_are_refused(capsys, train_rows, val_rows, said):
    for name, rows in (("train", train_rows), ("val", val_rows)):
        write(f"{name}.jsonl", [{"text": text, "label": label} for text, label in rows])
    files = ["--train_file=train.jsonl"] + (["--val_file=val.jsonl"] if val_rows else [])
    assert said in refused(capsys, "--config=tiny.py", *files)


def test_long_examples_are_reported_once(capsys):
    write("long.jsonl", [{"prompt": "p" * 90, "completion": "c"}] * 10)
    trained(data="", train_file="long.jsonl", block_size=32)
    assert capsys.readouterr().out.count("10 examples were longer than block_size=32") == 1


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != run_folder.REPLACED}


def test_an_earlier_run_is_kept_unless_overwrite_says_otherwise(capsys):
    trained()
    before = contents("run")
    arguments = [*SETTINGS, "--out_dir=run", "--seed=1"]
    assert "holds an earlier run" in refused(capsys, *arguments)
    arguments.append("--overwrite=True")
    refused(capsys, *arguments, "--target_modules=nothing")  # a wrong setting costs nothing
    assert contents("run") == before
    assert train.main([*arguments, "--method=ft"]) == 0
    assert "adapter_model.safetensors" not in contents("run") and not Path("run.previous").exists()


def test_an_overwritten_run_stays_beside_until_the_new_one_has_finished(capsys, monkeypatch):
    trained()
    before = contents("run")
    arguments = [*SETTINGS, "--out_dir=run", "--overwrite=True"]
    for _ in range(2):  # the second failure must not take the first one for finished work
        assert "is not finite" in (said := refused(capsys, *arguments, "--lower_lr=1e30"))
        assert "lower lower_lr" in said
        assert contents("run.previous") == before

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(train.bidora, "save_adapter", full)
    assert "No space left" in refused(capsys, *arguments)
    assert contents("run") == before and not Path("run.previous").exists()


def test_a_folder_with_other_files_is_never_written_to(capsys):
    """The model's own folder, above all."""
    shutil.copytree(find_model("tiny-random"), "model")
    before = contents("model")
    for extra in ([], ["--overwrite=True"], ["--method=ft"]):
        arguments = ["--config=tiny.py", "--model=model", "--out_dir=model", *extra]
        assert "files but no run" in refused(capsys, *arguments)
    assert contents("model") == before


def test_a_full_disk_is_one_line_before_training(capsys, file_limit):
    assert "File too large" in refused(capsys, "--config=tiny.py")
    assert not list(Path("out").iterdir())


@pytest.mark.parametrize("message", ["[…] DefaultCPUAllocator: can't allocate memory: …\nmore", ""])
def test_too_little_memory_on_a_cpu_is_one_line_as_on_a_gpu(capsys, monkeypatch, message):
    """As torch says it, and as it says it here when asked for 4 EB."""

    def prepare(*_):
        if message:
            raise RuntimeError(message)
        torch.empty(2**60)

    monkeypatch.setattr(train, "prepare", prepare)
    said = refused(capsys, *SETTINGS, "--out_dir=run")
    assert "out of memory" in said and "lower batch_size" in said


@pytest.mark.parametrize("out", ["/proc/run", "link", "link/run", "/dev/null", "/dev/null/run"])
def test_a_folder_that_cannot_be_written_is_one_line(out, capsys):
    Path("link").symlink_to("nowhere")
    assert out.removesuffix("/run") in refused(capsys, *SETTINGS, f"--out_dir={out}")


def as_ordinary_user():
    """In a new process: root is bound by permissions, too."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
            assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # 24: PR_CAPBSET_DROP


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits for folders")
def test_read_only_folders_are_one_line_for_an_ordinary_user():
    trained("mine/run")
    Path("readable").mkdir()
    for path in (Path("readable"), Path("mine/run"), Path("mine")):
        path.chmod(0o555)

    commands = (
        ("train", *SETTINGS, "--out_dir=readable/run"),
        ("train", *SETTINGS, "--out_dir=mine/run", "--overwrite=True"),
        ("tools.merge", "--adapter=mine/run", "--out_dir=readable/merged"),
        ("tools.analysis", "mine/run"),
        ("train", "--config=small.py"),
    )
    script = f"""
import importlib, os
for program, *arguments in {commands}:
    if "--config=small.py" in arguments:
        os.environ["BIDORA_CACHE"] = "readable"
    assert importlib.import_module(program).main(arguments) == 2, program
"""
    done = command("-c", script, preexec_fn=as_ordinary_user)
    errors = done.stderr.strip().splitlines()
    assert done.returncode == 0 and len(errors) == len(commands), done.stderr
    assert all(re.match("error: .*(readable|mine)", error) for error in errors), errors
    assert not list(Path("readable").iterdir())


TOOLS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (*ROOT.glob("tools/[a-z]*.py"), *ROOT.glob("research/[a-z]*.py"))
    if "__main__" in path.read_text("utf-8")
]
PROGRAMS = ["train.py", "sample.py", *TOOLS]
INTERRUPTED = """
import runpy, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
run = runpy.run_path if sys.argv[1].endswith(".py") else runpy.run_module
run(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_interrupt_while_torch_is_imported_is_one_line_with_the_command(program, tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    done = command(str(script), program, "--a=b c", cwd=ROOT)
    again = f"python {script} {program} '--a=b c'"
    assert done.returncode == -signal.SIGINT
    assert done.stderr == f"interrupted; start it again with: {again}\n"


def test_without_network_the_message_says_what_to_put_where(tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    environment = {"BIDORA_CACHE": str(cache), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--config=small.py"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: could not download vaderSentiment==3.3.2")
    assert "vaderSentiment-3.3.2.tar.gz" in last and str(cache / "downloads") in last
    assert not list((cache / "downloads").iterdir())


def test_an_altered_download_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BIDORA_CACHE", str(tmp_path))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"truncated")
    assert "damaged or was altered" in refused(capsys, "--config=small.py")
