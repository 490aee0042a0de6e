"""By way of the block-aligned buffer: tokens gathered into rows, kernels over the rows, the rows' weighted sum.

Kept for the backward pass are gate and up of every row, no more: rows of tokens are gathered anew, and a slot's weight
has its gradient from what the kernels return. For that they are given the tokens' gradients as they are, and the slots'
weights are applied to what enters the sums over rows: a slot's gradient is then sum(d_hidden * hidden), which is
sum(d_up * up). Kernels that do both themselves save passes over the whole buffer.

Rows that belong to no slot are computed by nobody and read by nobody, so none is cleared: on a TPU that would be a pass
over the buffer longer than the gather.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.ops._checks import KERNELS_HAVE_GRAD_ALONE
from anyexperts_jax.ops._dots import wide_dtype
from anyexperts_jax.ops.aligned_rows import align_rows
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.ops.row_map import sum_rows
from anyexperts_jax.ops.slot_order import SlotOrder

Experts = ExpertWeights


def take_tokens(x_ND: Float[Array, "N D"], tokens_R: Int[Array, "R"]) -> Float[Array, "R D"]:
    """The tokens' rows, written out."""
    return x_ND[tokens_R]


class AlignedKernels(NamedTuple):
    """The expert MLP over a buffer in which expert e has rows starts_E[e] .. starts_E[e] + counts_E[e]; every start is
    a multiple of the buffer's block. No function knows of derivatives.

    What an input holds in dead rows, those of no expert, reaches no live row and no gradient of a weight. What an
    output holds there is anything at all.
    """

    # (x_RD, starts_E, counts_E, experts, keep=bool) -> y_RD, (gate_RF, up_RF) if keep else ()
    forward: Callable[..., tuple[Array, tuple[Array, ...]]]
    # (x_RD, starts_E, counts_E, (gate_RF, up_RF), experts, d_y_RD) -> d_x_RD, (d_gate_RF, d_up_RF, hidden_RF)
    rows_backward: Callable[..., tuple[Array, tuple[Array, ...]]]
    # (x_RD, starts_E, counts_E, (d_gate_RF, d_up_RF, hidden_RF), d_y_RD) -> gradients of `experts`; zero without rows
    weights_backward: Callable[..., tuple[Array, ...]]
    # (y_RD, weights_NK, row_map) -> the weighted sum of each token's held rows, [N, D] in float32 at least
    combine: Callable[..., Array] = sum_rows
    # (as rows_backward, weight_R) -> both results times each row's weight, hidden too, and the weights' gradients, [R]
    weighted_rows_backward: Callable[..., tuple[Array, tuple[Array, ...], Array]] | None = None
    # (x_ND, tokens_R) -> the rows as the functions above take x_RD and d_y_RD
    take: Callable[..., Any] = take_tokens


def routed_mlp(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: Experts,
    *,
    kernels: AlignedKernels,
    block: int,
) -> Float[Array, "N D"]:
    """`routed_mlp` by `kernels` over a buffer whose experts begin at multiples of `block`."""

    def forward(
        x_ND: Array, weights_NK: Array, order: SlotOrder, experts: Experts, *, keep: bool
    ) -> tuple[Array, tuple[Array, ...]]:
        row_map, starts_E = align_rows(order, block)
        y_RD, kept = kernels.forward(kernels.take(x_ND, row_map.tokens_R), starts_E, order.counts_E, experts, keep=keep)
        return kernels.combine(y_RD, weights_NK, row_map), kept

    @Differentiable
    def run(x_ND: Array, weights_NK: Array, order: SlotOrder, experts: Experts) -> Array:
        return forward(x_ND, weights_NK, order, experts, keep=False)[0]

    def run_forward(x_ND: Array, weights_NK: Array, order: SlotOrder, experts: Experts) -> tuple[Array, tuple]:
        y_ND, kept = forward(x_ND, weights_NK, order, experts, keep=True)
        return y_ND, (x_ND, weights_NK, order, experts, kept)

    def run_backward(residuals: tuple, d_y_ND: Array) -> tuple[Any, ...]:
        return backward(kernels, block, residuals, d_y_ND)

    run.defvjp(run_forward, run_backward, refusal=KERNELS_HAVE_GRAD_ALONE)
    return run(x_ND, weights_NK, order, experts)


def backward(
    kernels: AlignedKernels, block: int, residuals: tuple, d_y_ND: Float[Array, "N D"]
) -> tuple[Float[Array, "N D"], Float[Array, "N K"], None, Experts]:
    """Gradients of x, the slots' weights, nothing (the order) and the experts' weights."""
    x_ND, weights_NK, order, experts, kept = residuals
    dtype, wide = x_ND.dtype, wide_dtype(x_ND.dtype)
    row_map, starts_E = align_rows(order, block)
    rows = (starts_E, order.counts_E)
    x_RD, d_y_RD = (kernels.take(a_ND, row_map.tokens_R) for a_ND in (x_ND, d_y_ND.astype(dtype)))
    weight_R = weights_NK.reshape(-1)[row_map.slots_R].astype(wide)
    operands = (x_RD, *rows, kept, experts, d_y_RD)
    if kernels.weighted_rows_backward is not None:
        d_x_RD, weighted, d_weight_R = kernels.weighted_rows_backward(*operands, weight_R)
        left_NK = row_map.held_NK
    else:
        d_x_RD, d_hidden = kernels.rows_backward(*operands)
        weighted = tuple((weight_R[:, None] * a.astype(wide)).astype(dtype) for a in d_hidden)
        d_weight_R = (d_hidden[1].astype(wide) * kept[1].astype(wide)).sum(-1)
        left_NK = weights_NK
    d_x_ND = kernels.combine(d_x_RD, left_NK, row_map).astype(dtype)
    d_weights_NK = jnp.where(row_map.held_NK, d_weight_R[row_map.rows_NK], 0).astype(weights_NK.dtype)
    return d_x_ND, d_weights_NK, None, Experts(*kernels.weights_backward(x_RD, *rows, weighted, d_y_RD))
