import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.routing.select import select


def _select(real, virtual, slots, **fields):
    real, virtual = jnp.array([real]), jnp.array([virtual], jnp.float32).reshape(1, len(virtual))
    fields = {"k_min": 1, "k_max": 4, "rho_max": 0.5, "cap_rounding": "floor", **fields}
    config = AnyExpertsConfig(num_experts=real.shape[1], num_virtual=virtual.shape[1], **fields)
    selection = select(config, real, virtual, jnp.array([slots], jnp.int32))
    ids = jnp.where(selection.real_live_NK, selection.real_ids_NK, -1)[0]
    virtual_ids = jnp.where(selection.virtual_live_NJ, selection.virtual_ids_NJ, -1)[0]
    chosen = [i for i in ids.tolist() if i >= 0], [j for j in virtual_ids.tolist() if j >= 0]
    # The mask from which the load is counted must agree with the ids.
    E = real.shape[1]
    mask = np.flatnonzero(selection.columns_NC(E, config.num_virtual)[0]).tolist()
    assert mask == sorted(chosen[0]) + [E + j for j in sorted(chosen[1])]
    assert (int(selection.real_slots_N[0]), int(selection.virtual_slots_N[0])) == (len(chosen[0]), len(chosen[1]))
    return *chosen, bool(selection.last_is_virtual_N[0])


@pytest.mark.parametrize(
    ("real", "virtual", "slots", "expected"),
    [
        # rank: r1 (3), v0 (2.5), r2 (2), r0 (1); cap floor(0.5 * 2) = 1
        ([1.0, 3.0, 2.0], [2.5], 2, ([1], [0], True)),
        ([1.0, 3.0, 2.0], [2.5], 3, ([1, 2], [0], False)),
        # v1 and v0 rank first, but a single slot cannot be virtual, and one of three can: real experts replace the rest
        ([1.0, 3.0, 2.0], [4.0, 5.0], 1, ([1], [], False)),
        ([1.0, 3.0, 2.0], [4.0, 5.0], 3, ([1, 2], [1], False)),
        ([1.0, 3.0, 2.0], [4.0, 5.0], 4, ([1, 2], [1, 0], False)),
        # the virtual columns rank too low to be in the top 3
        ([1.0, 3.0, 2.0], [0.0, 0.5], 3, ([1, 2, 0], [], False)),
        # ties: lower column first, real before virtual
        ([1.0, 1.0, 1.0], [1.0], 2, ([0, 1], [], False)),
        ([1.0, 1.0, 0.0], [1.0, 1.0], 4, ([0, 1], [0, 1], True)),
        ([0.0, 0.0, 2.0], [1.0, 1.0], 2, ([2], [0], True)),
        # -0.0 and 0.0 are a tie, although top_k orders them
        ([-0.0, 0.0, -1.0], [0.0], 1, ([0], [], False)),
        ([-0.0, -0.0, -1.0], [0.0], 2, ([0, 1], [], False)),
        ([-1.0, 2.0, -2.0], [-0.0, 0.0], 2, ([1], [0], True)),
        # padding
        ([1.0, 3.0, 2.0], [4.0], 0, ([], [], False)),
    ],
)
def test_selection_by_hand(real, virtual, slots, expected):
    assert _select(real, virtual, slots) == expected


def test_a_token_may_hold_virtual_slots_only():
    # round(0.5 * 1) = 1: the one slot may be virtual.
    assert _select([1.0, 3.0], [5.0], 1, k_max=2, cap_rounding="round") == ([], [0], True)


def test_fewer_real_experts_than_slots():
    # K 4 of two real and two virtual columns
    assert _select([1.0, 3.0], [0.0, -1.0], 4, k_max=4) == ([1, 0], [0, 1], True)


def test_no_virtual_experts():
    assert _select([1.0, 3.0, 2.0, 0.0], [], 3, rho_max=0.0) == ([1, 2, 0], [], False)


def test_virtual_columns_are_exempt_from_groups():
    # Groups [9, -9], [1, 2], sums 0 and 3: expert 0 is out although it ranks first.
    chosen = _select([9.0, -9.0, 1.0, 2.0], [1.5], 2, k_max=3, num_groups=2, groups_kept=1)
    assert chosen == ([3], [0], True)


def test_the_cap_leaves_every_token_its_real_experts():
    """For any ranking, real slots >= K_i - V_max (papers/anyexperts.md section 4)."""
    rng = np.random.default_rng(0)
    config = AnyExpertsConfig(num_experts=16, num_virtual=64, k_min=4, k_max=12)
    slots = jnp.asarray(rng.integers(4, 13, 200), jnp.int32)
    virtual = jnp.asarray(rng.normal(size=(200, 64)) + 5, jnp.float32)
    selection = select(config, jnp.asarray(rng.normal(size=(200, 16)), jnp.float32), virtual, slots)
    caps = jnp.array(config.virtual_caps)[slots]
    np.testing.assert_array_equal(selection.virtual_slots_N, caps)
    np.testing.assert_array_equal(selection.real_slots_N, slots - caps)
