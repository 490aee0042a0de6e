"""Evaluating a checkpoint on any mesh gives the results of one device."""

import dataclasses

import jax
import numpy as np
import pytest
from train.stand_in import MODEL as SMALL
from train.stand_in import run_config

from anyexperts_jax.cli import main as cli
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.evaluate.evaluate import Options, evaluate_trained, load_batches
from anyexperts_jax.evaluate.router_diagnostics import diagnose
from anyexperts_jax.evaluate.trained import load_trained
from anyexperts_jax.report.example_map import map_examples
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from evaluate.stand_in import trained, write_run

ROWS = 3  # does not divide evenly over the mesh
OPTIONS = Options(num_examples=ROWS, calibration_examples=ROWS, time_rounds=1, calibrated=False, model_baselines=True)
STACK = dataclasses.replace(SMALL.stack, execution=Execution("blocks"))
MODEL = dataclasses.replace(SMALL, stack=STACK, vocab_size=260, pad_id=256, eos_id=259)
SPREAD = MeshConfig(data=1, fsdp=2, expert=2, sequence=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), trained(MODEL, config=run_config(MODEL)))


@pytest.fixture(scope="module")
def both(run):
    """Loads the checkpoint on one device and on eight."""
    return load_trained(run), load_trained(run, "best", make_mesh(SPREAD))


def test_parameters_are_loaded_sharded_and_batches_padded(both):
    alone, spread = both
    held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(spread.params)]
    assert sum(held) < 0.6 * sum(leaf.nbytes for leaf in jax.tree.leaves(alone.params))
    assert (alone.whole_rows(ROWS), spread.whole_rows(ROWS), spread.whole_rows(5)) == (ROWS, 4, 8)
    assert spread.step == alone.step == 4


@pytest.mark.slow
def test_an_evaluation_is_the_same_on_any_mesh(both):
    here, there = (evaluate_trained(one, (2.4,), ("nlp",), options=OPTIONS) for one in both)
    (mine,), (theirs,) = here.budgets, there.budgets
    assert [score.score for score in theirs.scores] == [score.score for score in mine.scores]
    assert theirs.realised == pytest.approx(mine.realised, abs=0.02)
    assert np.sum(theirs.routing.load_LME) == pytest.approx(np.sum(mine.routing.load_LME), rel=0.01)
    assert (theirs.routing.tokens, theirs.routing.dropped) == (mine.routing.tokens, 0)
    for one, other in zip(there.separations, here.separations, strict=True):
        assert one.auc == pytest.approx(other.auc, abs=0.02)
        assert one.baselines["gradient norm"] == pytest.approx(other.baselines["gradient norm"], abs=0.02)
    assert theirs.time.layer_seconds > 0


@pytest.mark.slow
def test_maps_and_diagnostics_are_the_same_on_any_mesh(both):
    (mine,), (theirs,) = (map_examples(one, "nlp", 1, ROWS, 4) for one in both)
    assert theirs.prediction == mine.prediction
    np.testing.assert_allclose(theirs.question_LQ, mine.question_LQ, atol=1e-4)
    one, other = (diagnose(each, load_batches(each, ("nlp",), "test", ROWS, ROWS), shuffles=1) for each in both)
    assert other.loss == pytest.approx(one.loss, rel=1e-3)
    assert other.shuffle_cost == pytest.approx(one.shuffle_cost, abs=1e-2)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (["experts=2"], "--mesh experts=2: unknown key experts; did you mean expert"),
        (["expert=two"], "--mesh expert=two: key expert='two'"),
        (["expert=3"], "--mesh expert=3: mesh"),
        (["data=1", "expert=8", "tensor=2"], "--mesh data=1 expert=8 tensor=2: mesh"),
    ],
)
def test_an_invalid_mesh_is_refused_in_one_line(run, mesh, message, capsys):
    assert cli.main(["generate", str(run), "--mesh", *mesh]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_model_that_does_not_divide_over_the_mesh_is_refused(run):
    with pytest.raises(UserError, match="heads=1 does not split over tensor of 2 devices"):
        load_trained(run, "best", make_mesh(MeshConfig(tensor=2)))
