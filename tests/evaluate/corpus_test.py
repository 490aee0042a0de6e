"""A text corpus has no questions: its score is the share of correctly predicted tokens."""

import numpy as np

from anyexperts_jax.data.batches import pad_rows, stack
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.conversation import Document
from anyexperts_jax.data.sequence import padded
from anyexperts_jax.data.turns import encode_item
from anyexperts_jax.evaluate.likelihood import likelihood_of, token_accuracies
from anyexperts_jax.evaluate.scoring import score_domain
from anyexperts_jax.models.multimodal import ModelOutput
from anyexperts_jax.tokenizers.bytes import BYTES

SPEC = EncodingSpec(max_length=8, max_patches=0, max_frames=0)
TEXTS = ("abc", "defg")


class Wiki:
    question_types, metric = ("any",), "tokens"

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, index):
        return Document("wiki", TEXTS[index], "")


def said(next_BT):
    """Returns the logits of a model that is certain of these tokens."""
    output = object.__new__(ModelOutput)
    object.__setattr__(output, "logits_BTY", 20.0 * np.eye(260, dtype=np.float32)[next_BT])
    return output


def test_a_corpus_is_scored_by_its_tokens():
    wiki = Wiki()
    batch = pad_rows(stack([padded(encode_item(wiki[i], SPEC), SPEC) for i in range(2)]), 3)
    next_BT = np.roll(np.asarray(batch.tokens_BT), -1, axis=1)
    next_BT[1, 1] = 0  # one of the second text's five tokens is wrong
    output = said(next_BT)
    accuracies = token_accuracies(output, batch)
    np.testing.assert_allclose(accuracies, [1.0, 0.8])
    found = likelihood_of(output, batch, BYTES)
    assert (found.tokens, found.correct, found.text_bytes) == (9, 8, 7)
    score = score_domain("wiki", wiki, [batch], ["", "", ""], likelihood=found, row_scores=accuracies)
    assert (score.metric, score.examples, score.chance) == ("tokens", 2, 0.0)
    np.testing.assert_allclose(score.score, 0.9)
    np.testing.assert_allclose(score.token_accuracy, 8 / 9)
