import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.models.presets import static_twin
from models.small import SMALL, forward, loss_and_grad, random_batch, random_params, small, weights

TOLERANCE = 2e-5  # float32 sums in another order


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


@pytest.fixture(scope="module")
def output(params):
    return forward(SMALL)(params, random_batch())


def changed(batch, **fields):
    return dataclasses.replace(batch, **{k: np.asarray(v) for k, v in fields.items()})


def test_shapes_dtypes_and_finite_values(output):
    moe, layers = SMALL.moe, SMALL.stack.num_moe_layers
    assert output.logits_BTY.shape == (3, 22, SMALL.vocab_size)
    assert output.logits_BTY.dtype == jnp.float32
    assert bool(np.isfinite(output.logits_BTY).all())
    assert output.trace.importance_BT.shape == (layers, 3, 22)
    assert output.trace.expert_ids_BTK.shape == (layers, 3, 22, moe.slots_bound)
    assert output.trace.losses["balance"].shape == (layers,)
    assert output.trace.metrics["load_C"].shape == (layers, moe.num_columns)


def test_padding_holds_no_slots(output):
    batch = random_batch()
    slots = np.asarray(output.trace.slots_BT)
    assert (slots[:, ~batch.valid_BT] == 0).all()
    assert (slots[:, batch.valid_BT] >= SMALL.moe.k_min).all()
    assert (np.asarray(output.trace.expert_ids_BTK)[:, ~batch.valid_BT] == SMALL.moe.num_experts).all()


@pytest.mark.parametrize("t", [3, 8, 13])
def test_the_future_changes_nothing(params, output, t):
    batch, rng = random_batch(), np.random.default_rng(7)
    # Change everything that a later position holds: token, patch or frame, validity, modality.
    tokens_BT, modality_BT, valid_BT = batch.tokens_BT.copy(), batch.modality_BT.copy(), batch.valid_BT.copy()
    tokens_BT[:, t + 1 :] = rng.integers(0, 36, tokens_BT[:, t + 1 :].shape)
    modality_BT[:, t + 1 :] = 0
    valid_BT[2, t + 1 :] = ~valid_BT[2, t + 1 :] if t >= 6 else False
    visual, audio = np.isin(batch.modality_BT, (1, 3)), batch.modality_BT == 2
    patches_BPX, frames_BSX = batch.patches_BPX.copy(), batch.frames_BSX.copy()
    for b in range(3):
        patches_BPX[b, visual[b, : t + 1].sum() :] += 1.0
        frames_BSX[b, audio[b, : t + 1].sum() :] += 1.0
    other = changed(
        batch,
        tokens_BT=tokens_BT,
        modality_BT=modality_BT,
        valid_BT=valid_BT,
        patches_BPX=patches_BPX,
        frames_BSX=frames_BSX,
    )
    logits = forward(SMALL)(params, other).logits_BTY
    past = batch.valid_BT[:, : t + 1]
    np.testing.assert_array_equal(logits[:, : t + 1][past], output.logits_BTY[:, : t + 1][past])
    assert not np.allclose(logits[0, t + 1], output.logits_BTY[0, t + 1], atol=1e-3)


def test_more_padding_changes_nothing(params, output):
    longer = random_batch(total=24)
    batch = random_batch()
    padded = {
        name: np.pad(getattr(batch, name), ((0, 0), (0, 2)), constant_values=SMALL.pad_id if name == "tokens_BT" else 0)
        for name in vars(batch)
        if name.endswith("_BT")
    }
    result = forward(SMALL)(params, dataclasses.replace(longer, **{**vars(batch), **padded}))
    valid = batch.valid_BT
    np.testing.assert_allclose(result.logits_BTY[:, :22][valid], output.logits_BTY[valid], atol=TOLERANCE)
    for name, value in output.trace.losses.items():
        np.testing.assert_allclose(result.trace.losses[name], value, rtol=1e-5, err_msg=name)
    for name, value in output.trace.metrics.items():
        found = result.trace.metrics[name]
        if name.endswith("_N"):  # of every token
            found, value = (a.reshape(len(a), len(valid), -1)[:, :, :22][:, valid] for a in (found, value))
        np.testing.assert_allclose(found, value, rtol=1e-5, err_msg=name)


def test_what_padding_holds_changes_nothing(params, output):
    batch = random_batch()
    tokens_BT = np.where(batch.valid_BT, batch.tokens_BT, 3).astype(np.int32)
    other = forward(SMALL)(params, changed(batch, tokens_BT=tokens_BT))
    np.testing.assert_array_equal(other.logits_BTY[batch.valid_BT], output.logits_BTY[batch.valid_BT])
    for name, value in output.trace.losses.items():
        np.testing.assert_array_equal(other.trace.losses[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("name", "index", "position"),
    [
        ("patches_BPX", (0, 1), 2),
        ("frames_BSX", (0, 1), 5),
        ("patches_BPX", (0, 4), 7),
        ("patch_row_BP", (0, 4), 7),
        ("patch_column_BP", (0, 4), 7),
    ],
)
def test_each_row_reaches_its_own_position(params, output, name, index, position):
    # Sequence 0: image at positions 1..3 reads patch rows 0..2, audio at 4..5 frames 0..1, video at 6..9 rows 3..6.
    values = getattr(random_batch(), name).copy()
    values[index] += 1
    logits = forward(SMALL)(params, changed(random_batch(), **{name: values})).logits_BTY
    np.testing.assert_array_equal(logits[0, :position], output.logits_BTY[0, :position])
    assert not np.allclose(logits[0, position], output.logits_BTY[0, position], atol=1e-4)
    np.testing.assert_array_equal(logits[1:], output.logits_BTY[1:])


def test_video_time_is_seen(params, output):
    time_BT = random_batch().time_BT.copy()
    time_BT[0, 8:10] = 3
    logits = forward(SMALL)(params, changed(random_batch(), time_BT=time_BT)).logits_BTY
    np.testing.assert_array_equal(logits[0, :8], output.logits_BTY[0, :8])
    assert not np.allclose(logits[0, 8], output.logits_BTY[0, 8], atol=1e-4)


def test_rows_no_position_reads_change_nothing(params, output):
    batch = random_batch()
    patches_BPX, frames_BSX = batch.patches_BPX.copy(), batch.frames_BSX.copy()
    patches_BPX[0, 7:], patches_BPX[1], frames_BSX[:, 2:] = 9.0, 9.0, 9.0
    other = forward(SMALL)(params, changed(batch, patches_BPX=patches_BPX, frames_BSX=frames_BSX))
    np.testing.assert_array_equal(other.logits_BTY[batch.valid_BT], output.logits_BTY[batch.valid_BT])


def test_more_media_positions_than_rows_cannot_go_unnoticed(params):
    modality_BT = random_batch().modality_BT.copy()
    modality_BT[0, 4:14] = 1
    logits = forward(SMALL)(params, changed(random_batch(), modality_BT=modality_BT)).logits_BTY
    assert bool(np.isnan(logits[0]).any())


@pytest.mark.slow
def test_the_balance_loss_reaches_every_layers_router_through_the_scan(params):
    _, grads = loss_and_grad(SMALL)(params, random_batch(), weights(answer=0.0, importance=0.0))
    router = grads["decoder"]["moe_layers"]["moe"]["router"]
    assert bool((np.abs(router["kernel"]).max((1, 2)) > 1e-6).all())
    assert bool((np.abs(router["virtual_bias"]).max(1) > 1e-6).all())
    assert float(np.abs(grads["head"]["kernel"]).max()) == 0


def test_the_answer_reaches_every_parameter(params):
    _, grads = loss_and_grad(SMALL)(params, random_batch(), weights(balance=0.0, importance=0.0))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(np.isfinite(grad).all()), path
        assert float(np.abs(grad).max()) > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"


@pytest.mark.slow
def test_window_overrides_the_configuration(params):
    window = jnp.array([1.0, 2.0])
    trace = forward(SMALL)(params, random_batch(), None, window).trace
    valid = random_batch().valid_BT
    slots = np.asarray(trace.slots_BT)[:, valid]
    assert slots.min() >= 1
    assert slots.max() <= 2
    same = forward(small(moe={"k_min": 1, "k_max": 2}))(params, random_batch())
    overridden = forward(SMALL)(params, random_batch(), None, window)
    np.testing.assert_allclose(overridden.logits_BTY[valid], same.logits_BTY[valid], atol=TOLERANCE)


@pytest.mark.parametrize("dispatch", ["blocks", "capacity"])
def test_dispatch_forms_agree(params, output, dispatch):
    config = small(stack={"execution": Execution(dispatch, capacity_factor=4.0)})
    other = forward(config)(params, random_batch())
    assert float(other.trace.metrics["dropped"].sum()) == 0
    valid = random_batch().valid_BT
    np.testing.assert_allclose(other.logits_BTY[valid], output.logits_BTY[valid], atol=TOLERANCE)


def test_bfloat16_computes_and_keeps_routing_in_float32(params, output):
    other = forward(small(stack={"dtype": "bfloat16"}))(params, random_batch())
    assert other.logits_BTY.dtype == jnp.float32
    assert other.trace.importance_BT.dtype == jnp.float32
    error = np.abs(np.asarray(other.logits_BTY - output.logits_BTY))[random_batch().valid_BT]
    assert 0 < np.median(error) < 0.1
    assert np.isfinite(error).all()


def test_tied_head_shares_the_table():
    config = small(tie_embeddings=True)
    params = random_params(config)
    assert "head" not in params
    before = forward(config)(params, random_batch()).logits_BTY
    params["tokens"]["table"] = params["tokens"]["table"].at[38].add(1.0)  # a token the batch does not hold
    after = forward(config)(params, random_batch()).logits_BTY
    assert not np.allclose(before[..., 38], after[..., 38])
    np.testing.assert_array_equal(np.delete(before, 38, -1), np.delete(after, 38, -1))


def test_expert_bias_moves_the_ranking_and_is_required():
    config = small(moe={"expert_bias": True})
    params, batch = random_params(config), random_batch()
    bias_LC = jnp.zeros((2, 8)).at[:, 0].set(100.0)
    ids = np.asarray(forward(config)(params, batch, bias_LC).trace.expert_ids_BTK)
    assert (ids[:, batch.valid_BT] == 0).any(-1).all()
    with pytest.raises(UserError, match="bias_C"):
        forward(config)(params, batch)


def test_static_twin_runs_without_an_importance_network():
    twin = static_twin(SMALL, 3)
    params = random_params(twin)
    assert "importance" not in params["decoder"]["moe_layers"]["moe"]
    trace = forward(twin)(params, random_batch()).trace
    assert (np.asarray(trace.real_slots_BT)[:, random_batch().valid_BT] == 3).all()
    np.testing.assert_array_equal(trace.importance_BT, 0.5)
    np.testing.assert_array_equal(trace.losses["importance"], 0.0)


def test_a_fully_padded_batch_is_finite(params):
    batch = changed(random_batch(), valid_BT=np.zeros((3, 22), bool))
    (loss, output), grads = loss_and_grad(SMALL)(params, batch, weights())
    chex.assert_tree_all_finite((loss, output.logits_BTY, grads))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small(max_length=21), "22 positions, more than max_length=21"),
        (small(vision=dataclasses.replace(SMALL.vision, patch_features=27)), "12 features, vision.patch_features=27"),
        (small(audio=dataclasses.replace(SMALL.audio, frame_features=8)), "10 features, audio.frame_features=8"),
        (small(vision=None), "no vision encoder"),
        (small(audio=None), "no audio encoder"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(forward(config), random_params(config), random_batch())
