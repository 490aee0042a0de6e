"""A router that estimates the norm of every expert's output from a few of its own neurons, its markers.

For a dense network that was cut into experts: no training is needed, since the markers' weights are the network's own
(after CMoE, arXiv 2502.04416, which takes one neuron an expert). The softmax of these logits is an expert's share of
the sum of all norms.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.initializers import FanIn, Param
from anyexperts_jax.routing.routers.base import Params, Router, linear_logits

_TINY = 1e-20  # keeps the logarithm of a norm of 0 finite


def _params(config: AnyExpertsConfig, d_model: int, columns: int) -> dict[str, Param]:
    require(
        columns == config.num_experts, f"router='markers' has no virtual experts, but num_virtual={config.num_virtual}"
    )
    shape = (d_model, config.num_experts * config.router_markers)
    return {name: Param(shape, ("embed", "router"), FanIn()) for name in ("gate_kernel", "up_kernel")}


def _logits(
    config: AnyExpertsConfig, params: Params, x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"] | None
) -> Float[Array, "N E"]:
    gate_NQ, up_NQ = (
        linear_logits(config, {"kernel": params[name]}, x_ND, modality_N) for name in ("gate_kernel", "up_kernel")
    )
    size_NQ = jnp.abs(jax.nn.silu(gate_NQ) * up_NQ)
    return jnp.log(size_NQ.reshape(x_ND.shape[0], config.num_experts, -1).mean(axis=-1) + _TINY)


MARKERS = Router(_params, _logits)
