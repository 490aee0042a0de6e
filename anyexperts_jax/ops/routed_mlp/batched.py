"""All experts at once on as many rows as most of them have, and a loop over what is left of the others.

With few rows an expert, time is what reading the weights takes: a loop over experts copies each expert's out of
[E, D, F] before its dots read them, a batched dot reads them where they lie. Its buffer holds the mean load and one
deviation of a fair draw, so little is padding; rows beyond it, of about one expert in six, go through the loop.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from anyexperts_jax.ops._dots import dot, from_bits, row_contraction, to_bits, wide_dtype
from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp
from anyexperts_jax.ops.routed_mlp import loop
from anyexperts_jax.ops.slot_order import SlotOrder


class Kept(NamedTuple):
    """What the backward pass needs of the forward one, in x's dtype."""

    gate_ECF: Float[Array, "E C F"]
    up_ECF: Float[Array, "E C F"]
    rest: loop.Kept


class _Split(NamedTuple):
    """Which places the batch takes, and the order of the rest."""

    place_EC: Int[Array, "E C"]
    live_EC1: Bool[Array, "E C 1"]
    rest: SlotOrder


def batch_rows(num_slots: int, num_tokens: int, num_experts: int) -> int:
    """C: the mean load and one deviation of a fair draw."""
    mean = num_slots / num_experts
    return loop.round_up(min(num_tokens, mean + math.sqrt(mean)))


def rest_sizes(rows: int) -> tuple[int, ...]:
    """Row counts the loop over the rest is compiled for."""
    return tuple(sorted({0, loop.ROW_STEP, 2 * loop.ROW_STEP, loop.round_up(rows / 2), rows}))


def forward(
    x_ND: Float[Array, "N D"], weights_NK: Float[Array, "N K"], order: SlotOrder, experts: loop.Experts, *, keep: bool
) -> tuple[Float[Array, "N D"], Kept | None]:
    """(y_ND, gate and up if `keep`)."""
    rows = batch_rows(weights_NK.size, x_ND.shape[0], order.counts_E.size)
    split, dtype = _split(order, rows), x_ND.dtype
    w_gate_EDF, w_up_EDF, w_down_EFD = experts
    x_ECD, weight_EC1 = _batch_operands(x_ND, weights_NK, order, split)
    gate_ECF, up_ECF = dot("ECD,EDF->ECF", x_ECD, w_gate_EDF), dot("ECD,EDF->ECF", x_ECD, w_up_EDF)
    y_ECD = weight_EC1 * dot("ECF,EFD->ECD", swiglu(gate_ECF, up_ECF, dtype), w_down_EFD)
    rest_RD, rest = loop.forward_rows(x_ND, weights_NK, split.rest, experts, rest_sizes(rows), keep=keep)
    y_ND = _sum_slots(to_bits(y_ECD.astype(dtype)), rest_RD, order, dtype)
    return y_ND, None if rest is None else Kept(gate_ECF.astype(dtype), up_ECF.astype(dtype), rest)


def backward(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: loop.Experts,
    kept: Kept,
    d_y_ND: Float[Array, "N D"],
) -> tuple[Float[Array, "N D"], Float[Array, "N K"], loop.Experts]:
    """Gradients of x, the slots' weights and the experts' weights.

    In a dtype narrower than float32 the weights' gradient of an expert that overflows the batch is a sum of two
    rounded parts.
    """
    rows = kept.gate_ECF.shape[1]
    split, dtype = _split(order, rows), x_ND.dtype
    w_gate_EDF, w_up_EDF, w_down_EFD = experts
    x_ECD, weight_EC1 = _batch_operands(x_ND, weights_NK, order, split)
    d_y_ECD = _rows(d_y_ND.astype(dtype), weights_NK, order, split)
    d_hidden_ECF = dot("ECD,EFD->ECF", d_y_ECD, w_down_EFD)  # as if the slot's weight were 1
    hidden_ECF, d_gate_ECF, d_up_ECF = swiglu_vjp(kept.gate_ECF, kept.up_ECF, weight_EC1 * d_hidden_ECF)
    d_weight_EC = (hidden_ECF * d_hidden_ECF).sum(axis=-1)
    d_gate_ECF, d_up_ECF = d_gate_ECF.astype(dtype), d_up_ECF.astype(dtype)
    d_x_ECD = dot("ECF,EDF->ECD", d_gate_ECF, w_gate_EDF) + dot("ECF,EDF->ECD", d_up_ECF, w_up_EDF)
    batch_experts = (
        row_contraction(x_ECD, d_gate_ECF).astype(dtype),
        row_contraction(x_ECD, d_up_ECF).astype(dtype),
        row_contraction((weight_EC1 * hidden_ECF).astype(dtype), d_y_ECD).astype(dtype),
    )
    d_x_RD, d_weight_R, d_experts = loop.backward_rows(
        x_ND, weights_NK, split.rest, experts, kept.rest, d_y_ND, rest_sizes(rows), batch_experts
    )
    d_x_ND = _sum_slots(to_bits(d_x_ECD.astype(dtype)), d_x_RD, order, dtype).astype(dtype)
    in_batch_NK, row_NK = _batch_row(order, rows)
    d_weights_NK = jnp.where(in_batch_NK, d_weight_EC.reshape(-1)[row_NK], d_weight_R[order.places_NK])
    return d_x_ND, jnp.where(loop.held(order), d_weights_NK, 0).astype(weights_NK.dtype), d_experts


def _split(order: SlotOrder, rows: int) -> _Split:
    place_in_expert_C = jnp.arange(rows)
    place_EC = jnp.minimum(order.starts_E[:, None] + place_in_expert_C, order.slots_R.size - 1)
    taken_E = jnp.minimum(order.counts_E, rows)
    rest = order._replace(starts_E=order.starts_E + taken_E, counts_E=order.counts_E - taken_E)
    return _Split(place_EC, (place_in_expert_C < taken_E[:, None])[..., None], rest)


def _batch_operands(
    x_ND: Array, weights_NK: Array, order: SlotOrder, split: _Split
) -> tuple[Float[Array, "E C D"], Float[Array, "E C 1"]]:
    """(x, the slots' weights), zero where an expert has no row."""
    weight_EC1 = weights_NK.reshape(-1)[order.slots_R[split.place_EC]][..., None].astype(wide_dtype(x_ND.dtype))
    return _rows(x_ND, weights_NK, order, split), jnp.where(split.live_EC1, weight_EC1, 0)


def _rows(a_ND: Array, weights_NK: Array, order: SlotOrder, split: _Split) -> Float[Array, "E C D"]:
    """The tokens' rows of `a_ND` in the batch's places, zero where an expert has no row."""
    tokens_EC = order.slots_R[split.place_EC] // weights_NK.shape[1]
    return jnp.where(split.live_EC1, from_bits(to_bits(a_ND)[tokens_EC], a_ND.dtype), 0)


def _batch_row(order: SlotOrder, rows: int) -> tuple[Bool[Array, "N K"], Int[Array, "N K"]]:
    """(whether a slot is in the batch, its row e * C + c there or 0)."""
    ends_E = order.starts_E + order.counts_E
    expert_NK = jnp.minimum(jnp.searchsorted(ends_E, order.places_NK, side="right"), ends_E.size - 1)
    place_NK = order.places_NK - order.starts_E[expert_NK]
    in_batch_NK = loop.held(order) & (place_NK < rows)
    return in_batch_NK, jnp.where(in_batch_NK, expert_NK * rows + place_NK, 0)


def _sum_slots(
    batch_bits_ECD: Shaped[Array, "E C D"], rest_bits_RD: Shaped[Array, "RB D"], order: SlotOrder, dtype: jnp.dtype
) -> Float[Array, "N D"]:
    """The sum of each token's held rows, from the batch or from the rest."""
    held_NK, wide = loop.held(order), wide_dtype(dtype)
    in_batch_NK, row_NK = _batch_row(order, batch_bits_ECD.shape[1])
    batch_bits_SD = batch_bits_ECD.reshape(-1, batch_bits_ECD.shape[2])
    total_ND = jnp.zeros((held_NK.shape[0], batch_bits_SD.shape[1]), wide)
    for k in range(held_NK.shape[1]):
        row_ND = jnp.where(in_batch_NK[:, k, None], batch_bits_SD[row_NK[:, k]], rest_bits_RD[order.places_NK[:, k]])
        total_ND += jnp.where(held_NK[:, k, None], from_bits(row_ND, dtype).astype(wide), 0)
    return total_ND
