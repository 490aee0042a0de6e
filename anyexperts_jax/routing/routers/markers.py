"""A router that estimates the norm of every expert's output from a few of the expert's own neurons, its markers.

It is made for a dense network that was cut into experts. It needs no training, since the markers' weights are the
network's own (after CMoE, arXiv 2502.04416, which takes one neuron per expert). The softmax of these logits is each
expert's share of the sum of all norms.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.initializers import FanIn, Param
from anyexperts_jax.routing.routers.base import Params, Router, linear_logits

_TINY = 1e-20  # keeps the logarithm of a norm of 0 finite


def _params(config: AnyExpertsConfig, d_model: int, columns: int) -> dict[str, Param]:
    shape = (d_model, config.num_experts * config.router_markers)
    own = {name: Param(shape, ("embed", "router"), FanIn()) for name in ("gate_kernel", "up_kernel")}
    virtual = columns - config.num_experts
    return {**own, "virtual_kernel": Param((d_model, virtual), ("embed", "router"), FanIn())} if virtual else own


def _logits(
    config: AnyExpertsConfig, params: Params, x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"] | None
) -> Float[Array, "N C"]:
    """Returns the logarithms of the estimated norms; virtual experts, which have no neurons, get a linear map."""
    mapped = {name: linear_logits(config, {"kernel": kernel}, x_ND, modality_N) for name, kernel in params.items()}
    size_NQ = jnp.abs(jax.nn.silu(mapped["gate_kernel"]) * mapped["up_kernel"])
    real_NE = jnp.log(size_NQ.reshape(x_ND.shape[0], config.num_experts, -1).mean(axis=-1) + _TINY)
    return jnp.concatenate([real_NE, mapped["virtual_kernel"]], axis=1) if "virtual_kernel" in mapped else real_NE


MARKERS = Router(_params, _logits)
