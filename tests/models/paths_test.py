"""Parameter names are read the way the modules make them: renaming a module fails here."""

import jax
import pytest

from anyexperts_jax.models.init import abstract_params, logical_axes, named_leaves
from anyexperts_jax.models.paths import (
    ROUTER_KERNEL,
    dense_twins,
    is_a,
    is_matmul,
    is_routing,
    leaves_of,
    short_name,
    tower_of,
)
from anyexperts_jax.models.presets import model_preset
from tests.models.small import small

TINY = model_preset("tiny")
AXES = named_leaves(abstract_params(TINY))


def names(config, kind):
    return {name for name in named_leaves(abstract_params(config)) if is_a(kind, name)}


def test_experts_are_the_parameters_with_an_expert_axis():
    by_axis = jax.tree.map(lambda own: "expert" in own, logical_axes(TINY), is_leaf=lambda x: isinstance(x, tuple))
    assert leaves_of(TINY, "expert") == by_axis
    assert len(names(TINY, "expert")) == 3


@pytest.mark.parametrize("router", ["linear", "per_modality", "per_modality_shared", "dtr", "dtr_shared"])
def test_routers_and_importance_are_found_whatever_their_form(router):
    config = small(moe={"router": router, "router_hidden": 4, "router_rank": 2})
    every = named_leaves(abstract_params(config))
    routers, importance = names(config, "router"), names(config, "importance")
    assert routers == {name for name in every if "/router/" in name}
    assert importance == {name for name in every if "/importance/" in name}
    assert routers
    assert importance
    assert {name for name in every if is_routing(name)} == routers | importance
    assert ROUTER_KERNEL in routers or router != "linear"


def test_importance_that_modulates_the_stream_is_found_in_the_block():
    config = small(moe={"hsm_site": "residual"})
    assert all(short_name(name).startswith("importance/") for name in names(config, "importance"))
    assert names(config, "importance")


def test_towers_and_matmuls_cover_every_parameter():
    every = named_leaves(abstract_params(TINY))
    assert {tower_of(name) for name in every} == {"text", "decoder", "vision", "audio"}
    for name, leaf in every.items():
        assert not is_matmul(name) or leaf.ndim >= 2
        assert not (is_matmul(name) and is_a("expert", name))


def test_the_twins_of_a_mixture_are_the_parameters_of_the_dense_model():
    dense = small(stack={"num_layers": 4, "num_dense_layers": 4})
    mixture = small(stack={"num_layers": 4, "num_dense_layers": 0, "moe_every": 2, "num_shared_experts": 0})
    twins = [twin for name in named_leaves(abstract_params(mixture)) for twin in dense_twins(mixture, name)]
    assert set(twins) == set(named_leaves(abstract_params(dense)))
    assert len(twins) == len(set(twins))
    assert dense_twins(mixture, ROUTER_KERNEL) == []
