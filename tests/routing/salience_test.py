import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.stats import rankdata

from anyexperts_jax.aot.collectives import read_collectives
from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.routing.route import route
from anyexperts_jax.routing.salience import midranks, rank_by_salience, token_groups
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh

WEIGHTS = jnp.array([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], jnp.float32)
SLOPES = jnp.array([[2.0, 2.0], [3.0, 9.0], [4.0, 0.0]], jnp.float32)  # derivative of the loss by each weight
IMPORTANCE = jnp.array([0.5, 0.25, 0.75], jnp.float32)
ALL = jnp.ones(3, bool)


def _importance_gradient(weights, importance, valid, slopes=SLOPES, scale=1.0):
    def loss(importance):
        weighted, importance_loss = rank_by_salience(weights, importance, valid)
        return (slopes * weighted).sum() + scale * importance_loss

    return np.asarray(jax.grad(loss)(importance))


def test_weights_pass_forward_and_backward():
    def loss(weights):
        weighted, importance_loss = rank_by_salience(weights, IMPORTANCE, ALL)
        return (SLOPES * weighted).sum() + importance_loss, weighted

    grad, weighted = jax.grad(loss, has_aux=True)(WEIGHTS)
    np.testing.assert_array_equal(weighted, WEIGHTS)
    np.testing.assert_array_equal(grad, SLOPES)


def test_the_gradient_by_hand():
    # Saliences: 1 + 1 = 2, 9 + 0 = 9, 1 + 0 = 1: ranks 3/6, 5/6, 1/6. Gradient 2 (w - q) / 3.
    expected = 2 * (np.array([1 / 2, 1 / 4, 3 / 4]) - np.array([3, 5, 1]) / 6) / 3
    np.testing.assert_allclose(_importance_gradient(WEIGHTS, IMPORTANCE, ALL), expected, atol=1e-7)


def test_the_loss_weight_scales_the_gradient_and_the_ranks_ignore_the_scale_of_the_loss():
    plain = _importance_gradient(WEIGHTS, IMPORTANCE, ALL)
    np.testing.assert_allclose(_importance_gradient(WEIGHTS, IMPORTANCE, ALL, scale=0.1), 0.1 * plain, rtol=1e-6)
    np.testing.assert_allclose(_importance_gradient(WEIGHTS, IMPORTANCE, ALL, 1e-4 * SLOPES), plain, rtol=1e-6)


def test_padding_has_no_rank_and_no_gradient():
    # Without token 1: saliences 2 and 1, ranks 3/4 and 1/4.
    grad = _importance_gradient(WEIGHTS, IMPORTANCE, jnp.array([True, False, True]))
    np.testing.assert_allclose(grad, [2 * (1 / 2 - 3 / 4) / 2, 0, 2 * (3 / 4 - 1 / 4) / 2], atol=1e-7)
    assert not _importance_gradient(WEIGHTS, IMPORTANCE, jnp.zeros(3, bool)).any()


def test_tokens_that_do_not_affect_the_loss_tie():
    grad = _importance_gradient(WEIGHTS, IMPORTANCE, ALL, jnp.zeros((3, 2)))
    np.testing.assert_allclose(grad, 2 * (np.asarray(IMPORTANCE) - 0.5) / 3, atol=1e-7)


def test_the_forward_value_uses_one_half_for_every_rank():
    _, loss = rank_by_salience(WEIGHTS, IMPORTANCE, jnp.array([True, True, False]))
    assert float(loss) == pytest.approx(0.0625 / 2, abs=1e-7)  # (0 + 1/16) / 2


@pytest.mark.parametrize("seed", range(5))
def test_midranks_are_those_of_scipy_and_average_one_half(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 6, size=40).astype(np.float32)
    valid = rng.random(40) < 0.7
    ranks = np.asarray(midranks(jnp.asarray(values), jnp.asarray(valid)))[valid]
    np.testing.assert_allclose(ranks, (rankdata(values[valid]) - 0.5) / valid.sum(), atol=1e-6)
    assert ranks.mean() == pytest.approx(0.5, abs=1e-6)


def test_groups_are_ranked_separately():
    values, valid = jnp.arange(12.0).reshape(3, 4) % 5, jnp.arange(12).reshape(3, 4) % 4 > 0
    apart = np.stack([midranks(*own) for own in zip(values, valid, strict=True)])
    np.testing.assert_array_equal(midranks(values, valid), apart)


def test_a_tokens_gradient_depends_on_its_group():
    """The saliences are 2, 9, 1, 1: the first two tokens have ranks 1/4 and 3/4, the last two tie."""
    weights, slopes = (jnp.concatenate([own, own[2:]]) for own in (WEIGHTS, SLOPES))

    def loss(importance):
        weighted, importance_loss = rank_by_salience(weights, importance, jnp.ones(4, bool), 2)
        return (slopes * weighted).sum() + importance_loss

    grad = jax.grad(loss)(jnp.full(4, 0.5))
    np.testing.assert_allclose(grad, 2 * (0.5 - np.array([1 / 4, 3 / 4, 1 / 2, 1 / 2])) / 4, atol=1e-7)


@pytest.mark.parametrize(
    ("scope", "groups"), [("batch", 1), ("sequence", 12), ("device", 4)], ids=["batch", "sequence", "device"]
)
def test_each_scope_has_its_number_of_groups(scope, groups):
    assert token_groups(scope, 12, 4) == groups
    assert token_groups(scope, 1, 4) == 1, "a lone sequence is not split"


def test_scope_device_needs_the_number_of_shards():
    config = AnyExpertsConfig(
        num_experts=4, num_virtual=1, k_min=2, k_max=4, importance_regulariser="salience", salience_scope="device"
    )
    with pytest.raises(UserError, match=r'^salience_scope="device" needs batch_shards, .* pass 1 on one device$'):
        route(config, jnp.zeros((2, 5)), jnp.zeros(2))
    assert route(config, jnp.zeros((2, 5)), jnp.zeros(2), batch_shards=1).slots_N.shape == (2,)


def importance_gradient(scope, slopes, batch_shards=2):
    """Returns the gradient by z, [4 sequences, 8 positions], of a loss with a different slope for each token."""
    config = AnyExpertsConfig(
        num_experts=4, num_virtual=1, k_min=2, k_max=4, importance_regulariser="salience", salience_scope=scope
    )

    def loss(z):
        plan = route(config, jnp.zeros((32, 5)), z, num_sequences=4, batch_shards=batch_shards)
        return (plan.weights_NK.sum(1) * slopes).sum() + plan.losses["importance"]

    return np.asarray(jax.grad(loss)(jnp.zeros(32)))


@pytest.mark.parametrize(("scope", "felt"), [("batch", 32), ("device", 16), ("sequence", 8)])
def test_a_rank_depends_only_on_the_tokens_of_its_scope(scope, felt):
    slopes = np.random.default_rng(0).uniform(1, 2, 32).astype(np.float32)
    others = slopes.copy()
    others[-8:] *= 10  # of the last sequence
    changed = importance_gradient(scope, slopes)[:-8] != importance_gradient(scope, others)[:-8]
    assert changed[:-felt].sum() == 0
    assert changed.any() == (felt > 8)


@pytest.mark.parametrize(("scope", "gathered"), [("batch", 4 * 16 * 8), ("device", 0), ("sequence", 0)])
def test_on_a_mesh_only_scope_batch_gathers_saliences(scope, gathered):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    operands = [jax.ShapeDtypeStruct(size, jnp.float32, sharding=sharding) for size in ((16, 8), (16, 8, 2))]

    def loss(importance_BT, weights_BTK):
        groups = token_groups(scope, 16, 8)
        weighted, own = rank_by_salience(
            weights_BTK.reshape(-1, 2), importance_BT.reshape(-1), jnp.ones(16 * 8, bool), groups
        )
        return (weighted**2).sum() + own

    program = jax.jit(jax.grad(loss)).lower(*operands).compile().as_text()
    sent = {row.kind: row.bytes for row in read_collectives(program, dict(mesh.shape))}
    assert sent.get("all-gather", 0) == gathered
    assert sum(sent.values()) - gathered <= 8, "nothing else but sums of a number"


def test_importance_learns_which_tokens_affect_the_loss():
    """Half of the kinds of token affect the loss: their importance rises, that of the others falls, the mean stays."""
    config = AnyExpertsConfig(
        num_experts=8, num_virtual=2, k_min=2, k_max=6, iar="off", importance_regulariser="salience"
    )
    rng = np.random.default_rng(0)
    felt = jnp.arange(64) % 8 < 4

    def loss(z, logits, slopes):
        plan = route(config, logits, z[jnp.arange(64) % 8])
        return jnp.where(felt[:, None], slopes * plan.weights_NK, 0).sum() + plan.losses["importance"]

    step = jax.jit(jax.grad(loss))
    z = jnp.zeros(8)
    for _ in range(200):
        z = z - 2.0 * step(z, jnp.asarray(rng.normal(size=(64, 10))), jnp.asarray(rng.normal(size=(64, 6))))
    w = np.asarray(jax.nn.sigmoid(z))
    # Tokens that do not affect the loss tie at 1/4; the others lie evenly above 1/2, 3/4 on average.
    np.testing.assert_allclose(w[4:], 0.25, atol=0.01)
    np.testing.assert_allclose(w[:4], 0.75, atol=0.06)
    assert w.mean() == pytest.approx(0.5, abs=0.01)


def test_the_plan_has_the_weights_whose_gradient_is_ranked():
    """Through `route`, with and without remat: the token with the steeper loss gets the higher rank."""
    config = AnyExpertsConfig(
        num_experts=4, num_virtual=1, k_min=2, k_max=4, iar="off", importance_regulariser="salience"
    )
    logits = jnp.zeros((2, 5))

    def loss(z):
        plan = route(config, logits, z)
        return (plan.weights_NK[:, 0] * jnp.array([5.0, 1.0])).sum() + plan.losses["importance"]

    expected = [2 * (0.5 - 0.75) / 2 / 4, 2 * (0.5 - 0.25) / 2 / 4]  # dw/dz = 1/4
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.zeros(2)), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(loss)))(jnp.zeros(2)), expected, atol=1e-6)
