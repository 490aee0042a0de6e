"""Checks that a run's records have the fields that tables and charts are made from."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import NUM_MODALITIES

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figure(value: Any) -> bool:
    """A number, or null for an undefined one."""
    return value is None or _number(value)


def _list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_figure, value))


def _by_modality(value: Any) -> bool:
    """One row of figures per layer; empty for a dense model."""
    return isinstance(value, list) and all(_list(row) and len(row) == NUM_MODALITIES for row in value)


def _scores(value: Any) -> bool:
    """The scores of every domain."""
    names = ("loss", "token_accuracy", "exact_match")
    return isinstance(value, dict) and all(
        isinstance(scores, dict) and all(_figure(scores.get(name, "")) for name in names) and "examples" in scores
        for scores in value.values()
    )


_NEEDED: Mapping[str, Mapping[str, Check]] = {
    "train": {
        "answer_loss": _figure,
        "real_slots": _by_modality,
        "nominal_real_slots": _number,
        "worst_load_max_over_mean": _figure,
        "mean_virtual_share": _figure,
    },
    "validation": {
        "loss": _figure,
        "domains": _scores,
        "real_slots": _by_modality,
        "virtual_share": _by_modality,
        "mean_real_slots": _number,
        "nominal_real_slots": _number,
        "load_max_over_mean": _list,
        "dropped": _list,
    },
}


_OPTIONAL = ("balance_loss", "importance_loss", "z_loss")  # figures that may be missing


def require_complete(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Checks that the records have what tables and charts show, in the expected form.

    Raises:
      UserError: naming the record and the field.
    """
    domains: set[str] | None = None
    for record in records:
        where = f"{path}, record of kind {record['kind']!r} at step {record['step']}"
        for name, check in _NEEDED.get(record["kind"], {}).items():
            if name not in record or not check(record[name]):
                raise UserError(f"{where}: {name} is not what a run of this version writes")
        for name in _OPTIONAL:
            if not _figure(record.get(name)):
                raise UserError(f"{where}: {name} is not a number")
        if record["kind"] != "validation":
            continue
        layers = {len(record[name]) for name in ("real_slots", "virtual_share", "load_max_over_mean", "dropped")}
        if len(layers) > 1:
            raise UserError(f"{where}: its lists by layer differ in length")
        domains = domains or set(record["domains"])
        if set(record["domains"]) != domains:
            raise UserError(f"{where}: its domains are not those of the records before it")
