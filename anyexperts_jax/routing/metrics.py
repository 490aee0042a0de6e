"""Router metrics: load, entropy, slots."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.modality import NUM_MODALITIES
from anyexperts_jax.routing.losses import masked_mean
from anyexperts_jax.routing.select import Selection


def column_load(config: AnyExpertsConfig, selection: Selection, num_sequences: int) -> Float[Array, "S C"]:
    """Selected slots per column and sequence.

    Tied virtual columns share one logit, and ties go to the lowest of them. So their load is averaged over all V.
    """
    selected_NC = selection.columns_NC(config.num_experts, config.num_virtual)
    load_SC = selected_NC.reshape(num_sequences, -1, config.num_columns).sum(axis=1, dtype=jnp.float32)
    if config.switches.virtual_logits == "tied" and config.num_virtual:
        E = config.num_experts
        virtual_S1 = load_SC[:, E:].mean(axis=1, keepdims=True)
        load_SC = load_SC.at[:, E:].set(virtual_S1)
    return load_SC


def routing_metrics(
    config: AnyExpertsConfig,
    probabilities_NC: Float[Array, "N C"],
    importance_N: Float[Array, "N"],
    selection: Selection,
    load_C: Float[Array, "C"],
    valid_N: Bool[Array, "N"],
) -> dict[str, Float[Array, "..."]]:
    """Metrics over valid tokens, float32 and without gradient; 0 if there are no valid tokens.

    "load_C": selected slots per column. "load_max_over_mean": of the real experts. "router_entropy": mean entropy in
    nats of the scores before IAR over all columns; "router_entropy_N": that of each token. "virtual_share": virtual
    slots over all slots. "mean_slots", "mean_real_slots", "mean_importance": per token.
    """
    probabilities_NC = jax.lax.stop_gradient(probabilities_NC)
    real_E = load_C[: config.num_experts]
    real, virtual = (slots_N.astype(jnp.float32) for slots_N in (selection.real_slots_N, selection.virtual_slots_N))
    tiny = jnp.finfo(jnp.float32).tiny  # makes p log p 0, not NaN, for a p of 0
    entropy_N = -(probabilities_NC * jnp.log(jnp.maximum(probabilities_NC, tiny))).sum(axis=1)
    metrics = {
        "load_C": load_C,
        "load_max_over_mean": real_E.max() / jnp.maximum(real_E.mean(), 1 / config.num_experts),
        "router_entropy": masked_mean(entropy_N, valid_N),
        "router_entropy_N": jnp.where(valid_N, entropy_N, 0),
        "mean_slots": masked_mean(real + virtual, valid_N),
        "mean_real_slots": masked_mean(real, valid_N),
        "virtual_share": virtual.sum() / jnp.maximum((real + virtual).sum(), 1),
        "mean_importance": masked_mean(importance_N, valid_N),
    }
    return jax.lax.stop_gradient(metrics)


def by_modality(
    values_BT: Float[ArrayLike, "*B"] | Int[ArrayLike, "*B"],
    modality_BT: Int[ArrayLike, "*B"],
    valid_BT: Bool[ArrayLike, "*B"],
) -> Float[Array, "M"]:
    """The mean of per-token values over the valid tokens of each modality; NaN for a modality without any.

    NaN, because 0 would turn "no video in this batch" into "video tokens got no experts".
    """
    values_BT = jnp.asarray(values_BT, jnp.float32)
    modality_BT, valid_BT = jnp.asarray(modality_BT), jnp.asarray(valid_BT)
    is_in_MN = (modality_BT.ravel()[None] == jnp.arange(NUM_MODALITIES, dtype=jnp.int32)[:, None]) & valid_BT.ravel()[
        None
    ]
    sums_M = jnp.where(is_in_MN, values_BT.ravel()[None], 0).sum(axis=1)
    counts_M = is_in_MN.sum(axis=1)
    return jnp.where(counts_M > 0, sums_M / jnp.maximum(counts_M, 1).astype(jnp.float32), jnp.nan)
