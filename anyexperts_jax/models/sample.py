"""The next token of a text: the most likely one, or one drawn from what truncation leaves."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.errors import require


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The fields apply in order: first the penalty, then the temperature and so on.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    repetition_penalty: float = 1.0  # logits of tokens seen before are divided by it, or multiplied where negative
    temperature: float = 0.0  # logits are divided by it; 0: the most likely token, and the fields below have no effect
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the fewest most likely tokens whose probabilities sum to at least p
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
    """The next token of every row. A row's draws depend only on the key, the step and the row's index.

    Args:
      seen_BY: True for the tokens that the row already has, for the penalty.
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
    """Logits with -inf for tokens that top-k, top-p or min-p excludes; the most likely token always stays."""
    if 0 < sampling.top_k < logits_BY.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BY, sampling.top_k)[0][:, -1:]
        logits_BY = jnp.where(logits_BY < least_B1, -jnp.inf, logits_BY)
    if sampling.top_p < 1:
        logits_BY = _with_top_p(logits_BY, sampling.top_p)
    if sampling.min_p > 0:
        logits_BY = _with_min_p(logits_BY, sampling.min_p)
    return logits_BY


def _with_top_p(logits_BY: Float[Array, "B Y"], top_p: float | Float[Array, "B 1"]) -> Float[Array, "B Y"]:
    sorted_BY = -jnp.sort(-logits_BY, axis=-1)
    shares_BY = jax.nn.softmax(sorted_BY, axis=-1)
    before_BY = jnp.cumsum(shares_BY, axis=-1) - shares_BY
    count_B1 = (before_BY < top_p).sum(axis=-1, keepdims=True)
    least_B1 = jnp.take_along_axis(sorted_BY, count_B1 - 1, axis=-1)
    return jnp.where(logits_BY < least_B1, -jnp.inf, logits_BY)


def _with_min_p(logits_BY: Float[Array, "B Y"], min_p: float | Float[Array, "B 1"]) -> Float[Array, "B Y"]:
    shares_BY = jax.nn.softmax(logits_BY, axis=-1)
    return jnp.where(shares_BY >= min_p * shares_BY.max(axis=-1, keepdims=True), logits_BY, -jnp.inf)


class RowSampling(NamedTuple):
    """How the next token of each row is chosen if rows belong to different requests: the fields of `Sampling`, by row.

    A row's draws depend on its own seed and its number of tokens so far, as if it were alone in a batch with that seed.
    """

    temperature_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    top_p_B: Float[Array, "B"]
    min_p_B: Float[Array, "B"]
    seed_B: UInt32[Array, "B"]
    step_B: Int[Array, "B"]


def row_tokens(rows: RowSampling, logits_BY: Float[Array, "B Y"]) -> Int[Array, "B"]:
    """The next token of every row. Nothing is sorted or drawn while every row takes its most likely token."""
    logits_BY = logits_BY.astype(jnp.float32)
    likeliest_B = jnp.argmax(logits_BY, axis=-1).astype(jnp.int32)
    draws_B = rows.temperature_B > 0

    def drawn() -> Int[Array, "B"]:
        temperature_B1 = jnp.where(draws_B, rows.temperature_B, 1.0)[:, None]
        kept_BY = _kept_of_rows(rows, logits_BY / temperature_B1)
        keys_B = jax.vmap(
            lambda seed, step: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), jnp.uint32(0))
        )(rows.seed_B, rows.step_B)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BY).astype(jnp.int32)

    return jnp.where(draws_B, jax.lax.cond(draws_B.any(), drawn, lambda: likeliest_B), likeliest_B)


def _kept_of_rows(rows: RowSampling, logits_BY: Float[Array, "B Y"]) -> Float[Array, "B Y"]:
    """`truncated`, by row."""
    vocab_size = logits_BY.shape[-1]
    top_k_B1, top_p_B1 = rows.top_k_B[:, None], rows.top_p_B[:, None]
    sorted_BY = -jnp.sort(-logits_BY, axis=-1)
    least_B1 = jnp.take_along_axis(sorted_BY, jnp.clip(top_k_B1 - 1, 0, vocab_size - 1), axis=-1)
    logits_BY = jnp.where((top_k_B1 > 0) & (logits_BY < least_B1), -jnp.inf, logits_BY)
    logits_BY = jnp.where(top_p_B1 < 1, _with_top_p(logits_BY, top_p_B1), logits_BY)
    return _with_min_p(logits_BY, rows.min_p_B[:, None])
