import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import logical_axes
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.train.optim import OptimConfig, make_optimizer
from anyexperts_jax.train.state import abstract_state, create_state, state_shardings
from train.stand_in import MODEL


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(OptimConfig(), logical_axes(MODEL))


def test_moments_are_sharded_like_their_parameters(optimizer):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    shardings = state_shardings(MODEL, optimizer, mesh)
    adam = next(part for part in shardings.opt_state if hasattr(part, "mu"))
    assert adam.mu == adam.nu == shardings.params
    assert not adam.count.spec
    assert not shardings.router_bias_LC.spec
    fsdp = [s for s in jax.tree.leaves(shardings.params) if "fsdp" in s.spec]
    assert len(fsdp) > 5


def test_the_state_is_created_sharded_with_the_same_values_on_any_mesh(optimizer):
    meshes = (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(data=2, fsdp=4)))
    states = [create_state(MODEL, optimizer, mesh, jax.random.key(0)) for mesh in meshes]
    chex.assert_trees_all_close(*jax.device_get(states), rtol=1e-6)
    embedding = states[1].params["tokens"]["table"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(260, 4)}
    described = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), states[1])
    abstract = abstract_state(MODEL, optimizer, meshes[1])  # what a checkpoint is restored into
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), abstract)


def with_state(optimizer, make):
    """An optimiser that keeps `make(params)` besides its own state."""
    inner = optimizer.init
    return optax.GradientTransformationExtraArgs(lambda params: (inner(params), make(params)), optimizer.update)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda params: {"scale": jnp.ones(8)},
            r"opt_state/1/scale of shape \(8,\) would be replicated on every device",
        ),
        (lambda params: jnp.ones((8, 8)), r"opt_state/1 of shape \(8, 8\) would be replicated on every device"),
        (lambda params: jax.tree.leaves(params), r"opt_state/1/0 of shape .* would be replicated on every device"),
        (
            lambda params: jax.tree.map(lambda p: p.reshape(-1), params),
            r"opt_state/1/.* has shape \(\d+,\), the parameter it is named after \(\d+, ",
        ),
    ],
    ids=["another name", "no name", "a list", "another rank"],
)
def test_a_state_that_matches_no_parameter_is_refused(optimizer, make, message):
    with pytest.raises(UserError, match=message):
        state_shardings(MODEL, with_state(optimizer, make), make_mesh(MeshConfig(data=2, fsdp=4)))


def test_numbers_keys_and_rows_of_a_parameter_are_states_too(optimizer):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))

    def make(params):
        rows = jax.tree.map(lambda p: p.sum(-1, keepdims=True), params)
        return {"count": jnp.int32(0), "key": jax.random.key_data(jax.random.key(0)), "rows": rows}

    kept = state_shardings(MODEL, with_state(optimizer, make), mesh).opt_state[1]
    assert not kept["count"].spec
    assert not kept["key"].spec
    assert kept["rows"]["tokens"]["table"].spec == jax.sharding.PartitionSpec("tensor", None)


def test_a_model_that_does_not_split_is_refused(optimizer):
    with pytest.raises(UserError, match=r"parameter .*expert=4 does not split over expert of 8 devices"):
        state_shardings(MODEL, optimizer, make_mesh(MeshConfig(data=1, expert=8)))
    wide = dataclasses.replace(MODEL, stack=dataclasses.replace(MODEL.stack, d_model=18))
    with pytest.raises(UserError, match="embed=18 does not split over fsdp of 4 devices"):
        state_shardings(wide, optimizer, make_mesh(MeshConfig(fsdp=4)))
