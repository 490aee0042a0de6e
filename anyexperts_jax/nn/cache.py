"""What attention keeps of the positions so far, so that a later one need not compute them again."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.nn.config import AttentionConfig, Dtype


@register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions so far. Entry s of an example holds its position s."""

    keys_BSGA: Float[Array, "*L B S G A"]
    values_BSGA: Float[Array, "*L B S G A"]

    @property
    def length(self) -> int:
        """The number of positions that the cache can hold."""
        return self.keys_BSGA.shape[-3]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """What latent attention makes all keys and values from: a position's latent, then its rotated key.

    All heads share it, so G is 1 and A the width of both.
    """

    latents_BSGA: Float[Array, "*L B S G A"]

    @property
    def length(self) -> int:
        """The number of positions that the cache can hold."""
        return self.latents_BSGA.shape[-3]


AttentionCache = KVCache | LatentCache
# Arrays of their own: a stack would be taken apart and put together, and so copied, at every step of decoding.
LayerCaches = tuple[AttentionCache, ...]


def empty_cache(config: AttentionConfig, batch_size: int, length: int, dtype: Dtype, *layers: int) -> AttentionCache:
    """A zero cache of `length` positions, stacked over `layers`."""
    rows = (*layers, batch_size, length)
    if config.latent is not None:
        return LatentCache(jnp.zeros((*rows, 1, config.latent.cached_dim), dtype))
    zeros = jnp.zeros((*rows, config.num_kv_heads, config.head_dim), dtype)
    return KVCache(zeros, zeros)


def written(
    held_BSGA: Float[Array, "B S G A"], new_BTGA: Float[Array, "B T G A"], positions_BT: Int[Array, "B T"]
) -> Float[Array, "B S G A"]:
    """The rows of a cache with new ones at their positions."""
    rows_B1 = jnp.arange(new_BTGA.shape[0], dtype=jnp.int32)[:, None]
    return held_BSGA.at[rows_B1, positions_BT].set(new_BTGA)
