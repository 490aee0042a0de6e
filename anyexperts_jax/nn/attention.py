"""Grouped-query attention with rotary position embeddings and an explicit key/value cache."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.nn.cache import KVCache, written
from anyexperts_jax.nn.config import AttentionConfig, Dtype, LoraConfig
from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.nn.norms import RMSNorm
from anyexperts_jax.nn.rope import Rotations, rotate
from anyexperts_jax.ops.attention import CausalMask
from anyexperts_jax.sharding.attention import split_attention
from anyexperts_jax.sharding.placement import Placement


class Attention(nn.Module):
    """Attention with a float32 softmax. Each of the G key/value heads serves H / G query heads."""

    config: AttentionConfig
    residual_scale: float = 1.0  # scale of the output projection's initial values
    norm_eps: float = 1e-6
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
        cache: KVCache | None = None,
        positions_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends from each position t to the positions s with `mask[b, t, s]`.

        With a cache, keys and values are first written to it at `positions_BT`, and S is the cache's length; without
        one S is T. Returns the output and the updated cache.
        """
        config = self.config
        queries = self._heads(config.num_heads, "heads", "query")(x_BTD)
        keys = self._heads(config.num_kv_heads, "kv_heads", "key")(x_BTD)
        values = self._heads(config.num_kv_heads, "kv_heads", "value")(x_BTD)
        if config.qk_norm:
            queries, keys = self._normed(queries, "query_norm"), self._normed(keys, "key_norm")
        if config.clip_qkv is not None:
            queries, keys, values = (jnp.clip(x, -config.clip_qkv, config.clip_qkv) for x in (queries, keys, values))
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if cache is not None and positions_BT is not None:
            cache = KVCache(
                written(cache.keys_BSGA, keys, positions_BT), written(cache.values_BSGA, values, positions_BT)
            )
            keys, values = cache.keys_BSGA, cache.values_BSGA
        out_BTHA = split_attention(queries, keys, values, mask, self.placement)
        project = Linear(
            x_BTD.shape[-1:],
            ("heads", "head_dim", "embed"),
            num_in=2,
            use_bias=config.out_bias,
            scale=self.residual_scale,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            lora=self.lora,
            name="out",
        )
        return project(out_BTHA), cache

    def _heads(self, heads: int, axis: str, name: str) -> Linear:
        shape, axes = (heads, self.config.head_dim), ("embed", axis, "head_dim")
        bias = self.config.qkv_bias
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "lora": self.lora}
        return Linear(shape, axes, use_bias=bias, name=name, **types)

    def _normed(self, x_BTHA: Float[Array, "B T H A"], name: str) -> Float[Array, "B T H A"]:
        norm = RMSNorm(self.norm_eps, self.dtype, self.param_dtype, name=name)
        if self.config.qk_norm_over == "head":
            return norm(x_BTHA)
        return norm(x_BTHA.reshape(*x_BTHA.shape[:2], -1)).reshape(x_BTHA.shape)
