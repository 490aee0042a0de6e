"""Pre-norm decoder blocks."""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.nn.attention import Attention, KVCache, Rotations
from anyexperts_jax.nn.config import StackConfig
from anyexperts_jax.nn.importance import ImportanceMLP
from anyexperts_jax.nn.mlp import SwiGLU
from anyexperts_jax.nn.moe import MoE
from anyexperts_jax.nn.norms import RMSNorm
from anyexperts_jax.ops.attention import CausalMask
from anyexperts_jax.routing.importance import importance, modulate
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.sharding.expert_parallel import Placement


@register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockContext:
    """What every block of a stack sees alike."""

    positions_BT: Int[Array, "B T"]  # where a cache is written
    valid_BT: Bool[Array, "B T"]
    mask: Bool[Array, "B T S"] | CausalMask  # position t attends to s
    rotation: Rotations | None = None
    window: Float[Array, "2"] | None = None


def _norm(config: StackConfig, name: str) -> RMSNorm:
    return RMSNorm(config.norm_eps, config.dtype, config.param_dtype, name=name)


class SelfAttention(nn.Module):
    """x + Attention(Norm(x))."""

    config: StackConfig
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: BlockContext, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        config = self.config
        attention = Attention(
            config.attention,
            config.residual_scale,
            config.norm_eps,
            config.dtype,
            config.param_dtype,
            self.placement,
            name="attention",
        )
        normed_BTD = _norm(config, "norm")(x_BTD)
        y_BTD, cache = attention(normed_BTD, context.mask, context.rotation, cache, context.positions_BT)
        return x_BTD + y_BTD, cache


class DenseBlock(nn.Module):
    """Attention, then a dense SwiGLU."""

    config: StackConfig
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: BlockContext, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        config = self.config
        x_BTD, cache = SelfAttention(config, self.placement, name="self_attention")(x_BTD, context, cache)
        mlp = SwiGLU(config.d_ff, config.residual_scale, config.dtype, config.param_dtype, name="mlp")
        return x_BTD + mlp(_norm(config, "norm")(x_BTD)), cache


class MoEBlock(nn.Module):
    """Attention, then the experts. With `hsm_site="residual"` h' = h + alpha w h replaces the stream first."""

    config: StackConfig
    moe: AnyExpertsConfig
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: BlockContext,
        bias_C: Float[Array, "C"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[RoutingTrace, KVCache | None]]:
        config = self.config
        x_BTD, cache = SelfAttention(config, self.placement, name="self_attention")(x_BTD, context, cache)
        importance_logits_BT = None
        if self.moe.hsm_site == "residual":
            mlp = ImportanceMLP(self.moe.importance_mlp, config.norm_eps, name="importance")
            importance_logits_BT = mlp(x_BTD)
            x_BTD = modulate(x_BTD, importance(importance_logits_BT), self.moe.alpha)
        layer = MoE(
            self.moe,
            config.expert_d_ff,
            config.num_shared_experts,
            config.dispatch,
            config.expert_mlp,
            config.expert_residuals,
            config.residual_scale,
            config.norm_eps,
            config.dtype,
            config.param_dtype,
            self.placement,
            name="moe",
        )
        normed_BTD = _norm(config, "norm")(x_BTD)
        y_BTD, trace = layer(normed_BTD, context.valid_BT, bias_C, context.window, importance_logits_BT)
        return x_BTD + y_BTD, (trace, cache)
