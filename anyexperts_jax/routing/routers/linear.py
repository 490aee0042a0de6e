"""Linear routers: one map for all tokens, or one per modality (the baselines in EvoMoE)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.initializers import FanIn, Param
from anyexperts_jax.routing.routers.base import Params, Router, linear_logits, linear_params, with_shared


def _apart_params(config: AnyExpertsConfig, d_model: int, columns: int) -> dict[str, Param]:
    own = linear_params(config, d_model, config.num_experts)
    if columns == config.num_experts:
        return own
    shape = (d_model, columns - config.num_experts)
    return {**own, "virtual_kernel": Param(shape, ("embed", "router"), FanIn())}


def _apart_logits(
    config: AnyExpertsConfig, params: Params, x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"] | None
) -> Float[Array, "N C"]:
    """Computes two products, so that the real columns equal, bit for bit, those of a router without virtual ones."""
    real_NE = linear_logits(config, params, x_ND, modality_N)
    if "virtual_kernel" not in params:
        return real_NE
    virtual_NV = linear_logits(config, {"kernel": params["virtual_kernel"]}, x_ND, modality_N)
    return jnp.concatenate([real_NE, virtual_NV], axis=1)


def per_modality_logits(
    x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"], kernel_MDC: Float[Array, "M D C"]
) -> Float[Array, "N C"]:
    """Multiplies x_n with the kernel of token n's modality. Ids must be in [0, M); all M maps run on every token."""
    logits_NMC = jnp.einsum("nd,mdc->nmc", x_ND.astype(jnp.float32), kernel_MDC, precision=jax.lax.Precision.HIGHEST)
    return jnp.take_along_axis(logits_NMC, modality_N[:, None, None], axis=1)[:, 0]


def _params(config: AnyExpertsConfig, d_model: int, columns: int) -> dict[str, Param]:
    shape = (config.router_modalities, d_model, columns)
    return {"kernel_MDC": Param(shape, ("modality", "embed", "router"), FanIn(num_batch=1))}


def _logits(
    config: AnyExpertsConfig, params: Params, x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"] | None
) -> Float[Array, "N C"]:
    del config
    assert modality_N is not None  # the caller checks `needs_modality`
    return per_modality_logits(x_ND, modality_N, params["kernel_MDC"])


LINEAR = Router(linear_params, linear_logits)
LINEAR_APART = Router(_apart_params, _apart_logits)  # keeps the virtual columns in a separate parameter
PER_MODALITY = Router(_params, _logits, needs_modality=True)
PER_MODALITY_SHARED = with_shared(PER_MODALITY)
