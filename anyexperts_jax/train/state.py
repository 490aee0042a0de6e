"""`TrainState`: everything that a train step changes, as one tree of arrays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import abstract_params, init_params, logical_axes
from anyexperts_jax.sharding.specs import param_shardings, replicated


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state after `step` steps."""

    step: Int[Array, ""]  # steps taken, including skipped ones
    params: Any
    opt_state: Any  # its moments are trees like `params`
    router_bias_LC: Float[Array, "L *M C"]  # the expert biases of loss-free balancing; stays zero if that is off


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    params: Any,
    router_bias_LC: Float[Array, "L *M C"] | None = None,
) -> TrainState:
    """The state before the first step; expert biases default to 0."""
    bias_LC = jnp.zeros(model.router_bias_shape, jnp.float32) if router_bias_LC is None else router_bias_LC
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), bias_LC)


def state_shardings(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state: moments are sharded like their parameters, scalars are replicated.

    A moment is matched with its parameter by name: its path in the state ends in the parameter's path.

    Raises:
      UserError: if a parameter does not split over the mesh, or an array of the optimiser matches no parameter.
    """
    params = abstract_params(model)
    shardings = param_shardings(mesh, logical_axes(model), params)
    places = {
        _keys(path): (param.shape, sharding)
        for (path, param), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: Any, array: Any) -> NamedSharding:
        """The sharding of the parameter in which the path ends, along the axes that have the parameter's size."""
        if _is_small(array) or path == _BIAS_PATH:
            return replicated(mesh)
        keys = _keys(path)
        found = next((places[keys[i:]] for i in range(len(keys)) if keys[i:] in places), None)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if found is None:
            raise UserError(
                f"{name} of shape {array.shape} would be replicated on every device: its path does not end in the name "
                "of a parameter; an optimiser's state must consist of trees like the parameters, and of scalars"
            )
        shape, sharding = found
        ranks = f"{name} has shape {array.shape}, the parameter it is named after {shape}; give it as many dimensions"
        require(len(shape) == len(array.shape), ranks)
        axes = (
            axis if ours == theirs else None
            for axis, ours, theirs in zip(sharding.spec, array.shape, shape, strict=True)
        )
        return NamedSharding(mesh, PartitionSpec(*axes))

    shapes = jax.eval_shape(functools.partial(init_state, model, optimizer), params)
    return jax.tree_util.tree_map_with_path(place, shapes)


_BIAS_PATH = (jax.tree_util.GetAttrKey("router_bias_LC"),)  # of `TrainState`
_KEY_DATA = ((2,), (4,))  # shapes of a raw random key


def _is_small(array: Any) -> bool:
    """Whether an array is a scalar or a random key, which an optimiser may keep besides trees like the parameters."""
    return array.ndim == 0 or (array.dtype == jnp.uint32 and array.shape in _KEY_DATA)


def _keys(path: Any) -> tuple[str, ...]:
    """The dictionary keys at the end of a path."""
    keys: list[str] = []
    for entry in reversed(path):
        if not isinstance(entry, jax.tree_util.DictKey):
            break
        keys.append(entry.key)
    return tuple(reversed(keys))


def abstract_state(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every array of the state, for restoring a checkpoint."""
    shapes = jax.eval_shape(functools.partial(init_state, model, optimizer), abstract_params(model))
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        shapes,
        state_shardings(model, optimizer, mesh),
    )


def state_from(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    params: Any,
    router_bias_LC: Float[Array, "L *M C"] | None = None,
) -> TrainState:
    """The state before the first step of a run that starts from `params`, which are donated."""
    init = jax.jit(
        functools.partial(init_state, model, optimizer),
        donate_argnums=0,
        out_shardings=state_shardings(model, optimizer, mesh),
    )
    return init(params, router_bias_LC)


def create_state(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, key: Array) -> TrainState:
    """The state before the first step, created with its final shardings. The mesh does not change the values."""

    def init(key: Array) -> TrainState:
        return init_state(model, optimizer, init_params(model, key))

    # This runs once: on a CPU, unoptimised code costs milliseconds and saves three quarters of the compile time.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = state_shardings(model, optimizer, mesh)
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(key)
