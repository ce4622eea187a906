"""The comparison: its splits, its choice of rates, its statistics, its results, and resuming it."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import scipy.stats

from research import compare, differences, results
from research.compare import Compare
from support.run import run_folder
from support.weights.weight_changes import Trajectory


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))


def result(method, seed, accuracy, loss=0.5, size=100):
    test = {"accuracy": accuracy, "loss": loss}
    return {
        "domain": "d",
        "size": size,
        "method": method,
        "seed": seed,
        "after": {"test": test, "train": {"accuracy": 1.0, "loss": 0.1}},
        "seconds": {"total": 60.0},
    }


def test_samples_tuning_set_and_test_share_no_example_and_the_test_is_the_same_for_all():
    default = Compare()

    def texts(paths):
        return [
            {json.loads(line)["text"] for line in path.read_text().splitlines()} for path in paths
        ]

    train, test = texts(compare.write_examples(default, "product-sentiment", 100, 0, False))
    other, same = texts(compare.write_examples(default, "product-sentiment", 400, 1, False))
    tuned_on, tune = texts(compare.write_examples(default, "product-sentiment", 100, 1000, True))
    assert (len(train), len(other), len(test), len(tune)) == (100, 400, 300, 200)
    assert (
        test == same
        and train != other
        and not test & (train | other | tuned_on | tune)
        and not tune & (train | other | tuned_on)
    )


def test_the_rates_with_the_lowest_mean_loss_on_the_tuning_set_are_chosen():
    tuned = [
        result("bidora", seed, accuracy, loss) | {"lower_lr": lr, "upper_lr": 10 * lr}
        for lr, accuracy, losses in (
            (3e-4, 0.9, (0.40, 0.41)),
            (1e-3, 0.8, (0.35, 0.36)),
            (3e-3, 0.95, (0.50, 0.30)),
        )
        for seed, loss in enumerate(losses)
    ]
    assert compare.chosen_rates(tuned) == {"lower_lr": 1e-3, "upper_lr": 1e-2}


def test_a_rate_that_diverges_in_tuning_is_skipped_and_any_other_failure_stops(monkeypatch, capsys):
    monkeypatch.setattr(
        compare,
        "launch",
        lambda *arguments: (
            2,
            "error: train step 3 of 8 is not finite (loss nan): lower lower_lr or upper_lr",
        ),
    )
    tiny = Compare(model="tiny-random")
    diverged = compare.run(tiny, "toy-sentiment", 40, 1000, "lora", {"lower_lr": 9.0}, tuning=True)
    assert (
        "not finite" in diverged["diverged"]
        and "not finite" in capsys.readouterr().out
        and not list(Path(tiny.results).glob("*"))
    )
    fine = result("lora", 1000, 0.9) | {"lower_lr": 1e-3}
    assert compare.chosen_rates([diverged, fine]) == {"lower_lr": 1e-3}
    with pytest.raises(ValueError, match="all rates of lora's grid diverged"):
        compare.chosen_rates([diverged])
    with pytest.raises(ValueError, match="not finite"):
        compare.run(tiny, "toy-sentiment", 40, 0, "lora", {"lower_lr": 9.0})


def test_every_method_has_a_grid_by_one_rule():
    for method in compare.KNOWN:
        found = compare.grid(method)
        assert len(found) == len({tuple(rates.values()) for rates in found}) > 1
        assert all(("upper_lr" in rates) == method.startswith("bi") for rates in found)
    assert max(rates["lower_lr"] for rates in compare.grid("ft")) < 1e-4
    assert set(Compare().methods) <= set(compare.KNOWN)


def test_the_report_has_scores_paired_differences_and_seconds():
    """The differences themselves are compared with scipy's in test_study.py."""
    ours, theirs = [0.90, 0.88, 0.91, 0.87, 0.93, 0.9], [0.89, 0.89, 0.86, 0.85, 0.90, 0.88]
    noted = {"dtype": "bfloat16", "threads": 1, "processor": "EPYC, AVX2"}
    runs = [result("bidora", s, a) | noted for s, a in enumerate(ours)]
    runs += [result("dora", s, a) for s, a in enumerate(theirs)]
    lines = list(compare.report([*runs, result("dora", 9, 0.1)]))
    scores = f"{100 * numpy.mean(ours):.1f} ± {100 * numpy.std(ours, ddof=1):.1f} (6)"
    assert f"| `bidora` | {scores} | {scores} |" in lines
    gaps = numpy.array(ours) - theirs
    start = f"| `dora` | {100 * gaps.mean():+.1f} ["
    [difference] = [line for line in lines if line.startswith(start)]
    assert f"p = {scipy.stats.wilcoxon(100 * gaps).pvalue:.2g}" in difference
    assert lines[-2:] == [
        "| 100 | EPYC, AVX2, bfloat16, 1 | 60 | – |",
        "| 100 | unrecorded, None, None | – | 60 |",
    ]


def test_equal_differences_tie_whatever_their_last_digits():
    ours, theirs = (278, 273, 270, 263, 280, 265), (281, 279, 273, 260, 280, 265)  # of 300
    scores = [{s: 100 * (n / 300) for s, n in enumerate(right)} for right in (ours, theirs)]
    n, mean, _, p = differences.compare(*scores)
    assert (n, round(mean, 9)) == (6, -0.5)
    expected = scipy.stats.wilcoxon(numpy.subtract(ours, theirs)).pvalue
    assert p == expected == 0.5  # without rounding, 0.375


def test_a_comparison_resumes_where_it_stopped(capsys):
    arguments = ["--quick=True", "--methods=lora"]
    assert compare.main(arguments) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| `lora` \| .* \(2\) \|", out) and "rates: lora lower_lr=" in out
    before = results.read_results("results-quick")
    assert len(before) == 6  # four rates, two seeds
    path = Path("results-quick/runs.jsonl")
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"}") - 9])  # as a process leaves it that is killed
    assert compare.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("runs.jsonl: the last line is torn") == 1
    again = results.read_results("results-quick")
    assert again.keys() == before.keys()
    made_again = [name for name in before if before[name]["seconds"] != again[name]["seconds"]]
    assert made_again == [json.loads(content.splitlines()[-1])["name"]]
    message = "was made without --lower_lr=9, --model=other: remove its line"
    with pytest.raises(ValueError, match=message):
        compare.run(
            Compare(model="other", results="results-quick"),
            "toy-sentiment",
            40,
            0,
            "lora",
            {"lower_lr": 9},
        )
    found = compare.load_results("results-quick")
    assert [r["seed"] for r in found] == [0, 1]
    trajectory = results.trajectory_of(found[0])
    assert (
        numpy.shape(trajectory.delta_m) == (4, 4) and len(trajectory.magnitude) == 4
    )  # q and v of two blocks
    assert compare.main(["--report=True", "--quick=True"]) == 0


def test_a_comparison_at_one_rate_is_a_set_of_its_own(capsys):
    arguments = ["--quick=True", "--methods=bilora,ft", "--lower_lr=3e-4"]
    assert compare.main(arguments) == 0
    assert "rates:" not in capsys.readouterr().out  # nothing was tuned
    found = compare.load_results("results-quick", "rate-0.0003")
    names = {f"rate-0.0003-toy-sentiment-40-{m}-{s}" for m in ("bilora", "ft") for s in range(2)}
    assert {r["name"] for r in found} == names
    rates = {(r["method"], r["lower_lr"], r.get("upper_lr")) for r in found}
    assert rates == {("bilora", 3e-4, 3e-2), ("ft", 3e-4, None)}
    assert compare.main(["--report", *arguments]) == 0
    assert "| `bilora` |" in capsys.readouterr().out
    assert compare.main(["--report", "--quick=True"]) == 2  # no run has a rate of its own


def numbered(seed, layers=5):
    """A result and its trajectory, whose numbers tell which run they are of."""
    name = f"d-100-lora-{seed}"
    snapshots = [{"phase": "train", "step": t} for t in range(3)]
    values = numpy.random.default_rng(seed).lognormal(-9, 3, (7, layers)).tolist()
    trajectory = Trajectory(
        "row", [f"{i}.q_proj" for i in range(layers)], values[0], snapshots, values[1:4], values[4:]
    )
    return result("lora", seed, 0.5) | {"name": name, "set": "main"}, trajectory


def test_results_are_read_as_they_were_saved():
    runs = [numbered(0), numbered(1), numbered(2, layers=3)]
    for run in runs:
        results.save("r", *run)
    results.save("r", runs[0][0] | {"name": "other", "set": "other"}, None)
    found = compare.load_results("r")
    assert [r["seed"] for r in found] == [0, 1, 2]
    for (run, trajectory), again in zip(runs, found):
        assert run == {key: value for key, value in again.items() if key != "trajectory"}
        loaded = results.trajectory_of(again)
        assert (loaded.axis, loaded.layers, loaded.snapshots) == (
            trajectory.axis,
            trajectory.layers,
            trajectory.snapshots,
        )
        for what in results.NUMBERS:  # kept in float32
            assert numpy.allclose(
                getattr(loaded, what), getattr(trajectory, what), rtol=2**-24, atol=0
            )
    assert [r["name"] for r in compare.load_results("r", "other")] == ["other"]


def write(seeds):
    for seed in seeds:
        results.save("r", *numbered(seed))


def test_two_writers_at_once_tear_nothing():
    context = multiprocessing.get_context("spawn")
    seeds = [range(0, 40), range(20, 60)]  # both write 20 to 39, and the first stays
    writers = [context.Process(target=write, args=(part,)) for part in seeds]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        results.read_results("r")  # a reader never sees half a line, or a line without its numbers
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = compare.load_results("r")
    assert [r["seed"] for r in found] == list(range(60))
    for r in found:
        assert numpy.allclose(
            r["trajectory"]["delta_m"], numbered(r["seed"])[1].delta_m, rtol=1e-6, atol=0
        )


def test_a_torn_last_line_is_dropped_and_written_again(capsys):
    write([0, 1])
    path = Path("r/runs.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # as some editors leave it: not torn
    assert len(results.read_results("r")) == 2 and not capsys.readouterr().out
    for kept in range(whole.index(b"\n") + 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert list(results.read_results("r")) == ["d-100-lora-0"]
        assert "the last line is torn" in capsys.readouterr().out
    write([1])
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1])
    write([2])
    assert path.read_bytes().startswith(whole) and len(results.read_results("r")) == 3


def test_damaged_results_are_named():
    write([0, 1])
    path, numbers = Path("r/runs.jsonl"), Path("r/trajectories.safetensors")
    whole, content = path.read_bytes(), numbers.read_bytes()
    for damaged, message in (
        (whole.replace(b"{", b"", 1), "runs.jsonl, line 1: not valid JSON"),
        (b"[]\n" + whole, "runs.jsonl, line 1: not a JSON object"),
        (whole.replace(b"layers 0", b"layers 9"), "runs.jsonl or trajectories.safetensors"),
        (whole.replace(b'"seed"', b'"sead"'), "a line of r/runs.jsonl"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            compare.load_results("r")
    path.write_bytes(whole)
    numbers.write_bytes(content[:20])
    with pytest.raises(ValueError, match="trajectories.safetensors is damaged"):
        compare.load_results("r")


def test_a_method_that_is_new_is_sorted_last():
    for seed, method in enumerate(("newer", "ft", "bidora", "bilora")):
        results.save("r", numbered(seed)[0] | {"method": method}, None)
    found = [r["method"] for r in compare.load_results("r")]
    assert found == ["bidora", "bilora", "ft", "newer"]


def test_sigterm_ends_the_runs_too():
    process = subprocess.Popen(
        [sys.executable, "-m", "research.compare", "--quick=True", "--methods=lora"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    begun = time.time()
    while (
        not (
            runs := [path.parent for path in Path("out/compare-quick").glob("tune-*/metrics.jsonl")]
        )
        and time.time() - begun < 120
    ):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 130 and "the same command resumes" in process.stderr.read()
    for run in runs:
        with run_folder.locked(run):  # no process holds it any more
            pass
    assert (
        runs
        and not list(Path("results-quick").glob("*"))
        and not any((run / "summary.json").exists() for run in runs)
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods=dorra"], "did you mean 'dora'"),
        (["--domains=films"], "unknown domains 'films'"),
        (["--sizes=ten"], "integers of at least 20"),
        (["--seeds=0"], "must be at least"),
        (["--report=True"], "no results in results"),
        (["--quick=True", "--methods=lora", "--results=a-file"], "error"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message, capsys):
    Path("a-file-quick").write_text("")
    assert compare.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1 and "Traceback" not in error
