"""Where the turns and media of a conversation lie in its sequence, and which tokens are learned."""

import dataclasses

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.batches import answers, learned_texts, prompts, questions, stack
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.conversation import (
    Conversation,
    Document,
    Medium,
    Message,
    Text,
    question_and_answer,
    with_answer,
)
from anyexperts_jax.data.encode import encode_example
from anyexperts_jax.data.sequence import padded
from anyexperts_jax.data.turns import encode_item
from anyexperts_jax.tokenizers.bytes import BOS, BYTES, EOS, SEP
from anyexperts_jax.tokenizers.chat import ChatTemplate

SPEC = EncodingSpec(max_length=48, max_patches=8, max_frames=8)
PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
SOUND = np.linspace(-1, 1, 1600, dtype=np.float32)
TEMPLATE = ChatTemplate("{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}|{% endfor %}")


def said(role, *parts):
    return Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))


def conversation(*messages):
    return Conversation("mine", messages, "file line 1")


TWO_TURNS = conversation(
    said("system", "be"),
    said("user", "a", Medium("image", PICTURE), "b", Medium("audio", SOUND), Medium("image", PICTURE)),
    said("assistant", "c"),
    said("user", "d"),
    said("assistant", "ef"),
)


def drawn(sequence):
    """Returns tokens as letters and media as the first letter of their kind."""
    letters = {BOS: "^", SEP: "/", EOS: "$"}
    kinds = {Modality.IMAGE: "I", Modality.AUDIO: "A", Modality.VIDEO: "V"}
    pairs = zip(sequence.tokens_T.tolist(), sequence.modality_T.tolist(), strict=True)
    return "".join(kinds.get(m) or letters.get(t) or chr(t) for t, m in pairs)


def learned(sequence):
    """Returns the tokens that positions in the loss predict."""
    shown = drawn(sequence)
    return "".join(shown[i + 1] for i in np.flatnonzero(sequence.loss_mask_T))


def test_turns_and_media_keep_their_order():
    sequence = encode_item(TWO_TURNS, SPEC)
    assert drawn(sequence) == "^be\naIbAAI/c$d/ef$"
    assert learned(sequence) == "c$ef$"
    assert sequence.patch_item_P.tolist() == [0, 2]
    assert sequence.frame_item_S.tolist() == [1, 1]
    assert sequence.time_T[sequence.modality_T == Modality.AUDIO].tolist() == [0, 1], "each sound has its own time base"


def test_a_template_writes_the_turns_around_the_media():
    sequence = encode_item(TWO_TURNS, SPEC, template=TEMPLATE)
    assert drawn(sequence) == "<s>be|<u>aIbAAI|<a>c|<u>d|<a>ef|"
    assert learned(sequence) == "<a>c|<a>ef|", "without a generation prompt the whole turn is the assistant's"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_evidence_is_exact(template):
    one = conversation(said("user", Text("ab cd", ((3, 5),))), said("assistant", "x"))
    sequence = encode_item(one, SPEC, template=template)
    assert "".join(drawn(sequence)[i] for i in np.flatnonzero(sequence.evidence_T)) == "cd"


def test_a_question_with_one_medium_gives_an_examples_sequence():
    one = conversation(said("user", Medium("image", PICTURE), "what?"), said("assistant", "x"))
    plain, example = encode_item(one, SPEC), encode_example(one.as_example(), SPEC)
    for field in dataclasses.fields(plain):
        assert np.array_equal(getattr(plain, field.name), getattr(example, field.name)), field.name


def test_pictures_of_any_size_share_the_patches_of_a_row():
    large = np.zeros((30, 50, 3), np.uint8)
    sequence = encode_item(conversation(said("user", *[Medium("image", large)] * 2), said("assistant", "x")), SPEC)
    counts = np.bincount(sequence.patch_item_P)
    assert counts[0] == counts[1]
    assert 2 <= counts[0] <= SPEC.max_patches // 2


def test_learned_tokens_of_all_turns_are_counted():
    batch = stack([padded(encode_item(TWO_TURNS, SPEC), SPEC)])
    assert learned_texts(batch) == ["cef"]


def test_another_answer_replaces_the_last_one():
    other = with_answer(TWO_TURNS, "zz")
    assert question_and_answer(other) == ("d", "zz")
    assert other.messages[2].text == "c"
    with pytest.raises(UserError, match="a document asks nothing"):
        with_answer(Document("mine", "words", ""), "x")


def test_the_last_turn_is_generated_and_scored():
    batch = stack([padded(encode_item(TWO_TURNS, SPEC), SPEC)])
    assert answers(batch) == ["ef"]
    assert questions(batch) == ["be\nabcd"]
    assert prompts(batch).valid_BT.sum() == len("^be\naIbAAI/c$d/")


def test_every_token_of_a_document_is_learned():
    assert learned(encode_item(Document("mine", "words", ""), SPEC)) == "words$"
    assert learned(encode_item(Document("mine", "words", "", ends=False), SPEC)) == "words"


LONG = conversation(said("user", "q"), said("assistant", "a" * 60))
MORE = Message("assistant", (Text("x"),), {"tool_calls": [1]})
WRONG = {
    "too long": (
        LONG,
        None,
        r"needs 64 positions, more than encoding.max_length=48 \(other text 3, learned 61\); "
        r"raise data.encoding.max_length$",
    ),
    "too many frames": (
        conversation(said("user", *[Medium("audio", SOUND)] * 5), said("assistant", "x")),
        None,
        r"needs 10 audio frames, more than encoding.max_frames=8",
    ),
    "tool calls": (conversation(said("user", "a"), MORE), None, r"message 1 holds tool_calls, which only a chat"),
    "template drops media": (
        TWO_TURNS,
        ChatTemplate("{% for m in messages %}{{ m.role }}{{ m.content[:1] }}{% endfor %}"),
        r"writes 0 of the conversation's 3 media",
    ),
}


@pytest.mark.parametrize(("item", "template", "message"), WRONG.values(), ids=WRONG)
def test_a_conversation_that_does_not_fit_is_refused_not_truncated(item, template, message):
    with pytest.raises(UserError, match=message):
        encode_item(item, SPEC, tokenizer=BYTES, template=template)
