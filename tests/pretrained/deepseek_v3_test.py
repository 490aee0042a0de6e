"""DeepSeek-V3's family: reading latent attention, its cache, meshes, budgets and attached slots."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anyexperts_jax as ax
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import named_leaves
from anyexperts_jax.models.multimodal import MultimodalModel, TextPart
from anyexperts_jax.nn.config import LoraConfig
from anyexperts_jax.nn.stack import empty_stack_cache
from anyexperts_jax.pretrained.family import family_of
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.load import open_checkpoint
from anyexperts_jax.pretrained.lora import merge_adapter, peft_tensors, with_adapter
from pretrained.generate_test import require_full_passes_agree
from pretrained.lora_test import random_adapter
from pretrained.tiny_hub import hub_values, random_tensors, tensors_in, tiny_checkpoint, write_checkpoint

pytest.importorskip("safetensors")
PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6), (5, 3), (8,))
ATTENTION = "decoder/moe_layers/self_attention/attention/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("hub") / "deepseek", "deepseek_v3", seed=5, vocab_size=54)


@pytest.fixture(scope="module")
def model(folder):
    return ax.load_pretrained(folder)


def config_of(values):
    hub = HubConfig(values, "config.json")
    return family_of(hub)[1].config(hub)


@pytest.mark.parametrize("budget", [None, 1.5])
def test_greedy_tokens_equal_those_of_full_forward_passes(model, budget):
    require_full_passes_agree(model, PROMPTS, 4, budget)


def test_the_cache_holds_latents_and_changes_no_expert(model):
    tokens_BT = np.array([[7, 3, 9, 1, 2, 8]])
    whole_LTK = np.asarray(model.forward(tokens_BT).trace.expert_ids_BTK)[:, 0]
    cache = empty_stack_cache(model.config.stack, 1, 8)
    assert {leaf.shape[-2:] for leaf in jax.tree.leaves(cache)} == {(1, 14 + 6)}
    extend = jax.jit(
        lambda part, cache: MultimodalModel(model.config).apply(
            {"params": model.params}, part, cache, router_bias_LC=model.router_bias_LC, method="extend"
        )
    )
    for t in range(tokens_BT.shape[1]):
        part = TextPart(jnp.asarray(tokens_BT[:, t : t + 1], jnp.int32), jnp.array([t]), jnp.array([1]))
        _, trace, cache = extend(part, cache)
        np.testing.assert_array_equal(trace.expert_ids_BTK[:, 0, 0], whole_LTK[:, t])


@pytest.mark.slow
def test_a_sharded_model_equals_the_unsharded_one(folder, model):
    split = ax.load_pretrained(folder, ax.make_mesh(ax.MeshConfig(data=2, fsdp=2, tensor=2)))
    leaves = named_leaves(split.params)
    up = leaves[f"{ATTENTION}up/kernel"]  # latents over fsdp, heads over tensor
    assert up.shape == (2, 14, 4, 18)
    assert up.addressable_shards[0].data.shape == (2, 7, 2, 18)
    assert leaves[f"{ATTENTION}down/kernel"].addressable_shards[0].data.shape == (2, 14, 20)
    tokens_BT = np.random.default_rng(0).integers(0, 53, (4, 12))
    np.testing.assert_allclose(split.logits(tokens_BT), model.logits(tokens_BT), atol=2e-5)


@pytest.mark.slow
def test_attached_slots_start_as_the_base_and_can_be_detached(model):
    attached = ax.attach(model, k_min=2, k_max=4, num_virtual=3)
    tokens_BT = np.random.default_rng(0).integers(0, 53, (2, 12))
    np.testing.assert_array_equal(attached.logits(tokens_BT), model.logits(tokens_BT))
    back, expected = named_leaves(ax.detach(attached).params), named_leaves(model.params)
    assert all(back[name] is leaf for name, leaf in expected.items())


def test_further_prediction_heads_are_ignored_by_default(tmp_path):
    """`num_nextn_predict_layers` is 1 if config.json does not have it."""
    values = hub_values("deepseek_v3")
    assert "num_nextn_predict_layers" not in values
    further = {"model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32)}
    folder = write_checkpoint(tmp_path / "hub", values, random_tensors(values) | further)
    assert open_checkpoint(folder).plan().config.stack.num_layers == 3
    another = {"model.layers.4.eh_proj.weight": np.zeros((2, 2), np.float32)}
    folder = write_checkpoint(tmp_path / "more", values, random_tensors(values) | further | another)
    with pytest.raises(UserError, match=r"nothing reads: model\.layers\.4\.eh_proj"):
        open_checkpoint(folder).plan()


def test_missing_keys_have_the_defaults_of_the_class(tmp_path):
    unsaid = ("n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace", "kv_lora_rank", "q_lora_rank")
    values = hub_values("deepseek_v3", n_routed_experts=16, num_hidden_layers=4)
    config = config_of({key: value for key, value in values.items() if key not in unsaid})
    assert (config.moe.num_groups, config.moe.groups_kept, config.moe.scaling_factor) == (8, 4, 2.5)
    assert config.stack.num_dense_layers == 3
    latent = config.stack.attention.latent
    assert (latent.kv_rank, latent.query_rank) == (512, 1536)
    none = config_of({**values, "q_lora_rank": None})  # null differs from missing: queries have no latent
    assert none.stack.attention.latent.query_rank is None


def test_yarn_multiplies_the_scores_by_its_squared_growth():
    config = config_of(hub_values("deepseek_v3"))
    growth = 0.1 * 0.8 * np.log(4.0) + 1
    assert config.stack.attention.latent.score_factor == pytest.approx(growth**2)
    assert config.stack.attention.rope_scaling.attention_factor == pytest.approx((0.15 * np.log(4.0) + 1) / growth)
    plain = config_of(hub_values("deepseek_v3 full queries"))
    assert plain.stack.attention.latent.score_factor == 1


def test_both_rope_forms_keep_yarns_settings(tmp_path, model):
    model.export(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for form in (written["rope_scaling"], written["rope_parameters"]):
        assert (form["rope_type"], form["mscale"], form["mscale_all_dim"], form["factor"]) == ("yarn", 1.5, 0.8, 4.0)
    assert ax.load_pretrained(tmp_path / "out").config == model.config


@pytest.mark.slow
def test_adapters_fit_the_projections_of_latent_attention(model):
    """Every adapted weight is one linear layer of transformers, as peft needs."""
    adapted = with_adapter(model, random_adapter(model, LoraConfig(rank=2)))
    tensors, without = peft_tensors(adapted)
    assert not without
    names = {name.split("self_attn.")[1].split(".")[0] for name in tensors}
    assert names == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert tensors["base_model.model.model.layers.1.self_attn.kv_b_proj.lora_B.weight"].shape == (4 * 18, 2)
    tokens_BT = np.array([[7, 3, 9, 1, 2, 8]])
    np.testing.assert_allclose(adapted.logits(tokens_BT), merge_adapter(adapted).logits(tokens_BT), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported, only 4"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported, only"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ({"head_dim": 14}, "head_dim=14 is not supported, only 6"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported with latent attention"),
        ({"rope_theta": None}, "rope_theta is nowhere"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantised \(fp8\), which is not read, only fp8 \(e4m3\) in blocks; dequantise",
        ),
    ],
)
def test_unsupported_configurations_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config_of(hub_values("deepseek_v3", **changes))


def test_a_weight_of_another_shape_is_named(tmp_path):
    values = hub_values("deepseek_v3")
    tensors = random_tensors(values)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    folder = write_checkpoint(tmp_path / "hub", values, {**tensors, name: tensors[name][:-1]})
    assert name in tensors_in(folder)
    with pytest.raises(UserError, match=r"kv_b_proj.weight is \[71, 14\], config.json wants \[72, 14\]"):
        open_checkpoint(folder).plan()
