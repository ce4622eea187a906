"""The benchmark measures what it says: every kind, the peer on equal terms, one thing at a time."""

import copy
from pathlib import Path

import pytest
import torch

import bidora
from support.run.files import read_json
from tools import bench

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_bench_measures_every_kind_side_by_side(capsys):
    tiny = [
        "--rounds=2",
        "--batch_size=4",
        "--length=8",
        "--rank=2",
        "--labels=all",
        "--out=b.json",
    ]
    assert bench.main(["--model=tiny-random", "--dtype=float32", "--peer=True", *tiny]) == 0
    out, result = capsys.readouterr().out, read_json("b.json")
    assert all(f"\n{name} " in out for name in bench.KINDS)
    assert "dora: " in out and "as fast as PEFT's" in out
    assert result["seconds"].keys() == result["peak_gb"].keys() == bench.KINDS.keys()
    assert all(len(times) == 2 for times in result["seconds"].values())
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("labels, words", [("last", "one label a row"), ("all", "a label on each")])
def test_the_chart_says_in_words_where_the_labels_are(labels, words, monkeypatch):
    titles = []
    monkeypatch.setattr(bench, "measure", lambda *arguments: ({}, {}))
    monkeypatch.setattr(bench, "table", lambda *arguments: [])
    monkeypatch.setattr(bench, "draw", lambda path, title, seconds: titles.append(title))
    bench.run(bench.Bench(model="tiny-random", labels=labels, dtype="float32"))
    assert f"64 tokens, {words}, rank 8" in titles[0]


def test_bench_trains_the_same_as_its_peer():
    """PEFT's LoRA and ours have the same loss before and after three steps, up to fp32 rounding."""
    base = bench.load(bench.Bench(model="tiny-random", dtype="float32"))
    peer = bench.peft_model(base, 2, use_dora=False)
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    bidora.replace_linear_with_bidora(model, 2, target_modules=bidora.ALL_LINEAR, method="lora")
    mine, other = (
        {name: p for name, p in m.named_parameters() if p.requires_grad} for m in (model, peer)
    )
    assert len(mine) == len(other)
    for p, q in zip(mine.values(), other.values()):
        q.data.copy_(p.data)
    ids = torch.arange(32).view(4, 8)
    optimizers = [torch.optim.AdamW(parameters.values(), 1e-2) for parameters in (mine, other)]
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
        return {"seconds": [0.5, 0.7, 0.6], "peak_gb": 1.25}

    monkeypatch.setattr(bench, "alone", alone)
    tiny = ["--model=tiny-random", "--dtype=float32", "--out=b.json"]
    assert bench.main([*tiny, "--scaling=True"]) == 0
    out = capsys.readouterr().out
    assert "rank 32" in out and "length 2048" in out and "layers 2" in out and "0.60   1.25" in out
    assert ("dora", 8, 2048, 2, 0) in measured and ("lora", 8, 64, 8, 2) in measured
    assert len(read_json("b.json")["scaling"]) == len(measured)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds=0"], "must be at least"),
        (["--kinds=dorra"], "did you mean 'dora'"),
        (["--labels=some"], "unknown labels"),
        (["--dtype=float16"], "unknown dtype"),
        (["--model=nowhere"], "nowhere"),
        (["--out=no/where.json"], "no/where.json must be"),
        (["--out=a.json"], "a.json must be"),
        (["--out=x.png"], "x.png must be"),
        (["--out="], "must be a .json"),
    ],
)
def test_bench_refuses_in_one_line(arguments, message, capsys):
    Path("a.json").mkdir()
    assert bench.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
