import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.models.media import media_rows, place_rows, row_values, used_rows

# Two sequences: media at positions 1, 2, 4 and at 0 alone.
MEDIA_BT = jnp.array([[False, True, True, False, True], [True, False, False, False, False]])


def test_rows_count_media_positions():
    rows = media_rows(MEDIA_BT)
    np.testing.assert_array_equal(rows[0, [1, 2, 4]], [0, 1, 2])
    assert rows[1, 0] == 0
    np.testing.assert_array_equal(used_rows(MEDIA_BT, 4), [[True, True, True, False], [True, False, False, False]])


def test_values_come_to_the_rows_of_their_positions():
    times_BT = jnp.array([[9, 5, 6, 9, 7], [3, 9, 9, 9, 9]])
    np.testing.assert_array_equal(row_values(MEDIA_BT, times_BT, 4), [[5, 6, 7, 0], [3, 0, 0, 0]])
    np.testing.assert_array_equal(row_values(MEDIA_BT, times_BT, 2), [[5, 6], [3, 0]])


def test_rows_go_to_their_positions():
    x_BTD = jnp.full((2, 5, 1), -1.0)
    encoded_BRD = jnp.arange(6.0).reshape(2, 3, 1)
    placed = place_rows(x_BTD, MEDIA_BT, encoded_BRD)[..., 0]
    np.testing.assert_array_equal(placed, [[-1, 0, 1, -1, 2], [3, -1, -1, -1, -1]])


def test_a_position_without_a_row_reads_nan():
    placed = place_rows(jnp.zeros((2, 5, 1)), MEDIA_BT, jnp.ones((2, 2, 1)))[..., 0]
    assert bool(np.isnan(placed[0, 4]))
    assert int(np.isnan(placed).sum()) == 1


def test_gradients_go_back_to_the_rows_and_the_text():
    # d sum(placed * factor): each used row and each text position gets the factor of its place, the rest nothing.
    factor_BT = jnp.arange(1.0, 11.0).reshape(2, 5)
    loss = lambda x, encoded: (place_rows(x, MEDIA_BT, encoded)[..., 0] * factor_BT).sum()  # noqa: E731
    d_x, d_encoded = jax.grad(loss, (0, 1))(jnp.zeros((2, 5, 1)), jnp.ones((2, 4, 1)))
    np.testing.assert_array_equal(d_encoded[..., 0], [[2, 3, 5, 0], [6, 0, 0, 0]])
    np.testing.assert_array_equal(d_x[..., 0], [[1, 0, 0, 4, 0], [0, 7, 8, 9, 10]])
