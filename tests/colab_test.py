"""The notebooks: each runs from its first cell to its last at the smallest size; as committed they show their output.

Needs the extra `notebooks`. Marked `notebook`, and run by `make test-notebooks`.
"""

import pathlib
import re

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALLEST = {"ANYEXPERTS_STEPS": "6"}


def read(path):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_as_committed(path):
    """Executed in order, without an error, and with the first cell that all share."""
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert code[0].source == read(NOTEBOOKS[0]).cells[1].source
    assert re.search(r"jax \d+\.\d+", code[0].outputs[0].text), "the first cell states versions"
    assert any(cell.outputs for cell in code[1:])


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
    for name, value in SMALLEST.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a notebook has
    notebook = read(path)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert any(cell.get("outputs") for cell in notebook.cells[2:])
