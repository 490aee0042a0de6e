"""`DataConfig`, the mixture of domains that a run reads, and `EncodingSpec`, the shapes of its sequences."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Literal

from anyexperts_jax.core.checks import Seed, check_field_types
from anyexperts_jax.core.errors import comma_list, require, require_one_of
from anyexperts_jax.core.registries import DOMAINS, METRICS
from anyexperts_jax.data.domain import DOMAIN_NAMES
from anyexperts_jax.data.example import LEVELS
from anyexperts_jax.tokenizers.bytes import NAME as BYTES_NAME

Packing = Literal["none", "first_fit"]
Pictures = Literal["fit", "whole"]
OnBadRow = Literal["stop", "skip"]

MOST_MAKERS = 1024  # limit for threads and processes that make batches, to protect the machine


@dataclasses.dataclass(frozen=True)
class EncodingSpec:
    """The fixed shapes of every sequence of a run, and how media become positions.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    max_length: int = 128  # T, positions of a sequence
    patch_size: int = 8  # side of a square patch, in pixels
    max_patches: int = 72  # P, patches of a sequence; 0: no image, no video
    max_video_frames: int = 16  # frames of a video
    pictures: Pictures = "fit"  # resized, in shape, where needed; "whole": refused unless whole patches that fit
    mel_bands: int = 40  # numbers in a log-mel frame
    frames_per_chunk: int = 4  # log-mel frames (10 ms each) that make one audio position
    max_frames: int = 72  # S, audio positions of a sequence; 0: no audio
    patch_evidence: float = 0.125  # a patch is evidence when at least this share of its pixels is

    def __post_init__(self) -> None:
        check_field_types(self, "encoding.")
        for name in ("max_length", "patch_size", "max_video_frames", "mel_bands", "frames_per_chunk"):
            require(getattr(self, name) >= 1, f"encoding.{name}={getattr(self, name)} must be >= 1")
        for name in ("max_patches", "max_frames"):
            require(getattr(self, name) >= 0, f"encoding.{name}={getattr(self, name)} must be >= 0")
        share = self.patch_evidence
        require(0 < share <= 1, f"encoding.patch_evidence={share} must be in (0, 1]")

    @property
    def patch_features(self) -> int:
        return 3 * self.patch_size**2

    @property
    def frame_features(self) -> int:
        return self.mel_bands * self.frames_per_chunk


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of columns in the user's own data. A source without such a column is read by the default name."""

    messages: str = "messages"  # chats as transformers and OpenAI write them
    conversations: str = "conversations"  # chats as LLaVA writes them
    question: str = "question"  # what is asked
    answer: str = "answer"  # what is learned
    prompt: str = "prompt"  # of a preference: a text, or messages
    chosen: str = "chosen"  # of a preference: the better answer
    rejected: str = "rejected"  # of a preference: the worse answer
    question_type: str = "question_type"  # kind of question; each kind gets a score of its own
    level: str = "level"  # difficulty, 1 to 3
    text: str = "text"  # a document; beside a medium, its transcript or caption
    image: str = "image"  # a picture, or several
    audio: str = "audio"  # a sound, or several
    video: str = "video"  # a film, or several
    file: str = "file"  # in the table of a folder of recordings or pictures: the file of a row

    def __post_init__(self) -> None:
        check_field_types(self, "data.columns.")

    @functools.cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Returns the names each column may have in a row: the configured one, then the default."""
        mapped = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {own: tuple(dict.fromkeys((name, own))) for own, name in mapped.items()}

    @functools.cached_property
    def media_names(self) -> frozenset[str]:
        """Returns the names that columns with media may have in a row."""
        return frozenset(name for kind in ("image", "audio", "video") for name in (*self.names[kind], f"{kind}s"))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The mixture of domains. Equal configurations give the same batches in the same order.

    Raises:
      UserError: naming the value and the valid ones.
    """

    domains: tuple[str, ...] = DOMAIN_NAMES  # domains: generated ones, or names that `folders` defines
    weights: tuple[float, ...] | None = None  # shares of the domains, in any unit; None: all the same
    temperature: float | None = None  # shares in proportion to each domain's examples ** (1 / temperature)
    folders: tuple[str, ...] = ()  # "NAME=PATH": the domain NAME is read from a file, pattern, folder or address
    metrics: tuple[str, ...] = ()  # "NAME=METRIC": the domain NAME is scored by METRIC (else by its own)
    fingerprints: tuple[str, ...] = ()  # "NAME=HEX" of these, which training records and holds to
    columns: Columns = dataclasses.field(default_factory=Columns)
    chat_template: str = "auto"  # auto: the tokenizer's, if it has one; none: SEP and EOS alone; or one by name
    held_out: float = 0.05  # share of the rows for validation, and for test, if the data do not name these splits
    split_by: str | None = None  # column by whose value rows are held out, as speaker; None: by the whole row
    on_bad_row: OnBadRow = "stop"  # skip: a row that cannot be used is counted, and another takes its place
    max_bad_share: float = 0.01  # largest share of a split's rows that may be skipped
    seed: Seed = 0  # seed of the examples and of their order
    levels: tuple[int, ...] = LEVELS  # difficulties that generated domains draw from
    train_examples: int = 1_000_000  # examples of each generated domain; then they repeat in another order
    packing: Packing = "none"  # a training row holds one example; first_fit: as many as fit
    packing_window: int = 64  # rows that are filled at the same time; more leave less padding
    tokenizer: str = BYTES_NAME  # "bytes", or the path of a folder with tokenizer.json, or of a GGUF file
    token_fingerprint: str | None = None  # of that tokenizer, which training records and holds to; None: bytes
    encoding: EncodingSpec = dataclasses.field(default_factory=EncodingSpec)
    threads: int = 1  # threads that make batches ahead of time; 0: batches are made when they are needed
    prefetch: int = 2  # batches made ahead of time, by threads or by each worker
    workers: int = 0  # processes that make batches; 0: threads make them

    def __post_init__(self) -> None:
        check_field_types(self, "data.")
        require(len(self.domains) > 0, f"data.domains is empty; valid: {comma_list(DOMAINS)}")
        require(len(set(self.domains)) == len(self.domains), f"data.domains={self.domains} names a domain twice")
        folders = self.folder_paths()
        valid = tuple(dict.fromkeys((*DOMAINS.names(), *folders)))
        for name in self.domains:
            require_one_of("data.domains entry", name, valid)
        for name in folders:
            require(name in self.domains, f"data.folders names {name!r}, which is not in data.domains")
        self.metric_names()
        _require_weights(self.weights, self.domains)
        require(self.weights is None or self.temperature is None, "give data.weights or data.temperature, not both")
        heat = self.temperature
        require(heat is None or heat > 0, f"data.temperature={heat} must be > 0")
        require(0 < self.held_out <= 0.4, f"data.held_out={self.held_out} must be in (0, 0.4]")
        require(0 <= self.max_bad_share < 1, f"data.max_bad_share={self.max_bad_share} must be in [0, 1)")
        require(bool(self.chat_template), "data.chat_template is empty; give auto, none or a name")
        require(len(self.levels) > 0, "data.levels is empty; valid: 1, 2, 3")
        for level in self.levels:
            require_one_of("data.levels entry", level, LEVELS)
        require(bool(self.tokenizer), f"data.tokenizer is empty; give {BYTES_NAME!r} or a path")
        require(self.train_examples >= 1, f"data.train_examples={self.train_examples} must be >= 1")
        for name in ("packing_window", "prefetch"):
            require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)} must be >= 1")
        for name in ("threads", "workers"):
            value = getattr(self, name)
            require(value >= 0, f"data.{name}={value} must be >= 0")
            require(value <= MOST_MAKERS, f"data.{name}={value} must be <= {MOST_MAKERS}")

    def folder_paths(self) -> dict[str, pathlib.Path]:
        """Returns the local folders, by domain."""
        return {name: pathlib.Path(place) for name, place in self.places().items()}

    def metric_names(self) -> dict[str, str]:
        """Returns the configured metrics, by domain."""
        return named_metrics(self.metrics, "data.metrics", self.domains)

    def places(self) -> dict[str, str]:
        """Returns the configured paths, patterns and addresses, by domain."""
        return named_places(self.folders, "data.folders")

    def shares(self, lengths: Sequence[int] = ()) -> tuple[float, ...]:
        """Returns the weights of the domains, in order, scaled to sum to 1.

        Args:
          lengths: the number of examples of each, which a temperature needs.
        """
        weights = self.weights or (1.0,) * len(self.domains)
        if self.temperature is not None:
            weights = tuple(length ** (1 / self.temperature) for length in lengths)
        return tuple(weight / sum(weights) for weight in weights)

    def domain_index(self, name: str) -> int:
        """Returns the index of the domain in `Batch.domain_B`."""
        require_one_of("domain", name, self.domains)
        return self.domains.index(name)


def named_places(entries: Iterable[str], option: str) -> dict[str, str]:
    """Parses entries NAME=PATH into places by name; `option` is for error messages.

    Raises:
      UserError: if an entry has another form, or a name occurs twice or cannot be printed.
    """
    places: dict[str, str] = {}
    for entry in entries:
        name, equals, place = entry.partition("=")
        require(bool(name and equals and place), f"{option} entry {entry!r} must read NAME=PATH")
        require(name.isprintable(), f"{option}: {name!r} has characters that cannot be printed; choose another name")
        require(name not in places, f"{option} names {name!r} twice")
        places[name] = place
    return places


def named_metrics(entries: Iterable[str], option: str, domains: Iterable[str]) -> dict[str, str]:
    """Parses entries NAME=METRIC into metrics by domain; `option` is for error messages.

    Raises:
      UserError: if an entry has another form, the domain or metric is unknown, or a domain occurs twice.
    """
    metrics: dict[str, str] = {}
    for entry in entries:
        name, equals, metric = entry.partition("=")
        require(bool(name and equals and metric), f"{option} entry {entry!r} must read NAME=METRIC, as spoken=wer")
        require_one_of(f"{option}: domain", name, tuple(domains))
        METRICS.check(f"{option}: metric of {name}", metric)
        require(name not in metrics, f"{option} names {name!r} twice")
        metrics[name] = metric
    return metrics


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
