"""Measures how much two models with the same vocabulary differ on a sample of tokens."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from anyexperts_jax.pretrained.model import Pretrained


class Difference(NamedTuple):
    """Figures over all positions of a sample. A perplexity counts only positions that have a next token."""

    tokens: int
    largest_logit: float  # the largest absolute difference of two logits
    mean_kl: float  # KL divergence from the first model's predictions to the second's, in nats per position
    perplexity: tuple[float, float]  # of the first model, and of the second
    experts: tuple[float, float]  # real experts per token and layer, of each model


def difference(m: Pretrained, other: Pretrained, tokens_BT: Int[np.ndarray, "B T"]) -> Difference:
    """Runs both models on the rows, one row at a time.

    Raises:
      UserError: for an id that one of the models does not have.
    """
    parts, experts = [], []
    for tokens_T in tokens_BT:
        outputs = [model.forward(tokens_T[None]) for model in (m, other)]
        parts.append(_compare(outputs[0].logits_BTY[0], outputs[1].logits_BTY[0], jnp.asarray(tokens_T)))
        experts.append([float(output.trace.real_slots_BT.mean()) for output in outputs])
    rows, length = tokens_BT.shape
    largest, kl, *nats = np.asarray(parts, np.float64).T
    predicted = rows * max(length - 1, 1)
    first, second = (math.exp(min(float(own.sum()) / predicted, 700)) for own in nats)
    used = np.mean(experts, axis=0)
    return Difference(
        rows * length, float(largest.max()), float(kl.mean()), (first, second), (float(used[0]), float(used[1]))
    )


@jax.jit
def _compare(
    first_TY: Float[Array, "T Y"], second_TY: Float[Array, "T Y"], tokens_T: Int[Array, "T"]
) -> tuple[Array, Array, Array, Array]:
    """Returns, for one row, the largest difference of logits, the mean KL, and the summed nats of each model."""
    logs = [jax.nn.log_softmax(logits_TY, axis=-1) for logits_TY in (first_TY, second_TY)]
    kl_T = (jnp.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1)
    nats = [-jnp.take_along_axis(own_TY[:-1], tokens_T[1:, None], axis=-1).sum() for own_TY in logs]
    return jnp.abs(first_TY - second_TY).max(), kl_T.mean(), nats[0], nats[1]
