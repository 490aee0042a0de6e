"""Files as found in the wild are read as intended, or refused in one line with the file and row."""

import gzip
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from PIL import Image

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.mixture import Sources

SPEC = EncodingSpec(max_length=64)
ROWS = [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(6)]
PAIRS = {(row["question"], row["answer"]) for row in ROWS}


def lines(rows, end="\n"):
    return "".join(json.dumps(row) + end for row in rows).encode()


def with_answers(*answers):
    return [{"question": f"q{i}?", "answer": answer} for i, answer in enumerate(answers)]


def parquet(table, **how):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, **how)
    return buffer.getvalue()


def table(answers, kind=None, metadata=None):
    given = answers if isinstance(answers, pyarrow.Array) else pyarrow.array(answers, kind)
    columns = {"question": [f"q{i}?" for i in range(len(answers))], "answer": given}
    made = pyarrow.table(columns)
    return made if metadata is None else made.replace_schema_metadata(metadata)


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def tar(files):
    """Returns a tar of files by name; None stands for a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            member.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            made.addfile(member, io.BytesIO(data or b""))
    return buffer.getvalue()


NAMES = {"huggingface": json.dumps({"info": {"features": {"answer": {"names": ["no", "yes"], "_type": "ClassLabel"}}}})}
ASKED = b'{"question": "q", "answer": "a"}'
SAMPLES = {f"s/{i}.json": json.dumps(row).encode() for i, row in enumerate(ROWS)}

READ = {
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(ROWS), PAIRS),
    "Windows' line ends": ("a.jsonl", lines(ROWS, "\r\n"), PAIRS),
    "blank lines, no end": ("a.jsonl", b"\n \n" + lines(ROWS).rstrip(), PAIRS),
    "gzip of several members": ("a.jsonl.gz", gzip.compress(lines(ROWS[:3])) + gzip.compress(lines(ROWS[3:])), PAIRS),
    "zstandard of several frames": (
        "a.jsonl.zst", zstandard.compress(lines(ROWS[:3])) + zstandard.compress(lines(ROWS[3:])), PAIRS
    ),
    "a space and an accent in the name": ("my é.jsonl", lines(ROWS), PAIRS),
    "capital letters in the suffix": ("A.JSONL", lines(ROWS), PAIRS),
    "answers that are no text": (
        "a.jsonl",
        lines(with_answers(3, True, 0.5, ["one"], "x", "y")),
        {("q0?", "3"), ("q1?", "true"), ("q2?", "0.5"), ("q3?", "one"), ("q4?", "x"), ("q5?", "y")},
    ),
    "a question type that is missing": ("a.jsonl", lines([{**row, "question_type": None} for row in ROWS]), PAIRS),
    "columns that are not ours": ("a.jsonl", lines([{**row, "id": 1, "meta": {"a": [1]}} for row in ROWS]), PAIRS),
    "categories": ("a.parquet", parquet(table(pyarrow.array(["a", "b"] * 3).dictionary_encode())),
                   {(f"q{i}?", "ab"[i % 2]) for i in range(6)}),
    "large strings in small row groups": (
        "a.parquet", parquet(table([row["answer"] for row in ROWS], pyarrow.large_string()), row_group_size=1), PAIRS
    ),
    "class labels": ("a.parquet", parquet(table([0, 1] * 3, metadata=NAMES)),
                     {(f"q{i}?", ("no", "yes")[i % 2]) for i in range(6)}),
    "float32 as it was written": ("a.parquet", parquet(table([0.1] * 6, pyarrow.float32())),
                                  {(f"q{i}?", "0.1") for i in range(6)}),
    "folders and a Mac's files in a tar": ("a.tar", tar({"s": None, **SAMPLES, "s/._0.json": b"\0\5\26\7"}), PAIRS),
}  # fmt: skip

REFUSED = {
    "several answers": ("a.jsonl", lines(with_answers(["a", "b"])), r"a.jsonl line 1: answer has 2 entries; give one"),
    "no answer": ("a.jsonl", lines(with_answers(None)), r"a.jsonl line 1: no column 'answer'"),
    "an empty answer": ("a.jsonl", lines(with_answers("")), r"a.jsonl line 1: .*says nothing"),
    "a number that is none": ("a.jsonl", b'{"question": "q", "answer": NaN}\n', r"line 1: answer=nan must be finite"),
    "half a character": ("a.jsonl", b'{"question": "q", "answer": "\\ud83d"}\n', r"line 1: .*is not valid Unicode"),
    "nested without end": ("a.jsonl", b'{"question": ' + b"[" * 100_000 + b"\n", r"a.jsonl line 1: not valid JSON"),
    "UTF-16": ("a.jsonl", "{}".encode("utf-16"), r"a.jsonl line 1: not UTF-8 text"),
    "a label without a name": ("a.parquet", parquet(table([7] * 6, metadata=NAMES)), r"row 0: answer=7 is not a class"),
    "a picture that is text": (
        "a.tar", tar({"0.json": ASKED, "0.png": b"<html>"}), r"a.tar sample 0: .*cannot read the picture"
    ),
    "a picture that was cut short": (
        "a.tar", tar({"0.json": ASKED, "0.png": png()[:50]}), r"a.tar sample 0: .*cannot read the pic"
    ),
    "a sample without a known file": ("a.tar", tar({"0.npy": b"x"}), r"a.tar sample 0: .*holds no file that is known"),
}  # fmt: skip


def sources(folder, name, content):
    (folder / name).write_bytes(content)
    data = DataConfig(domains=("mine",), folders=(f"mine={folder / name}",), encoding=SPEC, threads=0, held_out=0.2)
    return Sources(data)


@pytest.mark.parametrize(("name", "content", "pairs"), READ.values(), ids=READ)
def test_an_unusual_file_is_read_as_intended(name, content, pairs, tmp_path):
    opened = sources(tmp_path, name, content)
    splits = [opened.open("mine", split) for split in ("train", "validation", "test")]
    found = [split[i] for split in splits for i in range(len(split))]
    assert {(item.question, item.answer) for item in found} == pairs
    assert len(found) == len(pairs)


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_an_unusable_file_is_refused_in_one_line(name, content, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        sources(tmp_path, name, content).open("mine", "train")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
