"""The sweep: its samples, its choice of rates, its arms and jobs, and resuming it."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch

import train
from research import arms, published, results, sweep
from research.sweep import ARMS, RATES, TUNING_SEEDS, Job, Sweep
from support.run import run_folder

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(sweep.__file__).parents[1]
OPTIONS = "--model=minilm --target_modules=query,value --dtype=float32"
MODEL = {"model": "tiny-random", "target_modules": ("q_proj", "v_proj")}
TOY = ["--model=tiny-random", "--target_modules=q_proj,v_proj", "--domains=toy-sentiment"]
TOY += ["--sizes=20"]
LORA = [*TOY, "--arms=lora", "--seeds=2"]


def test_samples_tuning_set_and_test_share_no_example_and_the_test_is_the_same_for_all():
    given = Sweep(group="smollm2")

    def texts(size, seed, tuning=False):
        job = Job("product-sentiment", size, "lora", seed)
        options = sweep.options_of(given, "a", job, {}, tuning)
        files = (Path(options[f"{split}_file"]) for split in ("train", "test"))
        return [{json.loads(line)["text"] for line in f.read_text().splitlines()} for f in files]

    (sample, test), (other, same) = texts(100, 0), texts(400, 1)
    tuned_on, tune = texts(100, 1000, tuning=True)
    assert (len(sample), len(other), len(test), len(tune)) == (100, 400, 300, 200)
    assert test == same and sample != other
    assert not (test | tune) & (sample | other | tuned_on) and not test & tune


def tuned(losses, choice, rates, folder="results/study", options=OPTIONS):
    """Write the results that a choice of rates needs: {point: loss, or None if it diverged}."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "runs.jsonl", "a") as file:
        for (point, loss), seed in itertools.product(losses.items(), TUNING_SEEDS):
            given = " ".join(f"--{name}={rate}" for name, rate in zip(rates, point))
            name = "-".join(["tune", choice, *(f"{rate:g}" for rate in point), str(seed)])
            line = {"name": name, "set": "tune", "command": f"python train.py {options} {given}"}
            measured = {"after": {"test": {"loss": loss}}} if loss else {"diverged": "nan"}
            file.write(json.dumps(line | measured) + "\n")


def bowl(*best):
    """The squared distance from a point, in places of RATES, of all pairs of rates."""
    points = [(a, b) for a in RATES for b in RATES]
    places = {p: [RATES.index(x) - RATES.index(to) for x, to in zip(p, best)] for p in points}
    return {point: 1 + sum(d * d for d in away) for point, away in places.items()}


def climbed(best, floor=0.0):
    """The point that climb reaches in such a bowl from BiDoRA's first guess, and those it tried."""
    tried, losses = set(), bowl(*best)

    def loss(rates):
        tried.add(tuple(rates.values()))
        return max(floor, losses[tuple(rates.values())])

    return sweep.climb(loss, ARMS["bidora"].rates), tried


@pytest.mark.parametrize("best", [(1e-4, 0.1), (1e-2, 1e-3)])
def test_the_choice_of_rates_reaches_the_optimum_and_has_tried_all_its_neighbours(best):
    reached, tried = climbed(best)
    assert tuple(reached.values()) == best
    assert {tuple(near.values()) for near in sweep.neighbours(reached)} <= tried


@pytest.mark.parametrize("end", [0, -1])
def test_a_choice_at_the_edge_of_the_grid_is_refused(end):
    with pytest.raises(ValueError, match=f"upper_lr={RATES[end]:g} is at the edge"):
        climbed((1e-2, RATES[end]))


def test_the_choice_of_rates_stays_on_a_plateau():
    assert climbed((1e-4, 0.1), floor=1e9)[0] == ARMS["bidora"].rates


BOTH = ("lower_lr", "upper_lr")


def test_the_choice_for_more_examples_begins_at_that_for_100():
    for domain in ("peptides", "similarity"):
        tuned(bowl(1e-2, 1e-3), f"{domain}-bidora", BOTH)
    tuned(bowl(1e-3, 1e-2), "peptides-400-bidora", BOTH)
    expected = {("peptides", size): (1e-2, 1e-3) for size in (16, 200)}
    expected |= {("peptides", size): (1e-3, 1e-2) for size in (400, 1000)}
    expected[("similarity", 400)] = (1e-2, 1e-3)  # which has too few examples
    for place, best in expected.items():
        assert tuple(sweep.choose(Sweep(), *place, "bidora", make=False).values()) == best

    Path("results/study/runs.jsonl").unlink()
    tuned(bowl(1e-2, 1e-3), "peptides-bidora", BOTH)
    with pytest.raises(LookupError, match="tune-peptides-400-bidora-0.003-0.001-1000"):  # beside it
        sweep.choose(Sweep(), "peptides", 400, "bidora", make=False)


def test_an_arm_takes_the_rates_that_it_names_and_a_factor_on_the_upper_one_alone():
    tuned(bowl(1e-2, 1e-2), "peptides-bidora", BOTH)
    tuned({(rate,): 1 + abs(numpy.log(rate / 3e-5)) for rate in RATES}, "peptides-ft", BOTH[:1])
    for arm, expected in {
        "dora-at-bidora-rate": {"lower_lr": 1e-2},
        "bidora-5:5": {"lower_lr": 1e-2, "upper_lr": 1e-2},
        "bidora-on-train": {"lower_lr": 1e-2, "upper_lr": 1e-2},
        "m-rate-10": {"lower_lr": 1e-2, "upper_lr": 1e-1},
        "rates-0.1-3": {"lower_lr": 1e-3, "upper_lr": 3e-2},
        "bidora-r32": {"lower_lr": 1e-2, "upper_lr": 1e-2},
        "as-published": {"lower_lr": 3e-5, "upper_lr": 1e-2},
        "as-published-script-rates": {},
    }.items():
        assert sweep.rates_of(Sweep(), "peptides", 100, arm, make=False) == expected


SMOLLM2 = {"folder": "results", "options": "--model=smollm2-135m"}


def test_the_point_of_a_grid_with_the_lowest_mean_loss_is_chosen_for_all_domains_and_sizes():
    losses = {(3e-5,): 0.6, (1e-4,): 0.5, (3e-4,): 0.4, (1e-3,): 0.3, (3e-3,): None, (1e-2,): 0.5}
    tuned(losses, "dora", BOTH[:1], **SMOLLM2)
    given = Sweep(group="smollm2")
    assert sweep.rates_of(given, "product-sentiment", 400, "dora", make=False) == {"lower_lr": 1e-3}
    tuned(dict.fromkeys(losses), "lora", BOTH[:1], **SMOLLM2)
    with pytest.raises(ValueError, match="all rates of lora's grid diverged"):
        sweep.rates_of(given, "product-sentiment", 100, "lora", make=False)


def test_a_run_that_diverges_is_kept_as_such_and_any_other_failure_stops():
    toy, job = Sweep(**MODEL), Job("toy-sentiment", 40, "ft", 0)
    assert "not finite" in sweep.run(toy, "a", job, {"lower_lr": 1e30})["diverged"]
    with pytest.raises(ValueError, match="b: lower_lr=-1.0 must be at least 0"):
        sweep.run(toy, "b", job, {"lower_lr": -1.0})
    [line] = results.load_results(toy.results)
    assert "not finite" in line["diverged"] and "after" not in line


def test_a_run_that_another_process_holds_is_left_to_it():
    toy = Sweep(group="smollm2", **MODEL)
    Path(toy.out_dir).mkdir(parents=True)
    with run_folder.locked(f"{toy.out_dir}/a"):
        assert sweep.run(toy, "a", Job("toy-sentiment", 40, "lora", 0), {"lower_lr": 1e-3}) is None


def test_every_arm_is_a_run_that_train_accepts():
    for name, arm in ARMS.items():
        rates = arm.rates if isinstance(arm.rates, dict) else {"lower_lr": 1e-3}
        options = sweep.options_of(Sweep(), "x", Job("peptides", 100, name, 0), rates)
        train.check(published.read_config([f"--{name}={value}" for name, value in options.items()]))


@pytest.mark.parametrize("group", arms.GROUPS)
def test_the_runs_of_a_seed_come_before_those_of_the_next(group):
    jobs = [*sweep.runs_of(Sweep(group=group)).values()]
    seeds = [job.seed for job in jobs]
    assert seeds == sorted(seeds) and len({*jobs}) == len(jobs)


def test_the_arms_at_a_rank_keep_the_scale_of_the_others():
    whole = {name: arms.MINILM | ARMS[name].settings for name in arms.GROUPS["rank"].arms}
    found = {(settings["method"], settings["rank"]) for settings in whole.values()}
    assert found == set(itertools.product(("lora", "dora", "bidora"), (1, 2, 4, 8, 16, 32)))
    assert {settings["alpha"] / settings["rank"] for settings in whole.values()} == {2}


def test_the_arms_at_an_alpha_differ_by_it_and_their_rate_alone():
    found = [(ARMS[name], arms.MINILM | ARMS[name].settings) for name in arms.GROUPS["alpha"].arms]
    varied = {(s["method"], s["alpha"], arm.lower_factor) for arm, s in found}
    assert varied == set(itertools.product(("lora", "dora"), (2, 8, 32), (0.25, 1, 4)))
    assert all(arm.rates in (s["method"], arms.LOWER) for arm, s in found)


def test_each_published_arm_undoes_one_change():
    """Which settings differ from the program's; without a difference, none is over all weights."""
    differ = {"identity": {"hypergradient", "all_weights"}, "all-weights": {"all_weights"}}
    differ |= {"noise": {"noise"}, "network": {"network"}, "unscaled": {"alpha"}}
    differ |= {"transposed": {"transposed", "magnitude_axis", "init"}, "normal": {"init"}}
    differ |= {"unshuffled": {"shuffle"}, "decay": {"upper_weight_decay"}}
    assert differ.keys() == arms.CHANGES.keys()
    whole = ARMS["as-published"].settings
    for name, expected in differ.items():
        undone = ARMS[f"published-{name}"].settings
        different = {key for key in whole if whole[key] != undone.get(key)}
        assert different == expected and undone.keys() <= whole.keys(), name


def test_every_method_is_an_arm_with_rates_for_its_levels_and_a_grid():
    for name in (*train.METHODS, "ft"):
        assert ARMS[name].rates.keys() == set(BOTH if name.startswith("bi") else BOTH[:1])
        grid = arms.GRIDS.get(name, arms.GRIDS["others"])
        assert all(len(set(grid[rate])) > 1 for rate in ARMS[name].rates)
    assert max(arms.GRIDS["ft"]["lower_lr"]) < 1e-4


def test_a_sweep_tunes_trains_and_goes_on_where_it_ended(capfd):
    """One run of the choice of rates is missing, then the runs of two seeds."""
    path = Path("results/study/runs.jsonl")
    losses = {(3e-4,): 2.0, (1e-3,): 1.0, (3e-3,): 2.0, (1e-2,): 3.0}
    tuned(losses, "toy-sentiment-lora", BOTH[:1], options=" ".join([*TOY[:2], "--dtype=float32"]))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert sweep.main([*TOY, "--arms=lora", "--seeds=1"]) == 0
    before = path.read_bytes()
    made = [json.loads(line)["name"] for line in before.splitlines()[-2:]]
    assert made == ["tune-toy-sentiment-lora-0.01-1002", "toy-sentiment-20-lora-0"]
    assert sweep.main(LORA) == 0
    after = path.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 1
    runs = results.load_results("results/study")
    assert [(r["seed"], r["lower_lr"]) for r in runs] == [(0, 1e-3), (1, 1e-3)]

    capfd.readouterr()
    assert sweep.main(LORA) == 0 and path.read_bytes() == after
    out, error = capfd.readouterr()
    assert "0 runs to do" in error and re.search(r"\| `lora` \| .* \(2\) \|", out)


def test_a_sweep_at_one_rate_is_a_set_of_its_own_and_makes_again_only_what_was_torn(capsys):
    arguments = [*TOY, "--group=smollm2", "--arms=bilora,ft", "--seeds=1", "--lower_lr=3e-4"]
    assert sweep.main(arguments) == 0
    assert "| `bilora` |" in capsys.readouterr().out
    before = results.read_results("results")
    assert before.keys() == {f"rate-0.0003-toy-sentiment-20-{arm}-0" for arm in ("bilora", "ft")}
    runs = results.load_results("results", "rate-0.0003")
    rates = {(r["method"], r["lower_lr"], r.get("upper_lr")) for r in runs}
    assert rates == {("bilora", 3e-4, 3e-2), ("ft", 3e-4, None)}
    for run in runs:  # q and v of two blocks, four snapshots a phase
        trajectory = results.trajectory_of(run)
        phases = 2 if run["method"] == "bilora" else 1
        assert numpy.shape(trajectory.delta_m) == (4 * phases, 4)

    path = Path("results/runs.jsonl")
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"}") - 9])  # as a process leaves it that is killed
    assert sweep.main(arguments) == 0
    after = results.read_results("results")
    assert after.keys() == before.keys()
    made_again = [name for name in before if before[name]["seconds"] != after[name]["seconds"]]
    assert made_again == [json.loads(content.splitlines()[-1])["name"]]

    other, job = Sweep(group="smollm2", model="other"), Job("toy-sentiment", 20, "ft", 0)
    message = "was made without --lower_lr=9, --model=other: remove its line"
    with pytest.raises(ValueError, match=message):
        sweep.run(other, runs[0]["name"], job, {"lower_lr": 9})


def test_a_run_that_another_sweep_leaves_is_made_after_all(capsys):
    """That sweep here holds the first run's folder until the second run is there, then ends."""
    names = [f"rate-0.001-toy-sentiment-20-lora-{seed}" for seed in range(2)]
    path = Path("results/study/runs.jsonl")

    def hold_the_first():
        with run_folder.locked(f"out/study/{names[0]}"):
            held.set()
            while not path.exists() or names[1] not in path.read_text():
                time.sleep(0.1)

    held, other = threading.Event(), threading.Thread(target=hold_the_first, daemon=True)
    other.start()
    held.wait()
    assert sweep.main([*LORA, "--lower_lr=1e-3", "--workers=1"]) == 0
    assert "1 runs are being made by other processes" in capsys.readouterr().err
    made = results.read_results("results/study")
    assert [*made] == names[::-1] and {line["threads"] for line in made.values()} == {1}


@pytest.mark.parametrize("threads, used", [("1", 1), (None, os.cpu_count())])
def test_workers_share_the_cores_unless_the_user_says_how_many_threads(threads, used, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert sweep.in_workers(1, "", torch.get_num_threads, [()]) == [used]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_the_workers_end_with_their_parent_and_the_same_command_resumes(signum, status):
    command = [sys.executable, "-m", "research.sweep", *LORA]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not Path("results/study/runs.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        threads = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [pid for thread in threads for pid in thread.read_text().split()]
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)  # the workers', too
    assert process.returncode == status
    assert ("the same command resumes" in errors) == (signum == signal.SIGTERM)
    assert len(children) >= 2 and not any(Path(f"/proc/{pid}/exe").exists() for pid in children)
    for folder in Path("out/study").glob("*-1*"):
        with run_folder.locked(folder):  # no process holds it any more
            pass


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--group=paperr"], "unknown group 'paperr'; did you mean 'paper'?"),
        (["--arms=dorra"], "did you mean 'dora'"),
        (["--domains=films"], "unknown domains 'films'"),
        (["--sizes=ten"], "integers of at least 10"),
        (["--seeds=-1"], "must be at least"),
        (["--workers=0"], "must be at least"),
        (["--results=file"], "choose another --results"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message, refuses):
    Path("file").touch()
    refuses(sweep, arguments, message)


NAME = "peptides-100-bidora-0"
LINE = {"name": NAME, "set": "main", "domain": "peptides", "size": 100, "method": "bidora"}
LINE |= {"after": {"test": {"accuracy": 0.5}, "train": {"accuracy": 0.9}}}
LINE |= {"seed": 0, "command": f"python train.py {OPTIONS}"}


@pytest.mark.parametrize(
    "lost, arguments, said",
    [
        ("after", [], "lacks after: remove its line"),
        ("command", [], "lacks command: remove its line"),
        (None, ["--model=other"], "was made without --model=other: remove its line"),
        (None, [], ""),
    ],
)
def test_a_line_without_what_a_sweep_reads_or_of_another_model_is_named(
    lost, arguments, said, capsys
):
    results.save("results/study", {key: value for key, value in LINE.items() if key != lost})
    one = ["--arms=bidora", "--domains=peptides", "--seeds=1", "--sizes=100"]
    assert sweep.main([*one, *arguments]) == (2 if said else 0)
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {NAME} in results/study/runs.jsonl {said}" if said else "0 runs"
    )
