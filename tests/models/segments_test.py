"""Several examples in a row, several media in an example: each gives what it would give alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.batches import stack
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.sequence import MediaPart, TokenPart, assemble, concatenate, padded
from anyexperts_jax.models.generate import generate
from anyexperts_jax.models.multimodal import MultimodalModel
from models.small import FAST_COMPILE, SMALL, forward, random_params, small

SPEC = EncodingSpec(max_length=32, patch_size=2, max_patches=20, mel_bands=10, frames_per_chunk=1, max_frames=8)
ALONE = dataclasses.replace(SPEC, max_length=18)
CONFIG = small(  # with encoders in which rows see one another
    vocab_size=260,
    pad_id=256,
    eos_id=259,
    max_length=SPEC.max_length,
    vision=dataclasses.replace(SMALL.vision, num_layers=1),
    audio=dataclasses.replace(SMALL.audio, num_layers=1),
)
TOLERANCE = 2e-5  # float32 sums in another order


def visual(rng, frames, rows, columns):
    place = np.unravel_index(np.arange(frames * rows * columns), (frames, rows, columns))
    features = rng.normal(size=(len(place[0]), 12)).astype(np.float32)
    modality = Modality.IMAGE if frames == 1 else Modality.VIDEO
    return MediaPart(modality, features, np.zeros(len(features), bool), *place)


def sound(rng, chunks):
    features, nowhere = rng.normal(size=(chunks, 10)).astype(np.float32), np.zeros(chunks, int)
    return MediaPart(Modality.AUDIO, features, nowhere > 0, np.arange(chunks), nowhere, nowhere)


@functools.cache
def sequences():
    """Two pictures; a picture and two sounds; text; a video."""
    rng = np.random.default_rng(0)
    text = lambda length, **how: TokenPart(rng.integers(0, 256, length).tolist(), **how)  # noqa: E731
    media = [
        [visual(rng, 1, 2, 2), text(1), visual(rng, 1, 1, 3)],
        [visual(rng, 1, 1, 2), sound(rng, 3), text(2), sound(rng, 2)],
        [],
        [visual(rng, 2, 2, 1)],
    ]
    return [assemble([text(1), *parts, text(2), text(3, in_loss=True)], SPEC) for parts in media]


def unpacked():
    return stack([padded(one, ALONE) for one in sequences()])


def packed(rows=((0, 1), (2, 3))):
    return stack([padded(concatenate([sequences()[i] for i in row]), SPEC) for row in rows])


@functools.cache
def params():
    return random_params(CONFIG)


def test_packed_examples_have_their_losses_and_plans():
    """The valid tokens of both batches are the same ones in the same order. Gradients: train/packed_step_test.py."""
    alone, together = unpacked(), packed()
    expected, found = (forward(CONFIG)(params(), batch) for batch in (alone, together))
    logits = found.logits_BTY[together.valid_BT]
    np.testing.assert_allclose(logits, expected.logits_BTY[alone.valid_BT], atol=TOLERANCE)
    for name in ("expert_ids_BTK", "slots_BT", "real_slots_BT", "virtual_slots_BT"):
        ours, theirs = getattr(found.trace, name), getattr(expected.trace, name)
        np.testing.assert_array_equal(ours[:, together.valid_BT], theirs[:, alone.valid_BT], err_msg=name)
    for name, value in expected.trace.losses.items():
        np.testing.assert_allclose(found.trace.losses[name], value, rtol=1e-5, err_msg=name)
    for name in ("load_C", "router_entropy"):
        np.testing.assert_allclose(found.trace.metrics[name], expected.trace.metrics[name], rtol=1e-5, err_msg=name)


def changed_in(batch, row, segment):
    """The batch with every token, patch and frame of a segment changed."""
    here_T = (batch.segment_BT[row] == segment) & batch.valid_BT[row]
    modality_T = batch.modality_BT[row]
    tokens_BT = np.where(np.arange(len(batch.tokens_BT))[:, None] == row, batch.tokens_BT, -1)
    text_BT = (tokens_BT >= 0) & here_T & (modality_T == Modality.TEXT)
    patches_BPX, frames_BSX = batch.patches_BPX.copy(), batch.frames_BSX.copy()
    visual_T, audio_T = np.isin(modality_T, (Modality.IMAGE, Modality.VIDEO)), modality_T == Modality.AUDIO
    patches_BPX[row, : visual_T.sum()][here_T[visual_T]] += 1.0
    frames_BSX[row, : audio_T.sum()][here_T[audio_T]] += 1.0
    return dataclasses.replace(
        batch,
        tokens_BT=np.where(text_BT, (batch.tokens_BT + 1) % 256, batch.tokens_BT).astype(np.int32),
        patches_BPX=patches_BPX,
        frames_BSX=frames_BSX,
    )


@pytest.mark.parametrize(("row", "segment"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_segment_changes_no_other_ones_outputs(row, segment):
    batch = packed()
    before = forward(CONFIG)(params(), batch)
    after = forward(CONFIG)(params(), changed_in(batch, row, segment))
    own_BT = batch.valid_BT & (batch.segment_BT == segment) & (np.arange(2) == row)[:, None]
    others_BT = batch.valid_BT & ~own_BT
    np.testing.assert_array_equal(after.logits_BTY[others_BT], before.logits_BTY[others_BT])
    for name in ("importance_BT", "expert_ids_BTK"):
        ours, theirs = getattr(after.trace, name), getattr(before.trace, name)
        np.testing.assert_array_equal(ours[:, others_BT], theirs[:, others_BT], err_msg=name)
    moved_BT = np.abs(np.asarray(after.logits_BTY - before.logits_BTY)).max(-1) > 1e-4
    assert moved_BT[own_BT].all()


@pytest.mark.parametrize("t", [4, 10, 16, 21])  # where no picture and no sound is cut in two
def test_the_future_changes_nothing_in_a_packed_row(t):
    """Changes everything that a later position holds: its token, its patch or frame, its validity, its segment."""
    batch = packed(rows=((0, 1), (3, 2)))
    later_BT = np.arange(SPEC.max_length)[None] > t
    patches_BPX, frames_BSX = batch.patches_BPX.copy(), batch.frames_BSX.copy()
    for b, modality_T in enumerate(batch.modality_BT):
        patches_BPX[b, np.isin(modality_T[: t + 1], (Modality.IMAGE, Modality.VIDEO)).sum() :] += 1.0
        frames_BSX[b, (modality_T[: t + 1] == Modality.AUDIO).sum() :] += 1.0
    other = dataclasses.replace(
        batch,
        tokens_BT=np.where(later_BT, (batch.tokens_BT + 3) % 256, batch.tokens_BT).astype(np.int32),
        valid_BT=np.where(later_BT, ~batch.valid_BT, batch.valid_BT),
        segment_BT=np.where(later_BT, batch.segment_BT // 2, batch.segment_BT).astype(np.int32),
        position_BT=np.where(later_BT, batch.position_BT + 1, batch.position_BT).astype(np.int32),
        patches_BPX=patches_BPX,
        frames_BSX=frames_BSX,
    )
    before, after = (forward(CONFIG)(params(), one).logits_BTY for one in (batch, other))
    past_BT = batch.valid_BT & ~later_BT
    assert past_BT.any(axis=1).all()
    np.testing.assert_array_equal(after[past_BT], before[past_BT])
    assert not np.allclose(after[0, t + 1], before[0, t + 1], atol=1e-3)


@functools.cache
def embed(config=CONFIG):
    run = lambda params, batch: MultimodalModel(config).apply({"params": params}, batch, method="embed")  # noqa: E731
    return functools.partial(jax.jit(run, compiler_options=FAST_COMPILE), random_params(config))


@pytest.mark.parametrize(
    ("name", "items"), [("patches_BPX", "patch_item_BP"), ("frames_BSX", "frame_item_BS")], ids=["pictures", "sounds"]
)
def test_media_of_one_example_do_not_see_one_another_in_the_encoders(name, items):
    batch = stack([padded(one, SPEC) for one in sequences()[:2]])
    kinds = (Modality.IMAGE,) if name == "patches_BPX" else (Modality.AUDIO,)
    b = 0 if name == "patches_BPX" else 1  # the sequence that has two of the kind
    positions = np.flatnonzero(np.isin(batch.modality_BT[b], kinds))
    item_R = getattr(batch, items)[b, : len(positions)]
    before = embed()(batch)
    for item in np.unique(item_R):
        features = getattr(batch, name).copy()
        features[b, np.flatnonzero(item_R == item)[0]] += 1.0
        after = embed()(dataclasses.replace(batch, **{name: features}))
        moved = np.abs(np.asarray(after - before)[b]).max(-1)
        np.testing.assert_array_equal(moved[positions[item_R != item]], 0.0)
        assert (moved[positions[item_R == item]] > 1e-5).all()
        np.testing.assert_array_equal(np.delete(moved, positions), 0.0)


def test_equal_pictures_are_told_apart_by_their_grids_and_not_by_their_order():
    """A single index would mean different places in pictures 4 and 2 patches wide; a place is a row and a column."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(1, 12)).astype(np.float32).repeat(8, 0)
    grid = lambda *sides: visual(rng, 1, *sides)  # noqa: E731
    wide, tall = (dataclasses.replace(grid(*sides), features=features) for sides in ((2, 4), (4, 2)))
    batch = stack([padded(assemble([TokenPart([1]), wide, tall], SPEC), SPEC)])
    embedded = np.asarray(embed(dataclasses.replace(CONFIG, vision=SMALL.vision))(batch))  # each patch on its own
    first, second = embedded[0, 1:9], embedded[0, 9:17]
    for r in range(2):
        for c in range(2):  # the same place in both
            np.testing.assert_allclose(first[4 * r + c], second[2 * r + c], atol=1e-6)
    assert np.abs(first[2] - second[2]).max() > 1e-2  # the third patch: row 0, column 2; row 1, column 0


def test_generation_refuses_packed_prompts():
    with pytest.raises(UserError, match="a row of the batch has 2 packed examples, but generation continues one"):
        generate(CONFIG, params(), packed(), max_new_tokens=2)


def test_an_example_alone_in_a_row_is_the_plain_causal_model():
    """Segment numbers that are all zeros, as in make_batch, and numbers that differ from padding's both mean one
    segment."""
    batch = unpacked()
    shifted = dataclasses.replace(batch, segment_BT=batch.segment_BT + 5)
    before, after = (forward(CONFIG)(params(), one).logits_BTY for one in (batch, shifted))
    np.testing.assert_array_equal(after, before)
    assert bool(jnp.isfinite(before).all())
