import jax
import jax.numpy as jnp
import numpy as np

from anyexperts_jax.core.config import AnyExpertsConfig
from anyexperts_jax.train.losses import answer_scores, auxiliary_loss


def test_scores_match_a_loop_in_float64():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7, 11)).astype(np.float32) * 4
    tokens = rng.integers(0, 11, size=(3, 7)).astype(np.int32)
    mask = rng.random((3, 7)) < 0.5
    mask[:, -1] = False
    mask[2] = False
    tokens[0, 1:] = np.where(mask[0, :-1], logits[0, :-1].argmax(-1), tokens[0, 1:])  # sequence 0 is all right
    scores = answer_scores(jnp.asarray(logits), tokens, mask)
    for b in range(3):
        nats, correct = 0.0, 0
        for t in np.flatnonzero(mask[b]):
            row = logits[b, t].astype(np.float64)
            nats += np.log(np.exp(row).sum()) - row[tokens[b, t + 1]]
            correct += int(row.argmax() == tokens[b, t + 1])
        np.testing.assert_allclose(scores.loss_B[b], nats, rtol=1e-5)
        assert (scores.tokens_B[b], scores.correct_B[b]) == (mask[b].sum(), correct)
    np.testing.assert_array_equal(scores.exact_B, [True, False, False])
    np.testing.assert_array_equal(scores.answers_B, [True, True, False])


def test_loss_is_float32_on_large_bf16_logits():
    logits = jnp.full((1, 3, 5), 300.0, jnp.bfloat16).at[0, 0, 2].set(-300.0)
    scores = answer_scores(logits, jnp.asarray([[0, 2, 0]]), jnp.asarray([[True, False, False]]))
    assert scores.loss_B.dtype == jnp.float32
    np.testing.assert_allclose(scores.loss_B, [600 + np.log(4)], rtol=1e-6)


def test_masked_positions_get_no_gradient():
    tokens, mask = jnp.zeros((1, 4), jnp.int32), jnp.asarray([[False, True, False, True]])
    gradient = jax.grad(lambda logits: answer_scores(logits, tokens, mask).loss_B.sum())(jnp.ones((1, 4, 3)))
    np.testing.assert_array_equal(np.abs(gradient).sum((0, 2)) > 0, [False, True, False, False])


def test_a_rows_answers_are_counted_by_segment_and_none_predicts_the_next_ones_first_token():
    segment = np.asarray([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1]])
    mask = np.asarray([[0, 1, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]], bool)
    tokens = np.asarray([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]])
    logits = 9 * np.eye(10, dtype=np.float32)[np.roll(tokens, -1, axis=1)]  # all right
    logits[0, 6] = 0.0  # but the last token of the third answer
    scores = answer_scores(jnp.asarray(logits), tokens, mask, segment)
    assert scores.tokens_B.tolist() == [4, 2]  # position 2 of row 0 ends its segment
    assert scores.correct_B.tolist() == [3, 2]
    assert scores.answers_B.tolist() == [3, 1]
    assert scores.exact_B.tolist() == [2, 1]
    gradient = jax.grad(lambda logits: answer_scores(logits, tokens, mask, segment).loss_B.sum())(jnp.asarray(logits))
    assert np.flatnonzero(np.abs(gradient[0]).sum(-1)).tolist() == [1, 3, 5, 6]


def test_auxiliary_loss_is_the_weighted_mean_over_layers():
    config = AnyExpertsConfig(balance_weight=0.5, importance_weight=0.25, z_weight=2.0)
    losses = {"balance": jnp.asarray([1.0, 3.0]), "importance": jnp.asarray([4.0, 0.0]), "z": jnp.asarray([0.5, 1.5])}
    assert auxiliary_loss(config, losses) == 0.5 * 2 + 0.25 * 2 + 2 * 1
    assert auxiliary_loss(config, {**losses, "diversity": jnp.asarray([3.0, 5.0])}) == 3.5 + 4, "weighted already"
