"""Parameters that a run leaves as they are: no gradient, no optimiser state, not a bit changed.

A tree of what is trained has the parameters' structure with None where one is frozen.
"""

from typing import Any

import jax
import optax


def select(params: Any, trainable: Any) -> Any:
    """The parameters where the tree of bools `trainable` is True, None elsewhere; all of them where it is None."""
    if trainable is None:
        return params
    return jax.tree.map(lambda kept, param: param if kept else None, trainable, params)


def overlay(selected: Any, params: Any) -> Any:
    """`params` with what `selected` has in its place."""
    return jax.tree.map(lambda new, old: old if new is None else new, selected, params, is_leaf=lambda x: x is None)


def only(optimizer: optax.GradientTransformation, trainable: Any) -> optax.GradientTransformationExtraArgs:
    """`optimizer` on what is trainable alone: its state holds nothing of the rest, its updates are None there.

    It takes gradients that are None where frozen, and parameters either way.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return inner.update(grads, state, None if params is None else select(params, trainable), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(select(params, trainable)), update)


def side_by_side(
    one: optax.GradientTransformationExtraArgs,
    one_trains: Any,
    other: optax.GradientTransformationExtraArgs,
    other_trains: Any,
) -> optax.GradientTransformationExtraArgs:
    """Two optimisers made by `only`, each for its own parameters; each clips its own gradient."""

    def init(params: Any) -> tuple[Any, Any]:
        return one.init(params), other.init(params)

    def update(grads: Any, state: tuple[Any, Any], params: Any = None, **extra: Any) -> tuple[Any, tuple[Any, Any]]:
        updates, state_one = one.update(select(grads, one_trains), state[0], params, **extra)
        rest, state_other = other.update(select(grads, other_trains), state[1], params, **extra)
        return overlay(updates, rest), (state_one, state_other)

    return optax.GradientTransformationExtraArgs(init, update)
