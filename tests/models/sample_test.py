"""The next token: what each kind of truncation keeps, the penalty, and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.sample import (
    GREEDY,
    RowSampling,
    Sampling,
    next_tokens,
    penalised,
    row_tokens,
    truncated,
)

LOGITS_BY = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))


def kept(sampling):
    return np.isfinite(np.asarray(truncated(sampling, LOGITS_BY))).astype(int).tolist()


@pytest.mark.parametrize(
    ("sampling", "first", "second"),
    [
        (Sampling(), [1, 1, 1, 1], [1, 1, 1, 1]),
        (Sampling(top_k=1), [1, 0, 0, 0], [0, 0, 0, 1]),
        (Sampling(top_k=3), [1, 1, 1, 0], [0, 1, 1, 1]),
        (Sampling(top_k=9), [1, 1, 1, 1], [1, 1, 1, 1]),
        (Sampling(top_p=0.01), [1, 0, 0, 0], [0, 0, 0, 1]),
        (Sampling(top_p=0.6), [1, 1, 0, 0], [0, 0, 1, 1]),
        (Sampling(min_p=0.45), [1, 1, 0, 0], [0, 1, 1, 1]),
        (Sampling(min_p=1.0), [1, 0, 0, 0], [0, 0, 0, 1]),
        (Sampling(top_k=2, top_p=0.6), [1, 0, 0, 0], [0, 0, 1, 1]),  # of 2/3 and 1/3 the first is enough
    ],
)
def test_what_truncation_keeps(sampling, first, second):
    assert kept(sampling) == [first, second]


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits_BY = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen_BY = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(
        penalised(Sampling(repetition_penalty=2.0), logits_BY, seen_BY), [[1.0, -4.0, 2.0, -2.0]]
    )


def test_draws_follow_the_probabilities_and_the_most_likely_token_needs_none():
    seen_BY = jnp.zeros((1, 4), bool)
    draw = jax.jit(
        lambda step: next_tokens(Sampling(temperature=1.0, top_k=2), LOGITS_BY[:1], seen_BY, jax.random.key(0), step)
    )
    drawn = np.asarray(jax.vmap(draw)(jnp.arange(3000)))
    assert abs((drawn == 0).mean() - 2 / 3) < 0.04
    assert set(np.unique(drawn)) == {0, 1}
    assert next_tokens(GREEDY, LOGITS_BY, jnp.zeros((2, 4), bool), jax.random.key(0), jnp.int32(0)).tolist() == [0, 3]


@pytest.mark.parametrize("field", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}])
def test_invalid_values_are_refused(field):
    (name,) = field
    with pytest.raises(UserError, match=f"{name}="):
        Sampling(**field)


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=0.7),
        Sampling(temperature=2.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, min_p=0.45),
        Sampling(temperature=1.5, top_k=3, top_p=0.9, min_p=0.1),
    ],
)
def test_a_row_of_many_requests_draws_as_it_would_alone(sampling):
    seeds, steps = np.array([3, 2**32 - 1], np.uint32), np.array([0, 5])
    rows = RowSampling(
        jnp.full(2, sampling.temperature),
        jnp.full(2, sampling.top_k),
        jnp.full(2, sampling.top_p),
        jnp.full(2, sampling.min_p),
        seed_B=jnp.asarray(seeds),
        step_B=jnp.asarray(steps),
    )
    together = row_tokens(rows, LOGITS_BY)
    for row in range(2):
        own = LOGITS_BY[row : row + 1]
        seen_BY, key = jnp.zeros((1, 4), bool), jax.random.key(seeds[row])
        assert next_tokens(sampling, own, seen_BY, key, jnp.int32(steps[row]))[0] == together[row]


def test_greedy_rows_and_drawn_rows_share_a_batch():
    some = [jnp.array([0.0, 1.0]), jnp.zeros(2, int), jnp.ones(2), jnp.zeros(2)]
    rows = RowSampling(*some, seed_B=jnp.zeros(2, jnp.uint32), step_B=jnp.zeros(2, int))
    assert row_tokens(rows, LOGITS_BY)[0] == 0
