import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.small import SMALL, forward, loss_and_grad, random_batch, random_params, small, weights

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.registries import ROUTERS
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import init_params, logical_axes, parameter_count
from anyexperts_jax.models.presets import model_preset
from anyexperts_jax.nn.moe import MoE
from anyexperts_jax.nn.router import Router as RouterModule
from anyexperts_jax.routing.routers.dtr import Hypernetworks, dtr_logits
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.specs import param_shardings
from nn.layers import FAST_COMPILE, equations, initial_params, shapes
from nn.layers import random_params as random_layer_params

BASE = AnyExpertsConfig(num_experts=6, num_virtual=2, k_min=2, k_max=5, router_modalities=3, router_hidden=5)
N, D, M, C, Z, Q = 12, 8, 3, 8, 5, 16
X_ND = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
MODALITY_N = jnp.arange(N) % M


def module(router, **fields):
    return RouterModule(dataclasses.replace(BASE, router=router, **fields))


def counted(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_every_router_has_its_parameters():
    dtr = M * (D * Z + Z + (Z + 1) * 3 * Q * D) + D * C
    expected = {
        "linear": D * C,
        "per_modality": M * D * C,
        "per_modality_shared": M * D * C + D * C + 1,
        "dtr": dtr,
        "dtr_shared": dtr + D * C + 1,
        "linear_apart": D * C,
        "markers": 2 * D * 6 * 4 + D * 2,
    }
    assert set(expected) == set(ROUTERS)
    for name, count in expected.items():
        assert counted(shapes(module(name), X_ND, MODALITY_N)) == count + 2, name  # and two virtual columns' biases


def test_dtr_at_the_papers_width_adds_what_h_times_r_of_2048_gives():
    """3 x 2048 x 2048 per hypernetwork besides biases and W1, for (256, 8), (128, 16) and (64, 32) alike."""
    for hidden, rank in ((256, 8), (128, 16), (64, 32)):
        moe = AnyExpertsConfig.static_top_k(4, 1, router="dtr", router_hidden=hidden, router_rank=rank)
        count = counted(shapes(RouterModule(moe), jnp.zeros((1, 2048))))
        assert abs(count / (4 * 3 * 2048 * 2048) - 1) < 0.06


@pytest.mark.slow
def test_logits_start_small_enough_for_a_softmax():
    x_ND = jnp.asarray(np.random.default_rng(1).normal(size=(256, 64)), jnp.float32)
    modality_N = jnp.arange(256) % M
    for name in ROUTERS:
        router = module(name, router_hidden=32, virtual_bias_init=0.0)
        logits_NC = router.apply({"params": initial_params(router, x_ND, modality_N)}, x_ND, modality_N)
        assert 0.2 < float(logits_NC.std()) < 1.5, name


@pytest.mark.parametrize("name", ROUTERS)
def test_every_matmul_of_bfloat16_tokens_is_an_exact_one_of_float32_in_the_gradients_too(name):
    router = module(name)
    params = random_layer_params(router, X_ND, MODALITY_N)
    x_ND = X_ND.astype(jnp.bfloat16)
    logits_NC = jax.eval_shape(lambda: router.apply({"params": params}, x_ND, MODALITY_N))
    assert logits_NC.dtype == jnp.float32
    total = lambda params, x_ND: router.apply({"params": params}, x_ND, MODALITY_N).sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(total, (0, 1)))(params, x_ND)
    dots = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(dots) >= 3  # one map: forward, and two gradients
    for dot in dots:
        assert {one.name for one in dot.params["precision"] or ()} == {"HIGHEST"}, dot
        assert {value.aval.dtype for value in (*dot.invars, *dot.outvars)} == {jnp.dtype(jnp.float32)}, dot


def test_the_modality_selects_the_hypernetwork_and_gelu_is_a_switch():
    router = module("dtr", num_virtual=0, rho_max=0.0)
    params = initial_params(router, X_ND, MODALITY_N)
    networks = Hypernetworks(**{name: params[name] for name in params if name != "phi"})
    logits_NC = router.apply({"params": params}, X_ND, MODALITY_N)
    np.testing.assert_allclose(logits_NC, dtr_logits(X_ND, MODALITY_N, networks, params["phi"]), atol=1e-5)
    with_gelu = module("dtr", num_virtual=0, rho_max=0.0, router_gelu=True)
    assert not np.allclose(with_gelu.apply({"params": params}, X_ND, MODALITY_N), logits_NC, atol=1e-3)


def test_a_router_of_modalities_needs_them():
    moe = MoE(dataclasses.replace(BASE, router="dtr"), 4, execution=Execution(dispatch="dense"))
    params = initial_params(moe, X_ND[None])
    with pytest.raises(UserError, match="router='dtr' needs each token's modality"):
        moe.apply({"params": params}, X_ND[None])
    with pytest.raises(UserError, match="router='DTR' is unknown; valid: linear, per_modality"):
        AnyExpertsConfig(router="DTR")
    with pytest.raises(UserError, match="router_rank=0 must be >= 1"):
        AnyExpertsConfig(router_rank=0)
    with pytest.raises(UserError, match="router_modalities=3: a multimodal model has 4"):
        ModelConfig(moe=dataclasses.replace(BASE, router="dtr"))


@pytest.mark.slow
def test_an_anyexperts_model_with_variable_slots_learns_through_every_router_weight():
    """Variable slots, virtual columns and a router that tells modalities apart: values, gradients, decoding's path."""
    config = small(moe={"router": "dtr_shared", "router_hidden": 6, "router_rank": 2})
    params, batch = random_params(config), random_batch()
    (_, output), grads = loss_and_grad(config)(params, batch, weights())
    assert len(np.unique(output.trace.slots_BT[:, batch.valid_BT])) > 1
    assert int(output.trace.virtual_slots_BT.sum()) > 0
    for name, grad in grads["decoder"]["moe_layers"]["moe"]["router"].items():
        per_layer = np.abs(np.asarray(grad).reshape(len(grad), -1)).max(1)
        assert np.isfinite(grad).all(), name
        assert (per_layer > 0).all(), name
    other = dataclasses.replace(batch, modality_BT=np.where(batch.modality_BT == 3, 1, batch.modality_BT))
    moved = forward(config)(params, other)
    assert not np.allclose(moved.logits_BTY, output.logits_BTY, atol=1e-3)


def test_the_parameters_have_places_on_a_mesh():
    config = small(moe={"router": "dtr_shared", "router_hidden": 6, "router_rank": 2})
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    shapes_of = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    shardings = param_shardings(mesh, logical_axes(config), shapes_of)
    router = shardings["decoder"]["moe_layers"]["moe"]["router"]
    assert router["down_MZDW"].spec == jax.sharding.PartitionSpec(None, None, None, "fsdp", None)
    assert not any(router["mix"].spec)


@pytest.mark.slow
def test_variants_cost_what_they_say_in_a_preset():
    base = model_preset("tiny")
    layers, D = base.stack.num_moe_layers, base.stack.d_model
    per_modality = dataclasses.replace(base, moe=dataclasses.replace(base.moe, router="per_modality"))
    assert parameter_count(per_modality) - parameter_count(base) == layers * 3 * D * base.moe.num_columns
    assert SMALL.moe.router == "linear"


def test_run_on_a_mesh_gives_the_same_logits():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    router = module("dtr")
    params = initial_params(router, X_ND, MODALITY_N)
    spec = jax.sharding.PartitionSpec
    placed = jax.device_put(X_ND, jax.sharding.NamedSharding(mesh, spec("data")))
    run = jax.jit(lambda p, x, m: router.apply({"params": p}, x, m), compiler_options=FAST_COMPILE)
    np.testing.assert_allclose(run(params, placed, MODALITY_N), run(params, X_ND, MODALITY_N), rtol=1e-4, atol=1e-5)
