"""The router and experts of a LongCat-Flash layer: equal to transformers', and refused if they do not fit."""

import json

import numpy as np
import pytest

from anyexperts_jax import MoE, load_pretrained
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.pretrained.longcat_flash import load_mixture
from pretrained.tiny_hub import write_checkpoint

pytest.importorskip("safetensors")
D, F, E, ZERO = 16, 12, 5, 3
VALUES = {
    "architectures": ["LongcatFlashForCausalLM"],
    "hidden_size": D,
    "expert_ffn_hidden_size": F,
    "n_routed_experts": E,
    "zero_expert_num": ZERO,
    "zero_expert_type": "identity",
    "moe_topk": 3,
    "num_layers": 2,
    "routed_scaling_factor": 6.0,
}


def tensors(layer=1):
    rng, prefix = np.random.default_rng(0), f"model.layers.{layer}.mlp."
    shapes = {"router.classifier.weight": (E + ZERO, D), "router.e_score_correction_bias": (E + ZERO,)}
    for e in range(E + ZERO):
        for name in ("gate_proj", "up_proj", *(("down_proj",) if e < E else ())):
            shapes[f"experts.{e}.{name}.weight"] = (D, F) if name == "down_proj" else (F, D)
    other = {"model.layers.1.mlps.0.gate_proj.weight": (24, D)}  # a dense FFN beside the MoE block
    named = {**{prefix + name: shape for name, shape in shapes.items()}, **other}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in named.items()}


def test_a_layer_is_read(tmp_path):
    found = load_mixture(write_checkpoint(tmp_path / "hub", VALUES, tensors()), 1)
    own = tensors()
    np.testing.assert_array_equal(
        found.params["router"]["kernel"], own["model.layers.1.mlp.router.classifier.weight"].T
    )
    np.testing.assert_array_equal(
        found.params["experts"]["w_down_EFD"][4], own["model.layers.1.mlp.experts.4.down_proj.weight"].T
    )
    assert found.params["experts"]["w_up_EDF"].shape == (E, D, F)
    switches = found.config.switches
    assert (found.config.scaling_factor, found.config.k_max, found.config.num_virtual) == (6.0, 3, ZERO)
    assert (switches.virtual_output, switches.cap_rounding, switches.normalisation) == ("identity", "off", "none")


@pytest.mark.parametrize(
    ("changes", "missing", "layer", "message"),
    [
        ({"zero_expert_type": "copy"}, None, 1, "zero_expert_type='copy' is not supported"),
        ({"router_bias": True}, None, 1, "router_bias=True is not supported"),
        ({"architectures": ["LlamaForCausalLM"]}, None, 1, "must be"),
        ({"n_routed_experts": 6, "zero_expert_num": 2}, None, 1, "experts.5.down_proj.weight"),
        ({}, "experts.3.up_proj.weight", 1, "experts.3.up_proj.weight"),
        ({}, None, 2, "layer 2 is not among its 2"),
        ({}, None, 0, "do not fit config.json: model.layers.0.mlp"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(tmp_path, changes, missing, layer, message):
    own = {name: value for name, value in tensors().items() if missing is None or not name.endswith(missing)}
    folder = write_checkpoint(tmp_path / "hub", {**VALUES, **changes}, own)
    with pytest.raises(UserError, match=message) as error:
        load_mixture(folder, layer)
    assert "\n" not in str(error.value)


def test_the_whole_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="class LongcatFlashForCausalLM is not supported"):
        load_pretrained(write_checkpoint(tmp_path / "hub", VALUES, tensors()))


@pytest.mark.parity
def test_a_layer_equals_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "q_lora_rank": 6, "kv_lora_rank": 6, "qk_nope_head_dim": 4}
    heads |= {"qk_rope_head_dim": 4, "v_head_dim": 4, "head_dim": 4}
    sizes = {key: value for key, value in VALUES.items() if key not in ("architectures", "zero_expert_type")}
    config = transformers.LongcatFlashConfig(**sizes, **heads, vocab_size=40, ffn_hidden_size=20)
    theirs = transformers.LongcatFlashForCausalLM(config).eval()
    layer = theirs.model.layers[1].mlp
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
        layer.router.e_score_correction_bias.normal_(std=0.05)
    theirs.save_pretrained(tmp_path / "hub")
    saved = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert saved["architectures"] == VALUES["architectures"]
    found = load_mixture(tmp_path / "hub", 1)
    x_BTD = np.random.default_rng(1).normal(size=(2, 30, D)).astype(np.float32)
    y_BTD, trace = MoE(found.config, found.d_ff).apply({"params": found.params}, x_BTD, bias_C=found.bias_C)
    with torch.no_grad():
        expected_BTD = layer(torch.tensor(x_BTD)).numpy()
    np.testing.assert_allclose(y_BTD, expected_BTD, atol=2e-5)
    assert len(np.unique(trace.real_slots_BT)) > 1
