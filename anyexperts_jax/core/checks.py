"""Checks that frozen configurations share."""

import dataclasses
import math
from numbers import Integral, Real
from typing import Any

from anyexperts_jax.core.errors import require


def check_field_types(config: Any) -> None:
    """Raises `UserError` for a field declared bool, int, float or str that holds something else, or no finite number.

    A bool is no number, and a whole number stands for a float.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        number = isinstance(value, Real) and not isinstance(value, bool)
        if field.type is bool:
            require(isinstance(value, bool), f"{field.name}={value!r} must be True or False")
        elif field.type is int:
            require(number and isinstance(value, Integral), f"{field.name}={value!r} must be a whole number")
        elif field.type is float:
            require(number and math.isfinite(value), f"{field.name}={value!r} must be a finite number")
        elif field.type is str:
            require(isinstance(value, str), f"{field.name}={value!r} must be a string")
