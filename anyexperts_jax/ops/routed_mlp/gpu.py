"""`routed_mlp` by the GPU kernels of `expert_mlp`, over the block-aligned buffer."""

import math
from typing import Any

from jaxtyping import Array, Float, Int

from anyexperts_jax.ops._checks import check_stacked_experts
from anyexperts_jax.ops._padding import pad_to_multiples
from anyexperts_jax.ops.expert_mlp import gpu_passes, pallas_gpu, pallas_triton
from anyexperts_jax.ops.expert_mlp.gpu_passes import GpuOptions, Kernels
from anyexperts_jax.ops.expert_mlp.gpu_rows import GpuRows, TokenRows, aligned_rows
from anyexperts_jax.ops.expert_mlp.gpu_tiles import Tiles
from anyexperts_jax.ops.expert_mlp.vjp_gpu import mosaic_options, triton_options
from anyexperts_jax.ops.experts import ExpertWeights, StackedExperts
from anyexperts_jax.ops.routed_mlp import buffered
from anyexperts_jax.ops.slot_order import SlotOrder

Rows = Array | TokenRows


def routed_mlp_triton(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: ExpertWeights,
    options: GpuOptions = GpuOptions(),  # noqa: B008, immutable
) -> Float[Array, "N D"]:
    """`routed_mlp` by the Pallas Triton kernels.

    Raises:
      UserError: without an NVIDIA GPU, or for a dtype the kernels do not support.
    """
    options = triton_options(experts.gate_EDF, options)
    return buffered.routed_mlp(x_ND, weights_NK, order, experts, **_over_buffer(pallas_triton, options))


def routed_mlp_mosaic(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: ExpertWeights,
    options: GpuOptions = GpuOptions(),  # noqa: B008, immutable
) -> Float[Array, "N D"]:
    """`routed_mlp` by the Pallas Mosaic GPU kernels. Operands are copied to pad D and F to multiples of 64.

    Raises:
      UserError: with a JAX before 0.11, without a Hopper GPU, or for a dtype the kernels do not support.
    """
    options = mosaic_options(experts.gate_EDF, options)
    multiple = pallas_gpu.WIDTH_MULTIPLE
    padded = ExpertWeights(*(pad_to_multiples(w, (1, multiple, multiple)) for w in experts))
    how = _over_buffer(pallas_gpu, options)
    y_ND = buffered.routed_mlp(pad_to_multiples(x_ND, (1, multiple)), weights_NK, order, padded, **how)
    return y_ND[:, : x_ND.shape[1]]


def triton_in_place(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: StackedExperts,
    options: GpuOptions = GpuOptions(),  # noqa: B008, immutable
) -> Float[Array, "N D"]:
    """`routed_mlp_triton` on the experts of one layer among those of all layers, which are not copied.

    Raises:
      UserError: as `routed_mlp_triton`, and for weights of another dtype than x.
    """
    check_stacked_experts(x_ND, experts.weights.gate_EDF)
    options = triton_options(experts.weights.gate_EDF, options)
    return buffered.routed_mlp_in_place(x_ND, weights_NK, order, experts, **_over_buffer(pallas_triton, options))


def mosaic_in_place(
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    order: SlotOrder,
    experts: StackedExperts,
    options: GpuOptions = GpuOptions(),  # noqa: B008, immutable
) -> Float[Array, "N D"]:
    """`routed_mlp_mosaic` on the experts of one layer among those of all layers, which are not copied.

    Raises:
      UserError: as `routed_mlp_mosaic`, for weights of another dtype than x, or of other widths than multiples of 64.
    """
    check_stacked_experts(x_ND, experts.weights.gate_EDF, pallas_gpu.WIDTH_MULTIPLE)
    options = mosaic_options(experts.weights.gate_EDF, options)
    return buffered.routed_mlp_in_place(x_ND, weights_NK, order, experts, **_over_buffer(pallas_gpu, options))


def _over_buffer(kernels: Kernels, options: GpuOptions) -> dict[str, Any]:
    """The arguments by which the functions of `buffered` run these kernels."""
    return {"kernels": aligned_kernels(kernels, options), "block": buffer_block(options.tiles)}


def buffer_block(tiles: Tiles) -> int:
    """The block at whose multiples experts must start, so that no tile and no step along rows has two experts."""
    rows = (tile.m for tile in (tiles.gate_up, tiles.down, tiles.d_gate_up, tiles.d_x))
    return math.lcm(*rows, tiles.d_w_gate_up.k, tiles.d_w_down.k)


def aligned_kernels(kernels: Kernels, options: GpuOptions) -> buffered.AlignedKernels:
    """The kernels over a buffer [R, D]; kernels that return rows see its blocks, [B, C, D]."""
    block = buffer_block(options.tiles)

    def find_rows(x_RD: Rows, starts_E: Array, counts_E: Array) -> GpuRows:
        return aligned_rows(starts_E, counts_E, x_RD.shape[0], block)

    def blocks(a_RI: Any) -> Any:
        return a_RI.reshape(-1, block, a_RI.shape[1])

    def forward(
        x_RD: Rows,
        starts_E: Int[Array, "E"],
        counts_E: Int[Array, "E"],
        experts: buffered.Experts,
        *,
        keep: bool,
        first: Int[Array, ""] | None = None,
    ) -> tuple[Array, tuple[Array, ...]]:
        rows = find_rows(x_RD, starts_E, counts_E)
        rows = rows if first is None else rows._replace(experts_B=rows.experts_B + first)
        y_BCD, kept = gpu_passes.forward(kernels, blocks(x_RD), rows, experts, options, keep=keep, zeros=False)
        return _rows(y_BCD), tuple(map(_rows, kept))

    def rows_backward(
        x_RD: Rows,
        starts_E: Int[Array, "E"],
        counts_E: Int[Array, "E"],
        kept: tuple[Float[Array, "R F"], ...],
        experts: buffered.Experts,
        d_y_RD: Rows,
    ) -> tuple[Array, tuple[Array, ...]]:
        rows, kept = find_rows(x_RD, starts_E, counts_E), tuple(map(blocks, kept))
        d_y_BCD = kernels.clean(blocks(d_y_RD), rows)  # `weights_backward` cleans the same rows: XLA merges both
        d_x_BCD, d_hidden = gpu_passes.rows_backward(kernels, rows, kept, experts, d_y_BCD, options, zeros=False)
        return _rows(d_x_BCD), tuple(map(_rows, d_hidden))

    def weights_backward(
        x_RD: Rows,
        starts_E: Int[Array, "E"],
        counts_E: Int[Array, "E"],
        d_hidden: tuple[Float[Array, "R F"], ...],
        d_y_RD: Rows,
    ) -> buffered.Experts:
        rows = find_rows(x_RD, starts_E, counts_E)
        x_1RD, d_y_1RD = (kernels.clean(blocks(a), rows).reshape(1, *a.shape) for a in (x_RD, d_y_RD))
        gradients = gpu_passes.weights_backward(
            kernels, x_1RD, rows, tuple(a[None] for a in d_hidden), d_y_1RD, options
        )
        return ExpertWeights(*gradients)

    # The Triton kernels load rows by token index. TMA copies contiguous tiles only, so Mosaic needs the buffer.
    take = TokenRows if kernels is pallas_triton else buffered.take_tokens
    return buffered.AlignedKernels(forward, rows_backward, weights_backward, take=take)


def _rows(a_BCI: Float[Array, "B C I"]) -> Float[Array, "R I"]:
    return a_BCI.reshape(-1, a_BCI.shape[2])
