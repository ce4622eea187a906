"""The study on an encoder: its choice of rates, its statistics, its jobs, and resuming it."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import scipy.stats

from research import arms, study
from research.differences import MEASURES, differences, holm, tables
from research.results import read_results, save
from research.study import Study

OPTIONS = "--model=minilm --target_modules=query,value"
TOY = [
    "--model=tiny-random",
    "--target_modules=q_proj,v_proj",
    "--domains=toy-sentiment",
    "--sizes=20",
    "--arms=lora",
    "--seeds=2",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))


def result(domain, arm, seed, test, train=0.9, size=100, metric="accuracy"):
    after = {"test": {metric: test, "loss": 0.5}, "train": {metric: train, "loss": 0.1}}
    found = {"name": f"{domain}-{size}-{arm}-{seed}", "domain": domain, "size": size}
    found |= {"method": arm, "seed": seed, "metric": metric, "after": after, "set": "main"}
    return found | {"command": "python train.py --dtype=float32 " + OPTIONS}


def draws(seed=0, seeds=8, domains=("a", "b"), compared=("bidora", "dora")):
    """Results of two arms on two domains."""
    rng = random.Random(seed)
    return [
        result(domain, arm, s, rng.random())
        for domain in domains
        for arm in compared
        for s in range(seeds)
    ]


def test_differences_are_paired_by_seed_with_scipy_s_interval_and_p():
    results = draws()
    random.Random(1).shuffle(results)
    n, mean, half, p, _ = differences(results, 100, "test score", "bidora", 1)["a", "dora"]
    scores = {
        (r["domain"], r["method"], r["seed"]): 100 * r["after"]["test"]["accuracy"] for r in results
    }
    pairs = [scores["a", "bidora", s] - scores["a", "dora", s] for s in range(8)]
    interval = scipy.stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
    assert n == 8 and mean == pytest.approx(numpy.mean(pairs))
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert p == pytest.approx(scipy.stats.wilcoxon(pairs).pvalue)
    turned = differences(results, 100, "test score", "bidora", -1)["a", "dora"]
    assert turned[:4] == (n, -mean, half, p)


def test_all_is_the_mean_over_domains_seed_by_seed():
    results = draws()
    _, mean, _, p, _ = differences(results, 100, "test score", "bidora", 1)["all", "dora"]
    by = {(r["domain"], r["method"], r["seed"]): r["after"]["test"]["accuracy"] for r in results}
    pairs = [
        numpy.mean([100 * (by[d, "bidora", s] - by[d, "dora", s]) for d in "ab"]) for s in range(8)
    ]
    assert mean == pytest.approx(numpy.mean(pairs))
    assert p == pytest.approx(scipy.stats.wilcoxon(pairs).pvalue)


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


def bowl(monkeypatch, best, floor=0.0):
    """
    Runs whose loss is the squared distance from the rates best[size] in places of the grid; the
    list of the (size, rates) that are tried.
    """
    tried = []

    def run(_study, pool, name, domain, size, arm, seed, rates, **more):
        tried.append((size, tuple(rates.values())))
        pairs = zip(rates.values(), best[size])
        away = [study.GRID.index(rate) - study.GRID.index(to) for rate, to in pairs]
        return {"after": {"test": {"loss": 1 + max(floor, sum(d * d for d in away))}}}

    monkeypatch.setattr(study, "run", run)
    return tried


@pytest.mark.parametrize("best", [(1e-4, 0.1), (1e-2, 1e-3)])
def test_the_choice_of_rates_reaches_the_optimum_and_has_tried_all_its_neighbours(
    best, monkeypatch
):
    tried = bowl(monkeypatch, {100: best})
    found = study.climb(Study(), None, "a", 100, "bidora")
    assert tuple(found.values()) == best
    assert {(100, tuple(near.values())) for near in study.neighbours(found)} <= set(tried)


@pytest.mark.parametrize("end", [0, -1])
def test_a_choice_at_the_edge_of_the_grid_is_refused(end, monkeypatch):
    bowl(monkeypatch, {100: (1e-2, study.GRID[end])})
    with pytest.raises(ValueError, match=f"upper_lr={study.GRID[end]:g} is at the edge"):
        study.climb(Study(), None, "a", 100, "bidora")


def test_the_choice_of_rates_stays_on_a_plateau(monkeypatch):
    bowl(monkeypatch, {100: (1e-4, 0.1)}, floor=1e9)
    assert study.climb(Study(), None, "a", 100, "bidora") == study.ARMS["bidora"].rates


def test_the_choice_for_more_examples_begins_at_that_for_100(monkeypatch):
    choices = {100: (1e-2, 1e-3), 400: (1e-3, 1e-2)}
    tried = bowl(monkeypatch, choices)
    for size, domain, expected in ((50, "a", 100), (400, "a", 400), (400, "similarity", 100)):
        tried.clear()
        found = study.climb(Study(), None, domain, size, "bidora")
        assert tuple(found.values()) == choices[expected]
        assert {at for at, _ in tried} == {100, expected}
    assert study.tunings(Study(arms=("lora",), domains=("a",), sizes=("100", "400"))) == {
        "tune-a-lora": ("a", 100, "lora"),
        "tune-a-400-lora": ("a", 400, "lora"),
    }


def test_controls_take_bidora_s_rates_and_only_those_that_they_have(monkeypatch):
    bowl(monkeypatch, {100: (1e-2, 1e-2)})
    for arm, expected in (("dora-at-bidora-rate", 1), ("bidora-5:5", 2), ("bidora-on-train", 2)):
        assert len(study.tuned(Study(), None, "a", 100, arm)) == expected


def test_every_arm_is_a_run_that_train_accepts():
    import train
    from research import published

    for name, arm in study.ARMS.items():
        rates = arm.rates if isinstance(arm.rates, dict) else {"lower_lr": 1e-3}
        options = study.options_of(Study(), "x", "peptides", 100, name, 0, rates)
        given = [f"--{name}={value}" for name, value in options.items()]
        train.check(published.read_config(given))


def test_an_arm_s_factor_is_on_the_upper_rate_alone(monkeypatch):
    bowl(monkeypatch, {100: (1e-2, 1e-2)})
    assert study.tuned(Study(), None, "a", 100, "m-rate-10") == {"lower_lr": 1e-2, "upper_lr": 1e-1}


def test_each_published_arm_undoes_one_change():
    """Which settings differ from the program's; without a difference, none is over all weights."""
    differ = {"identity": {"hypergradient", "all_weights"}, "all-weights": {"all_weights"}}
    differ |= {"noise": {"noise"}, "network": {"network"}, "unscaled": {"alpha"}}
    differ |= {"transposed": {"transposed", "magnitude_axis", "init"}, "normal": {"init"}}
    differ |= {"unshuffled": {"shuffle"}, "decay": {"upper_weight_decay"}}
    assert differ.keys() == arms.CHANGES.keys()
    whole = arms.ARMS["as-published"].settings
    for name, expected in differ.items():
        undone = arms.ARMS[f"published-{name}"].settings
        different = {key for key in whole if whole[key] != undone.get(key)}
        assert different == expected and undone.keys() <= whole.keys(), name


def test_a_study_tunes_trains_resumes_and_lists_what_is_left(capfd):
    assert study.main([*TOY, "--list"]) == 0
    first = capfd.readouterr().out.splitlines()
    assert [line.split("--job=")[1] for line in first] == ["tune-toy-sentiment-lora"]
    assert study.main([*TOY, "--job=tune-toy-sentiment-lora"]) == 0
    assert study.main([*TOY, "--list"]) == 0
    listed = capfd.readouterr().out.splitlines()
    names = ["toy-sentiment-20-lora-0", "toy-sentiment-20-lora-1"]
    assert [line.split("--job=")[1] for line in listed] == names
    assert study.main([*TOY, f"--job={names[0]}"]) == 0

    before = Path("results/study/runs.jsonl").read_bytes()
    assert study.main(TOY) == 0
    after = Path("results/study/runs.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 1
    assert names[1] in read_results("results/study")
    assert study.main([*TOY, "--list"]) == 0
    assert "--job" not in capfd.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_ends_the_workers_and_the_same_command_resumes():
    root = Path(study.__file__).parents[1]
    command = [sys.executable, "-m", "research.study", *TOY]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not Path("results/study/runs.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        threads = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [pid for thread in threads for pid in thread.read_text().split()]
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command resumes" in errors
    assert len(children) >= 2 and not any(Path(f"/proc/{pid}/exe").exists() for pid in children)


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
def test_the_pictures_and_the_tables_are_drawn_from_results(picture, compared, capsys):
    from research import figures

    folder = "results" if picture == "compare" else "results/study"
    save(folder, {"name": "other", "set": "tune"}, None)
    Path("docs").mkdir()
    assert figures.main([f"--only={picture}"]) == 2
    assert f"no arm has six seeds beside {compared[0]}" in capsys.readouterr().err

    results = draws(domains=("peptides", "movie-sentiment"), compared=compared)
    for found in results:
        save(folder, found, None)
    lines = list(tables(results, compared, 1))
    assert sum(line.startswith(f"| `{compared[1]}` |") for line in lines) == 4
    assert figures.main([f"--only={picture}"]) == 0
    assert Path(f"docs/{picture}.png").stat().st_size > 5000


def test_traces_are_drawn_and_summed_up(capsys):
    from research import figures

    trace = {"indirect": [0.1, 0.3, 0.5], "cosine": [-0.4, -0.2, 0.1], "moved": [0.01, 0.04]}
    shown = list(figures.SHOWN)
    results = [found | {"trace": trace} for found in draws(domains=("peptides",), compared=shown)]
    for found in results:
        if found["method"] != shown[-1]:
            save("results/study", found, None)
    Path("docs").mkdir()
    assert figures.main(["--only=search"]) == 2
    assert f"no run of {shown[-1]} has a trace" in capsys.readouterr().err

    save("results/study", results[-1], None)
    assert figures.main(["--only=search"]) == 0
    assert Path("docs/search.png").stat().st_size > 5000
    lines = list(tables(results, shown, -1))
    assert sum(line.endswith("| 0.3 | -0.20 | 4.0 % |") for line in lines) == len(shown)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arms=dorra"], "did you mean 'dora'"),
        (["--domains=films"], "unknown domains 'films'"),
        (["--sizes=ten"], "integers of at least 20"),
        (["--seeds=-1"], "must be at least"),
        (["--workers=0"], "must be at least"),
        (["--report"], "no results in results/study"),
        ([*TOY, "--job=nothing"], "unknown job 'nothing'"),
        ([*TOY, "--job=tune-nothing"], "unknown job 'tune-nothing'"),
        (["--list", "--report"], "choose one"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message, capsys):
    assert study.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_runs_of_another_model_are_not_taken_for_this_one_s(capsys):
    save("results/study", result("peptides", "bidora", 0, 0.5), None)
    assert study.main(["--report"]) == 0
    assert study.main(["--report", "--model=tiny-random"]) == 2
    said = "was made without --model=tiny-random: choose another --results"
    assert said in capsys.readouterr().err
