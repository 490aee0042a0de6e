"""`Source`, the examples of one domain and split by index, which the pipeline reads."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from anyexperts_jax.data.conversation import Item
from anyexperts_jax.data.domain import Metric, domain
from anyexperts_jax.data.example import Example


@runtime_checkable
class Source(Protocol):
    """The examples of one domain and split. Reading an index twice gives the same example."""

    @property
    def question_types(self) -> tuple[str, ...]: ...

    @property
    def metric(self) -> Metric: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclasses.dataclass(frozen=True)
class FolderFormat:
    """A kind of folder that a user's domain can be read from, an entry of `core.registries.SOURCES`.

    marker: the file or files by which `is_folder` recognises it, for messages.
    is_folder: whether an existing folder that is not empty is of this kind.
    open: (folder, split) -> its examples; raises UserError if it cannot be read or has no such split.
    """

    marker: str
    is_folder: Callable[[pathlib.Path], bool]
    open: Callable[[pathlib.Path, str], Source]


@dataclasses.dataclass(frozen=True)
class GeneratedSource:
    """Examples of a registered domain, made when they are read. Picklable, so that worker processes can make them."""

    name: str
    split: str
    length: int
    seed: int
    levels: tuple[int, ...]

    @property
    def question_types(self) -> tuple[str, ...]:
        return domain(self.name).question_types

    @property
    def metric(self) -> Metric:
        return domain(self.name).metric

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return domain(self.name).example(self.split, index, self.seed, self.levels)
