"""A run that is killed, stopped or damaged goes on as if nothing had been, or says why not."""

import gc
import itertools
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
from support.run import checkpoint, interrupt, run_folder
from support.run.files import replacing, seal, write_json
from support.weights.pretrained import find_model
from train import Config

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(train.__file__).parent
STRESS = int(os.environ.get("BIDORA_STRESS", 1))  # how many times as many kills and mutations
TINY = dict(model="tiny-random", data="toy-sentiment", dtype="float32", checkpoint_every=2)
TINY |= dict(search_steps=8, retrain_steps=6, test_size=20, eval_size=20, snapshots=2)
LORA = dict(method="lora", target_modules=("q_proj",))  # where any run will do
HELD = dict(held_fraction=0.2, eval_every=2, keep="best", patience=2)
# What is hardest to restore: random masks, kept lower steps, several upper steps, 8-bit moments,
# whole models, the weights of the lowest held-out loss.
RUNS = {
    "bidora": dict(dropout=0.1, upper_every=2, hypergradient_steps=2, precondition="adam"),
    "bilora": dict(method="bilora", upper_steps=2, hypergradient="neumann", **HELD),
    "dora": dict(method="dora", dropout=0.1, micro_batch_size=2, **HELD, lower_lr=0.3),
    "lora": dict(method="lora", optimizer="adamw8bit"),
    "ft": dict(method="ft"),
}
KILLED = """
import os, random, signal, sys, threading
sys.path.insert(0, {root!r})
import data, train
if "--optimizer=adamw8bit" in sys.argv:
    import bitsandbytes.optim  # once, not in each process
events = 0

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

for target, delay in {kills}:
    if os.fork() == 0:
        # Each write's last act, and each batch.
        os.replace, data.micro_batches = counted(os.replace), counted(data.micro_batches)
        os._exit(train.main(sys.argv[1:]))
    assert os.wait()[1] == signal.SIGKILL, (target, delay)
"""


@pytest.fixture(scope="module", autouse=True)
def models(request):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of TINY that was never stopped."""
    return run(tmp_path_factory.mktemp("runs") / "whole")


def run(folder, **settings):
    train.train(Config(out_dir=str(folder), **TINY | settings))
    return folder


def refused(said, **settings):
    """The run in the folder "run" is refused with this message."""
    with pytest.raises(ValueError, match=said):
        run("run", **settings)


def before_each_step(patched, action):
    scale = train.learning_rate_scale

    def wrapped(step, *arguments):
        action(step)
        return scale(step, *arguments)

    patched.setattr(train, "learning_rate_scale", wrapped)


def lines(folder):
    """metrics.jsonl without the times."""
    text = (Path(folder) / "metrics.jsonl").read_text()
    return [json.loads(line) | {"seconds": None} for line in text.splitlines()]


def assert_same_run(one, other):
    folders = Path(one), Path(other)
    names = ("adapter_model.safetensors", "model.safetensors", "trajectory.safetensors")
    written = [name for name in names if (folders[0] / name).exists()]
    assert len(written) == 2
    for name in written:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert lines(one) == lines(other)
    results = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert all(results[0][when] == results[1][when] for when in ("before", "after"))
    assert not (Path(other) / "checkpoints").exists() and not list(Path(other).glob("*.tmp"))


@pytest.mark.parametrize("again", range(STRESS))
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(name, again):
    settings = TINY | RUNS[name]
    run("whole", **settings)
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    arguments += ["--out_dir=killed", "--resume=True"]
    rng = random.Random(f"{name} {again}" if again else name)
    # At a write's last act, or anywhere.
    kills = [(rng.randint(1, 14), rng.choice((0, 0, rng.random() * 0.05))) for _ in range(4)]
    command = [sys.executable, "-c", KILLED.format(root=str(ROOT), kills=kills), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert train.main(arguments) == 0
    assert_same_run("whole", "killed")


LONG = "--config=tiny.py --snapshots=2 --search_steps=100 --retrain_steps=10 --upper_every=4"
LONG = [*LONG.split(), "--eval_size=20"]


@pytest.fixture(scope="module")
def long_whole(tmp_path_factory):
    """The folder of a run of LONG that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "long"
    assert train.main([*LONG, f"--out_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_step_save_and_say_how_to_go_on(signum, code, long_whole):
    command = [sys.executable, str(ROOT / "train.py"), *LONG]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **pipes)
    metrics = Path("out/tiny/metrics.jsonl")
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    message = error.strip().splitlines()[-1]
    again = f"resume it with: python train.py {' '.join(LONG)} --resume=True"
    assert message.startswith("stopped at search step ") and message.endswith(again)
    done = len(lines("out/tiny"))
    assert done < 100 and checkpoint.steps("out/tiny")[-1] == done
    state = load_file(checkpoint.place("out/tiny", done))
    for name, tensor in load_file("out/tiny/adapter_model.safetensors").items():
        own = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(state[f"parameter.{own}"], tensor)
    assert train.main([*LONG, "--resume=True"]) == 0
    assert_same_run(long_whole, "out/tiny")


def test_a_second_interrupt_leaves_at_once():
    with interrupt.stop_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert signals == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def stopped_run(folder, monkeypatch, after=3, **settings):
    """Run until the disk is full, at checkpoint number `after`; returns the error's message."""
    calls, write = itertools.count(1), checkpoint.save_file

    def save_file(tensors, path):
        if next(calls) >= after:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path)

    with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
        patched.setattr(checkpoint, "save_file", save_file)
        run(folder, **settings)
    return str(caught.value)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("runs"))
        stopped_run("run", patched)
        return Path.cwd() / "run"


@pytest.fixture
def stopped(stopped_once, elsewhere):
    """In the folder "run", a stopped run with checkpoints of steps 2 and 4."""
    shutil.copytree(stopped_once, "run")


@pytest.mark.parametrize("method", ["bidora", "ft"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on(method, monkeypatch):
    message = stopped_run("full", monkeypatch, method=method)
    said = "full/checkpoints/000006.safetensors (No space left on device): free some disk space"
    assert said in message and "then add --resume=True (--out_dir" in message
    names = [f"00000{step}.{ending}" for step in (2, 4) for ending in ("json", "safetensors")]
    assert sorted(path.name for path in Path("full/checkpoints").iterdir()) == names
    shutil.copytree("full", "elsewhere")
    run("elsewhere", resume=True, method=method)
    assert_same_run(run("whole", method=method), "elsewhere")
    assert not (Path("full") / "summary.json").exists()


@pytest.mark.parametrize("part", ["a bit of the tensors", "random", "n", "done", "log"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(part, whole, stopped, capsys):
    tensors = checkpoint.place("run", 4)
    if part == "a bit of the tensors":
        content = bytearray(tensors.read_bytes())
        content[-10] ^= 1
        tensors.write_bytes(content)
    else:
        state = json.loads(tensors.with_suffix(".json").read_text())
        del state[part]
        tensors.with_suffix(".json").write_text(json.dumps(state))
    run("run", resume=True)
    out = capsys.readouterr().out
    assert "run/checkpoints/000004.safetensors is damaged" in out and "after step 2" in out
    reason = "has changed" if " " in part else "edited, damaged, or written by another version"
    assert reason in out
    assert_same_run(whole, "run")


def test_a_run_without_any_checkpoint_starts_again(monkeypatch, capsys):
    stopped_run("run", monkeypatch, after=1, **LORA)
    run("run", resume=True, **LORA)
    assert "run has no checkpoint yet" in capsys.readouterr().out
    run("new", resume=True, **LORA)
    assert "new holds no run to resume: starting one" in capsys.readouterr().out
    assert_same_run("run", "new")


def test_changed_settings_are_refused_and_harmless_ones_named(stopped, capsys):
    refused(r"rank=4 \(it was 8\), lower_lr=0.5 \(it was 0.0\)", resume=True, rank=4, lower_lr=0.5)
    refused("earlier run: choose another --out_dir, resume it with --resume=True")

    run("run", resume=True, checkpoint_every=7)
    assert "changed since the run began: checkpoint_every=7 (it was 2)" in capsys.readouterr().out
    refused("run holds a finished run: there is nothing to resume", resume=True)


def test_what_an_earlier_run_left_goes_when_the_newer_one_has_ended_however_it_went_on(monkeypatch):
    run("run", **LORA)
    stopped_run("run", monkeypatch, overwrite=True, **LORA)
    # Killed: the earlier run is still beside.
    assert Path("run.previous/summary.json").exists()
    run("run", resume=True, overwrite=True, **LORA)
    assert not Path("run.previous").exists()
    stopped_run("run", monkeypatch, overwrite=True, **LORA)
    Path("run/notes.txt").write_text("mine")
    # Over one that never finished: its files go, mine stay.
    run("run", overwrite=True, **LORA)
    assert Path("run/notes.txt").exists() and Path("run/summary.json").exists()
    assert not Path("run.previous").exists()
    Path("run.previous").mkdir()  # somebody's own
    refused("run.previous is in the way", overwrite=True)


@pytest.mark.parametrize(
    "path, old, new, said",
    [
        ("run.json", '"lower_lr": 0.001', '"lower_lr": 0.5', "was edited"),
        ("run.json", '"retrain_steps": ', '"retrain_steps": 9', "was edited"),
        ("metrics.jsonl", '"phase": "', '"phase": "x', "lacks lines .*, or was edited"),
        ("metrics.jsonl", "\n", "", "lacks lines .*, or was edited"),
    ],
)
def test_a_run_whose_files_were_edited_is_not_resumed(path, old, new, said, stopped):
    text = Path("run", path).read_text()
    assert old in text
    Path("run", path).write_text(text.replace(old, new, 1))
    refused(said, resume=True)


@pytest.mark.parametrize("part", ["config.json", "the weights", "the tokenizer", "the data"])
def test_a_run_whose_base_or_data_have_changed_is_not_resumed(part, monkeypatch):
    base = Path(shutil.copytree(find_model("tiny-random"), "base"))
    rows = [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(20)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, value in dict(model="base", data="", train_file="rows.jsonl", test_size=0).items():
        monkeypatch.setitem(TINY, name, value)
    stopped_run("run", monkeypatch)
    if part == "the data":
        Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("7", "8"))
    elif part == "the weights":
        tensors = load_file(base / "model.safetensors")
        tensors["model.embed_tokens.weight"] *= 1.5
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    else:
        path = base / {"config.json": "config.json", "the tokenizer": "tokenizer.json"}[part]
        content = json.loads(path.read_text())
        other = {"rope_theta": 12345.0} if part == "config.json" else {"truncation": None}
        path.write_text(json.dumps(content | other, indent=3))
    refused(f"can't be resumed: {part} changed since the run began, on base", resume=True)


@pytest.mark.parametrize("method", ["lora", "ft"])
def test_overwriting_removes_what_the_run_wrote_and_nothing_else(method):
    run("run", method=method)
    mine = {"draft.tmp", "checkpoints/mine.txt", "vocab.json", "merges.txt", "notes/a.txt"}
    for name in mine:
        path = Path("run") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    run("run", overwrite=True, method=method)
    left = {str(path.relative_to("run.previous")) for path in Path("run.previous").rglob("*")}
    assert left == mine | {"checkpoints", "notes"}


def test_a_run_that_names_other_folders_as_its_files_takes_none_of_them_along():
    Path("run").mkdir()
    for path in ("precious.txt", "run/mine.txt", "run/loss.png"):
        Path(path).write_text("mine")
    write_json("run/run.json", seal({"files": ["..", "", ".", "../precious.txt", "./mine.txt"]}))
    run_folder.remove_run(Path("run"))
    assert sorted(map(str, Path(".").rglob("*"))) == ["precious.txt", "run", "run/mine.txt"]


def mutated(content, rng):
    """Bytes with one change: some overwritten, inserted or deleted, or all cut off from there."""
    at, size = rng.randrange(len(content)), rng.choice((1, 1, 4, 50))
    change = rng.choice(("overwrite", "insert", "delete", "cut"))
    new = rng.randbytes(size) if rng.random() < 0.5 else rng.choice((b"0", b"1", b"9", b'"', b"}"))
    changed = dict(overwrite=new + content[at + len(new) :], insert=new + content[at:])
    changed |= dict(delete=content[at + size :], cut=b"")
    return content[:at] + changed[change]


def test_mutated_files_of_a_run_change_nothing_or_are_refused(monkeypatch, capsys):
    """Resumed, the run ends bit for bit as one that never stopped, or is refused."""
    expected = (run(Path("whole"), **LORA) / "adapter_model.safetensors").read_bytes()
    stopped_run("run", monkeypatch, after=4, **LORA)
    files = sorted(str(p.relative_to("run")) for p in Path("run").rglob("*") if p.is_file())
    rng, resumed, refusals = random.Random(0), 0, 0
    for i in range(30 * STRESS):
        shutil.copytree("run", "mutated")
        path = Path("mutated") / files[i % len(files)]
        path.write_bytes(mutated(path.read_bytes(), rng))
        try:
            run("mutated", resume=True, **LORA)
            assert Path("mutated/adapter_model.safetensors").read_bytes() == expected, path
            resumed += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            refusals += 1
        shutil.rmtree("mutated")
    with capsys.disabled():
        print(f" {resumed} resumed, {refusals} refused", end="")
    assert resumed and refusals


HOLD = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from support.run import run_folder
for _ in range(3):
    if os.fork() == 0:
        break
else:
    sys.exit(any([os.wait()[1] for _ in range(3)]))

held = 0
for _ in range(4000):
    try:
        with run_folder.locked("run"):
            os.close(os.open("mark", os.O_CREAT | os.O_EXCL))  # fails if another one has the lock
            os.unlink("mark")
            held += 1
    except ValueError:
        pass
assert held > 100
"""


def test_two_processes_never_hold_the_same_folder():
    """Each of three takes and gives back the lock thousands of times; the folder comes and goes."""
    subprocess.run([sys.executable, "-c", HOLD], check=True)


def test_two_runs_in_one_folder_at_once_are_refused():
    """Also while the first has written nothing yet; the second leaves its folder alone."""
    with run_folder.locked("run"):
        refused("run is in use by another run")
        assert Path("run").exists()
    assert not Path("run").exists()
    run("run", **LORA)


def test_a_disk_that_fills_while_the_log_grows_gets_one_line_with_its_path(file_limit):
    with pytest.raises(OSError, match=r"could not write run/metrics.jsonl \(File too large\)"):
        run("run", **LORA, rank=1, snapshots=0, search_steps=200, checkpoint_every=1000)


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
def test_written_weights_have_the_permissions_that_others_files_have(mask, mode, monkeypatch):
    """Without a change of the process's umask: meanwhile, other threads' files would be open."""
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", None)
            with replacing("w.safetensors") as temporary:
                save_file({"a": torch.ones(3)}, temporary)
    finally:
        os.umask(before)
    assert os.stat("w.safetensors").st_mode & 0o777 == mode


@pytest.mark.parametrize(
    "method, fails_at, good",
    [("lora", 6, 4), *(("ft", *steps) for steps in ((7, 4), (6, 4), (5, 2), (2, 0)))],
)
def test_a_run_that_fails_leaves_the_last_weights_whose_loss_was_finite(method, fails_at, good):
    """A checkpoint comes after every second step; its loss is known at the next one."""
    seen = []  # the weights before each step

    class Fails(train.Task):
        def lower_loss(self, model, micro_batch):
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            seen.append({name: p.detach().clone() for name, p in trained.items()})
            loss = super().lower_loss(model, micro_batch)
            return loss * torch.inf if len(seen) == fails_at else loss

    kept = "step" if method == "lora" else "checkpoint"
    said = f"step {fails_at} of 14 .* last good {kept} are in run"
    with pytest.raises(FloatingPointError, match=said):
        train.train(Config(out_dir="run", method=method, **TINY), Fails)
    saved = load_file(next(Path("run").glob("*model.safetensors")))
    for name, value in seen[good].items():
        assert torch.equal(saved.get(name, saved.get(f"base_model.model.{name}.weight")), value)


def test_full_fine_tuning_holds_no_copy_of_the_model():
    """After the first step, AdamW's two moments of each matrix have been added, and no copy."""
    counts = []

    class Counting(train.Task):
        def lower_loss(self, model, micro_batch):
            shape = model.lm_head.weight.shape  # the embeddings', too
            tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
            counts.append(len({x.data_ptr() for x in tensors if x.shape == shape}))
            return super().lower_loss(model, micro_batch)

    gc.collect()
    train.train(Config(out_dir="run", method="ft", **TINY | {"snapshots": 0}), Counting)
    assert [count - counts[0] for count in counts] == [0] + [2 * 2] * 13


def test_a_copy_of_a_run_stands_alone(whole, stopped, monkeypatch):
    """Stopped again after it was copied, and without the run that it was copied from."""
    shutil.move("run", "new")
    steps = []

    def interrupt_the_second(step):
        steps.append(step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        before_each_step(patched, interrupt_the_second)
        run("new", resume=True, checkpoint_every=50)
    run("new", resume=True)
    assert_same_run(whole, "new")
    assert json.loads(Path("new/summary.json").read_text())["seconds"]["total"] > 0


def test_the_checkpoint_just_written_stays_and_stale_later_ones_go():
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save(Path("."), step, {}, {})
    assert checkpoint.steps(".") == [999_999, 1_000_000]
    checkpoint.save(Path("."), 10, {}, {})  # a run that started again, since these were damaged
    assert sorted(os.listdir("checkpoints")) == ["000010.json", "000010.safetensors"]


def test_a_folder_that_vanishes_gets_one_line(monkeypatch):
    before_each_step(monkeypatch, lambda step: step == 3 and shutil.rmtree("run"))
    with pytest.raises(OSError, match="could not write run/checkpoints/000004"):
        run("run")
    assert not Path("run").exists()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_thousand_steps_take_no_more_memory_or_files_than_two_hundred(monkeypatch):
    pages, files = [], []

    def measure(step):
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        files.append(len(os.listdir("/proc/self/fd")))

    before_each_step(monkeypatch, measure)
    budget = dict(search_steps=500, retrain_steps=500, checkpoint_every=100, batch_size=1)
    run("run", **budget, target_modules=("down_proj",))
    assert len(pages) == 1000 and max(pages[900:]) < 1.005 * max(pages[180:220])
    assert len({*files[200:480], *files[700:]}) == 1
