import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.base import sort_slots
from anyexperts_jax.ops.aligned_rows import align_rows, experts_of_blocks, num_aligned_rows, rows_of_blocks
from tests.dispatch.plans import PLANS


@pytest.mark.parametrize(("name", "block"), [("random", 1), ("random", 8), *((name, 4) for name in PLANS)])
def test_every_real_slot_has_one_row_in_its_experts_blocks(name, block):
    plan = PLANS[name]
    ids_NK, num_experts = np.asarray(plan.expert_ids_NK), plan.spec.num_experts
    order = jax.jit(functools.partial(sort_slots, num_experts=num_experts))(plan.expert_ids_NK)
    row_map, starts_E = jax.jit(functools.partial(align_rows, block=block))(order)
    starts, counts = np.asarray(starts_E), np.asarray(order.counts_E)
    rows, live = row_map.live_R.size, np.asarray(row_map.live_R)
    assert rows == num_aligned_rows(ids_NK.size, num_experts, block)
    assert rows % block == 0
    assert not np.any(starts % block)
    expert_R = np.full(rows, num_experts)
    for e, (start, count) in enumerate(zip(starts, counts, strict=True)):
        assert start + count <= rows
        expert_R[start : start + count] = e
    np.testing.assert_array_equal(live, expert_R < num_experts)
    slots = np.asarray(row_map.slots_R)[live]
    assert sorted(slots) == np.flatnonzero(ids_NK < num_experts).tolist()
    np.testing.assert_array_equal(ids_NK.reshape(-1)[slots], expert_R[live])
    np.testing.assert_array_equal(row_map.tokens_R, np.asarray(row_map.slots_R) // ids_NK.shape[1])
    np.testing.assert_array_equal(row_map.held_NK, ids_NK < num_experts)
    np.testing.assert_array_equal(np.asarray(row_map.rows_NK).reshape(-1)[slots], np.flatnonzero(live))


@pytest.mark.parametrize("slots", [1, 3, 7, 12, 30])
@pytest.mark.parametrize("block", [1, 4, 8])
def test_no_smaller_buffer_holds_the_worst_case(slots, block):
    """Every expert gets one slot, and one of them the rest, in whole blocks."""
    experts = 5
    spread = min(slots, experts)
    worst = (spread - 1) * block + -(-(slots - spread + 1) // block) * block
    assert num_aligned_rows(slots, experts, block) == worst


def test_what_a_block_holds():
    starts, counts = jnp.array([0, 8, 8, 16]), jnp.array([5, 0, 8, 1])
    for block, experts, rows in ((4, [0, 0, 2, 2, 3, None], [4, 1, 4, 4, 1, 0]), (8, [0, 2, 3], [5, 8, 1])):
        found = experts_of_blocks(starts, counts, len(rows), block).tolist()
        assert [e for e, r in zip(found, rows, strict=True) if r] == [e for e in experts if e is not None]
        assert rows_of_blocks(starts, counts, len(rows), block).tolist() == rows


def test_a_block_without_rows_is_refused():
    with pytest.raises(UserError, match=r"^block=0 must be >= 1$"):
        align_rows(sort_slots(PLANS["random"].expert_ids_NK, 5), 0)
