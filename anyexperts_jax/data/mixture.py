"""`DataConfig`: which domains a run is trained on, from where, in which shares and shapes."""

import dataclasses
import pathlib

from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of
from anyexperts_jax.data import array_records, huggingface
from anyexperts_jax.data.domain import DOMAIN_NAMES, SPLITS
from anyexperts_jax.data.encode import EncodingSpec
from anyexperts_jax.data.example import LEVELS
from anyexperts_jax.data.source import GeneratedSource, Source


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The mixture of domains. Two configs that are equal give the same batches in the same order.

    Raises:
      UserError: naming the value and the valid ones.
    """

    domains: tuple[str, ...] = DOMAIN_NAMES  # generated ones, or names that `folders` defines
    weights: tuple[float, ...] | None = None  # shares of the domains, in any unit; None: all the same
    folders: tuple[str, ...] = ()  # "NAME=PATH": the domain NAME is read from the folder PATH
    seed: int = 0  # of the examples and of their order
    levels: tuple[int, ...] = LEVELS  # difficulties that generated domains draw from
    train_examples: int = 1_000_000  # of each generated domain, before they come again in another order
    encoding: EncodingSpec = dataclasses.field(default_factory=EncodingSpec)
    threads: int = 1  # that make batches ahead of time; 0: made when asked for
    prefetch: int = 2  # batches made ahead of time, by threads or by each worker
    workers: int = 0  # processes that make batches; 0: none, the threads do

    def __post_init__(self) -> None:
        for name in ("domains", "weights", "folders", "levels"):  # lists, as TOML and JSON give them
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        require(len(self.domains) > 0, f"data.domains is empty; valid: {comma_list(DOMAIN_NAMES)}")
        require(len(set(self.domains)) == len(self.domains), f"data.domains={self.domains} names a domain twice")
        folders = self.folder_paths()
        valid = tuple(dict.fromkeys((*DOMAIN_NAMES, *folders)))
        for name in self.domains:
            require_one_of("data.domains entry", name, valid)
        for name in folders:
            require(name in self.domains, f"data.folders names {name!r}, which is not in data.domains")
        _require_weights(self.weights, self.domains)
        require(len(self.levels) > 0, "data.levels is empty; valid: 1, 2, 3")
        for level in self.levels:
            require_one_of("data.levels entry", level, LEVELS)
        require(0 <= self.seed < 2**32, f"data.seed={self.seed} must be in [0, 2^32)")
        require(self.train_examples >= 1, f"data.train_examples={self.train_examples} must be >= 1")
        require(self.prefetch >= 1, f"data.prefetch={self.prefetch} must be >= 1")
        for name in ("threads", "workers"):
            require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)} must be >= 0")

    def folder_paths(self) -> dict[str, pathlib.Path]:
        """The folders by the name of their domain."""
        paths: dict[str, pathlib.Path] = {}
        for entry in self.folders:
            name, equals, path = entry.partition("=")
            require(bool(name and equals and path), f"data.folders entry {entry!r} must read NAME=PATH")
            require(name not in paths, f"data.folders names {name!r} twice")
            paths[name] = pathlib.Path(path)
        return paths

    def shares(self) -> tuple[float, ...]:
        """The weights of the domains, in order, scaled to add up to 1."""
        weights = self.weights or (1.0,) * len(self.domains)
        return tuple(weight / sum(weights) for weight in weights)

    def domain_index(self, name: str) -> int:
        """The number of the domain in `Batch.domain_B`."""
        require_one_of("domain", name, self.domains)
        return self.domains.index(name)


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


def open_folder(path: pathlib.Path, split: str) -> Source:
    """The examples of `split` in a folder of ArrayRecord files, or of a Hugging Face dataset saved to disk.

    Raises:
      UserError: when the folder is missing, empty, or neither.
    """
    require(path.is_dir(), f"the data directory {path} does not exist")
    require(any(path.iterdir()), f"the data directory {path} is empty")
    if array_records.is_folder(path):
        return array_records.ArrayRecordSource(path, split)
    if huggingface.is_folder(path):
        return huggingface.HuggingFaceSource(path, split)
    raise UserError(
        f"the data directory {path} has neither {array_records.MANIFEST} (ArrayRecord) nor "
        f"{comma_list(huggingface.MARKERS)} (Hugging Face)"
    )


def _require_weights(weights: tuple[float, ...] | None, domains: tuple[str, ...]) -> None:
    if weights is None:
        return
    require(
        len(weights) == len(domains),
        f"data.weights has {len(weights)} entries for {len(domains)} domains: {comma_list(domains)}",
    )
    for name, weight in zip(domains, weights, strict=True):
        require(
            0 < weight < float("inf"),
            f"data.weights: {weight} for {name} must be finite and > 0; leave the domain out instead",
        )
