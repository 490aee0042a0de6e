"""A small sample of tokens on which neurons, or two models, are compared."""

from collections.abc import Sequence

import numpy as np

from anyexperts_jax.core.arrays import as_array
from anyexperts_jax.core.errors import require
from anyexperts_jax.pretrained.model import Pretrained

_ROWS, _LENGTH = 8, 256  # in tokens


def calibration_tokens(m: Pretrained, text: str | Sequence[Sequence[int]] | None, seed: int) -> np.ndarray:
    """Returns ids [B, T] to run a model on: the first few thousand tokens of a text, given ids, or random ones.

    Raises:
      UserError: if the text has no tokens.
    """
    length = min(_LENGTH, m.config.max_length)
    if text is None:
        return np.random.default_rng(seed).integers(0, m.config.vocab_size, (_ROWS, length))
    if not isinstance(text, str):
        return np.asarray(as_array("text", text))
    ids = m.tokenizer.encode(text[: _ROWS * length * 16]).ids_T
    require(len(ids) > 0, "the text is empty")
    length = min(length, len(ids))
    rows = min(_ROWS, len(ids) // length)
    return np.asarray(ids[: rows * length]).reshape(rows, length)
