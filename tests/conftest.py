import os
import sys
from pathlib import Path

# The models here are tiny: one thread is as fast as many, and stays so on a busy machine, where
# many threads wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
# Test files take each other's models and data by name, from every room.
sys.path.extend(map(str, (Path(__file__).parents[1], *Path(__file__).parent.glob("**/"))))

import pytest
import torch


@pytest.fixture
def model_cache(monkeypatch, request):
    """One cache of models and data for the whole session."""
    monkeypatch.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, model_cache):
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refuses(capsys):
    """A function: a program ends with exit code 2 and one line of an error, which says this."""

    def refuses(program, arguments, said):
        capsys.readouterr()
        assert program.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("error: ") == 1 and "Traceback" not in error

    return refuses


@pytest.fixture
def file_limit():
    """No file may grow beyond 10,000 bytes: that stands in for a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
