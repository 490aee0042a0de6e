"""`routed_mlp` by the TPU kernels of `expert_mlp` over the block-aligned buffer, and a kernel that combines its rows.

XLA gathers the tokens into the buffer in the time it takes to write the buffer. A kernel combines the rows in half of
XLA's time (static figures: experiments/results/permute_combine.md).
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.hardware import TpuLimits, tpu_limits
from anyexperts_jax.ops._checks import check_stacked_experts
from anyexperts_jax.ops._padding import pad_to_multiples
from anyexperts_jax.ops._select import device_kind
from anyexperts_jax.ops.expert_mlp import pallas_tpu
from anyexperts_jax.ops.expert_mlp.tpu_sizes import KernelSizes, Shape, TpuSizes, choose_sizes
from anyexperts_jax.ops.expert_mlp.vjp_tpu import LANES, TpuOptions, require_kernels
from anyexperts_jax.ops.experts import ExpertWeights, StackedExperts
from anyexperts_jax.ops.routed_mlp import buffered, pallas_combine
from anyexperts_jax.ops.row_map import RowMap
from anyexperts_jax.ops.slot_order import SlotOrder

_LEAST_BLOCK, _LARGEST_BLOCK = 16, 256
_MANY_ROWS, _SHORT_STEP = 512, 64  # up to 512 rows per expert, the half step wasted on average would be noticeable
_LONG = 4096  # rows: makes `choose_sizes` plan for accumulators, which the aligned buffer always needs


def routed_mlp_pallas_tpu(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: ExpertWeights,
    *,
    options: TpuOptions = TpuOptions(),  # noqa: B008, immutable
) -> Float[Array, "N D"]:
    """`routed_mlp` by the kernels. Operands are copied to pad D and F to multiples of 128.

    Raises:
      UserError: without a TPU, for a dtype the kernels do not support, or if no part of the weights fits in VMEM.
    """
    require_kernels(x_ND.dtype, options)
    width = x_ND.shape[1]
    x_ND = pad_to_multiples(x_ND, (1, LANES))
    experts = ExpertWeights(*(pad_to_multiples(w, (1, LANES, LANES)) for w in experts))
    y_ND = buffered.routed_mlp(x_ND, weights_NK, order, experts, **_over_buffer(order, experts, options))
    return y_ND[:, :width]


def routed_mlp_in_place(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: StackedExperts,
    *,
    options: TpuOptions = TpuOptions(),  # noqa: B008, immutable
) -> Float[Array, "N D"]:
    """`routed_mlp_pallas_tpu` on the experts of one layer among those of all layers, which are not copied.

    Raises:
      UserError: as `routed_mlp_pallas_tpu`, for weights of another dtype than x, or of other widths than multiples of
        128.
    """
    require_kernels(x_ND.dtype, options)
    check_stacked_experts(x_ND, experts.weights.gate_EDF, LANES)
    how = _over_buffer(order, experts.weights, options)
    return buffered.routed_mlp_in_place(x_ND, weights_NK, order, experts, **how)


def _over_buffer(order: SlotOrder, experts: ExpertWeights, options: TpuOptions) -> dict[str, Any]:
    """The arguments by which the functions of `buffered` run the kernels.

    Sizes are those of the options, or else those for the load and the chip that the trace is for.
    """
    sizes = options.sizes
    if sizes is None:
        _, width, hidden = experts.gate_EDF.shape
        load = math.ceil(order.slots_R.size / order.counts_E.size)
        sizes = aligned_sizes(tpu_limits(device_kind()), Shape(load, width, hidden, experts.gate_EDF.dtype.itemsize))
    return {"kernels": _kernels(sizes, options.interpret), "block": buffer_block(sizes)}


def aligned_sizes(chip: TpuLimits, shape: Shape) -> TpuSizes:
    """Sizes for experts with `shape.capacity` slots each on average, counting empty slots.

    A block is the largest power of two up to half of that: an expert's last block is half empty on average, but is
    fetched and stored as a whole.

    Raises:
      UserError: if not even 128 columns of the weights fit in VMEM.
    """
    block = 2 ** math.floor(math.log2(max(shape.capacity / 2, 1)))
    block = min(max(block, _LEAST_BLOCK), _LARGEST_BLOCK)
    most_step = min(block, _SHORT_STEP) if shape.capacity <= _MANY_ROWS else block

    def cut(sizes: KernelSizes) -> KernelSizes:
        step, slab = min(sizes.step, most_step), min(sizes.slab, block)
        return dataclasses.replace(sizes, block=min(sizes.block, block), slab=slab, step=step)

    sizes = choose_sizes(chip, shape._replace(capacity=_LONG))
    forward, backward, weights = (cut(own) for own in (sizes.forward, sizes.backward, sizes.weights))
    return dataclasses.replace(sizes, forward=forward, backward=backward, weights=weights)


def buffer_block(sizes: TpuSizes) -> int:
    """The block at whose multiples experts must start, so that every kernel's tiles have a single expert."""
    return math.lcm(sizes.forward.block, sizes.backward.block, sizes.weights.block)


def _kernels(sizes: TpuSizes, interpret: Any) -> buffered.AlignedKernels:
    """The kernels over the buffer, which they see as [1, R, D]."""
    how: dict[str, Any] = {"sizes": sizes, "interpret": interpret}

    def forward(
        x_RD: Array,
        starts_E: Array,
        counts_E: Array,
        experts: buffered.Experts,
        *,
        keep: bool,
        first: Array | None = None,
    ) -> tuple[Array, tuple[Array, ...]]:
        operands = (x_RD[None], counts_E, *experts)
        y, kept = pallas_tpu.forward(*operands, starts_E=starts_E, keep=keep, first=first, **how)
        return y[0], _rows(kept)

    def rows_backward(
        x_RD: Array,
        starts_E: Array,
        counts_E: Array,
        kept: tuple[Array, ...],
        experts: buffered.Experts,
        d_y_RD: Array,
    ) -> tuple[Array, tuple[Array, ...]]:
        operands = (x_RD[None], counts_E, _buffers(kept), *experts)
        d_x, d_hidden = pallas_tpu.rows_backward(*operands, d_y_RD[None], starts_E=starts_E, **how)
        return d_x[0], _rows(d_hidden)

    def weighted_rows_backward(
        x_RD: Array,
        starts_E: Array,
        counts_E: Array,
        kept: tuple[Array, ...],
        experts: buffered.Experts,
        d_y_RD: Array,
        weight_R: Array,
    ) -> tuple[Array, tuple[Array, ...], Array]:
        # A full vector register per row: the kernel can multiply without broadcasting along lanes.
        weights = jnp.broadcast_to(weight_R[None, :, None], (1, weight_R.size, LANES))
        operands = (x_RD[None], counts_E, _buffers(kept), *experts)
        d_x, results = pallas_tpu.rows_backward(*operands, d_y_RD[None], starts_E=starts_E, slot_weights=weights, **how)
        *d_hidden, sums = _rows(results)
        return d_x[0], tuple(d_hidden), sums.sum(-1)

    def weights_backward(
        x_RD: Array, starts_E: Array, counts_E: Array, d_hidden: tuple[Array, ...], d_y_RD: Array
    ) -> tuple[Array, ...]:
        operands = (x_RD[None], counts_E, *_buffers(d_hidden), d_y_RD[None])
        return pallas_tpu.weights_backward(*operands, starts_E=starts_E, **how)

    def combine(y_RD: Array, weights_NK: Array, row_map: RowMap) -> Array:
        rows_NK = jnp.where(row_map.held_NK, row_map.rows_NK, -1)
        cores, vmem_bytes = sizes.cores, sizes.vmem_bytes
        return pallas_combine.combine(
            y_RD, weights_NK, rows_NK, cores=cores, vmem_bytes=vmem_bytes, interpret=interpret
        )

    weighted = weighted_rows_backward if sizes.backward.columns is None else None
    return buffered.AlignedKernels(forward, rows_backward, weights_backward, combine, weighted)


def _rows(buffers: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a[0] for a in buffers)


def _buffers(rows: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a[None] for a in rows)
