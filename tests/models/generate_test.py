import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.generate import generate
from models.small import SMALL, forward, random_batch, random_params, small

J = 6


def recomputed(config, params, batch, lengths, window=None):
    """Greedy decoding by running the whole model again for every token."""
    tokens = np.full((len(lengths), J), config.pad_id)
    done = np.asarray(lengths) == 0
    for j in range(J):
        logits = np.asarray(forward(config)(params, batch, None, window).logits_BTY)
        tokens_BT, valid_BT = batch.tokens_BT.copy(), batch.valid_BT.copy()
        for b, length in enumerate(lengths):
            if done[b]:
                continue
            tokens[b, j] = logits[b, length + j - 1].argmax()
            tokens_BT[b, length + j], valid_BT[b, length + j] = tokens[b, j], True
            done[b] = tokens[b, j] == config.eos_id
        batch = dataclasses.replace(batch, tokens_BT=tokens_BT, valid_BT=valid_BT)
    return tokens


@pytest.mark.parametrize("window", [None, (1.0, 3.0)])
def test_the_cache_gives_what_full_recomputation_gives(window):
    params, lengths = random_params(SMALL), (16, 12, 7)
    window = None if window is None else jnp.array(window)
    expected = recomputed(SMALL, params, random_batch(lengths=lengths), lengths, window)
    prompts = random_batch(lengths=lengths, total=16)
    tokens_BJ = generate(SMALL, params, prompts, max_new_tokens=J, window=window)
    np.testing.assert_array_equal(tokens_BJ, expected)
    assert len(np.unique(expected)) > 2  # no constant output, which any cache would give


def test_sequences_end_at_eos_and_pad_after():
    params, lengths = random_params(SMALL), (16, 12, 7)
    prompts = random_batch(lengths=lengths, total=16)
    free = np.asarray(generate(SMALL, params, prompts, max_new_tokens=J))
    eos = int(free[0, 2])  # let a token that was generated be the end
    ended = np.asarray(generate(small(eos_id=eos), params, prompts, max_new_tokens=J))
    for before, after in zip(free, ended, strict=True):
        end = list(before).index(eos) + 1 if eos in before else J
        np.testing.assert_array_equal(after[:end], before[:end])
        np.testing.assert_array_equal(after[end:], SMALL.pad_id)
    assert (ended[0, 3:] == SMALL.pad_id).all()


def test_an_empty_prompt_yields_padding():
    prompts = random_batch(lengths=(16, 0, 7), total=16)
    tokens_BJ = generate(SMALL, random_params(SMALL), prompts, max_new_tokens=J)
    np.testing.assert_array_equal(tokens_BJ[1], SMALL.pad_id)


def test_a_length_below_one_is_refused():
    with pytest.raises(UserError, match="max_new_tokens=0 must be >= 1"):
        generate(SMALL, {}, random_batch(), max_new_tokens=0)
