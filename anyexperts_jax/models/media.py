"""Which row of the encoded patches or frames each position of a sequence reads."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def media_rows(media_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """At a media position the number of media positions before it: the row it reads. Elsewhere arbitrary, >= 0."""
    return jnp.maximum(jnp.cumsum(media_BT, axis=1, dtype=jnp.int32) - 1, 0)


def used_rows(media_BT: Bool[Array, "B T"], num_rows: int) -> Bool[Array, "B R"]:
    """True at the rows that some position reads."""
    return jnp.arange(num_rows) < media_BT.sum(axis=1)[:, None]


def row_values(media_BT: Bool[Array, "B T"], values_BT: Int[Array, "B T"], num_rows: int) -> Int[Array, "B R"]:
    """The value of each row's position, 0 at unused rows: positions' times brought to the rows they read."""
    sequences_B1 = jnp.arange(media_BT.shape[0])[:, None]
    rows_BT = jnp.where(media_BT, media_rows(media_BT), num_rows)
    zeros_BR = jnp.zeros((media_BT.shape[0], num_rows), values_BT.dtype)
    return zeros_BR.at[sequences_B1, rows_BT].set(values_BT, mode="drop")


def place_rows(
    x_BTD: Float[Array, "B T D"], media_BT: Bool[Array, "B T"], encoded_BRD: Float[Array, "B R D"]
) -> Float[Array, "B T D"]:
    """x with the encoded rows at media positions. A media position without a row reads NaN: it cannot go unnoticed."""
    sequences_B1 = jnp.arange(media_BT.shape[0])[:, None]
    rows_BT = jnp.where(media_BT, media_rows(media_BT), 0)
    gathered_BTD = encoded_BRD.at[sequences_B1, rows_BT].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(media_BT[:, :, None], gathered_BTD, x_BTD)
