"""The AUC equals the count of ordered pairs, and compares the right tokens."""

import math

import numpy as np
import pytest

from anyexperts_jax.data.batches import stack
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.domain import domain
from anyexperts_jax.data.encode import encode
from anyexperts_jax.evaluate.importance import baseline_scores, candidates, roc_auc, separations
from anyexperts_jax.tokenizers.bytes import BOS, EOS, SEP

SPEC = EncodingSpec(max_frames=0)


def encoded(*names, count=3):
    examples = [domain(name).example("test", i) for name in names for i in range(count)]
    return stack([encode(example, SPEC) for example in examples])


def count_pairs(score_N, positive_N):
    """Returns the AUC by its definition: the share of (positive, negative) pairs in order, ties counting half."""
    won = [float(p > n) + 0.5 * float(p == n) for p in score_N[positive_N] for n in score_N[~positive_N]]
    return np.mean(won)


@pytest.mark.parametrize("seed", range(20))
def test_auc_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    score_N = rng.integers(0, 6, size=40).astype(float)  # many ties
    positive_N = rng.random(40) < 0.3
    positive_N[:2] = True, False
    assert roc_auc(score_N, positive_N) == pytest.approx(count_pairs(score_N, positive_N), abs=1e-12)


def test_auc_needs_positives_and_negatives():
    assert math.isnan(roc_auc(np.arange(3.0), np.ones(3, bool)))
    assert math.isnan(roc_auc(np.arange(3.0), np.zeros(3, bool)))


def test_only_media_and_question_tokens_are_candidates():
    batch = encoded("general", "nlp")
    found_BT = candidates(batch)
    assert not np.isin(batch.tokens_BT[found_BT], (BOS, SEP, EOS)).any()
    for row in range(len(found_BT)):
        sep = int(np.argmax(batch.tokens_BT[row] == SEP))
        assert found_BT[row, 1:sep].all()
        assert not found_BT[row, sep:].any()
    assert not (batch.evidence_BT & ~found_BT).any()


def test_contrast_is_placed_at_the_patches():
    batch = encoded("general", count=2)
    contrast_BT = baseline_scores(batch)["contrast"]
    image_BT = batch.modality_BT == 1
    for row in range(2):
        count = int(image_BT[row].sum())
        expected = batch.patches_BPX[row, :count].astype(np.float64).std(axis=-1)
        np.testing.assert_allclose(contrast_BT[row, image_BT[row]], expected)
    assert (contrast_BT[~image_BT] == 0).all()


def separate(importance_LBT, evidence_BT, modality_BT, candidate_BT=None, **options):
    candidate_BT = np.ones_like(evidence_BT) if candidate_BT is None else candidate_BT
    return separations(importance_LBT, candidate_BT, evidence_BT, modality_BT, {}, draws=20, **options)


def test_perfect_importance_has_an_auc_of_one_in_every_layer():
    evidence_BT = np.random.default_rng(0).random((4, 30)) < 0.2
    importance_LBT = np.stack([0.4 + 0.2 * evidence_BT, 0.1 + 0.8 * evidence_BT])
    (one,) = separate(importance_LBT, evidence_BT, np.ones((4, 30), int))
    assert (one.modality, one.auc, one.auc_low, one.auc_high, one.auc_within) == ("image", 1, 1, 1, 1)
    assert one.auc_by_layer == (1, 1)
    assert one.mean_evidence == pytest.approx(0.75)
    assert one.mean_background == pytest.approx(0.25)


def test_background_is_of_the_same_modality_in_sequences_with_evidence():
    # Row 0: evidence at 0 (0.5), background at 1 (0.4). Text at 2 and 3 does not count, nor row 1 without evidence.
    modality_BT = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    evidence_BT = np.array([[True, False, False, False], [False] * 4])
    importance_LBT = np.array([[[0.5, 0.4, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]]])
    (one,) = separate(importance_LBT, evidence_BT, modality_BT)
    assert (one.sequences, one.evidence_tokens, one.background_tokens, one.auc) == (1, 1, 1, 1.0)


def test_a_level_shift_between_sequences_helps_the_pooled_auc_but_not_the_one_within():
    # Row 0 is all high and mostly evidence, row 1 all low and mostly background; inside each there is no order.
    evidence_BT = np.array([[True] * 9 + [False], [True] + [False] * 9])
    importance_LBT = np.array([[[0.9] * 10, [0.1] * 10]])
    (one,) = separate(importance_LBT, evidence_BT, np.zeros((2, 10), int))
    assert one.auc == pytest.approx(0.9)
    assert one.auc_within == pytest.approx(0.5)


def test_tokens_that_cannot_hold_evidence_are_left_out():
    evidence_BT = np.array([[True, False, False]])
    importance_LBT = np.array([[[0.5, 0.9, 0.1]]])
    candidate_BT = np.array([[True, False, True]])
    (one,) = separate(importance_LBT, evidence_BT, np.zeros((1, 3), int), candidate_BT)
    assert one.auc == 1.0


def test_the_interval_holds_the_auc_and_is_narrower_with_more_sequences():
    rng = np.random.default_rng(3)
    widths = []
    for rows in (10, 160):
        evidence_BT = rng.random((rows, 20)) < 0.3
        importance_LBT = (0.3 * evidence_BT + rng.random((rows, 20)))[None]
        (one,) = separations(importance_LBT, np.ones_like(evidence_BT), evidence_BT, np.zeros((rows, 20), int), {})
        assert one.auc_low < one.auc < one.auc_high
        widths.append(one.auc_high - one.auc_low)
    assert widths[1] < widths[0] / 2


def test_the_lead_over_contrast_is_the_paired_difference_of_aucs():
    rng = np.random.default_rng(0)
    evidence_BT = np.tile(np.arange(20) < 5, (30, 1))
    noise_BT = rng.normal(size=(30, 20))
    contrast_BT = noise_BT + evidence_BT
    importance_LBT = np.stack([noise_BT + 2 * evidence_BT])

    def lead(contrast_BT):
        modality_BT = np.zeros((30, 20), int)
        baselines = {"contrast": contrast_BT}
        return separations(importance_LBT, np.ones_like(evidence_BT), evidence_BT, modality_BT, baselines)[0]

    one = lead(contrast_BT)
    assert one.contrast_lead == pytest.approx(one.auc - one.baselines["contrast"])
    assert 0 < one.contrast_lead_low < one.contrast_lead < one.contrast_lead_high
    itself = lead(importance_LBT[0])  # with unpaired resampling the two would differ by chance
    assert (itself.contrast_lead_low, itself.contrast_lead, itself.contrast_lead_high) == (0, 0, 0)


def test_without_evidence_there_is_no_separation():
    evidence_BT = np.zeros((2, 5), bool)
    assert separate(np.full((1, 2, 5), 0.5), evidence_BT, np.zeros((2, 5), int)) == ()
