"""Auxiliary losses, as unweighted float32 scalars. Padding never counts; without any valid token a loss is 0."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from anyexperts_jax.core.remat import ROUTING


def routing_losses(
    logits_NC: Float[Array, "N C"],
    probabilities_NC: Float[Array, "N C"],
    load_SC: Float[Array, "S C"],
    valid_N: Bool[Array, "N"],
) -> dict[str, Float[Array, ""]]:
    """The losses "balance" and "z" of one layer. Values at padding must be finite; their gradient is 0."""
    return {
        "balance": balance_loss(probabilities_NC, load_SC, valid_N),
        "z": masked_mean(jax.nn.logsumexp(logits_NC, axis=-1) ** 2, valid_N),  # ST-MoE's z-loss, on logits before IAR
    }


def balance_loss(
    probabilities_NC: Float[Array, "N C"], load_SC: Float[Array, "S C"], valid_N: Bool[Array, "N"]
) -> Float[Array, ""]:
    """The load-balance loss of Switch, C * sum_c f_c P_c, for each of S contiguous sequences, averaged over them.

    S = 1 is the loss over the batch. f is the share of selected slots and P the mean score before IAR. The loss is 1 if
    either is uniform, and its gradient flows through P only. Sequences without valid tokens do not count in the mean.
    """
    S, C = load_SC.shape
    share_SC = load_SC / jnp.maximum(load_SC.sum(axis=1, keepdims=True), 1)
    # Saved by every remat policy: a recomputed selection could differ in near-ties and change the loss's gradient.
    share_SC = checkpoint_name(jax.lax.stop_gradient(share_SC), ROUTING)
    valid_ST = valid_N.reshape(S, -1)
    tokens_S1 = valid_ST.sum(axis=1, keepdims=True, dtype=jnp.float32)
    probabilities_STC = jnp.where(valid_ST[..., None], probabilities_NC.reshape(S, -1, C), 0)
    mean_SC = probabilities_STC.sum(axis=1) / jnp.maximum(tokens_S1, 1)
    loss_S = C * (share_SC * mean_SC).sum(axis=1)
    return masked_mean(loss_S, tokens_S1[:, 0] > 0)


def masked_mean(values_N: Float[Array, "N"], valid_N: Bool[Array, "N"]) -> Float[Array, ""]:
    """The mean over valid entries; 0 if there are none."""
    return jnp.where(valid_N, values_N, 0).sum() / jnp.maximum(valid_N.sum(dtype=jnp.float32), 1)
