"""The router as a module: declares the parameters of an entry of ROUTERS; `routing.routers` computes the logits."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.arrays import require_ids
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.initializers import Constant
from anyexperts_jax.core.registries import ROUTERS
from anyexperts_jax.nn.params import named


def router_of(config: AnyExpertsConfig, modality_N: Int[Array, "N"] | None) -> Int[Array, "N"] | None:
    """Which of the M routers reads each token."""
    if modality_N is None or not config.router_of_modality:
        return modality_N
    return jnp.asarray(config.router_of_modality, jnp.int32)[modality_N]


class Router(nn.Module):
    """Router logits over E real and V virtual columns, in float32 whatever the compute dtype.

    `config.router` names the entry of ROUTERS that computes them. With `virtual_logits="tied"` a single virtual column
    is learned and repeated V times, and with "unbiased" virtual columns have no bias, as real ones have none.

    Raises:
      UserError: if the router depends on modalities, and no modality ids are given or one is out of range.
    """

    config: AnyExpertsConfig

    @nn.compact
    def __call__(self, x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"] | None = None) -> Float[Array, "N C"]:
        config, router = self.config, ROUTERS[self.config.router]
        tied = config.switches.virtual_logits == "tied"
        learned = min(1, config.num_virtual) if tied else config.num_virtual
        if modality_N is None and router.needs_modality:
            require(self.is_initializing(), f"router={config.router!r} needs each token's modality: modality_BT")
            modality_N = jnp.zeros(x_ND.shape[0], jnp.int32)
        if modality_N is not None and router.needs_modality:
            meaning = f"router={config.router!r} tells {config.router_modalities} modalities apart"
            most = len(config.router_of_modality) or config.router_modalities
            require_ids("modality_BT", modality_N, most, meaning)
        modality_N = router_of(config, modality_N)
        declared = router.params(config, x_ND.shape[-1], config.num_experts + learned)
        params = {
            name: self.param(name, named(one.init, one.axes), one.shape, jnp.float32) for name, one in declared.items()
        }
        logits_NC = router.logits(config, params, x_ND, modality_N)
        if not learned or config.switches.virtual_logits == "unbiased":
            return logits_NC
        bias_init = named(Constant(config.switches.virtual_bias_init), ("router",))
        bias_V = self.param("virtual_bias", bias_init, (learned,), jnp.float32)
        real_NE, virtual_NV = jnp.split(logits_NC, [config.num_experts], axis=-1)
        virtual_NV = jnp.broadcast_to(virtual_NV + bias_V[None], (x_ND.shape[0], config.num_virtual))
        return jnp.concatenate([real_NE, virtual_NV], axis=-1)
