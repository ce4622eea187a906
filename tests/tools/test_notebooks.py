"""The lessons run from top to bottom, here briefly; the committed outputs are one full run."""

import re
from pathlib import Path

import nbformat
import pytest

from tools import notebooks

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_the_short_setting(path, monkeypatch, model_cache):
    monkeypatch.setenv("QUICK", "1")
    notebooks.execute(path, timeout=300)


def test_one_page_is_plain_torch_on_one_page():
    """150 lines of code; this project's modules come in the last cell alone, which compares."""
    cells = [c for c in nbformat.read(NOTEBOOKS[0], 4).cells if c.cell_type == "code"]
    assert NOTEBOOKS[0].stem == "00_one_page"
    assert sum(len(cell.source.splitlines()) for cell in cells) <= 150
    ours = {path.stem for path in NOTEBOOKS[0].parents[1].glob("*.py")}
    imported = [ours & set(re.findall(r"(?m)^(?:from|import) (\w+)", c.source)) for c in cells]
    assert imported[-1] == {"bidora", "bilevel"} and not any(imported[:-1])


@pytest.mark.parametrize("quick, kept", [("1", False), ("", True)])
def test_a_short_run_replaces_no_outputs_and_a_full_one_does(quick, kept, tmp_path, monkeypatch):
    path = tmp_path / "01_sum.ipynb"
    cell = nbformat.v4.new_code_cell("print(40 + 2)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    before = path.read_bytes()
    monkeypatch.setenv("QUICK", quick)
    assert notebooks.main([f"--folder={tmp_path}", "--only=01"]) == 0
    assert (path.read_bytes() != before) == kept
    assert [o.text for c in nbformat.read(path, 4).cells for o in c.outputs] == ["42\n"] * kept


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_one_run_from_top_to_bottom_without_errors_or_machine_s_paths(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    texts = [str(output.get("text", "")) for output in outputs]
    assert not any(re.search(r"(?<![\w.:/])/\w+/", text) for text in texts)  # an absolute path
