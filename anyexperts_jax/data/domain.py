"""The protocol `Domain`, and access to registered domains."""

import functools
import zlib
from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np

from anyexperts_jax.core.errors import require, require_one_of
from anyexperts_jax.core.registries import DOMAINS
from anyexperts_jax.data.example import LEVELS, Example

SPLITS = ("train", "validation", "test")
# Version of the assignment of sources to splits. In version 1 two splits could share a pair of numbers in another
# order, cuts of one font, variants of one voice, and scans by one writer.
SPLITS_VERSION = 2
Metric = str  # a name in core.registries.METRICS

DOMAIN_NAMES = DOMAINS.names()  # the domains that come with the package


@runtime_checkable
class Domain(Protocol):
    """A family of questions on signals of one kind.

    The splits of a domain share no source (handwriting, pair of numbers, family of fonts or of voices), and `example`
    is a pure function: the same arguments give the same example in any order, in any process, and on every machine
    that has the same version of what draws or speaks for it: Pillow for `ocr`, eSpeak NG for `speech`, nothing for the
    others.
    """

    @property
    def name(self) -> str: ...

    @property
    def question_types(self) -> tuple[str, ...]: ...

    @property
    def metric(self) -> Metric: ...

    def example(self, split: str, index: int, seed: int = 0, levels: Sequence[int] = LEVELS) -> Example:
        """Example number `index` (any int >= 0) of `split`, of a level drawn from `levels`."""
        ...


@functools.cache
def domain(name: str) -> Domain:
    """Returns the domain `name` of DOMAINS.

    Raises:
      UserError: if there is no such domain.
    """
    return cast(Domain, DOMAINS[name]())


def example_generator(
    name: str, split: str, index: int, seed: int, levels: Sequence[int]
) -> tuple[np.random.Generator, int]:
    """Returns the random generator of one example, and its level.

    The generator depends only on the arguments. Draw whole numbers from it (`integers`, `permutation`), since they do
    not depend on a machine's floating point.

    Raises:
      UserError: if split, index, seed or levels are out of range.

    Example:
        >>> import anyexperts_jax as ax
        >>> rng, level = ax.example_generator("coins", "train", index=7, seed=0, levels=(1, 2))
        >>> 1 <= int(rng.integers(1, 10)) < 10, level in (1, 2)
        (True, True)
    """
    require_one_of("split", split, SPLITS)
    require(index >= 0, f"index={index} must be >= 0")
    require(seed >= 0, f"seed={seed} must be >= 0")
    require(len(levels) > 0, "levels is empty; valid: 1, 2, 3")
    for level in levels:
        require_one_of("level", level, LEVELS)
    rng = np.random.default_rng([zlib.crc32(f"{name}/{split}".encode()), seed, index])
    return rng, int(levels[int(rng.integers(len(levels)))])
