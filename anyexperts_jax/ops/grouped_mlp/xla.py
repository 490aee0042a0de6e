"""A loop over blocks of rows with a run-time trip count: what holds no real row costs nothing."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from anyexperts_jax.ops._dots import row_contraction
from anyexperts_jax.ops._swiglu import swiglu, swiglu_vjp

Residuals = tuple[Array, ...]
BLOCK = 128


def forward(
    x_RD: Float[Array, "R D"],
    counts_E: Int[Array, "E"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
) -> tuple[Float[Array, "R D"], Residuals]:
    """(y_RD, what `backward` needs)."""
    rows, block = x_RD.shape[0], min(BLOCK, x_RD.shape[0])
    expert_of_block, start_of_block, num_blocks = _blocks(counts_E, rows, block)
    padded_x = _pad_rows(x_RD, block)

    def run_block(i: Array, y_RD: Array) -> Array:
        e, start = expert_of_block[i], start_of_block[i]
        x_BD = lax.dynamic_slice_in_dim(padded_x, start, block)
        hidden_BF = swiglu(x_BD @ w_gate_EDF[e], x_BD @ w_up_EDF[e], x_RD.dtype)
        return lax.dynamic_update_slice_in_dim(y_RD, hidden_BF @ w_down_EFD[e], start, 0)  # later blocks overwrite

    y_RD = lax.fori_loop(0, num_blocks, run_block, jnp.zeros_like(padded_x))[:rows]
    y_RD = jnp.where(_live(counts_E, rows), y_RD, 0)
    return y_RD, (x_RD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)


def backward(
    residuals: Residuals, d_y_RD: Float[Array, "R D"]
) -> tuple[Float[Array, "R D"], Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]:
    """Gradients of x and the three weights; gate and up are computed again."""
    x_RD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD = residuals
    rows, block = x_RD.shape[0], min(BLOCK, x_RD.shape[0])
    expert_of_block, start_of_block, num_blocks = _blocks(counts_E, rows, block)
    end_E = jnp.cumsum(counts_E)
    padded_x, padded_d_y = _pad_rows(x_RD, block), _pad_rows(d_y_RD, block)

    def run_block(i: Array, gradients: tuple[Array, ...]) -> tuple[Array, ...]:
        d_x_RD, d_gate_EDF, d_up_EDF, d_down_EFD = gradients
        e, start = expert_of_block[i], start_of_block[i]
        own_B1 = (start + jnp.arange(block) < end_E[e])[:, None]
        x_BD = jnp.where(own_B1, lax.dynamic_slice_in_dim(padded_x, start, block), 0)
        d_y_BD = jnp.where(own_B1, lax.dynamic_slice_in_dim(padded_d_y, start, block), 0)
        d_hidden_BF = d_y_BD @ w_down_EFD[e].T
        hidden_BF, d_gate_BF, d_up_BF = swiglu_vjp(x_BD @ w_gate_EDF[e], x_BD @ w_up_EDF[e], d_hidden_BF, x_RD.dtype)
        d_x_BD = d_gate_BF @ w_gate_EDF[e].T + d_up_BF @ w_up_EDF[e].T
        return (
            lax.dynamic_update_slice_in_dim(d_x_RD, d_x_BD, start, 0),
            d_gate_EDF.at[e].add(row_contraction(x_BD, d_gate_BF)),
            d_up_EDF.at[e].add(row_contraction(x_BD, d_up_BF)),
            d_down_EFD.at[e].add(row_contraction(hidden_BF, d_y_BD)),
        )

    zeros = tuple(jnp.zeros_like(a) for a in (padded_x, w_gate_EDF, w_up_EDF, w_down_EFD))
    d_x_RD, *d_weights = lax.fori_loop(0, num_blocks, run_block, zeros)
    return jnp.where(_live(counts_E, rows), d_x_RD[:rows], 0), *d_weights


def _blocks(counts_E: Int[Array, "E"], rows: int, block: int) -> tuple[Array, Array, Array]:
    """(expert of each block, its first row, number of blocks): blocks of one expert each, live ones first."""
    blocks_E = -(-counts_E // block)
    ends_E = jnp.cumsum(blocks_E)
    i = jnp.arange(rows // block + counts_E.shape[0])
    expert = jnp.minimum(jnp.searchsorted(ends_E, i, side="right"), counts_E.shape[0] - 1)
    starts_E = jnp.cumsum(counts_E) - counts_E
    return expert, starts_E[expert] + (i - (ends_E - blocks_E)[expert]) * block, ends_E[-1]


def _pad_rows(x_RD: Float[Array, "R D"], block: int) -> Array:
    return jnp.pad(x_RD, ((0, block), (0, 0)))


def _live(counts_E: Int[Array, "E"], rows: int) -> Array:
    return (jnp.arange(rows) < counts_E.sum())[:, None]
