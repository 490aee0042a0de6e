"""Ming-flash-omni's router per modality: on tokens of one modality the model equals a Ling with that router."""

import functools
import json

import jax
import numpy as np
import pytest

import anyexperts_jax as ax
from anyexperts_jax.core.batch import make_batch
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.models.multimodal import MultimodalModel
from anyexperts_jax.pretrained.random_model import random_model
from pretrained.tiny_hub import COMMON, GROUPED, random_tensors, tensors_in, write_checkpoint

pytest.importorskip("safetensors")
LING = {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe_v2", **COMMON, **GROUPED}
IN_SPACE = {"type": "video_rope", "mrope_section": [1, 1, 1], "factor": None}
MING = {**LING, "router_type": "MultiRouter", "rope_scaling": IN_SPACE}
GATES = {"text": "gate", "image": "image_gate", "audio": "audio_gate", "video": "image_gate"}
TOKENS_BT = np.random.default_rng(0).integers(0, 53, (2, 11))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "ming", MING, random_tensors(MING, seed=5))


@pytest.fixture(scope="module")
def ming(folder):
    return ax.load_pretrained(folder)


def as_ling(tensors, gate):
    """Returns the tensors of a Ling whose router is one of Ming's."""
    found = {}
    for name, value in tensors.items():
        own, _, last = name.rpartition("mlp.")
        if "gate." in name and not last.startswith("experts") and own and last.partition(".")[0] in GATES.values():
            router, _, what = last.partition(".")
            if router == gate:
                found[f"{own}mlp.gate.{what}"] = value
            continue
        found[name.replace("attention.q_norm", "attention.query_layernorm").replace("k_norm", "key_layernorm")] = value
    return found


def run(model, modality_BT):
    batch = make_batch(TOKENS_BT.astype(np.int32), modality_BT=modality_BT.astype(np.int32))
    return _run(model.config, model.params, batch, model.router_bias_LC)


@functools.partial(jax.jit, static_argnums=0)
def _run(config, params, batch, bias):
    return MultimodalModel(config).apply({"params": params}, batch, router_bias_LC=bias)


@pytest.mark.parametrize("kind", ["video", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("text", "audio"))])
def test_tokens_of_one_modality_use_its_router(tmp_path, folder, ming, kind):
    assert ming.router_bias_LC.shape == (2, 3, 8)
    ling = ax.load_pretrained(write_checkpoint(tmp_path / kind, LING, as_ling(tensors_in(folder), GATES[kind])))
    ours = run(ming, np.full(TOKENS_BT.shape, Modality[kind.upper()]))
    theirs = ling.forward(TOKENS_BT)
    np.testing.assert_allclose(ours.logits_BTY, theirs.logits_BTY, atol=2e-5)
    np.testing.assert_array_equal(ours.trace.expert_ids_BTK, theirs.trace.expert_ids_BTK)
    if kind == "text":  # prompts are text
        np.testing.assert_allclose(ming.logits(TOKENS_BT), theirs.logits_BTY, atol=2e-5)


def test_each_token_of_a_mixed_sequence_uses_its_own_router(ming):
    """Checked in the first MoE layer, whose input does not depend on the routers."""
    mixed_BT = np.random.default_rng(1).integers(0, 4, TOKENS_BT.shape)
    found = np.asarray(run(ming, mixed_BT).trace.expert_ids_BTK[0])
    for kind in Modality:
        alone = np.asarray(run(ming, np.full(TOKENS_BT.shape, kind)).trace.expert_ids_BTK[0])
        np.testing.assert_array_equal(found[mixed_BT == kind], alone[mixed_BT == kind])


def test_an_export_equals_the_checkpoint(tmp_path, folder, ming):
    ming.export(tmp_path / "out")
    before, after = tensors_in(folder), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["router_type"] == "MultiRouter"
    assert ax.load_pretrained(tmp_path / "out").config == ming.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_type": "Other"}, 'router_type=\'Other\' is not supported, only "topN", "MultiRouter"'),
        ({"moe_router_topk_scaling_factor": 3.0}, "routed_scaling_factor=2.5, moe_router_topk_scaling_factor=3.0"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported"),
    ],
)
def test_unsupported_configurations_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        random_model({**MING, **changes})


def test_the_scaling_factor_has_two_names():
    values = {key: value for key, value in MING.items() if key != "routed_scaling_factor"}
    assert random_model({**values, "moe_router_topk_scaling_factor": 3.0}).config.moe.scaling_factor == 3.0


def test_training_a_ming_checkpoint_is_refused(folder, tmp_path):
    from anyexperts_jax.tokenizers.train import train_tokenizer
    from anyexperts_jax.train.config import load_config

    values = {**MING, "vocab_size": 300}
    own = write_checkpoint(tmp_path / "ming", values, random_tensors(values))
    train_tokenizer(["a cat on the mat"], 280).save(own)
    with pytest.raises(UserError, match="bias_by_modality=True: the rule that balances the load"):
        load_config(own)
