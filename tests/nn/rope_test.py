"""Rotary positions in space: interleaved by section, plain on text, and the two halves of a vision tower."""

import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.nn.config import AttentionConfig
from anyexperts_jax.nn.rope import frequencies, rotate, rotations, rotations_in_space, rotations_on_grid

CONFIG = AttentionConfig(head_dim=20, mrope_section=(5, 2, 3))


def test_on_text_positions_in_space_are_plain_ones():
    positions_BT = jnp.arange(7, dtype=jnp.int32)[None]
    positions_BT3 = jnp.broadcast_to(positions_BT[..., None], (1, 7, 3))
    for plain, spatial in zip(rotations(CONFIG, positions_BT), rotations_in_space(CONFIG, positions_BT3), strict=True):
        np.testing.assert_array_equal(plain, spatial)


def test_waves_turn_by_time_row_and_column_in_threes():
    cos, _ = rotations_in_space(CONFIG, jnp.array([[[3, 5, 7]]], jnp.int32))
    axes = [0, 1, 2, 0, 1, 2, 0, 0, 2, 0]  # rows at 1 and 4 (2 waves), columns at 2, 5 and 8 (3 waves)
    expected = np.cos(np.array([3, 5, 7], np.float32)[axes] * np.asarray(frequencies(CONFIG)))
    np.testing.assert_allclose(cos[0, 0], expected, atol=1e-6)


def test_on_a_grid_the_first_waves_turn_by_the_row():
    cos, sin = rotations_on_grid(jnp.array([[2]]), jnp.array([[3]]), 8, 100.0)
    angles = np.array([2, 2 * 0.1, 3, 3 * 0.1], np.float32)
    np.testing.assert_allclose(cos[0, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(angles), atol=1e-6)


def test_sections_are_three():
    with pytest.raises(UserError, match=r"mrope_section=\(4, 4\) must be three numbers of waves"):
        AttentionConfig(mrope_section=(4, 4))


def test_interleaved_pairs_turn_as_halves_do():
    """The pairs are neighbours, and come out in two halves."""
    config = AttentionConfig(head_dim=8, rope_fraction=0.75)
    rotation = rotations(config, jnp.array([[5]], jnp.int32))
    x_BTHA = jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)
    halves = rotate(x_BTHA[..., jnp.array([0, 2, 4, 1, 3, 5, 6, 7])], rotation)
    np.testing.assert_array_equal(rotate(x_BTHA, rotation, interleaved=True), halves)
