import gzip
import pathlib

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from small_tokenizers import CORPUS, TEXTS

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.tokenizers.train import read_lines, train_tokenizer

WIKITEXT = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "wikitext2" / "wikitext2.txt.gz"


def test_the_vocabulary_is_as_large_as_asked_for_and_frames_sequences():
    tokenizer = train_tokenizer(CORPUS, 300)
    assert tokenizer.vocab_size == 300
    special = tokenizer.special
    assert (special.pad, special.bos, special.sep, special.eos) == (0, 1, 2, (3,))
    assert tokenizer.name == "trained"


def test_any_text_is_decoded_unchanged_and_digits_are_single_tokens():
    tokenizer = train_tokenizer(CORPUS, 330)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids_T) == text
    assert tokenizer.pieces(tokenizer.encode("12 34").ids_T) == ["1", "2", " ", "3", "4"]


def test_the_same_texts_give_the_same_tokenizer():
    ours = train_tokenizer(CORPUS, 330)
    assert train_tokenizer(iter(CORPUS), 330, name="again").fingerprint == ours.fingerprint
    assert train_tokenizer(CORPUS[::-1], 330).fingerprint == ours.fingerprint
    assert train_tokenizer(CORPUS[1:], 330).fingerprint != ours.fingerprint


def test_special_tokens_of_a_chat_template_come_first():
    tokenizer = train_tokenizer(CORPUS, 300, special=("<|im_start|>", "<|im_end|>", "<|eos|>"))
    assert tokenizer.encode_rendered("<|im_start|><|im_end|>").ids_T.tolist() == [4, 5]
    assert tokenizer.control_tokens == ("<|pad|>", "<|bos|>", "<|sep|>", "<|eos|>", "<|im_start|>", "<|im_end|>")


def test_a_corpus_with_few_pairs_gives_a_smaller_vocabulary():
    assert train_tokenizer(["ab ab"], 5000).vocab_size < 270


@pytest.mark.parametrize(
    ("texts", "size", "special", "message"),
    [
        (CORPUS, 259, (), r"vocab_size=259 must be >= 260: 256 bytes and <\|pad\|>"),
        (CORPUS, 2**20 + 1, (), "vocab_size=1048577 must be <= 1048576"),
        (CORPUS, 260, ("<x>",), "vocab_size=260 must be >= 261"),
        (CORPUS, 300, ("",), "a special token is empty"),
        ([], 300, (), "there is no text to train a tokenizer on"),
        (["", ""], 300, (), "there is no text"),
    ],
)
def test_impossible_training_is_refused_in_one_line(texts, size, special, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, size, special=special)


def test_files_are_read_line_by_line_in_order(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"one\r\ntwo\n")
    second.write_text("three")
    assert list(read_lines([first, second])) == ["one\r\n", "two\n", "three"]
    second.write_bytes(b"fine\nfine\n\xe9\n")
    with pytest.raises(UserError, match=r"b.txt is not UTF-8 after line "):
        list(read_lines([first, second]))
    packed = tmp_path / "c.txt.gz"
    packed.write_bytes(gzip.compress(b"four\n" * 1000))
    assert list(read_lines([packed])) == ["four\n"] * 1000
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"cannot read .*c.txt.gz: Compressed file ended"):
        list(read_lines([packed]))
    packed.write_bytes(b"four\n")
    with pytest.raises(UserError, match=r"cannot read .*c.txt.gz: Not a gzipped file"):
        list(read_lines([packed]))
    with pytest.raises(UserError, match=r"cannot read .*missing.txt: No such file"):
        list(read_lines([tmp_path / "missing.txt"]))
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        list(read_lines([tmp_path]))


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.exists(), reason="needs shared/data/wikitext2")
def test_a_real_corpus_is_decoded_unchanged():
    lines = gzip.decompress(WIKITEXT.read_bytes()).decode().split("\n")
    tokenizer = train_tokenizer(lines, 2048)
    assert tokenizer.vocab_size == 2048
    characters = tokens = 0
    for line in lines[::10]:
        found = tokenizer.encode(line)
        assert tokenizer.decode(found.ids_T) == line
        covered = np.zeros(len(line), bool)
        for start, stop in found.offsets_T2:
            covered[start:stop] = True
        assert covered.all()
        characters, tokens = characters + len(line), tokens + len(found)
    assert characters / tokens > 2.5
