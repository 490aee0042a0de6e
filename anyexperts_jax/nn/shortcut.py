"""LongCat-Flash's block (arXiv 2509.01322): a mixture of experts on a path of its own beside two dense layers."""

import flax.linen as nn
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.nn.block import (
    BlockContext,
    DenseBlock,
    MoEBlockCache,
    OfBlock,
    add_deep,
    mixture,
    mixture_context,
    record_stream,
)
from anyexperts_jax.nn.config import StackConfig
from anyexperts_jax.routing.trace import RoutingTrace
from anyexperts_jax.sharding.placement import Placement


class ShortcutBlock(nn.Module):
    """`MoEBlock` of a stack with `shortcut`: two layers of attention and a dense SwiGLU each, and the experts, which
    read what the first SwiGLU reads and whose output is added behind the second.

    So a device can exchange rows for the experts while it computes the second layer.
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
        first = 0 if number is None else config.num_dense_layers + 2 * number
        before = None if cache is None else cache.before[0]
        leading = DenseBlock(config, self.placement, name="before_0")
        x_BTD, before, read_BTD = leading.with_input(x_BTD, context, before)
        x_BTD = add_deep(x_BTD, context.deep_JBTD, first)
        told = mixture_context(self.moe, context, of_block, context.importance_logits_BT)
        y_BTD, trace = mixture(config, self.moe, self.placement)(read_BTD, told)
        last = DenseBlock(config, self.placement, name="after")
        x_BTD, own = last(x_BTD, context, None if cache is None else cache.moe)
        x_BTD = add_deep(x_BTD + y_BTD.astype(x_BTD.dtype), context.deep_JBTD, first + 1)
        record_stream(self, x_BTD)
        if before is None or own is None:
            return x_BTD, (trace, None)
        return x_BTD, (trace, MoEBlockCache((before,), own))
