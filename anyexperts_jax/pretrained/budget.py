"""A budget for a model that was read: real experts a token, for models that were trained with a fixed number too."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.registries import POLICIES
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.routing.budget import shift_budget
from anyexperts_jax.routing.policies import IMPORTANCE

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
    if not mixes(config):
        shifted = shift_budget(moe, budget)
        return BudgetWindow(shifted, (shifted.k_min, shifted.k_max), None)
    require(moe.policy == IMPORTANCE, f"budget={budget:g}: the policy {moe.policy!r} decides already; set its dial")
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


def with_policy(config: ModelConfig, policy: str, dial: float) -> ModelConfig:
    """The model with a token's number of experts decided by an entry of POLICIES, at its dial.

    Raises:
      UserError: a dense model, one with variable slots, an unknown policy, or a dial out of its range.
    """
    moe = config.moe
    require(config.stack.num_moe_layers > 0, f"policy={policy!r}: the model is dense and has no experts to choose")
    require(not moe.uses_importance and not moe.num_virtual, f"policy={policy!r}: the model has slots of its own")
    require_one_of("policy", policy, POLICIES.names())
    most = moe.experts_in_reach
    ends = POLICIES[policy].dial
    if ends is not None:
        low, high = min(ends), min(max(ends), most)
        require(low <= dial <= high, f"policy={policy!r}: dial={dial:g} must be from {low:g} to {high:g}")
        most = math.ceil(dial) if max(ends) == math.inf else most  # else a share of the scores: any number of experts
    room = dataclasses.replace(moe, policy=policy, policy_dial=float(dial), k_min=most, k_max=most)
    return dataclasses.replace(config, moe=room)


def mixes(config: ModelConfig) -> bool:
    """Whether a fractional budget is mixed by position, because every token gets the same number of slots."""
    return not (config.moe.uses_importance or config.moe.num_virtual)


def _with_room(config: ModelConfig, moe: AnyExpertsConfig) -> ModelConfig:
    """Slot arrays as wide as the budget needs, or as the model has them."""
    return config if moe.k_max <= config.moe.k_max else dataclasses.replace(config, moe=moe)


def mixing_logits(
    share: Float[Array, ""] | Float[Array, "B 1"], positions_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Importance logits by which a share of the positions, evenly spread, takes k_max and the rest k_min.

    Args:
      share: of all rows, or of each.
    """
    place_BT = (positions_BT + 1).astype(jnp.float32) * _GOLDEN % 1.0
    return jnp.where(place_BT < share, _SURE, -_SURE)


def window_arguments(
    config: ModelConfig,
    window: Float[Array, "... 2"],
    share: Float[Array, ""] | Float[Array, "B 1"],
    positions_BT: Int[Array, "B T"],
) -> dict[str, Any]:
    """The model's keyword arguments for a window and share as `window_of` tells them, where windows may be mixed.

    They are none for a dense model, and where the experts follow another policy than importance.

    Args:
      window: [2] for all tokens, or [B, T, 2].
      share: as `mixing_logits` takes it; unused where importance decides.
    """
    if config.stack.num_moe_layers == 0 or config.moe.policy != IMPORTANCE:
        return {}
    if not mixes(config):
        return {"window": window}
    return {"window": window, "importance_logits_BT": mixing_logits(share, positions_BT)}
