"""The docstring example of every public function runs, all in one process, on one small run."""

import json
import os
import pathlib
import subprocess
import sys

import public_examples
import pytest

TESTS = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def failed_examples(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device
    environment |= {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(TESTS / "public_examples.py")]
    folder = tmp_path_factory.mktemp("outside")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", public_examples.documented())
def test_the_example_of_every_public_function_runs(name, failed_examples):
    assert failed_examples[name] == ""


def test_every_public_function_has_an_example():
    assert {"train_run", "load_run", "Run", "Run.evaluate", "Run.generate", "Run.trace"} <= {
        *public_examples.documented()
    }
