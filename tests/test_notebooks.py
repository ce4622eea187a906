"""The lessons run from top to bottom, here briefly; the committed outputs are one full run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_the_short_setting(path, monkeypatch, request):
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setenv("BIDORA_CACHE", str(request.config.cache.mkdir("models")))
    NotebookClient(
        nbformat.read(path, 4), timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_one_run_from_top_to_bottom_without_errors_or_paths_of_a_machine(
    path,
):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr" for output in outputs
    )
    assert not any(
        re.search(r"(?<![\w.:/])/\w+/", str(output.get("text", ""))) for output in outputs
    )  # an absolute path, of whatever machine
