"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads from one narrow latent.

A head's queries and keys have two parts: P numbers that know no position, and a rotated part whose key all heads share.
The cache holds the latent and the rotated key alone. There are two ways to attend, the same function up to rounding:

* expanded: every position's keys and values are made from its latent, then attention is as usual;
* absorbed: the map from the latent to the keys goes into the queries, and the map to the values behind the mean, so
  that all heads attend to the latents themselves. With few queries over a long cache it computes far less.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.initializers import FanIn
from anyexperts_jax.nn.cache import LatentCache, written
from anyexperts_jax.nn.config import AttentionConfig, Dtype, LatentConfig, LoraConfig
from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.nn.lora import WeightAxes, low_rank
from anyexperts_jax.nn.norms import RMSNorm
from anyexperts_jax.nn.params import named
from anyexperts_jax.nn.rope import Rotations, rotate
from anyexperts_jax.ops.attention import CausalMask
from anyexperts_jax.ops.contraction import Contraction, contract
from anyexperts_jax.sharding.attention import split_attention
from anyexperts_jax.sharding.placement import Placement

_UP_AXES = ("from_latent", "heads", "head_dim")


def absorbs(latent: LatentConfig, queries: int) -> bool:
    """Whether the absorbed form computes less for this many queries.

    A cached position and head cost U (P + W) + T (P + W) products expanded, but T (2 U) absorbed; the rotated part
    costs both the same.
    """
    wide = latent.plain_dim + latent.value_dim
    return queries * (2 * latent.kv_rank - wide) <= latent.kv_rank * wide


class LatentAttention(nn.Module):
    """The variant of `Attention` whose configuration has a `latent`. The softmax is float32."""

    config: AttentionConfig
    residual_scale: float = 1.0  # scale of the output projection's initial values
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    placement: Placement | None = None  # where the arrays lie; None: on one device
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: Bool[Array, "B T S"] | CausalMask,
        rotation: Rotations | None = None,
        cache: LatentCache | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache | None]:
        """Attends from each position t to the positions s with `mask[b, t, s]`.

        With a cache, latents are first written to it at `positions_BT`, and S is the cache's length; without one S
        is T. Returns the output and the updated cache.
        """
        latent = self._latent
        queries_BTHA = self._queries(x_BTD, rotation)
        latents_BSGA = self._latents(x_BTD, rotation)
        up_UHA = _UpKernel((self.config.num_heads, latent.plain_dim + latent.value_dim), **self._types(), name="up")(
            latent.kv_rank
        )
        attend = self._expanded
        if cache is not None and positions_BT is not None:
            cache = LatentCache(written(cache.latents_BSGA, latents_BSGA, positions_BT))
            latents_BSGA = cache.latents_BSGA
            attend = self._absorbed if absorbs(latent, x_BTD.shape[1]) else attend
        out_BTHW = attend(queries_BTHA, latents_BSGA, up_UHA, mask)
        project = Linear(
            x_BTD.shape[-1:],
            ("heads", "head_dim", "embed"),
            num_in=2,
            use_bias=self.config.out_bias,
            scale=self.residual_scale,
            **self._types(),
            name="out",
        )
        return project(out_BTHW), cache

    @property
    def _latent(self) -> LatentConfig:
        assert self.config.latent is not None
        return self.config.latent

    def _types(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "lora": self.lora}

    def _down(self, x_BTD: Float[Array, "B T D"], width: int, name: str) -> Float[Array, "B T U"]:
        down = Linear((width,), ("embed", "latent"), use_bias=self.config.qkv_bias, name=name, **self._types())
        return down(x_BTD)

    def _normed(self, x_BTU: Float[Array, "B T U"], name: str) -> Float[Array, "B T U"]:
        return RMSNorm(self._latent.norm_eps, self.dtype, self.param_dtype, name=name)(x_BTU)

    def _queries(self, x_BTD: Float[Array, "B T D"], rotation: Rotations | None) -> Float[Array, "B T H A"]:
        """Queries, the rotated part last, with YaRN's factor on the scores."""
        latent, shape = self._latent, (self.config.num_heads, self.config.head_dim)
        if latent.query_rank is None:
            queries_BTHA = Linear(shape, ("embed", "heads", "head_dim"), name="query", **self._types())(x_BTD)
        else:
            narrow_BTU = self._normed(self._down(x_BTD, latent.query_rank, "query_down"), "query_norm")
            queries_BTHA = Linear(shape, _UP_AXES, name="query_up", **self._types())(narrow_BTU)
        plain, rotated = jnp.split(queries_BTHA, [latent.plain_dim], axis=-1)
        if rotation is not None:
            rotated = rotate(rotated, rotation, latent.interleaved)
        return _scaled(jnp.concatenate([plain, rotated], axis=-1), latent.score_factor)

    def _latents(self, x_BTD: Float[Array, "B T D"], rotation: Rotations | None) -> Float[Array, "B T 1 A"]:
        """What the cache holds of each position."""
        latent = self._latent
        down_BTU = self._down(x_BTD, latent.cached_dim, "down")
        own, rotated = jnp.split(down_BTU, [latent.kv_rank], axis=-1)
        own = _scaled(self._normed(own, "norm"), latent.latent_factor)
        own, rotated = own[:, :, None], rotated[:, :, None]
        if rotation is not None:
            rotated = rotate(rotated, rotation, latent.interleaved)
        return jnp.concatenate([own, rotated], axis=-1)

    def _expanded(
        self,
        queries_BTHA: Float[Array, "B T H A"],
        latents_BSGA: Float[Array, "B S 1 U"],
        up_UHA: Float[Array, "..."],
        mask: Bool[Array, "B T S"] | CausalMask,
    ) -> Float[Array, "B T H W"]:
        latent = self._latent
        own, rotated = jnp.split(latents_BSGA, [latent.kv_rank], axis=-1)
        wide = contract(own[:, :, 0], up_UHA, Contraction(1, self.dtype, self.dtype))
        plain, values_BSHW = jnp.split(wide, [latent.plain_dim], axis=-1)
        shared = jnp.broadcast_to(rotated, (*plain.shape[:3], latent.rope_dim))
        keys_BSHA = jnp.concatenate([plain, shared], axis=-1)
        return split_attention(queries_BTHA, keys_BSHA, values_BSHW, mask, self.placement)

    def _absorbed(
        self,
        queries_BTHA: Float[Array, "B T H A"],
        latents_BSGA: Float[Array, "B S 1 U"],
        up_UHA: Float[Array, "..."],
        mask: Bool[Array, "B T S"] | CausalMask,
    ) -> Float[Array, "B T H W"]:
        latent = self._latent
        to_keys, to_values = jnp.split(up_UHA.astype(self.dtype), [latent.plain_dim], axis=-1)
        plain, rotated = jnp.split(queries_BTHA, [latent.plain_dim], axis=-1)
        into_latent = _product("bthp,uhp->bthu", plain, to_keys)
        # The scores are those of heads of width A; attention divides by the root of the wider latents'.
        wider = (latents_BSGA.shape[-1] / queries_BTHA.shape[-1]) ** 0.5
        queries = _scaled(jnp.concatenate([into_latent, rotated], axis=-1), wider)
        # The whole rows serve as values too: a slice would copy the cache.
        mean = split_attention(queries, latents_BSGA, latents_BSGA, mask, self.placement)[..., : latent.kv_rank]
        return _product("bthu,uhw->bthw", mean, to_values)


class _UpKernel(nn.Module):
    """The kernel that makes keys and values from latents, with its adapter added: both ways to attend contract it."""

    out_shape: tuple[int, int]
    dtype: Dtype
    param_dtype: Dtype
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, rank: int) -> Float[Array, "U H A"]:
        shape = (rank, *self.out_shape)
        kernel_UHA = self.param("kernel", named(FanIn(1.0, 1), _UP_AXES), shape, jnp.dtype(self.param_dtype))
        adapter = low_rank(self, self.lora, "kernel", WeightAxes(shape, _UP_AXES))
        if adapter is None:
            return kernel_UHA
        return kernel_UHA.astype(jnp.float32) + adapter.scale * jnp.tensordot(adapter.a, adapter.b, 1)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _scaled(queries: Array, factor: float) -> Array:
    return queries if factor == 1 else (queries.astype(jnp.float32) * factor).astype(queries.dtype)
