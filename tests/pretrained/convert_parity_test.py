"""Exports of conversions and upcycling, loaded by transformers' own classes: equal logits, the same experts chosen."""

import dataclasses

import numpy as np
import pytest

import anyexperts_jax as ax
from anyexperts_jax.pretrained.random_model import random_model
from anyexperts_jax.pretrained.zeda import uncapped
from pretrained.tiny_hub import hub_values, tensors_in, write_checkpoint
from pretrained.zeda_test import widened, zeda_values

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
TOKENS_BT = np.random.default_rng(0).integers(0, 53, (2, 19))


def theirs(folder):
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model, model(torch.tensor(TOKENS_BT)).logits.numpy()


def close(ours_BTY, theirs_BTY):
    np.testing.assert_allclose(np.asarray(ours_BTY), theirs_BTY, rtol=1e-4, atol=1e-4)


def test_transformers_reads_a_plain_export(tmp_path):
    slots = ax.attach(random_model(hub_values("qwen3_moe")), k_min=2, k_max=4, num_virtual=3, preserve=False)
    slots.export(tmp_path / "plain", "plain", experts=2)
    model, expected_BTY = theirs(tmp_path / "plain")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.config.num_experts_per_tok == 2
    close(ax.load_pretrained(tmp_path / "plain").logits(TOKENS_BT), expected_BTY)
    assert np.abs(np.asarray(slots.logits(TOKENS_BT)) - expected_BTY).max() > 1e-3  # another function


def test_zeda_equals_transformers_with_experts_of_zero_weights(tmp_path):
    """transformers lacks ZEDA's class, but an expert whose weights are all zero returns what a zero expert does."""
    slots = ax.attach(random_model(hub_values("qwen3_moe")), k_min=3, k_max=3, num_virtual=5, preserve=False)
    how = {"iar": "off", "hsm_site": "off", "virtual_output": "zero", **uncapped(7, 5)}
    moe = dataclasses.replace(slots.config.moe, **how)
    model = dataclasses.replace(slots, config=dataclasses.replace(slots.config, moe=moe))
    model.export(tmp_path / "zeda", "zeda")
    values, tensors = widened(zeda_values(), tensors_in(tmp_path / "zeda"))
    _, expected_BTY = theirs(write_checkpoint(tmp_path / "wide", values, tensors))
    close(ax.load_pretrained(tmp_path / "zeda").logits(TOKENS_BT), expected_BTY)
    close(model.logits(TOKENS_BT), expected_BTY)


@pytest.mark.parametrize(("case", "cls"), [("llama", "MixtralForCausalLM"), ("qwen3", "Qwen3MoeForCausalLM")])
def test_transformers_reads_an_upcycled_model(tmp_path, case, cls):
    dense = random_model(hub_values(case))
    ax.upcycle(dense, num_experts=5, init="noise").export(tmp_path / "mixture")
    model, expected_BTY = theirs(tmp_path / "mixture")
    assert type(model).__name__ == cls
    close(ax.load_pretrained(tmp_path / "mixture").logits(TOKENS_BT), expected_BTY)
    ax.upcycle(dense, num_experts=5).export(tmp_path / "copies")
    close(dense.logits(TOKENS_BT), theirs(tmp_path / "copies")[1])
