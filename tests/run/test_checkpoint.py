"""
A run that is killed, stopped, out of disk or damaged goes on as if nothing had been; or says in one
line why not.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from support.run import checkpoint, run_folder
from support.run.files import replacing, seal, write_json
from support.weights.pretrained import find_model
from train import Config

ROOT = Path(train.__file__).parent
STRESS = int(os.environ.get("BIDORA_STRESS", 1))  # how many times as many kills and mutations
TINY = dict(
    model="tiny-random",
    data="toy-sentiment",
    dtype="float32",
    search_steps=8,
    retrain_steps=6,
    test_size=20,
    eval_size=20,
    checkpoint_every=2,
    snapshots=2,
)
# What is hardest to restore: random masks, kept lower steps, several upper steps, 8-bit moments,
# whole models.
RUNS = {
    "bidora": dict(
        method="bidora", dropout=0.1, upper_every=2, hypergradient_steps=2, precondition="adam"
    ),
    "bilora": dict(method="bilora", upper_steps=2, hypergradient="neumann"),
    "dora": dict(method="dora", dropout=0.1, micro_batch_size=2),
    "lora": dict(method="lora", optimizer="adamw8bit"),
    "ft": dict(method="ft"),
}
KILLED = """
import os, random, signal, sys, threading
sys.path.insert(0, {root!r})
import data, train
events, target, delay = 0, int(sys.argv[1]), float(sys.argv[2])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(function):
    def wrapper(*arguments, **options):
        global events
        events += 1
        if events == target:
            die() if delay == 0 else threading.Timer(delay, die).start()
        return function(*arguments, **options)
    return wrapper

# Each write's last act, and each batch.
os.replace, data.micro_batches = counted(os.replace), counted(data.micro_batches)
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))


def lines(folder):
    """metrics.jsonl without the times."""
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
    ]


def assert_same_run(one, other):
    weights = next(
        name
        for name in ("adapter_model.safetensors", "model.safetensors")
        if (Path(one) / name).exists()
    )
    assert (Path(one) / weights).read_bytes() == (Path(other) / weights).read_bytes()
    assert (Path(one) / "trajectory.safetensors").read_bytes() == (
        Path(other) / "trajectory.safetensors"
    ).read_bytes()
    assert lines(one) == lines(other)
    after = [json.loads((Path(folder) / "summary.json").read_text()) for folder in (one, other)]
    assert after[0]["after"] == after[1]["after"] and after[0]["before"] == after[1]["before"]
    assert not (Path(other) / "checkpoints").exists() and not list(Path(other).glob("*.tmp"))


@pytest.mark.parametrize("again", range(STRESS))
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(name, again):
    settings = TINY | RUNS[name]
    train.train(Config(out_dir="whole", **settings))
    arguments = [f"--{key}={value}" for key, value in settings.items()] + [
        "--out_dir=killed",
        "--resume=True",
    ]
    rng, kills = random.Random(f"{name} {again}" if again else name), 0
    while kills < 4:
        target, delay = (
            rng.randint(1, 14),
            rng.choice((0, 0, rng.random() * 0.05)),
        )  # at a write's last act, or anywhere
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                KILLED.format(root=str(ROOT)),
                str(target),
                str(delay),
                *arguments,
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, (target, delay, done.stdout, done.stderr)
        kills += 1
    assert train.main(arguments) == 0
    assert_same_run("whole", "killed")


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_step_save_and_say_how_to_go_on(signum, code):
    arguments = [
        "--config=tiny.py",
        "--snapshots=2",
        "--search_steps=200",
        "--retrain_steps=10",
        "--upper_every=4",
        "--eval_size=20",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = Path("out/tiny/metrics.jsonl")
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    message = error.strip().splitlines()[-1]
    assert message.startswith("stopped at search step ") and message.endswith(
        f"resume it with: python train.py {' '.join(arguments)} --resume=True"
    )
    done = len(lines("out/tiny"))
    assert done < 200 and [path.name for path in checkpoint.names("out/tiny")][-1] == f"{done:06d}"
    assert train.main([*arguments, "--resume=True"]) == 0
    assert train.main([*arguments, "--out_dir=whole"]) == 0
    assert_same_run("whole", "out/tiny")


def test_a_second_interrupt_leaves_at_once():
    with checkpoint.stop_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert signals == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def stopped_run(folder, monkeypatch, after=3, **settings):
    """
    A run in `folder` that ran out of disk at its checkpoint number `after`; returns its error.
    """
    calls = 0

    def save_file(tensors, path):
        nonlocal calls
        calls += 1
        if calls >= after:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(tensors, path)

    write = checkpoint.save_file
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", save_file)
        with pytest.raises(OSError) as caught:
            train.train(Config(out_dir=folder, **TINY, **settings))
    return str(caught.value)


@pytest.mark.parametrize("method", ["bidora", "ft"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on_elsewhere(
    method, monkeypatch
):
    settings = TINY | dict(method=method)
    message = stopped_run("full", monkeypatch, method=method)
    assert (
        "full/checkpoints/000006" in message
        and "No space left on device" in message
        and "--resume=True" in message
        and "--out_dir" in message
    )
    assert sorted(path.name for path in Path("full/checkpoints").iterdir()) == ["000002", "000004"]
    shutil.copytree("full", "elsewhere")
    train.train(Config(out_dir="elsewhere", resume=True, **settings))
    train.train(Config(out_dir="whole", **settings))
    assert_same_run("whole", "elsewhere")
    assert not (Path("full") / "summary.json").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(monkeypatch, capsys):
    stopped_run("run", monkeypatch)
    newest = checkpoint.names("run")[-1] / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-10] ^= 1  # one bit
    newest.write_bytes(content)
    train.train(Config(out_dir="run", resume=True, **TINY))
    out = capsys.readouterr().out
    assert "checkpoint run/checkpoints/000004 is damaged" in out and "after step 2" in out
    train.train(Config(out_dir="whole", **TINY))
    assert_same_run("whole", "run")


def test_a_run_without_any_checkpoint_starts_again(monkeypatch, capsys):
    stopped_run("run", monkeypatch, after=1)
    train.train(Config(out_dir="run", resume=True, **TINY))
    assert "run has no checkpoint yet" in capsys.readouterr().out
    train.train(Config(out_dir="new", resume=True, **TINY))
    assert "new holds no run to resume: starting one" in capsys.readouterr().out
    assert_same_run("run", "new")


def test_changed_settings_and_data_are_refused_and_harmless_ones_named(monkeypatch, capsys):
    stopped_run("run", monkeypatch)
    with pytest.raises(ValueError, match=r"rank=4 \(it was 8\), lower_lr=0.5 \(it was 0.0\)"):
        train.train(Config(out_dir="run", resume=True, rank=4, lower_lr=0.5, **TINY))
    with pytest.raises(
        ValueError, match="earlier run: choose another --out_dir, resume it with --resume=True"
    ):
        train.train(Config(out_dir="run", **TINY))
    state = checkpoint.names("run")[-1] / "state.json"
    sealed = state.read_text()
    about = {n: value for n, value in json.loads(sealed).items() if n != "sha256"}
    state.write_text(json.dumps(seal(about | {"fingerprint": "other"})))
    with pytest.raises(ValueError, match="its data or its tokenizer has changed"):
        train.train(Config(out_dir="run", resume=True, **TINY))
    state.write_text(sealed)
    metrics = Path("run/metrics.jsonl").read_text()
    Path("run/metrics.jsonl").write_text(metrics.split("\n", 1)[1])
    with pytest.raises(ValueError, match="lacks lines"):
        train.train(Config(out_dir="run", resume=True, **TINY))
    Path("run/metrics.jsonl").write_text(metrics)
    train.train(Config(out_dir="run", resume=True, **TINY | dict(checkpoint_every=7)))
    assert "changed since the run began: checkpoint_every=7 (it was 2)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="run holds a finished run: there is nothing to resume"):
        train.train(Config(out_dir="run", resume=True, **TINY))


def test_what_an_earlier_run_left_goes_when_the_newer_one_has_ended_however_it_went_on(monkeypatch):
    train.train(Config(out_dir="run", **TINY))
    stopped_run("run", monkeypatch, overwrite=True)  # killed: the earlier run is still beside
    assert (Path("run.previous") / "summary.json").exists()
    train.train(Config(out_dir="run", resume=True, **TINY | dict(overwrite=True)))
    assert not Path("run.previous").exists()
    stopped_run("run", monkeypatch, overwrite=True)
    (Path("run") / "notes.txt").write_text("mine")
    # Over one that never finished: its files go, mine stay.
    train.train(Config(out_dir="run", overwrite=True, **TINY))
    assert (
        (Path("run") / "notes.txt").exists()
        and (Path("run") / "summary.json").exists()
        and not Path("run.previous").exists()
    )
    Path("run.previous").mkdir()  # somebody's own
    with pytest.raises(ValueError, match="run.previous is in the way"):
        train.train(Config(out_dir="run", overwrite=True, **TINY))


@pytest.mark.parametrize(
    "path, change, said",
    [
        ("run.json", lambda text: text.replace('"lower_lr": 0.001', '"lower_lr": 0.5'), "edited"),
        (
            "run.json",
            lambda text: text.replace('"retrain_steps": ', '"retrain_steps": 9'),
            "edited",
        ),
        ("metrics.jsonl", lambda text: text.replace('"phase": "', '"phase": "x', 1), "was edited"),
    ],
)
def test_a_run_whose_files_were_edited_is_not_resumed(path, change, said, monkeypatch):
    stopped_run("run", monkeypatch)
    file = Path("run") / path
    assert change(file.read_text()) != file.read_text()
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=said):
        train.train(Config(out_dir="run", resume=True, **TINY))


@pytest.mark.parametrize("key", ["random", "n", "done", "log"])
def test_a_checkpoint_whose_state_was_edited_gives_way_to_the_one_before(key, monkeypatch, capsys):
    """The resumed run ends like one that was never stopped, bit for bit."""
    train.train(Config(out_dir="whole", **TINY))
    stopped_run("run", monkeypatch)
    states = [folder / "state.json" for folder in checkpoint.names("run")]
    about = json.loads(states[-1].read_text())
    del about[key]
    states[-1].write_text(json.dumps(about))
    train.train(Config(out_dir="run", resume=True, **TINY))
    said = capsys.readouterr().out
    assert "edited, damaged, or written by another version" in said
    weights = [Path(f"{run}/adapter_model.safetensors").read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("part", ["config.json", "the weights", "the tokenizer"])
def test_a_run_whose_base_has_changed_is_not_resumed(part, monkeypatch):
    base = Path(shutil.copytree(find_model("tiny-random"), "base"))
    monkeypatch.setitem(TINY, "model", "base")
    stopped_run("run", monkeypatch)
    if part == "the weights":
        tensors = load_file(base / "model.safetensors")
        tensors["model.embed_tokens.weight"] *= 1.5
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    else:
        path = base / {"config.json": "config.json", "the tokenizer": "tokenizer.json"}[part]
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"rope_theta": 12345.0, "version": "1.1"}))
    with pytest.raises(ValueError, match=f"can't be resumed: {part} of base changed since"):
        train.train(Config(out_dir="run", resume=True, **TINY))


@pytest.mark.parametrize("method", ["bidora", "ft"])
def test_overwriting_removes_what_the_run_wrote_and_nothing_else(method):
    settings = TINY | dict(method=method)
    train.train(Config(out_dir="run", **settings))
    mine = ["draft.tmp", "checkpoints/mine.txt", "vocab.json", "merges.txt", "notes/a.txt"]
    for name in mine:
        path = Path("run") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    train.train(Config(out_dir="run", overwrite=True, **settings))
    left = [name for name in mine if (Path("run.previous") / name).exists()]
    assert left == mine
    others = {str(p.relative_to("run.previous")) for p in Path("run.previous").rglob("*")}
    assert others - {*mine, "checkpoints", "notes"} == set()


def mutated(content, rng):
    """Bytes with one change: some overwritten, inserted or deleted, or all cut off from there."""
    at, size = rng.randrange(len(content)), rng.choice((1, 1, 4, 50))
    kind = rng.choice(("overwrite", "insert", "delete", "cut"))
    new = rng.randbytes(size) if rng.random() < 0.5 else rng.choice((b"0", b"1", b"9", b'"', b"}"))
    rest = content[at + len(new) :] if kind == "overwrite" else content[at + size :]
    if kind == "insert":
        rest = content[at:]
    return (
        content[:at]
        + (b"" if kind in ("delete", "cut") else new)
        + (b"" if kind == "cut" else rest)
    )


def test_mutated_files_of_a_run_change_nothing_or_are_refused(monkeypatch, capsys):
    """
    Any file of a stopped run: resumed, it ends bit for bit as one that never stopped, or is
    refused.
    """
    train.train(Config(out_dir="whole", **TINY))
    expected = Path("whole/adapter_model.safetensors").read_bytes()
    stopped_run("run", monkeypatch, after=4)
    files = sorted(str(p.relative_to("run")) for p in Path("run").rglob("*") if p.is_file())
    rng, resumed, refused = random.Random(0), 0, 0
    for i in range(30 * STRESS):
        shutil.copytree("run", "mutated")
        path = Path("mutated") / files[i % len(files)]
        path.write_bytes(mutated(path.read_bytes(), rng))
        try:
            train.train(Config(out_dir="mutated", resume=True, **TINY))
            assert Path("mutated/adapter_model.safetensors").read_bytes() == expected, path
            resumed += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            refused += 1
        shutil.rmtree("mutated")
    with capsys.disabled():
        print(f" {resumed} resumed, {refused} refused", end="")
    assert resumed and refused


# ---------------------------------------------------------------------------------- locks


HOLD = """
import os, sys, time
from support.run import run_folder
folder, marks, turns = sys.argv[1], sys.argv[2], int(sys.argv[3])
held = 0
for _ in range(turns):
    try:
        with run_folder.locked(folder):
            mark = os.open(marks, os.O_CREAT | os.O_EXCL)  # fails if another one holds the lock
            os.close(mark)
            os.unlink(marks)
            held += 1
    except ValueError:
        pass
print(held)
"""


def test_two_processes_never_hold_the_same_folder():
    """Each of three takes and gives back the lock thousands of times; the folder comes and goes."""
    command = [sys.executable, "-c", HOLD, "run", "mark", "4000"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ROOT})
        for _ in range(3)
    ]
    held = [int(process.communicate()[0] or -1) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert all(count > 100 for count in held)


def test_a_refused_second_start_leaves_the_first_one_alone():
    """Also while the first has written nothing yet."""
    with run_folder.locked("run"):
        with pytest.raises(ValueError, match="in use by another run"):
            with run_folder.locked("run"):
                pass
        assert Path("run").exists()
    assert not Path("run").exists()


# ---------------------------------------------------------------------------------- writes


def test_a_planted_link_is_not_followed_and_leftovers_go():
    Path("precious").write_text("mine")
    os.symlink("precious", "x.json.tmp")
    write_json("x.json", {"a": 1})
    assert Path("precious").read_text() == "mine" and json.loads(Path("x.json").read_text())
    Path("y.json.tmp").mkdir()
    (Path("y.json.tmp") / ".tmp123").write_text("left by a killed write")
    write_json("y.json", {"a": 1})
    assert sorted(p.name for p in Path(".").iterdir()) == ["precious", "x.json", "y.json"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_written_weights_have_the_permissions_that_others_files_have(mask, mode):
    before = os.umask(mask)
    try:
        with replacing("w.safetensors") as temporary:
            save_file({"a": torch.ones(3)}, temporary)
    finally:
        os.umask(before)
    assert os.stat("w.safetensors").st_mode & 0o777 == mode


def test_a_copy_of_a_run_stands_alone(monkeypatch):
    """Stopped again after it was copied, and without the run that it was copied from."""
    stopped_run("old", monkeypatch)
    shutil.move("old", "new")
    calls, scale = [], train.learning_rate_scale

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scale(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "learning_rate_scale", interrupted)
        train.train(Config(out_dir="new", resume=True, **TINY | dict(checkpoint_every=50)))
    train.train(Config(out_dir="new", resume=True, **TINY))
    train.train(Config(out_dir="whole", **TINY))
    assert_same_run("whole", "new")
    assert json.loads(Path("new/summary.json").read_text())["seconds"]["total"] > 0


def test_the_checkpoint_just_written_stays_and_stale_later_ones_go():
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save(Path("."), step, {}, {})
    assert [path.name for path in checkpoint.names(".")] == ["999999", "1000000"]
    checkpoint.save(Path("."), 10, {}, {})  # a run that started again, since these were damaged
    assert [path.name for path in checkpoint.names(".")] == ["000010"]


def test_two_runs_in_one_folder_at_once_are_refused():
    with run_folder.locked("run"), pytest.raises(ValueError, match="run is in use by another run"):
        train.train(Config(out_dir="run", **TINY))
    assert not Path("run").exists()
    train.train(Config(out_dir="run", **TINY))


def test_a_folder_that_vanishes_gets_one_line(monkeypatch):
    scale = train.learning_rate_scale

    def remove(step, *arguments):
        if step == 3:
            shutil.rmtree("run")
        return scale(step, *arguments)

    monkeypatch.setattr(train, "learning_rate_scale", remove)
    with pytest.raises(OSError, match="could not write the checkpoint run/checkpoints/000004"):
        train.train(Config(out_dir="run", **TINY))
    assert not Path("run").exists()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_three_thousand_steps_take_no_more_memory_or_files_than_five_hundred(monkeypatch):
    seen, scale = [], train.learning_rate_scale

    def measure(*arguments):
        seen.append(
            (int(Path("/proc/self/statm").read_text().split()[1]), len(os.listdir("/proc/self/fd")))
        )
        return scale(*arguments)

    monkeypatch.setattr(train, "learning_rate_scale", measure)
    budget = dict(search_steps=1500, retrain_steps=1500, checkpoint_every=250)
    train.train(Config(out_dir="run", **TINY | budget | dict(target_modules=("down_proj",))))
    assert len(seen) == 3000
    pages = [memory for memory, _ in seen]
    assert (
        max(pages[2800:]) < 1.01 * max(pages[450:550])
        and len({files for _, files in seen[500:1400] + seen[2000:]}) == 1
    )
