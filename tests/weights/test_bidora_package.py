"""
The `bidora` package's names here: its signatures, read from its wheel by ast, and the Python of its
README, run on a tiny model. The package is not installed: it pulls in a torchvision that does not
fit a CPU's torch, and transformers then fails to import.
"""

import ast
import inspect
import json
import operator
import re
import zipfile
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn as nn
import transformers
from peft import PeftModel

import bidora
import hypergrad
from support.run.files import fetch
from support.weights import bidora_package

SHA256 = "6f6a425fa3f9761ba51ed3a125c333bec659e9d7c0ba86d9b35161435563a7d2"
# What differs on purpose (docs/coming-from.md).
DIFFERENT_DEFAULTS = {
    "replace_linear_with_bidora.target_modules",  # the four names, which the package puts for None
    "prepare_bidora_model.quantized",  # None: the weights show it
    "ModelConfig.trust_remote_code",  # False is the safe choice
}


@pytest.fixture(scope="module")
def package():
    """{file: its text} of the package, and its README."""
    with zipfile.ZipFile(fetch(f"wheel 0.023 {SHA256} bidora==0.1.2")) as wheel:
        return {name: wheel.read(name).decode() for name in wheel.namelist()}


def definitions(files):
    """The package's functions and classes by name, methods as "Class.method"."""
    found = {}
    for name, text in files.items():
        if not name.startswith("bidora/") or name.endswith("cli.py"):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = node
            if isinstance(node, ast.ClassDef):
                inner = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                found |= {f"{node.name}.{n.name}": n for n in inner}
    return found


def their_parameters(function):
    """{name: default as source, or None} of a function, in order, without self."""
    names = [a.arg for a in function.args.args if a.arg != "self"]
    defaults = [ast.literal_eval(d) for d in function.args.defaults]
    required = len(names) - len(defaults)
    return {n: defaults[i - required] if i >= required else ... for i, n in enumerate(names)}


def our_parameters(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    return {p.name: ... if p.default is p.empty else p.default for p in positional}


FUNCTIONS = """
replace_linear_with_bidora create_bilevel_optimizer create_bnb_config get_hardware_info
load_model_and_tokenizer prepare_bidora_model load_and_prepare_dataset prepare_dataset_for_training
train_bidora BiDoRALinear.__init__ BiDoRATrainer.__init__ BiDoRATrainer.train
BiLevelOptimizer.lower_level_step BiLevelOptimizer.upper_level_step BiLevelOptimizer.bilevel_step
BiLevelOptimizer.final_finetune_step FullConfig.auto_adjust_for_hardware
"""


@pytest.mark.parametrize("name", FUNCTIONS.split())
def test_calls_by_place_and_by_name_work(name, package):
    """Ours has the package's parameters first, with its defaults; more may follow."""
    theirs = their_parameters(definitions(package)[name])
    ours = our_parameters(operator.attrgetter(name)(bidora))
    assert list(ours)[: len(theirs)] == list(theirs)
    for parameter, default in theirs.items():
        if default is not ... and f"{name}.{parameter}" not in DIFFERENT_DEFAULTS:
            assert ours[parameter] == default
    assert all(ours[extra] is not ... for extra in list(ours)[len(theirs) :])


@pytest.mark.parametrize("kind", ["BiDoRA", "Training", "Model", "Data", "Full"])
def test_settings_have_the_packages_names_defaults_and_ranges(kind, package):
    name = f"{kind}Config"
    ours = getattr(bidora, name)
    fields = {f.name: f for f in bidora_package.fields(ours)}
    declared = [n for n in definitions(package)[name].body if isinstance(n, ast.AnnAssign)]
    assert list(fields) == [n.target.id for n in declared]
    for node in declared:
        options = {k.arg: k.value for k in node.value.keywords}
        where = f"{name}.{node.target.id}"
        default = options.get("default")
        if isinstance(default, ast.Constant) and where not in DIFFERENT_DEFAULTS:
            assert getattr(ours(), node.target.id) == default.value, where
        ranges = [ast.literal_eval(options[k]) for k in ("ge", "le") if k in options]
        for bound, step in zip(ranges, (-1, 1)):
            with pytest.raises(ValueError, match=node.target.id):
                ours(**{node.target.id: bound + step})


def test_every_name_that_the_package_exports_is_found(package):
    [exported] = re.findall(r"(?s)__all__ = (\[.*?\])", package["bidora/__init__.py"])
    for name in ast.literal_eval(exported):
        assert name == "__version__" or getattr(bidora, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        bidora.no_such  # noqa: B018


def snippets(files, language):
    [readme] = [text for name, text in files.items() if name.endswith("METADATA")]
    return re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)


@pytest.fixture
def tiny(package, tmp_path, monkeypatch):
    """A working folder with a tiny model "tiny", and the README's examples as data files."""
    monkeypatch.chdir(tmp_path)
    blocks = "".join(snippets(package, "json") + snippets(package, "bash"))
    lines = re.findall(r'(?m)^\{"instruction".*$', blocks)
    assert len(lines) >= 3
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("\n".join(lines * 4))
    Path("data/val.jsonl").write_text("\n".join(lines[:2]))

    words = re.findall(r"\w+|[^\w\s]+", " ".join(lines) + "### Instruction: Input: Response:")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *dict.fromkeys(words)])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(eos_token="</s>", unk_token="<unk>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained("tiny")
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained("tiny")


def test_the_readmes_python_runs(package, tiny, capsys):
    """Training first: the other snippet loads its result. Adapted: the model's name, its folder."""
    use, train = snippets(package, "python")
    names = {}
    exec(train.replace("Qwen/Qwen3-4B", "tiny"), names)
    assert "trainable parameters" in capsys.readouterr().out

    use = use.replace("Qwen/Qwen3-4B", "tiny").replace("./rust_3d_model", "./output")
    exec(use, names)
    assert "Create" in capsys.readouterr().out  # the prompt is printed with its continuation


def prepared(**settings):
    config = bidora.FullConfig(
        model=bidora.ModelConfig(model_name="tiny", quantization="none"),
        bidora=bidora.BiDoRAConfig(dropout=0.0, **settings),
        training=bidora.TrainingConfig(learning_rate=1e-3, num_epochs=2, batch_size=2),
        data=bidora.DataConfig(Path("data/train.jsonl"), Path("data/val.jsonl")),
        output_dir=Path("run"),
    )
    model, tokenizer = bidora.load_model_and_tokenizer(config.model)
    model = bidora.prepare_bidora_model(model, config.bidora)
    examples = bidora.load_and_prepare_dataset(config.data)
    return model, tokenizer, bidora.prepare_dataset_for_training(examples, tokenizer, 64), config


def test_the_trainer_learns_along_a_true_hypergradient_and_saves_for_others(tiny):
    model, tokenizer, rows, config = prepared(rank=4)
    base = transformers.AutoModelForCausalLM.from_pretrained("tiny")
    trainer = bidora.train_bidora(model, tokenizer, rows, config)
    assert trainer.bilevel_optimizer.function is hypergrad.unrolled
    batch = trainer.collate(rows["validation"])
    with torch.no_grad():
        before, after = (m.eval()(**batch).loss for m in (base, model))
        peer = PeftModel.from_pretrained(base, "run/final_adapter").eval()(**batch).logits
        loaded = transformers.AutoModelForCausalLM.from_pretrained("run/final_model")
        # The merged weights are rounded once: 1e-5 of logits of about 1.
        torch.testing.assert_close(peer, model(**batch).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded.eval()(**batch).logits, peer, rtol=0, atol=1e-5)
    assert after < before


def test_the_configs_multipliers_and_lower_steps_reach_the_optimizer(tiny):
    multipliers = dict(lower_lr_multiplier=3.0, upper_lr_multiplier=5.0)
    model, tokenizer, rows, config = prepared(rank=4, lower_steps=4, **multipliers)
    trainer = bidora.BiDoRATrainer(model, tokenizer, *rows.values(), config, "run")
    optimizer = trainer.bilevel_optimizer
    assert optimizer.lower_optimizer.param_groups[0]["lr"] == pytest.approx(3e-3)
    assert optimizer.upper_optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    assert optimizer.lower_steps == 4


@pytest.mark.parametrize(
    "settings, method, scale",
    [
        (dict(), "bidora", 16 / 2),
        (dict(use_rslora=False), "bidora", 16 / 4),
        (dict(use_bidora=False, use_dora=True), "dora", 16 / 2),
        (dict(use_bidora=False), "lora", 16 / 2),
    ],
)
def test_the_adapters_settings_choose_method_and_scale(settings, method, scale):
    """s = alpha / √rank with use_rslora, alpha / rank without."""
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
    config = bidora.BiDoRAConfig(rank=4, target_modules=["q_proj"], **settings)
    bidora.prepare_bidora_model(model, config)
    assert model["q_proj"].method == bidora.METHODS[method]
    assert model["q_proj"].scaling == pytest.approx(scale)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("q_proj.lora_") for name in trained)


def test_gradients_of_accumulated_parts_are_those_of_one_batch(tiny):
    """4 parts of one row, and one part of four rows: 1e-6, fp32 summed in another order."""
    losses = []
    for rows_at_once in (1, 4):
        torch.manual_seed(0)
        model, tokenizer, rows, config = prepared(rank=4)
        config.training.batch_size = rows_at_once
        config.training.gradient_accumulation_steps = 4 // rows_at_once
        trainer = bidora.BiDoRATrainer(model, tokenizer, *rows.values(), config, "run")
        batch = next(trainer.batches(rows["train"]))
        assert len(batch) == 4 // rows_at_once
        losses.append(sum(trainer.loss(model, part).item() for part in batch))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_padding_and_prompts_are_not_learnt(tiny):
    model, tokenizer, rows, config = prepared(rank=4)
    trainer = bidora.BiDoRATrainer(model, tokenizer, *rows.values(), config, "run")
    tensors = trainer.collate(rows["train"][:3])
    learnt = tensors["labels"] != -100
    assert not (learnt & (tensors["attention_mask"] == 0)).any()
    example = json.loads(Path("data/train.jsonl").read_text().splitlines()[0])
    words = tokenizer.decode(tensors["input_ids"][0][learnt[0]])
    assert words.split() == [*tokenizer.tokenize(example["output"]), "</s>"]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: bidora.BiDoRAConfig(rank=0), "BiDoRAConfig: rank=0 must be from 1 to 128"),
        (lambda: bidora.DataConfig(Path("no/file.jsonl")), "file not found: no/file.jsonl"),
        (lambda: bidora.ModelConfig(quantization="5bit"), "5bit"),
        (lambda: bidora.load_and_prepare_dataset(bidora.DataConfig()), "give train_file or"),
        (
            lambda: bidora.prepare_bidora_model(nn.Linear(4, 4), bidora.BiDoRAConfig(), True),
            "not quantised",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_line(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


def test_the_hardware_adjustment_keeps_sixteen_rows_a_step_and_a_gpus_quantisation(monkeypatch):
    for memory, quantization in ((0, "none"), (8, "4bit"), (24, "4bit"), (80, "4bit")):
        info = {"gpu_memory_gb": memory} if memory else {}
        monkeypatch.setattr(bidora_package, "get_hardware_info", lambda info=info: info)
        config = bidora.FullConfig()
        config.auto_adjust_for_hardware()
        c = config.training
        assert c.batch_size * c.gradient_accumulation_steps == 16
        assert config.model.quantization == quantization
