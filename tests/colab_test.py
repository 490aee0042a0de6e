"""Every notebook runs from its first cell to its last at the smallest size, and is committed with its output.

Needs the extra `notebooks`. Marked `notebook`, and run by `make test-notebooks`.
"""

import json
import pathlib
import re
import subprocess
import sys

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
def test_a_committed_notebook_shows_its_output(path):
    """It was executed in order without an error, and its first cell is the common one."""
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert code[0].source == read(NOTEBOOKS[0]).cells[1].source
    assert re.search(r"jax \d+\.\d+", code[0].outputs[0].text), "the first cell states versions"
    assert any(cell.outputs for cell in code[1:])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_runtime_and_duration(path):
    first = json.loads(path.read_text())["cells"][0]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown"
    assert text.startswith("# ")
    assert re.search(r"seconds|minutes", text)
    assert re.search(r"runtime", text, re.IGNORECASE)


def run_cell(code, folder, prelude=""):
    """Runs a cell where only Python is installed; returns its output and exit status."""
    command = [sys.executable, "-I", "-S", "-c", f"{prelude}\n{code}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def source_of(path, number):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return "".join(code[number]["source"])


PRETEND = """import glob, shutil, subprocess
subprocess.run = lambda command, check: print(*command[3:])
glob.glob = lambda pattern: [pattern] if pattern in {files} else []
shutil.which = lambda name: name if name in {programs} else None
"""


@pytest.mark.parametrize(
    ("files", "programs", "extra"),
    [
        ([], [], ""),
        (["/dev/accel*"], [], "[tpu]"),
        (["/dev/vfio/[0-9]*"], [], "[tpu]"),
        ([], ["nvidia-smi"], "[cuda13]"),
    ],
)
@pytest.mark.parametrize("source", ["git+https://host/of/it", "wheels/one.whl"])
def test_the_first_cell_installs_from_a_source_with_the_runtimes_tools(source, files, programs, extra, tmp_path):
    (tmp_path / "anyexperts_jax").mkdir()  # a clone's folder beside the notebook is not the package
    cell = source_of(NOTEBOOKS[0], 0).replace('SOURCE = ""', f"SOURCE = {source!r}")
    ended = run_cell(cell, tmp_path, PRETEND.format(files=files, programs=programs))
    where = source if "://" in source else (tmp_path / source).as_uri()
    said = ended.stdout.splitlines()
    assert said[-1] == f"install --quiet anyexperts-jax{extra} @ {where}"
    assert [line.split()[0] for line in said[:-1]] == ["uninstall"] * (extra == "[cuda13]")
    assert ended.stderr == "Installed. Restart the runtime (Runtime > Restart session), then run this cell again.\n"


def test_the_first_cell_installs_from_a_checkout(tmp_path):
    for folder in ("anyexperts_jax", "colab"):
        (tmp_path / folder).mkdir()
    (tmp_path / "anyexperts_jax" / "__init__.py").touch()
    ended = run_cell(source_of(NOTEBOOKS[0], 0), tmp_path / "colab", PRETEND.format(files=[], programs=[]))
    assert ended.stdout == f"install --quiet anyexperts-jax @ {tmp_path.as_uri()}\n"


def test_without_a_source_or_checkout_one_line_says_what_to_do(tmp_path):
    ended = run_cell(source_of(NOTEBOOKS[0], 0), tmp_path)
    assert re.fullmatch(r"anyexperts_jax is not here: set SOURCE above to .*\n", ended.stderr)
    (path,) = (one for one in NOTEBOOKS if "reproduce" in one.stem)
    ended = run_cell(source_of(path, 1), tmp_path, 'import pathlib, sys\nSOURCE = ""')
    assert re.fullmatch(r"experiments/configs is not here: clone the repository .*\n", ended.stderr)


def in_one_folder():
    """Groups the notebooks in reading order; those that begin with the same run share a folder, and so the run."""
    train = "result = train("
    begin_alike = [path for path in NOTEBOOKS if train in path.read_text()]
    return [begin_alike, *([path] for path in NOTEBOOKS if path not in begin_alike)]


def test_notebooks_that_train_start_with_the_same_run():
    (first, *others), *alone = in_one_folder()
    assert others
    assert {source_of(path, 1) for path in others} == {source_of(first, 1)}
    assert len(others) + 1 + len(alone) == len(NOTEBOOKS)


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.parametrize("paths", in_one_folder(), ids=lambda paths: "+".join(path.stem[:2] for path in paths))
def test_notebooks_run(paths, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
    for name, value in SMALLEST.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a notebook has
    for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):  # a reader's cells promote as JAX does
        monkeypatch.delenv(name, raising=False)
    for path in paths:
        notebook = read(path)
        client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
        client.execute()
        assert any(cell.get("outputs") for cell in notebook.cells[2:])
