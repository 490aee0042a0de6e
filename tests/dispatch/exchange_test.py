import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.exchange_sizes import BufferSizes, buffer_sizes
from tests.dispatch.plans import make_operands, make_plan, random_ids
from tests.nn.layers import equations
from tests.sharding.meshes import (
    CASES,
    EMPTY,
    EXPERTS,
    HIDDEN,
    LENGTH,
    MESHES,
    SEQUENCES,
    SLOTS,
    TOKENS,
    WIDTH,
    assert_as_one_device,
    blocks,
    capacity,
    dispatched,
    place,
    plan_of,
    split_over,
)


def exchange(placement, num_sequences=SEQUENCES, **execution):
    return dispatched(placement, "exchange", num_sequences, **execution)


def exact(placement):
    """`blocks` on one device, where there is no mesh to exchange over."""
    return exchange(placement, overflow="fallback")


def in_chunks(placement):
    return exchange(placement, overflow="fallback", exchange_chunks=3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_values_and_gradients_of_one_device(mesh, case):
    stats, _ = assert_as_one_device(mesh, exact, plan_of(case))
    assert stats.dropped == 0
    assert stats.rows == (CASES[case] < EMPTY).sum()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["random", "all on one expert", "one sequence has slots"])
@pytest.mark.parametrize("mesh", ["expert 2, sequence 2, data 2"])
def test_chunks_give_the_values_and_gradients_of_one_device(mesh, case):
    stats, _ = assert_as_one_device(mesh, in_chunks, plan_of(case))
    assert stats.rows == (CASES[case] < EMPTY).sum()


def test_one_row_for_a_token_and_device_travels_each_way_in_16_bits():
    """Rows travel there and back, as do their gradients; slot ids travel there; combine weights travel there, and their
    gradients back."""
    plan, operands = plan_of("random"), make_operands(TOKENS, EXPERTS, dtype=jnp.bfloat16, width=WIDTH, hidden=HIDDEN)

    def total(x, weights_NK, *weights):
        y_ND, _ = exchange(place(MESHES["expert 8"]))(x, dataclasses.replace(plan, weights_NK=weights_NK), *weights)
        return y_ND.astype(jnp.float32).sum()

    x, *weights = operands
    program = jax.make_jaxpr(jax.value_and_grad(total, range(5)))(x, plan.weights_NK, *weights)
    sent = [each.outvars[0].aval for each in equations(program.jaxpr) if each.primitive.name == "all_to_all"]
    rows = buffer_sizes(plan.spec, 1.25, LENGTH, 8, SLOTS).rows
    slots = ("float32", (8, SLOTS, rows))
    wanted = [("bfloat16", (8, rows, WIDTH))] * 4 + [slots, slots, ("int32", (8, SLOTS, rows))]
    assert sorted((str(aval.dtype), aval.shape) for aval in sent) == sorted(wanted)


@pytest.mark.slow
def test_16_bits_stay_close_to_one_device():
    plan, operands = plan_of("random"), make_operands(TOKENS, EXPERTS, dtype=jnp.bfloat16, width=WIDTH, hidden=HIDDEN)
    found, _ = jax.jit(exact(place(MESHES["data 2, expert 4"])))(operands[0], plan, *operands[1:])
    wide = [a.astype(jnp.float32) for a in operands]
    expected, _ = jax.jit(blocks(None))(wide[0], plan, *wide[1:])
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.02 * float(jnp.abs(expected).max()))


def test_what_does_not_fit_a_chunk_is_dropped_and_counted():
    plan = plan_of("one shard's experts alone")
    operands = make_operands(TOKENS, EXPERTS, width=WIDTH, hidden=HIDDEN)
    run = jax.jit(exchange(place(MESHES["expert 8"]), exchange_chunks=2))
    y_ND, stats = run(operands[0], plan, *operands[1:])
    # One row, ceil(1.25 * 1.47 * 3 / 8), and the slots of a whole token, more than ceil(1.25 * 1.5 * 3 / 8).
    assert buffer_sizes(plan.spec, 1.25, LENGTH // 2, 8, SLOTS) == BufferSizes(rows=1, slots=SLOTS)
    assert stats.dropped == 2 * TOKENS - 8 * 2 * 2  # devices, chunks, slots of a row
    kept_T = (y_ND != 0).any(1).reshape(SEQUENCES, LENGTH).sum(0)
    np.testing.assert_array_equal(kept_T, [SEQUENCES, 0, 0, SEQUENCES, 0, 0])


@pytest.mark.parametrize("case", ["random", "one shard's experts alone", "one sequence has slots"])
@pytest.mark.parametrize("mesh", ["data 2, expert 4", "fsdp 2, expert 2, tensor 2"])
def test_capacity_buffers_on_a_mesh_give_and_drop_what_one_device_does(mesh, case):
    stats, expected = assert_as_one_device(mesh, capacity, plan_of(case), capacity)
    assert stats.dropped == expected.dropped
    assert (stats.dropped > 0) == (case != "one sequence has slots")


def test_devices_share_the_rows_of_capacity_buffers():
    """If both copies of an expert computed all of its rows, the work would double."""
    tokens, width, hidden = 512, 32, 64
    plan = make_plan(random_ids(np.random.default_rng(0), tokens, SLOTS, EXPERTS), EXPERTS, expected_real_slots=1.6)
    operands, mesh = make_operands(tokens, EXPERTS, width=width, hidden=hidden), "data 2, expert 4"
    x, *weights = split_over(mesh, operands)
    flops = jax.jit(capacity(place(MESHES[mesh]))).lower(x, plan, *weights).compile().cost_analysis()
    rows = 64  # ceil(1.25 * 1.6 * 512 / 16)
    computed = 6 * EXPERTS * rows * width * hidden
    assert computed / 8 <= flops["flops"] < 1.2 * computed / 8


def test_what_does_not_fit_is_dropped_and_counted_over_all_devices():
    plan = plan_of("one shard's experts alone")
    placement, sizes = place(MESHES["expert 8"]), buffer_sizes(plan.spec, 1.25, LENGTH, 8, SLOTS)
    operands = make_operands(TOKENS, EXPERTS, width=WIDTH, hidden=HIDDEN)
    y_ND, stats = jax.jit(exchange(placement))(operands[0], plan, *operands[1:])
    assert sizes == BufferSizes(rows=2, slots=3)  # ceil(1.25 * 1.47 * 6 / 8) and, above ceil(1.25 * 1.5 * 6 / 8), K
    assert stats.dropped == 2 * TOKENS - 8 * 2  # a second row of two slots would make four
    np.testing.assert_array_equal((y_ND != 0).any(1).reshape(SEQUENCES, LENGTH).sum(0), [SEQUENCES, 0, 0, 0, 0, 0])


def test_drops_do_not_depend_on_later_tokens():
    placement = place(MESHES["data 2, expert 4"])
    operands = make_operands(TOKENS, EXPERTS, width=WIDTH, hidden=HIDDEN)
    plan, early = plan_of("random"), np.tile(np.arange(LENGTH) < 4, SEQUENCES)
    changed_ids = np.where(early[:, None], plan.expert_ids_NK, [[0, 1, 2]])
    changed = dataclasses.replace(plan, expert_ids_NK=jnp.asarray(changed_ids, jnp.int32))
    run = jax.jit(exchange(placement))
    before, stats = run(operands[0], plan, *operands[1:])
    after, _ = run(operands[0], changed, *operands[1:])
    assert stats.dropped > 0
    np.testing.assert_array_equal(before[early], after[early])


def test_what_the_mesh_does_not_divide_is_refused():
    plan, operands = plan_of("random"), make_operands(TOKENS, EXPERTS, width=WIDTH, hidden=HIDDEN)
    with pytest.raises(UserError, match=r"4 sequences do not split over mesh axes .* of 8 devices"):
        exchange(place(MESHES["expert 8"]), num_sequences=4)(operands[0], plan, *operands[1:])
    with pytest.raises(UserError, match=r"exchange_chunks=4 must divide the 6 positions that a device has"):
        exchange(place(MESHES["expert 8"]), exchange_chunks=4)(operands[0], plan, *operands[1:])
    few = make_plan(np.zeros((TOKENS, 1)), 4)
    with pytest.raises(UserError, match=r"4 experts do not split over mesh axis 'expert' of 8"):
        exchange(place(MESHES["expert 8"]))(operands[0], few, *make_operands(TOKENS, 4)[1:])
