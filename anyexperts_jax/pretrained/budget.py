"""Budgets, in real experts per token, for published models, including those trained with a fixed number of experts."""

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

_GOLDEN = 0.6180339887498949  # its multiples modulo one are evenly spread, however many are taken
_SURE = 40.0  # an importance logit at which the sigmoid is exactly 0 or 1 in float32


class BudgetInForce(NamedTuple):
    """The arrays by which a budget changes a model's routing; all None for the model's own budget."""

    window: Float[Array, "2"] | None = None  # (k_min, k_max) for every layer
    share: Float[Array, ""] | None = None  # of positions that get k_max; the others get k_min. None: importance decides


class BudgetWindow(NamedTuple):
    """The window of slots that a budget needs."""

    moe: AnyExpertsConfig  # with slot arrays wide enough for the window
    window: tuple[float, float]  # k_min and k_max for every layer
    # of positions that get k_max; the others get k_min. None: importance decides, or both are equal
    share: float | None


def window_of(config: ModelConfig, budget: float) -> BudgetWindow:
    """Returns the window of a budget.

    A model without importance gives every token the same number of experts. A fractional budget then mixes the two
    whole numbers around it, and only a token's position decides which one it gets.

    Raises:
      UserError: if the model is dense, or cannot reach the budget.
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
    """Returns the configuration with room for a budget, and the arrays of its window; see `window_of`.

    Raises:
      UserError: if the model is dense, or cannot reach the budget.
    """
    if budget is None:
        return config, BudgetInForce()
    found = window_of(config, budget)
    share = None if found.share is None else jnp.float32(found.share)
    return _with_room(config, found.moe), BudgetInForce(jnp.asarray(found.window, jnp.float32), share)


def with_policy(config: ModelConfig, policy: str, dial: float) -> ModelConfig:
    """Returns the configuration in which an entry of POLICIES, at its dial, decides a token's number of experts.

    Raises:
      UserError: if the model is dense or has variable slots, the policy is unknown, or the dial is out of its range.
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
        # A dial without an upper end counts experts. Any other is a share of the scores, which can take all of them.
        most = math.ceil(dial) if max(ends) == math.inf else most
    room = dataclasses.replace(moe, policy=policy, policy_dial=float(dial), k_min=most, k_max=most)
    return dataclasses.replace(config, moe=room)


def mixes(config: ModelConfig) -> bool:
    """Whether a fractional budget is mixed by position: true if every token gets the same number of slots."""
    return not (config.moe.uses_importance or config.moe.num_virtual)


def _with_room(config: ModelConfig, moe: AnyExpertsConfig) -> ModelConfig:
    """Widens the slot arrays if the budget needs more than the model's own."""
    return config if moe.k_max <= config.moe.k_max else dataclasses.replace(config, moe=moe)


def mixing_logits(
    share: Float[Array, ""] | Float[Array, "B 1"], positions_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Returns importance logits that give k_max to an evenly spread share of the positions and k_min to the others.

    Args:
      share: one for all rows, or one per row.
    """
    place_BT = (positions_BT + 1).astype(jnp.float32) * _GOLDEN % 1.0
    return jnp.where(place_BT < share, _SURE, -_SURE)


def window_arguments(
    config: ModelConfig,
    window: Float[Array, "... 2"],
    share: Float[Array, ""] | Float[Array, "B 1"],
    positions_BT: Int[Array, "B T"],
) -> dict[str, Any]:
    """Returns the model's keyword arguments for a window and share from `window_of`.

    There are none for a dense model, or if another policy than importance decides.

    Args:
      window: [2] for all tokens, or [B, T, 2].
      share: as for `mixing_logits`; unused if importance decides.
    """
    if config.stack.num_moe_layers == 0 or config.moe.policy != IMPORTANCE:
        return {}
    if not mixes(config):
        return {"window": window}
    return {"window": window, "importance_logits_BT": mixing_logits(share, positions_BT)}
