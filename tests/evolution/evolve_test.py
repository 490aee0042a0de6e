import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evolution.config import EvolutionConfig
from anyexperts_jax.evolution.evolve import draw_betas, expert_evolution, follow

KEY = jax.random.key_data(jax.random.key(7))
L, E = 2, 4
DEFAULT = EvolutionConfig()


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"up": (L, E, 3, 5), "down": (L, E, 5, 3)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def evolution(config=DEFAULT, inner=None, steps=10):
    return expert_evolution(inner or optax.sgd(0.1), config, num_experts=E, steps=steps, key=KEY)


def take(optimizer, params, steps=1, grads=None):
    """The parameters after each step. The gradients are the parameters themselves; only those of expert 1 count."""
    state, seen = optimizer.init(params), [params]
    step = jax.jit(lambda p, s: optimizer.update(grads or p, s, p))
    for _ in range(steps):
        updates, state = step(seen[-1], state)
        seen.append(optax.apply_updates(seen[-1], updates))
    return seen, state


@pytest.mark.parametrize("mode", ["ema", "lag", "literal"])
def test_each_mode_computes_its_equation(mode):
    """Computes it by hand, expert by expert, with the betas that the state's key gives."""
    config = EvolutionConfig(mode=mode)
    seen, state = take(evolution(config), params(), steps=3)
    assert int(state.step) == 3
    for t in range(3):
        beta_J = np.asarray(draw_betas(config, E, KEY, jnp.int32(t)))
        for name in ("up", "down"):
            before, after = np.asarray(seen[t][name]), np.asarray(seen[t + 1][name])
            np.testing.assert_allclose(after[:, 0], 0.9 * before[:, 0], rtol=1e-6)
            for n, beta in enumerate(beta_J, start=1):
                expected = {
                    "ema": beta * before[:, n] + (1 - beta) * after[:, 0],
                    "lag": beta * before[:, 0] + (1 - beta) * after[:, 0],
                    "literal": beta * before[:, 0] + (1 - beta) * before[:, 0],  # the gradient is the parameter
                }[mode]
                np.testing.assert_allclose(after[:, n], expected, rtol=1e-5, atol=1e-6)


def test_literal_mode_uses_the_raw_gradient():
    g = jnp.full((1, 2), 5.0)
    expert_1 = {"before": jnp.ones((1, 2)), "after": jnp.full((1, 2), 9.0), "gradient": g}
    moved = follow("literal", jnp.float32(0.75), jnp.zeros((1, 2)), **expert_1)
    np.testing.assert_allclose(moved, 0.75 + 0.25 * 5.0)


def test_each_expert_draws_a_new_beta_in_its_own_range():
    config = EvolutionConfig()
    draw = jax.jit(jax.vmap(lambda step: draw_betas(config, E, KEY, step)))
    betas = np.asarray(draw(jnp.arange(400)))
    for n, (low, high) in enumerate(zip(config.beta_low, config.beta_high, strict=True)):
        assert low <= betas[:, n].min() < low + 0.01
        assert high - 0.01 < betas[:, n].max() <= high
    assert len(np.unique(betas)) > 1000
    np.testing.assert_array_equal(draw_betas(EvolutionConfig(fixed_beta=0.5), 7, KEY, jnp.int32(3)), 0.5)


def test_the_optimiser_sees_and_remembers_only_expert_1():
    optimizer = evolution(inner=optax.adam(1e-2))
    start = params()
    wild = jax.tree.map(lambda g: g.at[:, 1:].set(jnp.nan), start)  # gradients of the others do not count
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes its integer count with floats
        seen, state = take(optimizer, start, steps=2, grads=wild)
    chex.assert_tree_all_finite(seen[-1])
    moments = [leaf.shape for leaf in jax.tree.leaves(state.inner) if leaf.ndim]
    assert sorted(moments) == sorted(2 * [(L, 1, 3, 5), (L, 1, 5, 3)])
    alone = jax.tree.map(lambda w: w[:, :1], start)
    plain = optax.adam(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = plain.update(alone, plain.init(alone), alone)
    np.testing.assert_allclose(seen[1]["up"][:, :1], optax.apply_updates(alone, updates)["up"], rtol=1e-6)


def test_a_snapshot_does_not_change():
    seen, _ = take(evolution(EvolutionConfig(snapshots=(0.2, 0.5, 1.0)), steps=10), params(), steps=10)
    for n, stop in ((1, 2), (2, 5), (3, 10)):
        changed = [bool((seen[t]["up"][:, n] != seen[t + 1]["up"][:, n]).any()) for t in range(10)]
        assert changed == [t < stop for t in range(10)]


def test_a_step_that_is_not_finite_is_not_counted():
    optimizer = evolution()
    start = params()
    state = optimizer.init(start)
    for finite, step in ((False, 0), (True, 1)):
        _, after = optimizer.update(start, state, start, learning_rate=0.1, finite=jnp.asarray(finite))
        assert after.step == step


def test_chains_with_other_transformations_and_takes_extra_arguments():
    def scaled(updates, state, params=None, *, learning_rate, **extra):
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    by_argument = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scaled)
    optimizer = optax.chain(optax.clip(0.5), evolution(inner=by_argument))
    start = params()
    updates, _ = optimizer.update(start, optimizer.init(start), start, learning_rate=0.2)
    np.testing.assert_allclose(updates["up"][:, 0], -0.2 * np.clip(start["up"][:, 0], -0.5, 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "emma"}, "evolution.mode='emma' is unknown; valid: ema, lag, literal"),
        ({"beta_low": (0.9,)}, "beta_low=.*must be as many"),
        ({"beta_low": (0.9, 0.95, 0.7)}, "0 <= low <= high <= 1"),
        ({"fixed_beta": 1.5}, r"fixed_beta=1.5 must be in \[0, 1\]"),
        ({"snapshots": (0.0, 0.5, 1.0)}, r"snapshots=.*in \(0, 1\]"),
        ({"snapshots": (0.5,)}, "1 snapshots for 3 evolved experts"),
        ({"beta_low": (0.1, 0.2), "beta_high": (0.1, 0.2)}, "2 ranges of beta for 3 evolved experts"),
    ],
)
def test_inconsistent_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        evolution(EvolutionConfig(**fields))
