"""The slot window (k_min, k_max) that overrides the configuration's, to run one checkpoint at any budget."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anyexperts_jax.core.batch import ArrayLike
from anyexperts_jax.core.config import AnyExpertsConfig, round_half_up
from anyexperts_jax.core.errors import UserError, require

Window = Float[ArrayLike, "2"] | Float[ArrayLike, "N 2"] | Sequence[float]


def check_window(config: AnyExpertsConfig, window: Any) -> tuple[float, float] | None:
    """Checks a window: (k_min, k_max), or (dial, most slots) if the configuration names an entry of POLICIES.

    Returns it, or None for a traced window, whose values are not known yet.

    A traced window may also be [N, 2], one per token, so that a batch can hold requests with different budgets. It is
    clipped to [1, slots_bound] when it is used. The caller should check its values here before tracing.

    Raises:
      UserError: unless the window is two finite numbers in order, from 1 to what the configuration's arrays can hold.
    """
    if isinstance(window, jax.core.Tracer):
        whole = window.shape == (2,) or (window.ndim == 2 and window.shape[1] == 2)
        require(whole, f"window has shape {window.shape}; need (2,), k_min and k_max, or a row of them for each token")
        return None
    try:
        values = np.asarray(window, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"window={window!r} must be two numbers, (k_min, k_max)") from error
    require(values.shape == (2,), f"window has shape {values.shape}; need (2,), k_min and k_max")
    k_min, k_max = (float(value) for value in values)
    shown = f"window=({k_min:g}, {k_max:g})"
    require(bool(np.isfinite(values).all()), f"{shown} must be finite")
    if config.policy == "importance":
        require(k_min <= k_max, f"{shown} is reversed; need k_min <= k_max")
        require(k_min >= 1, f"{shown} must begin at 1 slot or more")
    bound = config.slots_bound
    most = k_max if config.switches.slot_rounding == "stochastic" else round_half_up(k_max)
    require(most <= bound, f"{shown} asks for {most:g} slots, but k_max={config.k_max:g} makes room for {bound}")
    return k_min, k_max


def window_array(config: AnyExpertsConfig, window: Window | None) -> Float[Array, "2 *N"]:
    """The window in use as float32, k_min before k_max: `window`, or the configuration's if that is None."""
    first = config.k_min if config.policy == "importance" else config.policy_dial
    return jnp.asarray((first, config.k_max) if window is None else window, jnp.float32).T


def budget_in_force(config: AnyExpertsConfig, window: tuple[float, float] | None) -> float:
    """The nominal budget that sizes the buffers of dispatch: of the window if it is concrete, else of the config."""
    if config.policy != "importance":
        return (1 - config.rho_max) * config.k_max
    if window is None:
        return config.expected_real_slots
    return (1 - config.rho_max) * (window[0] + window[1]) / 2
