"""Low-rank adapters: their sum with the weights, merging, unmerging, saving for us and peft, the check of the base."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.adapters import adapted_weights, is_adapter, require_adapted
from anyexperts_jax.models.init import abstract_params, named_leaves
from anyexperts_jax.nn.config import LoraConfig
from anyexperts_jax.pretrained.lora import (
    Adapter,
    adapter_of,
    fingerprint,
    merge_adapter,
    peft_tensors,
    read_adapter,
    unmerge_adapter,
    with_adapter,
    with_adapters,
)
from anyexperts_jax.pretrained.random_model import random_model
from pretrained.tiny_hub import hub_values

pytest.importorskip("safetensors")

EVERY = ("**/attention/*/kernel", "**/mlp/**", "**/experts/**", "**/shared/**")
CASES = {  # the second has dense, MoE and shared networks, so every kind of pattern is covered
    "llama": LoraConfig(rank=3, alpha=5.0, patterns=EVERY[:2]),
    "glm4_moe": LoraConfig(rank=2, alpha=3.0, patterns=EVERY),
    "qwen3_moe": LoraConfig(rank=2, alpha=3.0, patterns=(EVERY[0], EVERY[2]), experts="shared"),
}


def random_adapter(m, lora, seed=0):
    """Random factors, none of them zero, for all adapted weights of a model."""
    config = dataclasses.replace(m.config, stack=dataclasses.replace(m.config.stack, lora=lora))
    rng = np.random.default_rng(seed)
    leaves = {
        name: (rng.standard_normal(leaf.shape) * 0.2).astype(np.float32)
        for name, leaf in named_leaves(abstract_params(config)).items()
        if is_adapter(name)
    }
    return Adapter(lora, leaves, fingerprint(m))


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    base = random_model(hub_values(request.param))
    return base, with_adapter(base, random_adapter(base, CASES[request.param]))


def test_unmerging_returns_the_weights(pair):
    base, m = pair
    merged = merge_adapter(m)
    assert merged.config == base.config
    changed = set()
    for name, value in named_leaves(base.params).items():
        found = named_leaves(merged.params)[name]
        if not np.array_equal(found, value):
            changed.add(name)
    assert changed == set(adapted_weights(m.config))
    back = named_leaves(unmerge_adapter(merged, adapter_of(m)).params)
    for name, value in named_leaves(m.params).items():
        np.testing.assert_allclose(back[name], value, atol=1e-6, rtol=0, err_msg=name)


def test_a_merged_weight_follows_the_definition():
    base = random_model(hub_values("glm4_moe"))
    m = with_adapter(base, random_adapter(base, CASES["glm4_moe"]))
    leaves, merged = named_leaves(m.params), named_leaves(merge_adapter(m).params)
    name = "decoder/moe_layers/moe/experts/w_up_EDF"
    a, b = (np.asarray(leaves[f"{name}_lora_{factor}"]) for factor in "ab")
    wanted = leaves[name] + 1.5 * np.einsum("ledr,lerf->ledf", a, b)
    np.testing.assert_allclose(merged[name], wanted, atol=1e-6)
    name = "decoder/moe_layers/self_attention/attention/out/kernel"
    a, b = (np.asarray(leaves[f"{name}_lora_{factor}"]) for factor in "ab")
    np.testing.assert_allclose(merged[name], leaves[name] + 1.5 * np.einsum("lhar,lrd->lhad", a, b), atol=1e-6)


@pytest.mark.slow
def test_a_model_with_an_adapter_equals_the_merged_one(pair):
    base, m = pair
    tokens = [[1, 2, 3, 4, 5]]
    beside, merged = np.asarray(m.logits(tokens)), np.asarray(merge_adapter(m).logits(tokens))
    np.testing.assert_allclose(beside, merged, atol=2e-4, rtol=1e-4)
    assert np.abs(beside - np.asarray(base.logits(tokens))).max() > 0.01


def test_a_saved_adapter_is_read_back_and_refused_on_another_base(pair, tmp_path):
    base, m = pair
    m.export(tmp_path / "adapter", form="adapter")
    found = read_adapter(tmp_path / "adapter")
    assert found.config == m.config.stack.lora
    again = with_adapter(base, found)
    for name, value in named_leaves(m.params).items():
        np.testing.assert_array_equal(named_leaves(again.params)[name], value)
    other = random_model(base.hub.values, seed=1)
    with pytest.raises(UserError, match="trained on another base: its fingerprint is") as error:
        with_adapter(other, found)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="has an adapter already"):
        with_adapter(m, found)
    with pytest.raises(UserError, match="has no adapter"):
        base.export(tmp_path / "none", form="adapter")
    assert not (tmp_path / "none").exists()


def test_several_adapters_are_beside_one_base(pair):
    """Each may be merged and taken out again before the next one is merged: the base comes back."""
    base, m = pair
    adapters = {name: random_adapter(base, m.config.stack.lora, seed) for seed, name in enumerate(("one", "two"))}
    models, own = with_adapters(base, adapters), named_leaves(base.params)
    for name, model in models.items():
        held = named_leaves(model.params)
        assert all(held[leaf] is value for leaf, value in own.items())
        assert set(held) - set(own) == set(adapters[name].leaves)
        merged = merge_adapter(model)
        back = named_leaves(unmerge_adapter(merged, adapters[name]).params)
        for leaf, value in own.items():
            np.testing.assert_allclose(back[leaf], value, atol=1e-6, rtol=0, err_msg=leaf)
    changed = adapted_weights(m.config)[0]
    one, two = (named_leaves(merge_adapter(models[name]).params)[changed] for name in models)
    assert np.abs(np.asarray(one) - np.asarray(two)).max() > 0.01
    other = random_model(base.hub.values, seed=1)
    strange = dataclasses.replace(adapters["two"], base=fingerprint(other))
    with pytest.raises(UserError, match="the adapter two was trained on another base: its fingerprint is"):
        with_adapters(base, {**adapters, "two": strange})


def test_the_fingerprint_is_the_same_in_bfloat16_and_float32():
    half = random_model(hub_values("llama"))
    half = dataclasses.replace(half, params=jax.tree.map(lambda leaf: leaf.astype("bfloat16"), half.params))
    whole = dataclasses.replace(half, params=jax.tree.map(lambda leaf: leaf.astype("float32"), half.params))
    assert fingerprint(half) == fingerprint(whole)


def test_peft_finds_names_and_shapes_of_its_linear_layers(pair, tmp_path):
    base, m = pair
    tensors, without = peft_tensors(m)
    values, lora = base.hub.values, m.config.stack.lora
    width, head = values["hidden_size"], values["head_dim"]
    layer = "base_model.model.model.layers.1.self_attn"
    assert tensors[f"{layer}.q_proj.lora_A.weight"].shape == (lora.rank, width)
    assert tensors[f"{layer}.q_proj.lora_B.weight"].shape == (values["num_attention_heads"] * head, lora.rank)
    assert tensors[f"{layer}.o_proj.lora_A.weight"].shape == (lora.rank, values["num_attention_heads"] * head)
    assert tensors[f"{layer}.o_proj.lora_B.weight"].shape == (width, lora.rank)
    assert all("/experts/" in name for name in without)
    assert bool(without) == any("/experts/" in name for name in adapted_weights(m.config))
    from anyexperts_jax.pretrained.write import _Tensors

    before, after = _Tensors.of(base), _Tensors.of(merge_adapter(m))
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            delta = lora.scale * tensors[f"{module}.lora_B.weight"] @ tensors[name]
            tensor = module.removeprefix("base_model.model.") + ".weight"
            np.testing.assert_allclose(after.value(tensor) - before.value(tensor), delta, atol=1e-6)
    m.export(tmp_path / "adapter", form="adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (lora.rank, lora.alpha, "LORA")
    assert len(settings["target_modules"]) == len(tensors) // 2


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("**/attentions/**",), "'**/attentions/**' matches no parameter; near it"),
        (("**/router/**",), "matches only parameters that take no adapter, as decoder/moe_layers/moe/router/kernel"),
        (("**/attention/*/kernel", "**/norm/**"), "'**/norm/**' matches only parameters that take no adapter"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_in_one_line(patterns, message):
    config = random_model(hub_values("qwen3_moe")).config
    config = dataclasses.replace(config, stack=dataclasses.replace(config.stack, lora=LoraConfig(patterns=patterns)))
    with pytest.raises(UserError) as error:
        require_adapted(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "stack.lora.rank=0 must be >= 1"),
        ({"alpha": 0.0}, "stack.lora.alpha=0.0 must be > 0"),
        ({"patterns": ()}, "stack.lora.patterns must hold patterns"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**fields)


def test_a_damaged_adapter_is_refused_in_one_line(tmp_path):
    base = random_model(hub_values("llama"))
    with_adapter(base, random_adapter(base, CASES["llama"])).export(tmp_path / "adapter", form="adapter")
    settings = tmp_path / "adapter" / "anyexperts_adapter.json"
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps({**told, "rank": 0}))
    with pytest.raises(UserError, match=r"anyexperts_adapter.json: stack.lora.rank=0"):
        read_adapter(tmp_path / "adapter")
    settings.write_text(json.dumps({**told, "patterns": ["**/attention/*/kernel"], "rank": 4}))
    with pytest.raises(UserError, match="the model wants"):
        with_adapter(base, read_adapter(tmp_path / "adapter"))
    settings.unlink()
    with pytest.raises(UserError, match=r"has no anyexperts_adapter\.json"):
        read_adapter(tmp_path / "adapter")
