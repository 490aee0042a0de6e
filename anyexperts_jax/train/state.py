"""`TrainState`: all that a step changes, as one tree of arrays."""

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

    step: Int[Array, ""]  # steps taken, skipped ones included
    params: Any
    opt_state: Any  # its moments are trees like `params`
    router_bias_LC: Float[Array, "L C"]  # the expert biases of loss-free balancing; stays zero where they are off


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    params: Any,
    router_bias_LC: Float[Array, "L C"] | None = None,
) -> TrainState:
    """The state before the first step; the expert biases are 0 unless given."""
    bias_LC = jnp.zeros(model.router_bias_shape, jnp.float32) if router_bias_LC is None else router_bias_LC
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), bias_LC)


def state_shardings(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state: moments where their parameters are, numbers on every device.

    A moment is known by the parameter's name, at the end of its path in the state.

    Raises:
      UserError: when a parameter does not split over the mesh, or an array of the optimiser's is of no parameter.
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
        """That of the parameter whose name the path ends in, along the axes that are as long as the parameter's."""
        if _is_small(array) or path == _BIAS_PATH:
            return replicated(mesh)
        keys = _keys(path)
        found = next((places[keys[i:]] for i in range(len(keys)) if keys[i:] in places), None)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if found is None:
            raise UserError(
                f"{name} of shape {array.shape} would be whole on every device: its path does not end in the name of a "
                "parameter; give the optimiser a state of trees like the parameters, and of numbers"
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
    """A number, or a random key: what an optimiser keeps besides trees like the parameters."""
    return array.ndim == 0 or (array.dtype == jnp.uint32 and array.shape in _KEY_DATA)


def _keys(path: Any) -> tuple[str, ...]:
    """The dictionary keys a path ends in."""
    keys: list[str] = []
    for entry in reversed(path):
        if not isinstance(entry, jax.tree_util.DictKey):
            break
        keys.append(entry.key)
    return tuple(reversed(keys))


def abstract_state(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every array of the state: what a checkpoint is restored into."""
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
    router_bias_LC: Float[Array, "L C"] | None = None,
) -> TrainState:
    """The state before the first step of a run that starts from `params`, which it takes over."""
    init = jax.jit(
        functools.partial(init_state, model, optimizer),
        donate_argnums=0,
        out_shardings=state_shardings(model, optimizer, mesh),
    )
    return init(params, router_bias_LC)


def create_state(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, key: Array) -> TrainState:
    """The state before the first step, every array born where it belongs. The mesh does not change the values."""

    def init(key: Array) -> TrainState:
        return init_state(model, optimizer, init_params(model, key))

    # Runs once: on CPU, unoptimised code costs milliseconds to run and saves three quarters of the compilation.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = state_shardings(model, optimizer, mesh)
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(key)
