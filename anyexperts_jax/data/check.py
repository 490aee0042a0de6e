"""Checks a user's data before a run: how much there is, which rows cannot be used, and what the splits share."""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.core.modality import MODALITY_NAMES, NUM_MODALITIES
from anyexperts_jax.core.plugins import load_plugins
from anyexperts_jax.data.bad_rows import reason_of
from anyexperts_jax.data.config import DataConfig
from anyexperts_jax.data.conversation import Conversation, Document, Item, Medium, Text
from anyexperts_jax.data.domain import SPLITS
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.data.row_source import RowSource
from anyexperts_jax.data.sequence import Size
from anyexperts_jax.data.sources.cache import hash_64
from anyexperts_jax.data.sources.places import StoreError
from anyexperts_jax.data.sources.rows import RowError
from anyexperts_jax.data.turns import chat_template, encode_item, encode_pair

CHUNK = 256  # examples that a process reads at a time
SHOWN = 20  # how many unusable rows, and how many rows in two splits, are named
_SHINGLE, _PERMUTATIONS = 5, 64  # words compared together, and hashes of them, for near duplicates


@dataclasses.dataclass
class SplitReport:
    """What was found in one split.

    tokens_M: positions by modality. lengths: lengths of the sequences that fit. unusable: (file, row, reason) of the
    first unusable rows; `reasons` counts all. hashes: a hash of each example's content, by its index.
    """

    name: str
    split: str
    examples: int = 0
    rows: int = 0
    tokens_M: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(NUM_MODALITIES, np.int64))
    learned: int = 0
    cut: int = 0  # rows whose document is cut into several windows
    lengths: list[int] = dataclasses.field(default_factory=list)
    unusable: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    hashes: dict[int, str] = dataclasses.field(default_factory=dict)
    words: list[tuple[str, Any]] = dataclasses.field(default_factory=list)  # (place, MinHash) of each example
    missing: str = ""  # why the split does not exist

    def add(self, other: "SplitReport") -> None:
        """Adds what was found in another part of the split."""
        self.examples += other.examples
        self.tokens_M = self.tokens_M + other.tokens_M
        self.learned += other.learned
        self.lengths += other.lengths
        self.unusable = (self.unusable + other.unusable)[:SHOWN]
        self.reasons += other.reasons
        for key, where in other.hashes.items():
            self.hashes.setdefault(key, where)
        self.words += other.words


@dataclasses.dataclass(frozen=True)
class Shared:
    """An example of one split that is also in another one, exactly or nearly."""

    name: str
    first: str  # its place in the earlier split
    second: str
    splits: tuple[str, str]
    near: bool = False


def check_data(
    config: DataConfig,
    *,
    processes: int | None = None,
    near: float | None = None,
    plugins: Sequence[str] = (),
    sources: Sources | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, all: None,
) -> tuple[list[SplitReport], list[Shared]]:
    """Reads every example of every split of the user's domains once.

    Args:
      processes: how many read in parallel; None: one per few thousand examples, at most one per core.
      near: share of common word shingles from which two texts are near duplicates; None: do not look for them.
      sources: opened sources of `config` with data.on_bad_row=skip; None: open them.
      progress: called with the domain, the number of examples read, and their total.

    Raises:
      UserError: if a source cannot be read at all, or near duplicates are requested without `datasketch`.
    """
    if near is not None:
        require(0 < near <= 1, f"near={near} must be in (0, 1]")
        _minhash("")
    sources = sources or Sources(skipping(config))
    reports, shared = [], []
    for name in config.places():
        of_name = []
        for split in SPLITS:
            report, jobs = _begin(sources, name, split, near)
            of_name.append((report, jobs))
        total, done = sum(stop - start for _, jobs in of_name for _, _, _, start, stop, _ in jobs), 0
        with _pool(total, processes, plugins, sources) as run:
            for report, jobs in of_name:
                for part in run(_look, jobs):
                    report.add(part)
                    done += part.examples
                    progress(name, done, total)
        found = [report for report, _ in of_name]
        shared += _exact(name, found) + ([] if near is None else _near(name, found, near))
        reports += found
    return reports, shared


def require_clean(reports: Sequence[SplitReport], shared: Sequence[Shared]) -> None:
    """Refuses data on which a run's scores would be meaningless.

    Raises:
      UserError: if a split is empty, or two splits share an example.
    """
    for report in reports:
        require(not report.missing, report.missing)
        usable = report.examples - sum(report.reasons.values())
        require(usable > 0, f"{report.name}: no row of split {report.split!r} can be used")
    exact = [one for one in shared if not one.near]
    if exact:
        one = exact[0]
        raise UserError(
            f"{one.name}: {len(exact)} examples stand in two splits, first {one.second} ({one.splits[1]}), which is "
            f"{one.first} ({one.splits[0]}); take them out, or hold rows out by a column (data.split_by)"
        )


def skipping(config: DataConfig) -> DataConfig:
    """Returns the configuration for checking data, in which a row that cannot be used is not an error."""
    return dataclasses.replace(config, on_bad_row="skip")


def _begin(sources: Sources, name: str, split: str, near: float | None) -> tuple[SplitReport, list[Any]]:
    """Returns an empty report, and the jobs that fill it."""
    report = SplitReport(name, split)
    try:
        source = sources.open(name, split)
    except RowError:
        raise
    except UserError as error:
        if f"{split!r}" not in str(error):
            raise
        report.missing = str(error)
        return report, []
    if isinstance(source, RowSource):
        report.rows = len(source.rows_N)
        report.cut = source.rows_cut()
    else:
        report.rows = len(source)
    starts, config = range(0, len(source), CHUNK), sources.config
    return report, [(config, name, split, start, min(start + CHUNK, len(source)), near is not None) for start in starts]


@contextlib.contextmanager
def _pool(
    total: int, processes: int | None, plugins: Sequence[str], sources: Sources
) -> Iterator[Callable[..., Iterator[SplitReport]]]:
    """Yields a function that maps over jobs in order, in this process or in several."""
    count = min(os.cpu_count() or 1, 1 + total // 4096) if processes is None else processes
    if count == 1:
        yield lambda look, jobs: map(functools.partial(look, sources=sources), jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=load_plugins, initargs=(tuple(plugins),)) as pool:
        yield pool.map


@functools.lru_cache(maxsize=1)
def _opened(config: DataConfig) -> Sources:
    """Opens the sources of a worker process, once for all its jobs."""
    return Sources(config)


def _look(job: tuple[DataConfig, str, str, int, int, bool], sources: Sources | None = None) -> SplitReport:
    """Reads examples `start` to `stop` of a split and reports on them."""
    config, name, split, start, stop, with_words = job
    sources = sources or _opened(config)
    source, tokenizer = sources.open(name, split), sources.tokenizer
    template = chat_template(config, tokenizer)
    report = SplitReport(name, split)
    for index in range(start, stop):
        report.examples += 1
        file, row = source.where(index) if isinstance(source, RowSource) else (name, f"{split} example {index}")
        try:
            item = source[index]
            encode = encode_item if getattr(item, "rejected", None) is None else encode_pair
            sequence = encode(item, config.encoding, tokenizer=tokenizer, template=template)
            require(sequence.size.fits(Size.of_row(config.encoding)), "it does not fit in a row")
        except StoreError:
            raise
        except UserError as error:
            reason = error.reason if isinstance(error, RowError) else str(error)
            report.unusable = [*report.unusable, (file, row, reason)][:SHOWN]
            report.reasons[reason_of(error)] += 1
            continue
        report.lengths.append(sequence.size.positions)
        report.tokens_M += np.bincount(sequence.modality_T, minlength=NUM_MODALITIES)
        report.learned += int(sequence.loss_mask_T.sum())
        if isinstance(item, Document) and isinstance(source, RowSource):
            whole = source.whole(index)
            if whole is None:
                continue
            item = whole
        where = f"{file} {row}".strip()
        report.hashes.setdefault(hash_64(_content(item)), where)
        if with_words:
            report.words.append((where, _minhash(_words(item))))
    return report


def _content(item: Item) -> bytes:
    """Returns the content of an example as bytes, without its place."""
    if isinstance(item, Document):
        return item.text.strip().encode()
    if isinstance(item, Conversation):
        messages = (*item.messages, *(() if item.rejected is None else (item.rejected,)))
        parts: list[Any] = [(m.role, part) for m in messages for part in m.parts]
    else:
        media = [getattr(item, kind) for kind in ("image", "video", "audio")]
        parts = [("user", values) for values in media if values is not None]
        parts += [("user", Text(item.question)), ("assistant", Text(item.answer))]
    told = []
    for role, part in parts:
        values = part.values if isinstance(part, Medium) else part
        content = values.text.strip().encode() if isinstance(values, Text) else values.tobytes()
        told.append(role.encode() + b"\0" + content)
    return b"\1".join(told)


def _words(item: Item) -> str:
    if isinstance(item, Document):
        return item.text
    if isinstance(item, Conversation):
        return " ".join(message.text for message in item.messages)
    return f"{item.question} {item.answer}"


def _minhash(text: str) -> Any:
    """Returns the MinHash of a text's word shingles."""
    made = require_package("datasketch", "data", "near duplicates need").MinHash(_PERMUTATIONS, seed=1)
    words = text.casefold().split()
    for start in range(max(len(words) - _SHINGLE + 1, min(len(words), 1))):
        made.update(" ".join(words[start : start + _SHINGLE]).encode())
    return made


def _exact(name: str, reports: Sequence[SplitReport]) -> list[Shared]:
    return [
        Shared(name, one.hashes[key], other.hashes[key], (one.split, other.split))
        for one, other in itertools.combinations(reports, 2)
        for key in sorted(one.hashes.keys() & other.hashes.keys())
    ]


def _near(name: str, reports: Sequence[SplitReport], threshold: float) -> list[Shared]:
    """Finds examples in two splits whose words are nearly but not exactly the same."""
    from datasketch import MinHashLSH

    equal = {(one.first, one.second) for one in _exact(name, reports)}
    found = []
    for one, other in itertools.combinations(reports, 2):
        index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        for number, (_, words) in enumerate(other.words):
            index.insert(number, words)
        for where, words in one.words:
            for number in sorted(index.query(words)):
                pair = where, other.words[number][0]
                if pair not in equal and words.jaccard(other.words[number][1]) >= threshold:
                    found.append(Shared(name, *pair, (one.split, other.split), near=True))
    return found


def modality_counts(report: SplitReport) -> dict[str, int]:
    """Returns the number of positions of each modality, by name."""
    return dict(zip(MODALITY_NAMES, report.tokens_M.tolist(), strict=True))
