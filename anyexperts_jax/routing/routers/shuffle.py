"""Shuffles router logits, to test whether it matters which expert a token goes to (EvoMoE's expert uniformity)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def shuffled_logits(key: Array, logits_NC: Float[Array, "N C"], num_experts: int) -> Float[Array, "N C"]:
    """Permutes each token's real columns, the first `num_experts`, independently. Virtual columns stay in place."""
    real_NE = jax.random.permutation(key, logits_NC[:, :num_experts], axis=1, independent=True)
    return jnp.concatenate([real_NE, logits_NC[:, num_experts:]], axis=1)
