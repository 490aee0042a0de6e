"""Stacks and pads sequences into batches, and separates prompts from answers."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from anyexperts_jax.core.batch import Batch, make_batch, require_one_segment
from anyexperts_jax.core.errors import require
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.sequence import last_runs
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.bytes import BYTES


def stack(sequences: Sequence[Mapping[str, np.ndarray]]) -> Batch:
    """Stacks sequences (`encode.encode`) into a batch, one row each."""
    names = [field.name for field in dataclasses.fields(Batch)]
    return Batch(**{name: np.stack([sequence[name] for sequence in sequences]) for name in names})


def pad_rows(batch: Batch, rows: int, tokenizer: Tokenizer = BYTES) -> Batch:
    """Adds padding rows until a batch has `rows`: no valid position, no loss, all indices 0."""
    missing = rows - batch.tokens_BT.shape[0]
    require(missing >= 0, f"a batch of {batch.tokens_BT.shape[0]} rows does not fit in {rows}")
    padded, fills = {}, {"tokens_BT": tokenizer.special.pad}  # 0 elsewhere
    for field in dataclasses.fields(Batch):
        values = np.asarray(getattr(batch, field.name))
        fill = np.full((missing, *values.shape[1:]), fills.get(field.name, 0), values.dtype)
        padded[field.name] = np.concatenate([values, fill])
    return Batch(**padded)


def answers(batch: Batch, tokenizer: Tokenizer = BYTES) -> list[str]:
    """Returns the text of each row's answer, "" for a padding row; for a conversation, the assistant's last turn.

    Raises:
      UserError: if a row holds several examples.
    """
    require_one_segment(batch, "answers are read one a row")
    tokens_BT, answer_BT = np.asarray(batch.tokens_BT), last_answers(batch)
    return [tokenizer.decode(tokens[1:][mask[:-1]]) for tokens, mask in zip(tokens_BT, answer_BT, strict=True)]


def learned_texts(batch: Batch, tokenizer: Tokenizer = BYTES) -> list[str]:
    """Returns all text of each row that is in the loss: for a conversation, all turns of the assistant."""
    tokens_BT, loss_mask_BT = np.asarray(batch.tokens_BT), np.asarray(batch.loss_mask_BT)
    return [tokenizer.decode(tokens[1:][mask[:-1]]) for tokens, mask in zip(tokens_BT, loss_mask_BT, strict=True)]


def last_answers(batch: Batch) -> Bool[ndarray, "B T"]:
    """Marks the positions that predict a token of the row's answer: for a conversation, the assistant's last turn."""
    return last_runs(np.asarray(batch.loss_mask_BT))


def before_answers(batch: Batch) -> Bool[ndarray, "B T"]:
    """Marks the positions before the one that predicts the answer's first token: BOS, media, question, earlier turns.

    They are found by the loss mask and not by SEP, since a vocabulary may have no dedicated separator.
    """
    loss_mask_BT = last_answers(batch)
    return np.asarray(batch.valid_BT) & (np.cumsum(loss_mask_BT, axis=1) == 0) & loss_mask_BT.any(axis=1, keepdims=True)


def questions(batch: Batch, tokenizer: Tokenizer = BYTES) -> list[str]:
    """Returns the text of each row's question, "" for a padding row.

    Raises:
      UserError: if a row holds several examples.
    """
    require_one_segment(batch, "questions are read one a row")
    question_BT = before_answers(batch) & (np.asarray(batch.modality_BT) == Modality.TEXT)
    question_BT[:, 0] = False  # BOS
    return [tokenizer.decode(tokens[m]) for tokens, m in zip(np.asarray(batch.tokens_BT), question_BT, strict=True)]


def prompts(batch: Batch, tokenizer: Tokenizer = BYTES) -> Batch:
    """Removes the answers from a batch: every row ends with its separator, and nothing after it is valid.

    Raises:
      UserError: if a row holds several examples.
    """
    require_one_segment(batch, "prompts are made one a row")
    tokens_BT, loss_mask_BT = np.asarray(batch.tokens_BT), last_answers(batch)
    after_BT = np.cumsum(loss_mask_BT, axis=1) - loss_mask_BT > 0
    return dataclasses.replace(
        batch,
        tokens_BT=np.where(after_BT, tokenizer.special.pad, tokens_BT).astype(tokens_BT.dtype),
        valid_BT=np.asarray(batch.valid_BT) & ~after_BT,
        loss_mask_BT=np.zeros_like(np.asarray(batch.loss_mask_BT)),
    )


def empty_batch(spec: EncodingSpec, rows: int, tokenizer: Tokenizer = BYTES) -> Batch:
    """Returns a batch of only padding, with the shapes and types of every batch of `spec`."""
    T = spec.max_length
    return make_batch(
        np.full((rows, T), tokenizer.special.pad, np.int32),
        valid_BT=np.zeros((rows, T), bool),
        position_BT=np.zeros((rows, T), np.int32),
        patches_BPX=np.zeros((rows, spec.max_patches, spec.patch_features), np.float32),
        frames_BSX=np.zeros((rows, spec.max_frames, spec.frame_features), np.float32),
    )


def abstract_batch(spec: EncodingSpec, rows: int) -> Batch:
    """Returns the shape and type of every array of such a batch, as `jax.ShapeDtypeStruct`s, without allocating it."""
    one_row = empty_batch(spec, 1)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), one_row)
