"""Type checks shared by the frozen configurations. The annotation of a field says what it may hold.

JAX turns a configuration's numbers into int32 and float32, so an int must fit int32 and a float must fit float32;
`Seed` is the exception. A field is a bool, int, float, str, Literal, dataclass, or a tuple of one of these, and
may be optional.
"""

import dataclasses
import functools
import math
import types
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from anyexperts_jax.core.errors import comma_list, require, require_one_of, shown

INT32 = range(-(2**31), 2**31)
Seed = Annotated[int, range(2**32)]  # JAX takes seeds modulo 2^32: two beyond that could silently be the same run
_SMALLEST, _LARGEST = (float(limit) for limit in (np.finfo(np.float32).smallest_normal, np.finfo(np.float32).max))


def check_field_types(config: Any, prefix: str = "") -> None:
    """Checks every field of a dataclass against its annotation; `prefix` goes before the field's name in the message.

    Raises:
      UserError: naming the first field whose type is wrong, or whose number does not fit int32 or float32.
    """
    cls: Any = type(config)
    for name, hint in field_types(cls).items():
        _check(hint, getattr(config, name), f"{prefix}{name}")


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The annotation of every field, including `Annotated` ranges."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def without_none(hint: Any) -> tuple[Any, bool]:
    """Splits an annotation into the type itself and whether it is optional."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    (kind,) = (option for option in options if option is not type(None))
    return kind, len(options) > 1


def type_name(hint: Any) -> str:
    """The type in the words of a configuration file: "int", "float or none", "list of str", "add | off"."""
    kind, optional = without_none(hint)
    if get_origin(kind) is Literal:
        name = " | ".join(map(str, get_args(kind)))
    elif get_origin(kind) is tuple:
        name = f"list of {type_name(get_args(kind)[0])}"
    elif get_origin(kind) is Annotated:
        name = type_name(get_args(kind)[0])
    else:
        name = kind.__name__
    return f"{name} or none" if optional else name


def broken_rule(kind: Any, value: Any) -> str | None:
    """The rule that a single value of type `kind` breaks, phrased to follow "must be"; None if it breaks none."""
    if get_origin(kind) is Literal:
        matches = any(type(value) is type(choice) and value == choice for choice in get_args(kind))
        return None if matches else f"one of {comma_list(get_args(kind))}"
    if get_origin(kind) is Annotated:
        return _broken_int_rule(get_args(kind)[1], value)
    if kind is int:
        return _broken_int_rule(INT32, value)
    if kind is float:
        return _broken_float_rule(value)
    if kind is str:
        return _broken_text_rule(value)
    if isinstance(value, kind):
        return None
    return "True or False" if kind is bool else f"a {kind.__name__}"


def _check(hint: Any, value: Any, name: str) -> None:
    kind, optional = without_none(hint)
    if value is None and optional:
        return
    if get_origin(kind) is tuple:
        require(isinstance(value, tuple), f"{name}={shown(value)} must be a tuple of {type_name(get_args(kind)[0])}")
        for index, item in enumerate(value):
            _check(get_args(kind)[0], item, f"{name}[{index}]")
        return
    if get_origin(kind) is Literal and not optional:
        require_one_of(name, value, get_args(kind))
    rule = broken_rule(kind, value)
    require(rule is None, f"{name}={shown(value)} must be {rule}" + (" or None" if optional else ""))


def _broken_int_rule(allowed: range, value: Any) -> str | None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        return "a whole number"
    low = "0" if allowed.start == 0 else f"-2^{int(math.log2(-allowed.start))}"
    return None if int(value) in allowed else f"in [{low}, 2^{int(math.log2(allowed.stop))})"


def _broken_float_rule(value: Any) -> str | None:
    if not isinstance(value, Real) or isinstance(value, bool):
        return "a finite number"
    try:
        size = abs(float(value))
    except OverflowError:  # an integer beyond 1e308
        size = math.inf
    if not math.isfinite(size):
        return "a finite number"
    return None if size == 0 or _SMALLEST <= size <= _LARGEST else "0, or between 1.2e-38 and 3.4e38 in size (float32)"


def _broken_text_rule(value: Any) -> str | None:
    if not isinstance(value, str):
        return "a string"
    whole = "\0" not in value and value == value.encode("utf-8", errors="replace").decode("utf-8")
    return None if whole else "a string of UTF-8 characters, without NUL"
