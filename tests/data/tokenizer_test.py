from anyexperts_jax.data import tokenizer


def test_text_survives_encoding_and_decoding():
    for text in ("", "how many are red?", "naïve café, 3 €"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_no_bytes_and_decode_to_nothing():
    special = [tokenizer.PAD, tokenizer.BOS, tokenizer.SEP, tokenizer.EOS]
    assert special == [256, 257, 258, 259]
    assert tokenizer.VOCAB_SIZE == 260
    assert tokenizer.decode([tokenizer.BOS, 104, 105, tokenizer.EOS, tokenizer.PAD]) == "hi"


def test_broken_utf8_is_visible():
    assert tokenizer.decode([*tokenizer.encode("é")[:1], 33]) == "�!"


def test_spans_of_characters_become_spans_of_bytes():
    assert tokenizer.byte_spans("a€b", [(0, 1), (1, 2), (2, 3)]) == [(0, 1), (1, 4), (4, 5)]
