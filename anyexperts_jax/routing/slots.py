"""The number of slots of a token, and the cap on virtual ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.registries import POLICIES
from anyexperts_jax.routing.policies import Seen
from anyexperts_jax.routing.scores import EPSILON
from anyexperts_jax.routing.window import Window, window_array


def continuous_slots(
    config: AnyExpertsConfig, importance_N: Float[Array, "N"], window: Window | None = None
) -> Float[Array, "N"]:
    """k_min + w (k_max - k_min), unrounded, clipped to [1, slots_bound] (AnyExperts section 2, step 4)."""
    k_min, k_max = window_array(config, window)
    return jnp.clip(k_min + importance_N * (k_max - k_min), 1.0, config.slots_bound)


def policy_slots(
    config: AnyExpertsConfig,
    logits_NC: Float[Array, "N C"],
    probabilities_NC: Float[Array, "N C"],
    window: Window | None = None,
    modality_N: Int[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """Returns the slots that an entry of POLICIES gives, clipped to [1, the window's most], without gradient."""
    dial, most = window_array(config, window)
    policy = POLICIES[config.policy]
    require(dial.ndim == 0 or policy.by_token, f"policy={config.policy!r} takes one window for all tokens")
    E = config.num_experts
    scores_NE = probabilities_NC[:, :E]
    shares_NE = scores_NE / (scores_NE.sum(axis=1, keepdims=True) + EPSILON)
    seen = Seen(logits_NC[:, :E], shares_NE, modality_N)
    slots_N = policy.slots(jax.lax.stop_gradient(seen), dial)
    return jnp.clip(slots_N, 1.0, jnp.minimum(most, config.slots_bound))


def round_slots(config: AnyExpertsConfig, slots_N: Float[Array, "N"], key: Array | None = None) -> Int[Array, "N"]:
    """Rounds to whole slots K_i in [1, slots_bound]: half up, down, or up with the fraction as probability (our
    reading).

    Raises:
      UserError: for stochastic rounding without a key.
    """
    slots_N = jax.lax.stop_gradient(slots_N)
    if config.switches.slot_rounding == "round":
        whole_N = jnp.floor(slots_N + 0.5)
    elif config.switches.slot_rounding == "floor":
        whole_N = jnp.floor(slots_N)
    else:
        if key is None:
            raise UserError("slot_rounding='stochastic' needs a random key: route(..., key=key)")
        down_N = jnp.floor(slots_N)
        goes_up_N = jax.random.uniform(key, slots_N.shape, jnp.float32) < slots_N - down_N
        whole_N = down_N + goes_up_N.astype(jnp.float32)
    # Clipped after the cast, so that even a non-finite importance gives a count that fits the arrays.
    return jnp.clip(whole_N.astype(jnp.int32), 1, config.slots_bound)


def virtual_cap(config: AnyExpertsConfig, slots_N: Int[Array, "N"]) -> Int[Array, "N"]:
    """The cap on virtual slots of a token with K_i slots: rho_max K_i, rounded as configured, at most V."""
    return jnp.asarray(config.virtual_caps, jnp.int32)[slots_N]
