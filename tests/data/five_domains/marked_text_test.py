from anyexperts_jax.data.five_domains.marked_text import marked


def test_brackets_become_spans():
    assert marked("how many are [red]?") == ("how many are red?", ((13, 16),))
    text, spans = marked("[Ann] has [3] or [12].")
    assert text == "Ann has 3 or 12."
    assert [text[start:end] for start, end in spans] == ["Ann", "3", "12"]


def test_text_without_brackets_is_unchanged():
    assert marked("which way?") == ("which way?", ())
