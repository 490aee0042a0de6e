"""Chooses the XLA form by shape: the number of rows per expert decides where the time goes."""

from jaxtyping import Array, Float

from anyexperts_jax.ops.experts import StackedExperts
from anyexperts_jax.ops.routed_mlp import loop
from anyexperts_jax.ops.routed_mlp.few_rows import few_rows
from anyexperts_jax.ops.slot_order import SlotOrder

FEW_ROWS = 2  # mean slots per expert up to which reading each row's weights in place is faster


def forward_of_few_rows(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: loop.Experts | StackedExperts,
) -> Float[Array, "N D"]:
    """y_ND without residuals, for few rows. The experts may be those of one layer among those of all layers."""
    y_RD = few_rows(x_ND, weights_NK, order, experts)
    return loop.sum_slots(y_RD, order, y_RD.dtype)


def forward(
    x_ND: Float[Array, "N D"], weights_NK: Float[Array, "N K"], order: SlotOrder, experts: loop.Experts, *, keep: bool
) -> tuple[Float[Array, "N D"], loop.Kept | None]:
    """(y_ND, residuals for `loop.backward` if `keep`)."""
    if not keep and order.slots_R.size <= FEW_ROWS * order.counts_E.size:
        return forward_of_few_rows(x_ND, weights_NK, order, experts), None
    return loop.forward(x_ND, weights_NK, order, experts, keep=keep)
