"""Where the live rows of the experts lie, so that the GPU kernels can run over both kinds of buffer.

Kernels that return rows see blocks [B, C, D]: C rows of one expert, live ones first. A buffer [E, C, D] has one block
per expert. A block-aligned buffer [R, D] is cut into its blocks; those beyond the last expert have no live rows.
Kernels that return weight gradients sum over an expert's rows, which are contiguous in [E, C, D] and in [1, R, D].
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops.aligned_rows import experts_of_blocks, rows_of_blocks
from anyexperts_jax.ops.expert_mlp.reference import live_rows


class TokenRows(NamedTuple):
    """Rows given as token indices instead of a gathered buffer. Kernels read the tokens in place, so dead rows cost
    nothing, whereas a gather would write them all."""

    x_ND: Float[Array, "N D"]
    tokens: Int[Array, "*rows"]  # arbitrary in dead rows

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the gathered rows."""
        return (*self.tokens.shape, self.x_ND.shape[1])

    @property
    def dtype(self) -> jnp.dtype:
        return self.x_ND.dtype

    def reshape(self, *shape: int) -> "TokenRows":
        """The same rows in another shape, whose last dimension must be D."""
        return TokenRows(self.x_ND, self.tokens.reshape(shape[:-1]))


class GpuRows(NamedTuple):
    """The layout of the rows. All arrays are int32."""

    experts_B: Int[Array, "B"]  # the expert whose weights a block is multiplied with
    counts_B: Int[Array, "B"]  # live rows of a block
    starts_E: Int[Array, "E"]  # first row of an expert in a shared buffer [1, R, D]; zeros for [E, C, D]
    counts_E: Int[Array, "E"]  # live rows of an expert


def capacity_rows(counts_E: Int[Array, "E"], capacity: int) -> GpuRows:
    """The rows of a buffer [E, C, D]."""
    experts_E = jnp.arange(counts_E.shape[0], dtype=jnp.int32)
    counts_E = jnp.minimum(counts_E, capacity).astype(jnp.int32)
    return GpuRows(experts_E, counts_E, jnp.zeros_like(counts_E), counts_E)


def aligned_rows(starts_E: Int[Array, "E"], counts_E: Int[Array, "E"], num_rows: int, block: int) -> GpuRows:
    """The rows of a block-aligned buffer [R, D], as R / block blocks."""
    starts_E, counts_E, blocks = starts_E.astype(jnp.int32), counts_E.astype(jnp.int32), num_rows // block
    experts_B = experts_of_blocks(starts_E, counts_E, blocks, block).astype(jnp.int32)
    return GpuRows(experts_B, rows_of_blocks(starts_E, counts_E, blocks, block), starts_E, counts_E)


def zero_dead_rows(a_BCI: Float[Array, "B C I"], rows: GpuRows) -> Float[Array, "B C I"]:
    """Sets the dead rows of `a_BCI` to zero."""
    return jnp.where(live_rows(rows.counts_B, a_BCI.shape[1]), a_BCI, 0)
