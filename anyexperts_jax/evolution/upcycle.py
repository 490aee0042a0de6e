"""Sparse upcycling: makes a mixture of experts from a dense model; every expert starts as the layer's dense FFN.

It goes leaf by leaf and frees the sources of each before making the next, so that two models never fill the memory.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from anyexperts_jax.core.errors import require
from anyexperts_jax.evolution.config import UpcycleConfig
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, init_leaves, logical_axes, named_leaves, params_of_leaves
from anyexperts_jax.models.paths import dense_twins, expert_weight, is_routing
from anyexperts_jax.sharding.specs import param_shardings


def upcycle_params(
    dense_params: Any, model: ModelConfig, upcycle: UpcycleConfig, key: Array, mesh: Mesh, *, consume: bool = False
) -> Any:
    """The parameters of `model` (see `config.upcycled_model`) on `mesh`, made from the dense model's.

    Args:
      key: for the router's initial values and the differences between experts.
      consume: frees the dense parameters on the way; they cannot be used afterwards.

    Raises:
      UserError: if the dense parameters belong to another model.
    """
    leaves = upcycled_leaves(named_leaves(dense_params), model, upcycle, key, mesh, consume=consume)
    return params_of_leaves(model, dict(leaves))


def upcycled_leaves(
    dense: dict[str, Array], model: ModelConfig, upcycle: UpcycleConfig, key: Array, mesh: Mesh, *, consume: bool
) -> Iterator[tuple[str, Array]]:
    """Yields the name and value of each parameter; with `consume`, its sources are freed before that."""
    wanted = named_leaves(abstract_params(model))
    shardings = named_leaves(param_shardings(mesh, logical_axes(model), abstract_params(model)))
    for name, shape in wanted.items():
        sources = dense_twins(model, name)
        missing = [source for source in sources if source not in dense]
        require(not missing, f"the dense parameters have no {', '.join(missing[:3])}: they are of another model")
        taken = [dense.pop(source) if consume else dense[source] for source in sources]
        if sources == [name]:
            leaf = jax.device_put(taken[0], shardings[name], donate=consume)
        else:
            make = jax.jit(_maker(model, upcycle, name), out_shardings=shardings[name])
            leaf = jax.block_until_ready(make(key, taken))
            for source in taken if consume else []:
                source.delete()
        require(leaf.shape == shape.shape, f"parameter {name} comes out as {leaf.shape}, the model has {shape.shape}")
        del taken
        yield name, leaf


def rerouted_params(params: Any, model: ModelConfig, key: Array, mesh: Mesh) -> Any:
    """`params` of a model with the same experts and another routing policy, with new parameters for this policy.

    The new ones equal those that `upcycle_params` makes from the same key.
    """
    known, wanted = named_leaves(params), named_leaves(abstract_params(model))
    new = tuple(name for name in wanted if is_routing(name))
    shardings = named_leaves(param_shardings(mesh, logical_axes(model), abstract_params(model)))
    make = jax.jit(lambda key: init_leaves(model, key, new), out_shardings={name: shardings[name] for name in new})
    return params_of_leaves(model, {**known, **make(key)})


def _maker(model: ModelConfig, upcycle: UpcycleConfig, name: str) -> Any:
    """The function (key, sources) -> parameter."""
    weight = expert_weight(name)
    if weight is not None:
        return lambda key, sources: initial_experts(upcycle, key, weight, jnp.stack(sources))
    if dense_twins(model, name):
        return lambda key, sources: jnp.stack(sources)
    return lambda key, sources: init_leaves(model, key, (name,))[name]


def initial_experts(
    upcycle: UpcycleConfig, key: Array, weight: str, dense_LXY: Float[Array, "L X Y"]
) -> Float[Array, "L E X Y"]:
    """Makes every layer's E experts from the "gate", "up" or "down" matrix of its dense FFN.

    With "random_subset", an expert reinitialises the same units in all three matrices.
    """
    layers, experts = dense_LXY.shape[0], upcycle.num_experts

    def one(layer: Array, expert: Array, dense_XY: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, layer), expert)
        made = _perturbed(upcycle, own, weight, dense_XY).astype(dense_XY.dtype)
        return jnp.where(expert == 0, dense_XY, made)

    if upcycle.init == "copy":
        return jnp.broadcast_to(dense_LXY[:, None], (layers, experts, *dense_LXY.shape[1:]))
    every_expert = jax.vmap(one, (None, 0, None))
    return jax.vmap(every_expert, (0, None, 0))(jnp.arange(layers), jnp.arange(experts), dense_LXY)


def _perturbed(upcycle: UpcycleConfig, key: Array, weight: str, dense_XY: Array) -> Array:
    own = jax.random.fold_in(key, zlib.crc32(weight.encode()))
    wide_XY = dense_XY.astype(jnp.float32)
    if upcycle.init == "noise":
        scale = upcycle.noise * jnp.sqrt(jnp.mean(wide_XY**2))
        return wide_XY + scale * jax.random.normal(own, wide_XY.shape)
    if upcycle.init == "dropout":
        kept_XY = jax.random.bernoulli(own, 1 - upcycle.dropped, wide_XY.shape)
        return jnp.where(kept_XY, wide_XY / (1 - upcycle.dropped), 0)
    # A unit is a column of gate and up and a row of down. The permutation's key does not depend on the matrix, so that
    # the same units are replaced in all three.
    units_axis = 0 if weight == "down" else 1
    units = wide_XY.shape[units_axis]
    redrawn_F = jax.random.permutation(jax.random.fold_in(key, 0), units) < round(upcycle.redrawn * units)
    fresh_XY = wide_XY.mean() + wide_XY.std() * jax.random.normal(own, wide_XY.shape)
    return jnp.where(redrawn_F[:, None] if units_axis == 0 else redrawn_F[None], fresh_XY, wide_XY)
