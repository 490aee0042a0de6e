"""The vision tower: each frame alone, places in the order of merges, the learned grid stretched corner to corner."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.config import ModelConfig, VisionTowerConfig
from anyexperts_jax.models.init import abstract_params, named_leaves
from anyexperts_jax.models.paths import tower_of
from anyexperts_jax.models.vision_tower import Frames, VisionTower, places_on_grid
from anyexperts_jax.nn.config import AttentionConfig, StackConfig
from anyexperts_jax.nn.embeddings import Embedding

CONFIG = VisionTowerConfig(
    patch_size=2, d_model=16, num_layers=2, num_heads=2, d_ff=12, side=3, deep_layers=(0,), channels=1
)


def frames(*grids, length=16, seed=0):
    patches_FPX = np.zeros((len(grids), length, CONFIG.patch_features), np.float32)
    for i, (rows, columns) in enumerate(grids):
        own = np.random.default_rng(seed + i).standard_normal((rows * columns, CONFIG.patch_features))
        patches_FPX[i, : rows * columns] = own
    return Frames(patches_FPX, np.array(grids, np.int32))


@pytest.fixture(scope="module")
def tower():
    module = VisionTower(CONFIG, 20)
    params = jax.jit(module.init)(jax.random.key(0), frames((2, 2)))
    return jax.jit(module.apply), params


def test_a_frame_is_read_alone_however_much_it_is_padded(tower):
    apply, params = tower
    both, alone = apply(params, frames((4, 4), (2, 6))), apply(params, frames((4, 4), length=24))
    assert both.rows_FRD.shape == (2, 4, 20)
    assert both.deep_JFRD.shape == (1, 2, 4, 20)
    np.testing.assert_allclose(both.rows_FRD[0], alone.rows_FRD[0, :4], atol=1e-5)
    np.testing.assert_allclose(both.deep_JFRD[0, 0], alone.deep_JFRD[0, 0, :4], atol=1e-5)
    assert np.isfinite(np.asarray(alone.rows_FRD)).all()


def test_places_follow_one_another_square_by_square():
    row_FP, column_FP = places_on_grid(jnp.arange(12, dtype=jnp.int32)[None], jnp.array([[2, 6]]), 2)
    assert row_FP[0].tolist() == [0, 0, 1, 1] * 3
    assert column_FP[0].tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]
    row_FP, column_FP = places_on_grid(jnp.arange(8, dtype=jnp.int32)[None], jnp.array([[4, 2]]), 2)
    assert list(zip(row_FP[0].tolist(), column_FP[0].tolist(), strict=True))[4:] == [(2, 0), (2, 1), (3, 0), (3, 1)]


def test_the_learned_grid_is_stretched_corner_to_corner():
    from anyexperts_jax.models.vision_tower import _stretched

    table_RD = np.arange(9, dtype=np.float32)[:, None] @ np.ones((1, 2), np.float32)  # row 3, column 1 a step
    table = Embedding(9, 2).bind({"params": {"table": jnp.asarray(table_RD)}})
    grid_F2 = jnp.array([[2, 6]])
    places = places_on_grid(jnp.arange(12, dtype=jnp.int32)[None], grid_F2, 2)
    found_P = np.asarray(_stretched(table, *places, grid_F2, 3))[0, :, 0]
    expected = [
        3 * row * 2 + column * 2 / 5 for row, column in zip(*(np.asarray(own)[0] for own in places), strict=True)
    ]
    np.testing.assert_allclose(found_P, expected, atol=1e-6)


def test_its_parameters_are_the_towers(tower):
    attention = AttentionConfig(mrope_section=(8, 4, 4))
    model = ModelConfig(
        vision=None, audio=None, vision_tower=CONFIG, stack=StackConfig(d_model=20, attention=attention)
    )
    params = named_leaves(abstract_params(model))
    own = {name for name in params if tower_of(name) == "vision"}
    assert {name.removeprefix("vision_tower/") for name in own} == set(named_leaves(tower[1]["params"]))
    with pytest.raises(UserError, match=r"vision_tower needs stack.attention.mrope_section"):
        dataclasses.replace(model, stack=StackConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deep_layers": (1, 0)}, r"deep_layers=\(1, 0\) must rise within the 2 layers"),
        ({"deep_layers": (2,)}, r"deep_layers=\(2,\) must rise within the 2 layers"),
        ({"num_heads": 3}, "d_model=16 / num_heads=3 must be a multiple of 4"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be > 0"),
        ({"merge": 0}, "vision_tower.merge=0 must be >= 1"),
    ],
)
def test_an_invalid_tower_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change)
