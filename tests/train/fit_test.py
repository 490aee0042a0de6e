import dataclasses
import math
import time

import jax
import pytest
from jax.sharding import Mesh

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.batches import empty_batch
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.train import fit
from anyexperts_jax.train.config import load_config
from anyexperts_jax.train.fit import (
    attention_bytes,
    device_bytes,
    host_bytes,
    require_fits,
    require_room_for_examples,
    room_on_devices,
    sequence_bytes,
    state_bytes,
)
from anyexperts_jax.train.loop import train
from train.stand_in import run_config

ONE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def room(monkeypatch):
    """Sets what the machine has available, in bytes."""
    return lambda size: monkeypatch.setattr(fit, "available_bytes", lambda: size)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=100000000", r"a batch of train.batch_size=100000000 sequences [\d,]+\.\d GiB"),
        ("train.eval_examples=2000000000", r"the validation examples of train.eval_examples=2000000000 [\d,]+\.\d GiB"),
        ("model.moe.num_experts=100000000", r"parameters, gradients and optimiser state [\d,]+\.\d GiB"),
        ("model.stack.d_ff=2000000000", r"parameters, gradients and optimiser state [\d,]+\.\d GiB"),
        ("model.vocab_size=2000000000", r"parameters, gradients and optimiser state [\d,]+\.\d GiB"),
    ],
)
def test_what_is_far_too_large_is_refused_at_once_with_its_figures(override, message, tmp_path):
    config = load_config("smoke", [override])
    start = time.perf_counter()
    with pytest.raises(UserError, match=rf"this takes at least [\d,]+\.\d GiB of memory \(.*{message}.*available"):
        train(config, tmp_path / "run", progress=False)
    assert time.perf_counter() - start < 60
    assert not (tmp_path / "run").exists()


def test_a_picture_and_a_sequence_far_too_large_are_refused():
    encoding = ["data.encoding.max_length=1000000", "model.max_length=1000000"]
    with pytest.raises(UserError, match=r"the attention of data.encoding.max_length=1000000 positions 3,725.3 GiB"):
        require_fits(load_config("smoke", encoding), ONE)
    picture = ["data.encoding.max_patches=100000000"]
    with pytest.raises(UserError, match=r"a batch of train.batch_size=8 sequences 572.2 GiB"):
        require_fits(load_config("smoke", picture), ONE)


@pytest.mark.parametrize("name", ["smoke", "tiny"])
def test_what_fits_is_not_refused(name, room):
    room(2**30)
    require_fits(load_config(name), ONE)


def test_the_bound_is_no_more_than_the_arrays_themselves():
    spec = EncodingSpec()
    whole = sum(getattr(empty_batch(spec, 3), field).nbytes for field in vars(empty_batch(spec, 3)))
    assert 0.9 * whole < 3 * sequence_bytes(spec) <= whole
    model = load_config("smoke")
    parameters = sum(math.prod(p.shape) * 4 for p in jax.tree.leaves(fit.abstract_params(model.model)))
    assert 3 * parameters <= state_bytes(model, ONE) < 3.1 * parameters  # AdamW has two more of each


def test_the_refusal_depends_on_the_bytes(room):
    config = run_config()
    parts = device_bytes(config, ONE, True) | host_bytes(config, ONE) | attention_bytes(config)
    room(sum(parts.values()))
    require_fits(config, ONE)
    room(sum(parts.values()) - 1)
    with pytest.raises(UserError, match="this takes at least"):
        require_fits(config, ONE)
    require_fits(config, ONE, trains_everything=False)


def test_positions_split_over_a_mesh_axis(tmp_path):
    with pytest.raises(UserError, match=r"data.encoding.max_length=127 does not split over mesh.sequence=2"):
        load_config("smoke", ["mesh.sequence=2", "data.encoding.max_length=127"])
    free = load_config("smoke", ["mesh.data=1", "mesh.sequence=-1", "data.encoding.max_length=127"])
    with pytest.raises(UserError, match=r"data.encoding.max_length=127 does not split over mesh.sequence=8"):
        train(free, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_accelerator_has_its_own_memory_and_the_host_holds_the_data(room, monkeypatch):
    config = run_config()
    device, data = (sum(parts.values()) for parts in (device_bytes(config, ONE, True), host_bytes(config, ONE)))
    monkeypatch.setattr(fit, "platform_of", lambda mesh: "gpu")
    room(data)
    for limit in (device, None):  # None: the device does not report it
        monkeypatch.setattr(fit, "room_on_devices", lambda mesh, limit=limit: limit)
        require_fits(config, ONE)
    monkeypatch.setattr(fit, "room_on_devices", lambda mesh: device - 1)
    with pytest.raises(UserError, match=r"the logits 0\.8 MiB.*\); a cpu has \d\.\d MiB"):
        require_fits(config, ONE)
    room(data - 1)
    with pytest.raises(UserError, match="this machine has available for the data"):
        require_fits(config, ONE)


def test_a_cpu_reports_no_limit_of_its_own():
    assert room_on_devices(ONE) is None


def test_examples_to_evaluate_on_are_counted_too(room):
    room(10 * sequence_bytes(EncodingSpec()))
    require_room_for_examples(EncodingSpec(), 10, "--examples=10")
    with pytest.raises(UserError, match=r"\(--examples=11 \d\.\d MiB\)"):
        require_room_for_examples(EncodingSpec(), 11, "--examples=11")


def test_a_meshs_devices_hold_parts_of_the_state():
    split = Mesh(ONE.devices.repeat(2, axis=1), ONE.axis_names)
    config = load_config("smoke")
    assert state_bytes(config, split) < 0.6 * state_bytes(dataclasses.replace(config), ONE)
