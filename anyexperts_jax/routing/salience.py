"""Salience: how much the loss feels a token's experts, and the importance loss that learns a token's rank by it.

An extension of ours, not part of AnyExperts. Why: gradients to first order do not tell an informative token from a
redundant one. Where the router and the experts have settled, scaling a token's experts up or down changes the loss by
nothing on average, so the gradient that reaches importance has no settled sign, and importance drifts. What is left is
of second order: the square of the first-order change, large where the answer hangs on the token and near zero where no
later computation looks at it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from anyexperts_jax.routing.losses import masked_mean


@jax.custom_vjp
def rank_by_salience(
    weights_NK: Float[Array, "N K"], importance_N: Float[Array, "N"], valid_N: Bool[Array, "N"]
) -> tuple[Float[Array, "N K"], Float[Array, ""]]:
    """(weights_NK as they are, mean (w - q)^2), q the token's midrank in (0, 1) by salience among the valid tokens.

    Salience, sum_k (weight_k dL/dweight_k)^2, is known in the backward pass alone, where the gradient to w is exact,
    2 (w - q) / N. The value returned is that of a q of 1/2 for every token. The ranks' mean is 1/2 whatever they are:
    the loss moves slots from token to token within one budget. To dispatch, use the weights returned here.
    """
    return weights_NK, masked_mean((importance_N - 0.5) ** 2, valid_N)


def _forward(
    weights_NK: Array, importance_N: Array, valid_N: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    return rank_by_salience(weights_NK, importance_N, valid_N), (weights_NK, importance_N, valid_N)


def _backward(saved: tuple[Array, Array, Array], grads: tuple[Array, Array]) -> tuple[Array, Array, None]:
    weights_NK, importance_N, valid_N = saved
    weights_grad_NK, loss_grad = grads
    rank_N = midranks(jnp.square(weights_NK * weights_grad_NK).sum(axis=1), valid_N)
    tokens = jnp.maximum(valid_N.sum(dtype=jnp.float32), 1)
    return weights_grad_NK, jnp.where(valid_N, 2 * loss_grad * (importance_N - rank_N) / tokens, 0), None


rank_by_salience.defvjp(_forward, _backward)


def midranks(values_N: Float[Array, "N"], valid_N: Bool[Array, "N"]) -> Float[Array, "N"]:
    """The share of valid values below each, equals counting half: in (0, 1), mean 1/2. Anything where not valid."""
    sorted_N = jnp.sort(jnp.where(valid_N, values_N, jnp.inf))
    below_N = jnp.searchsorted(sorted_N, values_N, side="left", method="sort")
    not_above_N = jnp.searchsorted(sorted_N, values_N, side="right", method="sort")
    return (below_N + not_above_N).astype(jnp.float32) / (2 * jnp.maximum(valid_N.sum(dtype=jnp.float32), 1))
