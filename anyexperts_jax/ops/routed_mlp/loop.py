"""A loop over the experts, each over its own rows only.

Each expert's weights are sliced out of [E, D, F] once, rows are gathered inside the loop, and buffers stay small enough
for the cache. That decides the time on a CPU: at 64 rows per expert, reading the weights costs more than the dots.
Shapes are static, so an expert's rows go through the smallest compiled size that holds them. An expert with more rows
than the largest size, as under an untrained router, takes blocks of that size, and the rest goes through the smallest
of a few sizes that holds it.

Rounding up also computes places of the slot order beyond the expert's own. The next expert overwrites them, and no slot
reads those after the last expert's.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from anyexperts_jax.core.arrays import zeros_varying_as
from anyexperts_jax.ops._dots import dot, from_bits, row_contraction, to_bits, wide_dtype
from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.slot_order import SlotOrder

Experts = ExpertWeights
Expert = tuple[Float[Array, "D F"], Float[Array, "D F"], Float[Array, "F D"]]
ROW_STEP = 8
_SIZE_RATIO = 0.88


class Kept(NamedTuple):
    """The residuals for the backward pass: gate and up at every place, as bits of x's dtype (`to_bits`)."""

    gate_RF: Shaped[Array, "RB F"]
    up_RF: Shaped[Array, "RB F"]


def row_sizes(num_slots: int, num_tokens: int, num_experts: int) -> tuple[int, ...]:
    """The compiled row counts, ascending from 0. The largest is the mean load plus four standard deviations of a
    balanced random assignment."""
    mean = num_slots / num_experts
    largest = round_up(min(num_tokens, mean + 4 * math.sqrt(mean)))
    sizes = {0, largest}
    size: float = largest
    while size > largest / 4 and size > ROW_STEP:
        size *= _SIZE_RATIO
        sizes.add(round_up(size))
    return tuple(sorted(sizes | {round_up(largest / 8)}))


def round_up(rows: float) -> int:
    """Rounds up to a multiple of `ROW_STEP`."""
    return ROW_STEP * math.ceil(rows / ROW_STEP)


def forward(
    x_ND: Float[Array, "N D"], weights_NK: Float[Array, "N K"], order: SlotOrder, experts: Experts, *, keep: bool
) -> tuple[Float[Array, "N D"], Kept | None]:
    """(y_ND, residuals if `keep`)."""
    sizes = row_sizes(order.slots_R.size, x_ND.shape[0], order.counts_E.size)
    block, dtype, wide = sizes[-1], x_ND.dtype, wide_dtype(x_ND.dtype)
    tokens_R, weight_R = _padded_rows(order, weights_NK, block)
    x_bits_ND = to_bits(x_ND)

    def compute(size: int, start: Array, e: Array) -> tuple[Array, ...]:
        w_gate_DF, w_up_DF, w_down_FD = _load(experts, e)
        x_BD = from_bits(_rows(x_bits_ND, lax.dynamic_slice_in_dim(tokens_R, start, size)), dtype)
        gate_BF, up_BF = dot("BD,DF->BF", x_BD, w_gate_DF), dot("BD,DF->BF", x_BD, w_up_DF)
        y_BD = dot("BF,FD->BD", swiglu(gate_BF, up_BF, dtype), w_down_FD)
        y_BD *= lax.dynamic_slice_in_dim(weight_R, start, size).astype(wide)[:, None]
        rows = (y_BD, gate_BF, up_BF) if keep else (y_BD,)
        return tuple(jnp.pad(to_bits(a.astype(dtype)), ((0, block - size), (0, 0))) for a in rows)

    def run_expert(i: Array, buffers: tuple[Array, ...]) -> tuple[Array, ...]:
        e = live_E[i]
        start, count = order.starts_E[e], order.counts_E[e]
        # One branch per compiled size; `lax.switch` runs only the one that fits.
        branches = [lambda size=size: compute(size, start, e) for size in sizes]
        buffers = _write(buffers, lax.switch(_size_index(sizes, count), branches), start)

        def run_block(i: Array, buffers: tuple[Array, ...]) -> tuple[Array, ...]:
            first = start + i * block
            branches = [lambda size=size: compute(size, first, e) for size in _further_sizes(sizes)]
            rows = lax.switch(_size_index(_further_sizes(sizes), count - i * block), branches)
            return _write(buffers, rows, first)

        return lax.fori_loop(1, -(-count // block), run_block, buffers)

    widths = (x_ND.shape[1], *([experts.gate_EDF.shape[2]] * 2 if keep else []))
    bits = to_bits(jnp.zeros((), dtype)).dtype
    empty = tuple(zeros_varying_as(x_ND, (tokens_R.size, width), bits) for width in widths)
    # Experts with rows come first, so the loop ends before it reads the weights of the others.
    live_E = jnp.argsort(order.counts_E == 0, stable=True).astype(jnp.int32)
    y_RD, *kept = lax.fori_loop(0, (order.counts_E > 0).sum(dtype=jnp.int32), run_expert, empty)
    return sum_slots(y_RD, order, dtype), Kept(*kept) if keep else None


def backward(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: Experts,
    kept: Kept,
    d_y_ND: Float[Array, "N D"],
) -> tuple[Float[Array, "N D"], Float[Array, "N K"], Experts]:
    """Gradients of x, the combine weights and the experts' weights."""
    sizes = row_sizes(order.slots_R.size, x_ND.shape[0], order.counts_E.size)
    block, dtype, wide = sizes[-1], x_ND.dtype, wide_dtype(x_ND.dtype)
    tokens_R, weight_R = _padded_rows(order, weights_NK, block)
    x_bits_ND, d_y_bits_ND = to_bits(x_ND), to_bits(d_y_ND.astype(dtype))

    def compute(size: int, start: Array, count: Array, e: Array) -> tuple[Array, ...]:
        w_gate_DF, w_up_DF, w_down_FD = _load(experts, e)
        # Unlike in the forward pass, rows beyond the expert's own must be zeroed: the weight gradients sum over rows.
        own_B1 = (jnp.arange(size, dtype=jnp.int32) < count)[:, None]

        def own(rows: Array) -> Array:
            return jnp.where(own_B1, from_bits(rows, dtype), 0)

        tokens_B = lax.dynamic_slice_in_dim(tokens_R, start, size)
        x_BD, d_y_BD = own(_rows(x_bits_ND, tokens_B)), own(_rows(d_y_bits_ND, tokens_B))
        gate_BF, up_BF = (own(lax.dynamic_slice_in_dim(a, start, size)) for a in kept)
        weight_B1 = jnp.where(own_B1, lax.dynamic_slice_in_dim(weight_R, start, size).astype(wide)[:, None], 0)
        # Unweighted, so that its product with hidden is the gradient of the combine weight.
        d_hidden_BF = dot("BD,FD->BF", d_y_BD, w_down_FD)
        hidden_BF, d_gate_BF, d_up_BF = swiglu_vjp(gate_BF, up_BF, weight_B1 * d_hidden_BF)
        d_weight_B1 = (hidden_BF * d_hidden_BF).sum(-1, keepdims=True)
        d_gate_BF, d_up_BF = d_gate_BF.astype(dtype), d_up_BF.astype(dtype)
        d_x_BD = dot("BF,DF->BD", d_gate_BF, w_gate_DF) + dot("BF,DF->BD", d_up_BF, w_up_DF)
        d_x_BD, d_weight_B1 = (
            jnp.pad(a, ((0, block - size), (0, 0))) for a in (to_bits(d_x_BD.astype(dtype)), d_weight_B1)
        )
        d_down_FD = row_contraction((weight_B1 * hidden_BF).astype(dtype), d_y_BD)
        return d_x_BD, d_weight_B1, row_contraction(x_BD, d_gate_BF), row_contraction(x_BD, d_up_BF), d_down_FD

    def run_expert(i: Array, gradients: tuple[Array, ...]) -> tuple[Array, ...]:
        e = live_E[i]
        start, count = order.starts_E[e], order.counts_E[e]
        branches = [lambda size=size: compute(size, start, count, e) for size in sizes]
        *rows, d_gate_DF, d_up_DF, d_down_FD = lax.switch(_size_index(sizes, count), branches)
        buffers = _write(gradients[:2], tuple(rows), start)

        def run_block(i: Array, carry: tuple) -> tuple:
            buffers, d_weights = carry
            first, rest = start + i * block, count - i * block
            branches = [lambda size=size: compute(size, first, rest, e) for size in _further_sizes(sizes)]
            *rows, d_gate_DF, d_up_DF, d_down_FD = lax.switch(_size_index(_further_sizes(sizes), rest), branches)
            d_weights = tuple(a + b for a, b in zip(d_weights, (d_gate_DF, d_up_DF, d_down_FD), strict=True))
            return _write(buffers, tuple(rows), first), d_weights

        carry = (buffers, (d_gate_DF, d_up_DF, d_down_FD))
        buffers, d_weights = lax.fori_loop(1, -(-count // block), run_block, carry)
        own = (to_bits(a.astype(dtype)) for a in d_weights)
        return *buffers, *(
            lax.dynamic_update_index_in_dim(total, a, e, 0) for total, a in zip(gradients[2:], own, strict=True)
        )

    d_x_RD = zeros_varying_as(x_ND, (tokens_R.size, x_ND.shape[1]), to_bits(jnp.zeros((), dtype)).dtype)
    zeros = (zeros_varying_as(x_ND, w.shape, to_bits(w).dtype) for w in experts)
    gradients = (d_x_RD, zeros_varying_as(x_ND, (tokens_R.size, 1), wide), *zeros)
    live_E = jnp.argsort(order.counts_E == 0, stable=True).astype(jnp.int32)
    d_x_RD, d_weight_R1, *totals = lax.fori_loop(0, (order.counts_E > 0).sum(dtype=jnp.int32), run_expert, gradients)
    d_gate, d_up, d_down = (from_bits(w, dtype) for w in totals)
    d_weights_NK = jnp.where(order.held_NK, d_weight_R1[order.places_NK, 0], 0).astype(weights_NK.dtype)
    return sum_slots(d_x_RD, order, dtype).astype(dtype), d_weights_NK, Experts(d_gate, d_up, d_down)


def _padded_rows(order: SlotOrder, weights_NK: Float[Array, "N K"], block: int) -> tuple[Array, Array]:
    """(token, weight) of each place, with `block` more places at the end: `dynamic_slice` clamps a start whose slice
    would run over the end, and so would shift the rows."""
    slots_R = jnp.pad(order.slots_R, (0, block))
    return slots_R // weights_NK.shape[1], weights_NK.reshape(-1)[slots_R]


def _further_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes for an expert's blocks after the first: every third, including the largest, to compile less."""
    return sizes[::-3][::-1]


def _size_index(sizes: tuple[int, ...], count: Array) -> Array:
    """The index of the smallest size that holds `count` rows, or of the largest size."""
    return jnp.searchsorted(jnp.asarray(sizes, jnp.int32), jnp.minimum(count, sizes[-1]))


def _rows(a_NI: Shaped[Array, "N I"], tokens_B: Int[Array, "B"]) -> Shaped[Array, "B I"]:
    """Gathers the tokens' rows. Indices are known to be valid, so no bounds are checked."""
    return a_NI.at[tokens_B].get(mode="promise_in_bounds")


def _load(experts: Experts, e: Array) -> Expert:
    """Slices expert e's weights, inside the branch that uses them. Sliced before it, the forward pass of S3 in bfloat16
    takes a tenth longer with JAX 0.10. The barrier keeps XLA from converting all weights to float32 before the loop."""
    experts, e = lax.optimization_barrier((experts, e))
    w_gate, w_up, w_down = (lax.dynamic_index_in_dim(to_bits(w), e, keepdims=False) for w in experts)
    dtype = experts.gate_EDF.dtype
    return from_bits(w_gate, dtype), from_bits(w_up, dtype), from_bits(w_down, dtype)


def _write(buffers: tuple[Array, ...], rows: tuple[Array, ...], start: Array) -> tuple[Array, ...]:
    return tuple(lax.dynamic_update_slice_in_dim(a, b, start, 0) for a, b in zip(buffers, rows, strict=True))


def sum_slots(y_bits_RD: Shaped[Array, "RB D"], order: SlotOrder, dtype: jnp.dtype) -> Float[Array, "N D"]:
    """Sums each token's held rows, by one fused gather and add per slot."""
    held_NK, wide = order.held_NK, wide_dtype(dtype)
    total_ND = jnp.zeros((held_NK.shape[0], y_bits_RD.shape[1]), wide)
    for k in range(held_NK.shape[1]):
        row_ND = from_bits(y_bits_RD[order.places_NK[:, k]], dtype).astype(wide)
        total_ND += jnp.where(held_NK[:, k, None], row_ND, 0)
    return total_ND
