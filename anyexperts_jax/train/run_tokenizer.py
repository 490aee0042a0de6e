"""A run's tokenizer: loaded and checked before anything is written, and copied next to the checkpoints.

From then on the run uses its copy, whatever happens to the path in the configuration. The configuration in each
checkpoint has the tokenizer's fingerprint. Runs on bytes need neither.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from anyexperts_jax.core.errors import require
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.encode import require_model_ids
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.tokenizers.base import (
    TokenizerRecord,
    require_same_tokenizer,
)
from anyexperts_jax.tokenizers.bytes import BYTES
from anyexperts_jax.tokenizers.bytes import NAME as BYTES_NAME
from anyexperts_jax.tokenizers.store import RECORD, load_tokenizer, open_tokenizer, read_record, save_tokenizer

_MODEL_KEYS = ("vocab_size", "pad_id", "eos_id")


def ids_of_tokenizer(data: Any, model: Any) -> dict[str, int]:
    """The fields of `ModelConfig` that follow from a configuration file's `data.tokenizer`; empty if the file has them.

    Args:
      data, model: the file's tables.

    Raises:
      UserError: if the tokenizer cannot be read.
    """
    source = data.get("tokenizer") if isinstance(data, Mapping) else None
    told = isinstance(model, Mapping) and all(key in model for key in _MODEL_KEYS)
    if told or not isinstance(source, str) or source in ("", BYTES_NAME):
        return {}
    tokenizer = open_tokenizer(source)
    special = tokenizer.special
    return {"vocab_size": tokenizer.vocab_size, "pad_id": special.pad, "eos_id": special.eos[0]}


def pin_tokenizer(data: DataConfig, model: ModelConfig, kept: pathlib.Path, *, begun: bool) -> DataConfig:
    """`data` with the fingerprint of its tokenizer, after checking that the tokenizer fits the model and the run.

    Args:
      kept: the path of the run's copy, which is used if the path in `data` does not exist any more.
      begun: whether the run has a checkpoint, so that its tokenizer must not change.

    Raises:
      UserError: if there is no tokenizer, if it differs from the run's or from the fingerprint in `data`, or if its ids
        do not fit the model.
    """
    if data.tokenizer == BYTES_NAME:
        require(data.token_fingerprint is None, f"data.token_fingerprint goes with a path, not with {BYTES_NAME!r}")
        require_model_ids(BYTES, model)
        return data
    recorded = read_record(kept) if (kept / RECORD).is_file() else None
    moved = recorded is not None and not pathlib.Path(data.tokenizer).exists()
    tokenizer = load_tokenizer(kept) if moved else open_tokenizer(data.tokenizer)
    if recorded is not None and begun:
        require_same_tokenizer(recorded, tokenizer)
    require(
        data.token_fingerprint in (None, tokenizer.fingerprint),
        f"data.tokenizer={data.tokenizer} is {TokenizerRecord.of(tokenizer).describe()}, but data.token_fingerprint is "
        f"{data.token_fingerprint}",
    )
    require_model_ids(tokenizer, model)
    source = str(kept) if moved else data.tokenizer
    return dataclasses.replace(data, tokenizer=source, token_fingerprint=tokenizer.fingerprint)


def keep_tokenizer(data: DataConfig, kept: pathlib.Path) -> None:
    """Writes the copy atomically, unless it exists.

    Raises:
      UserError: if the tokenizer cannot be read.
    """
    if data.tokenizer == BYTES_NAME:
        return
    tokenizer = open_tokenizer(data.tokenizer)
    if (kept / RECORD).is_file() and read_record(kept).fingerprint == tokenizer.fingerprint:
        return
    fresh = kept.with_name(kept.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_tokenizer(tokenizer, fresh)
    shutil.rmtree(kept, ignore_errors=True)
    fresh.rename(kept)


def with_kept_tokenizer(data: DataConfig, kept: pathlib.Path) -> DataConfig:
    """The `data` of a checkpoint, with the run's copy as its tokenizer.

    Raises:
      UserError: if the run has lost its copy, or the copy is not the checkpoint's tokenizer.
    """
    if data.tokenizer == BYTES_NAME:
        return data
    require((kept / RECORD).is_file(), f"the run has lost its tokenizer: there is no {kept / RECORD}")
    record = read_record(kept)
    require(
        record.fingerprint == data.token_fingerprint,
        f"the tokenizer in {kept} is {record.describe()}, but the checkpoint was trained with one of fingerprint "
        f"{data.token_fingerprint}",
    )
    return dataclasses.replace(data, tokenizer=str(kept))


def require_same_tokens(ours: DataConfig, theirs: DataConfig, where: str) -> None:
    """Checks that weights were trained on the ids of the same tokenizer.

    Raises:
      UserError: naming both tokenizers.
    """
    require(
        ours.token_fingerprint == theirs.token_fingerprint,
        f"{where} was trained with the tokenizer {theirs.tokenizer}, not with {ours.tokenizer}: the same ids mean "
        "different text",
    )
