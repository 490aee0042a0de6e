import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding import specs
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.specs import batch_axes, batch_shardings, batch_shards, param_shardings, replicated

AXES = {"embedding": ("vocab", "embed"), "norm": {"scale": ("norm",)}, "up": ("expert", "embed", "expert_mlp")}


def abstract(expert=4, embed=8):
    shapes = {"embedding": (16, embed), "norm": {"scale": (embed,)}, "up": (expert, embed, 6)}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )


def test_params_are_split_as_the_rules_say():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    shardings = param_shardings(mesh, AXES, abstract())
    assert shardings["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["norm"]["scale"].spec == PartitionSpec(None)
    assert shardings["up"].shard_shape((4, 8, 6)) == (2, 4, 3)


def test_params_are_created_sharded():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=2))
    init = lambda: jax.tree.map(lambda s: jnp.ones(s.shape), abstract())  # noqa: E731
    params = jax.jit(init, out_shardings=param_shardings(mesh, AXES, abstract()))()
    assert {shard.data.shape for shard in params["up"].addressable_shards} == {(2, 2, 6)}


@pytest.mark.parametrize(
    ("axes", "shapes", "message"),
    [
        (AXES, abstract(expert=3), "parameter up: expert=3 does not split over expert of 2 devices"),
        (AXES | {"embedding": ("vocab",)}, abstract(), r"parameter embedding: logical axes \('vocab',\) for shape"),
        (AXES | {"norm": {"scale": ("norms",)}}, abstract(), "logical axis='norms' is unknown"),
    ],
)
def test_params_that_do_not_fit_are_named(axes, shapes, message):
    mesh = make_mesh(MeshConfig(data=-1, expert=2))
    with pytest.raises(UserError, match=message):
        param_shardings(mesh, axes, shapes)


@pytest.mark.parametrize(
    ("field", "axes"),
    [
        ("tokens_BT", ("batch", "length")),
        ("positions_BT3", ("batch", "length")),
        ("patches_BPX", ("batch",)),
        ("level_B", ("batch",)),
    ],
)
def test_the_letters_of_a_batch_field_are_its_dimensions(field, axes):
    assert batch_axes(field) == axes


@pytest.mark.parametrize(
    "field", ["tokens", "tokens_TB", "segments_bt", "patches_BPT", "places_PB", "B", "tokens_B_", "x_BTT"]
)
def test_a_batch_field_that_does_not_say_its_dimensions_is_refused(field, monkeypatch):
    with pytest.raises(UserError, match=f"batch field '{field}': its name must end in its dimensions"):
        batch_axes(field)
    other = dataclasses.make_dataclass("Other", ["tokens_BT", field])
    monkeypatch.setattr(specs, "Batch", other)
    with pytest.raises(UserError, match=f"batch field '{field}'"):
        batch_shardings(make_mesh(MeshConfig()))


def test_a_batch_splits_over_data_fsdp_and_expert():
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=2, sequence=2))
    shardings = batch_shardings(mesh)
    assert batch_shards(mesh) == 4
    assert shardings["tokens_BT"].shard_shape((8, 16)) == (2, 8)
    assert shardings["patches_BPX"].shard_shape((8, 6, 5)) == (2, 6, 5)
    for name in ("segment_BT", "position_BT"):
        assert shardings[name].shard_shape((8, 16)) == (2, 8)
    for name in ("patch_row_BP", "patch_column_BP", "patch_item_BP", "frame_item_BS"):
        assert shardings[name].shard_shape((8, 6)) == (2, 6)
    assert replicated(mesh).shard_shape((3,)) == (3,)
