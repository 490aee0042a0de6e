"""By way of the block-aligned buffer: tokens gathered into rows, the expert MLP over the rows, their weighted sum.

The three parts have their own derivatives, and so has the whole. Rows that belong to no slot are computed by nobody
and read by nobody: the MLP skips their blocks, the sum picks each slot's row.
"""

from collections.abc import Callable

from jaxtyping import Array, Float

from anyexperts_jax.ops.aligned_rows import align_rows
from anyexperts_jax.ops.row_map import combine_rows, take_rows
from anyexperts_jax.ops.slot_order import SlotOrder

# (x_RD, starts_E, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD) -> y_RD, differentiable in x and the weights. Each of
# starts_E is a multiple of the buffer's block. A dead row may hold anything in x_RD and in the gradient of y_RD; in
# y_RD and in the gradient of x_RD it is zero where its tile has a live row, and may hold anything elsewhere.
AlignedMlp = Callable[..., Array]


def routed_mlp(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    *,
    mlp: AlignedMlp,
    block: int,
) -> Float[Array, "N D"]:
    row_map, starts_E = align_rows(order, block)
    x_RD = take_rows(x_ND, row_map)
    y_RD = mlp(x_RD, starts_E, order.counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)
    return combine_rows(y_RD, weights_NK, row_map)
