"""The benchmark measures what it says: every kind, the peer on equal terms, one thing at a time."""

import copy

import pytest
import torch

import bidora
from tools import bench

pytestmark = pytest.mark.usefixtures("elsewhere")
TINY = ["--model=tiny-random", "--dtype=float32"]


@pytest.mark.parametrize("name", bench.KINDS)
def test_every_kind_of_step_is_timed(name):
    sizes = {"rounds": 2, "batch_size": 4, "length": 8, "rank": 2}
    given = bench.Bench(model="tiny-random", dtype="float32", labels="all", **sizes)
    times, peak = bench.in_its_process(given, name)
    assert len(times) == 2 and min(times) > 0 and peak >= 0


def test_bench_measures_kinds_side_by_side_and_each_one_s_memory_in_its_process(capsys):
    names = ["dora", "unrolled", "peft dora"]
    sizes = ["--rounds=1", "--batch_size=4", "--length=8", "--rank=2", "--labels=all"]
    assert bench.main([*TINY, *sizes, "--peer=True", f"--kinds={','.join(names)}"]) == 0
    title, _, _, head, *lines, last = capsys.readouterr().out.splitlines()
    assert "8 tokens, a label on each, rank 2" in title and head.endswith("peak GB")
    assert [line[:24].strip() for line in lines] == names
    assert all(float(line.split()[-1]) >= 0 for line in lines)
    assert last.startswith("dora: ") and "as fast as PEFT's" in last


def test_bench_trains_the_same_as_its_peer():
    """PEFT's LoRA and ours have the same loss before and after three steps, up to fp32 rounding."""
    base = bench.load(bench.Bench(model="tiny-random", dtype="float32"))
    peer = bench.peft_model(base, 2, use_dora=False)
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    bidora.replace_linear_with_bidora(model, 2, target_modules=bidora.ALL_LINEAR, method="lora")
    mine, other = ([p for p in m.parameters() if p.requires_grad] for m in (model, peer))
    assert len(mine) == len(other)
    for p, q in zip(mine, other):
        q.data.copy_(p.data)
    ids = torch.arange(32).view(4, 8)
    optimizers = [torch.optim.AdamW(parameters, 1e-2) for parameters in (mine, other)]
    for _ in range(4):
        losses = model(ids, ids), peer(input_ids=ids, labels=ids).loss
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_bench_scales_one_thing_at_a_time(capsys, monkeypatch):
    measured = []

    def alone(given, name):
        measured.append((name, given.rank, given.length, given.batch_size, given.layers))
        return [0.5, 0.7, 0.6], 1.25

    monkeypatch.setattr(bench, "alone", alone)
    assert bench.main([*TINY, "--scaling=True"]) == 0
    out = capsys.readouterr().out
    assert "64 tokens, one label a row, rank 8" in out
    assert "rank 32" in out and "length 2048" in out and "layers 2" in out and "0.60   1.25" in out
    assert ("dora", 8, 2048, 2, 0) in measured and ("lora", 8, 64, 8, 2) in measured


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds=0"], "must be at least"),
        (["--kinds=dorra"], "did you mean 'dora'"),
        (["--labels=some"], "unknown labels"),
        (["--dtype=float16"], "unknown dtype"),
        (["--model=nowhere"], "nowhere"),
    ],
)
def test_bench_refuses_in_one_line(arguments, message, refuses):
    refuses(bench, arguments, message)
