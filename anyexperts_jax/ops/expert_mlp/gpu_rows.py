"""Where the live rows of the experts lie, for GPU kernels that run over buffers of either kind.

Kernels whose results are rows see blocks [B, C, D]: C rows of one expert, the live ones first. A buffer [E, C, D] is
one block an expert; a block-aligned buffer [R, D] is cut into its blocks, and those past the last expert have no live
row. The weights' gradients are sums over an expert's rows, which follow one another in [E, C, D], or in [1, R, D].
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops.aligned_rows import experts_of_blocks, rows_of_blocks
from anyexperts_jax.ops.expert_mlp.reference import live_rows


class TokenRows(NamedTuple):
    """Rows that are not written out: each is a token's. Kernels that take them read tokens where they are, so rows
    nobody holds cost nothing, where gathering into a buffer writes them all."""

    x_ND: Float[Array, "N D"]
    tokens: Int[Array, "*rows"]  # arbitrary in dead rows

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the rows, were they written out."""
        return (*self.tokens.shape, self.x_ND.shape[1])

    @property
    def dtype(self) -> jnp.dtype:
        return self.x_ND.dtype

    def reshape(self, *shape: int) -> "TokenRows":
        """Of another `shape`, whose last dimension is D."""
        return TokenRows(self.x_ND, self.tokens.reshape(shape[:-1]))


class GpuRows(NamedTuple):
    """All int32."""

    experts_B: Int[Array, "B"]  # whose weights a block is multiplied with
    counts_B: Int[Array, "B"]  # live rows of a block
    starts_E: Int[Array, "E"]  # first row of an expert, where all rows are one buffer [1, R, D]; else 0
    counts_E: Int[Array, "E"]  # live rows of an expert


def capacity_rows(counts_E: Int[Array, "E"], capacity: int) -> GpuRows:
    """Rows of a buffer [E, C, D]."""
    experts_E = jnp.arange(counts_E.shape[0], dtype=jnp.int32)
    counts_E = jnp.minimum(counts_E, capacity).astype(jnp.int32)
    return GpuRows(experts_E, counts_E, jnp.zeros_like(counts_E), counts_E)


def aligned_rows(starts_E: Int[Array, "E"], counts_E: Int[Array, "E"], num_rows: int, block: int) -> GpuRows:
    """Rows of a buffer [R, D] in which each expert begins at a multiple of `block`, for its R / block blocks."""
    starts_E, counts_E, blocks = starts_E.astype(jnp.int32), counts_E.astype(jnp.int32), num_rows // block
    experts_B = experts_of_blocks(starts_E, counts_E, blocks, block).astype(jnp.int32)
    return GpuRows(experts_B, rows_of_blocks(starts_E, counts_E, blocks, block), starts_E, counts_E)


def zero_dead_rows(a_BCI: Float[Array, "B C I"], rows: GpuRows) -> Float[Array, "B C I"]:
    """`a_BCI` with zeros in dead rows, whatever they held."""
    return jnp.where(live_rows(rows.counts_B, a_BCI.shape[1]), a_BCI, 0)
