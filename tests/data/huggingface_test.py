"""Where the package `datasets` is installed the real one is read; else a stand-in with the methods that we call."""

import importlib.util
import sys
import types

import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.batches import answers
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.pipeline import eval_batches, train_iterator

INSTALLED = importlib.util.find_spec("datasets") is not None
TEXT = [
    {"question": f"{a} + {a}?", "answer": str(2 * a), "question_type": "double", "level": 1 + a % 3}
    for a in range(1, 6)
]


class StandInRows(list):
    @property
    def column_names(self):
        return list(self[0])

    def unique(self, column):
        return list({row[column] for row in self})


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Writes {split: rows} as `DatasetDict.save_to_disk` does, and returns a config that reads it."""

    def write(splits):
        folder = tmp_path / "mine"
        if INSTALLED:
            import datasets

            rows = {split: datasets.Dataset.from_list(listed) for split, listed in splits.items()}
            datasets.DatasetDict(rows).save_to_disk(str(folder))
        else:
            folder.mkdir()
            (folder / "dataset_dict.json").write_text("{}")
            stand_in = types.ModuleType("datasets")
            stand_in.load_from_disk = lambda path: {split: StandInRows(listed) for split, listed in splits.items()}
            monkeypatch.setitem(sys.modules, "datasets", stand_in)
        return DataConfig(domains=("mine",), folders=(f"mine={folder}",), threads=0)

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


def test_media_columns(save):
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


def test_pictures_of_pillow_are_read(save):
    from PIL import Image

    picture = Image.new("L", (16, 8), 77)
    source = open_source(save({"train": [{"question": "q?", "answer": "a", "image": picture}]}), "mine", "train")
    assert source[0].image.shape == (8, 16, 3)
    assert (source[0].image == 77).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": [[1, 2], [3, 4]]}, r"mine row 0: pixels of shape \(2, 2\) must have 3 axes"),
        ({"image": [[[1, 2, 300]]]}, r"mine row 0: pixels must be in \[0, 255\]"),
        ({"audio": [[0.0], [0.5]]}, r"mine row 0: audio of shape \(2, 1\) must be mono"),
        ({"audio": {"array": [0.0], "sampling_rate": 8000}}, "audio at 8000 Hz must be resampled to 16000 Hz"),
    ],
)
def test_media_of_another_form_are_refused(save, row, message):
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
