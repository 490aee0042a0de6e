import dataclasses
from typing import Literal

import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train.strict import build, differing_keys, flatten, merge


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner = dataclasses.field(default_factory=Inner)
    maybe: Inner | None = None


def test_values_fill_the_nested_dataclass():
    config = build(Outer, {"count": 3, "inner": {"rate": 2, "sizes": [4, 5]}, "maybe": {"kind": "b"}})
    assert config == Outer(3, Inner(rate=2.0, sizes=(4, 5)), Inner(kind="b"))
    assert type(config.inner.rate) is float
    assert build(Outer, {"count": 3}).maybe is None
    assert build(Outer, {"count": 3, "maybe": "none"}).maybe is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 3}, r"unknown key cuont; did you mean count\? valid: count, inner, maybe"),
        ({"count": 3, "inner": {"rat": 1.0}}, r"unknown key inner\.rat; did you mean rate\? valid: rate, kind, sizes"),
        ({"count": 3, "maybe": {"q": 1}}, r"unknown key maybe\.q; valid: rate"),
        ({}, "key count is missing"),
        ({"count": "3"}, "key count='3' must be int"),
        ({"count": True}, "key count=True must be int: a whole number"),
        ({"count": 1.0}, r"key count=1\.0 must be int"),
        ({"count": 3, "inner": {"rate": "fast"}}, r"key inner\.rate='fast' must be float"),
        ({"count": 3, "inner": {"kind": "c"}}, r"key inner\.kind='c' must be one of a, b"),
        ({"count": 3, "inner": {"sizes": ["x"]}}, r"key inner\.sizes"),
        ({"count": 3, "inner": 7}, "key inner=7 must be Inner"),
        ({"count": 3, "inner": {"kind": "none"}}, r"key inner\.kind='none' must be one of a, b"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as error:
        build(Outer, values)
    assert "\n" not in str(error.value)


def test_differing_keys_and_merge():
    ours, theirs = Outer(1, Inner(rate=0.1)), Outer(2, Inner(rate=0.1), Inner())
    assert flatten(ours) == {
        "count": 1, "inner.rate": 0.1, "inner.kind": "a", "inner.sizes": (1, 2), "maybe": None,
    }  # fmt: skip
    assert differing_keys(ours, theirs) == {
        "count": (1, 2), "maybe.rate": (None, 0.5), "maybe.kind": (None, "a"), "maybe.sizes": (None, (1, 2)),
    }  # fmt: skip
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "d": {"e": 1}}) == {
        "a": {"b": 5, "c": 2},
        "d": {"e": 1},
    }
