import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.optim import OptimConfig, apply_updates, learning_rate, make_optimizer


def test_learning_rate_warms_up_and_decays():
    config = OptimConfig(lr=1.0, warmup_steps=4, final_lr_fraction=0.2)
    rates = np.asarray([learning_rate(config, 24, step) for step in range(25)])
    np.testing.assert_allclose(rates[:5], [0.25, 0.4375, 0.625, 0.8125, 1.0])
    np.testing.assert_allclose(rates[14], 0.2 + 0.8 / 2, rtol=1e-6)  # half way down the cosine
    np.testing.assert_allclose(rates[24], 0.2, rtol=1e-6)
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=0), 10, 0) == 1.0


def test_weight_decay_spares_norms_and_biases():
    axes = {"norm": ("layers", "norm"), "bias": ("router",), "up": ("layers", "embed", "mlp")}
    params = {"norm": jnp.ones((2, 3)), "bias": jnp.ones(4), "up": jnp.ones((2, 3, 5))}
    optimizer = make_optimizer(OptimConfig(weight_decay=0.5), axes)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, learning_rate=2.0
    )
    assert {name: float(update.min()) for name, update in updates.items()} == {"norm": 0.0, "bias": 0.0, "up": -1.0}


def test_gradient_is_clipped_as_a_whole():
    optimizer = make_optimizer(
        OptimConfig(clip_norm=1.0, b1=0.0, eps=1.0, weight_decay=0.0), {"a": ("norm",), "b": ("norm",)}
    )
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.asarray([30.0]), "b": jnp.asarray([40.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params, learning_rate=1.0)
    # clipped to (0.6, 0.8); Adam's first step then gives g / (|g| + eps)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-6)


def test_what_is_not_finite_leaves_the_state_as_it_is():
    optimizer, params = make_optimizer(OptimConfig(), {"up": ("embed", "mlp")}), {"up": jnp.ones((2, 3))}
    _, state = optimizer.update(params, optimizer.init(params), params, learning_rate=0.1)
    poisoned = jax.tree.map(lambda p: p * jnp.nan, params)
    _, after = optimizer.update(poisoned, state, params, learning_rate=0.1, finite=jnp.asarray(False))
    chex.assert_trees_all_equal(after, state)


def test_moments_of_bfloat16_parameters_are_float32_from_the_first_step_on():
    optimizer = make_optimizer(OptimConfig(), {"up": ("embed", "mlp")})
    params, grads = {"up": jnp.ones((2, 3), jnp.bfloat16)}, {"up": jnp.ones((2, 3))}
    before = optimizer.init(params)
    updates, after = optimizer.update(grads, before, params, learning_rate=0.1)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert {leaf.dtype for leaf in jax.tree.leaves(before) if leaf.ndim} == {jnp.dtype("float32")}
    moved = apply_updates(params, updates)["up"]
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved, (params["up"].astype(jnp.float32) + updates["up"]).astype(jnp.bfloat16))


def test_moments_are_replaced_in_place_without_a_copy():
    """No copy of the old moments or of the clipped gradient: AdamW's time is that of its memory traffic."""
    optimizer, params = make_optimizer(OptimConfig(), {"up": ("embed", "mlp")}), {"up": jnp.ones((512, 512))}

    def step(params, state, grads, finite):
        updates, state = optimizer.update(grads, state, params, learning_rate=0.1, finite=finite)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params), params, jnp.asarray(True))
    assert program.compile().memory_analysis().temp_size_in_bytes < params["up"].nbytes / 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, r"optim\.lr=0\.0 must be > 0"),
        ({"warmup_steps": -1}, r"optim\.warmup_steps=-1 must be >= 0"),
        ({"b2": 1.0}, r"optim\.b2=1\.0 must be in \[0, 1\)"),
        ({"final_lr_fraction": 1.5}, r"final_lr_fraction=1\.5 must be in \[0, 1\]"),
        ({"clip_norm": float("nan")}, "clip_norm=nan must be a finite number"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**fields)
