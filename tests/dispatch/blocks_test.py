import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch import blocks as module
from anyexperts_jax.ops._select import sees_one_device
from anyexperts_jax.ops.routed_mlp.loop import row_sizes
from tests.dispatch.plans import make_operands, make_plan, random_ids
from tests.sharding.meshes import (
    CASES,
    EMPTY,
    EXPERTS,
    HIDDEN,
    MESHES,
    SLOTS,
    TOKENS,
    WIDTH,
    assert_as_one_device,
    blocks,
    capacity_or_exact,
    dispatched,
    place,
    plan_of,
    split_over,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_values_and_gradients_of_one_device(mesh, case):
    stats, _ = assert_as_one_device(mesh, blocks, plan_of(case))
    assert stats.dropped == 0
    assert stats.rows == (CASES[case] < EMPTY).sum()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["random", "one sequence has slots"])
def test_capacity_falls_back_to_blocks(case):
    stats, expected = assert_as_one_device("data 2, expert 4", capacity_or_exact, plan_of(case))
    assert stats.dropped == 0
    assert (stats.rows == expected.rows) == (case == "random")  # otherwise everything fitted into the buffers


@pytest.mark.parametrize(
    ("mesh", "shards"),
    [
        ("data 8", 8),
        ("two slices along fsdp, expert 4", 8),
        ("data 2, expert 4", 8),
        ("fsdp 2, expert 2, tensor 2", 4),
        ("expert 2, sequence 2, data 2", 8),
    ],
)
def test_a_device_has_the_rows_of_its_own_tokens_alone(mesh, shards):
    """The compiled program, forward and backward, has one sort, and no buffer with rows of other devices' tokens."""
    tokens, width, hidden = 1024, 24, 40
    plan = make_plan(random_ids(np.random.default_rng(0), tokens, SLOTS, EXPERTS), EXPERTS, virtual_output="zero")
    x, *weights = split_over(mesh, make_operands(tokens, EXPERTS, width=width, hidden=hidden))
    run = blocks(place(MESHES[mesh]))
    step = jax.jit(jax.grad(lambda x, *weights: jnp.sin(run(x, plan, *weights)[0]).sum(), range(4)))
    program = step.lower(x, *weights).compile().as_text()
    own = tokens // shards * SLOTS
    assert re.findall(r"= s32\[(\d+)\]\S* sort\(", program) == [str(own)]
    rows = {int(count) for count in re.findall(rf"\[(\d+),(?:{width}|{hidden}|{hidden // 2})\]", program)}
    past_the_end = row_sizes(own, tokens // shards, EXPERTS)[-1]  # rows that the last expert's block may reach
    assert max(rows) == own + past_the_end


def test_a_device_may_run_kernels(monkeypatch):
    """They are the default where a trace sees one device, as it does in a `shard_map` over the whole mesh."""
    seen, run = [], module.apply_slots

    def note(*operands, **how):
        seen.append(sees_one_device())
        return run(*operands, **how)

    monkeypatch.setattr(module, "apply_slots", note)
    operands = make_operands(TOKENS, EXPERTS, width=WIDTH, hidden=HIDDEN)
    jax.eval_shape(blocks(place(MESHES["data 8"])), operands[0], plan_of("random"), *operands[1:])
    assert seen == [True]


def test_what_the_mesh_does_not_divide_is_refused():
    plan, (x_ND, *weights) = plan_of("random"), make_operands(TOKENS, EXPERTS, width=WIDTH, hidden=HIDDEN)
    with pytest.raises(UserError, match=r"4 sequences do not split over mesh axes .* of 8 devices"):
        dispatched(place(MESHES["data 8"]), "blocks", 4)(x_ND, plan, *weights)
    odd = make_operands(TOKENS, EXPERTS, width=WIDTH, hidden=7)[1:]
    with pytest.raises(UserError, match="experts 7 wide do not split over mesh axes tensor of 2 devices"):
        dispatched(place(MESHES["fsdp 2, expert 2, tensor 2"]), "blocks")(x_ND, plan, *odd)
    uneven = make_plan(np.zeros((40, 1)), EXPERTS)
    with pytest.raises(UserError, match="5 positions do not split over mesh axes sequence of 2 devices"):
        dispatched(place(MESHES["expert 2, sequence 2, data 2"]), "blocks")(x_ND[:40], uneven, *weights)
