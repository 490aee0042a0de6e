"""Opens the examples of a mixture's domains: generated ones, or those of a folder."""

import pathlib

from anyexperts_jax.core.errors import UserError, require, require_one_of
from anyexperts_jax.core.registries import SOURCES
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.domain import SPLITS
from anyexperts_jax.data.source import FolderFormat, GeneratedSource, Source


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
    path = config.folder_paths().get(name)
    if path is None:
        length = config.train_examples if examples is None else examples
        return GeneratedSource(name, split, length, config.seed, config.levels)
    source = open_folder(path, split)
    if examples is not None and examples > len(source):
        raise UserError(f"{path} holds {len(source)} examples of split {split!r}, fewer than the {examples} asked for")
    return source


def examples_there(config: DataConfig, name: str, split: str, most: int) -> int:
    """How many of the first `most` examples of a domain's split there are: a folder may hold fewer.

    Raises:
      UserError: when the domain is not in the mixture, or its folder is missing, empty, or has no such split.
    """
    require(most >= 1, f"examples={most} must be >= 1")
    if name not in config.folder_paths():
        return min(most, len(open_source(config, name, split, most)))
    return min(most, len(open_source(config, name, split)))


def open_folder(path: pathlib.Path, split: str) -> Source:
    """The examples of `split` in a folder of one of the kinds in SOURCES.

    Raises:
      UserError: when the folder is missing, empty, or of none of them.
    """
    require(path.is_dir(), f"the data directory {path} does not exist")
    require(any(path.iterdir()), f"the data directory {path} is empty")
    formats: list[FolderFormat] = [SOURCES[name] for name in SOURCES]
    for one in formats:
        if one.is_folder(path):
            return one.open(path, split)
    markers = [f"{one.marker} ({name})" for name, one in zip(SOURCES, formats, strict=True)]
    raise UserError(f"the data directory {path} has neither {' nor '.join(markers)}")
