"""What the encoders of patches and of audio frames have in common."""

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from anyexperts_jax.nn.block import BlockContext, DenseBlock
from anyexperts_jax.nn.config import StackConfig
from anyexperts_jax.nn.linear import Linear
from anyexperts_jax.nn.mlp import SwiGLU
from anyexperts_jax.nn.norms import RMSNorm


class FeatureEmbedding(nn.Module):
    """One linear map from the features of a patch or frame to the model's width."""

    config: StackConfig

    @nn.compact
    def __call__(self, features: Float[Array, "B rows X"]) -> Float[Array, "B rows D"]:
        config = self.config
        types: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        return Linear((config.d_model,), ("features", "embed"), use_bias=True, name="linear", **types)(features)


class EncoderTail(nn.Module):
    """Optional bidirectional transformer layers, one feed-forward layer, and a norm that gives the scale of text
    embeddings."""

    config: StackConfig
    num_layers: int
    d_ff: int

    @nn.compact
    def __call__(self, x_BRD: Float[Array, "B rows D"], context: BlockContext) -> Float[Array, "B rows D"]:
        config = dataclasses.replace(self.config, d_ff=self.d_ff)
        types = (config.dtype, config.param_dtype)
        for i in range(self.num_layers):
            x_BRD, _ = DenseBlock(config, name=f"layer_{i}")(x_BRD, context)
        normed = RMSNorm(config.norm_eps, *types, name="norm")(x_BRD)
        x_BRD = x_BRD + SwiGLU(self.d_ff, config.residual_scale, *types, name="mlp")(normed)
        return RMSNorm(config.norm_eps, *types, name="final_norm")(x_BRD)
