import pickle

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.tokenizers import bytes as byte_tokenizer
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.bytes import BytesTokenizer

TEXTS = ("", "how many are red?", "naïve café, 3 €", "a€b", "Größe 🎉", "line\nline\r\n", "\x00\x7f\u0080\U0010ffff")
BYTES = BytesTokenizer()


def test_special_ids_follow_the_256_bytes():
    assert isinstance(BYTES, Tokenizer)
    special = BYTES.special
    assert (special.pad, special.bos, special.sep, special.eos) == (256, 257, 258, (259,))
    assert (special.begin, special.separator) == (257, 258)
    assert BYTES.vocab_size == 260
    assert pickle.loads(pickle.dumps(BYTES)) == BYTES


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes_and_spans_their_characters(text):
    tokens = BYTES.encode(text)
    np.testing.assert_array_equal(tokens.ids_T, list(text.encode()))
    assert tokens.ids_T.dtype == np.int32
    assert BYTES.decode(tokens.ids_T) == text
    for start in range(len(text)):
        marked_T = tokens.overlapping([(start, len(text))])
        np.testing.assert_array_equal(np.nonzero(marked_T)[0], np.arange(len(text[:start].encode()), len(tokens)))
    assert tokens.dropped(text) == ""


def test_spans_of_characters_are_spans_of_bytes():
    tokens = BYTES.encode("a€b")
    assert tokens.offsets_T2.tolist() == [[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]]
    for span, bytes_of in (((0, 1), (0, 1)), ((1, 2), (1, 4)), ((2, 3), (4, 5))):
        np.testing.assert_array_equal(np.nonzero(tokens.overlapping([span]))[0], np.arange(*bytes_of))


def test_a_spelled_special_token_is_text():
    assert BYTES.decode(BYTES.encode_rendered("<eos>").ids_T) == "<eos>"


def test_decode_skips_special_ids_and_ids_past_the_vocabulary():
    assert BYTES.decode([257, 104, 105, 259, 256, 300, -1]) == "hi"
    assert BYTES.decode([0xC3, 33]) == "�!"


def test_pieces_show_invalid_bytes_in_hexadecimal():
    assert BYTES.pieces([257, 104, 0xC3, 0xA9, 259]) == ["<bos>", "h", "<C3>", "<A9>", "<eos>"]


def test_half_a_surrogate_pair_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"character 2 of the text is U\+D83D, half of a surrogate pair"):
        BYTES.encode("ok\ud83d")


def test_the_fingerprint_is_stable():
    assert BYTES.fingerprint == "05c6ec009f35ae93350bf8be8df59f5ad0130debbf8051c464724ddadf49caf9"
    assert byte_tokenizer.NAME == BYTES.kind == BYTES.name == "bytes"
