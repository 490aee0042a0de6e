import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.nn import MoE
from anyexperts_jax.routing.importance import importance
from anyexperts_jax.routing.route import route

CONFIG = AnyExpertsConfig(num_experts=6, num_virtual=2, k_min=2, k_max=5, rho_max=0.25, alpha=0.5)
B, T, D, F = 2, 5, 8, 12
X_BTD = jax.random.normal(jax.random.key(0), (B, T, D))


def layer(moe=None, **fields):
    return MoE(dataclasses.replace(CONFIG, **(moe or {})), F, **{"dispatch": "dense", **fields})


def random_params(moe, seed=0):
    """Params without zeros, in the shapes the layer asks for."""
    shapes = jax.eval_shape(lambda: moe.init(jax.random.key(0), X_BTD))["params"]
    shapes = jax.tree.map(lambda b: b.value, shapes, is_leaf=lambda n: hasattr(n, "names"))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, p.dtype), shapes)


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def by_hand(config, params, x_BTD, plan):
    """The plan carried out slot by slot on x_BTD (already modulated)."""
    x, y = np.asarray(x_BTD).reshape(-1, D), np.zeros((B * T, D))
    experts = params["experts"]
    for n in range(B * T):
        for expert, weight in zip(plan.expert_ids_NK[n], plan.weights_NK[n], strict=True):
            if expert < config.num_experts:
                y[n] += weight * swiglu(x[n], *(experts[w][expert] for w in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")))
        y[n] += plan.virtual_weight_N[n] * x[n]
    return y.reshape(B, T, D)


def test_is_the_equations_of_the_paper():
    moe = layer(num_shared_experts=2)
    params = random_params(moe)
    y_BTD, trace = moe.apply({"params": params}, X_BTD)
    # Importance of the unmodulated input; router, experts, virtual and shared experts see h' = h (1 + alpha w).
    p = params["importance"]
    normed = X_BTD / jnp.sqrt(jnp.mean(X_BTD**2, -1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    hidden = jax.nn.silu(normed @ p["hidden_0"]["kernel"] + p["hidden_0"]["bias"])
    z_BT = hidden @ p["out"]["kernel"] + p["out"]["bias"]
    modulated_BTD = X_BTD * (1 + 0.5 * importance(z_BT))[..., None]
    bias_C = jnp.concatenate([jnp.zeros(6), params["router"]["virtual_bias"]])
    plan = route(CONFIG, modulated_BTD.reshape(-1, D) @ params["router"]["kernel"] + bias_C, z_BT.reshape(-1))
    np.testing.assert_array_equal(trace.expert_ids_BTK.reshape(B * T, -1), plan.expert_ids_NK)
    assert int(plan.virtual_slots_N.sum()) > 0
    shared = params["shared"]
    expected = by_hand(CONFIG, params, modulated_BTD, plan)
    expected += swiglu(modulated_BTD, *(shared[w]["kernel"] for w in ("gate", "up", "down")))
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)
    assert shared["gate"]["kernel"].shape == (D, 2 * F)


def test_runs_alone_from_init():
    variables = layer().init(jax.random.key(0), X_BTD)
    y_BTD, trace = layer().apply(variables, X_BTD)
    assert y_BTD.shape == X_BTD.shape
    np.testing.assert_array_equal(trace.importance_BT, 0.5)  # the importance network starts at zero
    np.testing.assert_array_equal(variables["params"]["router"]["virtual_bias"].value, 1.0)


def test_runs_through_nnx():
    moe = layer()
    wrapped = bridge.lazy_init(bridge.ToNNX(moe, rngs=nnx.Rngs(0)), X_BTD)
    y_BTD, trace = wrapped(X_BTD)
    params = nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))
    expected_BTD, _ = moe.apply({"params": params}, X_BTD)
    np.testing.assert_allclose(y_BTD, expected_BTD, atol=1e-6)
    assert trace.slots_BT.shape == (B, T)


def test_modulation_off_is_alpha_zero_and_residual_leaves_it_to_the_caller():
    params = random_params(layer())
    zero, off, residual, on = (
        layer(fields).apply({"params": params}, X_BTD)[0]
        for fields in ({"alpha": 0.0}, {"hsm_site": "off"}, {"hsm_site": "residual"}, {})
    )
    np.testing.assert_array_equal(off, zero)
    np.testing.assert_array_equal(residual, zero)
    assert not np.allclose(on, zero, atol=1e-2)


@pytest.mark.parametrize("hsm_site", ["block_input", "off"])
def test_the_callers_importance_is_used(hsm_site):
    moe = layer({"hsm_site": hsm_site})
    params = random_params(moe)
    z_BT = jnp.full((B, T), 20.0)  # w = 1: every token gets k_max slots
    _, trace = moe.apply({"params": params}, X_BTD, importance_logits_BT=z_BT)
    np.testing.assert_array_equal(trace.slots_BT, 5)


def test_no_importance_network_where_it_has_no_effect():
    static = MoE(AnyExpertsConfig.static_top_k(6, 3), F, dispatch="dense")
    params = random_params(static)
    assert set(params) == {"router", "experts"}
    assert set(params["router"]) == {"kernel"}
    _, trace = static.apply({"params": params}, X_BTD)
    np.testing.assert_array_equal(trace.real_slots_BT, 3)


def test_tied_virtual_columns_share_one_logit():
    moe = layer({"virtual_logits": "tied"})
    params = random_params(moe)
    assert params["router"]["kernel"].shape == (D, 7)
    assert params["router"]["virtual_bias"].shape == (1,)
    free = random_params(layer())
    real_DE, virtual_D1 = jnp.split(params["router"]["kernel"], [6], axis=1)
    free["router"] = {
        "kernel": jnp.concatenate([real_DE, virtual_D1, virtual_D1], axis=1),
        "virtual_bias": jnp.repeat(params["router"]["virtual_bias"], 2),
    }
    shared = {**params, "router": free["router"]}
    np.testing.assert_allclose(
        moe.apply({"params": params}, X_BTD)[0], layer().apply({"params": shared}, X_BTD)[0], atol=1e-6
    )


def test_padding_gets_nothing_from_the_experts():
    moe = layer()
    valid_BT = jnp.ones((B, T), bool).at[0, 3:].set(False)
    y_BTD, trace = moe.apply({"params": random_params(moe)}, X_BTD, valid_BT)
    np.testing.assert_array_equal(y_BTD[0, 3:], 0.0)
    np.testing.assert_array_equal(trace.slots_BT[0, 3:], 0)
    assert float(jnp.abs(y_BTD[0, :3]).min()) > 0


def test_window_overrides():
    moe = layer()
    apply = jax.jit(functools.partial(moe.apply, {"params": random_params(moe)}))
    _, trace = apply(X_BTD, window=jnp.array([3.0, 3.0]))
    np.testing.assert_array_equal(trace.slots_BT, 3)


def test_stochastic_rounding_needs_an_rng_only_in_training():
    moe = layer({"slot_rounding": "stochastic"})
    params = random_params(moe)
    rounded = layer().apply({"params": params}, X_BTD)[1].slots_BT
    np.testing.assert_array_equal(moe.apply({"params": params}, X_BTD)[1].slots_BT, rounded)
    draws = [moe.apply({"params": params}, X_BTD, rngs={"routing": jax.random.key(i)})[1].slots_BT for i in range(4)]
    assert len({draw.tobytes() for draw in map(np.asarray, draws)}) > 1
    assert all(np.abs(np.asarray(draw) - np.asarray(rounded)).max() <= 1 for draw in draws)


def test_expert_bias_is_required_where_it_is_on_and_refused_where_it_is_off():
    biased = layer({"expert_bias": True})
    params = random_params(biased)
    with pytest.raises(UserError, match="needs bias_C"):
        biased.apply({"params": params}, X_BTD)
    with pytest.raises(UserError, match="expert_bias=False"):
        layer().apply({"params": params}, X_BTD, bias_C=jnp.zeros(8))
    _, trace = biased.apply({"params": params}, X_BTD, bias_C=jnp.zeros(8).at[2].set(50.0))
    assert bool((trace.expert_ids_BTK == 2).any(-1).all())


def test_unknown_dispatch_is_refused():
    with pytest.raises(UserError, match="dispatch='bloks' is unknown; valid: "):
        layer(dispatch="bloks").init(jax.random.key(0), X_BTD)


@pytest.mark.parametrize("dispatch", ["blocks", "capacity"])
def test_dispatch_forms_agree_with_gradients(dispatch):
    params = random_params(layer())

    def loss(params, x_BTD, form):
        y_BTD, trace = layer({"capacity_factor": 4.0}, dispatch=form).apply({"params": params}, x_BTD)
        return (y_BTD**2).sum() + trace.losses["balance"] + trace.losses["importance"]

    expected, actual = (jax.value_and_grad(loss, (0, 1))(params, X_BTD, form) for form in ("dense", dispatch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_bfloat16_keeps_routing_in_float32():
    params = random_params(layer())
    y_BTD, trace = layer(dtype="bfloat16").apply({"params": params}, X_BTD.astype(jnp.bfloat16))
    assert y_BTD.dtype == jnp.bfloat16
    assert trace.importance_BT.dtype == jnp.float32
    exact, _ = layer().apply({"params": params}, X_BTD.astype(jnp.bfloat16).astype(jnp.float32))
    assert float(jnp.median(jnp.abs(y_BTD.astype(jnp.float32) - exact))) < 0.05


def test_the_answer_alone_moves_importance_router_and_virtual_bias():
    params = random_params(layer())
    grads = jax.grad(lambda p: (layer().apply({"params": p}, X_BTD)[0] ** 2).sum())(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)
