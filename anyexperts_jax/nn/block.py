"""Pre-norm decoder blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.nn.attention import Attention
from anyexperts_jax.nn.cache import AttentionCache, LayerCaches
from anyexperts_jax.nn.config import StackConfig
from anyexperts_jax.nn.importance import ImportanceMLP
from anyexperts_jax.nn.latent_attention import LatentAttention
from anyexperts_jax.nn.mlp import SwiGLU
from anyexperts_jax.nn.moe import MoE, MoEContext
from anyexperts_jax.nn.norms import RMSNorm
from anyexperts_jax.nn.rope import Rotations
from anyexperts_jax.ops.attention import CausalMask
from anyexperts_jax.ops.experts import ExpertWeights, StackedExperts
from anyexperts_jax.routing.importance import importance, modulate
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.sharding.placement import Placement

STREAM = "stream"  # a mutable collection of this name records the stream after every block


@register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockContext:
    """The inputs that all blocks of a stack share."""

    positions_BT: Int[Array, "B T"]  # where the cache is written
    valid_BT: Bool[Array, "B T"]
    mask: Bool[Array, "B T S"] | CausalMask  # True: position t attends to s
    rotation: Rotations | None = None
    window: Float[Array, "*rest 2"] | None = None  # of all MoE layers; [L, 2]; of tokens, [B, T, 2] or [L, B, T, 2]
    modality_BT: Int[Array, "B T"] | None = None  # for routers with per-modality weights
    segment_BT: Int[Array, "B T"] | None = None  # for layers that separate packed examples; attention uses the mask
    importance_logits_BT: Float[Array, "B T"] | None = None  # replace every layer's own, where the caller has them
    deep_JBTD: Float[Array, "J B T D"] | None = None  # added to the stream, one after each of the first J layers
    experts: ExpertWeights | None = None  # of all MoE layers, [L * E, D, F], where each reads its own in place


def add_deep(
    x_BTD: Float[Array, "B T D"], deep_JBTD: Float[Array, "J B T D"] | None, layer: int | Int[Array, ""]
) -> Float[Array, "B T D"]:
    """The stream after layer number `layer`, plus that layer's entry of `deep_JBTD` (DeepStack, arXiv 2406.04334)."""
    if deep_JBTD is None or not deep_JBTD.shape[0]:
        return x_BTD
    count = deep_JBTD.shape[0]
    if isinstance(layer, int):
        return x_BTD + deep_JBTD[layer].astype(x_BTD.dtype) if layer < count else x_BTD
    own_BTD = deep_JBTD[jnp.minimum(layer, count - 1)].astype(x_BTD.dtype)
    return x_BTD + jnp.where(layer < count, own_BTD, 0)


def record_stream(block: nn.Module, x_BTD: Float[Array, "B T D"]) -> None:
    """Records the stream after a block, if the caller asked for the collection STREAM."""
    if block.is_mutable_collection(STREAM) and not block.is_initializing():
        block.sow(STREAM, "after_BTD", x_BTD, reduce_fn=lambda _, new: new)


def _norm(config: StackConfig, name: str) -> RMSNorm:
    return RMSNorm(config.norm_eps, config.dtype, config.param_dtype, name=name)


class SelfAttention(nn.Module):
    """x + Attention(Norm(x))."""

    config: StackConfig
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: BlockContext, cache: AttentionCache | None
    ) -> tuple[Float[Array, "B T D"], AttentionCache | None]:
        config = self.config
        shared: dict[str, Any] = {
            "residual_scale": config.residual_scale,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
            "placement": self.placement,
            "lora": config.lora,
            "name": "attention",
        }
        attention: nn.Module = (
            Attention(config.attention, norm_eps=config.norm_eps, **shared)
            if config.attention.latent is None
            else LatentAttention(config.attention, **shared)
        )
        normed_BTD = _norm(config, "norm")(x_BTD)
        y_BTD, cache = attention(normed_BTD, context.mask, context.rotation, cache, context.positions_BT)
        return x_BTD + y_BTD.astype(x_BTD.dtype), cache


class DenseBlock(nn.Module):
    """Attention, then a dense SwiGLU."""

    config: StackConfig
    placement: Placement | None = None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: BlockContext, cache: AttentionCache | None = None
    ) -> tuple[Float[Array, "B T D"], AttentionCache | None]:
        x_BTD, cache, _ = self.with_input(x_BTD, context, cache)
        return x_BTD, cache

    @nn.compact
    def with_input(
        self, x_BTD: Float[Array, "B T D"], context: BlockContext, cache: AttentionCache | None
    ) -> tuple[Float[Array, "B T D"], AttentionCache | None, Float[Array, "B T D"]]:
        """The output, the updated cache, and what the SwiGLU reads."""
        config = self.config
        x_BTD, cache = SelfAttention(config, self.placement, name="self_attention")(x_BTD, context, cache)
        types = (config.dtype, config.param_dtype)
        mlp = SwiGLU(config.d_ff, config.residual_scale, *types, use_bias=config.mlp_bias, lora=config.lora, name="mlp")
        normed_BTD = _norm(config, "norm")(x_BTD)
        x_BTD = x_BTD + mlp(normed_BTD).astype(x_BTD.dtype)
        record_stream(self, x_BTD)
        return x_BTD, cache, normed_BTD


def dense_blocks(
    config: StackConfig, placement: Placement | None, block: type[nn.Module], name: str, count: int
) -> Callable[..., tuple[Array, LayerCaches | None]]:
    """`count` dense blocks in sequence, named `name`_0 and so on, each with its own cache.

    The function takes the stream, the context, the cache, and the first block's number among all layers.
    """

    def run(
        x_BTD: Array, context: BlockContext, caches: LayerCaches | None, first: int | Array = 0
    ) -> tuple[Array, LayerCaches | None]:
        written = []
        for i in range(count):
            own = None if caches is None else caches[i]
            x_BTD, own = block(config, placement, name=f"{name}_{i}")(x_BTD, context, own)
            x_BTD = add_deep(x_BTD, context.deep_JBTD, first + i)
            written.append(own)
        return x_BTD, None if caches is None else tuple(written)

    return run


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEBlockCache:
    """The caches of a MoE block and of each dense block before it. The scan stacks these over MoE blocks."""

    before: LayerCaches
    moe: AttentionCache


class OfBlock(NamedTuple):
    """What each MoE block of a stack has of its own. The scan stacks these over MoE blocks."""

    bias_C: Float[Array, "*M C"] | None = None
    window: Float[Array, "*tokens 2"] | None = None  # in place of the context's
    number: Int[Array, ""] | None = None  # of the block; needed with the context's `deep_JBTD` or `experts`


def mixture(config: StackConfig, moe: AnyExpertsConfig, placement: Placement | None) -> MoE:
    """The experts of a block, as a submodule called "moe"."""
    return MoE(
        moe,
        config.expert_d_ff,
        num_shared_experts=config.num_shared_experts,
        execution=config.execution,
        residual_scale=config.residual_scale,
        norm_eps=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        placement=placement,
        lora=config.lora,
        name="moe",
    )


def mixture_context(
    moe: AnyExpertsConfig, context: BlockContext, of_block: OfBlock, importance_logits_BT: Float[Array, "B T"] | None
) -> MoEContext:
    """What the experts of a block are told."""
    window = context.window if of_block.window is None else of_block.window
    in_place = None
    if context.experts is not None and of_block.number is not None:
        in_place = StackedExperts(context.experts, of_block.number * moe.num_experts)
    seen = (context.valid_BT, context.modality_BT, window, of_block.bias_C, importance_logits_BT)
    return MoEContext(*seen, experts=in_place)


class MoEBlock(nn.Module):
    """`moe_every` - 1 dense blocks, then attention and the experts.

    With `hsm_site="residual"`, h' = h + alpha w h replaces the residual stream before the experts.
    """

    config: StackConfig
    moe: AnyExpertsConfig
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: BlockContext,
        of_block: OfBlock | None = None,
        cache: MoEBlockCache | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[RoutingTrace, MoEBlockCache | None]]:
        of_block = of_block or OfBlock()
        config, number = self.config, of_block.number
        first = 0 if number is None else config.num_dense_layers + config.moe_every * number
        x_BTD, before = dense_blocks(config, self.placement, DenseBlock, "before", config.moe_every - 1)(
            x_BTD, context, None if cache is None else cache.before, first
        )
        attention = SelfAttention(config, self.placement, name="self_attention")
        x_BTD, own = attention(x_BTD, context, None if cache is None else cache.moe)
        importance_logits_BT = context.importance_logits_BT
        if self.moe.switches.hsm_site == "residual":
            if importance_logits_BT is None:
                mlp = ImportanceMLP(self.moe.switches.importance_mlp, config.norm_eps, name="importance")
                importance_logits_BT = mlp(x_BTD)
            x_BTD = modulate(x_BTD, importance(importance_logits_BT), self.moe.alpha)
        layer = mixture(config, self.moe, self.placement)
        normed_BTD = _norm(config, "norm")(x_BTD)
        y_BTD, trace = layer(normed_BTD, mixture_context(self.moe, context, of_block, importance_logits_BT))
        written = None if before is None or own is None else MoEBlockCache(before, own)
        x_BTD = add_deep(x_BTD + y_BTD.astype(x_BTD.dtype), context.deep_JBTD, first + config.moe_every - 1)
        record_stream(self, x_BTD)
        return x_BTD, (trace, written)
