"""A budget for a model that was read: real experts a token, for models that were trained with a fixed number too."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.routing.budget import shift_budget

_GOLDEN = 0.6180339887498949  # multiples of it, modulo one, spread evenly from the first on
_SURE = 40.0  # an importance logit whose sigmoid is 0 or 1 in float32


class BudgetInForce(NamedTuple):
    """What a budget makes of a model: all None for the model's own."""

    window: Float[Array, "2"] | None = None  # (k_min, k_max) for every layer
    share: Float[Array, ""] | None = None  # of positions that get k_max, the others k_min; None: importance decides


class BudgetWindow(NamedTuple):
    """What a budget asks of the slots."""

    moe: AnyExpertsConfig  # with room for it
    window: tuple[float, float]  # k_min and k_max for every layer
    share: float | None  # of positions that get k_max, the others k_min; None: importance decides, or both are the same


def window_of(config: ModelConfig, budget: float) -> BudgetWindow:
    """The window of a budget.

    A model without importance gives every token the same number of experts; a fractional budget is then mixed of the
    whole numbers around it, by the position of the token alone.

    Raises:
      UserError: a dense model, or a budget out of reach.
    """
    moe = config.moe
    require(config.stack.num_moe_layers > 0, f"budget={budget:g}: the model is dense and has no experts to choose")
    if moe.uses_importance or moe.num_virtual:
        shifted = shift_budget(moe, budget)
        return BudgetWindow(shifted, (shifted.k_min, shifted.k_max), None)
    most = moe.experts_in_reach
    require(1 <= budget <= most, f"budget={budget:g} must be from 1 to {most} experts a token")
    low, high = math.floor(budget), math.ceil(budget)
    room = dataclasses.replace(moe, k_min=high, k_max=high)
    return BudgetWindow(room, (low, high), None if low == high else budget - low)


def with_budget(config: ModelConfig, budget: float | None) -> tuple[ModelConfig, BudgetInForce]:
    """The model with room for a budget, and what is in force; see `window_of`.

    Raises:
      UserError: a dense model, or a budget out of reach.
    """
    if budget is None:
        return config, BudgetInForce()
    found = window_of(config, budget)
    share = None if found.share is None else jnp.float32(found.share)
    return _with_room(config, found.moe), BudgetInForce(jnp.asarray(found.window, jnp.float32), share)


def _with_room(config: ModelConfig, moe: AnyExpertsConfig) -> ModelConfig:
    """Slot arrays as wide as the budget needs, or as the model has them."""
    return config if moe.k_max <= config.moe.k_max else dataclasses.replace(config, moe=moe)


def mixing_logits(share: Float[Array, ""], positions_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Importance logits by which a share of the positions, evenly spread, takes k_max and the rest k_min."""
    place_BT = (positions_BT + 1).astype(jnp.float32) * _GOLDEN % 1.0
    return jnp.where(place_BT < share, _SURE, -_SURE)
