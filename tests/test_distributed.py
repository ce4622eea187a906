"""Two processes do what one does with the whole batch; one that dies takes the others along, and torchrun's restart goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from train import Config

ROOT = Path(train.__file__).parent
TINY = dict(model="tiny-random", data="toy-sentiment", dtype="float32", search_steps=10, retrain_steps=10, test_size=21, eval_size=21, batch_size=6)
RUNS = {
    "bidora": {}, "dora": dict(method="dora"), "lora": dict(method="lora", accumulate=2), "bilora": dict(method="bilora", upper_steps=2),
    "ft": dict(method="ft", batch_size=3),
    "first_order": dict(hypergradient="first_order"), "two_steps": dict(upper_every=2, unroll_steps=2, hvp_batch=1),
    "differences": dict(mode="finite_difference"), "adam": dict(precondition="adam"), "neumann": dict(hypergradient="neumann"),
    "cg": dict(hypergradient="conjugate_gradient", damping=10.0, precondition="adam"), "regularised": dict(gram_weight=1e-2, batch_size=1),
}
MANY = "import json, sys; sys.path.insert(0, {root!r}); import train\n" \
       "for name, settings in json.loads(sys.argv[1]).items(): train.train(train.Config(out_dir=name + '-two', **settings))"
DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import data, train
batches, parts = [], data.parts

def counted(*arguments):
    batches.append(1)
    if len(batches) == 15 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return parts(*arguments)

data.parts = counted
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))


def torchrun(script, *arguments, restarts=0, **environment):
    Path("script.py").write_text(script.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}", "script.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | environment)


def distance(one, other):
    tensors = [load_file(next(Path(folder).glob("*model.safetensors"))) for folder in (one, other)]
    return max((tensors[0][name] - tensors[1][name]).abs().max().item() for name in tensors[0])


def test_two_processes_give_what_one_gives_with_the_whole_batch():
    done = torchrun(MANY, json.dumps({name: TINY | settings for name, settings in RUNS.items()}))
    assert done.returncode == 0, done.stderr
    for name, settings in RUNS.items():
        results = train.train(Config(out_dir=name, **TINY | settings))
        # Split into single rows, one process too differs by 2e-5 from itself with another split: AdamW magnifies rounding where gradients are near 0.
        assert distance(name, f"{name}-two") < (3e-5 if "hvp_batch" in settings else 1e-5), name
        both = json.loads(Path(f"{name}-two/summary.json").read_text())
        assert both["processes"] == 2
        for part in ("train", "val", "test"):  # 21 examples on two processes: each counts once
            assert both["after"][part]["accuracy"] == results["after"][part]["accuracy"], name
            assert both["after"][part]["loss"] == pytest.approx(results["after"][part]["loss"], rel=1e-4), name
        assert len(Path(f"{name}-two/metrics.jsonl").read_text().splitlines()) == 20


def test_shares_of_a_batch_add_up_to_one_whatever_the_sizes():
    ids = torch.arange(15).view(5, 3)
    labels = torch.where(torch.arange(15).view(5, 3) % 4 == 0, -100, ids)
    for world_size in (1, 2, 3, 7):
        parts = [part for rank in range(world_size) for part in data.parts((ids, labels), 2, rank, world_size)]
        assert sum(share for _, _, share in parts) == pytest.approx(1)
        assert sorted(row for rows, _, share in parts if share for row in rows[:, 0].tolist()) == [0, 3, 6, 9, 12]


def test_a_process_that_dies_ends_the_run_and_a_restart_goes_on_from_the_checkpoint():
    arguments = [f"--{name}={value}" for name, value in TINY.items()] + ["--checkpoint_every=2", "--resume=True"]
    start = time.time()
    done = torchrun(DIES, *arguments, "--out_dir=dead")
    assert done.returncode != 0 and time.time() - start < 60 + 30  # half a minute to start on a slow machine
    assert "exitcode  : -9" in done.stderr and "rank      : 1" in done.stderr
    done = torchrun(DIES, *arguments, "--out_dir=restarted", restarts=1, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert done.returncode == 0, done.stderr
    assert "resuming restarted after step " in done.stdout
    assert train.main([*arguments, "--out_dir=whole"]) == 0
    assert distance("whole", "restarted") < 1e-5


@pytest.mark.parametrize("restarts, message", [(0, "nowhere"), (1, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")])
def test_wrong_input_is_said_once(restarts, message):
    script = "import sys; sys.path.insert(0, {root!r}); import train; sys.exit(train.main(sys.argv[1:]))"
    done = torchrun(script, "--config=tiny.py", "--model=nowhere", restarts=restarts)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == restarts + 1 and message in lines[0], done.stderr
