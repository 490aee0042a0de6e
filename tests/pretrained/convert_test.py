"""Conversions of models with variable slots: plain changes the function and says so, zeda is exact or refused."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import anyexperts_jax as ax
from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import named_leaves, params_of_leaves
from anyexperts_jax.pretrained.calibration import calibration_tokens
from anyexperts_jax.pretrained.convert import as_longcat, as_plain, as_zeda, longcat_obstacles
from anyexperts_jax.pretrained.difference import difference
from anyexperts_jax.pretrained.random_model import random_model
from anyexperts_jax.pretrained.zeda import uncapped
from pretrained.tiny_hub import hub_values

pytest.importorskip("safetensors")
TINY = {"num_hidden_layers": 2, "max_position_embeddings": 16}
TOKENS_BT = np.random.default_rng(0).integers(
    0, 53, (1, 16)
)  # the shape that a card uses, so that no other program is compiled
BIAS = "decoder/moe_layers/moe/router/virtual_bias"


@pytest.fixture(scope="module")
def base():
    return random_model(hub_values("qwen3_moe", **TINY))


@pytest.fixture(scope="module")
def slots(base):
    return ax.attach(base, k_min=2, k_max=4, num_virtual=4, preserve=False)


def zero_experts(slots, output="zero", **changes):
    """Returns the model with virtual experts that behave like ZEDA's."""
    moe = dataclasses.replace(
        slots.config.moe,
        k_min=3,
        k_max=3,
        **{"iar": "off", "hsm_site": "off", "virtual_output": output, **uncapped(7, 4), **changes},
    )
    leaves = named_leaves(slots.params)
    leaves[BIAS] = jnp.zeros_like(leaves[BIAS])
    return dataclasses.replace(
        slots, config=dataclasses.replace(slots.config, moe=moe), params=params_of_leaves(slots.config, leaves)
    )


@pytest.mark.slow
def test_plain_is_the_static_model_and_its_card_has_the_difference(tmp_path, base, slots, capsys):
    slots.export(tmp_path / "slots", "anyexperts")
    command = ["export", str(tmp_path / "slots"), str(tmp_path / "plain"), "--as", "plain"]
    assert main(command) == 0, capsys.readouterr().err
    plain = ax.load_pretrained(tmp_path / "plain")
    assert plain.config.moe == base.config.moe
    np.testing.assert_array_equal(plain.logits(TOKENS_BT), base.logits(TOKENS_BT))
    found = difference(slots, plain, calibration_tokens(slots, None, 0))
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "**This does not compute the same function.**" in card
    assert "2 to 4 slots, of which up to 1 are virtual" in card
    assert found.largest_logit > 0.01
    for figure in (f"{found.largest_logit:.3g}", f"{found.mean_kl:.3g} nats", *(f"{p:.4f}" for p in found.perplexity)):
        assert figure in card
    assert f"| {found.experts[0]:.3f} | 3.000 |" in card


def test_difference_follows_its_definition(base, slots):
    found = difference(base, slots, TOKENS_BT)
    first, second = (np.asarray(model.logits(TOKENS_BT), np.float64) for model in (base, slots))
    logs = [one - np.log(np.exp(one).sum(axis=-1, keepdims=True)) for one in (first, second)]
    nats = [-np.take_along_axis(one[:, :-1], TOKENS_BT[:, 1:, None], axis=-1).mean() for one in logs]
    assert found.tokens == TOKENS_BT.size
    np.testing.assert_allclose(found.largest_logit, np.abs(first - second).max(), rtol=1e-5)
    np.testing.assert_allclose(found.mean_kl, (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean(), rtol=1e-3)
    np.testing.assert_allclose(found.perplexity, np.exp(nats), rtol=1e-5)


def test_plain_with_another_number_of_experts(tmp_path, slots):
    slots.export(tmp_path / "out", "plain", experts=2)
    read = ax.load_pretrained(tmp_path / "out")
    assert (read.config.moe.k_min, read.config.moe.k_max, read.config.moe.num_virtual) == (2, 2, 0)
    with pytest.raises(UserError, match="k_max=9"):
        as_plain(slots, 9)


@pytest.mark.parametrize("output", ["zero", pytest.param("identity", marks=pytest.mark.slow)])
def test_zeda_computes_the_same_function(tmp_path, slots, output):
    model = zero_experts(slots, output)
    model.export(tmp_path / "zeda", "zeda")
    read = ax.load_pretrained(tmp_path / "zeda")
    assert read.family == "zeda"
    assert read.config.moe.switches.virtual_output == output
    ours, theirs = model.forward(TOKENS_BT), read.forward(TOKENS_BT)
    np.testing.assert_allclose(theirs.logits_BTY, ours.logits_BTY, atol=1e-5)
    np.testing.assert_array_equal(theirs.trace.expert_ids_BTK, ours.trace.expert_ids_BTK)
    assert int(ours.trace.virtual_slots_BT.sum()) > 0
    card = (tmp_path / "zeda" / "README.md").read_text()
    assert "**This is the same function**" in card
    assert "`Qwen3MoePlusPlusForCausalLM`" in card
    back = as_plain(read)
    assert back.family == "qwen3_moe"
    assert back.hub.values["architectures"] == ["Qwen3MoeForCausalLM"]


OBSTACLES = [
    ({"k_min": 2, "k_max": 4}, "a token gets 2 to 4 slots by its importance"),
    ({"iar": "add"}, r"importance tilts its scores \(iar=add\)"),
    ({"hsm_site": "block_input"}, "importance modulates its hidden states"),
    ({"cap_rounding": "round", "rho_max": 0.2}, "at most 1 of 3 slots may be virtual"),
    ({"normalisation": "real"}, "normalised otherwise"),
    ({"scores": "sigmoid"}, "its scores are a sigmoid"),
    ({"scaling_factor": 2.5}, "multiplied by 2.5"),
    ({"expert_bias": True}, "an expert bias takes part"),
]


@pytest.mark.parametrize(("changes", "message"), OBSTACLES)
def test_what_zeda_cannot_express_is_refused_with_reasons(slots, changes, message):
    model = zero_experts(slots)
    moe = dataclasses.replace(model.config.moe, **changes)
    with pytest.raises(UserError, match=message) as error:
        as_zeda(dataclasses.replace(model, config=dataclasses.replace(model.config, moe=moe)))
    assert "\n" not in str(error.value)
    assert ";" not in str(error.value)


def test_weights_that_zeda_cannot_express_are_refused(base, slots):
    model = zero_experts(slots)
    free = zero_experts(slots, virtual_logits="free")
    assert as_zeda(free).family == "zeda"
    biased = params_of_leaves(free.config, {**named_leaves(model.params), BIAS: jnp.ones((2, 4))})
    with pytest.raises(UserError, match="its virtual columns have biases"):
        as_zeda(dataclasses.replace(free, params=biased))
    preserved = ax.attach(base, k_min=3, k_max=3, num_virtual=4)
    with pytest.raises(UserError, match="scaled by each layer's strength"):
        as_zeda(preserved)


def test_dense_split_and_static_models_are_refused(base, slots):
    with pytest.raises(UserError, match="gives every token this number of experts already"):
        as_plain(base)
    with pytest.raises(UserError, match="it has no virtual experts"):
        as_zeda(base)
    dense = random_model(hub_values("llama", **TINY))
    with pytest.raises(UserError, match="the model is dense"):
        as_plain(dense)
    with pytest.raises(UserError, match="merge it first"):
        as_plain(ax.split(dense, num_experts=4))
    with pytest.raises(UserError, match=r"^as longcat: .* its layers are those of qwen3_moe"):
        as_longcat(slots)
    unnormalised = zero_experts(slots, "identity", normalisation="none", scaling_factor=6.0)
    assert longcat_obstacles(unnormalised) == []


def test_form_hub_refuses_routing_that_config_json_cannot_describe(tmp_path, base):
    moe = dataclasses.replace(base.config.moe, k_min=2, k_max=2, balance_weight=0.5)
    changed = dataclasses.replace(base, config=dataclasses.replace(base.config, moe=moe))
    with pytest.raises(UserError, match=re.escape("how the model routes: k_min=2, not 3; k_max=2, not 3; use form=")):
        changed.export(tmp_path / "out")
    trained = dataclasses.replace(base.config.moe, balance_weight=0.5)
    dataclasses.replace(base, config=dataclasses.replace(base.config, moe=trained)).export(tmp_path / "same")


def test_options_of_other_forms_are_refused(tmp_path, base, capsys):
    with pytest.raises(UserError, match="experts is for form='plain', not 'hub'"):
        base.export(tmp_path / "out", experts=2)
    with pytest.raises(UserError, match="text is for form=plain, zeda, longcat, not 'hub'"):
        base.export(tmp_path / "out", text="words")
    with pytest.raises(SystemExit):
        main(["export", "a", "b", "--as", "plain", "--form", "anyexperts"])
    assert "not allowed with argument" in capsys.readouterr().err
