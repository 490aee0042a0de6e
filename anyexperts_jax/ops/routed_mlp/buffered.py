"""`routed_mlp` through the block-aligned buffer: gather tokens into rows, run kernels over the rows, combine the rows.

Only gate and up of every row are kept for the backward pass. The tokens' rows are gathered again, and the gradients of
the combine weights come from the kernels' results: the kernels get the tokens' gradients unweighted, and the combine
weights are applied afterwards, to what enters the sums over rows. A combine weight's gradient is then
sum(d_hidden * hidden), which equals sum(d_up * up). Kernels that do both themselves save passes over the buffer.

Rows without a slot are neither computed nor read, so they are never cleared; on a TPU clearing would be a pass over the
buffer that takes longer than the gather.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.ops._checks import KERNELS_SUPPORT_GRAD_ONLY
from anyexperts_jax.ops._dots import wide_dtype
from anyexperts_jax.ops.aligned_rows import align_rows
from anyexperts_jax.ops.experts import ExpertWeights, StackedExperts
from anyexperts_jax.ops.row_map import sum_rows
from anyexperts_jax.ops.slot_order import SlotOrder

Experts = ExpertWeights


def take_tokens(x_ND: Float[Array, "N D"], tokens_R: Int[Array, "R"]) -> Float[Array, "R D"]:
    """Gathers the tokens' rows into a buffer."""
    return x_ND[tokens_R]


class AlignedKernels(NamedTuple):
    """The expert MLP over a buffer in which expert e has the rows starts_E[e] to starts_E[e] + counts_E[e]. Every start
    is a multiple of the buffer's block. The functions know nothing of derivatives.

    Dead rows, which belong to no expert, never affect live rows or weight gradients, whatever an input holds there.
    Results are undefined in dead rows.
    """

    # (x_RD, starts_E, counts_E, experts, keep=bool, first=None) -> y_RD, (gate_RF, up_RF) if keep else (). With
    # `first`, `experts` holds those of several layers, and expert e is number first + e of them.
    forward: Callable[..., tuple[Array, tuple[Array, ...]]]
    # (x_RD, starts_E, counts_E, (gate_RF, up_RF), experts, d_y_RD) -> d_x_RD, (d_gate_RF, d_up_RF, hidden_RF)
    rows_backward: Callable[..., tuple[Array, tuple[Array, ...]]]
    # (x_RD, starts_E, counts_E, (d_gate_RF, d_up_RF, hidden_RF), d_y_RD) -> gradients of `experts`; zero without rows
    weights_backward: Callable[..., tuple[Array, ...]]
    # (y_RD, weights_NK, row_map) -> the weighted sum of each token's held rows, [N, D] in float32 or wider
    combine: Callable[..., Array] = sum_rows
    # (arguments of rows_backward, weight_R) -> the results of rows_backward, including hidden, each multiplied by its
    # row's combine weight, and the gradients of these weights [R]
    weighted_rows_backward: Callable[..., tuple[Array, tuple[Array, ...], Array]] | None = None
    # (x_ND, tokens_R) -> the rows in the form in which the functions above take x_RD and d_y_RD
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
    """`routed_mlp` by `kernels` over a buffer in which experts start at multiples of `block`."""

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

    run.defvjp(run_forward, run_backward, refusal=KERNELS_SUPPORT_GRAD_ONLY)
    return run(x_ND, weights_NK, order, experts)


def routed_mlp_in_place(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: StackedExperts,
    *,
    kernels: AlignedKernels,
    block: int,
) -> Float[Array, "N D"]:
    """`routed_mlp` on the experts of one layer among those of all layers, without a gradient."""
    row_map, starts_E = align_rows(order, block)
    x_RD = kernels.take(x_ND, row_map.tokens_R)
    y_RD, _ = kernels.forward(x_RD, starts_E, order.counts_E, experts.weights, keep=False, first=experts.first)
    return kernels.combine(y_RD, weights_NK, row_map)


def backward(
    kernels: AlignedKernels, block: int, residuals: tuple, d_y_ND: Float[Array, "N D"]
) -> tuple[Float[Array, "N D"], Float[Array, "N K"], None, Experts]:
    """Gradients of x, the combine weights, the order (None) and the experts' weights."""
    x_ND, weights_NK, order, experts, kept = residuals
    dtype, wide = x_ND.dtype, wide_dtype(x_ND.dtype)
    row_map, starts_E = align_rows(order, block)
    rows = (starts_E, order.counts_E)
    x_RD, d_y_RD = (kernels.take(a_ND, row_map.tokens_R) for a_ND in (x_ND, d_y_ND.astype(dtype)))
    weight_R = weights_NK.reshape(-1)[row_map.slots_R].astype(wide)
    operands = (x_RD, *rows, kept, experts, d_y_RD)
    if kernels.weighted_rows_backward is not None:
        d_x_RD, weighted, d_weight_R = kernels.weighted_rows_backward(*operands, weight_R)
        left_NK = row_map.held_NK  # the rows are weighted already: combine adds them with weight 1
    else:
        d_x_RD, d_hidden = kernels.rows_backward(*operands)
        weighted = tuple((weight_R[:, None] * a.astype(wide)).astype(dtype) for a in d_hidden)
        d_weight_R = (d_hidden[1].astype(wide) * kept[1].astype(wide)).sum(-1)
        left_NK = weights_NK
    d_x_ND = kernels.combine(d_x_RD, left_NK, row_map).astype(dtype)
    d_weights_NK = jnp.where(row_map.held_NK, d_weight_R[row_map.rows_NK], 0).astype(weights_NK.dtype)
    return d_x_ND, d_weights_NK, None, Experts(*kernels.weights_backward(x_RD, *rows, weighted, d_y_RD))
