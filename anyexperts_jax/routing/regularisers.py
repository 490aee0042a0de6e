"""Importance regularisers, which keep the mean importance, and so the budget, from drifting.

An entry of `core.registries.REGULARISERS` is a function of `Importances`. It returns the combine weights for dispatch
and its loss, an unweighted float32 scalar over the valid tokens. Most return the weights unchanged. A regulariser that
needs their gradient, like `salience`, returns them through a function with a custom derivative.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.routing.losses import masked_mean
from anyexperts_jax.routing.salience import rank_by_salience, token_groups


@dataclasses.dataclass(frozen=True)
class Importances:
    """The inputs of a regulariser, for one layer. At padding `valid_N` is False and all values are finite."""

    config: AnyExpertsConfig
    logits_N: Float[Array, "N"]  # z
    importance_N: Float[Array, "N"]  # w = sigmoid(z)
    weights_NK: Float[Array, "N K"]  # combine weights of the real slots
    valid_N: Bool[Array, "N"]
    num_sequences: int = 1  # number of contiguous sequences that the tokens form
    batch_shards: int | None = None  # number of parts into which devices split the sequences; None: unknown


Regulariser = Callable[[Importances], tuple[Float[Array, "N K"], Float[Array, ""]]]


def logit_l2(seen: Importances) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """mean z^2, which keeps the mean importance near one half (AnyExperts' penalty on the logit)."""
    return seen.weights_NK, masked_mean(seen.logits_N**2, seen.valid_N)


def mean_target(seen: Importances) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """(mean w - importance_target)^2 (our reading)."""
    off = masked_mean(seen.importance_N, seen.valid_N) - seen.config.switches.importance_target
    return seen.weights_NK, jnp.where(seen.valid_N.any(), off**2, 0)


def salience(seen: Importances) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """Teaches importance a token's rank by the effect of its experts on the loss; an extension of ours."""
    scope = seen.config.switches.salience_scope
    groups = token_groups(scope, seen.num_sequences, seen.batch_shards)
    return rank_by_salience(seen.weights_NK, seen.importance_N, seen.valid_N, groups)
