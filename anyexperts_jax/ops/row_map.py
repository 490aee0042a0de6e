"""`RowMap`: dispatches tokens into the rows of a buffer and combines a token's rows, each with its gradient.

Nothing here scatters floats, forward or backward: a row knows its token and a slot knows its row, so the transpose of
a gather is another gather. Scatters of floats are slow on accelerators and, with atomics, not deterministic. A token's
K slots are summed by K fused multiply-adds in slot order; there is no [N, K, D] array. Rows without a slot never affect
a result.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from anyexperts_jax.core.derivatives import Differentiable, linear
from anyexperts_jax.ops._dots import wide_dtype


class RowMap(NamedTuple):
    """Which token each buffer row holds, and in which row each slot is."""

    tokens_R: Int[Array, "R"]
    slots_R: Int[Array, "R"]  # the row's slot, n * K + k
    live_R: Bool[Array, "R"]  # False: the row holds no slot; its token and slot are arbitrary
    rows_NK: Int[Array, "N K"]  # arbitrary where `held_NK` is False
    held_NK: Bool[Array, "N K"]  # False: the slot is empty or was dropped


@Differentiable
def take_rows(x_ND: Float[Array, "N D"], row_map: RowMap) -> Float[Array, "R D"]:
    """Dispatch: the token of each row; zeros in rows without one."""
    return jnp.where(row_map.live_R[:, None], x_ND[row_map.tokens_R], 0)


def _take_rows_backward(row_map: RowMap, d_x_RD: Float[Array, "R D"]) -> tuple[Array, None]:
    return sum_rows(d_x_RD, row_map.held_NK, row_map).astype(d_x_RD.dtype), None


def _take_rows_forward(x_ND: Float[Array, "N D"], row_map: RowMap) -> tuple[Array, RowMap]:
    return take_rows.run(x_ND, row_map), row_map


take_rows.defvjp(_take_rows_forward, _take_rows_backward, definition=take_rows.run)


@Differentiable
def combine_rows(y_RD: Float[Array, "R D"], weights_NK: Float[Array, "N K"], row_map: RowMap) -> Float[Array, "N D"]:
    """Combine: sums weight * row over each token's held slots. Accumulated and returned in float32 or wider."""
    return sum_rows(y_RD, weights_NK, row_map)


def _combine_rows_backward(
    residuals: tuple[Array, Array, RowMap], d_ND: Float[Array, "N D"]
) -> tuple[Array, Array, None]:
    y_RD, weights_NK, row_map = residuals
    # Dead rows have an arbitrary slot, so their weight must be zeroed for their gradient to be zero.
    weight_R = jnp.where(row_map.live_R, weights_NK.reshape(-1)[row_map.slots_R], 0)
    wide = d_ND.dtype
    d_y_RD = (d_ND[row_map.tokens_R] * weight_R[:, None].astype(wide)).astype(y_RD.dtype)
    # One slot at a time: gathering all rows at once would make an [N, K, D] array.
    d_weights_KN = [(y_RD[row_map.rows_NK[:, k]].astype(wide) * d_ND).sum(-1) for k in range(weights_NK.shape[1])]
    d_weights_NK = jnp.where(row_map.held_NK, jnp.stack(d_weights_KN, axis=1), 0).astype(weights_NK.dtype)
    return d_y_RD, d_weights_NK, None


def _combine_rows_forward(*operands: Any) -> tuple[Array, tuple[Any, ...]]:
    return sum_rows(*operands), operands


combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward, definition=combine_rows.run)


def add_rows(y_RD: Float[Array, "R D"], row_map: RowMap) -> Float[Array, "N D"]:
    """Combine without weights: sums each token's rows, in float32 or wider. Its backward pass does not need y."""

    def add(y_RD: Array, row_map: RowMap) -> Array:
        return sum_rows(y_RD, row_map.held_NK, row_map)

    def spread(d_ND: Array, row_map: RowMap) -> Array:
        return linear(take, add_alike, d_ND.astype(y_RD.dtype), row_map)

    def take(d_ND: Array, row_map: RowMap) -> Array:
        return jnp.where(row_map.live_R[:, None], d_ND[row_map.tokens_R], 0)

    def add_alike(d_RD: Array, row_map: RowMap) -> Array:
        return add_rows(d_RD, row_map).astype(d_RD.dtype)

    return linear(add, spread, y_RD, row_map)


def sum_rows(y_RD: Float[Array, "R D"], weights_NK: Shaped[Array, "N K"], row_map: RowMap) -> Float[Array, "N D"]:
    """`combine_rows` without a custom derivative."""
    wide = wide_dtype(y_RD.dtype)
    total_ND = jnp.zeros((weights_NK.shape[0], y_RD.shape[1]), wide)
    for k in range(weights_NK.shape[1]):
        row_ND = y_RD[row_map.rows_NK[:, k]].astype(wide) * weights_NK[:, k, None].astype(wide)
        # Select, not multiply by zero: the row of a slot that is not held is arbitrary and may be NaN.
        total_ND += jnp.where(row_map.held_NK[:, k, None], row_ND, 0)
    return total_ND
