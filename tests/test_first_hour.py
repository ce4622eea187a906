"""A newcomer's first hour: what a run shows, also when it is interrupted, wrong or in vain."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import command, write

import config
import sample
import train
from support.run import files, progress, report, rules
from tools import curves, merge

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(train.__file__).parent
SHORT = ("--config=tiny.py", "--search_steps=6", "--retrain_steps=6", "--test_size=20")


@pytest.fixture
def interrupted(monkeypatch, capsys):
    """Run train.py with a SIGINT at a function's n-th call: code 130. Returns its last line."""

    def interrupted(module, name, count, *arguments):
        calls, function = itertools.count(1), getattr(module, name)

        def wrapper(*given, **options):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGINT)
            return function(*given, **options)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, wrapper)
            assert train.main(arguments) == 130
        return capsys.readouterr().err.splitlines()[-1]

    return interrupted


def test_bars_have_units_and_the_plan_and_the_table_say_how_much_of_the_data_is_seen(capsys):
    """160 train and 40 val examples; --epochs keeps the proportion of the phases, here 5 to 7."""
    assert train.main([*SHORT, "--eval_size=10"]) == 0
    out, err = capsys.readouterr()
    bars = re.findall(r"(\w+): 100%.*? (\d+)/\2 \[.*?(row|step)", err)
    expected = ["evaluate 10 row", "search 6 step", "retrain 6 step", "evaluate 30 row"]
    assert [" ".join(bar) for bar in bars] == expected, err
    assert "search: 6 steps of 4 examples, direction on train (0.15 epochs)" in out
    assert "magnitude on val (0.60 epochs)" in out and "direction on train + val (0.12" in out
    assert "warning: that is below one epoch: --epochs=1" in out
    rows = [re.split("  +", line.strip()) for line in out.splitlines()]
    assert ["examples", "160", "40", "20"] in rows and ["evaluated", "10", "10", "10"] in rows
    assert ["trained on", "24.0% at most", "in retrain", "no"] in rows
    assert train.main(["--config=tiny.py", "--epochs=1", "--test_size=20", "--overwrite"]) == 0
    lines = Path("out/tiny/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in lines] == ["search"] * 21 + ["retrain"] * 29
    out = capsys.readouterr().out
    assert "warning" not in out and "trained on             yes" in out  # and has learnt


def test_the_first_step_is_kept_out_of_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    with progress.bar("train", 10, "step") as bar:
        assert "?" in bar.format_meter(**bar.format_dict)
        for seconds in (50, 2, 2):
            now[0] += seconds
            bar.update()
        assert bar.format_dict["rate"] == 0.5
        assert "<00:14" in bar.format_meter(**bar.format_dict)  # 7 steps of 2 seconds


def test_an_interrupt_between_the_imports_and_the_program_is_of_a_killed_process():
    code = "import train, _thread; _thread.interrupt_main(); input()"
    done = command("-c", code, stdin=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGINT and "Traceback" not in done.stderr
    assert done.stderr.startswith("interrupted; start it again with: python -c")


@pytest.mark.parametrize("name", ["prepare", "evaluate_rows"])
def test_an_interrupt_before_any_step_gives_the_command_and_frees_the_folder(name, interrupted):
    said = interrupted(train, name, 1, *SHORT)
    assert said.startswith("interrupted") and said.endswith(f"python train.py {' '.join(SHORT)}")
    assert train.main([*SHORT]) == 0


@pytest.mark.parametrize(
    "module, name, count, begin",
    [
        (train, "build_optimizer", 2, "interrupted; 6 steps are saved; resume it with: "),
        (train, "evaluate_rows", 2, "interrupted after the last step"),
        (report, "plot_losses", 1, "interrupted after the last step"),
    ],
)
def test_an_interrupt_after_a_phase_loses_no_step(module, name, count, begin, capsys, interrupted):
    said = interrupted(module, name, count, *SHORT)
    assert said.startswith(begin)
    assert said.endswith(f"python train.py {' '.join(SHORT)} --resume=True")
    steps = Path("out/tiny/metrics.jsonl").read_bytes()
    assert train.main([*SHORT]) == 2  # the steps are not overwritten
    assert "holds an earlier run" in capsys.readouterr().err
    assert train.main([*SHORT, "--resume"]) == 0
    resumed = Path("out/tiny/metrics.jsonl").read_bytes()
    assert resumed.startswith(steps) and resumed.count(b"\n") == 12


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_learnt_nothing_says_so_last_and_what_to_lower(before, capsys):
    wild = ("--lower_lr=1e3", "--grad_clip=1e9", f"--eval_before={before}")
    assert train.main([*SHORT, *wild]) == 0
    warning = capsys.readouterr().out.partition("\nnext:")[0].splitlines()[-1]
    assert warning.startswith("warning: training ended no better than it began (train loss")
    assert warning.endswith("lower --lower_lr or --upper_lr")


def test_without_a_test_set_the_setting_for_one_is_named(capsys):
    write("mine.jsonl", [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(40)])
    options = ("--data=", "--train_file", "mine.jsonl", "--out_dir", "mine")
    assert train.main(["--config=tiny.py", "--search_steps=2", "--retrain_steps=2", *options]) == 0
    out = capsys.readouterr().out
    assert "no test set: --test_file" in out and "before training: val accuracy" in out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--rank", "4"], {"rank": 4}),
        (["--rank=4", "--seed", "3"], {"rank": 4, "seed": 3}),
        (["--overwrite", "--rank", "4"], {"overwrite": True, "rank": 4}),
        (["--rank", "4", "--overwrite"], {"overwrite": True, "rank": 4}),
        (["--eval_before", "False", "--rank=4"], {"eval_before": False, "rank": 4}),
        (["--target-modules", "q_proj,v_proj"], {"target_modules": ("q_proj", "v_proj")}),
        (["--lower_lr", "1e-2", "--label_prompt=a=b"], {"lower_lr": 0.01, "label_prompt": "a=b"}),
        (["--seed=9007199254740993"], {"seed": 2**53 + 1}),  # no float
        # The folder's name holds the method.
        (["--config", "tiny.py", "--method", "dora"], {"out_dir": "out/tiny-dora"}),
        (["--config", "tiny.py"], {"out_dir": "out/tiny"}),
    ],
)
def test_a_value_may_follow_its_name_and_a_bool_may_stand_alone(arguments, expected):
    settings = config.read_config(arguments)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("name", rules.OTHER_NAMES)
def test_a_name_from_elsewhere_is_answered_with_settings_that_exist(name, capsys):
    assert train.main([f"--{name}", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: command line: {name} is not a setting here: ")
    assert error.count("\n") == 1
    named = set(re.findall(r"--(\w+)", rules.OTHER_NAMES[name]))
    assert named <= set(config.Config.__dataclass_fields__)


def test_an_unknown_setting_is_never_answered_with_a_long_list(capsys):
    for name in ("size", "zzzz", "lower_lrr", "hypergradient_step"):
        assert train.main([f"--{name}=3"]) == 2
        error = capsys.readouterr().err
        assert len(error) < 130 and ("did you mean" in error) != ("--help lists them all" in error)


def test_tools_read_settings_the_same_way(refuses):
    refuses(merge, ["--adaptor", "x", "--out_dir=y"], "did you mean 'adapter'")


PIP = """
import pathlib, sys, time
print("Collecting", *sys.argv[1:])
place = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
for part in range(4):
    with open(place / "thing-1.whl", "ab") as file:
        file.write(b"x" * 250)
    time.sleep(0.2)
sys.exit({status})
"""


def download(monkeypatch, status):
    """Download with a stand-in for pip, which writes a kilobyte in 0.8 seconds."""
    Path("pip.py").write_text(PIP.format(status=status))
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda c, **o: start([c[0], "pip.py", *c[3:]], **o))
    files.download("thing==1", Path("cache/thing-1.whl"), "0" * 64, 1000)


def test_a_download_is_one_line_and_a_bar(monkeypatch, capfd):
    download(monkeypatch, 0)
    out, err = capfd.readouterr()
    assert Path("cache/thing-1.whl").read_bytes() == b"x" * 1000 and out == ""
    assert "Collecting" not in err and "100%" in err and "1.00k/1.00k" in err


def test_pip_s_own_text_is_shown_when_it_fails(monkeypatch, capfd):
    with pytest.raises(FileNotFoundError, match="could not download thing==1"):
        download(monkeypatch, 1)
    assert "Collecting download" in capfd.readouterr().err
    assert not list(Path("cache").iterdir())


def test_the_download_s_bar_bears_that_pip_removes_its_folders(tmp_path, monkeypatch):
    """The folder goes after it was listed and before it is opened, as pip's build folders do."""
    (tmp_path / "kept").write_bytes(b"12345")
    (tmp_path / "gone").mkdir()
    scan, late = os.scandir, lambda path: scan(f"{path}/x" if Path(path).name == "gone" else path)
    monkeypatch.setattr(os, "scandir", late)
    assert files.largest(tmp_path) == 5


def test_a_conversation_ends_at_ctrl_c_without_a_traceback():
    chat = [sys.executable, str(ROOT / "sample.py"), "--model", "tiny-random", "--chat"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(chat, text=True, **pipes)
    shown = ""
    while not shown.endswith("you: "):
        shown += process.stdout.read(1) or pytest.fail(process.stderr.read())
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in error


def test_the_next_command_can_be_copied(capsys):
    """Into a shell, and with a folder of any name; free text is continued as it was learnt."""
    write("own.jsonl", [{"prompt": "ab" * i, "completion": " cd"} for i in range(1, 21)])
    budget = ["--search_steps=1", "--retrain_steps=1", "--out_dir=my run's"]
    assert train.main(["--model=tiny-random", "--train_file=own.jsonl", *budget]) == 0
    copied = capsys.readouterr().out.partition("\nnext:\n")[2].splitlines()[0]
    python, program, *arguments = shlex.split(copied)
    assert (python, program) == ("python", "sample.py")
    assert arguments == ["--adapter=my run's", "--prompt=...", "--raw"]
    assert sample.main(arguments) == 0


def test_files_of_several_kinds_are_named(refuses):
    write("label.jsonl", [{"text": f"a {i}", "label": "yes"} for i in range(20)])
    write("score.jsonl", [{"text": f"a {i}", "score": 1.0} for i in range(20)])
    write("pairs.jsonl", [{"text": "a", "text_b": "b", "label": "yes"}])
    given = ["--model=tiny-random", "--train_file=label.jsonl"]
    said = "train is classification, val is classification, test is regression"
    refuses(train, [*given, "--test_file=score.jsonl"], said)
    said = "text_b, for pairs, is only in the examples of test"
    refuses(train, [*given, "--test_file=pairs.jsonl"], said)


def test_an_encoder_without_an_adapter_is_refused_before_it_is_downloaded(refuses, monkeypatch):
    monkeypatch.setenv("BIDORA_CACHE", "cache")
    refuses(sample, ["--model=minilm", "--prompt=a"], "minilm is an encoder, which writes nothing")
    assert not Path("cache").exists()


def test_curves_of_several_runs_are_drawn_and_a_run_that_is_missing_is_named(refuses):
    for name, key in (("a", "train_loss"), ("b", "held_loss")):
        write(files.make_folder(name) / "metrics.jsonl", [{"step": i, key: 1} for i in (1, 2)])
    assert curves.main(["a", "b"]) == 0
    assert Path("out/curves.png").read_bytes().startswith(b"\x89PNG")
    refuses(curves, ["a", "nowhere"], "nowhere is no run's folder: it lacks metrics.jsonl")


def test_a_question_is_refused_where_nothing_is_asked(refuses):
    write("free.jsonl", [{"text": f"a {i}"} for i in range(20)])
    given = ["--train_file=free.jsonl", "--label_prompt={text}?"]
    said = "label_prompt is for task=label_words, not task=language_model"
    refuses(train, ["--model=tiny-random", *given], said)
