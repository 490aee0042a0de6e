"""The forward pass for a handful of rows per expert, as in decoding. It takes the time needed to read the live weights.

A dot per expert would first copy the expert's weights out of [E, D, F] and pack them, only to use each of them once.
Here every row reads its expert's weights in place, a few rows of the matrix at a time, in one elementwise loop over all
rows. So all threads share the work, and rows of the same expert, which are adjacent, find the weights in the cache.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.arrays import zeros_varying_as
from anyexperts_jax.ops._dots import from_bits, to_bits, wide_dtype
from anyexperts_jax.ops._swiglu import swiglu
from anyexperts_jax.ops.experts import ExpertWeights, StackedExperts
from anyexperts_jax.ops.slot_order import SlotOrder

_STEP = 8  # rows of a weight matrix per pass; 16 and more are slower in bfloat16


def few_rows(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: ExpertWeights | StackedExperts,
) -> Float[Array, "R D"]:
    """The weighted output at each place of the order, in float32 or wider; arbitrary after the real slots."""
    stacked = experts if isinstance(experts, StackedExperts) else StackedExperts(experts, jnp.int32(0))
    w_gate_EDF, w_up_EDF, w_down_EFD = stacked.weights
    ends_E = order.starts_E + order.counts_E
    last_live = jnp.argmax(jnp.where(order.counts_E > 0, ends_E, 0))
    expert_R = jnp.searchsorted(ends_E, jnp.arange(order.slots_R.size, dtype=jnp.int32), side="right")
    expert_R = jnp.minimum(expert_R, last_live)  # places after the real slots read weights that are in the cache anyway
    expert_R = expert_R + stacked.first
    x_RD = x_ND[order.slots_R // weights_NK.shape[1]]
    gate_RF, up_RF = _own_expert(x_RD, expert_R, w_gate_EDF, w_up_EDF)
    (y_RD,) = _own_expert(swiglu(gate_RF, up_RF, x_ND.dtype), expert_R, w_down_EFD)
    return y_RD * weights_NK.reshape(-1)[order.slots_R][:, None].astype(y_RD.dtype)


def _own_expert(
    x_RI: Float[Array, "R I"], expert_R: Int[Array, "R"], *weights_EIJ: Float[Array, "E I J"]
) -> tuple[Float[Array, "R J"], ...]:
    """Multiplies each row of x with its expert's matrix, one product for each of `weights_EIJ`."""
    dtype, wide = x_RI.dtype, wide_dtype(x_RI.dtype)
    step = math.gcd(x_RI.shape[1], _STEP)

    def add_step(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        # Without the barrier XLA hoists the conversion to float32 and converts all weights before the loop.
        weights, i = lax.optimization_barrier((weights_EIJ, i))
        x_RS = lax.dynamic_slice_in_dim(x_RI, i * step, step, axis=1).astype(wide)
        for s in range(step):
            rows = (to_bits(w).at[expert_R, i * step + s].get(mode="promise_in_bounds") for w in weights)
            totals = tuple(
                total + x_RS[:, s, None] * from_bits(row_RJ, w.dtype).astype(dtype).astype(wide)
                for total, row_RJ, w in zip(totals, rows, weights, strict=True)
            )
        return totals

    zeros = tuple(zeros_varying_as(x_RI, (x_RI.shape[0], w.shape[2]), wide) for w in weights_EIJ)
    return lax.fori_loop(0, x_RI.shape[1] // step, add_step, zeros)
