"""The configuration of a run that starts from a published checkpoint."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from anyexperts_jax.core.errors import require
from anyexperts_jax.pretrained.extension import extended_config
from anyexperts_jax.pretrained.load import is_checkpoint, open_checkpoint
from anyexperts_jax.tokenizers.store import open_tokenizer
from anyexperts_jax.train.strict import merge

LENGTH, BATCH = 512, 8  # defaults of such a run


def is_published(path: str | os.PathLike[str] | None) -> bool:
    """Whether a path such as `train.start_from` is that of a published checkpoint, not of a run."""
    return path is not None and is_checkpoint(pathlib.Path(path))


def tables_of(checkpoint: str, data: Any = None) -> dict[str, Any]:
    """The tables of a run's configuration that follow from the checkpoint it starts from. No weights are read.

    The model is the checkpoint's, with parameters in float32, because a step of training is often smaller than the
    distance between two bfloat16 numbers. The tokenizer is the checkpoint's unless `data` names another one; padding
    and the end of a sequence have its ids.

    Args:
      data: the table `data` of the configuration, which may name a tokenizer.

    Raises:
      UserError: if the checkpoint or its tokenizer cannot be read.
    """
    found = open_checkpoint(checkpoint)
    model = extended_config(found.plan().config, found.path)
    require(model.vision_tower is None, f"{checkpoint} reads pictures; only text models can be fine-tuned")
    named = data.get("tokenizer") if isinstance(data, Mapping) else None
    tokenizer = named if isinstance(named, str) else str(found.path)
    special = open_tokenizer(tokenizer).special
    model = dataclasses.replace(
        model,
        pad_id=special.pad,
        eos_id=special.eos[0],
        stack=dataclasses.replace(model.stack, param_dtype="float32"),
    )
    encoding = {"max_length": min(LENGTH, model.max_length), "max_patches": 0, "max_frames": 0}
    return {
        "model": dataclasses.asdict(model),
        "data": {"tokenizer": tokenizer, "encoding": encoding},
        "optim": {"lr": 1e-4, "warmup_steps": 20},
        "train": {"batch_size": BATCH},
    }


def with_start(values: dict[str, Any], preset: Any) -> dict[str, Any]:
    """Completes the tables of a configuration whose `train.start_from` is a published checkpoint with those that follow
    from the checkpoint. What the configuration gives itself takes precedence.

    Args:
      preset: the model preset that the configuration names, if any.

    Raises:
      UserError: if the checkpoint or its tokenizer cannot be read, or if the configuration also names a preset.
    """
    train = values.get("train")
    start = train.get("start_from") if isinstance(train, Mapping) else None
    if not isinstance(start, str) or not is_published(start):
        return values
    require(
        preset is None,
        f"train.start_from={start} is a published checkpoint with a model of its own; leave out preset={preset!r}, as "
        f"in: anyexperts train {start}",
    )
    return merge(tables_of(start, values.get("data")), values)
