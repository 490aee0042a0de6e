import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.small import FAST_COMPILE, forward, random_batch, random_params, small

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.evolution.config import UpcycleConfig, upcycled_model
from anyexperts_jax.evolution.upcycle import (
    initial_experts,
    upcycle_params,
    upcycled_leaves,
)
from anyexperts_jax.models.init import abstract_params, init_params, logical_axes, named_leaves
from anyexperts_jax.models.presets import dense_twin
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.specs import param_shardings

DENSE = dense_twin(small(stack={"num_layers": 4}))
KEY = jax.random.key(0)


@functools.cache
def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def upcycled(moe, mesh=None, consume=False, params=None, **fields):
    config = UpcycleConfig(num_experts=moe.num_experts, **fields)
    model = upcycled_model(DENSE, config, moe)
    params = random_params(DENSE) if params is None else params
    return model, upcycle_params(params, model, config, KEY, mesh or one_device(), consume=consume)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moe", "fields"),
    [
        (AnyExpertsConfig.static_top_k(4, 1), {"moe_every": 1}),
        (AnyExpertsConfig.static_top_k(4, 2, router="dtr", router_hidden=4, router_rank=2), {}),
        (
            AnyExpertsConfig.static_top_k(3, 1, normalisation="all_raw_gradient"),
            {"moe_every": 3, "num_dense_layers": 1},
        ),
    ],
    ids=["top-1, every layer", "top-2, dtr", "raw gradient, every third"],
)
def test_copies_compute_what_the_dense_model_does(moe, fields):
    batch = random_batch()
    expected = forward(DENSE)(random_params(DENSE), batch).logits_BTY
    model, params = upcycled(moe, **fields)
    output = forward(model)(params, batch)
    assert len(np.unique(output.trace.expert_ids_BTK)) > 2  # the router sends tokens to several
    valid = batch.valid_BT  # padding gets no expert
    np.testing.assert_allclose(output.logits_BTY[valid], expected[valid], atol=2e-5)
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, abstract_params(model))


def test_weights_of_every_layer_are_copied_to_their_place():
    dense = random_params(DENSE)["decoder"]
    _, params = upcycled(AnyExpertsConfig.static_top_k(4, 1))
    blocks = params["decoder"]["moe_layers"]
    for group in range(2):
        routed, before = dense[f"dense_{2 * group + 1}"], dense[f"dense_{2 * group}"]
        for expert in range(4):
            np.testing.assert_array_equal(
                blocks["moe"]["experts"]["w_down_EFD"][group, expert], routed["mlp"]["down"]["kernel"]
            )
        np.testing.assert_array_equal(blocks["norm"]["scale"][group], routed["norm"]["scale"])
        np.testing.assert_array_equal(blocks["before_0"]["mlp"]["up"]["kernel"][group], before["mlp"]["up"]["kernel"])
    fresh = init_params(upcycled_model(DENSE, UpcycleConfig(), AnyExpertsConfig.static_top_k(4, 1)), KEY)
    np.testing.assert_allclose(  # two programs, so up to rounding
        blocks["moe"]["router"]["kernel"], fresh["decoder"]["moe_layers"]["moe"]["router"]["kernel"], rtol=1e-6
    )


@pytest.mark.slow
def test_on_a_mesh_leaves_are_converted_without_holding_two_models():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=2))
    moe = AnyExpertsConfig.static_top_k(4, 1)
    config = UpcycleConfig()
    model = upcycled_model(DENSE, config, moe)
    place = param_shardings(mesh, logical_axes(DENSE), abstract_params(DENSE))
    dense = jax.device_put(random_params(DENSE), place)
    held = named_leaves(dense)
    del dense
    sizes = [4 * leaf.size for leaf in jax.tree.leaves(abstract_params(model))]
    kept, pointers = {}, {name: leaf for name, leaf in held.items() if "mlp" in name}
    for name, leaf in upcycled_leaves(held, model, config, KEY, mesh, consume=True):
        kept[name] = leaf
        assert sum(a.nbytes for a in (*kept.values(), *held.values())) <= sum(sizes) + max(sizes)
    assert not held
    assert all(leaf.is_deleted() for name, leaf in pointers.items() if name.startswith("decoder/dense_"))
    expected = named_leaves(param_shardings(mesh, logical_axes(model), abstract_params(model)))
    assert {name: leaf.sharding for name, leaf in kept.items()} == expected
    assert kept["decoder/moe_layers/moe/experts/w_gate_EDF"].sharding.spec[1] == "expert"
    _, alone = upcycled(moe)
    for name, leaf in named_leaves(alone).items():
        np.testing.assert_allclose(kept[name], leaf, atol=1e-6, err_msg=name)


def make(init, weight="gate", **fields):
    shape = (3, 60, 40) if weight == "down" else (3, 40, 60)  # 60 units
    dense = jnp.asarray(np.random.default_rng(3).normal(size=shape) + 0.2, jnp.float32)
    run = jax.jit(functools.partial(initial_experts, UpcycleConfig(init=init, **fields), KEY, weight),
                  compiler_options=FAST_COMPILE)  # fmt: skip
    return np.asarray(dense), np.asarray(run(dense))


@pytest.mark.parametrize("init", ["noise", "dropout", "random_subset"])
def test_expert_1_is_the_dense_ffn_and_the_others_differ(init):
    dense, experts = make(init)
    np.testing.assert_array_equal(experts[:, 0], dense)
    flat = experts.reshape(12, -1)
    assert len(np.unique(flat.round(5), axis=0)) == 12
    assert 0.2 < np.corrcoef(flat[1], flat[0])[0, 1] < 0.999


def test_noise_has_the_size_asked_for():
    dense, experts = make("noise", noise=0.2)
    rms = np.sqrt((dense**2).mean((1, 2)))
    np.testing.assert_allclose((experts[:, 1:] - dense[:, None]).std((2, 3)) / rms[:, None], 0.2, rtol=0.08)


def test_dropout_keeps_the_mean():
    dense, experts = make("dropout", dropped=0.25)
    zero = experts[:, 1:] == 0
    np.testing.assert_allclose(zero.mean(), 0.25, atol=0.02)
    np.testing.assert_allclose(
        experts[:, 1:][~zero], np.broadcast_to(dense[:, None] / 0.75, zero.shape)[~zero], rtol=1e-6
    )


def test_a_random_subset_of_units_is_the_same_in_all_three_matrices():
    changed = {}
    for weight in ("gate", "up", "down"):
        dense, experts = make("random_subset", weight, redrawn=0.5)
        differs = experts[:, 1:] != dense[:, None]
        changed[weight] = differs.all(3) if weight == "down" else differs.all(2)
        assert (changed[weight] == (differs.any(3) if weight == "down" else differs.any(2))).all()
        assert (changed[weight].sum(-1) == 30).all()
    np.testing.assert_array_equal(changed["gate"], changed["up"])
    np.testing.assert_array_equal(changed["gate"], changed["down"])
    assert not np.array_equal(changed["gate"][0, 0], changed["gate"][0, 1])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: UpcycleConfig(init="clone"), "upcycle.init='clone' is unknown; valid: copy, noise, dropout"),
        (lambda: UpcycleConfig(dropped=1.0), r"upcycle.dropped=1.0 must be in \[0, 1\)"),
        (lambda: upcycled(AnyExpertsConfig.static_top_k(4, 1), moe_every=3), "moe_every=3 must divide"),
        (lambda: upcycled_model(small(), UpcycleConfig(), AnyExpertsConfig.static_top_k(4, 1)), "has 2 layers with"),
        (
            lambda: upcycled_model(DENSE, UpcycleConfig(), AnyExpertsConfig.static_top_k(3, 1)),
            "moe.num_experts=3 is not upcycle.num_experts=4",
        ),
        (
            lambda: upcycled(AnyExpertsConfig.static_top_k(4, 1), params={"tokens": {"table": jnp.zeros((40, 16))}}),
            "the dense parameters have no .*another model",
        ),
    ],
)
def test_runs_that_cannot_be_upcycled_are_refused(run, message):
    with pytest.raises(UserError, match=message):
        run()
