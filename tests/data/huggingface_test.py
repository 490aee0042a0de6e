"""Tests reading datasets that the package `datasets` saved."""

import dataclasses
import io
import json
import sys

import datasets
import numpy as np
import pytest
from datasets import Array3D, Audio, ClassLabel, Features, Sequence, Value
from PIL import Image
from scipy.io import wavfile

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.batches import answers
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.pipeline import eval_batches, train_iterator

TEXT = [
    {"question": f"{a} + {a}?", "answer": str(2 * a), "question_type": "double", "level": 1 + a % 3}
    for a in range(1, 6)
]
QA = {"question": "q?", "answer": "a"}
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()


@pytest.fixture
def save(tmp_path):
    """Writes {split: rows} as `DatasetDict.save_to_disk` does, and returns a config that reads it."""

    def write(splits, features=None, cast=None):
        rows = {}
        for split, listed in splits.items():
            given = None if features is None else Features({name: features[name] for name in listed[0]})
            rows[split] = datasets.Dataset.from_list(listed, features=given)
            for column, feature in (cast or {}).items():
                rows[split] = rows[split].cast_column(column, feature)
        datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "mine"))
        return DataConfig(domains=("mine",), folders=(f"mine={tmp_path / 'mine'}",), threads=0)

    return write


def test_rows_become_examples(save):
    config = save(
        {"train": TEXT, "test": [{"question": "what?", "answer": "that", "question_type": "other", "level": 1}]}
    )
    source = open_source(config, "mine", "train")
    assert (len(source), source.question_types, source.metric) == (5, ("double", "other"), "exact")
    example = source[3]
    assert (example.question, example.answer, example.level, example.domain) == ("4 + 4?", "8", 2, "mine")
    (batch,) = eval_batches(config, "mine", "test", 1, 1)
    assert answers(batch) == ["that"]
    assert batch.question_B.tolist() == [1]
    batch = next(train_iterator(config, 5))
    assert sorted(batch.example_B.tolist()) == [0, 1, 2, 3, 4]  # every row once
    assert answers(batch) == [TEXT[i]["answer"] for i in batch.example_B]


def test_question_and_answer_are_enough(save):
    source = open_source(save({"train": [{"question": "q?", "answer": "a"}]}), "mine", "train")
    assert source.question_types == ("any",)
    assert (source[0].question_type, source[0].level) == ("any", 1)


def test_media_columns_are_read(save):
    image = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    row = {"question": "q?", "answer": "a"}
    splits = {
        "train": [row | {"image": image.tolist()}],
        "validation": [row | {"video": [image.tolist(), image.tolist()]}],
        "test": [row | {"audio": {"array": [0.0, 0.5], "sampling_rate": 16_000}}],
    }
    config = save(splits)
    assert (open_source(config, "mine", "train")[0].image == image).all()
    assert open_source(config, "mine", "validation")[0].video.shape == (2, 8, 16, 3)
    assert open_source(config, "mine", "test")[0].audio.tolist() == [0.0, 0.5]


def test_pillow_pictures_are_read(save):
    picture = Image.new("L", (16, 8), 77)
    source = open_source(save({"train": [{"question": "q?", "answer": "a", "image": picture}]}), "mine", "train")
    assert source[0].image.shape == (8, 16, 3)
    assert (source[0].image == 77).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": [[1, 2], [3, 4]]}, r"mine row 0 of train: pixels of shape \(2, 2\) must have 3 axes"),
        ({"image": [[[1, 2, 300]]]}, r"mine row 0 of train: pixels must be in \[0, 255\]"),
        ({"audio": [[0.0], [0.5]]}, r"mine row 0 of train: audio of shape \(2, 1\) must be mono"),
        ({"audio": {"array": [0.0], "sampling_rate": 8000}}, "audio at 8000 Hz must be resampled to 16000 Hz"),
    ],
)
def test_malformed_media_are_refused(save, row, message):
    source = open_source(save({"train": [{"question": "q?", "answer": "a"} | row]}), "mine", "train")
    with pytest.raises(UserError, match=message):
        source[0]


def test_missing_splits_and_columns_are_named(save):
    config = save({"train": [{"question": "q?", "reply": "a"}]})
    with pytest.raises(UserError, match="has no column 'answer'; its columns are question, reply"):
        open_source(config, "mine", "train")
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        open_source(config, "mine", "test")


def test_without_the_package_the_error_says_what_to_install(save, monkeypatch):
    config = save({"train": TEXT})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="is a Hugging Face dataset: pip install datasets to read it"):
        open_source(config, "mine", "train")


TEXTS = [  # a column of answers, and the texts they are read as
    (ClassLabel(names=["no", "yes"]), [1, 0], ["yes", "no"]),
    (Value("int64"), [7, -3], ["7", "-3"]),
    (Value("bool"), [True, False], ["true", "false"]),
    (Value("float64"), [0.5, 2.0], ["0.5", "2"]),
    (Value("float32"), [0.1, 1e-3], ["0.1", "0.001"]),
    (Sequence(Value("string")), [["a"], ["b"]], ["a", "b"]),
    (Sequence(Value("int64")), [[1], [2]], ["1", "2"]),
    (Sequence(ClassLabel(names=["no", "yes"])), [[1], [0]], ["yes", "no"]),
]


@pytest.mark.parametrize("column", ["question", "answer"])
@pytest.mark.parametrize(("feature", "values", "expected"), TEXTS, ids=str)
def test_questions_and_answers_of_any_type_are_read(save, column, feature, values, expected):
    features = {"question": Value("string"), "answer": Value("string")} | {column: feature}
    source = open_source(save({"train": [QA | {column: value} for value in values]}, features), "mine", "train")
    assert [getattr(source[i], column) for i in range(2)] == expected


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        (Value("string"), None, "answer is missing; leave the row out or fill it in"),
        (Value("string"), "", "mine/any: question and answer must not be empty"),
        (Value("float64"), NAN, "answer=nan must be finite"),
        (ClassLabel(names=["no", "yes"]), -1, "answer=-1 is not a class label; there are 2, from 0 on"),
        (Sequence(Value("string")), ["a", "b"], "answer has 2 entries; give one"),
        (Sequence(Value("string")), [], "answer has 0 entries; give one"),
        ({"text": Value("string")}, {"text": "a"}, "answer must be text, a class label or a number, not dict"),
        (Value("binary"), b"a", "answer must be text, a class label or a number, not bytes"),
    ],
    ids=str,
)
def test_unusable_answers_are_refused_with_their_row(save, feature, value, message):
    rows = [QA | {"answer": each} for each in (value, value)]
    config = save({"train": rows}, {"question": Value("string"), "answer": feature})
    with pytest.raises(UserError, match=f"mine row 1 of train: {message}"):
        open_source(config, "mine", "train")[1]


@pytest.mark.parametrize(
    ("feature", "values", "expected"),
    [
        (Value("string"), ["b", None, "a"], ["b", "any", "a"]),
        (ClassLabel(names=["which", "where"]), [1, 0, None], ["where", "which", "any"]),
        (Value("int64"), [3, 2, 3], ["3", "2", "3"]),
    ],
    ids=str,
)
def test_question_types_of_any_type_are_read(save, feature, values, expected):
    features = {"question": Value("string"), "answer": Value("string"), "question_type": feature}
    source = open_source(save({"train": [QA | {"question_type": v} for v in values]}, features), "mine", "train")
    assert source.question_types == tuple(sorted(set(expected)))
    assert [source[i].question_type for i in range(3)] == expected


def test_a_split_without_question_types_has_the_default_one(save):
    source = open_source(save({"train": TEXT, "test": [QA]}), "mine", "test")
    assert source.question_types == ("any", "double")
    assert source[0].question_type == "any"


def test_lists_of_question_types_are_refused(save):
    config = save({"train": [QA | {"question_type": ["a", "b"]}]})
    with pytest.raises(UserError, match="mine: column 'question_type' must hold one name a row, not List"):
        open_source(config, "mine", "train")


@pytest.mark.parametrize(("level", "expected"), [(None, 1), (3, 3), (2.0, 2)])
def test_levels_are_read(save, level, expected):
    source = open_source(save({"train": [QA | {"level": 1}, QA | {"level": level}]}), "mine", "train")
    assert source[1].level == expected


@pytest.mark.parametrize("level", [0, 4, 1.5, NAN, "easy"])
def test_levels_out_of_range_are_refused_with_their_row(save, level):
    config = save({"train": [QA | {"level": level}]})
    with pytest.raises(UserError, match=rf"mine row 0 of train: .*level={level!r} is unknown; valid: 1, 2, 3"):
        open_source(config, "mine", "train")[0]


def test_an_empty_split_does_not_hide_the_others(save):
    config = save({"train": [QA]})
    folder = config.folder_paths()["mine"]
    empty = datasets.Dataset.from_list([QA]).select([])
    datasets.DatasetDict({"train": datasets.load_from_disk(str(folder / "train")), "validation": empty}).save_to_disk(
        str(folder.parent / "more")
    )
    config = DataConfig(domains=("mine",), folders=(f"mine={folder.parent / 'more'}",), threads=0)
    assert len(open_source(config, "mine", "train")) == 1
    with pytest.raises(UserError, match="more holds no examples of split 'validation'"):
        open_source(config, "mine", "validation")


def wav(samples, rate=16_000):
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, samples)
    return buffer.getvalue()


HALF = np.full(400, 2**14, np.int16)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_audio_features_need_no_codec(save, tmp_path, rate):
    """`datasets` 4 and newer decode audio only with torchcodec; we read the WAV bytes ourselves."""
    (tmp_path / "a.wav").write_bytes(wav(HALF, rate))
    row = QA | {"audio": str(tmp_path / "a.wav")}
    source = open_source(save({"train": [row]}, cast={"audio": Audio(sampling_rate=16_000)}), "mine", "train")
    audio = source[0].audio
    assert len(audio) == -(-400 * 16_000 // rate)
    assert audio[60] == pytest.approx(0.5, abs=0.01)


def test_file_names_are_relative_to_the_folder(save, tmp_path):
    save({"train": [QA | {"audio": "sounds/a.wav", "image": None}, QA | {"audio": None, "image": "b.png"}]})
    folder = tmp_path / "mine"
    (folder / "sounds").mkdir()
    (folder / "sounds" / "a.wav").write_bytes(wav(HALF))
    Image.new("L", (8, 8), 77).save(folder / "b.png")
    source = open_source(DataConfig(domains=("mine",), folders=(f"mine={folder}",)), "mine", "train")
    assert source[0].audio[0] == 0.5
    assert source[1].image[0, 0].tolist() == [77, 77, 77]
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"mine row 1 of train: there is no file 'b.png', from .*mine or from here"):
        source[1]


def test_numbers_keep_the_type_they_are_stored_in(save):
    features = {
        "question": Value("string"),
        "answer": Value("string"),
        "image": Array3D((1, 1, 3), "uint16"),
        "audio": Sequence(Value("int16")),
    }
    splits = {
        "train": [QA | {"image": [[[0, 32768, 65535]]]}],
        "test": [QA | {"audio": [0, 2**14]}],
    }
    config = save(splits, features)
    assert open_source(config, "mine", "train")[0].image.tolist() == [[[0, 128, 255]]]
    assert open_source(config, "mine", "test")[0].audio.tolist() == [0.0, 0.5]


def test_videos_of_floats_and_of_pictures_are_read(save):
    floats = [[[[0.0, 0.5, 1.0]]], [[[1.0, 0.5, 0.0]]]]
    red, blue = Image.new("RGB", (2, 1), (255, 0, 0)), Image.new("RGB", (2, 1), (0, 0, 255))
    config = save({"train": [QA | {"video": floats}], "test": [QA | {"video": [red, blue]}]})
    assert open_source(config, "mine", "train")[0].video.tolist() == [[[[0, 128, 255]]], [[[255, 128, 0]]]]
    assert open_source(config, "mine", "test")[0].video[1].tolist() == [[[0, 0, 255]] * 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio": [0.0, None]}, "mine row 1 of train: samples must be finite; 1 of 2 are missing, NaN or infinite"),
        ({"audio": [0.0, NAN]}, "mine row 1 of train: samples must be finite"),
        ({"audio": {"array": [NAN], "sampling_rate": 16_000}}, "mine row 1 of train: samples must be finite"),
        ({"image": [[[0.0, NAN, 1.0]]]}, "mine row 1 of train: pixels must be finite"),
        ({"image": [[[1, 2, 3]], [[1, 2]]]}, "mine row 1 of train: pixels must be numbers of one shape"),
        ({"image": {"bytes": b"no picture", "path": None}}, "cannot read the picture in .*mine row 1 of train: Pillow"),
        ({"image": {"bytes": None, "path": None}}, "mine row 1 of train: media with fields bytes, path hold neither"),
        ({"audio": {"bytes": wav(HALF)[:20], "path": None}}, "cannot read the sound in .*mine row 1 of train: "),
        ({"audio": {"bytes": b"fLaC", "path": None}}, "cannot read the sound in .*mine row 1 of train: "),
    ],
    ids=str,
)
def test_unreadable_media_are_named_by_their_row(save, row, message):
    source = open_source(save({"train": [QA | row, QA | row]}), "mine", "train")
    with pytest.raises(UserError, match=message):
        source[1]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_corrupt_picture_in_training_is_named_by_its_row(save, workers):
    image = datasets.Image()
    row = QA | {"image": {"bytes": b"no picture", "path": None}}
    config = save({"train": [row]}, {"question": Value("string"), "answer": Value("string"), "image": image})
    config = DataConfig(domains=("mine",), folders=config.folders, threads=1, workers=workers)
    with pytest.raises(UserError, match=r"cannot read the picture in .*mine row 0 of train: Pillow knows no such"):
        next(train_iterator(config, 1))


def test_a_picture_that_does_not_fit_is_named_by_its_number(save):
    config = save({"test": [QA | {"image": Image.new("L", (8, 8))}, QA | {"image": Image.new("L", (9, 8))}]})
    assert len(list(eval_batches(config, "mine", "test", 2, 2))) == 1, "pictures are fitted unless they must stay whole"
    config = dataclasses.replace(config, encoding=dataclasses.replace(config.encoding, pictures="whole"))
    with pytest.raises(UserError, match=r"mine image of 9 x 8 pixels does not divide into patches .* \(example 1\)"):
        next(eval_batches(config, "mine", "test", 2, 2))


def damage(folder):
    """Cuts each file of the dataset short, then empties it, one file at a time."""
    for path in sorted(folder.rglob("*.*")):
        whole = path.read_bytes()
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            yield path
            path.write_bytes(whole)


def test_a_damaged_dataset_is_refused_in_one_line_or_read_correctly(save):
    config = save({"train": TEXT})
    said = []
    for _ in damage(config.folder_paths()["mine"]):
        try:
            source = open_source(config, "mine", "train")
            read = [source[i].answer for i in range(len(source))]
        except UserError as error:
            said.append(str(error))
        else:
            assert read == [row["answer"] for row in TEXT]
    assert len(said) > 8
    assert all("mine" in line and "\n" not in line for line in said)


def test_changed_bytes_of_the_rows_are_refused_in_one_line_or_read(save):
    """Arrow follows offsets out of the file, which would crash the process, unless it is told to check them."""
    config = save({"train": TEXT})
    (path,) = config.folder_paths()["mine"].rglob("*.arrow")
    whole, rng, said = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(80):
        changed = bytearray(whole)
        for place in rng.integers(len(whole), size=3):
            changed[place] = rng.integers(256)
        path.write_bytes(bytes(changed))
        try:
            source = open_source(config, "mine", "train")
            said += [source[i] for i in range(len(source))]
        except UserError as error:
            said.append(str(error))
    lines = [line for line in said if isinstance(line, str)]
    assert len(lines) > 10
    assert all("mine" in line and "\n" not in line for line in lines)


@pytest.mark.parametrize("state", ["[]", '{"_data_files": 3}', '{"_data_files": [{"filename": "gone.arrow"}]}'])
def test_a_changed_state_is_refused_in_one_line(save, state):
    config = save({"train": TEXT})
    (config.folder_paths()["mine"] / "train" / "state.json").write_text(state)
    with pytest.raises(UserError, match="mine/train"):
        open_source(config, "mine", "train")


def test_a_manifest_of_another_kind_is_refused(save):
    config = save({"train": TEXT})
    (config.folder_paths()["mine"] / "dataset_dict.json").write_text(json.dumps({"splits": "train"}))
    with pytest.raises(UserError, match=r"dataset_dict\.json does not list the dataset's splits"):
        open_source(config, "mine", "train")
