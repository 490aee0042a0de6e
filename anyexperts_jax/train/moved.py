"""Keys of run configurations that were moved or removed. Files and run directories of earlier versions still load, or
one line says what to change."""

from collections.abc import Mapping
from typing import Any

from anyexperts_jax.core.config import SWITCH_NAMES
from anyexperts_jax.core.errors import require

_STACK = ("model", "stack")
_MOE = ("model", "moe")
_EXECUTION = (*_STACK, "execution")

# The old path of a key, table by table, and its current path.
MOVED: dict[tuple[str, ...], tuple[str, ...]] = {
    (*_STACK, "dispatch"): (*_EXECUTION, "dispatch"),
    (*_STACK, "expert_mlp"): (*_EXECUTION, "implementation"),
    (*_STACK, "expert_residuals"): (*_EXECUTION, "residuals"),
    (*_STACK, "exchange_chunks"): (*_EXECUTION, "exchange_chunks"),
    (*_MOE, "capacity_factor"): (*_EXECUTION, "capacity_factor"),
    (*_MOE, "overflow"): (*_EXECUTION, "overflow"),
    **{(*_MOE, name): (*_MOE, "switches", name) for name in sorted(SWITCH_NAMES)},
}

# Keys that were removed without a replacement, and what to do about each.
GONE: dict[tuple[str, ...], str] = {
    ("model", "vision", "max_places"): "a patch has a row and a column now, on a grid of any size: delete the key; a "
    "run or checkpoint with this key numbered places by a single index and must be trained again",
}


def move_keys(values: Mapping[str, Any], root: tuple[str, ...] = ()) -> dict[str, Any]:
    """`values` with every key of `MOVED` in its current table.

    Args:
      root: the path of the table that `values` are, if not a whole run configuration: ("model",) for a model's.

    Raises:
      UserError: if a key is given in both places, or is in `GONE`.
    """
    moved: dict[str, Any] = _copy(values)
    for gone, instead in GONE.items():
        table = _table(moved, gone[len(root) : -1], make=False) if gone[: len(root)] == root else None
        require(table is None or gone[-1] not in table, f"key {'.'.join(gone)} is gone: {instead}")
    for old, new in MOVED.items():
        if old[: len(root)] != root or new[: len(root)] != root:
            continue
        table = _table(moved, old[len(root) : -1], make=False)
        if table is None or old[-1] not in table:
            continue
        target = _table(moved, new[len(root) : -1], make=True)
        both = f"key {'.'.join(old)} is now {'.'.join(new)}, and both are given; leave the former out"
        require(target is not None and new[-1] not in target, both)
        assert target is not None
        target[new[-1]] = table.pop(old[-1])
    return moved


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _table(values: dict[str, Any], path: tuple[str, ...], *, make: bool) -> dict[str, Any] | None:
    """The table at `path`. If there is none, creates it if `make`, else returns None."""
    for key in path:
        if key not in values and make:
            values[key] = {}
        values = values.get(key)  # type: ignore[assignment]
        if not isinstance(values, dict):
            return None
    return values
