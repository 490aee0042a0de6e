"""Combine weights: the scores of the selected slots after IAR, normalised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.routing.scores import normalise, score_factor, tilt_logits
from anyexperts_jax.routing.select import Selection


def combine_weights(
    config: AnyExpertsConfig,
    logits_NC: Float[Array, "N C"],
    importance_N: Float[Array, "N"],
    continuous_slots_N: Float[Array, "N"],
    selection: Selection,
) -> tuple[Float[Array, "N K"], Float[Array, "N"]]:
    """The weight of each real slot and the sum of the virtual slots' weights; 0 where there is no slot.

    normalisation="all": score / (sum over selected real and virtual slots + 1e-20). "real": the weights of the real
    slots sum to one, and the virtual weight is that of "all", so that it stays bounded and is defined for a token with
    virtual slots only (our reading). "none": the scores over all columns, as in Switch and in MoE-LLaVA's top-1.
    "one": every slot has weight 1, with the gradient of "none"; for a dense network that was split into experts.
    "all_raw_gradient": the values of "all" with the gradient of "none", an extension of ours: under "all" the weight of
    a token's only slot is 1 whatever its logit, and so the task loss gives the router no gradient. All weights are
    multiplied by `scaling_factor`. The expert bias affects the selection only.
    """
    real_NK, virtual_NJ, to_raw_N1 = _selected_scores(config, logits_NC, importance_N, selection)
    if config.switches.slot_gradient == "straight_through":
        real_NK, virtual_NJ = _fade_last_slot(real_NK, virtual_NJ, continuous_slots_N, selection)
    raw_NK, raw_NJ = to_raw_N1 * real_NK, to_raw_N1 * virtual_NJ
    weights_NK, virtual_weights_NJ = normalise(real_NK, virtual_NJ)
    if config.switches.normalisation == "none":
        weights_NK, virtual_weights_NJ = raw_NK, raw_NJ
    elif config.switches.normalisation == "one":
        weights_NK = with_gradient_of(selection.real_live_NK.astype(jnp.float32), raw_NK)
        virtual_weights_NJ = with_gradient_of(selection.virtual_live_NJ.astype(jnp.float32), raw_NJ)
    elif config.switches.normalisation == "all_raw_gradient":
        weights_NK = with_gradient_of(weights_NK, raw_NK)
        virtual_weights_NJ = with_gradient_of(virtual_weights_NJ, raw_NJ)
    elif config.switches.normalisation == "real":
        (weights_NK,) = normalise(real_NK)
    return config.scaling_factor * weights_NK, config.scaling_factor * virtual_weights_NJ.sum(axis=1)


def with_gradient_of(value: Float[Array, "*shape"], source: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `value` and passes its gradient to `source` (straight-through)."""
    return jax.lax.stop_gradient(value) + (source - jax.lax.stop_gradient(source))


def _selected_scores(
    config: AnyExpertsConfig,
    logits_NC: Float[Array, "N C"],
    importance_N: Float[Array, "N"],
    selection: Selection,
) -> tuple[Float[Array, "N K"], Float[Array, "N J"], Float[Array, "N 1"]]:
    """Scores after IAR of the selected real and virtual slots, 0 elsewhere, and each token's factor to the true scores.

    Softmax scores are computed relative to the largest *selected* logit. So they cannot all underflow if a column
    outside the selection is far larger; the factor restores the softmax over all columns. For sigmoid scores it is 1.
    """
    live_NK, live_NJ = selection.real_live_NK, selection.virtual_live_NJ
    real_NK = jnp.take_along_axis(logits_NC, selection.real_ids_NK, axis=1)
    virtual_NJ = jnp.take_along_axis(logits_NC, config.num_experts + selection.virtual_ids_NJ, axis=1)
    real_NK = tilt_logits(config, real_NK, importance_N, +1)
    virtual_NJ = tilt_logits(config, virtual_NJ, importance_N, -1)
    if config.scores == "softmax":
        # The logits of dead slots are set to 0 before exp: the exp of an unselected logit may overflow, and masking
        # afterwards would give inf * 0 = NaN in the backward pass.
        top_N1 = jnp.max(real_NK, axis=1, keepdims=True, where=live_NK, initial=-jnp.inf)
        top_N1 = jnp.max(virtual_NJ, axis=1, keepdims=True, where=live_NJ, initial=-jnp.inf).clip(min=top_N1)
        top_N1 = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top_N1), top_N1, 0))  # -inf: a token without slots
        tilted = (tilt_logits(config, part, importance_N, sign) for part, sign in _columns(config, logits_NC))
        total_N1 = jax.nn.logsumexp(jnp.concatenate(list(tilted), axis=1), axis=1, keepdims=True)
        to_raw_N1 = jnp.exp(top_N1 - total_N1)
        real_NK = jnp.exp(jnp.where(live_NK, real_NK - top_N1, 0))
        virtual_NJ = jnp.exp(jnp.where(live_NJ, virtual_NJ - top_N1, 0))
    else:
        real_NK, virtual_NJ = jax.nn.sigmoid(real_NK), jax.nn.sigmoid(virtual_NJ)
        to_raw_N1 = jnp.ones_like(importance_N)[:, None]
    real_NK = real_NK * score_factor(config, importance_N, +1)
    virtual_NJ = virtual_NJ * score_factor(config, importance_N, -1)
    return jnp.where(live_NK, real_NK, 0), jnp.where(live_NJ, virtual_NJ, 0), to_raw_N1


def _columns(config: AnyExpertsConfig, logits_NC: Float[Array, "N C"]) -> tuple[tuple[Array, int], tuple[Array, int]]:
    """The columns of the real and of the virtual experts, each with its sign in IAR."""
    return (logits_NC[:, : config.num_experts], +1), (logits_NC[:, config.num_experts :], -1)


def _fade_last_slot(
    real_NK: Float[Array, "N K"],
    virtual_NJ: Float[Array, "N J"],
    continuous_slots_N: Float[Array, "N"],
    selection: Selection,
) -> tuple[Float[Array, "N K"], Float[Array, "N J"]]:
    """The straight-through slot gradient: an extension of ours, not part of AnyExperts.

    Slot k of a token (from 1, by rank) has the soft membership m_k = clip(K + 1/2 - k, 0, 1), a function of the
    unrounded K = k_min + w (k_max - k_min). It rises from 0, where rounding first grants the slot, to 1, where rounding
    grants the next one. So at any K exactly one slot of a token has a slope, the last selected one, and the slope is 1.
    Its score is multiplied by 1 + (K - stop_gradient(K)), which is 1. Then dL/dw is (k_max - k_min) times the
    first-order change of the loss as that slot fades in. Every token gets a gradient, rounded up or down, unless its K
    is clipped.
    """
    fade_N1 = (continuous_slots_N - jax.lax.stop_gradient(continuous_slots_N))[:, None]
    last_virtual_N1 = selection.last_is_virtual_N[:, None]
    real_last_NK = _is_at(selection.real_slots_N - 1, real_NK.shape[1]) & ~last_virtual_N1
    virtual_last_NJ = _is_at(selection.virtual_slots_N - 1, virtual_NJ.shape[1]) & last_virtual_N1
    real_fade_NK, virtual_fade_NJ = (jnp.where(last, fade_N1, 0) for last in (real_last_NK, virtual_last_NJ))
    return real_NK * (1 + real_fade_NK), virtual_NJ * (1 + virtual_fade_NJ)


def _is_at(place_N: Int[Array, "N"], width: int) -> Bool[Array, "N K"]:
    """True at each token's place among `width`."""
    return jnp.arange(width, dtype=jnp.int32)[None] == place_N[:, None]
