"""Opens the examples of a mixture's domains: generated ones, or those at a path or address."""

import dataclasses
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
from anyexperts_jax.data.sources.places import is_address
from anyexperts_jax.tokenizers.store import open_tokenizer


def open_source(config: DataConfig, name: str, split: str, examples: int | None = None) -> Source:
    """The examples of a domain's split.

    Args:
      examples: how many; a generated domain has as many as one asks for (None: `train_examples`), a folder at most
        what it holds (None: all).

    Raises:
      UserError: when the domain is not in the mixture, or its folder is missing, empty, or holds too few.
    """
    config.domain_index(name)
    require_one_of("split", split, SPLITS)
    place = config.places().get(name)
    if place is None:
        length = config.train_examples if examples is None else examples
        return GeneratedSource(name, split, length, config.seed, config.levels)
    source = _open_place(config, name, place, split)
    if examples is not None and examples > len(source):
        raise UserError(f"{place} holds {len(source)} examples of split {split!r}, fewer than the {examples} asked for")
    return source


def examples_there(config: DataConfig, name: str, split: str, most: int) -> int:
    """How many of the first `most` examples of a domain's split there are: a folder may hold fewer.

    Raises:
      UserError: when the domain is not in the mixture, or its folder is missing, empty, or has no such split.
    """
    require(most >= 1, f"examples={most} must be >= 1")
    if name not in config.places():
        return min(most, len(open_source(config, name, split, most)))
    return min(most, len(open_source(config, name, split)))


def with_places(config: DataConfig, places: Mapping[str, str]) -> DataConfig:
    """The mixture with further domains read from these places, or its own from elsewhere."""
    domains = tuple(dict.fromkeys([*config.domains, *places]))
    folders = tuple(f"{name}={place}" for name, place in {**config.places(), **places}.items())
    weights = config.weights if len(domains) == len(config.domains) else None
    return dataclasses.replace(config, domains=domains, folders=folders, weights=weights, fingerprints=())


def _open_place(config: DataConfig, name: str, place: str, split: str) -> Source:
    kind = None if is_address(place) else _folder_format(pathlib.Path(place), config)
    if kind is not None:
        return kind.open(pathlib.Path(place), split)
    _, rows = find_rows(place)
    return RowSource(name, rows, split, config, open_tokenizer(config.tokenizer))


def _folder_format(path: pathlib.Path, config: DataConfig) -> FolderFormat | None:
    """The kind of a folder that is a dataset of questions by what lies in it; None: it is read as rows."""
    if not path.is_dir() or holds_other_rows(path, config.columns):
        return None
    formats: list[FolderFormat] = [SOURCES[name] for name in SOURCES]
    return next((one for one in formats if one.is_folder(path)), None)


def describe_place(config: DataConfig, name: str) -> str:
    """What was found at the place of a domain, in one line.

    Raises:
      UserError: when it cannot be read.
    """
    place = config.places()[name]
    kind = None if is_address(place) else _folder_format(pathlib.Path(place), config)
    if kind is not None:
        return f"{name}: {place}: a folder with {kind.marker}"
    said, rows = find_rows(place)
    tokenizer = open_tokenizer(config.tokenizer)
    splits, what = [], "rows"
    for split in SPLITS:
        try:
            source = RowSource(name, rows, split, config, tokenizer)
        except UserError:  # told by whoever needs the split
            splits.append(f"no {split}")
            continue
        by = " by hash" if source.held_out and split != "train" else ""
        cut = f" in {len(source):,} stretches" if source.is_corpus else ""
        what = "documents" if source.is_corpus else "rows"
        splits.append(f"{len(source.rows_N):,} {split}{by}{cut}")
    return f"{name}: {place}: {said}, {len(rows):,} {what}: {comma_list(splits)}"
