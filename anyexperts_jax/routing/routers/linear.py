"""Linear routers: one map for each modality, and the mixture of any router with a shared one (EvoMoE's comparisons)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def per_modality_logits(
    x_ND: Float[Array, "N D"], modality_N: Int[Array, "N"], kernel_MDC: Float[Array, "M D C"]
) -> Float[Array, "N C"]:
    """x_n times the kernel of token n's modality. Ids must be in [0, M); all M maps run on every token."""
    logits_NMC = jnp.einsum("nd,mdc->nmc", x_ND.astype(jnp.float32), kernel_MDC, precision=jax.lax.Precision.HIGHEST)
    return jnp.take_along_axis(logits_NMC, modality_N[:, None, None], axis=1)[:, 0]


def mixed_logits(
    own_NC: Float[Array, "N C"], shared_NC: Float[Array, "N C"], mix: Float[Array, ""]
) -> Float[Array, "N C"]:
    """(1 - a) own + a shared with a = sigmoid(mix), one learned number a layer.

    EvoMoE compares "with a weighted shared router" and does not say how it is weighted (our reading).
    """
    share = jax.nn.sigmoid(mix)
    return (1 - share) * own_NC + share * shared_NC
