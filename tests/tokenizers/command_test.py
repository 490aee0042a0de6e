"""`anyexperts tokenizer train` and `show`."""

import re

import pytest

pytest.importorskip("tokenizers")

from anyexperts_jax.cli import main as cli
from anyexperts_jax.tokenizers.store import open_tokenizer


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("the cat sat on the mat\n" * 20)
    return path


def test_train_writes_a_folder_that_show_reads(corpus, tmp_path, capsys):
    out = tmp_path / "made" / "cats"
    command = ["tokenizer", "train", str(corpus), "--vocab-size", "264", "--out", str(out), "--special", "<|im_end|>"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"cats: huggingface, 264 ids, fingerprint [0-9a-f]{64}\n", said)
    assert "special: pad 0 <|pad|>, bos 1 <|bos|>, sep 2 <|sep|>, eos 3 <|eos|>" in said
    assert open_tokenizer(str(out)).vocab_size == 264

    assert cli.main(["tokenizer", "show", str(out), "--text", "the [/red] ñ"]) == 0
    said = capsys.readouterr().out
    assert "cats: huggingface, 264 ids" in said
    assert re.search(r"│ \[ +│ \d+ to \d+ ", said), "text that looks like markup is printed as it is"
    assert re.search(r"│ <C3> +│ 11 to 12 .*\n.*│ <B1> +│ 11 to 12 ", said), "both bytes of ñ"
    assert "for 12 characters, 13 bytes" in said


def test_show_prints_the_byte_tokenizer(capsys):
    assert cli.main(["tokenizer", "show", "bytes", "--text", "é"]) == 0
    said = capsys.readouterr().out
    assert "bytes: bytes, 260 ids" in said
    assert "2 tokens for 1 characters, 2 bytes (1.00 bytes a token)" in said
    assert said.count("0 to 1") == 2


def test_a_vocabulary_smaller_than_asked_for_is_reported(corpus, tmp_path, capsys):
    assert cli.main(["tokenizer", "train", str(corpus), "--vocab-size", "9000", "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"too few pairs to merge for 9000 ids: 2\d\d were made", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "CORPUS", "--vocab-size", "12", "--out", "new"], r"vocab_size=12 must be >= 260"),
        (["train", "missing.txt", "--vocab-size", "300", "--out", "new"], r"cannot read missing.txt: No such file"),
        (
            ["train", "CORPUS", "--vocab-size", "300", "--out", "."],
            r"--out \. exists and is not empty; name a new folder",
        ),
        (["show", "missing"], r"tokenizer 'missing' does not exist; give 'bytes' or a path"),
        (["show", "."], r"there is no tokenizer in \.: give 'bytes', a folder with tokenizer.json"),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_code_2(arguments, message, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tokenizer", *(str(corpus) if word == "CORPUS" else word for word in arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "new").exists()
