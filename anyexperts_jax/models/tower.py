"""The transformer block that the vision and the audio tower of published models have in common."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from anyexperts_jax.models.config import AudioTowerConfig, VisionTowerConfig
from anyexperts_jax.nn.attention import Attention
from anyexperts_jax.nn.config import AttentionConfig, Dtype
from anyexperts_jax.nn.mlp import GeluMLP
from anyexperts_jax.nn.norms import LayerNorm
from anyexperts_jax.nn.rope import Rotations
from anyexperts_jax.sharding.placement import Placement


class TowerBlock(nn.Module):
    """Attention among the rows of an item (a frame of a picture, a window of a sound), then an MLP, each behind a
    LayerNorm."""

    config: VisionTowerConfig | AudioTowerConfig
    exact: bool = False  # whether GELU is exact, in place of its usual approximation
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self, x_FPD: Float[Array, "F P D"], mask_FPP: Bool[Array, "F P P"], rotation: Rotations | None = None
    ) -> Float[Array, "F P D"]:
        config = self.config
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = AttentionConfig(
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.d_model // config.num_heads,
            qkv_bias=True,
            out_bias=True,
        )
        scale = (2 * config.num_layers) ** -0.5
        attention = Attention(heads, residual_scale=scale, placement=self.placement, name="attention", **types)
        y_FPD, _ = attention(LayerNorm(config.norm_eps, name="attention_norm", **types)(x_FPD), mask_FPP, rotation)
        x_FPD = x_FPD + y_FPD
        mlp = GeluMLP(config.d_ff, config.d_model, exact=self.exact, residual_scale=scale, name="mlp", **types)
        return x_FPD + mlp(LayerNorm(config.norm_eps, name="mlp_norm", **types)(x_FPD))
