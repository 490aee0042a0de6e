import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data import array_records
from anyexperts_jax.data.array_records import export_array_record, from_record, to_record
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.pipeline import eval_batches, train_iterator
from anyexperts_jax.data.source import GeneratedSource
from data.examples import audio_example, image_example, text_example, video_example

NAMES = [field.name for field in dataclasses.fields(Example)]


def same(one, other):
    def equal(a, b):
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and np.array_equal(a, b)
        return a == b

    return all(equal(getattr(one, name), getattr(other, name)) for name in NAMES)


def generated(split="train", length=7, name="nlp"):
    return GeneratedSource(name, split, length, 0, (1, 2, 3))


def config_for(folder):
    return DataConfig(domains=("mine",), folders=(f"mine={folder}",), threads=0)


@pytest.mark.parametrize("make", [text_example, image_example, video_example, audio_example])
def test_a_record_holds_every_field_of_its_example(make):
    example = make()
    assert same(from_record(to_record(example)), example)


@pytest.mark.parametrize("record", [b"", b"PK\x03\x04 not a zip", to_record(text_example())[:200]])
def test_a_broken_record_is_refused(record):
    with pytest.raises(UserError, match=f"a record of {len(record)} bytes is not an example"):
        from_record(record)


def test_an_unusable_record_is_named_by_its_number(tmp_path):
    """The record was written by another program, or its values are not a sound."""
    with_nan = io.BytesIO()
    fields = {"domain": "d", "question_type": "q", "level": 1, "question": "?", "answer": "a", "source": ""}
    text = np.frombuffer(json.dumps(fields).encode(), np.uint8)
    np.savez(with_nan, text=text, audio=np.full(9, np.nan, np.float32))
    for record, message in (
        (with_nan.getvalue(), "mine record 1 of train: d/q: audio must be finite; 9 of 9"),
        (b"no record", "mine record 1 of train: a record of 9 bytes is not an example"),
    ):
        folder = tmp_path / "mine"
        folder.mkdir()
        writer = ArrayRecordWriter(str(folder / "train-00000-of-00001.array_record"), "group_size:1")
        for each in (to_record(text_example()), record):
            writer.write(each)
        writer.close()
        manifest = {"version": 1, "metric": "exact", "question_types": ["q"], "splits": {"train": 2}}
        (folder / "dataset.json").write_text(json.dumps(manifest))
        source = open_source(config_for(folder), "mine", "train")
        assert source[0].answer == "yes"
        with pytest.raises(UserError, match=message):
            source[1]
        shutil.rmtree(folder)


@pytest.mark.parametrize("shards", [1, 3])
def test_exported_examples_are_read_back_in_order(tmp_path, shards):
    export_array_record(generated(), tmp_path / "frozen", "train", shards=shards)
    export_array_record(generated("test", 3), tmp_path / "frozen", "test")
    config = config_for(tmp_path / "frozen")
    for split, length in (("train", 7), ("test", 3)):
        source = open_source(config, "mine", split)
        assert len(source) == length
        assert (source.question_types, source.metric) == (generated().question_types, "exact")
        assert all(same(source[i], generated(split)[i]) for i in range(length))


def test_an_exported_domain_gives_the_same_batches_as_the_generated_one(tmp_path):
    live = DataConfig(domains=("general", "nlp"), train_examples=12, threads=0)
    folders = []
    for name in live.domains:
        export_array_record(open_source(live, name, "train"), tmp_path / name, "train")
        folders.append(f"{name}={tmp_path / name}")
    frozen = dataclasses.replace(live, folders=tuple(folders))
    ours, theirs = train_iterator(live, 4), train_iterator(frozen, 4)
    for _ in range(4):
        one, other = next(ours), next(theirs)
        assert all((getattr(one, name) == getattr(other, name)).all() for name in vars(one))


def test_an_exported_split_is_not_overwritten(tmp_path):
    export_array_record(generated(), tmp_path, "train")
    with pytest.raises(UserError, match="already has a split 'train'"):
        export_array_record(generated(), tmp_path, "train")
    with pytest.raises(UserError, match=r"has question_types \['add', .*\], the new split \['which', 'where'"):
        export_array_record(generated("test", 2, "general"), tmp_path, "test")
    with pytest.raises(UserError, match="shards=9 must be between 1 and the number of examples, 7"):
        export_array_record(generated(), tmp_path / "other", "train", shards=9)


def test_an_export_that_stops_halfway_leaves_no_dataset(tmp_path):
    class Stops(GeneratedSource):
        def __getitem__(self, index):
            if index == 4:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        export_array_record(Stops("nlp", "train", 7, 0, (1,)), tmp_path, "train")
    assert not array_records.is_folder(tmp_path)
    export_array_record(generated(), tmp_path, "train")  # a second export succeeds
    assert len(open_source(config_for(tmp_path), "mine", "train")) == 7


def broken(tmp_path, **changes):
    """A folder with seven training examples and a changed manifest."""
    export_array_record(generated(), tmp_path, "train")
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(manifest | changes))
    return config_for(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has version 2; this package reads version 1"),
        ({"metric": "bleu"}, "metric='bleu' is unknown; valid: exact, anls, wer"),
        ({"splits": {"train": 8}}, "holds 7 examples of 'train', its dataset.json says 8"),
        ({"splits": {"test": 8}}, "has no split 'train'; it has test"),
        ({"splits": {"train": "7"}}, "question_types must be names"),
        ({"splits": None}, "is not a manifest of examples"),
        ({"question_types": ["add"]}, "is not one of"),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        next(train_iterator(broken(tmp_path, **changes), 7))


def test_a_broken_file_is_refused(tmp_path):
    config = broken(tmp_path)
    (file,) = tmp_path.glob("*.array_record")
    whole = file.read_bytes()
    file.write_bytes(b"rubbish" * 50)
    with pytest.raises(UserError, match=r"cannot read .*train-00000-of-00001\.array_record"):
        open_source(config, "mine", "train")
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*train-00000-of-00001\.array_record"):
        open_source(config, "mine", "train")
    file.unlink()
    with pytest.raises(UserError, match=r"holds no file train-\*-of-\*.array_record"):
        open_source(config, "mine", "train")


def test_an_empty_or_missing_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"the data directory \S+gone does not exist"):
        train_iterator(config_for(tmp_path / "gone"), 2)
    with pytest.raises(UserError, match=r"the data directory \S+ is empty"):
        train_iterator(config_for(tmp_path), 2)
    (tmp_path / "notes.xyz").write_text("?")
    with pytest.raises(UserError, match=r"has neither dataset\.json .* nor files of a known kind .*, but notes.xyz"):
        train_iterator(config_for(tmp_path), 2)


def test_evaluation_stops_at_the_last_example(tmp_path):
    export_array_record(generated("validation"), tmp_path, "validation")
    config = config_for(tmp_path)
    assert sum(batch.valid_BT.any(axis=1).sum() for batch in eval_batches(config, "mine", "validation", 4, 5)) == 5
    with pytest.raises(UserError, match="holds 7 examples of split 'validation', fewer than the 8 asked for"):
        next(eval_batches(config, "mine", "validation", 4, 8))
