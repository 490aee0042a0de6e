import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.dispatch import auto as module
from anyexperts_jax.dispatch.auto import LayerSizes, choose_dispatch
from anyexperts_jax.routing.plan import PlanSpec
from tests.dispatch.plans import make_operands
from tests.sharding.meshes import (
    EXPERTS,
    HIDDEN,
    TOKENS,
    WIDTH,
    assert_as_one_device,
    blocks,
    dispatched,
    plan_of,
)

LING = PlanSpec(num_experts=256, expected_real_slots=8.0, num_groups=8, groups_kept=4)
SIZES = LayerSizes(tokens=4096, slots_bound=10, width=2048, hidden=512, itemsize=2, expert_devices=8)


def auto(placement):
    return dispatched(placement, "auto", overflow="fallback")


def test_bytes_by_hand():
    """One slot on uniformly chosen experts is one row, on any number of devices: with factor 1, as many as tokens."""
    spec = PlanSpec(num_experts=16, expected_real_slots=1.0)
    choice = choose_dispatch(spec, 1.0, SIZES._replace(tokens=64, width=10, hidden=3, expert_devices=4))
    assert choice.rows == pytest.approx(3 / 4 * 64 * 10 * 4 * 2)
    assert choice.weights == pytest.approx(3 / 4 * 3 * 16 * 10 * 3 * 3 * 2)
    assert choice.dispatch == "exchange"
    assert str(choice).startswith('dispatch="auto" is exchange: per device and MoE layer, a training step would send ')


def test_fewer_rows_than_nine_quarters_of_e_f_are_exchanged():
    few = choose_dispatch(LING, 1.25, SIZES._replace(tokens=58_000))
    many = choose_dispatch(LING, 1.25, SIZES._replace(tokens=60_000))
    assert (few.dispatch, many.dispatch) == ("exchange", "blocks")
    assert few.rows < few.weights == many.weights < many.rows
    assert few.weights == pytest.approx(7 / 8 * 3 * 256 * 512 * 2048 * 3 * 2)


def test_experts_that_are_not_split_are_never_exchanged():
    assert choose_dispatch(LING, 1.25, SIZES._replace(expert_devices=1)).dispatch == "blocks"


@pytest.mark.parametrize("mesh", ["data 2, expert 4", "data 8"])
def test_either_choice_gives_the_values_and_gradients_of_one_device(mesh, monkeypatch):
    taken = set()
    find = module.DISPATCHERS.__getitem__
    monkeypatch.setattr(module, "DISPATCHERS", Recorded(find, taken))
    stats, _ = assert_as_one_device(mesh, auto, plan_of("random"), blocks)
    assert stats.dropped == 0
    assert taken == {"exchange" if "expert" in mesh else "blocks"}


def test_without_a_mesh_it_is_blocks():
    operands = make_operands(TOKENS, EXPERTS, width=WIDTH, hidden=HIDDEN)
    plan = plan_of("random")
    y_ND, stats = auto(None)(operands[0], plan, *operands[1:])
    expected_ND, _ = blocks(None)(operands[0], plan, *operands[1:])
    np.testing.assert_array_equal(y_ND, expected_ND)
    assert stats.dropped == 0
    assert y_ND.dtype == jnp.float32


class Recorded:
    """The registry of dispatchers, which notes the names that are looked up."""

    def __init__(self, find, taken):
        self.find, self.taken = find, taken

    def __getitem__(self, name):
        self.taken.add(name)
        return self.find(name)
