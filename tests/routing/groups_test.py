import jax.numpy as jnp
import numpy as np

from anyexperts_jax.routing.groups import limit_to_groups

OUT = -jnp.inf


def test_groups_are_ranked_by_the_sum_of_their_two_best():
    # Groups of three: 3 + (-5) = -2, 2 + 1.75 = 3.75, 1 + 1 = 2. The best expert of all is in the worst group.
    rank = jnp.array([[3.0, -5.0, -6.0, 2.0, 1.75, -9.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(limit_to_groups(rank, 3, 2), [[OUT, OUT, OUT, 2.0, 1.75, -9.0, 1.0, 1.0, 1.0]])


def test_ties_go_to_the_lower_group():
    # 2 + 1 in every group
    rank = jnp.array([[1.0, 2.0, 2.0, 1.0, 1.0, 2.0]])
    np.testing.assert_array_equal(limit_to_groups(rank, 3, 2), [[1.0, 2.0, 2.0, 1.0, OUT, OUT]])


def test_equal_best_members_both_count():
    # 2 + 2 = 4 beats 3 + 0.5 = 3.5: the second best of [2, 2] is 2, not what is left after removing both.
    np.testing.assert_array_equal(limit_to_groups(jnp.array([[3.0, 0.5, 2.0, 2.0]]), 2, 1), [[OUT, OUT, 2.0, 2.0]])


def test_groups_of_one_are_ranked_by_their_expert():
    np.testing.assert_array_equal(limit_to_groups(jnp.array([[1.0, 3.0, 2.0]]), 3, 2), [[OUT, 3.0, 2.0]])


def test_keeping_every_group_changes_nothing():
    rank = jnp.array([[1.0, 3.0, 2.0, 0.0]])
    np.testing.assert_array_equal(limit_to_groups(rank, 2, 2), rank)
