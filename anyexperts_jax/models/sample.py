"""The next token of a text: the most likely one, or one drawn from what truncation leaves."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.errors import require


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. In the order of the fields: the penalty first, then the temperature and so on.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    repetition_penalty: float = 1.0  # logits of tokens seen before are divided by it, or multiplied where negative
    temperature: float = 0.0  # logits are divided by it; 0: the most likely token, and what follows has no effect
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the most likely tokens whose probabilities sum to p, the one that reaches it included
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the most likely one

    def __post_init__(self) -> None:
        check_field_types(self)
        require(self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty} must be > 0")
        require(self.temperature >= 0, f"temperature={self.temperature} must be >= 0")
        require(self.top_k >= 0, f"top_k={self.top_k} must be >= 0")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1]")


GREEDY = Sampling()


def next_tokens(
    sampling: Sampling, logits_BY: Float[Array, "B Y"], seen_BY: Bool[Array, "B Y"], key: Array, step: Int[Array, ""]
) -> Int[Array, "B"]:
    """The next token of every row. A row's draws depend on the key, the step and the row's number alone.

    Args:
      seen_BY: the tokens that the row holds already, for the penalty.
    """
    logits_BY = penalised(sampling, logits_BY.astype(jnp.float32), seen_BY)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BY, axis=-1).astype(jnp.int32)
    kept_BY = truncated(sampling, logits_BY / sampling.temperature)
    at_step = jax.random.fold_in(key, step)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(at_step, row))(jnp.arange(logits_BY.shape[0]))
    return jax.vmap(jax.random.categorical)(keys_B, kept_BY).astype(jnp.int32)


def penalised(sampling: Sampling, logits_BY: Float[Array, "B Y"], seen_BY: Bool[Array, "B Y"]) -> Float[Array, "B Y"]:
    """Logits with the repetition penalty (CTRL, arXiv 1909.05858)."""
    penalty = sampling.repetition_penalty
    if penalty == 1:
        return logits_BY
    return jnp.where(seen_BY, jnp.where(logits_BY > 0, logits_BY / penalty, logits_BY * penalty), logits_BY)


def truncated(sampling: Sampling, logits_BY: Float[Array, "B Y"]) -> Float[Array, "B Y"]:
    """Logits with -inf where top-k, top-p or min-p leaves a token out; the most likely one always stays."""
    if 0 < sampling.top_k < logits_BY.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BY, sampling.top_k)[0][:, -1:]
        logits_BY = jnp.where(logits_BY < least_B1, -jnp.inf, logits_BY)
    if sampling.top_p < 1:
        sorted_BY = -jnp.sort(-logits_BY, axis=-1)
        shares_BY = jax.nn.softmax(sorted_BY, axis=-1)
        before_BY = jnp.cumsum(shares_BY, axis=-1) - shares_BY
        count_B1 = (before_BY < sampling.top_p).sum(axis=-1, keepdims=True)
        least_B1 = jnp.take_along_axis(sorted_BY, count_B1 - 1, axis=-1)
        logits_BY = jnp.where(logits_BY < least_B1, -jnp.inf, logits_BY)
    if sampling.min_p > 0:
        shares_BY = jax.nn.softmax(logits_BY, axis=-1)
        enough_BY = shares_BY >= sampling.min_p * shares_BY.max(axis=-1, keepdims=True)
        logits_BY = jnp.where(enough_BY, logits_BY, -jnp.inf)
    return logits_BY
