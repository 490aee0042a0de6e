import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.axes import LOGICAL_AXES
from anyexperts_jax.models.init import (
    abstract_params,
    active_parameter_count,
    init_params,
    logical_axes,
    parameter_count,
)
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.models.presets import model_preset, static_twin
from models.small import SMALL, random_batch, small

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tiny_parameters.json"


def described(config):
    """Path -> [shape, dtype, logical axes] of every parameter."""
    shapes = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    axes = jax.tree.leaves(logical_axes(config), is_leaf=lambda x: isinstance(x, tuple))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(p.shape), p.dtype.name, list(names)]
        for (path, p), names in zip(shapes, axes, strict=True)
    }


def test_tiny_has_the_golden_parameters():
    """A change here breaks checkpoints. If it is meant, write `described(model_preset("tiny"))` to the file."""
    assert described(model_preset("tiny")) == json.loads(GOLDEN.read_text())


def test_every_parameter_has_one_known_name_per_axis():
    for config in (SMALL, model_preset("small"), model_preset("ling_mini_2")):
        for path, (shape, _, names) in described(config).items():
            assert len(shape) == len(names), path
            assert set(names) <= set(LOGICAL_AXES), path
            assert ("layers" in names) == ("moe_layers" in path), path


def test_values_match_the_abstract_tree_and_stay_with_their_names():
    params, wider = (init_params(config, jax.random.key(3)) for config in (SMALL, small(vocab_size=48)))
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(
        lambda p: (p.shape, p.dtype), abstract_params(SMALL)
    )
    np.testing.assert_array_equal(params["decoder"]["dense_0"]["mlp"]["up"]["kernel"],
                                  wider["decoder"]["dense_0"]["mlp"]["up"]["kernel"])  # fmt: skip
    moe = params["decoder"]["moe_layers"]["moe"]
    np.testing.assert_array_equal(moe["importance"]["out"]["kernel"], 0.0)
    np.testing.assert_array_equal(moe["router"]["virtual_bias"], 1.0)
    assert not np.allclose(moe["router"]["kernel"][0], moe["router"]["kernel"][1])  # layers differ
    assert not np.allclose(moe["experts"]["w_gate_EDF"][0, 0], moe["experts"]["w_gate_EDF"][0, 1])  # experts too
    assert not np.allclose(moe["experts"]["w_gate_EDF"], moe["experts"]["w_up_EDF"])
    # 1 / sqrt(D) = 0.25 over 2 * 6 * 16 * 12 draws: the standard error is 0.25 / sqrt(2 * 2304) = 0.004.
    assert abs(float(moe["experts"]["w_gate_EDF"].std()) - 0.25) < 0.015


def test_the_same_key_gives_the_same_values_and_another_key_others():
    first, again, other = (init_params(SMALL, jax.random.key(seed)) for seed in (5, 5, 6))
    chex.assert_trees_all_equal(first, again)
    assert not np.allclose(first["tokens"]["table"], other["tokens"]["table"])


def test_a_mesh_changes_no_value():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    table = lambda key: init_params(SMALL, key)["tokens"]["table"]  # noqa: E731
    sharded = jax.jit(table, out_shardings=sharding)(jax.random.key(5))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, init_params(SMALL, jax.random.key(5))["tokens"]["table"])


def test_a_real_batch_makes_no_other_parameters_than_the_smallest():
    """The batch has other numbers of rows, positions, patches and frames, and no parameter may depend on these."""
    init = lambda key: MultimodalModel(SMALL).init(key, random_batch())["params"]  # noqa: E731
    made = jax.tree.map(lambda box: box.unbox(), jax.eval_shape(init, jax.random.key(0)), is_leaf=_is_box)
    chex.assert_trees_all_equal_shapes_and_dtypes(made, abstract_params(SMALL))


def _is_box(node):
    return hasattr(node, "unbox")


def test_ling_mini_2_has_the_published_number_of_parameters():
    """16.26B for the language model alone, 789M of them active beside the embeddings (Ling-mini-2.0's own figures).

    experts          19 layers x 256 experts x 3 x 2048 x 512                   15,300,820,992
    shared experts   19 x 3 x 2048 x 512                                            59,768,832
    router           19 x 2048 x 256                                                 9,961,472
    dense layer      3 x 2048 x 5120                                                31,457,280
    attention        20 x (2 x 2048 x 2048 + 2 x 2048 x 512), QK norms 20 x 256     209,720,320
    norms            (20 x 2 + 1) x 2048                                                83,968
    embeddings       2 x 157184 x 2048                                             643,825,664
                                                                                16,255,638,528
    """
    config = model_preset("ling_mini_2")
    base = static_twin(config, 8)
    params = abstract_params(base)
    beside = sum(size(params[part]) for part in ("vision", "audio", "modality"))
    language = parameter_count(base) - beside
    assert language == 16_255_638_528
    embeddings = 2 * 157_184 * 2048
    assert abs((active_parameter_count(base) - beside - embeddings) / 789e6 - 1) < 0.005

    # AnyExperts adds to each layer 64 columns with a bias each, and RMSNorm, 2048 -> 512 -> 1 with biases.
    added = 19 * (64 * 2048 + 64 + 2048 + (2048 + 1) * 512 + 512 + 1)
    assert parameter_count(config) - parameter_count(base) == added
    assert abs(parameter_count(config) / 16.26e9 - 1) < 0.02


def test_tiny_and_small_are_of_the_stated_size():
    assert 0.4e6 < parameter_count(model_preset("tiny")) < 0.8e6
    assert 150e6 < parameter_count(model_preset("small")) < 400e6


def test_active_parameters_follow_the_budget():
    config = model_preset("tiny")
    expert = 3 * config.stack.num_moe_layers * config.stack.d_model * config.stack.expert_d_ff
    assert active_parameter_count(config, 6) - active_parameter_count(config, 4) == 2 * expert
    assert active_parameter_count(config, config.moe.num_experts) == parameter_count(config)


def size(tree):
    return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(tree))


def test_params_have_the_param_dtype_and_the_router_float32():
    params = abstract_params(small(stack={"param_dtype": "bfloat16"}))
    moe = params["decoder"]["moe_layers"]["moe"]
    assert moe["experts"]["w_gate_EDF"].dtype == jnp.bfloat16
    float32 = [*jax.tree.leaves(moe["router"]), *jax.tree.leaves(moe["importance"])]
    assert {p.dtype for p in float32} == {jnp.dtype("float32")}
