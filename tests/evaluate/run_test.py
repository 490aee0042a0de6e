"""The public `Run`: it works on any mesh and refuses bad calls. tests/public_examples.py shows each call."""

import subprocess
import sys

import numpy as np
import pytest
from train.stand_in import run_config

import anyexperts_jax as ax
from anyexperts_jax.data.example import Example
from anyexperts_jax.evaluate.results import JSON_NAME, load_evaluation
from evaluate.mesh_test import MODEL, SPREAD
from evaluate.results_made_up import evaluation
from evaluate.stand_in import trained, write_run

EXAMPLE = Example("nlp", "add", 1, "1 + 1?", "2", "mine")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), trained(MODEL, config=run_config(MODEL)))


@pytest.fixture(scope="module")
def run(path):
    return ax.load_run(str(path))


@pytest.mark.slow
def test_a_run_routes_alike_on_any_mesh(path, run):
    spread = ax.load_run(path, ax.make_mesh(SPREAD))
    assert len(spread.router_bias_LC.sharding.device_set) == 8
    batch = run.data.batch("nlp", rows=3)
    here, there = run.trace(batch), spread.trace(batch)
    np.testing.assert_array_equal(here.slots_LBT, there.slots_LBT)
    np.testing.assert_allclose(here.weights_LBTK, there.weights_LBTK, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.evaluate(examples=3), "option='examples' is unknown; valid: num_examples, calibration_exampl"),
        (lambda run: run.evaluate([2.4], ["none"]), "domain='none' is unknown; valid: "),
        (lambda run: run.evaluate([99.0]), "target_real=99 is out of reach"),
        (lambda run: run.generate(""), "the question is empty"),
        (
            lambda run: run.generate("what?", image="a.png"),
            "this run reads no images: data.encoding.max_patches=0",
        ),
        (lambda run: run.generate("what?", audio=np.array([np.nan])), "the audio"),
        (lambda run: run.generate(EXAMPLE, audio="a.wav"), "an Example has its own picture or sound; give it there"),
        (lambda run: run.data.batch("none"), "domain='none' is unknown; valid: "),
        (lambda run: run.data.batch("nlp", "tests"), "split='tests' is unknown; valid: train, validation, test"),
        (lambda run: run.data.batch("nlp", rows=0), "rows=0 must be >= 1"),
        (lambda run: run.data.example("nlp", index=-1), "index=-1 must be >= 0"),
        (lambda run: run.data.encode([]), "no example is given; a batch has one row or more"),
        (lambda run: ax.load_run("no/such/run"), "no run in no/such/run"),
        (lambda run: ax.load_run(run.path, which="first"), "which='first' is unknown; valid: best, last"),
        (lambda run: ax.train("no_such"), "no_such"),
        (lambda run: ax.train(run.config, overrides=["seed=1"]), "overrides and plugins go with a preset or a file"),
    ],
)
def test_bad_calls_are_refused_in_one_line(run, call, message):
    with pytest.raises(ax.UserError) as error:
        call(run)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_saved_evaluation_is_written_into_the_runs_directory(run, monkeypatch):
    made = evaluation()
    monkeypatch.setattr("anyexperts_jax.evaluate.run.evaluate_trained", lambda *what, **how: made)
    assert run.evaluate() is made
    assert not (run.path / JSON_NAME).exists()
    assert run.evaluate(save=True) is made
    assert load_evaluation(run.path).step == made.step


def test_train_is_callable_before_and_after_its_package_is_imported():
    code = (
        "import sys, anyexperts_jax as ax; assert callable(ax.train); before = ax.train;"
        "assert 'anyexperts_jax.train.loop' not in sys.modules;"
        "import anyexperts_jax.train.config; from anyexperts_jax.train.config import RunConfig;"
        "assert ax.train is before and callable(ax.train) and ax.RunConfig is RunConfig; print(ax.train(None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(
        "config is a NoneType; it must be a RunConfig, a preset's name or a path"
    )
