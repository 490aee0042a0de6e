"""Which of the collected tests a run takes: the options `--cases` and `--part` of pytest."""

import collections
import zlib
from collections.abc import Sequence

import pytest


def of_cases(items: Sequence, most: int | None) -> set:
    """Returns `most` cases of every parametrised test, spread evenly; those marked `every_case` all stay."""
    if most is None:
        return set(items)
    if most < 1:
        raise pytest.UsageError(f"--cases {most}: must be at least 1")
    cases = collections.defaultdict(list)
    for item in items:
        whole = item.get_closest_marker("every_case")
        cases[item.nodeid if whole else item.nodeid.split("[")[0]].append(item)
    return {item for own in cases.values() for item in _spread(own, most)}


def of_part(items: Sequence, part: str | None) -> set:
    """Returns part I of N, "I/N" with I from 0. A test's name decides its part, so the N parts make up the whole."""
    if part is None:
        return set(items)
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise pytest.UsageError(f"--part {part}: must be I/N with I from 0 to N - 1, such as 0/4")
    return {item for item in items if zlib.crc32(item.nodeid.encode()) % int(parts) == int(number)}


def _spread(cases: list, most: int) -> list:
    if len(cases) <= most:
        return cases
    return [cases[round(i * (len(cases) - 1) / max(most - 1, 1))] for i in range(most)]
