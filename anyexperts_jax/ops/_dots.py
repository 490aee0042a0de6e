"""Dots and copies in forms that XLA's CPU backend runs fast (measured with JAX 0.10 to 0.12; free on other backends).

A bfloat16 dot uses the CPU's matrix unit only if its result is float32 and it contracts the last axis of its left
operand; otherwise XLA first widens the operands to float32. Before JAX 0.11.2, XLA also widens bfloat16 slices and
updates at run-time offsets, a whole buffer at a time, so loops move bfloat16 as 16-bit integers there. Later versions
move bfloat16 directly; integers would be as fast, but the backward pass would need five times the temporary memory.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

_TILE = 8
_WIDENS_SLICES = jax.__version_info__ < (0, 11, 2)


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that sums are accumulated in: float32 for float32 and narrower, float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def dot(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum of two operands, accumulated and returned in `wide_dtype`."""
    return jnp.einsum(spec, a, b, preferred_element_type=wide_dtype(a.dtype))


def row_contraction(a: Float[Array, "*E C I"], b: Float[Array, "*E C J"]) -> Float[Array, "*E I J"]:
    """a^T b over the rows of each expert, as in a weight gradient. Returned in `wide_dtype`."""
    if a.dtype == jnp.bfloat16 and a.shape[-2] % _TILE == 0:
        return dot("...IC,...CJ->...IJ", _transposed(a), b)
    return dot("...CI,...CJ->...IJ", a, b)


def _transposed(a: Float[Array, "*E C I"]) -> Float[Array, "*E I C"]:
    """a^T as a transposition of tiles. XLA would fold a plain transposition into the dot and take its slow path."""
    *experts, rows, width = a.shape
    tile = math.gcd(width, _TILE)
    tiles = to_bits(a).reshape(*experts, rows // _TILE, _TILE, width // tile, tile)
    tiles = jnp.moveaxis(tiles, (-2, -1), (-4, -3))
    return from_bits(tiles.reshape(*experts, width, rows), a.dtype)


def to_bits(a: Float[Array, "*any"]) -> Shaped[Array, "*any"]:
    """Reinterprets bfloat16 as uint16 if this JAX would widen slices of it; other arrays are returned unchanged."""
    return lax.bitcast_convert_type(a, jnp.uint16) if _WIDENS_SLICES and a.dtype == jnp.bfloat16 else a


def from_bits(a: Shaped[Array, "*any"], dtype: jnp.dtype) -> Float[Array, "*any"]:
    """The inverse of `to_bits` for an array of `dtype`."""
    return lax.bitcast_convert_type(a, dtype) if a.dtype != dtype else a
