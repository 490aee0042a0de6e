import jax
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.encode import require_model_ids
from anyexperts_jax.models.init import abstract_params
from anyexperts_jax.models.presets import PRESETS, dense_twin, model_preset, static_twin
from anyexperts_jax.tokenizers.bytes import BYTES

WITH_EXPERTS = [name for name in PRESETS if name != "tiny_dense"]


def paths(config):
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def test_unknown_presets_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'tinny' is unknown; valid: tiny, tiny_dense, small, ling_mini_2"):
        model_preset("tinny")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_pads_and_stops_by_the_tokenizers_ids(name):
    require_model_ids(BYTES, model_preset(name))


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_every_preset_has_the_papers_window_and_budget(name):
    moe = model_preset(name).moe
    assert (moe.k_min, moe.k_max, moe.rho_max) == (8, 12, 0.2)
    assert moe.expected_real_slots == pytest.approx(8.0)
    assert moe.num_virtual * 4 == moe.num_experts  # rho / (1 - rho) of the real ones


def test_ling_mini_2_routes_as_its_base():
    moe = model_preset("ling_mini_2").moe
    assert (moe.num_experts, moe.scores, moe.scaling_factor, moe.num_groups, moe.groups_kept) == (
        256,
        "sigmoid",
        2.5,
        8,
        4,
    )
    assert moe.expert_bias
    assert moe.experts_in_reach == 128


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_static_twin_differs_by_router_columns_and_importance_alone(name):
    config = model_preset(name)
    twin = static_twin(config, 8)
    assert twin.moe.expected_real_slots == 8
    assert not twin.moe.uses_importance
    ours, theirs = paths(config), paths(twin)
    gone = {path for path in ours if path not in theirs}
    assert gone == {p for p in ours if "/importance/" in p or p.endswith("virtual_bias")}
    assert gone
    assert not set(theirs) - set(ours)
    assert {p for p in theirs if theirs[p] != ours[p]} == {"decoder/moe_layers/moe/router/kernel"}
    with pytest.raises(UserError, match=r"real experts|exceeds num_experts"):
        static_twin(config, config.moe.experts_in_reach + 1)


def test_a_dense_twin_has_no_experts_and_no_router():
    dense = dense_twin(model_preset("tiny"))
    assert {p for p in paths(dense) if "moe" in p or "router" in p} == set()
    assert {p for p in paths(model_preset("tiny")) if "moe" not in p} <= set(paths(dense))
    assert paths(dense)["decoder/dense_2/mlp/up/kernel"] == (64, 192)
    assert model_preset("tiny_dense").stack.num_moe_layers == 0
