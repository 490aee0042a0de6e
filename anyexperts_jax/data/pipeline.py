"""The Grain pipeline: sources, shards, shuffle, mixture, encoding, packing, batches.

Every batch is a pure function of the configuration, the batch size and the batch's index, and a resumed run reads
exactly what an uninterrupted one would. With several processes each makes some rows of every batch; batches and
iterator states do not depend on the number of processes.

Without packing a state is a number, and a process only makes the examples of its own rows. With packing, the row of an
example depends on all lengths, so every process encodes every example, and pads and stacks its own rows.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.plugins import load_plugins
from anyexperts_jax.data.bad_rows import BadRows
from anyexperts_jax.data.batches import empty_batch, pad_rows, stack
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.conversation import Item
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.data.packing import PackedSequences
from anyexperts_jax.data.row_source import RowSource
from anyexperts_jax.data.sequence import EncodedSequence, Size, padded
from anyexperts_jax.data.source import Source
from anyexperts_jax.data.sources.places import StoreError
from anyexperts_jax.data.sources.rows import RowError
from anyexperts_jax.data.turns import chat_template, encode_item, encode_pair
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.chat import ChatTemplate

__all__ = ["DataConfig", "eval_batches", "train_dataset", "train_iterator"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Sequences:
    """A Grain source of a source's examples, as encoded sequences or as padded rows."""

    name: str
    source: Source
    config: DataConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    as_rows: bool = True
    bad_rows: BadRows | None = None  # counts the rows that cannot be used; None: the first one raises
    fills: bool = True  # whether the next usable row takes their place; else a padding row does
    pairs: bool | None = False  # True: preferences, two segments each; False: none; None: their better answer only

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any] | EncodedSequence:
        for number in itertools.chain(range(index, len(self)), range(index)):
            try:
                sequence = self._encoded(number)
            except UserError as error:
                if self.bad_rows is None or isinstance(error, StoreError):
                    raise
                self.bad_rows.add(self.name, number, len(self), error)
                if not self.fills:
                    return _padding_row(self.config.encoding, self.tokenizer)
                continue
            return padded(sequence, self.config.encoding) if self.as_rows else sequence
        raise UserError(f"no row of {self.name} can be used")

    def _encoded(self, index: int) -> EncodedSequence:
        example = self.source[index]
        try:
            require(
                self.pairs is not False or getattr(example, "rejected", None) is None,
                "the row holds a rejected answer, which train.loss=dpo alone reads; set that, or leave the column out",
            )
            return (encode_pair if self.pairs else encode_item)(
                example,
                self.config.encoding,
                tokenizer=self.tokenizer,
                template=self.template,
                domain_index=self.config.domain_index(self.name),
                question_index=_question_index(self.source, example),
                example_index=index,
            )
        except UserError as error:
            if isinstance(self.source, RowSource):
                raise RowError(*self.source.where(index), str(error)) from error
            raise UserError(f"{error} (example {index})") from error


def _padding_row(spec: EncodingSpec, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the fields of a padding row."""
    empty = empty_batch(spec, 1, tokenizer)
    return {field.name: np.asarray(getattr(empty, field.name))[0] for field in dataclasses.fields(empty)}


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """A Grain source of the examples at `rows` of every batch of `batch_size`."""

    examples: grain.MapDataset
    batch_size: int
    rows: tuple[int, ...]

    def __len__(self) -> int:
        batches, rest = divmod(len(self.examples), self.batch_size)
        return batches * len(self.rows) + sum(row < rest for row in self.rows)

    def __getitem__(self, index: int) -> Any:
        batch, place = divmod(index, len(self.rows))
        return self.examples[batch * self.batch_size + self.rows[place]]


def _held(batch_size: int, rows: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the rows of every batch that one process makes."""
    require(batch_size >= 1, f"batch_size={batch_size} must be >= 1")
    if rows is None:
        return tuple(range(batch_size))
    in_order = len(rows) > 0 and list(rows) == sorted(set(rows)) and rows[0] >= 0 and rows[-1] < batch_size
    require(in_order, f"rows={list(rows)} must be in order and in [0, batch_size={batch_size})")
    return tuple(rows)


def _examples_at(examples: grain.MapDataset, batch_size: int, held: tuple[int, ...]) -> grain.MapDataset:
    """Returns the examples of the rows `held` of every batch."""
    return examples if len(held) == batch_size else grain.MapDataset.source(_Rows(examples, batch_size, held))


def train_dataset(
    config: DataConfig,
    batch_size: int,
    rows: Sequence[int] | None = None,
    *,
    plugins: Sequence[str] = (),
    bad_rows: BadRows | None = None,
    sources: Sources | None = None,
    pairs: bool = False,
) -> grain.IterDataset:
    """Returns the endless training batches, with all `batch_size` rows, or only the `rows` that one process makes.

    After a pass over a domain its examples repeat in another order; before that none repeats, in any process. With
    data.on_bad_row=skip a row that cannot be used is replaced by the next usable one.

    Args:
      plugins: modules that register domains or sources; worker processes import them first.
      bad_rows: counts the skipped rows; None: they are not counted.
      sources: opened sources of `config`; None: open them.
      pairs: whether every row is a preference, which becomes two segments; if False, none may be one.

    Raises:
      UserError: if a number is out of range, or a folder or tokenizer is missing or empty.
    """
    held, packs = _held(batch_size, rows), config.packing == "first_fit"
    sources = sources or Sources(config)
    parts, lengths, tokenizer = [], [], sources.tokenizer
    template = chat_template(config, tokenizer)
    if config.on_bad_row == "skip" and bad_rows is None:
        bad_rows = BadRows(config.max_bad_share)
    for name in config.domains:
        source = sources.open(name, "train")
        counted = bad_rows if config.on_bad_row == "skip" else None
        sequences = _Sequences(
            name, source, config, tokenizer, template, as_rows=not packs, bad_rows=counted, pairs=pairs
        )
        parts.append(grain.MapDataset.source(sequences).shuffle(seed=order_seed(config, source)).repeat())
        lengths.append(len(source))
    mixed = grain.MapDataset.mix(parts, config.shares(lengths))
    if not packs:
        batches = _examples_at(mixed, batch_size, held).batch(len(held), drop_remainder=True, batch_fn=stack)
        return _make_ahead(batches, config, config.prefetch, plugins)
    sequences = _make_ahead(mixed, config, config.prefetch * batch_size, plugins)  # a batch's, at least
    packed = PackedSequences(sequences, Size.of_row(config.encoding), config.packing_window)
    own_rows = lambda row_B: stack([padded(row_B[row], config.encoding) for row in held])  # noqa: E731
    return packed.batch(batch_size, drop_remainder=True, batch_fn=own_rows)


def _make_ahead(
    elements: grain.MapDataset, config: DataConfig, count: int, plugins: Sequence[str]
) -> grain.IterDataset:
    """Makes up to `count` elements ahead of time, in threads or in each worker process."""
    threads = 0 if config.workers else config.threads
    dataset = elements.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=count if threads else 0)
    )
    if config.workers == 0:
        return dataset
    # Grain reads absl flags to start workers; outside of an absl app nobody parsed them.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=count)
    return dataset.mp_prefetch(options, functools.partial(_start_worker, tuple(plugins)))


def _start_worker(plugins: tuple[str, ...], index: int, count: int) -> None:
    """Imports the plugins, since a new process does not have its parent's registrations."""
    load_plugins(plugins)


def train_iterator(
    config: DataConfig,
    batch_size: int,
    rows: Sequence[int] | None = None,
    *,
    plugins: Sequence[str] = (),
    bad_rows: BadRows | None = None,
    sources: Sources | None = None,
    pairs: bool = False,
) -> grain.DatasetIterator:
    """Returns an iterator over `train_dataset`: `next`, `get_state` (JSON, the same for all rows) and `set_state`."""
    how: dict[str, Any] = {"plugins": plugins, "bad_rows": bad_rows, "sources": sources, "pairs": pairs}
    return iter(train_dataset(config, batch_size, rows, **how))


def source_lengths(sources: Sources) -> dict[str, int]:
    """Returns the number of examples of each domain's training split."""
    return {name: len(sources.open(name, "train")) for name in sources.config.domains}


def epochs(config: DataConfig, lengths: Mapping[str, int], batch_size: int, state: Any) -> dict[str, float]:
    """Returns how many passes over each domain an iterator in this state has made.

    Args:
      lengths: `source_lengths`.
    """
    drawn = _next_indices(state) * (batch_size if config.packing == "none" else 1)
    shares = config.shares(list(lengths.values()))
    return {name: drawn * share / lengths[name] for name, share in zip(lengths, shares, strict=True)}


def _next_indices(state: Any) -> int:
    """Returns the number of elements drawn, over all nested iterators: the process's own, or its workers'."""
    if isinstance(state, Mapping):
        own = state.get("next_index", 0)
        return int(own) + sum(_next_indices(value) for key, value in state.items() if key != "next_index")
    return sum(map(_next_indices, state)) if isinstance(state, list) else 0


def order_seed(config: DataConfig, source: Source) -> int:
    """Returns the seed of the order of a source's examples: data.seed, and the fingerprint of a user's rows."""
    if not isinstance(source, RowSource):
        return config.seed
    return (config.seed + int(source.fingerprint, 16)) % 2**32


def eval_batches(
    config: DataConfig,
    domain: str,
    split: str,
    batch_size: int,
    num_examples: int,
    rows: Sequence[int] | None = None,
    *,
    sources: Sources | None = None,
    pairs: bool | None = None,
) -> Iterator[Batch]:
    """Yields examples 0 to `num_examples` - 1 of a domain's split in order; padding rows fill the last batch.

    Batches have all `batch_size` rows, or only the `rows` that one process makes. With data.on_bad_row=skip a row that
    cannot be used becomes a padding row.

    Args:
      sources: opened sources of `config`; None: open them.
      pairs: see `train_dataset`; None: of a preference, the conversation with the better answer.

    Raises:
      UserError: if a number is out of range, or a folder holds fewer examples.
    """
    require(num_examples >= 1, f"num_examples={num_examples} must be >= 1")
    sources = sources or Sources(config)
    source, tokenizer = sources.open(domain, split, num_examples), sources.tokenizer
    bad_rows = BadRows(config.max_bad_share) if config.on_bad_row == "skip" else None
    template = chat_template(config, tokenizer)
    made = _Sequences(domain, source, config, tokenizer, template, bad_rows=bad_rows, fills=False, pairs=pairs)
    sequences = grain.MapDataset.source(made)
    ahead = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch if config.threads else 0)
    held = _held(batch_size, rows)
    examples, count = _examples_at(sequences[:num_examples], batch_size, held), len(held)
    for batch in examples.batch(count, batch_fn=stack).to_iter_dataset(ahead):
        yield pad_rows(batch, count, tokenizer)
    # Other processes make all rows of these batches.
    for _ in range(-(-len(examples) // count), -(-num_examples // batch_size)):
        yield empty_batch(config.encoding, count, tokenizer)
    if bad_rows is not None:
        bad_rows.close()


def _question_index(source: Source, example: Item) -> int:
    types = source.question_types
    known = example.question_type in types
    require(known, f"question type {example.question_type!r} of a {example.domain} example is not one of {types}")
    return types.index(example.question_type)
