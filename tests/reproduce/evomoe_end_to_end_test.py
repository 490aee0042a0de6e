"""EvoMoE's runs from TOML to result on a model of two layers and text alone: shared stages, SIGTERM, resuming."""

import os
import pathlib
import signal

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evolution.config import load_evolve_config
from anyexperts_jax.train import loop
from anyexperts_jax.train.stops import RunInterruptedError
from experiments.reproduce import shared_stages
from experiments.reproduce.experiment import load_experiment, runs_of
from experiments.reproduce.recipes import TRAIN_FOLDER
from experiments.reproduce.run_folder import finish, finished, prepare
from experiments.reproduce.shared_stages import STORE_NAME, link_stages, missing_stages

MODEL = """
preset = "tiny_dense"
[model]
max_length = 96
vision = "none"
audio = "none"
[model.stack]
d_model = 16
num_layers = 2
num_dense_layers = 2
d_ff = 16
attention = { num_heads = 1, num_kv_heads = 1, head_dim = 8 }
[data]
domains = ["nlp"]
levels = [1]
threads = 0
[data.encoding]
max_length = 96
max_patches = 0
max_frames = 0
[mesh]
data = 8
[train]
checkpoint_every = 2
eval_every = 4
eval_examples = 8
[evolve.moe]
router_hidden = 4
router_rank = 2
[evolve.warm_up]
steps = 4
lr = 1e-2
batch_size = 8
[evolve.evolving]
steps = 4
lr = 1e-2
batch_size = 8
final_lr_fraction = 0.5
[evolve.routing]
steps = 4
lr = 1e-2
batch_size = 8
"""
TABLE = """
title = "The smallest"
base = "model.toml"
recipe = "evolve_and_evaluate"
seeds = [0]
[evaluation]
test_examples = 8
validation_examples = 8
model_baselines = false
[[variants]]
name = "dense"
stages = ["warm_up"]
[[variants]]
name = "expert 1 alone"
stages = ["warm_up", "evolving"]
[[variants]]
name = "evolution + DTR"
"""


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "model.toml").write_text(MODEL)
    (tmp_path / "table.toml").write_text(TABLE)
    return {name: run for (name, _), run in runs_of(*load_experiment(tmp_path / "table.toml")).items()}


def say(line):
    pass


@pytest.mark.slow
def test_stages_are_trained_once_and_resume_after_sigterm(runs, tmp_path, monkeypatch):
    root, taken = tmp_path / "runs", []
    next_batch = loop._Run._next_batch

    def counted(self, pending):
        taken.append(self.paths.root.name)
        if len(taken) == 6:  # the second step of stage II
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self, pending)

    monkeypatch.setattr(loop._Run, "_next_batch", counted)
    both = runs["evolution + DTR"]
    folder = prepare(both, root)
    with pytest.raises(RunInterruptedError, match="stopped by SIGTERM after step 2 of 4"):
        finish(both, folder, say)
    result = finish(both, folder, say)
    assert taken == ["warm_up"] * 4 + ["evolving"] * 4 + ["routing"] * 4, "nothing was done twice"
    assert finished(both, root) is not None
    assert not (folder / TRAIN_FOLDER).exists(), "the links are removed, their targets stay"
    assert missing_stages(both, root) == frozenset()
    experts = result.experts
    assert set(experts.distance) == set(experts.drift) == {"evolving", "routing"}
    assert experts.distance["evolving"] == experts.distance["routing"], "stage III trains the routers alone"
    assert min(experts.distance["evolving"]) > 0
    assert len(experts.alone) == 4
    assert set(experts.share) == {"text"}
    np.testing.assert_allclose(sum(experts.share["text"]), 1.0, rtol=1e-6)

    taken.clear()
    dense = finish(runs["dense"], prepare(runs["dense"], root), say)
    alone = finish(runs["expert 1 alone"], prepare(runs["expert 1 alone"], root), say)
    assert taken == [], "both stages existed already"
    assert dense.experts is alone.experts is None
    assert (set(dense.validation), alone.trained_budget) == ({"nlp"}, 1.0)
    assert dense.origin == alone.origin == result.origin
    assert dense.origin.startswith("warm_up_")
    assert len(list((root / STORE_NAME).glob("warm_up_*.lock"))) == 1


def test_links_and_locks_without_training(tmp_path, monkeypatch):
    """The first run that needs a stage trains it; if it is stopped, the next one does."""
    run = load_evolve_config("evolve_smoke")
    made = []

    def make(run, place, stages, note):
        (name,) = stages
        made.append(name)
        steps = 2 if len(made) == 2 else getattr(run.evolve, name).steps
        (pathlib.Path(place) / name / "checkpoints" / str(steps)).mkdir(parents=True)
        if steps == 2:
            raise RunInterruptedError("stopped", signal.SIGTERM)

    monkeypatch.setattr(shared_stages, "evolve", make)
    with pytest.raises(RunInterruptedError):
        link_stages(run, tmp_path / "one" / "train", tmp_path, say)
    assert made == ["warm_up", "evolving"]
    link_stages(run, tmp_path / "two" / "train", tmp_path, say)
    link_stages(run, tmp_path / "one" / "train", tmp_path, say)
    assert made == ["warm_up", "evolving", "evolving"]
    for name in ("one", "two"):
        for stage in ("warm_up", "evolving"):
            assert (tmp_path / name / "train" / stage / "checkpoints" / "4").is_dir()
    in_the_way = tmp_path / "three" / "train" / "warm_up"
    in_the_way.mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot link .*warm_up to .*: File exists"):
        link_stages(run, tmp_path / "three" / "train", tmp_path, say)
