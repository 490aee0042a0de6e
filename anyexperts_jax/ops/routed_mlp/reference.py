"""The definition, with JAX's own derivatives: every expert runs over all rows and keeps its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.arrays import zeros_varying_as
from anyexperts_jax.ops._dots import dot, wide_dtype
from anyexperts_jax.ops._swiglu import swiglu
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.slot_order import SlotOrder


def routed_mlp(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: ExpertWeights,
) -> Float[Array, "N D"]:
    wide = wide_dtype(x_ND.dtype)
    tokens_R = order.slots_R // weights_NK.shape[1]
    weight_R1 = weights_NK.reshape(-1)[order.slots_R][:, None].astype(wide)
    x_RD = x_ND[tokens_R]
    place_R = jnp.arange(tokens_R.size, dtype=jnp.int32)

    def add_expert(y_RD: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        start, count, w_gate_DF, w_up_DF, w_down_FD = expert
        own_R1 = ((place_R >= start) & (place_R < start + count))[:, None]
        own_RD = jnp.where(own_R1, x_RD, 0)
        hidden_RF = swiglu(dot("RD,DF->RF", own_RD, w_gate_DF), dot("RD,DF->RF", own_RD, w_up_DF), x_ND.dtype)
        return y_RD + jnp.where(own_R1, weight_R1 * dot("RF,FD->RD", hidden_RF, w_down_FD), 0), None

    each = (order.starts_E, order.counts_E, *experts)
    y_RD, _ = jax.lax.scan(add_expert, zeros_varying_as(x_RD, x_RD.shape, wide), each)
    return jnp.zeros(x_ND.shape, wide).at[tokens_R].add(y_RD)
