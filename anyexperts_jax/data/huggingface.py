"""Examples in a Hugging Face dataset that `save_to_disk` wrote: a `DatasetDict` with the splits as its keys.

Columns: `question` and `answer` (strings); if there, `question_type` (string), `level` (1 to 3), and one of `image`
(a picture or [H, W, 3] bytes), `video` ([F, H, W, 3] bytes) and `audio` (samples at 16 kHz, or a decoded `Audio`
feature of that rate). Evidence is unknown, so nothing counts as evidence. Needs the package `datasets`.
"""

import pathlib
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, comma_list, require
from anyexperts_jax.data.domain import Metric
from anyexperts_jax.data.example import SAMPLE_RATE, Example

MARKERS = ("dataset_dict.json",)  # what `DatasetDict.save_to_disk` leaves in the folder
_ONE_TYPE = "any"  # the question type where the dataset names none


def is_folder(folder: pathlib.Path) -> bool:
    """Whether the folder holds a `DatasetDict`."""
    return all((folder / name).is_file() for name in MARKERS)


class HuggingFaceSource:
    """The examples of one split. Scored by exact match.

    Raises:
      UserError: when `datasets` is not installed, or the folder is broken, has no such split or lacks a column.
    """

    metric: Metric = "exact"

    def __init__(self, folder: pathlib.Path, split: str) -> None:
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise UserError(f"{folder} is a Hugging Face dataset: pip install datasets to read it") from error
        try:
            splits = load_from_disk(str(folder))
        except (ValueError, OSError) as error:
            raise UserError(f"cannot read the Hugging Face dataset {folder}: {' '.join(str(error).split())}") from error
        require(split in splits, f"{folder} has no split {split!r}; it has {comma_list(splits)}")
        self._folder, self._rows = folder, splits[split]
        for column in ("question", "answer"):
            has = self._rows.column_names
            require(column in has, f"{folder} has no column {column!r}; its columns are {comma_list(has)}")
        typed = [rows for rows in splits.values() if "question_type" in rows.column_names]
        names = {name for rows in typed for name in rows.unique("question_type")}
        self._question_types = tuple(sorted(names)) or (_ONE_TYPE,)

    @property
    def question_types(self) -> tuple[str, ...]:
        return self._question_types

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        where = f"{self._folder} row {index}"
        return Example(
            domain=self._folder.name,
            question_type=row.get("question_type", _ONE_TYPE),
            level=row.get("level", 1),
            question=row["question"],
            answer=row["answer"],
            source=f"row:{index}",
            image=_pixels(row.get("image"), 3, where),
            video=_pixels(row.get("video"), 4, where),
            audio=_samples(row.get("audio"), where),
        )


def _pixels(value: Any, axes: int, where: str) -> np.ndarray | None:
    if value is None:
        return None
    pixels = np.asarray(value.convert("RGB") if hasattr(value, "convert") else value)
    shaped = pixels.ndim == axes and pixels.shape[-1] == 3
    require(shaped, f"{where}: pixels of shape {pixels.shape} must have {axes} axes, the last of size 3")
    require(bool(pixels.min() >= 0 and pixels.max() <= 255), f"{where}: pixels must be in [0, 255]")
    return pixels.astype(np.uint8)


def _samples(value: Any, where: str) -> np.ndarray | None:
    if value is None:
        return None
    if isinstance(value, dict):
        rate = value.get("sampling_rate")
        require(rate == SAMPLE_RATE, f"{where}: audio at {rate} Hz must be resampled to {SAMPLE_RATE} Hz")
        value = value["array"]
    samples = np.asarray(value, np.float32)
    require(samples.ndim == 1, f"{where}: audio of shape {samples.shape} must be mono")
    return samples
