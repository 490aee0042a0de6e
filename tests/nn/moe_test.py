import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from flax.nnx import bridge

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.nn.moe import MoE, MoEContext
from anyexperts_jax.routing.route import route
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.placement import Placement
from nn import layers
from nn.layers import run

CONFIG = AnyExpertsConfig(num_experts=6, num_virtual=2, k_min=2, k_max=5, rho_max=0.25, alpha=0.5)
B, T, D, F = 2, 5, 8, 12
X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


def layer(moe=None, **fields):
    return MoE(dataclasses.replace(CONFIG, **(moe or {})), F, **{"execution": Execution("dense"), **fields})


def random_params(moe):
    return layers.random_params(moe, X_BTD)


def apply(moe, params, *args, **kwargs):
    return run(moe)(params, *args, **kwargs)


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def by_hand(config, experts, x_ND, plan):
    """The plan carried out slot by slot on x_ND (already modulated)."""
    y_ND = np.asarray(plan.virtual_weight_N)[:, None] * x_ND
    for n in range(len(x_ND)):
        for expert, weight in zip(np.asarray(plan.expert_ids_NK[n]), np.asarray(plan.weights_NK[n]), strict=True):
            if expert < config.num_experts:
                weights = (experts[w][expert] for w in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"))
                y_ND[n] += weight * swiglu(x_ND[n], *weights)
    return y_ND


def test_is_the_equations_of_the_paper():
    moe = layer(num_shared_experts=2)
    params = random_params(moe)
    y_BTD, trace = apply(moe, params, X_BTD)
    # Importance of the unmodulated input; router, experts, virtual and shared experts see h' = h (1 + alpha w).
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x_ND = np.asarray(X_BTD, np.float64).reshape(-1, D)
    hidden = x_ND / np.sqrt((x_ND**2).mean(-1, keepdims=True) + 1e-6) * p["importance"]["norm"]["scale"]
    hidden = hidden @ p["importance"]["hidden_0"]["kernel"] + p["importance"]["hidden_0"]["bias"]
    out = p["importance"]["out"]
    z_N = (hidden / (1 + np.exp(-hidden))) @ out["kernel"] + out["bias"]
    x_ND *= 1 + 0.5 / (1 + np.exp(-z_N))[:, None]
    logits_NC = x_ND @ p["router"]["kernel"] + np.concatenate([np.zeros(6), p["router"]["virtual_bias"]])
    plan = jax.jit(functools.partial(route, CONFIG), compiler_options=layers.FAST_COMPILE)(
        jnp.float32(logits_NC), jnp.float32(z_N)
    )
    np.testing.assert_array_equal(trace.expert_ids_BTK.reshape(B * T, -1), plan.expert_ids_NK)
    assert int(plan.virtual_slots_N.sum()) > 0
    expected_ND = by_hand(CONFIG, p["experts"], x_ND, plan)
    expected_ND += swiglu(x_ND, *(p["shared"][w]["kernel"] for w in ("gate", "up", "down")))
    np.testing.assert_allclose(y_BTD.reshape(-1, D), expected_ND, atol=1e-5)
    assert params["shared"]["gate"]["kernel"].shape == (D, 2 * F)


def test_runs_alone_from_init():
    moe = layer()
    params = layers.initial_params(moe, X_BTD)
    y_BTD, trace = apply(moe, params, X_BTD)
    assert y_BTD.shape == X_BTD.shape
    np.testing.assert_array_equal(trace.importance_BT, 0.5)  # the importance network starts at zero
    np.testing.assert_array_equal(params["router"]["virtual_bias"], 1.0)


def test_runs_through_nnx():
    moe = layer()
    wrapped = nnx.jit(lambda: bridge.lazy_init(bridge.ToNNX(moe, rngs=nnx.Rngs(0)), X_BTD))()
    y_BTD, trace = nnx.jit(lambda model, x: model(x))(wrapped, X_BTD)
    params = nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))
    np.testing.assert_allclose(y_BTD, apply(moe, params, X_BTD)[0], atol=1e-6)
    assert trace.slots_BT.shape == (B, T)


def test_modulation_off_is_alpha_zero_and_residual_leaves_it_to_the_caller():
    params = random_params(layer())
    zero, off, residual, on = (
        apply(layer(fields), params, X_BTD)[0]
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
    _, trace = apply(moe, params, X_BTD, importance_logits_BT=z_BT)
    np.testing.assert_array_equal(trace.slots_BT, 5)


def test_no_importance_network_where_it_has_no_effect():
    static = MoE(AnyExpertsConfig.static_top_k(6, 3), F, execution=Execution("dense"))
    params = random_params(static)
    assert set(params) == {"router", "experts"}
    assert set(params["router"]) == {"kernel"}
    _, trace = apply(static, params, X_BTD)
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
    np.testing.assert_allclose(apply(moe, params, X_BTD)[0], apply(layer(), shared, X_BTD)[0], atol=1e-6)


def test_padding_gets_nothing_from_the_experts():
    moe = layer()
    valid_BT = jnp.ones((B, T), bool).at[0, 3:].set(False)
    y_BTD, trace = apply(moe, random_params(moe), X_BTD, MoEContext(valid_BT))
    np.testing.assert_array_equal(y_BTD[0, 3:], 0.0)
    np.testing.assert_array_equal(trace.slots_BT[0, 3:], 0)
    assert float(np.abs(y_BTD[0, :3]).min()) > 0


def test_window_overrides():
    moe = layer()
    _, trace = apply(moe, random_params(moe), X_BTD, window=jnp.array([3.0, 3.0]))
    np.testing.assert_array_equal(trace.slots_BT, 3)


def test_stochastic_rounding_needs_an_rng_only_in_training():
    moe = layer({"slot_rounding": "stochastic"})
    params = random_params(moe)
    rounded = apply(layer(), params, X_BTD)[1].slots_BT
    np.testing.assert_array_equal(apply(moe, params, X_BTD)[1].slots_BT, rounded)
    draws = [apply(moe, params, X_BTD, rngs={"routing": jax.random.key(i)})[1].slots_BT for i in range(4)]
    assert len({draw.tobytes() for draw in map(np.asarray, draws)}) > 1
    assert all(np.abs(np.asarray(draw) - np.asarray(rounded)).max() <= 1 for draw in draws)


def test_expert_bias_is_required_where_it_is_on_and_refused_where_it_is_off():
    biased = layer({"expert_bias": True})
    params = random_params(biased)
    with pytest.raises(UserError, match="needs bias_C"):
        apply(biased, params, X_BTD)
    with pytest.raises(UserError, match="expert_bias=False"):
        apply(layer(), params, X_BTD, bias_C=jnp.zeros(8))
    _, trace = apply(biased, params, X_BTD, bias_C=jnp.zeros(8).at[2].set(50.0))
    assert bool((trace.expert_ids_BTK == 2).any(-1).all())


def test_unknown_dispatch_is_refused():
    with pytest.raises(UserError, match="dispatch='bloks' is unknown; valid: "):
        layer(execution=Execution("bloks"))
    with pytest.raises(UserError, match="dispatch='exchange' needs a mesh: pass placement="):
        layers.shapes(layer(execution=Execution("exchange")), X_BTD)


@functools.cache
def loss_and_grad(dispatch):
    moe = layer(execution=Execution(dispatch, capacity_factor=4.0))

    def loss(params, x_BTD):
        y_BTD, trace = moe.apply({"params": params}, x_BTD)
        return (y_BTD**2).sum() + trace.losses["balance"] + trace.losses["importance"]

    return jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=layers.FAST_COMPILE)


@pytest.mark.parametrize("dispatch", ["blocks", "capacity"])
def test_dispatch_forms_agree_with_gradients(dispatch):
    params = random_params(layer())
    expected, actual = (loss_and_grad(form)(params, X_BTD) for form in ("dense", dispatch))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_routing_in_float32():
    params = random_params(layer())
    y_BTD, trace = apply(layer(dtype="bfloat16"), params, X_BTD.astype(jnp.bfloat16))
    assert y_BTD.dtype == jnp.bfloat16
    assert trace.importance_BT.dtype == jnp.float32
    exact, _ = apply(layer(), params, X_BTD.astype(jnp.bfloat16).astype(jnp.float32))
    assert float(np.median(np.abs(y_BTD.astype(jnp.float32) - exact))) < 0.05


def test_the_answer_alone_moves_importance_router_and_virtual_bias():
    loss = lambda p: (layer().apply({"params": p}, X_BTD)[0] ** 2).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss), compiler_options=layers.FAST_COMPILE)(random_params(layer()))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert float(np.abs(grad).max()) > 0, jax.tree_util.keystr(path)


def test_a_devices_own_tokens_are_those_of_the_placement():
    """Two devices with a sequence each rank by sequence, one device by batch."""

    def gradient(scope, placement=None):
        policy = {"importance_regulariser": "salience", "salience_scope": scope}
        moe = layer(policy, placement=placement)

        def loss(params):
            y_BTD, trace = moe.apply({"params": params}, X_BTD)
            return (jnp.arange(1.0, D + 1)[None, None] * y_BTD**2).sum() + 100 * trace.losses["importance"]

        return jax.jit(jax.grad(loss))(random_params(layer()))["importance"]

    two = Placement(make_mesh(MeshConfig(data=2), jax.devices()[:2]))
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)
    close(gradient("device", two), gradient("sequence"))
    close(gradient("device"), gradient("batch"))
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradient("sequence"), gradient("batch"))
    assert max(jax.tree.leaves(apart)) > 1e-3


def test_numpy_arrays_are_accepted():
    moe, held = layer(), np.repeat(np.asarray(X_BTD, np.float64), 2, axis=1)[:, ::2]
    params = random_params(moe)
    valid = np.ones((B, T), bool)
    y_BTD, _ = moe.apply({"params": params}, held, valid_BT=valid)
    np.testing.assert_allclose(y_BTD, apply(moe, params, X_BTD)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        (
            {},
            {"modality_BT": jnp.zeros((B, T + 1), int)},
            r"modality_BT has shape \(2, 6\); it must be \(2, 5\), ",
        ),
        (
            {},
            {"modality_BT": jnp.full((B, T), 4)},
            "modality_BT holds 4; router='per_modality' tells 4 modalities apart",
        ),
        ({}, {"modality_BT": jnp.full((B, T), -1)}, "modality_BT holds -1; router='per_modality' tells 4 "),
        ({}, {"modality_BT": jnp.zeros((B, T))}, "modality_BT is float32; it must hold integers"),
        ({}, {"valid": jnp.ones((B, T), bool)}, "argument='valid' is unknown; valid: valid_BT, modality_BT, window"),
        ({}, {"context": 3}, "context is a int; it must be a MoEContext"),
        ({"dtype": "float8"}, {}, "dtype='float8' is unknown; valid: float32, bfloat16"),
    ],
)
def test_invalid_arguments_end_in_one_line(fields, given, message):
    moe = layers.without_type_check(MoE)(dataclasses.replace(CONFIG, router="per_modality"), F, **fields)
    params = layers.random_params(layer({"router": "per_modality"}), X_BTD, modality_BT=jnp.zeros((B, T), int))
    with pytest.raises(UserError, match=f"^{message}"):
        moe.apply({"params": params}, X_BTD, **{"modality_BT": jnp.zeros((B, T), int), **given})


def test_the_input_is_an_array_of_three_axes():
    for x, message in ((X_BTD[0], "x_BTD has shape"), (X_BTD.astype(int), "x_BTD is int32; it must be one of float16")):
        with pytest.raises(UserError, match=f"^{message}"):
            layers.without_type_check(MoE)(CONFIG, F).init(jax.random.key(0), x)


def test_d_ff_must_be_positive():
    with pytest.raises(UserError, match=r"^d_ff=0 must be >= 1"):
        layers.without_type_check(MoE)(CONFIG, 0).init(jax.random.key(0), X_BTD)


def test_users_stack_layers_by_a_scan_of_their_own():
    scanned = nn.scan(MoE, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    stack = scanned(CONFIG, F, execution=Execution("dense"))
    boxed = jax.jit(stack.init)(jax.random.key(0), X_BTD)
    y_BTD, traces = stack.apply(boxed, X_BTD)
    assert y_BTD.shape == X_BTD.shape
    assert traces.slots_BT.shape == (2, B, T)
    gate = boxed["params"]["experts"]["w_gate_EDF"]
    assert gate.names == ("layers", "expert", "embed", "expert_mlp")
    assert serialization.to_bytes(boxed)
    for i in range(2):  # each layer has weights of its own, and the stack is the layers one after the other
        own = jax.tree.map(lambda a, i=i: a[i], nn.unbox(boxed["params"]))
        expected = layer().apply({"params": own}, X_BTD if not i else expected)[0]
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)


@pytest.mark.slow
def test_hessian_of_the_layer_is_that_of_the_dense_reference():
    moe, oracle = layer(execution=Execution("blocks", "xla")), layer(execution=Execution("dense", "reference"))
    params = random_params(moe)

    def curvature(moe):
        loss = lambda t: jnp.sin(moe.apply({"params": params}, X_BTD * (1 + t))[0]).sum()  # noqa: E731
        return jax.jit(jax.hessian(loss))(0.0)

    np.testing.assert_allclose(curvature(moe), curvature(oracle), rtol=1e-3)
