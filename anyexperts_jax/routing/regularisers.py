"""Importance regularisers: what holds the mean importance, and with it the budget, in place.

An entry of `core.registries.REGULARISERS` is a function of `Importances` that returns the combine weights, which
dispatch then uses, and the loss, an unweighted float32 scalar over the valid tokens. Most return the weights as they
are; one that reads their gradient, as `salience` does, returns them through a function with a derivative of its own.
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
    """What a regulariser sees of one layer. Padding is False in `valid_N`; its values are finite."""

    config: AnyExpertsConfig
    logits_N: Float[Array, "N"]  # z
    importance_N: Float[Array, "N"]  # w = sigmoid(z)
    weights_NK: Float[Array, "N K"]  # combine weights of the real slots
    valid_N: Bool[Array, "N"]
    num_sequences: int = 1  # the tokens are so many contiguous sequences
    batch_shards: int | None = None  # parts into which devices cut the sequences; None: not known


Regulariser = Callable[[Importances], tuple[Float[Array, "N K"], Float[Array, ""]]]


def logit_l2(seen: Importances) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """mean z^2: keeps the mean importance near one half (AnyExperts' penalty on the logit)."""
    return seen.weights_NK, masked_mean(seen.logits_N**2, seen.valid_N)


def mean_target(seen: Importances) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """(mean w - importance_target)^2 (our reading)."""
    off = masked_mean(seen.importance_N, seen.valid_N) - seen.config.switches.importance_target
    return seen.weights_NK, jnp.where(seen.valid_N.any(), off**2, 0)


def salience(seen: Importances) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """Importance learns the token's rank by what its experts do to the loss, an extension of ours."""
    scope = seen.config.switches.salience_scope
    groups = token_groups(scope, seen.num_sequences, seen.batch_shards)
    return rank_by_salience(seen.weights_NK, seen.importance_N, seen.valid_N, groups)
