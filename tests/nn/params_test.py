import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.sharding import PartitionSpec

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.initializers import Constant, FanIn, Normal
from anyexperts_jax.nn.params import NamedAxes, named
from anyexperts_jax.sharding.rules import ShardingRules


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"axis name='embd' is unknown; valid: vocab, embed,"):
        named(Constant(0.0), ("embd",))


def test_names_must_fit_the_shape():
    with pytest.raises(UserError, match=r"axis names \('embed', 'mlp'\) do not fit a parameter of shape \(3,\)"):
        named(Constant(0.0), ("embed", "mlp"))(jax.random.key(0), (3,), jnp.float32)


def test_scan_adds_an_axis_and_takes_it_back():
    box = named(Normal(1.0), ("embed", "mlp"))(jax.random.key(0), (2, 3), jnp.float32)
    stacked = box.add_axis(0, {"partition_name": "layers"})
    assert stacked.names == ("layers", "embed", "mlp")
    assert stacked.remove_axis(0, {"partition_name": "layers"}).names == box.names
    assert box.add_axis(1, {"partition_name": "layers"}).names == ("embed", "layers", "mlp")


def test_boxes_are_trees_of_one_leaf():
    box = NamedAxes(jnp.ones(3), ("embed",), Constant(1.0))
    doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(box)
    assert doubled.names == ("embed",)
    assert doubled.unbox().tolist() == [2.0, 2.0, 2.0]


def test_fan_in_counts_input_axes_only():
    assert FanIn().std((64, 7)) == pytest.approx(1 / 8)
    assert FanIn(scale=0.5, num_in=2).std((4, 16, 7)) == pytest.approx(0.5 / 8)
    assert FanIn(num_batch=1).std((32, 64, 7)) == pytest.approx(1 / 8)
    draws = FanIn(num_batch=1)(jax.random.key(0), (32, 64, 8), jnp.float32)  # 16384 draws: standard error 0.0007
    assert float(draws.std()) == pytest.approx(1 / 8, abs=0.003)
    assert FanIn()(jax.random.key(0), (4, 4), jnp.bfloat16).dtype == jnp.bfloat16


def test_an_axis_without_a_name_is_that_of_layers():
    box = named(Normal(1.0), ("embed", "mlp"))(jax.random.key(0), (2, 3), jnp.float32)
    assert box.add_axis(0, {}).names == ("layers", "embed", "mlp")


def test_flax_reads_the_boxes():
    params = {"w": named(Normal(1.0), ("embed", "mlp"))(jax.random.key(0), (2, 3), jnp.float32)}
    logical = nn.get_partition_spec(params)
    assert logical == {"w": PartitionSpec("embed", "mlp")}
    rules = dataclasses.asdict(ShardingRules()).items()
    assert nn.logical_to_mesh(logical, tuple(rules)) == {"w": PartitionSpec("fsdp", "tensor")}
    assert nn.unbox(params)["w"].shape == (2, 3)


def test_boxes_are_written_and_read_back_by_flax():
    params = {"w": named(Normal(1.0), ("embed", "mlp"))(jax.random.key(0), (2, 3), jnp.float32)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for written in (params, nn.unbox(params)):
        read = serialization.from_bytes(zeros, serialization.to_bytes(written))
        assert read["w"].names == ("embed", "mlp")
        np.testing.assert_array_equal(read["w"].value, params["w"].value)
