"""
Damaged and hostile input, ten thousand cases, and BIDORA_STRESS times as many if that is set.

Every reader accepts the changed file, or raises ValueError or FileNotFoundError in one line that
names it.
"""

import contextlib
import copy
import io
import json
import os
import re
import resource
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_model import LLAMA
from test_tokenizer import HOSTILE

import data
import sample
import train
from bidora import load_adapter, replace_linear_with_bidora, save_adapter
from config import Config, read_config
from model import ModelConfig, Transformer
from research import sweep
from support.text.tokenizer import Tokenizer
from support.weights.pretrained import find_model


def cases(count):
    return settings(
        max_examples=count * int(os.environ.get("BIDORA_STRESS", 1)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )


SCALARS = st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=8)
NUMBERS = st.sampled_from([0, -1, 2**31, 2**63, 10**30])
STRINGS = ["", "../x", "/etc/passwd", "\ud800", "llama", "yarn", "BPE", "{{ 1 }}"]
VALUES = st.recursive(
    SCALARS | NUMBERS | st.sampled_from(STRINGS),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """The paths to all values inside a JSON value; of a list, to the first four."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value[:4]))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))


@st.composite
def changed_json(draw, original):
    """A JSON value with up to three of its inner values replaced or removed."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in places(value) if path]))
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if draw(st.booleans()) and draw(st.booleans()):
            del holder[path[-1]]
        else:
            holder[path[-1]] = draw(VALUES)
        if not list(places(value))[1:]:
            break
    return value


@st.composite
def changed_bytes(draw, original):
    """Bytes overwritten, inserted, deleted or cut off up to four times, mostly in the first 400."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        last = max(0, min(400, len(content)) - 1) if draw(st.integers(0, 3)) else len(content)
        at = draw(st.integers(0, last))
        change, new = draw(st.integers(0, 3)), draw(st.binary(min_size=1, max_size=9))
        if change == 0:
            content[at : at + len(new)] = new
        elif change == 1:
            content[at:at] = new
        elif change == 2:
            del content[at : at + draw(st.integers(1, 50))]
        else:
            del content[at:]
    return bytes(content)


def survives(read, *named):
    """Call read. An error must be one line that contains one of `named`."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError), repr(error)
        assert str(error) and "\n" not in str(error).strip(), str(error)
        assert any(name in str(error) for name in named), str(error)


@pytest.fixture(scope="module")
def folder(request):
    """A temporary folder with a valid model and a valid adapter."""
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as scratch:
        patched.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))
        patched.chdir(scratch)
        shutil.copytree(find_model("tiny-random"), "model")
        model = Transformer.from_pretrained(Path("model")).requires_grad_(False)
        save_adapter(replace_linear_with_bidora(model, 2), "adapter", "tiny-random")
        yield Path(scratch)


LINES = [
    {"text": "aeae lim", "label": "yes"},
    {"text": "ü\u2028", "label": 1},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "", "output": "b"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"code": "x"},
    {"text": "plain"},
]
ANY_LINE = st.one_of(*map(changed_json, LINES), st.sampled_from(LINES))


@cases(2500)
@given(st.lists(ANY_LINE, min_size=1, max_size=3), st.data())
def test_jsonl_with_changed_values(folder, lines, more):
    text = "\n".join(json.dumps(line, ensure_ascii=more.draw(st.booleans())) for line in lines)
    path = folder / "data.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))

    def read():
        examples = data.load_examples(path)
        tokenizer = Tokenizer.from_pretrained(folder / "model")
        labels = sorted({example["label"] for example in examples if "label" in example})
        label_ids = data.tokenize_labels(labels, tokenizer)
        data.encode(examples, tokenizer, 256, data.LABEL_PROMPT, label_ids)

    survives(read, "data.jsonl", "label", "block_size", "example")


@cases(1500)
@given(changed_bytes("\n".join(json.dumps(line) for line in LINES[:2]).encode()))
def test_jsonl_with_changed_bytes(folder, content):
    (folder / "data.jsonl").write_bytes(content)
    survives(lambda: data.load_examples(folder / "data.jsonl"), "data.jsonl:", "data.jsonl holds")


ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPE["original_max_position_embeddings"] = 64


@cases(2500)
@given(changed_json(LLAMA | {"model_type": "llama", "rope_scaling": ROPE}))
def test_config_json(config):
    survives(lambda: ModelConfig.from_hf(config), "config.json")


def copy_of(folder, name, source="model"):
    shutil.copytree(folder / source, folder / name, dirs_exist_ok=True)
    return folder / name


def damage(more, path):
    """Change a file's bytes; of a JSON file, its values or its bytes."""
    content = path.read_bytes()
    if path.suffix == ".json" and more.draw(st.booleans()):
        path.write_text(json.dumps(more.draw(changed_json(json.loads(content)))))
    else:
        path.write_bytes(more.draw(changed_bytes(content)))


@cases(700)
@given(st.data())
def test_tokenizer_json(folder, more):
    copied = copy_of(folder, "tokenizer")
    damage(more, copied / more.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"])))

    def read():
        tokenizer = Tokenizer.from_pretrained(copied)
        tokenizer.decode(tokenizer.encode("aeae <|im_end|> x1 ü"))
        talk = [{"role": "user", "content": "hm"}]
        tokenizer.apply_chat_template(talk, add_generation_prompt=True)

    survives(read, "tokenizer", "template")


@cases(700)
@given(st.data())
def test_safetensors_and_their_index(folder, more):
    shutil.rmtree(folder / "weights", ignore_errors=True)
    copied = copy_of(folder, "weights")
    weights = (copied / "model.safetensors").read_bytes()
    part = more.draw(st.sampled_from(["header", "bytes", "index", "index"]))
    if part == "header":
        end = 8 + int.from_bytes(weights[:8], "little")
        header = json.dumps(more.draw(changed_json(json.loads(weights[8:end])))).encode()
        size = len(header).to_bytes(8, "little")
        (copied / "model.safetensors").write_bytes(size + header + weights[end:])
    elif part == "bytes":
        damage(more, copied / "model.safetensors")
    else:
        names = ("model.norm.weight", "lm_head.weight")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        index = json.dumps(more.draw(changed_json(index)))
        (copied / "model.safetensors.index.json").write_text(index)
    survives(lambda: Transformer.from_pretrained(copied), "model.safetensors", "weights")


@cases(700)
@given(st.data())
def test_adapter_folders(folder, more):
    damaged = copy_of(folder, "damaged", "adapter")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    damage(more, damaged / more.draw(st.sampled_from(names)))
    model = Transformer.from_pretrained(folder / "model")
    survives(lambda: load_adapter(model, damaged), "damaged")


NAMES = list(train.Config.__dataclass_fields__)
ARGUMENT = st.tuples(
    st.sampled_from([*(f"--{name}" for name in NAMES), "--config", "rank", "--", "--rnak"]),
    st.sampled_from(["=", "", " "]),
    (st.integers() | st.floats()).map(str)
    | st.text(max_size=6)
    | st.sampled_from(["small.py", "tiny.py", "bidora", "q_proj,", "1e400", "True"]),
)


@cases(1200)
@given(st.lists(ARGUMENT, max_size=4))
def test_command_lines(folder, arguments):
    def read():
        train.check(train.read_config(list(map("".join, arguments))))

    named = [name.strip("-") or "--" for name, _, _ in arguments]
    others = ("no data", "nothing to train", "unknown device", "val_file needs", "test_fraction")
    survives(read, *named, *others)


@cases(400)
@given(st.data())
def test_config_files(folder, more):
    path = folder / more.draw(st.sampled_from(["mine.json", "mine.py"]))
    if path.suffix == ".json":
        settings_ = st.dictionaries(st.sampled_from([*NAMES, "x"]), VALUES, max_size=3)
        content = json.dumps(more.draw(settings_))
    else:
        valid = b"rank = 4\nlower_lr = 1e-3\ntarget_modules = ['q_proj']\n"
        content = more.draw(changed_bytes(valid)).decode("latin-1")
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    survives(lambda: train.read_config([f"--config={path}"]), "mine.", "command line")


def test_nothing_here_unpickles():
    unpickles = r"torch\.load\(|import pickle|import marshal|weights_only|(?<!\.)\b(eval|exec)\("
    for path in Path(train.__file__).parent.rglob("*.py"):
        assert "tests" in path.parts or not re.search(unpickles, path.read_text()), path


SLOW = {r"(\w|\.|[a-z]|[a-p])+\s" + str(i): 4 for i in range(99)}


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (SLOW, pytest.raises(ValueError, match="alpha_pattern .*slow ones .*timed out")),
        ({r"((\w|\.)+)+X": 4}, contextlib.nullcontext()),
    ],
)
def test_patterns_that_backtrack_are_refused_after_seconds_or_end(patterns, expected, tmp_path):
    """Each of the first ones takes ages for each of 14 layers; the other, ages in Python's `re`."""
    model = Transformer.from_pretrained(find_model("tiny-random")).requires_grad_(False)
    save_adapter(replace_linear_with_bidora(model, 2), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": patterns}))
    start = sum(os.times()[:4])
    with expected:
        load_adapter(Transformer.from_pretrained(find_model("tiny-random")), tmp_path)
    assert sum(os.times()[:4]) - start < 20  # CPU seconds


@pytest.mark.parametrize(
    "program, arguments, remedy",
    [
        (train, ["--config=tiny.py", "--out_dir=file/run/a"], "out_dir"),
        (train, ["--config=tiny.py"], "BIDORA_CACHE"),
        (sweep, ["--results=file/a", "--arms=lora"], "--results"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named_with_its_setting_before_any_run(
    program, arguments, remedy, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if remedy == "BIDORA_CACHE":
        monkeypatch.setenv(remedy, "file/cache")
    assert program.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "file" in said and remedy in said
    assert not list(Path().glob("out/*"))


def test_a_test_size_beside_a_file_is_refused_and_one_of_a_config_file_is_not(tmp_path):
    path = tmp_path / "sizes.py"
    path.write_text("test_size = 40")
    assert read_config(["--train_file=a.jsonl", f"--config={path}"]).train_file == "a.jsonl"
    with pytest.raises(ValueError, match="test_size=5: files are taken whole"):
        read_config(["--train_file=a.jsonl", "--test_size=5"])


def test_test_examples_are_a_fraction_of_the_file_or_a_file_of_their_own(tmp_path):
    """Stratified, groups kept whole, the same for each seed; a file goes beside any data set."""
    rows = [{"text": f"{i}", "label": "no yes".split()[i % 2], "group": i // 4} for i in range(80)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = dict(train_file=str(path), test_fraction=0.25)
    first, second = (data.load_splits(Config(seed=seed, **settings)).splits for seed in (0, 1))
    assert first["test"] == second["test"] and first["train"] != second["train"]
    assert Counter(row["label"] for row in first["test"]) == {"no": 10, "yes": 10}
    groups = [{row["group"] for row in part} for part in first.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    splits = data.load_splits(Config(data="toy-sentiment", test_file=str(path))).splits
    assert splits["test"] == data.load_examples(path) and len(splits["train"]) == 160


def test_a_fraction_that_leaves_two_examples_whole_names_one_that_does_not():
    rows = [{"text": str(i), "label": "rare" if i < 2 else "often"} for i in range(40)]
    with pytest.raises(ValueError, match=r"or a fraction above 0.25; .*--val_fraction=0"):
        data.split(rows, 0.25)
    assert Counter(row["label"] for row in data.split(rows, 0.26)[1])["rare"] == 1


def test_a_home_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_config(["--out_dir=~/x", "--label_prompt=~/{text}"])
    assert (config.out_dir, config.label_prompt) == (str(tmp_path / "x"), "~/{text}")


def test_the_home_folder_of_nobody_is_not_found():
    for find in (find_model, data.load_examples):
        with pytest.raises(FileNotFoundError, match="~nobody-of-that-name/x"):
            find("~nobody-of-that-name/x")


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("model", 256, "model has a value of the wrong type"),
        ("labels", "yes", "labels has a value of the wrong type"),
        ("labels", ["yes", None], "labels holds something that is not a name"),
        ("block_size", "256", "block_size has a value of the wrong type"),
        ("block_size", True, "block_size has a value of the wrong type"),
        ("quantize", "nf5", "unknown quantize 'nf5'"),
    ],
)
def test_a_run_json_with_wrong_values(name, value, said, tmp_path, refuses):
    (tmp_path / "run.json").write_text(json.dumps({name: value}))
    (tmp_path / "adapter_config.json").write_text("{}")
    refuses(sample, [f"--adapter={tmp_path}", "--prompt=x"], f"run.json: {said}")


def test_a_seed_that_torch_refuses_is_named_by_sample(refuses):
    arguments = ["--model=tiny-random", "--prompt=x", f"--seed={2**64}"]
    refuses(sample, arguments, f"seed={2**64} must be")


TEMPLATES = [  # what a template may hold; the loops take all of their five seconds
    "{{ messages | tojson }}",
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim }}\n{% endfor %}",
    "{% if add_generation_prompt %}Assistant:{% endif %}",
    "{{ raise_exception('no\nsuch talk') }}",
    "{{ messages[0] + 1 }}",
    "{{ 'a' * 10**9 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ range(10**9) | list }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ ' '.join(['a' * 999] * 99999) }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ [" * 999,
    "\ue000message 0\ue000",
    "{{ messages | map('upper') | first }}",
    "{% generation %}",
    "\0",
    *HOSTILE,
]
PATTERNS = [r"\s+|\S+", "(a|aa)+(?=b)|[^a]+", "^(a|aa)+(?=b)", "(", "a{99999}{99999}", r"\p{F}"]
CHANGES = {  # what is changed, in which file
    "config": "model/config.json",
    "tokenizer": "model/tokenizer.json",
    "template": "model/tokenizer_config.json",
    "adapter": "adapter/adapter_config.json",
    "run": "adapter/run.json",
    "split": "model/tokenizer.json",
}
SETTINGS = [name for name in NAMES if not name.endswith("_steps")]


def hostile_file(more, base):
    """Change one file of a model's folder, of an adapter's, or of a run's."""
    change = more.draw(st.sampled_from(list(CHANGES)))
    path = base / CHANGES[change]
    content = json.loads(path.read_text()) if path.exists() else {"model": "model", "labels": ["a"]}
    if change == "template":
        pieces = st.lists(st.sampled_from(TEMPLATES), min_size=1, max_size=3)
        content["chat_template"] = "".join(more.draw(pieces))
    elif change == "split":
        split = {"Regex": more.draw(st.sampled_from(PATTERNS))}
        split = {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False}
        steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    else:
        content = more.draw(changed_json(content))
    path.write_text(json.dumps(content))


@cases(150)
@given(st.data())
def test_programs_end_well_or_in_one_line_within_20_cpu_seconds_and_3_gb(folder, more):
    """sample.py, or train.py, on folders of which one file or one setting was changed."""
    base = folder / "whole"
    shutil.rmtree(base, ignore_errors=True)
    for name in ("model", "adapter"):
        shutil.copytree(folder / name, base / name)
    changed_setting, prompt = {}, "a" * 99 + " <|im_end|>"
    if more.draw(st.integers(0, 2)):
        hostile_file(more, base)
    else:
        values = ["", "~", "nan", "1e999", "-1", "2", "9" * 20, "a" * 300]
        value = more.draw(st.sampled_from(values))
        changed_setting[more.draw(st.sampled_from(SETTINGS))] = value

    program = more.draw(st.sampled_from([sample, train]))
    if program is sample:
        options = dict(adapter="whole/adapter", model="whole/model", prompt=prompt)
        options["max_new_tokens"] = 2
    else:
        talk = [{"role": role, "content": prompt} for role in ("user", "assistant") * 3]
        (base / "data.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
        options = dict(model="whole/model", out_dir="whole/run", train_file="whole/data.jsonl")
        options |= dict(method="lora", search_steps=1, retrain_steps=0, val_fraction=0)
        options |= changed_setting

    said, start = io.StringIO(), sum(os.times()[:4])
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = program.main([f"--{name}={value}" for name, value in options.items()])
    assert status in (0, 2)
    if status == 2:
        # a run that diverges has shown its bar
        [line] = [x for x in said.getvalue().splitlines() if not re.search("step/s]|s/step]", x)]
        assert line.startswith("error: ") and len(line) < 2000
    assert sum(os.times()[:4]) - start < 20  # CPU seconds, the children's too
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3e6  # KB, of all cases so far
