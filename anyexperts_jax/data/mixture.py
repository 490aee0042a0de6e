"""Opens the sources of a mixture's domains: generated ones, or those at a path or address."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of
from anyexperts_jax.core.registries import SOURCES
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.domain import SPLITS
from anyexperts_jax.data.huggingface import holds_other_rows
from anyexperts_jax.data.row_source import RowSource
from anyexperts_jax.data.source import FolderFormat, GeneratedSource, Source
from anyexperts_jax.data.sources.find import find_rows
from anyexperts_jax.data.sources.places import StoreError, is_address
from anyexperts_jax.data.sources.rows import Rows
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.store import open_tokenizer


class Sources:
    """The sources of a mixture. Each place is inspected, indexed and opened once, so make one instance and pass it on.

    Attributes:
      config: the mixture.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._rows: dict[str, tuple[str, Rows]] = {}  # by domain: a description of its place, and its rows
        self._opened: dict[tuple[str, str], Source] = {}  # by domain and split

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The mixture's tokenizer."""
        return open_tokenizer(self.config.tokenizer)

    def open(self, name: str, split: str, examples: int | None = None) -> Source:
        """Opens the examples of a domain's split.

        Args:
          examples: how many; a generated domain has any number (None: `train_examples`), a place at most what it holds
            (None: all).

        Raises:
          UserError: if the domain is not in the mixture, or its place is missing, empty, or holds too few.
        """
        config = self.config
        config.domain_index(name)
        require_one_of("split", split, SPLITS)
        place = config.places().get(name)
        if place is None:
            length = config.train_examples if examples is None else examples
            return GeneratedSource(name, split, length, config.seed, config.levels)
        if (name, split) not in self._opened:
            self._opened[name, split] = self._open_place(name, place, split)
        source = self._opened[name, split]
        if examples is not None and examples > len(source):
            raise UserError(
                f"{place} holds {len(source)} examples of split {split!r}, fewer than the {examples} asked for"
            )
        return source

    def count(self, name: str, split: str, most: int) -> int:
        """Returns `most`, or the number of examples of a domain's split if it has fewer.

        Raises:
          UserError: if the domain is not in the mixture, or its place is missing, empty, or has no such split.
        """
        require(most >= 1, f"examples={most} must be >= 1")
        generated = name not in self.config.places()
        return min(most, len(self.open(name, split, most if generated else None)))

    def describe(self, name: str) -> str:
        """Describes, in one line, what was found at the place of a domain.

        Raises:
          UserError: if it cannot be read.
        """
        place = self.config.places()[name]
        kind = self._folder_format(place)
        if kind is not None:
            return f"{name}: {place}: a folder with {kind.marker}"
        said, rows = self._rows_of(name, place)
        splits, what = [], "rows"
        for split in SPLITS:
            try:
                source = self.open(name, split)
            except StoreError:
                raise
            except UserError:  # the reason is reported when the split is opened
                splits.append(f"no {split}")
                continue
            assert isinstance(source, RowSource)
            by = " by hash" if source.held_out and split != "train" else ""
            cut = f" in {len(source):,} chunks" if source.is_corpus else ""
            what = "documents" if source.is_corpus else "rows"
            splits.append(f"{len(source.rows_N):,} {split}{by}{cut}")
        return f"{name}: {place}: {said}, {len(rows):,} {what}: {comma_list(splits)}"

    def _open_place(self, name: str, place: str, split: str) -> Source:
        kind = self._folder_format(place)
        if kind is not None:
            return kind.open(pathlib.Path(place), split)
        return RowSource(name, self._rows_of(name, place)[1], split, self.config, self.tokenizer)

    def _rows_of(self, name: str, place: str) -> tuple[str, Rows]:
        if name not in self._rows:
            self._rows[name] = find_rows(place)
        return self._rows[name]

    def _folder_format(self, place: str) -> FolderFormat | None:
        """Returns the format of a folder with a dataset of questions; None: its files are read as rows."""
        path = pathlib.Path(place)
        if is_address(place) or not path.is_dir() or holds_other_rows(path, self.config.columns):
            return None
        formats: list[FolderFormat] = [SOURCES[name] for name in SOURCES]
        return next((one for one in formats if one.is_folder(path)), None)


def open_source(config: DataConfig, name: str, split: str, examples: int | None = None) -> Source:
    """Like `Sources.open`, for callers that read only this split."""
    return Sources(config).open(name, split, examples)


def with_places(config: DataConfig, places: Mapping[str, str]) -> DataConfig:
    """Returns the mixture with these places, which add domains or replace the places of its own."""
    domains = tuple(dict.fromkeys([*config.domains, *places]))
    folders = tuple(f"{name}={place}" for name, place in {**config.places(), **places}.items())
    weights = config.weights if len(domains) == len(config.domains) else None
    return dataclasses.replace(config, domains=domains, folders=folders, weights=weights, fingerprints=())
