"""Batches of sequences: stacked, padded, and cut into prompt and answer."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.tokenizer import PAD, SEP, decode

_FILL = {"tokens_BT": PAD}  # of padding rows; 0 elsewhere


def stack(sequences: Sequence[Mapping[str, np.ndarray]]) -> Batch:
    """The batch of these sequences (`encode.encode`), one row each."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: np.stack([sequence[name] for sequence in sequences]) for name in names})


def pad_rows(batch: Batch, rows: int) -> Batch:
    """The batch with invalid rows at its end, `rows` in all: no valid position, no loss, all indices 0."""
    missing = rows - batch.tokens_BT.shape[0]
    require(missing >= 0, f"a batch of {batch.tokens_BT.shape[0]} rows does not fit in {rows}")
    padded = {}
    for field in dataclasses.fields(Batch):
        values = np.asarray(getattr(batch, field.name))
        fill = np.full((missing, *values.shape[1:]), _FILL.get(field.name, 0), values.dtype)
        padded[field.name] = np.concatenate([values, fill])
    return Batch(**padded)


def answers(batch: Batch) -> list[str]:
    """The text of each row's answer, "" for a padding row."""
    tokens_BT, loss_mask_BT = np.asarray(batch.tokens_BT), np.asarray(batch.loss_mask_BT)
    return [decode(tokens[1:][mask[:-1]]) for tokens, mask in zip(tokens_BT, loss_mask_BT, strict=True)]


def questions(batch: Batch) -> list[str]:
    """The text of each row's question, "" for a padding row."""
    tokens_BT = np.asarray(batch.tokens_BT)
    return [decode(tokens[: int(np.argmax(tokens == SEP))]) for tokens in tokens_BT]


def prompts(batch: Batch) -> Batch:
    """The batch without its answers: every row ends with its SEP, and nothing after it is valid."""
    tokens_BT = np.asarray(batch.tokens_BT)
    is_sep_BT = tokens_BT == SEP
    after_BT = np.cumsum(is_sep_BT, axis=1) - is_sep_BT > 0
    return dataclasses.replace(
        batch,
        tokens_BT=np.where(after_BT, PAD, tokens_BT).astype(tokens_BT.dtype),
        valid_BT=np.asarray(batch.valid_BT) & ~after_BT,
        loss_mask_BT=np.zeros_like(np.asarray(batch.loss_mask_BT)),
    )


def empty_batch(spec: EncodingSpec, rows: int) -> Batch:
    """A batch of padding alone, in the shapes and types of every batch of `spec`."""
    B, T = rows, spec.max_length
    return Batch(
        tokens_BT=np.full((B, T), PAD, np.int32),
        modality_BT=np.zeros((B, T), np.int32),
        valid_BT=np.zeros((B, T), bool),
        loss_mask_BT=np.zeros((B, T), bool),
        evidence_BT=np.zeros((B, T), bool),
        time_BT=np.zeros((B, T), np.int32),
        patches_BPX=np.zeros((B, spec.max_patches, spec.patch_features), np.float32),
        patch_place_BP=np.zeros((B, spec.max_patches), np.int32),
        frames_BSX=np.zeros((B, spec.max_frames, spec.frame_features), np.float32),
        domain_B=np.zeros(B, np.int32),
        question_B=np.zeros(B, np.int32),
        level_B=np.zeros(B, np.int32),
        example_B=np.zeros(B, np.int32),
    )


def abstract_batch(spec: EncodingSpec, rows: int) -> Batch:
    """The shape and type of every array of such a batch, as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    one_row = empty_batch(spec, 1)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), one_row)
