import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.generate import Ends, dropless, generate, greedy_tokens
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


LENGTHS = (16, 12, 0)


TIGHT = 0.9  # a capacity factor at which the buffers overflow
DISPATCHES = ("dense", "blocks", "capacity", "exchange")


def lively_params(config=SMALL):
    """Random parameters under which the next token depends much on the last one, so that the output varies."""
    params = random_params(config)
    params["tokens"]["table"] = jnp.asarray(10 * np.asarray(params["tokens"]["table"]))
    return params


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_cache_gives_what_full_recomputation_gives_until_eos(dispatch):
    params = lively_params()
    free = recomputed(SMALL, params, random_batch(lengths=LENGTHS), LENGTHS)
    assert len(np.unique(free[:2])) > 4  # not a constant output, which any cache would give
    eos = int(free[0, -3])  # one of the generated tokens becomes the end
    config = small(eos_id=eos, stack={"execution": Execution(dispatch, capacity_factor=TIGHT)})
    tokens_BJ = generate(config, params, random_batch(lengths=LENGTHS, total=16), max_new_tokens=J)
    for row, expected in zip(np.asarray(tokens_BJ), free, strict=True):
        end = list(expected).index(eos) + 1 if eos in expected else J
        np.testing.assert_array_equal(row[:end], expected[:end])
        np.testing.assert_array_equal(row[end:], SMALL.pad_id)
    assert tokens_BJ[0, -1] == SMALL.pad_id
    np.testing.assert_array_equal(tokens_BJ[2], SMALL.pad_id)  # an empty prompt


def test_any_of_several_ends_stops_a_sequence():
    params = lively_params()
    free = recomputed(SMALL, params, random_batch(lengths=LENGTHS), LENGTHS)
    ends = (int(free[0, 1]), int(free[1, 2]))
    tokens_BJ = generate(SMALL, params, random_batch(lengths=LENGTHS), max_new_tokens=J, stop_ids=ends)
    for row, expected in zip(np.asarray(tokens_BJ), free, strict=True):
        end = min((list(expected).index(id) + 1 for id in (*ends, SMALL.eos_id) if id in expected), default=J)
        np.testing.assert_array_equal(row[:end], expected[:end])
        np.testing.assert_array_equal(row[end:], SMALL.pad_id)
    assert (np.asarray(tokens_BJ)[:2] == SMALL.pad_id).any(axis=1).all(), "both stopped early"


@pytest.mark.slow
@pytest.mark.parametrize(
    "stack", [{"num_dense_layers": 3}, {"num_layers": 4, "num_dense_layers": 0, "moe_every": 2}], ids=["dense", "every"]
)
def test_a_dense_model_and_one_with_experts_in_every_second_layer(stack):
    config = small(stack=stack, moe={"router": "per_modality"})
    params = lively_params(config)
    layers = config.stack.num_moe_layers
    trace = forward(config)(params, random_batch(lengths=LENGTHS)).trace
    assert trace.real_slots_BT.shape == (layers, 3, 22)
    assert trace.losses["balance"].shape == (layers,)
    expected = recomputed(config, params, random_batch(lengths=LENGTHS), LENGTHS)
    prompts = random_batch(lengths=LENGTHS, total=16)
    np.testing.assert_array_equal(generate(config, params, prompts, max_new_tokens=J), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["dense", "blocks", "capacity"])
def test_the_window_applies_to_every_token(dispatch):
    params, window = lively_params(), jnp.array([1.0, 3.0])
    expected = recomputed(SMALL, params, random_batch(lengths=LENGTHS), LENGTHS, window)
    config, prompts = small(stack={"execution": Execution(dispatch)}), random_batch(lengths=LENGTHS, total=16)
    np.testing.assert_array_equal(generate(config, params, prompts, max_new_tokens=J, window=window), expected)


@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_other_rows_of_its_batch():
    """The capacity is so tight that the prompts overflow it together."""
    config, params = small(stack={"execution": Execution("capacity", capacity_factor=TIGHT)}), lively_params()
    batch = random_batch(lengths=(16, 16, 16), total=16)
    assert float(forward(config)(params, batch).trace.metrics["dropped"].sum()) > 0
    together = generate(config, params, batch, max_new_tokens=J)
    for b in range(3):
        alone = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], batch)
        np.testing.assert_array_equal(generate(config, params, alone, max_new_tokens=J)[0], together[b])


def test_a_sequence_ends_at_the_models_length():
    """Beyond it there are no positions the model was trained on."""
    lengths = (12, 14, 9)
    params, prompts = lively_params(), random_batch(lengths=lengths, total=14)
    free = recomputed(SMALL, params, random_batch(lengths=lengths), lengths)
    assert SMALL.pad_id not in free
    tokens_BJ = np.asarray(generate(small(max_length=14), params, prompts, max_new_tokens=J))
    for row, expected, length in zip(tokens_BJ, free, lengths, strict=True):
        room = 14 - length
        np.testing.assert_array_equal(row[:room], expected[:room])
        np.testing.assert_array_equal(row[room:], SMALL.pad_id)


@pytest.mark.parametrize(
    ("max_new_tokens", "room", "steps", "rows"),
    [
        (1, (9, 9), 0, [[1], [1]]),
        (4, (9, 9), 3, [[1, 2, 3, 4], [1, 2, 3, 4]]),
        (4, (2, 1), 1, [[1, 2, 0, 0], [1, 0, 0, 0]]),
        (4, (0, 3), 2, [[0, 0, 0, 0], [1, 2, 3, 0]]),
        (4, (0, -1), 0, [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (9, (9, 9), 4, [[1, 2, 3, 4, 5, 0, 0, 0, 0]] * 2),  # 5 is the end
    ],
)
def test_no_step_is_taken_whose_token_is_not_needed(max_new_tokens, room, steps, rows):
    def step(tokens_B, j, live_B, cache):
        jax.debug.callback(lambda: seen.append(1))
        return jax.nn.one_hot(jnp.where(live_B, tokens_B + 1, 7), 8), cache

    seen = []
    ends = Ends(jnp.array(room), stop_ids=(5, 6), pad_id=0)
    tokens_BJ = greedy_tokens(step, jax.nn.one_hot(jnp.ones(2), 8), jnp.int32(0), ends, max_new_tokens)
    jax.effects_barrier()
    np.testing.assert_array_equal(tokens_BJ, rows)
    assert len(seen) == steps


def test_only_a_dispatch_that_can_drop_is_replaced():
    for name in ("dense", "blocks"):
        config = small(stack={"execution": Execution(name)})
        assert dropless(config) is config
    for name in ("capacity", "exchange"):
        assert dropless(small(stack={"execution": Execution(name)})) == small(stack={"execution": Execution("blocks")})


def test_a_length_below_one_is_refused():
    with pytest.raises(UserError, match="max_new_tokens=0 must be >= 1"):
        generate(SMALL, {}, random_batch(), max_new_tokens=0)
