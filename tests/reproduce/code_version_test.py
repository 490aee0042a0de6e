"""Guards CODE_VERSION: compares a little of what a run computes with committed figures."""

import dataclasses
import json
import os
import pathlib
import zlib

import jax
import numpy as np
import pytest
from train.stand_in import MODEL as TEXT
from train.stand_in import run_config

from anyexperts_jax.data.pipeline import eval_batches, train_iterator
from anyexperts_jax.models.init import logical_axes
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.optim import make_optimizer
from anyexperts_jax.train.state import create_state
from anyexperts_jax.train.step import make_train_step, model_apply
from experiments.reproduce.code_version import CODE_VERSION

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "code_version.json"
MODEL = pathlib.Path(__file__).parents[2] / "experiments" / "configs" / "model.toml"
AGAIN = "REWRITE_GOLDEN=1 python -m pytest tests/reproduce/code_version_test.py"
ALONE = MeshConfig()


def sequences(data):
    """Checksums of questions and answers of every domain and split."""
    found = {}
    for domain in data.domains:
        for split in ("train", "validation", "test"):
            (batch,) = eval_batches(data, domain, split, 2, 2)
            read = np.where(batch.loss_mask_BT, -batch.tokens_BT, batch.tokens_BT)
            found[f"{domain}/{split}"] = zlib.crc32(read.astype("<i4").tobytes())
    return found


def first_batch(data):
    batches = train_iterator(data, 5)
    try:
        return next(batches)
    finally:
        batches.close()


def trained(config):
    """The first two steps of a one-layer model on text, with everything that takes part in training."""
    optimizer = make_optimizer(config.optim, logical_axes(config.model))
    step = jax.jit(make_train_step(config, optimizer, model_apply(config.model)))
    state = create_state(config.model, optimizer, make_mesh(ALONE, jax.devices()[:1]), jax.random.key(0))
    batch, found = first_batch(config.data), []
    for _ in range(2):
        state, report = step(state, batch)
        found.append({name: float(value) for name, value in report.scalars.items()})
    return found


def figures():
    moe = dataclasses.replace(TEXT.moe, importance_regulariser="salience", z_weight=0.01, expert_bias=True)
    text = dataclasses.replace(TEXT, moe=moe)
    return {"sequences": sequences(load_config(MODEL).data), "steps": trained(run_config(text))}


@pytest.mark.slow
def test_runs_of_one_version_give_the_same_figures():
    found = figures()
    if os.environ.get("REWRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"code_version": CODE_VERSION, **found}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    meant = f"if it is meant, raise CODE_VERSION, then {AGAIN}"
    assert golden["code_version"] == CODE_VERSION, f"write the figures of this version: {AGAIN}"
    assert found["sequences"] == golden["sequences"], meant
    for ours, theirs in zip(found["steps"], golden["steps"], strict=True):
        assert ours == {name: pytest.approx(value, rel=2e-3, abs=1e-6) for name, value in theirs.items()}, meant
