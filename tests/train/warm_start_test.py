import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.small import forward, random_batch, random_params, small

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import init_params, logical_axes, named_leaves
from anyexperts_jax.models.presets import static_twin
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.specs import param_shardings
from anyexperts_jax.train import loop
from anyexperts_jax.train.loop import train
from anyexperts_jax.train.run_dir import load_run
from anyexperts_jax.train.warm_start import carried_over, warm_start
from train.stand_in import linear_apply, run_config

DYNAMIC = small()
STATIC = static_twin(DYNAMIC, 3)
KEY = jax.random.key(3)
KERNEL, BIAS = "decoder/moe_layers/moe/router/kernel", "decoder/moe_layers/moe/router/virtual_bias"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def carried(found, model, mesh, bias=None):
    params = random_params(found)
    bias_LC = jnp.zeros(found.router_bias_shape) if bias is None else bias
    return named_leaves(params), carried_over(params, bias_LC, found, model, KEY, mesh)


def test_a_static_mixture_becomes_one_with_variable_slots(mesh):
    bias_LC = jnp.arange(12.0).reshape(STATIC.router_bias_shape)
    before, started = carried(STATIC, DYNAMIC, mesh, bias_LC)
    after, fresh = named_leaves(started.params), named_leaves(init_params(DYNAMIC, KEY))
    assert set(started.new) == {KERNEL, *(name for name in after if "importance" in name or "virtual" in name)}
    assert not started.left
    for name in set(after) - set(started.new):
        assert np.array_equal(after[name], before[name]), name
    np.testing.assert_array_equal(after[KERNEL][..., :6], before[KERNEL])
    np.testing.assert_allclose(after[KERNEL][..., 6:], fresh[KERNEL][..., 6:], rtol=1e-6)
    for name in set(started.new) - {KERNEL}:
        np.testing.assert_allclose(after[name], fresh[name], rtol=1e-6)
    np.testing.assert_array_equal(started.router_bias_LC[:, :6], bias_LC)
    assert not started.router_bias_LC[:, 6:].any()
    assert "moe/router/kernel" in started.describe("runs/static")
    assert started.describe("runs/static").count("\n") == 0


@pytest.mark.slow
def test_another_top_k_changes_nothing_but_the_number_of_slots(mesh):
    batch, params = random_batch(STATIC), random_params(STATIC)
    other = static_twin(DYNAMIC, 2)
    _, started = carried(STATIC, other, mesh)
    assert not started.new
    assert not started.left
    np.testing.assert_array_equal(
        forward(other)(started.params, batch).logits_BTY, forward(other)(params, batch).logits_BTY
    )


@pytest.mark.parametrize(
    ("moe", "new", "left"),
    [
        ({"num_virtual": 3, "rho_max": 0.4}, {KERNEL, BIAS}, set()),
        ({"virtual_logits": "tied"}, {KERNEL, BIAS}, set()),
        ({"num_virtual": 0, "rho_max": 0.0, "iar": "off"}, {KERNEL}, {BIAS}),
    ],
)
def test_columns_that_both_models_have_are_kept(mesh, moe, new, left):
    before, started = carried(DYNAMIC, small(moe=moe), mesh)
    after = named_leaves(started.params)
    assert left <= set(started.left)
    assert new == set(started.new)
    columns = min(after[KERNEL].shape[-1], before[KERNEL].shape[-1])
    assert columns >= 6
    np.testing.assert_array_equal(after[KERNEL][..., :columns], before[KERNEL][..., :columns])


@pytest.mark.parametrize(
    ("found", "moe", "part"),
    [
        ({}, {"importance_mlp": "wide"}, "importance"),
        (
            {"router": "dtr", "router_hidden": 4, "router_rank": 2},
            {"router": "dtr", "router_hidden": 8, "router_rank": 3},
            "router",
        ),
    ],
)
def test_parameters_of_another_shape_are_initialised_as_a_whole(mesh, found, moe, part):
    _, started = carried(small(moe=found), small(moe=moe), mesh)
    after, fresh = named_leaves(started.params), named_leaves(init_params(small(moe=moe), KEY))
    assert started.new
    for name in started.new:
        assert part in name
        np.testing.assert_allclose(after[name], fresh[name], rtol=1e-6)


def test_the_result_is_sharded_like_the_model():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    _, started = carried(STATIC, DYNAMIC, mesh)
    expected = named_leaves(param_shardings(mesh, logical_axes(DYNAMIC), started.params))
    for name in started.new:
        assert named_leaves(started.params)[name].sharding == expected[name]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small(moe={"num_experts": 4, "k_max": 4}), "moe.num_experts (4, was 6)"),
        (small(stack={"expert_d_ff": 8}), "stack.expert_d_ff (8, was 12)"),
        (small(vision=None), "vision"),
        (
            dataclasses.replace(
                DYNAMIC,
                stack=dataclasses.replace(
                    DYNAMIC.stack, attention=dataclasses.replace(DYNAMIC.stack.attention, rope_theta=5e5)
                ),
            ),
            "rope_theta",
        ),
    ],
)
def test_another_model_is_refused_in_one_line(mesh, model, message):
    with pytest.raises(UserError) as caught:
        carried(DYNAMIC, model, mesh)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_starts_where_another_ended_and_goes_on_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "model_apply", lambda config, placement: linear_apply)
    first = run_config()
    moe = AnyExpertsConfig.static_top_k(4, 2)
    train(dataclasses.replace(first, model=dataclasses.replace(first.model, moe=moe)), tmp_path / "a", progress=False)
    config = run_config(start_from=str(tmp_path / "a"), steps=3, seed=1)
    still = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-30))
    train(still, tmp_path / "b", progress=True)
    assert "starting from" in capsys.readouterr().err
    (_, before, _), (_, after, _) = (load_run(tmp_path / name, "last") for name in "ab")
    table = lambda params: named_leaves(params)["tokens/table"]  # noqa: E731
    np.testing.assert_allclose(table(after), table(before), atol=1e-6)
    shutil.rmtree(tmp_path / "a")
    longer = dataclasses.replace(still, train=dataclasses.replace(still.train, steps=6))
    assert train(longer, tmp_path / "b", progress=False).step == 6


def test_a_missing_run_is_named(tmp_path, mesh):
    with pytest.raises(UserError, match="no run in"):
        warm_start(tmp_path / "nowhere", DYNAMIC, KEY, mesh)
