"""The memory formula against measured peaks, and the rule that picks settings by it."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import bilevel
from bidora import METHODS
from model import ModelConfig, Transformer
from support.run import checkpoint, distributed, hardware, run
from support.run.files import read_json
from support.run.hardware import choose, need
from support.weights.pretrained import find_model
from tools import memory
from train import Config, train

ROOT = Path(__file__).parents[2]
DORA = METHODS["dora"]
RUN = dict(model="tiny-random", data="toy-sentiment", test_size=20, eval_size=20)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")


@pytest.fixture(scope="module")
def smollm2():
    return ModelConfig.from_hf(read_json(find_model("smollm2-135m") / "config.json"))


def printed_by(code, **environment):
    """The numbers that a process of its own prints. memory: VmHWM, its peak, or RssAnon, in MB."""
    start = f"""
import os, re, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import bidora, data, train
from bilevel import create_bilevel_optimizer
from model import Transformer
from support.weights.pretrained import find_model
folder, targets = find_model("smollm2-135m"), train.Config.target_modules
def memory(name):
    status = open("/proc/self/status").read()
    return int(re.search(name + r":\\s*(\\d+) kB", status)[1]) * 1024 / 1e6
"""
    command, env = [sys.executable, "-c", start + code], os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return [float(line) for line in done.stdout.splitlines()]


def shorten(folder, dtype, layers=10):
    """Write the first layers of SmolLM2 as a model, and return its ModelConfig."""
    model = Transformer.from_pretrained(find_model("smollm2-135m"), dtype)
    model.model.layers, c = model.model.layers[:layers], model.config
    model.config = ModelConfig.from_hf(c.hf | {"num_hidden_layers": layers})
    model.save_pretrained(folder)
    return model.config


@linux
def test_the_formula_is_within_40_percent(tmp_path):
    """
    Weights, training state and activations of one whole iteration on SmolLM2's first ten layers, in
    a fresh process, in the dtype that the machine is fast in: the other one takes minutes. glibc is
    made to return the memory of freed tensors: what it keeps differs from run to run.
    """
    dtype, _ = hardware.fast_dtype("cpu")
    shape = shorten(tmp_path, dtype)
    cases = [  # method, quantize, gradient_checkpointing, length
        ("lora", "none", False, 96),
        ("dora", "nf4", False, 96),
        ("dora", "none", True, 128),
        ("bidora", "none", False, 48),
        ("bidora", "int8", True, 128),
        ("bidora", "none", True, 128),
    ]
    code = f"""
import bitsandbytes
for method, quantize, checkpointing, length in {cases}:
    if os.fork() == 0:  # the processes share one import
        break
    assert os.wait()[1] == 0
else:
    sys.exit()
Transformer.from_pretrained(find_model("tiny-random"))
start = memory("VmHWM")
packed = None if quantize == "none" else quantize
model = Transformer.from_pretrained({str(tmp_path)!r}, {dtype}, quantize=packed)
model.gradient_checkpointing = checkpointing
model.requires_grad_(False)
bidora.replace_linear_with_bidora(model, 8, target_modules=targets, method=method)
optimizer = create_bilevel_optimizer(model, 1e-3, 1e-2, hypergradient="unrolled")
ids = torch.randint(0, 49152, (4, length))
labels = torch.full_like(ids, -100)
labels[:, -1] = 7
loss_fn = lambda model, batch: model(*batch)
optimizer.lower_step(loss_fn, (ids, labels))
if optimizer.upper:
    optimizer.upper_step(loss_fn, (ids, labels))
print(memory("VmHWM") - start)
"""
    measured = printed_by(code, MALLOC_MMAP_THRESHOLD_=str(2**20))
    for (method, quantize, checkpointing, length), peak in zip(cases, measured, strict=True):
        config = Config(quantize=quantize, gradient_checkpointing=checkpointing)
        computed = need(shape, METHODS[method], dtype.itemsize, length, config).total / 1e6
        assert 0.6 < computed / peak < 1.4, (method, quantize, checkpointing, computed, peak)


@linux
def test_adapting_leaves_no_holes_in_memory():
    """SmolLM2's adapters take 10 MB; the fp32 copies of its weights left 200 to 280 MB behind."""
    code = """
model = Transformer.from_pretrained(folder, torch.bfloat16)
start = memory("RssAnon")
bidora.replace_linear_with_bidora(model, 8, target_modules=targets)
print(memory("RssAnon") - start)
"""
    [megabytes] = printed_by(code)
    assert 5 < megabytes < 80


LONG = {"longest": 1000, "supervised": 1, "shortest": 2}


def test_less_memory_gives_up_the_cheapest_things_first(smollm2):
    """As memory shrinks: micro-batches, then recomputing, then packing, then length."""
    seen, sizes, config = [], [], Config(method="dora", batch_size=8)
    names = ("micro_batch_size", "gradient_checkpointing", "quantize", "block_size")
    for free in (64e9, 12e9, 6e9, 3e9, 2e9, 1.2e9, 0.8e9, 0.5e9, 0.1e9):
        picked, lines = choose(smollm2, config, DORA, 2, LONG, free)
        seen.append(tuple(picked[name] for name in names))
        length = min(picked["block_size"], 1000)
        sizes.append(need(smollm2, DORA, 2, length, Config(batch_size=8, **picked)).total)
        says_fits = " fits " in " ".join(lines).replace("not fit", "")
        assert (sizes[-1] < 0.8 * free) == says_fits or free == 0.1e9
    assert seen[0] == (8, False, "none", 1024) and seen[-1] == (1, True, "nf4", 128)
    assert "nothing leaner is left" in lines[0]
    assert sizes == sorted(sizes, reverse=True)
    first = [next((i for i, s in enumerate(seen) if s[j] != seen[0][j]), 99) for j in range(4)]
    assert first == sorted(first)


def test_what_the_user_set_is_not_touched(smollm2):
    own = dict(micro_batch_size=4, gradient_checkpointing=True, quantize="int8", block_size=512)
    for free in (1e8, 1e12):
        config = Config(method="dora", batch_size=8, **own)
        assert choose(smollm2, config, DORA, 2, LONG, free)[0] == own
    picked, _ = choose(smollm2, Config(method="ft"), None, 4, LONG, free=1e8)
    assert picked["quantize"] == "none"


@pytest.mark.parametrize("setting", ["fsdp", "compile"])
def test_the_base_is_not_packed_where_packed_weights_are_refused(smollm2, setting):
    config = Config(method="dora", batch_size=8, **{setting: True})
    picked, lines = choose(smollm2, config, DORA, 2, LONG, free=1e8)
    assert picked["quantize"] == "none" and "nothing leaner is left" in lines[0]


def test_block_size_never_passes_the_models_positions_or_cuts_an_answer():
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    sizes |= dict(model_type="llama", num_attention_heads=4)

    def block(positions, free, **data):
        c = ModelConfig.from_hf(sizes | {"max_position_embeddings": positions})
        return choose(c, Config(), METHODS["bidora"], 4, data, free)[0]["block_size"]

    short = dict(longest=50, supervised=1, shortest=2)
    assert block(64, 1e12, **short) == block(64, 1, **short) == 64
    assert block(2048, 1, longest=900, supervised=321, shortest=322) == 322


def test_the_table_runs_and_knows_the_published_sizes(capsys):
    assert memory.main(["--length=128"]) == 0
    out = capsys.readouterr().out
    [weights, *_] = re.search(r"Qwen2.5-7B +(.*)", out)[1].split()
    assert "computed, not measured" in out and float(weights) == pytest.approx(15.2)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--model=no/such/model", "no/such/model"),
        ("--rnak=3", "did you mean 'rank'"),
        ("--length=-5", "length=-5"),
        ("--devices=1", "above 1"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(argument, said, refuses):
    refuses(memory, [argument], said)


def test_the_table_for_several_devices(capsys):
    """LLaMA 2 7B in bf16: 13.5 GB, an eighth on each of eight; what they send grows with it."""
    assert memory.main(["--devices=8", "--batch_size=1", "--length=1"]) == 0
    line = capsys.readouterr().out.splitlines()[3].strip()
    name, devices, *numbers = re.split(r"\s{2,}", line)
    assert (name, devices) == ("LLaMA 2 7B", "8")
    holds, sends, sharded_holds, sharded_sends = map(float, numbers)
    weights, embeddings = 13.5, 2 * 32000 * 4096 / 1e9
    collected = (weights - 2 * embeddings) / 32 + embeddings
    assert sharded_holds == pytest.approx(holds - 7 / 8 * weights + collected, abs=0.2)
    assert sharded_sends == pytest.approx(2 * 7 / 8 * weights + sends, abs=0.2)
    assert holds > weights and sends < 0.2


def test_free_memory_is_less_than_the_machine_has():
    free = hardware.free_memory("cpu")
    assert free is None or 0 < free < 1e13
    assert 0.05 < hardware.peak_memory("cpu") < 100


@linux
def test_processes_on_one_cpu_share_its_memory(monkeypatch):
    """Up to a tenth, by which other programs may change what is free meanwhile."""
    whole = hardware.free_memory("cpu")
    monkeypatch.setattr(distributed, "LOCAL_WORLD_SIZE", 4)
    assert hardware.free_memory("cpu") == pytest.approx(whole / 4, rel=0.1)


FLAGS = {"flags\t\t: avx512f amx_int8": False, "flags\t\t: avx512f avx512_bf16": True, "": False}
FLAGS |= {"flags\t\t: amx_bf16 amx_tile": True, "Features\t: fp asimd bf16": True}


@pytest.mark.parametrize("line, fast", FLAGS.items())
def test_a_processor_s_flags_choose_the_dtype(line, fast, monkeypatch, tmp_path):
    """As Linux shows them on x86 and on ARM; so the choice does not depend on what else runs."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(hardware, "PROC", tmp_path)
    assert hardware.fast_dtype("cpu")[0] == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize("major, dtype", [(7, torch.float32), (8, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_gets_float32(major, dtype, monkeypatch):
    """Before Ampere (compute capability 8), bfloat16 tensors work, but slowly."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert hardware.fast_dtype("cuda")[0] == dtype


class Reads(TorchFunctionMode):
    """Counts, for each file, the numbers that Python reads from tensors."""

    def __init__(self):
        super().__init__()
        self.files = Counter()

    def __torch_function__(self, function, kinds, arguments=(), options=None):
        if function.__name__ in ("item", "tolist", "__bool__", "__int__", "__float__", "numpy"):
            self.files[Path(sys._getframe(1).f_code.co_filename).name] += 1
        return function(*arguments, **(options or {}))


def test_a_search_step_reads_few_numbers_from_tensors(monkeypatch, tmp_path):
    """A GPU holds up each. bilevel.py asks whether a loss is finite; rows.py's are on the CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "LOG_EVERY", math.inf)
    files = []
    for steps in (5, 15):
        with Reads() as reads:
            train(Config(search_steps=steps, retrain_steps=0, out_dir=f"{steps}", **RUN))
        files.append(reads.files)
    ten_steps = files[1] - files[0]
    assert {"rows.py", "bilevel.py"} == set(ten_steps)
    assert ten_steps["bilevel.py"] == 10 * 2


def test_a_run_that_fails_has_logged_every_step_before(monkeypatch, tmp_path):
    """Losses stay on the GPU until the log is written: here never, while the steps last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "LOG_EVERY", math.inf)
    losses, step = [], bilevel.BilevelOptimizer.lower_step

    def fails(self, *arguments):
        if len(losses) == 3:
            raise FloatingPointError
        losses.append(step(self, *arguments))
        return losses[-1]

    monkeypatch.setattr(bilevel.BilevelOptimizer, "lower_step", fails)
    with pytest.raises(FloatingPointError):
        train(Config(method="lora", out_dir="run", **RUN))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["train_loss"] for line in lines] == [loss.item() for loss in losses]


def test_a_resumed_optimizer_counts_its_steps_where_the_parameter_is():
    """
    Fused AdamW's kernel reads the count on the GPU. The device "meta" stands for the GPU here.
    """
    model = torch.nn.Linear(3, 1, bias=False, device="meta")
    optimizer = bilevel.create_bilevel_optimizer(model)
    saved = {"lower.0.step": torch.tensor(7.0), "lower.0.exp_avg": torch.zeros(1, 3)}
    checkpoint.load_optimizer_state(optimizer, saved)
    state = optimizer.lower_optimizer.state[model.weight]
    assert [value.device.type for value in state.values()] == ["meta", "meta"]


def test_a_checkpoint_asks_no_gpu_that_the_run_does_not_use(monkeypatch):
    """Another run may have it, and refuse; the machine that resumes may have fewer GPUs."""
    asked, state = [], torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda gpu="cuda": asked.append(gpu) or state)
    checkpoint.random_states()
    assert asked == []

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    states = checkpoint.random_states()
    note = lambda state, gpu="cuda": asked.append((gpu, state.tolist()))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_rng_state", note)
    checkpoint.set_random_states(states)
    assert asked == ["cuda", ("cuda", state.tolist())]  # "cuda" is the current one
