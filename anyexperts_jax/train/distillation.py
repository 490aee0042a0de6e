"""Self-distillation to a budget: the model at a drawn budget learns from itself as it was when the run began.

The teacher has the run's initial parameters and the configuration's own window of slots. It shares frozen parameters
with the model. The optimiser's state keeps a copy of the others, so that checkpoints include it and a mesh splits it
like any other state.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from anyexperts_jax.train.frozen import overlay, select


class TaughtState(NamedTuple):
    """An optimiser's state, and the trained parameters as they were before the first step."""

    inner: Any
    teacher: Any  # None where a parameter is frozen


def keep_teacher(
    optimizer: optax.GradientTransformationExtraArgs, trainable: Any
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with a `TaughtState` as its state; the updates are the same."""

    def init(params: Any) -> TaughtState:
        return TaughtState(optimizer.init(params), select(params, trainable))

    def update(grads: Any, state: TaughtState, params: Any = None, **extra: Any) -> tuple[Any, TaughtState]:
        updates, inner = optimizer.update(grads, state.inner, params, **extra)
        return updates, TaughtState(inner, state.teacher)

    return optax.GradientTransformationExtraArgs(init, update)


def teacher_params(state: TaughtState, params: Any) -> Any:
    """All parameters of the teacher. No gradient flows through them."""
    return jax.lax.stop_gradient(overlay(state.teacher, params))


def hidden_distance(
    teacher: Sequence[Float[Array, "... B T D"]],
    student: Sequence[Float[Array, "... B T D"]],
    mask_BT: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """|student - teacher|^2 / |teacher|^2 of a position's hidden state, in float32: the mean over layers, summed over
    the positions of the mask.

    Args:
      teacher, student: hidden states, those of one layer or of several stacked in each entry.
    """
    found, layers = jnp.zeros(mask_BT.shape, jnp.float32), 0
    for theirs, ours in zip(teacher, student, strict=True):
        theirs_LBTD, ours_LBTD = (jnp.reshape(one, (-1, *one.shape[-3:])).astype(jnp.float32) for one in (theirs, ours))
        size_LBT = jnp.square(theirs_LBTD).sum(axis=-1)
        distance_LBT = jnp.square(ours_LBTD - theirs_LBTD).sum(axis=-1)
        found += (distance_LBT / jnp.maximum(size_LBT, 1e-12)).sum(axis=0)
        layers += theirs_LBTD.shape[0]
    return jnp.where(mask_BT, found / layers, 0.0).sum()


def divergence(
    teacher_BTY: Float[Array, "B T Y"], student_BTY: Float[Array, "B T Y"], mask_BT: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """KL(teacher || student) of the next token in nats, in float32, summed over the positions of the mask."""
    teacher_BTY = jax.nn.log_softmax(teacher_BTY.astype(jnp.float32), axis=-1)
    student_BTY = jax.nn.log_softmax(student_BTY.astype(jnp.float32), axis=-1)
    nats_BT = jnp.sum(jnp.exp(teacher_BTY) * (teacher_BTY - student_BTY), axis=-1)
    return jnp.where(mask_BT, nats_BT, 0.0).sum()
