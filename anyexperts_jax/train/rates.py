"""Parses the learning rates by pattern in `train.learning_rates`."""

import math
from collections.abc import Iterable

from anyexperts_jax.core.errors import UserError, require, shown


def named_rates(entries: Iterable[str]) -> dict[str, float]:
    """Learning rates by pattern, from entries that read PATTERN=RATE.

    Raises:
      UserError: for an entry of another form, a rate that is not a number > 0, or a pattern that appears twice.
    """
    rates: dict[str, float] = {}
    for entry in entries:
        pattern, equals, text = entry.rpartition("=")
        pattern = pattern.strip()
        require(
            bool(pattern and equals),
            f"train.learning_rates entry {shown(entry)} must read PATTERN=RATE, such as **/mlp/**=1e-4",
        )
        require(pattern not in rates, f"train.learning_rates names {pattern!r} twice")
        try:
            rate = float(text)
        except ValueError as error:
            raise UserError(f"train.learning_rates: {shown(text)} of {pattern} must be a number") from error
        require(0 < rate < math.inf, f"train.learning_rates: {text.strip()} of {pattern} must be finite and > 0")
        rates[pattern] = rate
    return rates
