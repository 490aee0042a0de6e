"""Frozen parameters: they have no gradient and no optimiser state, and do not change by a bit.

A tree of trained parameters has the structure of all parameters, with None for frozen ones.
"""

from typing import Any

import jax
import optax


def select(params: Any, trainable: Any) -> Any:
    """The parameters for which the tree of bools `trainable` is True, None for others. All if `trainable` is None."""
    if trainable is None:
        return params
    return jax.tree.map(lambda kept, param: param if kept else None, trainable, params)


def overlay(selected: Any, params: Any) -> Any:
    """`params` with those in `selected` replaced."""
    return jax.tree.map(lambda new, old: old if new is None else new, selected, params, is_leaf=lambda x: x is None)


def train_only(optimizer: optax.GradientTransformation, trainable: Any) -> optax.GradientTransformationExtraArgs:
    """Restricts `optimizer` to trainable parameters: it has no state for others, and their updates are None.

    Its `update` takes gradients that are None for frozen parameters, and parameters with or without the frozen ones.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return inner.update(grads, state, None if params is None else select(params, trainable), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(select(params, trainable)), update)


def combine_optimizers(
    one: optax.GradientTransformationExtraArgs,
    one_trains: Any,
    other: optax.GradientTransformationExtraArgs,
    other_trains: Any,
) -> optax.GradientTransformationExtraArgs:
    """Combines two optimisers made by `train_only`, each for its own parameters. Each clips its own gradient."""

    def init(params: Any) -> tuple[Any, Any]:
        return one.init(params), other.init(params)

    def update(grads: Any, state: tuple[Any, Any], params: Any = None, **extra: Any) -> tuple[Any, tuple[Any, Any]]:
        updates, state_one = one.update(select(grads, one_trains), state[0], params, **extra)
        rest, state_other = other.update(select(grads, other_trains), state[1], params, **extra)
        return overlay(updates, rest), (state_one, state_other)

    return optax.GradientTransformationExtraArgs(init, update)
