"""The routers' parameters; what they compute is in `routing.routers`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require
from anyexperts_jax.nn.linear import Contraction, contract
from anyexperts_jax.nn.params import Constant, FanIn, named
from anyexperts_jax.routing.routers.dtr import Hypernetworks, dtr_logits
from anyexperts_jax.routing.routers.linear import mixed_logits, per_modality_logits


class Router(nn.Module):
    """Router logits over E real and V virtual columns, in float32 whatever the compute dtype.

    With `virtual_logits="tied"` one virtual column is learned and stands V times. `config.router` names where the
    logits come from: "linear", one map for all tokens; "per_modality", one for each modality; "dtr", a hypernetwork
    for each modality (EvoMoE); with "_shared", the mixture of that with a linear one.

    Raises:
      UserError: when the router tells modalities apart and no modality ids are given.
    """

    config: AnyExpertsConfig

    @nn.compact
    def __call__(self, x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"] | None = None) -> Float[Array, "N C"]:
        config = self.config
        learned = min(1, config.num_virtual) if config.virtual_logits == "tied" else config.num_virtual
        logits_NC = self._logits(x_ND, modality_N, config.num_experts + learned)
        if not learned:
            return logits_NC
        bias_init = named(Constant(config.virtual_bias_init), ("router",))
        bias_V = self.param("virtual_bias", bias_init, (learned,), jnp.float32)
        real_NE, virtual_NV = jnp.split(logits_NC, [config.num_experts], axis=-1)
        virtual_NV = jnp.broadcast_to(virtual_NV + bias_V, (x_ND.shape[0], config.num_virtual))
        return jnp.concatenate([real_NE, virtual_NV], axis=-1)

    def _logits(self, x_ND: Array, modality_N: Array | None, columns: int) -> Array:
        own, shared, _ = self.config.router.partition("_shared")
        if own == "linear":
            return self._linear(x_ND, columns)
        if modality_N is None:
            require(self.is_initializing(), f"router={self.config.router!r} needs each token's modality: modality_BT")
            modality_N = jnp.zeros(x_ND.shape[0], jnp.int32)
        logits_NC = (self._per_modality if own == "per_modality" else self._dtr)(x_ND, modality_N, columns)
        if not shared:
            return logits_NC
        mix = self.param("mix", named(Constant(0.0), ()), (), jnp.float32)
        return mixed_logits(logits_NC, self._linear(x_ND, columns), mix)

    def _linear(self, x_ND: Array, columns: int) -> Array:
        kernel_init = named(FanIn(), ("embed", "router"))
        kernel_DC = self.param("kernel", kernel_init, (x_ND.shape[-1], columns), jnp.float32)
        return contract(x_ND, kernel_DC, Contraction(precision=jax.lax.Precision.HIGHEST))

    def _per_modality(self, x_ND: Array, modality_N: Array, columns: int) -> Array:
        kernel_init = named(FanIn(num_batch=1), ("modality", "embed", "router"))
        shape = (self.config.router_modalities, x_ND.shape[-1], columns)
        return per_modality_logits(x_ND, modality_N, self.param("kernel_MDC", kernel_init, shape, jnp.float32))

    def _dtr(self, x_ND: Array, modality_N: Array, columns: int) -> Array:
        """Codes, low-rank activations and E start at unit scale, the codes' biases at zero (our reading).

        E is a product of four random maps, with tails to match: phi starts at a quarter of the usual scale, so that the
        softmax of no token begins saturated.
        """
        config, D = self.config, x_ND.shape[-1]
        Z, Q = config.router_hidden, config.router_rank
        sizes = {"router_hidden": Z, "embed": D, "router_rank": Q, "gate_and_up": 2 * Q}

        def weights(name: str, *axes: str, num_in: int) -> Array:
            names = ("modality", *("router_rank" if axis == "gate_and_up" else axis for axis in axes))
            init = named(FanIn(num_in=num_in, num_batch=1) if num_in else Constant(0.0), names)
            shape = (config.router_modalities, *(sizes[axis] for axis in axes))
            return self.param(name, init, shape, jnp.float32)

        hypernetworks = Hypernetworks(
            encode_MDZ=weights("encode_MDZ", "embed", "router_hidden", num_in=1),
            encode_bias_MZ=weights("encode_bias_MZ", "router_hidden", num_in=0),
            down_MZDW=weights("down_MZDW", "router_hidden", "embed", "gate_and_up", num_in=2),
            down_bias_MDW=weights("down_bias_MDW", "embed", "gate_and_up", num_in=1),
            up_MZQD=weights("up_MZQD", "router_hidden", "router_rank", "embed", num_in=2),
            up_bias_MQD=weights("up_bias_MQD", "router_rank", "embed", num_in=1),
        )
        phi_DC = self.param("phi", named(FanIn(scale=0.25), ("embed", "router")), (D, columns), jnp.float32)
        return dtr_logits(x_ND, modality_N, hypernetworks, phi_DC, gelu=config.router_gelu)
