"""Reads texts and levels from the cells of a table, whatever type the column has."""

import math
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import require
from anyexperts_jax.data.example import LEVELS


def text_of(value: Any, labels: list[str] | None, where: str) -> str:
    """Reads a question, an answer or the name of a type from a cell.

    Args:
      labels: the names of the column's class labels; None: it has none.
      where: the beginning of error messages.

    Raises:
      UserError: if it is missing, a list of several entries, not a label, not finite, or neither text nor number.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        require(len(value) == 1, f"{where} has {len(value)} entries; give one")
        value = value[0]
    require(value is not None, f"{where} is missing; leave the row out or fill it in")
    if labels is not None:
        known = type(value) is int and 0 <= value < len(labels)
        require(known, f"{where}={value!r} is not a class label; there are {len(labels)}, from 0 on")
        return labels[value]
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, np.floating | float):
        require(math.isfinite(value), f"{where}={value} must be finite")
        return str(value).removesuffix(".0")
    require(isinstance(value, int), f"{where} must be text, a class label or a number, not {type(value).__name__}")
    return str(value)


def level_of(value: Any, where: str) -> int:
    """Reads a level from a cell; 1 if it is missing.

    Raises:
      UserError: if it is not one of LEVELS.
    """
    if value is None:
        return 1
    if isinstance(value, np.floating):
        value = value.item()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(number and value in LEVELS, f"{where}: level={value!r} is unknown; valid: 1, 2, 3")
    return int(value)
