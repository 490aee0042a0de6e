"""Router scores, and how importance-aware routing (IAR) tilts them.

IAR raises the scores of the real experts with w and lowers those of the virtual experts by as much (AnyExperts section
2, step 6). The formula is a reading, so it is a switch. `sign` is +1 for real columns and -1 for virtual ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anyexperts_jax.core.config import AnyExpertsConfig

EPSILON = 1e-20  # Ling-mini-2.0: scores / (their sum + 1e-20)


def probabilities(config: AnyExpertsConfig, logits_NC: Float[Array, "N C"]) -> Float[Array, "N C"]:
    """Scores before IAR, summing to one per token: the input of the balance loss and the entropy."""
    if config.scores == "softmax":
        return jax.nn.softmax(logits_NC, axis=-1)
    return normalise(jax.nn.sigmoid(logits_NC))[0]


def normalise(*scores: Float[Array, "N _"]) -> list[Float[Array, "N _"]]:
    """Divides by the sum of all given scores + 1e-20.

    The scores are first divided by that sum as a constant, so that the division which is differentiated has a
    denominator near one. Differentiating the plain quotient would square the denominator: 1e-40 is 0 in float32, and
    the gradient NaN.
    """
    total_N1 = sum(score.sum(axis=1, keepdims=True) for score in scores)
    inverse_N1 = jax.lax.stop_gradient(1 / (total_N1 + EPSILON))
    scaled = [score * inverse_N1 for score in scores]
    one_N1 = sum(score.sum(axis=1, keepdims=True) for score in scaled) + EPSILON * inverse_N1
    return [score / one_N1 for score in scaled]


def tilt_logits(
    config: AnyExpertsConfig, logits_NX: Float[Array, "N X"], importance_N: Float[Array, "N"], sign: int
) -> Float[Array, "N X"]:
    """Logits after IAR. The forms of IAR that multiply scores leave the logits unchanged."""
    w_N1 = importance_N[:, None]
    if config.switches.iar == "add":
        return logits_NX + sign * w_N1
    if config.switches.iar == "multiply_logits":
        return logits_NX * (1 + sign * w_N1)
    return logits_NX


def score_factor(config: AnyExpertsConfig, importance_N: Float[Array, "N"], sign: int) -> Float[Array, "N 1"]:
    """The factor by which IAR multiplies the scores: 1 + w or 1 - w in the forms that multiply scores, else 1."""
    if config.switches.iar in ("multiply_sigmoid", "multiply_softmax"):
        return 1 + sign * importance_N[:, None]
    return jnp.ones_like(importance_N)[:, None]


def ranking(
    config: AnyExpertsConfig,
    logits_NC: Float[Array, "N C"],
    importance_N: Float[Array, "N"],
    bias_C: Float[Array, "*N C"] | None,
) -> tuple[Float[Array, "N E"], Float[Array, "N V"]]:
    """The values that columns are ranked by, real and virtual: logits or scores after IAR, plus the expert bias."""
    E = config.num_experts
    real_NE = tilt_logits(config, logits_NC[:, :E], importance_N, +1)
    virtual_NV = tilt_logits(config, logits_NC[:, E:], importance_N, -1)
    if config.switches.selection == "scores" or config.switches.iar in ("multiply_sigmoid", "multiply_softmax"):
        if config.scores == "softmax":
            norm_N1 = jax.nn.logsumexp(jnp.concatenate([real_NE, virtual_NV], axis=-1), axis=-1, keepdims=True)
            real_NE, virtual_NV = jnp.exp(real_NE - norm_N1), jnp.exp(virtual_NV - norm_N1)
        else:
            real_NE, virtual_NV = jax.nn.sigmoid(real_NE), jax.nn.sigmoid(virtual_NV)
        real_NE = real_NE * score_factor(config, importance_N, +1)
        virtual_NV = virtual_NV * score_factor(config, importance_N, -1)
    if bias_C is not None:
        bias_XC = jnp.atleast_2d(bias_C)  # one row for all tokens, or one for each
        real_NE, virtual_NV = real_NE + bias_XC[:, :E], virtual_NV + bias_XC[:, E:]
    # Selection is discrete; the gradient reaches the router through the combine weights.
    return jax.lax.stop_gradient(real_NE), jax.lax.stop_gradient(virtual_NV)
