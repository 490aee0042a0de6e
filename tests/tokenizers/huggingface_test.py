import json
import pathlib
import pickle
import sys

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from small_tokenizers import KINDS, TEXTS, byte_level, kinds, of_library, sentence_piece

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.huggingface import HuggingFaceTokenizer

EOS = {"eos_token": "<|eos|>"}


def description(made=None):
    return json.loads((made or byte_level()).to_str())


def of_description(content, config=EOS):
    return HuggingFaceTokenizer(
        {"tokenizer.json": json.dumps(content), "tokenizer_config.json": json.dumps(config)}, "t"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_spans_tile_the_text_and_decode_gives_it_back(kind, text):
    tokenizer = kinds()[kind]
    tokens = tokenizer.encode(text)
    reached = 0
    for start, stop in tokens.offsets_T2.tolist():
        assert 0 <= start <= stop <= len(text)
        assert start <= reached, "a character lies between two tokens"
        assert start >= reached or text[start:reached].strip(" ") == "" or reached - start == 1, "spans overlap"
        reached = max(reached, stop)
    assert reached == len(text)
    assert (np.diff(tokens.offsets_T2[:, 0]) >= 0).all()
    assert tokens.dropped(text) == ""
    lost = (
        " " if kind == "metaspace" and text.startswith(" ") else ""
    )  # as in Llama's own tokenizer, it is taken for the prefix
    assert lost + tokenizer.decode(tokens.ids_T) == text


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_is_marked_to_the_character(kind):
    text = "Größe 🎉 costs 12 euros"
    tokens = kinds()[kind].encode(text)
    for evidence in ("Größe", "🎉", "costs", "12 euros"):
        start = text.index(evidence)
        marked_T = tokens.overlapping([(start, start + len(evidence))])
        (places,) = np.nonzero(marked_T)
        assert (np.diff(places) == 1).all(), "the evidence is one run of tokens"
        first, last = tokens.offsets_T2[places[0]], tokens.offsets_T2[places[-1]]
        assert first[0] in (start, start - 1)  # a token may begin with the space before its word
        assert text[first[0] : start].strip() == ""
        assert last[1] == start + len(evidence)
    assert not tokens.overlapping([]).any()


def test_the_space_added_before_a_text_has_an_empty_span():
    tokens = kinds()["metaspace"].encode("½a")
    assert tokens.offsets_T2.tolist()[:3] == [[0, 0], [0, 1], [0, 1]]  # ▁, and the two bytes of ½
    assert tokens.overlapping([(0, 1)]).tolist()[:3] == [False, True, True]


def test_a_character_equal_to_the_vocabularys_space_has_its_span():
    for text in ("a▁b", "▁", "aĠb"):
        for kind in KINDS:
            tokens = kinds()[kind].encode(text)
            assert tokens.dropped(text) == "", kind
            assert tokens.overlapping([(0, len(text))]).any()


def test_trimming_truncation_padding_and_framing_in_the_files_are_ignored():
    made = byte_level(trim=True)
    made.enable_truncation(3)
    made.enable_padding(length=50)
    tokens = of_library(made).encode("Hello world, the café")
    np.testing.assert_array_equal(tokens.ids_T, byte_level().encode("Hello world, the café").ids)
    assert "".join("Hello world, the café"[a:b] for a, b in tokens.offsets_T2) == "Hello world, the café"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_users_text_are_plain_text_but_not_in_templates(kind):
    tokenizer = kinds()[kind]
    (eos,) = tokenizer.special.eos
    spelled = tokenizer.special_tokens["eos_token"]
    text = f"so{spelled}now"
    written, rendered = tokenizer.encode(text), tokenizer.encode_rendered(text)
    assert eos not in written.ids_T
    assert tokenizer.decode(written.ids_T) == text
    assert list(rendered.ids_T).count(eos) == 1
    place = list(rendered.ids_T).index(eos)
    assert rendered.offsets_T2[place].tolist() == [2, 2 + len(spelled)]
    assert "so" in tokenizer.decode(rendered.ids_T)
    assert spelled not in tokenizer.decode(rendered.ids_T)


def test_characters_that_a_normalizer_drops_are_reported():
    content = description() | {"normalizer": {"type": "Replace", "pattern": {"String": "x"}, "content": ""}}
    tokens = of_description(content).encode("axb x yz")
    assert tokens.dropped("axb x yz") == "xx"
    assert tokens.overlapping([(1, 2)]).sum() == 0
    assert tokens.overlapping([(6, 8)]).sum() == 2


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"eos_token": "<|eos|>"}, {}, {"eos": (3,), "pad": 3, "bos": None, "sep": None}),
        ({"eos_token": {"content": "<|eos|>", "lstrip": False}, "pad_token": "<|pad|>"}, {}, {"eos": (3,), "pad": 0}),
        ({"eos_token": "<|eos|>", "bos_token": None}, {"special_tokens_map": {"bos_token": "<|bos|>"}}, {"bos": 1}),
        ({"eos_token": "<|eos|>"}, {"special_tokens_map": {"eos_token": "<|bos|>"}}, {"eos": (3,)}),
        ({"eos_token": "<|eos|>"}, {"generation_config": {"eos_token_id": [2, 3, 1]}}, {"eos": (3, 2, 1)}),
        ({}, {"generation_config": {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}}, {"eos": (1,), "bos": 2}),
        ({"eos_token": "<|eos|>"}, {"generation_config": {"pad_token_id": -1}}, {"pad": 3}),
        ({"eos_token": "<|eos|>", "sep_token": "<|sep|>", "add_eos_token": True}, {}, {"sep": 2}),
    ],
)
def test_special_ids_come_from_the_accompanying_files(config, files, expected):
    special = of_library(byte_level(), config=config, **files).special
    assert {name: getattr(special, name) for name in expected} == expected


def test_the_end_token_replaces_a_missing_bos_or_sep():
    special = of_library(byte_level()).special
    assert (special.begin, special.separator) == (3, 3)


def test_declared_tokens_are_added_and_named_ones_are_special():
    size = kinds()["byte-level"].vocab_size
    added = {
        str(size): {"content": "<|image|>", "special": True},
        str(size + 1): {"content": "<think>", "special": False},
    }
    config = {**EOS, "added_tokens_decoder": added, "extra_special_tokens": ["<|end|>"], "image_token": "<|image|>"}
    tokenizer = of_library(byte_level(), config=config)
    assert tokenizer.vocab_size == size + 3
    ids = tokenizer.encode_rendered("<|image|><think><|end|>").ids_T.tolist()
    assert ids == [size, size + 1, size + 2]
    assert tokenizer.decode(ids) == "<think>"
    assert size + 1 in tokenizer.encode("<think>").ids_T  # not special: users may write it too


def test_pieces_are_readable_text():
    byte = kinds()["byte-level"]
    ids = byte.encode("Hello world 漢").ids_T
    assert "".join(byte.pieces(ids)).startswith("Hello world ")
    assert byte.pieces(byte.encode("½").ids_T) == ["<C2>", "<BD>"]
    assert byte.pieces([3]) == ["<|eos|>"]
    piece = kinds()["metaspace"]
    assert "".join(piece.pieces(piece.encode("Hello world").ids_T)) == " Hello world"


def test_ids_past_the_vocabulary_decode_to_nothing():
    tokenizer = kinds()["byte-level"]
    ids = tokenizer.encode("cat").ids_T.tolist()
    assert tokenizer.decode([*ids, tokenizer.vocab_size, -1, tokenizer.vocab_size + 1000]) == "cat"


# Fingerprint


def test_the_fingerprint_covers_ids_and_framing_not_the_layout_of_files():
    same = kinds()["byte-level"]
    content = description()
    spaced = {
        "tokenizer.json": json.dumps(content, indent=7),
        "tokenizer_config.json": same.files["tokenizer_config.json"],
    }
    assert HuggingFaceTokenizer(spaced, "other name").fingerprint == same.fingerprint
    older = json.loads(json.dumps(content))
    older["model"]["merges"] = [" ".join(pair) for pair in older["model"]["merges"]]
    older["model"].pop("ignore_merges")
    spaced["tokenizer.json"] = json.dumps(older | {"truncation": None, "post_processor": None})
    assert HuggingFaceTokenizer(spaced, "older").fingerprint == same.fingerprint
    stops = {**spaced, "generation_config.json": json.dumps({"eos_token_id": [3, 2]})}
    assert HuggingFaceTokenizer(stops, "stops").fingerprint == same.fingerprint


def changed_vocabulary(content):
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def changed_merges(content):
    content["model"]["merges"].reverse()


def changed_split(content):
    content["pre_tokenizer"]["use_regex"] = not content["pre_tokenizer"]["use_regex"]


def changed_normalizer(content):
    content["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [changed_vocabulary, changed_merges, changed_split, changed_normalizer])
def test_a_change_of_ids_changes_the_fingerprint(change):
    content = description()
    change(content)
    assert of_description(content).fingerprint != of_description(description()).fingerprint


def test_a_change_of_framing_changes_the_fingerprint():
    ours = of_library(byte_level()).fingerprint
    assert of_library(byte_level(), config={**EOS, "bos_token": "<|bos|>"}).fingerprint != ours
    assert of_library(byte_level(), config={"eos_token": "<|sep|>"}).fingerprint != ours


def test_copies_and_pickled_tokenizers_are_equal(tmp_path):
    tokenizer = of_library(byte_level(), generation_config={"eos_token_id": [3, 2]})
    tokenizer.save(tmp_path)
    copies = (HuggingFaceTokenizer.load(tmp_path, "copy"), pickle.loads(pickle.dumps(tokenizer)))
    for copy in copies:
        assert isinstance(copy, Tokenizer)
        assert (copy.fingerprint, copy.special) == (tokenizer.fingerprint, tokenizer.special)
        for text in TEXTS:
            np.testing.assert_array_equal(copy.encode(text).ids_T, tokenizer.encode(text).ids_T)


def test_a_folder_and_its_file_open_the_same_tokenizer(tmp_path):
    folder = tmp_path / "smol"
    folder.mkdir()
    of_library(byte_level()).save(folder)
    for path in (folder, folder / "tokenizer.json"):
        assert HuggingFaceTokenizer.reads(path)
        assert HuggingFaceTokenizer.load(path).name == "smol"


# Errors


def written(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "there is no tokenizer.json"),
        (
            {"vocab": "{}"},
            r"no tokenizer.json, only vocab.json \(a vocabulary and merges\): write one with transformers",
        ),
        ({"tokenizer": "{"}, "tokenizer.json is not valid JSON"),
        ({"tokenizer": "[]"}, "tokenizer.json holds no JSON object, but a list"),
        ({"tokenizer": "{}"}, "tokenizer.json is broken: .*Model missing"),
        ({"tokenizer": '{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}'}, "tokenizer.json is broken"),
        ({"tokenizer": b"\xff\xfe{"}, "tokenizer.json is not UTF-8: byte 0 is 0xff"),
        (
            {"tokenizer": '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}'},
            r"its WordLevel model has no token for what is not in its vocabulary \(unk_token '\?'",
        ),
        (
            {"tokenizer": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'},
            r"its BPE model has no token for what is not in its vocabulary \(unk_token None.*lose characters",
        ),
        (
            {"tokenizer": '{"model": {"type": "Unigram", "unk_id": null, "vocab": [["a", 0.0]]}}'},
            r"its Unigram model has no token for what is not in its vocabulary",
        ),
        ({"tokenizer": byte_level().to_str()}, "no token ends an answer: set eos_token in tokenizer_config.json"),
        ({"tokenizer": byte_level().to_str(), "tokenizer_config": '{"eos_token": 3}'}, "eos_token=3 is not a token"),
        (
            {"tokenizer": byte_level().to_str(), "generation_config": '{"eos_token_id": ["x"]}'},
            "eos_token_id: 'x' is not a token id",
        ),
        (
            {"tokenizer": byte_level().to_str(), "generation_config": '{"eos_token_id": 99999}'},
            "the special token id 99999 is not in the vocabulary",
        ),
        (
            {
                "tokenizer": byte_level().to_str(),
                "tokenizer_config": json.dumps({**EOS, "added_tokens_decoder": {"9999": {"content": "<x>"}}}),
            },
            "the added token '<x>' has id 9999 in the files, but would be read as",
        ),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, texts, message):
    with pytest.raises(UserError, match=message) as caught:
        HuggingFaceTokenizer.load(written(tmp_path, **texts))
    assert str(caught.value).startswith(f"tokenizer {tmp_path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": ""}, "tokenizer_config.json: eos_token='' is not a token"),
        ({"eos_token": "\ud800"}, r"eos_token='.ud800' is not a token"),
        ({"eos_token": {"content": 3}}, r"eos_token=\{'content': 3\} is not a token"),
        ({**EOS, "extra_special_tokens": "<x>"}, "extra_special_tokens='<x>' is not a list of tokens"),
        ({**EOS, "extra_special_tokens": [3]}, "extra_token=3 is not a token"),
        ({**EOS, "added_tokens_decoder": [3]}, "added_tokens_decoder is a list"),
        ({**EOS, "added_tokens_decoder": {"x": {"content": "<x>"}}}, "added_tokens_decoder: 'x' is not a token id"),
        ({**EOS, "added_tokens_decoder": {"0": "<x>"}}, "added_tokens_decoder holds '<x>', which is not a token"),
    ],
)
def test_malformed_token_declarations_are_refused_in_one_line(config, message):
    with pytest.raises(UserError, match=message):
        of_library(byte_level(), config=config)


def test_added_tokens_past_holes_of_the_vocabulary_are_refused():
    """The library would renumber them: here it would give 2 in place of 7."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": 7, "content": "<s>", **flags}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 5}, "merges": [], "unk_token": "a"},
    }
    with pytest.raises(UserError, match="the added token '<s>' has id 7 in the files, but would be read as 2"):
        of_description(content, {"eos_token": "<s>"})


def test_half_a_surrogate_pair_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"character 0 of the text is U\+D800"):
        kinds()["byte-level"].encode("\ud800")


def test_a_byte_missing_from_the_vocabulary_is_an_error_and_shifts_no_spans():
    """Some published byte-level vocabularies lack bytes; the library skips these without counting them in spans."""
    content = description()
    for spelling in ("\u0113", "ñ"):  # they stand for the bytes 0x13 and 0xF1
        del content["model"]["vocab"][spelling]
    tokenizer = of_description(content)
    assert tokenizer.decode(tokenizer.encode("é 🎉").ids_T) == "é 🎉"
    with pytest.raises(UserError, match=r"'t' has no token for character 3 of the text, U\+0013"):
        tokenizer.encode("é🎉-\x13x")
    with pytest.raises(UserError, match=r"character 1 of the text, U\+40000"):
        tokenizer.encode_rendered("é\U00040000")


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tmp_path):
    of_library(byte_level()).save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs the package tokenizers: pip install 'anyexperts-jax\[text\]'"):
        HuggingFaceTokenizer.load(pathlib.Path(tmp_path))


def test_a_sentence_piece_vocabulary_needs_no_byte_alphabet():
    assert of_library(sentence_piece("metaspace"), config={"eos_token": "</s>"}).vocab_size > 256
