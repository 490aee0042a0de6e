"""Auxiliary losses, unweighted float32 scalars. Padding tokens have no part in any; without a valid token each is 0."""

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
    """ "balance" and "z" of one layer. Values at padding must be finite; they get a gradient of 0."""
    return {
        "balance": balance_loss(probabilities_NC, load_SC, valid_N),
        "z": masked_mean(jax.nn.logsumexp(logits_NC, axis=-1) ** 2, valid_N),  # ST-MoE's z-loss, on logits before IAR
    }


def balance_loss(
    probabilities_NC: Float[Array, "N C"], load_SC: Float[Array, "S C"], valid_N: Bool[Array, "N"]
) -> Float[Array, ""]:
    """Switch form, C * sum_c f_c P_c, per sequence (S of them, contiguous; 1 for the batch), mean over the sequences.

    f is the share of selected slots, P the mean of scores before IAR: the loss is 1 where either is uniform, and its
    gradient flows through P alone. Sequences of padding only are left out of the mean.
    """
    S, C = load_SC.shape
    share_SC = load_SC / jnp.maximum(load_SC.sum(axis=1, keepdims=True), 1)
    share_SC = checkpoint_name(jax.lax.stop_gradient(share_SC), ROUTING)
    valid_ST = valid_N.reshape(S, -1)
    tokens_S1 = valid_ST.sum(axis=1, keepdims=True, dtype=jnp.float32)
    probabilities_STC = jnp.where(valid_ST[..., None], probabilities_NC.reshape(S, -1, C), 0)
    mean_SC = probabilities_STC.sum(axis=1) / jnp.maximum(tokens_S1, 1)
    loss_S = C * (share_SC * mean_SC).sum(axis=1)
    return masked_mean(loss_S, tokens_S1[:, 0] > 0)


def masked_mean(values_N: Float[Array, "N"], valid_N: Bool[Array, "N"]) -> Float[Array, ""]:
    """The mean over valid entries, 0 if there is none."""
    return jnp.where(valid_N, values_N, 0).sum() / jnp.maximum(valid_N.sum(dtype=jnp.float32), 1)
