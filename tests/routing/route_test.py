"""`route` as a whole: one case computed by hand, the traps of field.md, transformations, invalid input."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typecheck import unchecked

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.routing.reference import route_reference
from anyexperts_jax.routing.route import route
from routing.compiled import FAST_COMPILE, gradients, routed

CONFIG = AnyExpertsConfig(num_experts=8, num_virtual=4, k_min=3, k_max=6, rho_max=0.25)
N, C = 12, 12
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(N, C)), jnp.float32)
Z = jnp.asarray(RNG.normal(size=N), jnp.float32)


def _no_slots(plan):
    return plan.expert_ids_NK == plan.spec.num_experts


def test_a_bias_per_token_affects_that_tokens_choice():
    config = dataclasses.replace(CONFIG, expert_bias=True)
    bias_NC = jnp.asarray(np.random.default_rng(1).normal(size=(N, C)), jnp.float32)
    plan = routed(config, LOGITS, Z, bias_C=bias_NC)
    for n in range(3):
        alone = routed(config, LOGITS[n : n + 1], Z[n : n + 1], bias_C=bias_NC[n])
        np.testing.assert_array_equal(plan.expert_ids_NK[n], alone.expert_ids_NK[0])
    assert not np.array_equal(plan.expert_ids_NK, routed(config, LOGITS, Z, bias_C=bias_NC[0]).expert_ids_NK)


def test_a_token_by_hand():
    # w = 1/2: K = 2 + 0.5 * 2 = 3, cap round(0.34 * 3 = 1.02) = 1. After IAR: real 2.5, 1.5, 0.5, virtual 1.0, 0.8.
    # Rank: r0, r1, v0: one virtual slot. exp: 12.182494, 4.481689, 2.718282, sum 19.382465.
    config = AnyExpertsConfig(num_experts=3, num_virtual=2, k_min=2, k_max=4, rho_max=0.34)
    plan = routed(config, jnp.array([[2.0, 1.0, 0.0, 1.5, 1.3]]), jnp.zeros(1))
    assert (plan.slots_N.tolist(), plan.real_slots_N.tolist(), plan.virtual_slots_N.tolist()) == ([3], [2], [1])
    assert plan.expert_ids_NK.tolist() == [[0, 1, 3, 3]]
    np.testing.assert_allclose(plan.weights_NK, [[0.628532, 0.231224, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(plan.virtual_weight_N, [0.140244], atol=1e-6)
    assert plan.importance_N.tolist() == [0.5]
    assert (plan.spec.num_experts, plan.spec.expected_real_slots) == (3, pytest.approx(0.66 * 3))


def test_static_top_k_has_the_same_interface():
    config = AnyExpertsConfig.static_top_k(8, 3)
    plan = routed(config, LOGITS[:, :8], jnp.zeros(N))
    probabilities = jax.nn.softmax(LOGITS[:, :8])
    top, ids = jax.lax.top_k(probabilities, 3)
    np.testing.assert_array_equal(plan.expert_ids_NK, ids)
    np.testing.assert_allclose(plan.weights_NK, top / top.sum(axis=1, keepdims=True), rtol=1e-5)
    assert not plan.virtual_weight_N.any()


class TestTraps:
    """Faults found in other projects (field.md, papers/neighbours.md)."""

    def test_a_slot_without_an_expert_is_never_id_zero_and_weighs_nothing(self):
        plan = routed(CONFIG, LOGITS, Z, jnp.arange(N) != 3)
        null = _no_slots(plan)
        assert null.any()
        np.testing.assert_array_equal(null, jnp.arange(6)[None] >= plan.real_slots_N[:, None])
        assert not plan.weights_NK[null].any()
        assert ((plan.expert_ids_NK >= 0) & (plan.expert_ids_NK <= 8)).all()

    def test_no_expert_twice_in_a_token(self):
        for row in np.asarray(routed(CONFIG, LOGITS, Z).expert_ids_NK):
            real = row[row < 8]
            assert len(set(real.tolist())) == len(real)

    def test_weights_sum_to_one_with_the_virtual_ones(self):
        plan = routed(CONFIG, LOGITS.at[:, 8:].add(3.0), Z)
        assert plan.virtual_slots_N.any()
        np.testing.assert_allclose(plan.weights_NK.sum(axis=1) + plan.virtual_weight_N, jnp.ones(N), rtol=1e-6)
        np.testing.assert_array_equal(plan.virtual_weight_N > 0, plan.virtual_slots_N > 0)

    def test_padding_holds_no_slot(self):
        valid = jnp.arange(N) % 3 > 0
        plan = routed(CONFIG, LOGITS.at[0].set(jnp.nan), Z.at[3].set(jnp.inf), valid)
        for name in ("slots_N", "real_slots_N", "virtual_slots_N", "virtual_weight_N", "weights_NK"):
            assert not getattr(plan, name)[~valid].any(), name
        assert _no_slots(plan)[~valid].all()
        assert np.isfinite(plan.importance_N).all()

    def test_routing_is_causal(self):
        """Later tokens, even garbage, change nothing for earlier ones; neither does padding."""
        before = routed(CONFIG, LOGITS, Z)
        after = routed(CONFIG, LOGITS.at[7:].multiply(-3.0), Z.at[7:].add(5.0), jnp.arange(N) != 11)
        for name in ("expert_ids_NK", "weights_NK", "virtual_weight_N", "slots_N", "importance_N"):
            np.testing.assert_array_equal(getattr(before, name)[:7], getattr(after, name)[:7])
            assert (np.asarray(getattr(before, name)[7:]) != np.asarray(getattr(after, name)[7:])).any()

    def test_the_balance_loss_keeps_its_gradient_under_scan_and_remat(self):
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("routing"))
        def layer(total, logits):
            return total + route(CONFIG, logits, Z).losses["balance"], None

        layers = jnp.stack([LOGITS, 2 * LOGITS])
        (scanned,) = gradients(lambda x: jax.lax.scan(layer, 0.0, x)[0], layers)
        (plain,) = gradients(lambda x: sum(route(CONFIG, x[i], Z).losses["balance"] for i in range(2)), layers)
        assert np.abs(scanned).max() > 0
        np.testing.assert_allclose(scanned, plain, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(
        ("policy", "count"),
        [
            (jax.checkpoint_policies.save_only_these_names("routing"), 2),  # one for real columns, one for virtual ones
            (jax.checkpoint_policies.nothing_saveable, 4),
        ],
    )
    def test_rematerialisation_that_saves_routing_does_not_select_again(self, policy, count):
        config = dataclasses.replace(CONFIG, slot_gradient="straight_through", expert_bias=True)

        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x, z):
            plan = route(config, jnp.sin(x), z, bias_C=jnp.zeros(C))
            return (plan.weights_NK**2).sum() + plan.virtual_weight_N.sum() + sum(plan.losses.values())

        text = str(jax.make_jaxpr(jax.grad(layer, argnums=(0, 1)))(LOGITS, Z))
        assert text.count("top_k[") == count


class TestGradients:
    """Against central differences of the float64 oracle: error about 1e-9 there, float32 rounding here."""

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"normalisation": "real", "scaling_factor": 2.5},
            {"scores": "sigmoid", "iar": "multiply_sigmoid", "num_groups": 2, "groups_kept": 1, "k_max": 4},
            {"iar": "multiply_softmax", "balance_scope": "sequence", "importance_regulariser": "mean_target"},
            {"iar": "multiply_logits", "selection": "scores", "virtual_logits": "tied"},
        ],
        ids=str,
    )
    def test_of_weights_and_losses(self, fields):
        config = dataclasses.replace(CONFIG, importance_target=0.3, **fields)
        rng = np.random.default_rng(1)
        # Like the layer, which learns a single tied column and broadcasts it.
        columns = np.minimum(np.arange(C), 8) if config.switches.virtual_logits == "tied" else np.arange(C)
        logits, z = rng.normal(size=(4, columns.max() + 1)), rng.normal(size=4)
        valid = np.array([True, True, True, False])
        r_NK, r_N = rng.normal(size=(4, config.slots_bound)), rng.normal(size=4)
        r_L = {"balance": 0.7, "importance": -1.3, "z": 0.4}

        def total(weights_NK, virtual_N, losses):
            return (weights_NK * r_NK).sum() + (virtual_N * r_N).sum() + sum(r * losses[k] for k, r in r_L.items())

        def fast(logits, z):
            plan = route(config, logits[:, columns], z, valid, num_sequences=2)
            return total(plan.weights_NK, plan.virtual_weight_N, plan.losses)

        def slow(logits, z):
            plan = route_reference(config, logits[:, columns], z, valid, num_sequences=2)
            return total(plan["weights_NK"], plan["virtual_weight_N"], plan["losses"])

        def difference(x, i, f, h=1e-5):
            up, down = x.copy(), x.copy()
            up[i] += h
            down[i] -= h
            return (f(up) - f(down)) / (2 * h)

        expected_logits = np.zeros_like(logits)
        for i in np.ndindex(logits.shape):
            expected_logits[i] = difference(logits, i, lambda x: slow(x, z))
        expected_z = np.array([difference(z, i, lambda x: slow(logits, x)) for i in range(4)])
        grads = gradients(fast, logits.astype(np.float32), z.astype(np.float32))
        np.testing.assert_allclose(grads[0], expected_logits, rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(grads[1], expected_z, rtol=1e-4, atol=2e-6)
        assert np.abs(expected_z[:3]).min() > 1e-3

    @pytest.mark.parametrize(
        ("fields", "reaches"),
        [
            ({"iar": "add"}, True),
            ({"iar": "off"}, False),
            ({"iar": "off", "slot_gradient": "straight_through"}, True),
        ],
        ids=str,
    )
    def test_the_task_reaches_importance_through_iar_and_the_slot_gradient_only(self, fields, reaches):
        config = dataclasses.replace(CONFIG, **fields)
        logits = LOGITS.at[:, 8:].add(3.0)  # every token holds virtual slots
        (grad,) = gradients(lambda z: (route(config, logits, z).weights_NK ** 2).sum(), Z)
        assert bool(np.abs(grad).max() > 0) == reaches

    def test_the_regulariser_reaches_importance(self):
        (grad,) = gradients(lambda z: route(CONFIG, LOGITS, z).losses["importance"], Z)
        np.testing.assert_allclose(grad, 2 * Z / N, rtol=1e-6)


class TestTransformations:
    def test_one_compiled_program_serves_every_window(self):
        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        @chex.assert_max_traces(n=1)
        def plan_of(window):
            return route(CONFIG, LOGITS, Z, window=window)

        for k_min, k_max in ((1.0, 3.0), (2.25, 4.25), (3.0, 6.0)):
            own = dataclasses.replace(CONFIG, k_min=k_min, k_max=k_max)
            expected, actual = routed(own, LOGITS, Z), plan_of(jnp.array([k_min, k_max]))
            K = own.slots_bound
            np.testing.assert_array_equal(actual.slots_N, expected.slots_N)
            np.testing.assert_array_equal(actual.expert_ids_NK[:, :K], expected.expert_ids_NK)
            assert (actual.expert_ids_NK[:, K:] == 8).all()
            np.testing.assert_allclose(actual.weights_NK[:, :K], expected.weights_NK, rtol=1e-5)

    def test_jit_gives_the_same_bits_again(self):
        plan_of = jax.jit(functools.partial(route, CONFIG))
        chex.assert_trees_all_equal(plan_of(LOGITS, Z), plan_of(LOGITS, Z))

    def test_bfloat16_inputs_are_routed_in_float32(self):
        plan = routed(CONFIG, LOGITS.astype(jnp.bfloat16), Z.astype(jnp.bfloat16))
        rounded = routed(
            CONFIG, LOGITS.astype(jnp.bfloat16).astype(jnp.float32), Z.astype(jnp.bfloat16).astype(jnp.float32)
        )
        chex.assert_trees_all_equal(plan, rounded)
        assert plan.weights_NK.dtype == plan.importance_N.dtype == jnp.float32

    def test_stochastic_rounding_depends_on_the_key_alone(self):
        config = dataclasses.replace(CONFIG, slot_rounding="stochastic")
        slots = [routed(config, LOGITS, Z, key=jax.random.key(seed)).slots_N.tolist() for seed in (0, 0, 1)]
        assert slots[0] == slots[1] != slots[2]

    def test_no_tokens(self):
        plan = routed(CONFIG, LOGITS[:0], Z[:0])
        assert plan.expert_ids_NK.shape == (0, 6)
        assert all(float(loss) == 0 for loss in plan.losses.values())


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        (11, {}, r"logits_NC has shape \(12, 11\); need \[tokens, 12\], num_experts \+ num_virtual columns"),
        (12, {"valid_N": jnp.ones(N, jnp.int32)}, r"valid_N has shape \(12,\) and dtype int32; need bool \(12,\)"),
        (12, {"bias_C": jnp.zeros(C)}, "bias_C is given but expert_bias=False"),
        (12, {"num_sequences": 5}, "num_sequences=5 must divide the number of tokens, 12"),
        (12, {"num_sequences": 0}, "num_sequences=0 must divide"),
    ],
)
def test_bad_input_is_refused_by_name(columns, arguments, message):
    with pytest.raises(UserError, match=message):
        unchecked(route)(CONFIG, LOGITS[:, :columns], Z, **arguments)


def test_mismatched_arrays_are_refused_by_name():
    with_bias = dataclasses.replace(CONFIG, expert_bias=True)
    check = unchecked(route)
    with pytest.raises(UserError, match=r"importance_logits_N has shape \(11,\); need \(12,\)"):
        check(CONFIG, LOGITS, Z[:11])
    with pytest.raises(UserError, match="expert_bias=True needs bias_C"):
        check(with_bias, LOGITS, Z)
    with pytest.raises(UserError, match=r"bias_C has shape \(3,\); need \(12,\)"):
        check(with_bias, LOGITS, Z, bias_C=jnp.zeros(3))
    with pytest.raises(UserError, match=r"window has shape \(3,\); need \(2,\), k_min and k_max"):
        check(CONFIG, LOGITS, Z, window=[1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="needs a random key"):
        check(dataclasses.replace(CONFIG, slot_rounding="stochastic"), LOGITS, Z)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((4, 3), r"window=\(4, 3\) is reversed; need k_min <= k_max"),
        ((0.5, 3), r"window=\(0.5, 3\) must begin at 1 slot or more"),
        ((float("nan"), 3), r"window=\(nan, 3\) must be finite"),
        ((14, 18), r"window=\(14, 18\) asks for 18 slots, but k_max="),
    ],
)
def test_an_invalid_window_is_refused(window, message):
    with pytest.raises(UserError, match=message):
        unchecked(route)(CONFIG, LOGITS, Z, window=window)


def test_windows_and_arrays_in_any_form_give_the_same_plan():
    """Non-contiguous float64 NumPy arrays, lists and tuples."""
    expected = route(CONFIG, LOGITS, Z, window=jnp.array([2.0, 3.0]))
    twice = np.repeat(np.asarray(LOGITS, np.float64), 2, axis=0)[::2]
    assert not twice.flags["C_CONTIGUOUS"]
    for logits, z, window in ((twice, np.asarray(Z, np.float64), (2, 3)), (LOGITS.tolist(), Z.tolist(), [2, 3])):
        plan = unchecked(route)(CONFIG, logits, z, window=window)
        np.testing.assert_array_equal(plan.expert_ids_NK, expected.expert_ids_NK)
        np.testing.assert_allclose(plan.weights_NK, expected.weights_NK, rtol=1e-6)
    assert plan.spec.expected_real_slots == (1 - CONFIG.rho_max) * 2.5, "buffers follow the window in force"


@pytest.mark.parametrize("key", [0, np.uint32([0, 1]), jnp.zeros(3), "seed"])
def test_anything_but_a_random_key_is_refused(key):
    config = dataclasses.replace(CONFIG, slot_rounding="stochastic")
    with pytest.raises(UserError, match=r"^key=.* is no random key; pass jax\.random\.key\(0\)"):
        unchecked(route)(config, LOGITS, Z, key=key)
