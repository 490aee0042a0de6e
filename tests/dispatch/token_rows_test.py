"""The rows that a device sends, compared with lists made token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.dispatch.exchange_sizes import BufferSizes
from anyexperts_jax.dispatch.token_rows import find_token_rows, map_buffers, slots_of_rows
from tests.dispatch.plans import random_ids

EXPERTS, DEVICES, SEQUENCES, LENGTH, SLOTS = 12, 4, 3, 7, 5
LOCAL, TOKENS = EXPERTS // DEVICES, SEQUENCES * LENGTH
PLANS = {
    "random": random_ids(np.random.default_rng(3), TOKENS, SLOTS, EXPERTS),
    "all on one device": np.tile([[3, 5, 4, EXPERTS, EXPERTS]], (TOKENS, 1)),
    "one expert twice": np.tile([[3, 3, 9, 3, EXPERTS]], (TOKENS, 1)),
    "no slot": np.full((TOKENS, SLOTS), EXPERTS),
}


def listed(ids_NK, device):
    """[(token, its slots on the device)], by position and then by sequence."""
    order = [sequence * LENGTH + position for position in range(LENGTH) for sequence in range(SEQUENCES)]
    own = {n: [k for k in range(SLOTS) if ids_NK[n, k] // LOCAL == device] for n in order}
    return [(n, own[n]) for n in order if own[n]]


def filled(rows, sizes):
    """The next rows that fit, and the others."""
    taken, slots = 0, 0
    while taken < min(len(rows), sizes.rows) and slots + len(rows[taken][1]) <= sizes.slots:
        slots += len(rows[taken][1])
        taken += 1
    return rows[:taken], rows[taken:]


@pytest.mark.parametrize("sizes", [BufferSizes(3, 7), BufferSizes(21, 5), BufferSizes(2, 100), BufferSizes(21, 105)])
@pytest.mark.parametrize("name", PLANS)
def test_rounds_send_every_slot_once_and_never_more_than_fits(name, sizes):
    ids_NK = PLANS[name]
    weights_NK = jnp.asarray(np.random.default_rng(0).random(ids_NK.shape), jnp.float32)

    @jax.jit
    def send(first_W):
        rows = find_token_rows(jnp.asarray(ids_NK, jnp.int32), LOCAL, DEVICES, SEQUENCES)
        row_map = map_buffers(rows, sizes, first_W)
        taken_W = rows.fitting(sizes, first_W)
        sent = slots_of_rows(rows, row_map, jnp.asarray(ids_NK, jnp.int32), weights_NK)
        return row_map, sent, taken_W, rows.slots_of(taken_W)

    left, first_W = [listed(ids_NK, device) for device in range(DEVICES)], np.zeros(DEVICES, np.int32)
    for number in range(TOKENS + 1):
        row_map, (ids_RK, sent_weights_RK), taken_W, slots_W = jax.device_get(send(first_W))
        held = 0
        for device in range(DEVICES):
            own, left[device] = filled(left[device], sizes)
            assert taken_W[device] == len(own)
            assert number or slots_W[device] == sum(len(slots) for _, slots in own)
            block = slice(device * sizes.rows, (device + 1) * sizes.rows)
            np.testing.assert_array_equal(row_map.live_R[block], np.arange(sizes.rows) < len(own))
            for row, (token, slots) in enumerate(own, start=device * sizes.rows):
                assert row_map.tokens_R[row] == token
                kept_K = np.isin(np.arange(SLOTS), slots)
                np.testing.assert_array_equal(ids_RK[row], np.where(kept_K, ids_NK[token], -1))
                np.testing.assert_array_equal(sent_weights_RK[row], np.where(kept_K, weights_NK[token], 0))
                assert row in row_map.rows_NK[token][row_map.held_NK[token]]
                held += 1
        assert row_map.held_NK.sum() == held
        assert not (ids_RK[~row_map.live_R] >= 0).any()
        assert not sent_weights_RK[~row_map.live_R].any()
        first_W = first_W + taken_W
        if not any(left):
            break
    assert not any(left)
    assert number < -(-TOKENS // min(sizes.rows, sizes.slots // SLOTS))
