"""Chooses the XLA form by shape: the number of rows per expert decides where the time goes."""

from jaxtyping import Array, Float

from anyexperts_jax.ops.routed_mlp import loop
from anyexperts_jax.ops.routed_mlp.few_rows import few_rows
from anyexperts_jax.ops.slot_order import SlotOrder

_FEW_ROWS = 2  # mean slots per expert up to which reading each row's weights in place is faster


def forward(
    x_ND: Float[Array, "N D"], weights_NK: Float[Array, "N K"], order: SlotOrder, experts: loop.Experts, *, keep: bool
) -> tuple[Float[Array, "N D"], loop.Kept | None]:
    """(y_ND, residuals for `loop.backward` if `keep`)."""
    if not keep and order.slots_R.size / order.counts_E.size <= _FEW_ROWS:
        y_RD = few_rows(x_ND, weights_NK, order, experts)
        return loop.sum_slots(y_RD, order, y_RD.dtype), None
    return loop.forward(x_ND, weights_NK, order, experts, keep=keep)
