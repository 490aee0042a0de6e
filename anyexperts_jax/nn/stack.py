"""The stack of blocks. Scan over layers and rematerialisation happen here and nowhere else."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.remat import remat_policy
from anyexperts_jax.core.tree import register_dataclass
from anyexperts_jax.dispatch.in_place import reads_in_place
from anyexperts_jax.nn.block import STREAM, BlockContext, DenseBlock, MoEBlock, MoEBlockCache, OfBlock, dense_blocks
from anyexperts_jax.nn.cache import AttentionCache, LayerCaches, empty_cache
from anyexperts_jax.nn.config import StackConfig
from anyexperts_jax.nn.shortcut import ShortcutBlock
from anyexperts_jax.ops.experts import ExpertWeights
from anyexperts_jax.routing.trace import RoutingTrace, empty_trace
from anyexperts_jax.sharding.placement import Placement


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StackCache:
    """Attention's caches of each leading dense layer, and of the MoE blocks, stacked over these."""

    dense: LayerCaches
    blocks: MoEBlockCache

    @property
    def length(self) -> int:
        """The number of positions that the cache can hold."""
        return (*self.dense, self.blocks.moe)[0].length


def empty_stack_cache(config: StackConfig, batch_size: int, length: int) -> StackCache:
    def cache(*layers: int) -> AttentionCache:
        return empty_cache(config.attention, batch_size, length, config.dtype, *layers)

    before = tuple(cache(config.num_moe_layers) for _ in range(config.moe_every - 1))
    dense = tuple(cache() for _ in range(config.num_dense_layers))
    return StackCache(dense, MoEBlockCache(before, cache(config.num_moe_layers)))


class Stack(nn.Module):
    """Leading dense blocks in sequence, then the MoE blocks as a `scan` over stacked parameters."""

    config: StackConfig
    moe: AnyExpertsConfig
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: BlockContext,
        router_bias_LC: Float[Array, "L *M C"] | None = None,
        cache: StackCache | None = None,
    ) -> tuple[Float[Array, "B T D"], RoutingTrace, StackCache | None]:
        """Returns the last block's output, the routing traces stacked over MoE layers, and the updated cache."""
        dense_block, moe_block = self._blocks()
        leading = dense_blocks(self.config, self.placement, dense_block, "dense", self.config.num_dense_layers)
        x_BTD, dense_cache = leading(x_BTD, context, None if cache is None else cache.dense)
        if not self.config.num_moe_layers:
            written = None if cache is None or dense_cache is None else StackCache(dense_cache, cache.blocks)
            return x_BTD, empty_trace(self.moe, *x_BTD.shape[:2]), written
        of_layers = context.window is not None and context.window.ndim in (2, 4)
        in_place = cache is not None and self._reads_in_place(x_BTD)
        if in_place:
            context = dataclasses.replace(context, experts=self._stacked_experts())
        numbered = in_place or context.deep_JBTD is not None
        of_blocks = OfBlock(
            bias_C=router_bias_LC,
            window=context.window if of_layers else None,
            number=jnp.arange(self.config.num_moe_layers, dtype=jnp.int32) if numbered else None,
        )
        scanned = nn.scan(
            moe_block,
            variable_axes={"params": 0, "probe": 0, STREAM: 0},
            split_rngs={"params": True, "routing": True, "shuffle": True},
            in_axes=(nn.broadcast, 0, 0),
            length=self.config.num_moe_layers,
            unroll=self.config.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layers = scanned(self.config, self.moe, self.placement, name="moe_layers")
        own = None if cache is None else cache.blocks
        x_BTD, (trace, blocks) = layers(x_BTD, context, of_blocks, own)
        return x_BTD, trace, None if dense_cache is None else StackCache(dense_cache, blocks)

    def _reads_in_place(self, x_BTD: Float[Array, "B T D"]) -> bool:
        """Whether each layer reads the experts that it hits from the stacked weights, to which no adapter is added."""
        config, (batch, length, _) = self.config, x_BTD.shape
        if config.lora is not None:
            return False
        stored: dict[str, Any] = {"weights": self._stacked_experts(), "dtype": jnp.dtype(config.dtype)}
        return reads_in_place(self.moe, batch * length, config.execution, self.placement, **stored)

    def _stacked_experts(self) -> ExpertWeights:
        """The experts of all MoE layers, [L * E, D, F]: the parameters of the scan with their first axes joined."""
        stored = self.variables["params"]["moe_layers"]["moe"]["experts"]
        names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
        return ExpertWeights(*(jnp.reshape(stored[name], (-1, *stored[name].shape[2:])) for name in names))

    def _blocks(self) -> tuple[type[nn.Module], type[nn.Module]]:
        block = ShortcutBlock if self.config.shortcut else MoEBlock
        if self.config.remat == "none":
            return DenseBlock, block
        policy = remat_policy(self.config.remat)
        # XLA's CSE would merge the recomputation with the original and so undo remat. A loop prevents that; if the scan
        # is unrolled, barriers must.
        unrolled = self.config.scan_unroll > 1
        return nn.remat(DenseBlock, policy=policy), nn.remat(block, policy=policy, prevent_cse=unrolled)
