"""The same rows are read equally from every file format, which is recognised by the path."""

import gzip
import io
import json
import pickle
import re
import tarfile

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from scipy.io import wavfile

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.mixture import Sources, open_source
from anyexperts_jax.data.pipeline import train_iterator
from anyexperts_jax.data.sources.find import find_rows
from anyexperts_jax.data.sources.rows import RowError

COUNT = 40


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(media=lambda number: f"{number}.png"):
    return [{"question": f"what is {i}?", "answer": str(i), "image": media(i)} for i in range(COUNT)]


def pictures(folder):
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(png(i))


def lines(found=None):
    return b"".join(json.dumps(row).encode() + b"\n" for row in (rows() if found is None else found))


def plain(folder):
    pictures(folder)
    (folder / "all.jsonl").write_bytes(b"\n" + lines())
    return folder


def compressed(folder):
    pictures(folder)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(rows()[:15])))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines(rows()[15:])))
    return folder


def json_list(folder):
    pictures(folder)
    (folder / "all.json").write_text(json.dumps(rows(), indent=1))
    return folder / "all.json"


def parquet(folder):
    table = pyarrow.Table.from_pylist(rows(lambda i: {"bytes": png(i), "path": None}))
    pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=7)
    return folder / "*.parquet"


def huggingface(folder):
    found = datasets.Dataset.from_list(rows(lambda i: {"bytes": png(i), "path": None}))
    found.save_to_disk(str(folder / "set"))
    return folder / "set"


def array_record(folder):
    pictures(folder)
    writer = ArrayRecordWriter(str(folder / "all.array_record"), "group_size:1")
    for row in rows():
        writer.write(json.dumps(row).encode())
    writer.close()
    return folder


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def webdataset(folder, suffix="tar", mode="w"):
    path = folder / f"all.{suffix}"
    with tarfile.open(path, mode) as tar:
        for i, row in enumerate(rows()):
            add(tar, f"shard/{i:03d}.png", png(i))
            add(tar, f"shard/{i:03d}.json", json.dumps({k: v for k, v in row.items() if k != "image"}).encode())
    return path


def members_of_the_tar(folder):
    """A tar whose samples name its media files in their JSON."""
    with tarfile.open(folder / "all.tar", "w") as tar:
        for i in range(COUNT):
            add(tar, f"pictures/{i}.png", png(i))
        for i, row in enumerate(rows(lambda i: f"pictures/{i}.png")):
            add(tar, f"{i:03d}.json", json.dumps(row).encode())
    return folder / "all.tar"


def metadata(folder):
    pictures(folder)
    head = "file_name\tquestion\tanswer\n"
    text = head + "".join(f"{row['image']}\t{row['question']}\t{row['answer']}\n" for row in rows())
    (folder / "metadata.tsv").write_text(text)
    return folder


def compressed_tar(folder):
    return webdataset(folder, "tar.gz", "w:gz")


FORMATS = (plain, compressed, json_list, parquet, huggingface, array_record, webdataset, compressed_tar, metadata)


def config(place, **options):
    return DataConfig(domains=("mine",), folders=(f"mine={place}",), threads=0, **options)


def read_all(data):
    """Returns every example of every split, sorted by its question."""
    splits = [open_source(data, "mine", split) for split in ("train", "validation", "test")]
    return {item.question: item for source in splits for item in (source[i] for i in range(len(source)))}


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_every_file_format_gives_the_same_examples(write, tmp_path):
    data = config(write(tmp_path), held_out=0.2)
    found = read_all(data)
    assert len(found) == COUNT
    for i in range(COUNT):
        example = found[f"what is {i}?"]
        assert (example.answer, example.image[0, 0, 0]) == (str(i), i)
    assert f"{COUNT:,} rows" in Sources(data).describe("mine")
    source = pickle.loads(pickle.dumps(open_source(data, "mine", "train")))
    assert source[3].question == open_source(data, "mine", "train")[3].question, "workers read the same"


def test_samples_of_a_tar_name_their_media_files(tmp_path):
    _, found = find_rows(str(members_of_the_tar(tmp_path)))
    last = len(found) - 1
    assert found.read(last, f"pictures/{COUNT - 1}.png") == png(COUNT - 1)


def test_a_store_is_read_like_a_folder(tmp_path):
    memory = fsspec.filesystem("memory")
    for path in plain(tmp_path).iterdir():
        memory.pipe(f"/bucket/data/{path.name}", path.read_bytes())
    data = config("memory://bucket/data", held_out=0.2)
    found = read_all(data)
    assert {question: item.image[0, 0, 0] for question, item in found.items()} == {
        f"what is {i}?": i for i in range(COUNT)
    }
    memory.rm("/bucket", recursive=True)
    with pytest.raises(UserError, match="there is no data at memory://bucket/gone"):
        find_rows("memory://bucket/gone")


def speech(folder):
    for speaker in ("s1", "s2"):
        (folder / speaker).mkdir()
        for i in range(4):
            wavfile.write(folder / speaker / f"{i}.wav", 16000, np.full(1600, 1000, np.int16))
    return [f"{speaker}/{i}.wav" for speaker in ("s1", "s2") for i in range(4)]


def test_recordings_are_read_with_a_table_or_text_files(tmp_path):
    files = speech(tmp_path)
    for name in files:
        (tmp_path / name).with_suffix(".txt").write_text(f"word {name}\n")
    said, found = find_rows(str(tmp_path))
    assert (said, len(found)) == ("recordings or pictures with their texts, 16 files", 8)
    assert found[5]["text"] == "word s2/1.wav"
    table = "file\ttext\tspeaker\n" + "".join(f"{name}\tsaid {name}\t{name[:2]}\n" for name in files)
    (tmp_path / "transcripts.tsv").write_text(table)
    data = config(tmp_path, split_by="speaker", held_out=0.4)
    said = Sources(data).describe("mine")
    assert re.search(r"8 rows: (8|4) train", said), f"a speaker is in one split: {said}"
    source = open_source(data, "mine", "train")
    assert source.metric == "wer"
    assert source[0].messages[1].text.startswith("said s")


def test_file_names_tell_the_splits(tmp_path):
    pictures(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(lines(rows()[:30]))
    (tmp_path / "test.jsonl").write_bytes(lines(rows()[30:]))
    data = config(tmp_path, held_out=0.2)
    train, validation, test = (open_source(data, "mine", split) for split in ("train", "validation", "test"))
    assert {item.question for item in (test[i] for i in range(len(test)))} == {f"what is {i}?" for i in range(30, 40)}
    assert len(train) + len(validation) == 30
    assert (validation.held_out, test.held_out) == (True, False)


def test_text_files_are_documents_cut_into_chunks(tmp_path):
    text = "".join(f"The {i}th sentence has some words in it.\n\n" for i in range(2000))
    (tmp_path / "corpus.txt.gz").write_bytes(gzip.compress(text.encode()))
    data = config(tmp_path / "corpus.txt.gz")
    sources = [open_source(data, "mine", split) for split in ("train", "validation", "test")]
    chunks = {(*source.where(i), i): source[i] for source in sources for i in range(len(source))}
    assert sum(len(item.text) for item in chunks.values()) == len(text), "nothing is lost"
    assert max(len(item.text) for item in chunks.values()) == 126
    assert "documents" in Sources(data).describe("mine")
    batch = next(train_iterator(data, 4))
    assert (batch.loss_mask_BT.sum(axis=1) == batch.valid_BT.sum(axis=1) - 1).all()


DAMAGED = {
    "no gzip": ("a.jsonl.gz", lines(), "is not a gz file, despite its name"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(lines())[:-20], "is damaged or was cut short"),
    "no zstandard": ("a.jsonl.zst", lines(), "is not a zst file"),
    "zstandard cut short": ("a.jsonl.zst", zstandard.compress(lines())[:-20], "is damaged or was cut short"),
    "no parquet": ("a.parquet", lines(), "is not a Parquet file, or is damaged"),
    "no tar": ("a.tar", lines(), "is not a tar file, or was cut short"),
    "no text": ("a.txt", bytes(100), "is not a text file"),
    "no list": ("a.json", b'{"a": 1}', "holds no JSON list"),
    "list cut short": ("a.json", b'[{"a": 1}, {"a":', "is not valid JSON, or was cut short"),
    "not JSON": ("a.jsonl", b"question,answer\n", "a.jsonl line 1: not valid JSON"),
    "not UTF-8": ("a.jsonl", '{"text": "é"}\n'.encode("latin-1"), "a.jsonl line 1: not UTF-8 text"),
    "no object": ("a.jsonl", b"[1]\n", "a.jsonl line 1: a JSON list, not an object"),
    "missing column": ("a.jsonl", b'{"prompt": "a"}\n', "a.jsonl line 1: no column 'question'"),
    "nothing in it": ("a.jsonl", b"", "there are no rows in the data"),
    "unknown kind": ("a.xlsx", b"x", "neither dataset.json .* nor files of a known kind"),
    "no text for sound": ("a.wav", b"x", "a.wav have no text: put a .txt"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_malformed_file_is_refused_in_one_line_that_names_it(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(config(tmp_path, held_out=0.01), "mine", "train")
    assert "\n" not in str(caught.value)


def test_a_tar_that_was_cut_short_is_refused(tmp_path):
    path = webdataset(tmp_path)
    path.write_bytes(path.read_bytes()[:-12000])
    with pytest.raises(UserError, match=r"all.tar is not a tar file, or was cut short"):
        find_rows(str(path))


def test_files_of_several_formats_are_refused(tmp_path):
    plain(tmp_path)
    parquet(tmp_path)
    with pytest.raises(UserError, match="holds JSON Lines and Parquet; give a pattern"):
        find_rows(str(tmp_path))


def test_every_row_can_be_inspected(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([*({"text": f"t{i}"} for i in range(30)), {"txt": 1}]))
    data = config(tmp_path, held_out=0.01)
    found = [row for split in ("train", "validation", "test") for row in open_source(data, "mine", split)]
    (error,) = [item for _, _, item in found if isinstance(item, RowError)]
    assert (error.row, error.reason[:9], len(found)) == ("line 31", "no column", 31)
