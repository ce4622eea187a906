"""The benchmark measures what it says: every kind, the peer on equal terms, one thing at a time."""

import copy

import pytest
import torch

import bidora
from support.run.files import read_json
from tools import bench


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))


def test_bench_measures_every_kind_side_by_side(tmp_path, capsys):
    tiny = [
        "--model=tiny-random",
        "--rounds=2",
        "--batch_size=4",
        "--length=8",
        "--rank=2",
        "--dtype=float32",
        f"--out={tmp_path / 'b.json'}",
    ]
    assert bench.main([*tiny, "--peer=True", "--labels=all"]) == 0
    out, result = capsys.readouterr().out, read_json(tmp_path / "b.json")
    assert (
        all(f"\n{name} " in out for name in bench.KINDS)
        and "dora: " in out
        and "as fast as PEFT's" in out
    )
    assert result["seconds"].keys() == result["peak_gb"].keys() == bench.KINDS.keys() and all(
        len(times) == 2 for times in result["seconds"].values()
    )
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("labels, words", [("last", "one label a row"), ("all", "a label on each")])
def test_the_chart_says_in_words_where_the_labels_are(labels, words, monkeypatch):
    titles = []
    monkeypatch.setattr(bench, "measure", lambda *arguments: ({}, {}))
    monkeypatch.setattr(bench, "table", lambda *arguments: [])
    monkeypatch.setattr(bench, "draw", lambda path, title, seconds: titles.append(title))
    bench.run(bench.Bench(model="tiny-random", labels=labels, dtype="float32"))
    assert f"64 tokens, {words}, rank 8" in titles[0]


def test_bench_trains_the_same_as_its_peer():
    """
    With equal weights, batch, rank, scale and optimizer, PEFT's LoRA and ours have the same loss
    before and after three steps, to fp32's rounding.
    """
    ours = bench.Bench(model="tiny-random", batch_size=4, length=8, rank=2, labels="all")
    base = bench.load(ours, torch.float32)
    peer = bench.peft_model(base, ours, use_dora=False)
    model = bidora.replace_linear_with_bidora(
        copy.deepcopy(base, {id(p): p for p in base.parameters()}),
        2,
        target_modules=bidora.ALL_LINEAR,
        method="lora",
    )
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


def test_bench_scales_one_thing_at_a_time(tmp_path, capsys, monkeypatch):
    measured = []

    def alone(bench, name, dtype, **changes):
        measured.append((name, changes))
        return {"seconds": [0.5, 0.7, 0.6], "peak_gb": 1.25}

    monkeypatch.setattr(bench, "alone", alone)
    assert (
        bench.main(
            [
                "--model=tiny-random",
                "--scaling=True",
                "--dtype=float32",
                f"--out={tmp_path / 'b.json'}",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "rank 32" in out and "length 2048" in out and "layers 2" in out and "0.60   1.25" in out
    assert ("dora", {"length": 2048, "batch_size": 2}) in measured and len(
        read_json(tmp_path / "b.json")["scaling"]
    ) == len(measured)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds=0"], "must be at least"),
        (["--kinds=dorra"], "did you mean 'dora'"),
        (["--only=nothing"], "unknown only"),
        (["--labels=some"], "unknown labels"),
        (["--dtype=float16"], "unknown dtype"),
        (["--model=nowhere"], "nowhere"),
        (["--out=no/where.json"], "no/where.json must be"),
        (["--out=a.json"], "a.json must be"),
        (["--out=x.png"], "x.png must be"),
        (["--out="], "must be a .json"),
    ],
)
def test_bench_refuses_in_one_line(arguments, message, capsys, tmp_path):
    (tmp_path / "a.json").mkdir()
    assert bench.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
