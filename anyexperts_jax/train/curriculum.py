"""A curriculum over budgets: each step draws one of `train.budgets`, so that one checkpoint learns all of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.pretrained.budget import window_of

Window = tuple[float, float]
_STREAM = 0xB0D9E7  # keeps the draws apart from a step's other randomness


def budget_windows(model: ModelConfig, budgets: Sequence[float]) -> tuple[Window, ...]:
    """The window of slots of each budget, in order.

    Raises:
      UserError: for a budget out of reach or above the model's own window, and for a fractional budget if the model has
        no importance that decides which tokens get more experts.
    """
    return tuple(_window(model, budget) for budget in budgets)


def _window(model: ModelConfig, budget: float) -> Window:
    name = f"train.budgets: {budget:g}"
    try:
        found = window_of(model, budget)
    except UserError as error:
        raise UserError(f"train.budgets: {error}") from error
    require(
        found.share is None,
        f"{name} is no whole number, and the model has no importance that could decide which tokens get more experts",
    )
    low, high = found.window
    require(
        high <= model.moe.k_max,
        f"{name} needs windows up to {high:g} slots, above model.moe.k_max={model.moe.k_max:g}, the model's own; "
        "raise that",
    )
    return low, high


def draw_budget(
    budgets: Sequence[float], windows: Sequence[Window], seed: int, step: Int[Array, ""] | int
) -> tuple[Float[Array, ""], Float[Array, "2"]]:
    """The budget of a step and its window. They depend only on seed and step, so a resumed run draws the same ones."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)
    index = jax.random.randint(key, (), 0, len(budgets))
    return jnp.asarray(budgets, jnp.float32)[index], jnp.asarray(windows, jnp.float32)[index]
