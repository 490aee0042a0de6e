"""The form chosen by shape: how many rows an expert has decides what time goes into."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.ops.routed_mlp import batched, loop
from anyexperts_jax.ops.routed_mlp.few_rows import few_rows
from anyexperts_jax.ops.slot_order import SlotOrder

_FEW_ROWS = 2  # slots an expert, on average, up to which reading each row's weights in place is faster
_BATCH_ROWS = 128  # slots an expert, on average, up to which all at once are faster than one after the other

Kept = loop.Kept | batched.Kept


def forward(
    x_ND: Float[Array, "N D"], weights_NK: Float[Array, "N K"], order: SlotOrder, experts: loop.Experts, *, keep: bool
) -> tuple[Float[Array, "N D"], Kept | None]:
    """(y_ND, what `backward` needs if `keep`)."""
    slots_per_expert = weights_NK.size / order.counts_E.size
    if not keep and slots_per_expert <= _FEW_ROWS:
        y_RD = few_rows(x_ND, weights_NK, order, experts)
        return loop.sum_slots(y_RD, order, y_RD.dtype), None
    if slots_per_expert <= _BATCH_ROWS and has_fast_batched_dots(x_ND.dtype):
        return batched.forward(x_ND, weights_NK, order, experts, keep=keep)
    return loop.forward(x_ND, weights_NK, order, experts, keep=keep)


def has_fast_batched_dots(dtype: jnp.dtype) -> bool:
    """Whether a batched dot is no slower than as many dots. Measured on CPU, 128 x [72, 2048] x [2048, 768] in float32:
    JAX 0.10 takes 1.9 times as long as a loop, JAX 0.12 0.8 times; bfloat16 is slower batched in both."""
    return dtype == jnp.float32 and jax.__version_info__ >= (0, 12)


def backward(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: loop.Experts,
    kept: Kept,
    d_y_ND: Float[Array, "N D"],
) -> tuple[Float[Array, "N D"], Float[Array, "N K"], loop.Experts]:
    """Gradients of x, the slots' weights and the experts' weights."""
    if isinstance(kept, batched.Kept):
        return batched.backward(x_ND, weights_NK, order, experts, kept, d_y_ND)
    return loop.backward(x_ND, weights_NK, order, experts, kept, d_y_ND)
