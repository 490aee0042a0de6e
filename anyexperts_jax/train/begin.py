"""The state before a run's first step: new parameters, those of another run, or those of a recipe."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import optax
from jax.sharding import Mesh

from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.recipe import Recipe
from anyexperts_jax.train.state import TrainState, create_state, state_from
from anyexperts_jax.train.warm_start import warm_start


def first_state(
    config: RunConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    recipe: Recipe,
    *,
    waiting: Callable[[str], AbstractContextManager[None]],
    note: Callable[[str], None],
) -> TrainState:
    """The state that a run without a checkpoint starts from.

    Args:
      waiting: makes the context for anything that another process may hold up, from a description of it.
      note: called with a line about the parameters that were taken from another run or a checkpoint.

    Raises:
      UserError: if the run or checkpoint in `train.start_from` cannot be read, or has another model.
    """
    model, key, start = config.model, jax.random.key(config.seed), config.train.start_from
    if recipe.start is not None:
        return state_from(model, optimizer, mesh, recipe.start(mesh))
    if start is None:
        return create_state(model, optimizer, mesh, key)
    with waiting(f"the checkpoint in {start}"):
        started = warm_start(start, model, key, mesh, data=config.data)
    note(started.describe(start))
    return state_from(model, optimizer, mesh, started.params, started.router_bias_LC)
