"""Results: files that several processes write, and the statistics and tables made of them."""

import itertools
import multiprocessing
import random
from pathlib import Path

import numpy
import pytest
import scipy.stats

from research import figures, results
from research.arms import GROUPS
from research.differences import MEASURES, compare, differences, holm, seconds_table, tables
from support.weights.weight_changes import Trajectory

pytestmark = pytest.mark.usefixtures("elsewhere")


def result(domain, arm, seed, test, train=0.9, metric="accuracy"):
    after = {"test": {metric: test, "loss": 0.5}, "train": {metric: train, "loss": 0.1}}
    found = {"name": f"{domain}-100-{arm}-{seed}", "domain": domain, "size": 100}
    found |= {"method": arm, "seed": seed, "metric": metric, "after": after, "set": "main"}
    return found | {"seconds": {"total": 60.0}, "command": "python train.py"}


def draws(seed=0, seeds=8, domains=("a", "b"), compared=("bidora", "dora")):
    """Results of some arms on some domains, in a random order."""
    rng = random.Random(seed)
    names = [(d, arm, s) for d in domains for arm in compared for s in range(seeds)]
    return rng.sample([result(*name, rng.random()) for name in names], len(names))


def numbered(seed, layers=5):
    """A result and its trajectory, whose numbers tell which run they are of."""
    snapshots = [{"phase": "train", "step": t} for t in range(3)]
    values = numpy.random.default_rng(seed).lognormal(-9, 3, (7, layers)).tolist()
    names = [f"{i}.q_proj" for i in range(layers)]
    trajectory = Trajectory("row", names, values[0], snapshots, values[1:4], values[4:])
    return result("d", "lora", seed, 0.5), trajectory


def test_a_full_disk_is_named_by_its_file_and_leaves_the_earlier_results(file_limit):
    results.save("r", result("d", "lora", 0, 0.5))
    with pytest.raises(OSError, match=r"could not write r/runs.jsonl \(File too large\)"):
        results.save("r", result("d", "lora", 1, 0.5) | {"command": "a" * 10_000})
    assert len(results.read_results("r")) == 1


def test_results_are_read_as_they_were_saved():
    runs = [numbered(0), numbered(1), numbered(2, layers=3)]
    for run in runs:
        results.save("r", *run)
    results.save("r", runs[0][0] | {"name": "other", "set": "other"})
    again = results.load_results("r")
    assert [r["seed"] for r in again] == [0, 1, 2]
    for (run, trajectory), read in zip(runs, again):
        assert run == {key: value for key, value in read.items() if key != "trajectory"}
        loaded = results.trajectory_of(read)
        for what in ("axis", "layers", "snapshots"):
            assert getattr(loaded, what) == getattr(trajectory, what)
        for what in results.NUMBERS:  # kept in float32
            values = getattr(loaded, what), getattr(trajectory, what)
            assert numpy.allclose(*values, rtol=2**-24, atol=0)
    assert [r["name"] for r in results.load_results("r", "other")] == ["other"]


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
    runs = results.load_results("r")
    assert sorted(r["seed"] for r in runs) == list(range(60))
    for r in runs:
        expected = numbered(r["seed"])[1].delta_m
        assert numpy.allclose(r["trajectory"]["delta_m"], expected, rtol=1e-6, atol=0)


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
    results.mend("r")
    assert capsys.readouterr().out.count("the last line is torn") == 1
    results.read_results("r")
    assert not capsys.readouterr().out
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
        (whole.replace(b'"domain"', b'"dumain"'), "a line of r/runs.jsonl"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            results.load_results("r")
    path.write_bytes(whole)
    numbers.write_bytes(content[:20])
    with pytest.raises(ValueError, match="trajectories.safetensors is damaged"):
        results.load_results("r")


def test_differences_are_paired_by_seed_with_scipy_s_interval_and_p():
    runs = draws()
    n, mean, half, p, _ = differences(runs, 100, "test score", "bidora", 1)["a", "dora"]
    by = {(r["domain"], r["method"], r["seed"]): r["after"]["test"]["accuracy"] for r in runs}
    pairs = [100 * (by["a", "bidora", s] - by["a", "dora", s]) for s in range(8)]
    interval = scipy.stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
    assert n == 8 and mean == pytest.approx(numpy.mean(pairs))
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert p == pytest.approx(scipy.stats.wilcoxon(pairs).pvalue)
    turned = differences(runs, 100, "test score", "bidora", -1)["a", "dora"]
    assert turned[:4] == (n, -mean, half, p)

    _, mean, _, p, _ = differences(runs, 100, "test score", "bidora", 1)["all", "dora"]
    other = [100 * (by["b", "bidora", s] - by["b", "dora", s]) for s in range(8)]
    of_all = numpy.mean([pairs, other], axis=0)  # the mean over domains, seed by seed
    assert mean == pytest.approx(numpy.mean(of_all))
    assert p == pytest.approx(scipy.stats.wilcoxon(of_all).pvalue)


def test_equal_differences_tie_whatever_their_last_digits():
    ours, theirs = (278, 273, 270, 263, 280, 265), (281, 279, 273, 260, 280, 265)  # of 300
    scores = [{s: 100 * (n / 300) for s, n in enumerate(right)} for right in (ours, theirs)]
    n, mean, _, p = compare(*scores)
    assert (n, round(mean, 9)) == (6, -0.5)
    expected = scipy.stats.wilcoxon(numpy.subtract(ours, theirs)).pvalue
    assert p == expected == 0.5  # without rounding, 0.375


def test_the_gap_is_train_minus_test_and_what_is_undefined_counts_as_0():
    run = result("a", "dora", 0, None, train=0.75)
    assert MEASURES["train - test score"](run) == 75
    assert MEASURES["test score"](run) == 0


def test_holm_s_correction_on_a_worked_example():
    """4 · 0.005, 3 · 0.01, 2 · 0.03, and 0.04 raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_fewer_than_six_pairs_have_no_p():
    assert ("a", "dora") not in differences(draws(seeds=5), 100, "test score", "bidora", 1)


def test_the_tables_have_scores_paired_differences_and_seconds():
    ours, theirs = [0.90, 0.88, 0.91, 0.87, 0.93, 0.9], [0.89, 0.89, 0.86, 0.85, 0.90, 0.88]
    noted = {"dtype": "bfloat16", "threads": 1, "processor": "EPYC, AVX2"}
    runs = [result("d", "bidora", s, a) | noted for s, a in enumerate(ours)]
    runs += [result("d", "dora", s, a) for s, a in enumerate(theirs)]
    diverged = {"domain": "d", "size": 100, "method": "dora", "seed": 8, "diverged": "not finite"}
    runs.append(diverged)
    lines = list(tables([*runs, result("d", "dora", 9, 0.1)], ("bidora", "dora", "ft"), 1))
    scores = f"{100 * numpy.mean(ours):.1f} ± {100 * numpy.std(ours, ddof=1):.1f} (6)"
    assert f"| `bidora` | {scores} | {scores} |" in lines
    gaps = numpy.array(ours) - theirs
    start = f"| `dora` | {100 * gaps.mean():+.1f} ["
    [difference] = [line for line in lines if line.startswith(start)]
    assert f"p = {scipy.stats.wilcoxon(100 * gaps).pvalue:.2g}" in difference
    assert list(seconds_table(runs, ("bidora", "dora", "ft")))[-3:] == [
        "| 100 | EPYC, AVX2, bfloat16, 1 | 60 | – |",
        "| 100 | unrecorded, None, None | – | 60 |",
        "",
    ]
    assert not list(seconds_table(draws(), ("bidora", "dora")))  # no run says on how many threads


def test_a_table_says_which_runs_are_in_another_dtype():
    runs = [result("d", arm, 0, 0.5) | {"dtype": "float32"} for arm in ("bidora", "dora", "ft")]
    assert not [line for line in tables(runs, ("bidora", "dora", "ft"), 1) if "dtype" in line]
    runs[0]["dtype"] = "bfloat16"
    said = "Not all in one dtype; bfloat16: `bidora`; float32: `dora`, `ft`"
    assert said in list(tables(runs, ("bidora", "dora", "ft"), 1))


@pytest.mark.parametrize(
    "picture, compared",
    [
        ("study", ["bidora", "dora"]),
        ("compare", ["bidora", "dora"]),
        ("ablation", ["as-written", "as-published"]),
        ("back", ["as-published", "as-written"]),
        ("hypergradients", ["bidora", "first-order"]),
    ],
)
def test_the_pictures_and_the_tables_are_drawn_from_results(picture, compared, refuses):
    folder = "results" if picture == "compare" else "results/study"
    results.save(folder, {"name": "other", "set": "tune"})
    Path("docs").mkdir()
    refuses(figures, [f"--only={picture}"], f"no arm has six seeds beside {compared[0]}")

    runs = draws(domains=("peptides", "movie-sentiment"), compared=compared)
    for run in runs:
        results.save(folder, run)
    lines = list(tables(runs, compared, 1))
    assert sum(line.startswith(f"| `{compared[1]}` |") for line in lines) == 4
    assert figures.main([f"--only={picture}"]) == 0
    assert Path(f"docs/{picture}.png").stat().st_size > 5000


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("group", figures.VARIED)
def test_a_group_is_drawn_over_what_it_varies_by_the_seeds_that_its_arms_share(
    group, seeds, refuses
):
    Path("docs").mkdir()
    refuses(figures, [f"--only={group}"], "no seed of all arms")
    domains, score = GROUPS[group].domains, {}
    for _, examples, lines in figures.VARIED[group].values():
        for value, arm in itertools.chain(*(line.items() for line in lines.values())):
            size = examples or value
            assert arm in GROUPS[group].arms and str(size) in GROUPS[group].sizes
            score |= {(arm, size, d, s): random.random() for d in domains for s in range(seeds)}
    score |= {("bidora", 100, d, seeds): 0.0 for d in domains}  # a seed that no other arm has
    for (arm, size, domain, seed), value in score.items():
        name = {"name": f"{domain}-{size}-{arm}-{seed}", "size": size}
        results.save("results/study", result(domain, arm, seed, value) | name)

    figure = figures.over("results/study", group)
    assert figure.legends[0].get_title().get_text().endswith(f"over {seeds} seeds")
    for axes, (task, size, lines) in zip(figure.axes, figures.VARIED[group].values()):
        for drawn, line in zip(axes.containers, lines.values()):
            keys = [(d, s) for d in domains for s in range(seeds) if task in (d, "all")]
            shared = [[score[(arm, size or x, *key)] for key in keys] for x, arm in line.items()]
            expected = numpy.transpose([[*line], 100 * numpy.mean(shared, axis=1)])
            numpy.testing.assert_allclose(drawn[0].get_xydata(), expected)
    assert figures.main([f"--only={group}"]) == 0


def test_traces_are_drawn_and_summed_up(refuses):
    trace = {"indirect": [0.1, 0.3, 0.5], "cosine": [-0.4, -0.2, 0.1], "moved": [0.01, 0.04]}
    *shown, last = figures.CURVES
    runs = [run | {"trace": trace} for run in draws(domains=("peptides",), compared=figures.CURVES)]
    for run in runs:
        if run["method"] != last:
            results.save("results/study", run)
    Path("docs").mkdir()
    refuses(figures, ["--only=search"], f"no run of {last} has a trace")

    results.save("results/study", next(run for run in runs if run["method"] == last))
    assert figures.main(["--only=search"]) == 0
    assert Path("docs/search.png").stat().st_size > 5000
    lines = list(tables(runs, [*figures.CURVES], -1))
    assert sum(line.endswith("| 0.3 | -0.20 | 4.0 % |") for line in lines) == len(figures.CURVES)
