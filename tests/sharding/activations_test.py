import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.models.media import place_rows
from anyexperts_jax.sharding.activations import split_tokens, take_embeddings
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import batch_shardings, param_shardings

ROWS, WIDTH, BATCH, LENGTH = 12, 8, 8, 4
MESHES = {
    "2x2x2": MeshConfig(data=2, fsdp=2, expert=2),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 8": MeshConfig(data=8),
    "fsdp, tensor, sequence": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
    "two slices": MeshConfig(data=1, fsdp=2, expert=2, dcn_fsdp=2),
}
AXES = ("batch", "length")


def operands():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    return table, jnp.asarray(rng.integers(0, ROWS, (BATCH, LENGTH)), jnp.int32)


def value_and_gradient(placement):
    return jax.value_and_grad(lambda table, ids: jnp.sin(take_embeddings(table, ids, placement, AXES)).sum())


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_takes_the_rows_of_one_device_and_none_is_replicated(name, capfd):
    mesh = make_mesh(MESHES[name])
    table, ids = operands()
    expected = value_and_gradient(None)(table, ids)
    where = param_shardings(mesh, {"t": ("vocab", "embed")}, {"t": table})["t"]
    placed = jax.device_put(table, where), jax.device_put(ids, batch_shardings(mesh)["tokens_BT"])
    found = jax.jit(value_and_gradient(Placement(mesh)), out_shardings=(None, where))(*placed)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_an_id_past_the_table_reads_nan_on_a_mesh_too():
    table, ids = operands()
    found = jax.jit(lambda i: take_embeddings(table, i, Placement(make_mesh(MESHES["2x2x2"])), AXES))(
        ids.at[1, 2].set(ROWS)
    )
    np.testing.assert_array_equal(np.isnan(found).all(-1), np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) == 6)


def test_rows_of_media_stay_with_their_sequences(capfd):
    mesh = make_mesh(MESHES["2x2x2"])
    rng = np.random.default_rng(0)
    x_BTD, encoded_BRD = (jnp.asarray(rng.normal(size=(BATCH, n, WIDTH)), jnp.float32) for n in (LENGTH, 3))
    media_BT = jnp.asarray(np.tile([True, False, True, True], (BATCH, 1)))
    total = lambda x, media, encoded: jnp.sin(place_rows(x, media, encoded)).sum()  # noqa: E731
    expected = jax.grad(total, (0, 2))(x_BTD, media_BT, encoded_BRD)
    rows = batch_shardings(mesh)["patches_BPX"]
    program = jax.jit(jax.grad(total, (0, 2)), in_shardings=rows).lower(x_BTD, media_BT, encoded_BRD).compile()
    for a, b in zip(program(*(jax.device_put(a, rows) for a in (x_BTD, media_BT, encoded_BRD))), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert not re.search(r"= f32\S* all-gather", program.as_text())
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_one_device_sees_no_constraint():
    x = jnp.zeros((BATCH, LENGTH, WIDTH))
    one = Placement(make_mesh(MeshConfig(), jax.devices()[:1]))
    for placement in (None, one):
        jaxpr = jax.make_jaxpr(lambda x, p=placement: split_tokens(x, p, AXES))(x)
        assert not jaxpr.eqns
