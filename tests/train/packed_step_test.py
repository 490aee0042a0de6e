"""A packed batch trains like its examples in separate rows: losses, routing, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.small import FAST_COMPILE, random_params

from anyexperts_jax.data.batches import stack
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.domain import DOMAIN_NAMES, domain
from anyexperts_jax.data.encode import encode_example
from anyexperts_jax.data.packing import pack
from anyexperts_jax.data.sequence import Size, padded
from anyexperts_jax.models.presets import model_preset
from anyexperts_jax.train.objective import batch_sums
from anyexperts_jax.train.state import TrainState
from anyexperts_jax.train.step import accumulate, model_apply
from train.stand_in import linear_apply

ALONE = EncodingSpec(max_length=88, max_patches=64, max_frames=64)  # as configs/tiny.toml has it
ROW = EncodingSpec(max_length=264, max_patches=192, max_frames=128)


def five_domains(each=2):
    examples = [domain(name).example("train", i, 0, (1,)) for i in range(each) for name in DOMAIN_NAMES]
    return [encode_example(example, ROW, example_index=i) for i, example in enumerate(examples)]


def batches(sequences):
    """The same examples one per row, and packed with a single open row, which keeps their order."""
    packed = list(pack(sequences, Size.of_row(ROW), window=1))
    assert len(packed) < len(sequences) / 2
    return stack([padded(one, ALONE) for one in sequences]), stack([padded(row, ROW) for row in packed])


@pytest.mark.slow
def test_packing_the_five_domains_does_not_change_a_step_of_tiny():
    """Uses `blocks`, which drops nothing, and a layer in each encoder, in which media could attend to one another."""
    tiny = model_preset("tiny")
    config = dataclasses.replace(
        tiny,
        max_length=ROW.max_length,
        vision=dataclasses.replace(tiny.vision, num_layers=1),
        audio=dataclasses.replace(tiny.audio, num_layers=1),
    )
    assert config.stack.execution.dispatch == "blocks"
    state = TrainState(jnp.int32(0), random_params(config), None, jnp.zeros(config.router_bias_shape))

    def step(batch):
        run = jax.jit(
            lambda state, batch: accumulate(model_apply(config), config.moe, 1, state, batch, jax.random.key(0)),
            compiler_options=FAST_COMPILE,
        )
        return jax.device_get(run(state, batch))

    alone, packed = batches(five_domains())
    grads, sums, losses = step(alone)
    packed_grads, packed_sums, packed_losses = step(packed)
    assert sums.answers == packed_sums.answers == 10
    assert sums.exact_answers == packed_sums.exact_answers
    assert sums.answer_tokens == packed_sums.answer_tokens
    assert sums.routing.dropped_L.sum() == packed_sums.routing.dropped_L.sum() == 0
    for name in ("tokens_M", "real_slots_LM", "virtual_slots_LM", "load_LC", "histogram"):
        ours, theirs = getattr(packed_sums.routing, name), getattr(sums.routing, name)
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert packed_losses.keys() == losses.keys()
    for name, value in losses.items():
        np.testing.assert_allclose(packed_losses[name], value, rtol=2e-5, err_msg=name)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(packed_grads), jax.tree.leaves(grads), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * scale, err_msg=jax.tree_util.keystr(path))


def test_answers_are_counted_by_example_and_not_by_row():
    sequences = five_domains(each=1)
    alone, packed = batches(sequences)
    table = np.zeros((260, 260), np.float32)
    one = next(s for s in sequences if (s.modality_T == 0).all())
    answer = np.flatnonzero(one.loss_mask_T)
    table[one.tokens_T[answer], one.tokens_T[answer + 1]] = 9.0  # a bigram model that knows one answer

    @jax.jit
    def sums(batch):
        logits, trace = linear_apply({"table": jnp.asarray(table)}, batch, None, None, None)
        return batch_sums(logits, trace, batch)

    expected, found = sums(alone), sums(packed)
    assert expected.answers == 5
    assert 0 < expected.exact_answers < 5
    for name in ("answer_tokens", "correct_tokens", "exact_answers", "answers"):
        assert getattr(found, name) == getattr(expected, name), name
    np.testing.assert_allclose(found.answer_loss, expected.answer_loss, rtol=1e-5)
