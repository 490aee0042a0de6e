"""Variable slots attached to a published model: the base's logits bit for bit at first, and its weights back later."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anyexperts_jax as ax
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.init import named_leaves
from anyexperts_jax.pretrained.attach import attach, detach
from pretrained.tiny_hub import tiny_checkpoint

pytest.importorskip("safetensors")
TOKENS_BT = np.random.default_rng(0).integers(0, 53, (3, 31))
CASES = {  # window and virtual experts for the base's own number of experts
    "qwen3_moe": (2, 5, 3),
    "qwen3_moe raw weights": (3, 5, 4),
    "mixtral": (1, 4, 2),
    "sarvam_moe": (3, 4, 6),
}


SLOW = ("qwen3_moe raw weights", "sarvam_moe")


@pytest.fixture(scope="module", params=[pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def case(request, tmp_path_factory):
    base = ax.load_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("hub") / "base", request.param, seed=7))
    k_min, k_max, num_virtual = CASES[request.param]
    return base, attach(base, k_min=k_min, k_max=k_max, num_virtual=num_virtual)


def test_the_first_forward_pass_equals_the_bases_bit_for_bit(case):
    base, attached = case
    valid_BT = np.arange(31) < np.array([31, 12, 1])[:, None]
    ours, theirs = attached.forward(TOKENS_BT, valid_BT), base.forward(TOKENS_BT, valid_BT)
    np.testing.assert_array_equal(ours.logits_BTY, theirs.logits_BTY)
    width = base.config.moe.slots_bound
    np.testing.assert_array_equal(ours.trace.expert_ids_BTK[..., :width], theirs.trace.expert_ids_BTK)
    assert int(ours.trace.virtual_slots_BT.sum()) == 0


def test_detach_returns_the_bases_weights(case):
    base, attached = case
    back = detach(attached)
    assert back.config == base.config
    found, expected = named_leaves(back.params), named_leaves(base.params)
    assert found.keys() == expected.keys()
    assert all(found[name] is expected[name] for name in expected)
    if base.router_bias_LC is not None:
        np.testing.assert_array_equal(back.router_bias_LC, base.router_bias_LC)


def loss_of(model, params):
    """Next-token loss and the auxiliary losses at their weights."""
    from anyexperts_jax.core.batch import make_batch
    from anyexperts_jax.models.multimodal import MultimodalModel

    moe = model.config.moe
    batch = make_batch(jnp.asarray(TOKENS_BT, jnp.int32))
    output = MultimodalModel(model.config).apply({"params": params}, batch, router_bias_LC=model.router_bias_LC)
    logs_BTY = jax.nn.log_softmax(output.logits_BTY[:, :-1])
    task = -jnp.take_along_axis(logs_BTY, TOKENS_BT[:, 1:, None], axis=-1).mean()
    losses = {name: loss.sum() for name, loss in output.trace.losses.items()}
    return task + moe.balance_weight * losses["balance"] + moe.importance_weight * losses["importance"]


@pytest.mark.slow
def test_two_training_steps_move_every_new_parameter(tmp_path):
    base = ax.load_pretrained(tiny_checkpoint(tmp_path / "hub", "qwen3_moe", seed=7))
    model = attach(base, k_min=2, k_max=5, num_virtual=3)
    gradient = jax.jit(jax.grad(lambda params: loss_of(model, params)))
    params = model.params
    for rate in (0.01, 0.006):  # unequal, so that no two steps cancel
        step = gradient(params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step))
        # Signs alone, as Adam's first steps have them.
        params = jax.tree.map(lambda p, g, rate=rate: p - rate * jnp.sign(g).astype(p.dtype), params, step)
    before, after = named_leaves(model.params), named_leaves(params)
    new = [name for name in before if name not in named_leaves(base.params)]
    assert {name.rsplit("moe/", 1)[1] for name in new} >= {
        "strength",
        "importance/out/kernel",
        "importance/out/bias",
        "router/virtual_kernel",
        "router/virtual_bias",
    }
    for name in new:
        moved = (
            np.abs(np.asarray(after[name]) - np.asarray(before[name])).reshape(before[name].shape[0], -1).max(axis=1)
        )
        assert (moved > 0).all(), name
    trained = dataclasses.replace(model, params=params)
    assert not np.array_equal(trained.logits(TOKENS_BT), base.logits(TOKENS_BT))


def test_with_the_papers_start_virtual_experts_compete_at_once(tmp_path):
    base = ax.load_pretrained(tiny_checkpoint(tmp_path / "hub", "qwen3_moe", seed=7))
    paper = ax.attach(base, k_min=2, k_max=5, num_virtual=3, preserve=False)
    trace = paper.forward(TOKENS_BT).trace
    np.testing.assert_array_equal(trace.importance_BT, 0.5)
    assert int(trace.virtual_slots_BT.sum()) > 0
    assert "decoder/moe_layers/moe/strength" not in named_leaves(paper.params)


def test_models_and_windows_that_do_not_fit_are_refused(tmp_path):
    base = ax.load_pretrained(tiny_checkpoint(tmp_path / "moe", "qwen3_moe"))
    with pytest.raises(UserError, match="k_min=4, k_max=6 never gives the 3 experts"):
        attach(base, k_min=4, k_max=6, num_virtual=2)
    with pytest.raises(UserError, match="can need 8 of 7 experts in reach"):
        attach(base, k_min=2, k_max=8, num_virtual=4)
    with pytest.raises(UserError, match="has variable slots already"):
        attach(attach(base, k_min=2, k_max=4), k_min=2, k_max=4)
    with pytest.raises(UserError, match="no attached slots"):
        detach(base)
    with pytest.raises(UserError, match="the model is dense"):
        attach(ax.load_pretrained(tiny_checkpoint(tmp_path / "dense", "llama")), k_min=1, k_max=2)
