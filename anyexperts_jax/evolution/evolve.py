"""Expert evolution (EvoMoE, stage II): expert 1 trains, and the others are derived from it at every step.

Equation (1) as printed, theta_n <- beta theta_1 + (1 - beta) grad(theta_1), cannot be what the authors ran: for beta =
0 it gives raw gradients, but the paper's row for beta = 0 equals expert 1 to the digit, and the text speaks of an
exponential moving average. So "ema" is the default (our reading):

    ema      theta_n <- beta theta_n + (1 - beta) theta_1'          theta_1' is expert 1 after the optimiser's step
    lag      theta_n <- beta theta_1 + (1 - beta) theta_1'
    literal  theta_n <- beta theta_1 + (1 - beta) grad(theta_1)

An average with beta <= 0.99 remembers a few hundred steps at most. If the learning rate decays to zero, expert 1 stops
and the others catch up with it, so that all end up equal (experiments/results/evolution_equation_one.md). Two options
keep them apart: a learning rate that decays less (the stage's `final_lr_fraction`), or `snapshots`, which freeze an
expert while the rate is still high.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from anyexperts_jax.evolution.config import EvolutionConfig, EvolutionMode
from anyexperts_jax.train.optim import apply_updates


class EvolutionState(NamedTuple):
    """The state of `expert_evolution`. Experts 2 to N have no state besides their parameters."""

    key: UInt32[Array, "2"]  # for the draws of beta
    step: Int[Array, ""]
    inner: Any  # the optimiser state of expert 1


def draw_betas(
    config: EvolutionConfig, num_experts: int, key: UInt32[Array, "2"], step: Int[Array, ""]
) -> Float[Array, "J"]:
    """Draws the beta of each of the J = num_experts - 1 evolved experts at a step, uniformly in the expert's range."""
    if config.fixed_beta is not None:
        return jnp.full(num_experts - 1, config.fixed_beta, jnp.float32)
    low_J, high_J = jnp.asarray(config.beta_low, jnp.float32), jnp.asarray(config.beta_high, jnp.float32)
    own = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    return low_J + (high_J - low_J) * jax.random.uniform(own, low_J.shape)


def follow(mode: EvolutionMode, beta: Array, follower: Array, *, before: Array, after: Array, gradient: Array) -> Array:
    """Returns the next weights of an evolved expert, in float32. All arguments but `mode` broadcast together.

    Args:
      follower: the expert's weights.
      before, after: expert 1's weights before and after the optimiser's step.
      gradient: the gradient of the loss by `before`.
    """
    first = {"ema": follower, "lag": before, "literal": before}[mode]
    second = gradient if mode == "literal" else after
    return beta * first.astype(jnp.float32) + (1 - beta) * second.astype(jnp.float32)


def expert_evolution(
    inner: optax.GradientTransformation,
    config: EvolutionConfig,
    *,
    num_experts: int,
    steps: int,
    key: UInt32[Array, "2"],
    axis: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation that trains expert 1 with `inner` and makes experts 2 to N follow it.

    Every parameter must hold N experts along `axis` (1 for layers stacked by scan). Only expert 1's part of the
    gradients is used. `inner` sees expert 1 only and has state for it only; its updates must be final, with the
    learning rate applied. It gets the extra arguments; if these contain finite=False, the state does not change.

    Args:
      steps: the steps of the whole stage; `config.snapshots` are fractions of it.
      key: raw key data, as returned by `jax.random.key_data`; it is kept in the state.

    Raises:
      UserError: if the ranges of beta do not fit the number of experts.
    """
    config.check(num_experts)
    inner_extra = optax.with_extra_args_support(inner)
    never = tuple(1.0 for _ in range(num_experts - 1))
    last_J = jnp.asarray([round(share * steps) for share in config.snapshots or never], jnp.int32)
    stops = bool(config.snapshots)

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda w: jax.lax.slice_in_dim(w, 0, 1, axis=axis), tree)

    def init(params: Any) -> EvolutionState:
        return EvolutionState(key, jnp.zeros((), jnp.int32), inner_extra.init(first(params)))

    def update(grads: Any, state: EvolutionState, params: Any = None, **extra: Any) -> tuple[Any, EvolutionState]:
        gradient, before = first(grads), first(params)
        updates, inner_state = inner_extra.update(gradient, state.inner, before, **extra)
        after = apply_updates(before, updates)
        beta_J = draw_betas(config, num_experts, state.key, state.step)

        def move_followers(param: Array, gradient: Array, before: Array, after: Array) -> Array:
            along = [1] * param.ndim
            along[axis] = num_experts - 1
            followers = jax.lax.slice_in_dim(param, 1, num_experts, axis=axis)
            moved = follow(config.mode, beta_J.reshape(along), followers, before=before, after=after, gradient=gradient)
            moved -= followers.astype(moved.dtype)
            if stops:
                moved = jnp.where(state.step < last_J.reshape(along), moved, 0)
            return moved.astype(param.dtype)

        def beside(own: Array, followers: Array) -> Array:
            return jnp.concatenate([own.astype(followers.dtype), followers], axis=axis)

        updates = jax.tree.map(beside, updates, jax.tree.map(move_followers, params, gradient, before, after))
        taken = jnp.asarray(extra.get("finite", True), jnp.int32)
        return updates, EvolutionState(state.key, state.step + taken, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
