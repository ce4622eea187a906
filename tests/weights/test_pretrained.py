"""Where weights come from: folders, the hub's cache, and a local server in place of the hub."""

import http.server
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from test_train import command as run

from support.weights.pretrained import find_model, is_hub_name, split_revision

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_changed_file_of_a_converted_model_in_the_cache_is_named(monkeypatch):
    monkeypatch.setenv("BIDORA_CACHE", "cache")
    folder = find_model("tiny-random")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    path = find_model("tiny-random") / "model.safetensors"
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged: delete the folder {folder} and run"):
        find_model("tiny-random")


def command(*arguments, **environment):
    """Run Python in a process of its own: huggingface_hub reads its settings once, on import."""
    return run(*arguments, env=os.environ | {"HF_HOME": "hf", **environment})


def found(name, **environment):
    """What find_model returns in a process of its own: (path or None, the error's line)."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from support.weights.pretrained import find_model
try:
    print(find_model({name!r}))
except FileNotFoundError as error:
    print("error", error)
"""
    done = command("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return (None, line) if line.startswith("error") else (Path(line), None)


def cached(name, tag="main"):
    """A model in the layout of the hub's cache."""
    folder = Path("hf/hub") / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / tag).write_text(COMMIT)
    shutil.copytree(find_model("tiny-random"), folder / "snapshots" / COMMIT)
    return folder / "snapshots" / COMMIT


def test_a_hub_name_is_told_from_a_path(tmp_path):
    (tmp_path / "owner" / "folder").mkdir(parents=True)
    assert is_hub_name("Qwen/Qwen2.5-0.5B") and not any(
        map(is_hub_name, ("owner/folder", "./a/b", "/a/b", "~/a", "smollm2-135m", "a/b/c", "../a"))
    )
    missing = "owner/folder contains no model: config.json is missing"
    with pytest.raises(FileNotFoundError, match=missing):
        find_model("owner/folder")


def test_a_revision_follows_the_name_on_the_hub(tmp_path):
    assert split_revision("me/tiny@refs/pr/1") == ("me/tiny", "refs/pr/1")
    assert split_revision("me/tiny") == ("me/tiny", None)
    assert is_hub_name("me/tiny@v1")

    (tmp_path / "owner" / "folder").mkdir(parents=True)
    for name in ("smollm2-135m@v1", "tiny-random@v1", "owner/folder@v1"):
        assert not is_hub_name(name)
        with pytest.raises(ValueError, match="revision=v1 goes with a name on the hub"):
            find_model(name)
    for name in ("/no/such@v1", "owner/name@"):
        assert not is_hub_name(name)
        unknown = f"no model '{name}': give.*owner/name@revision"
        with pytest.raises(FileNotFoundError, match=unknown):
            find_model(name)

    shutil.copytree(find_model("tiny-random"), tmp_path / "owner" / "folder@v1")
    assert not is_hub_name("owner/folder@v1")  # a folder with that path exists
    assert find_model("owner/folder@v1") == Path("owner/folder@v1")


def test_the_hubs_cache_is_used_offline(tmp_path):
    snapshot = cached("me/tiny", "v2")
    offline = {"HF_HUB_OFFLINE": "1"}
    assert found("me/tiny@v2", **offline)[0].resolve() == snapshot.resolve()
    assert "not in the hub's cache, and HF_HUB_OFFLINE is set" in found("me/tiny", **offline)[1]
    assert "at revision 'v3', and HF_HUB_OFFLINE is set" in found("me/tiny@v3", **offline)[1]

    steps = ("--search_steps=2", "--retrain_steps=2")
    train = (str(ROOT / "train.py"), "--config=tiny.py", "--model=me/tiny@v2", "--out_dir=run")
    done = command(*train, *steps, **offline)
    assert done.returncode == 0, done.stderr
    saved = json.loads(Path("run/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "me/tiny" and saved["revision"] == "v2"

    sample = (str(ROOT / "sample.py"), "--adapter=run", "--prompt=aeae lim")
    done = command(*sample, **offline)  # the run remembers the revision
    assert done.returncode == 0 and "%  yes" in done.stdout

    Path("run/run.json").unlink()  # an adapter from elsewhere: it names base and revision itself
    assert command(*sample, "--labels=yes,no", **offline).returncode == 0

    (snapshot / "model.safetensors").unlink()  # an incomplete download
    done = command(*sample, **offline)
    assert done.returncode == 2 and "model.safetensors is missing" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# The files of a repository that are downloaded, and those that are not
FILES = """config.json generation_config.json model-00001-of-00001.safetensors merges.txt vocab.json
    model.safetensors.index.json tokenizer.json tokenizer_config.json chat_template.jinja"""
OTHERS = """pytorch_model.bin consolidated.safetensors onnx/model.safetensors original/params.json
    README.md modeling_evil.py training_args.bin"""
FILES, OTHERS = set(FILES.split()), set(OTHERS.split())
REFUSALS = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound")}
REFUSALS |= {"v9": (404, "RevisionNotFound"), "broken": (500, "")}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: a repository's list of files, the files, and refusals."""

    downloads = []  # paths in the repository

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        for name, (status, code) in REFUSALS.items():
            if name in self.path:
                return self.answer(status, X_Error_Code=code)
        if "/api/models/" in self.path:
            files = sorted(FILES | OTHERS)
            content = {"id": "me/tiny", "sha": COMMIT, "private": False, "disabled": False}
            content |= {"siblings": [{"rfilename": f} for f in files]}
            content |= {"downloads": 0, "likes": 0, "tags": []}
            if "/tree/" in self.path:
                content = [{"type": "file", "path": f, "size": 2, "oid": f} for f in files]
            return self.answer(200, json.dumps(content).encode(), Content_Type="application/json")
        if "/resolve/" not in self.path:
            return self.answer(404)
        Hub.downloads.append(self.path.partition("/resolve/")[2].partition("/")[2])
        self.answer(200, b"{}", X_Repo_Commit=COMMIT, ETag=f'"{Hub.downloads[-1]}"')

    do_HEAD = do_GET


def test_only_safetensors_config_and_tokenizer_files_are_downloaded_and_refusals_are_clear():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    try:
        folder, error = found("me/tiny", **there)
        assert error is None
        assert {path.name for path in folder.iterdir()} == FILES == set(Hub.downloads)

        assert "is gated: accept its terms" in found("me/gated", **there)[1]
        assert "nor a repository of the hub that you may read" in found("me/absent", **there)[1]
        assert "has no revision 'v9'" in found("me/tiny@v9", **there)[1]
        assert "the hub does not answer" in found("me/broken", **there)[1]
    finally:
        server.shutdown()
        server.server_close()

    assert found("me/tiny", **there)[0] == folder  # without the hub, the cache still works
    assert "the hub does not answer" in found("me/other", **there)[1]
    assert "could not be read from the hub" in found("me/other", HF_ENDPOINT="notaurl")[1]
