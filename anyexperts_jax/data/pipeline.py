"""The Grain pipeline: sources, shards, shuffle, mixture, encoding, packing, batches.

Every batch is a pure function of the config, the batch size and the batch's number, and a run that goes on reads
exactly what an unbroken one would. A process of several makes some rows of every batch: whatever their number, the
batches are the same, and so are the iterators' states.

Without packing a state is a number, and a process makes the examples of its own rows alone. With packing all lengths
say which row an example lands in, so every process encodes every example, and pads and stacks its own rows.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
from absl import flags

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.plugins import load_plugins
from anyexperts_jax.data.batches import empty_batch, pad_rows, stack
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.encode import encode_example
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.packing import PackedSequences
from anyexperts_jax.data.sequence import EncodedSequence, Size, padded
from anyexperts_jax.data.source import Source
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.store import open_tokenizer

__all__ = ["DataConfig", "eval_batches", "train_dataset", "train_iterator"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Sequences:
    """A source's examples as encoded sequences, or as the fields of a row each; what Grain reads."""

    source: Source
    spec: EncodingSpec
    tokenizer: Tokenizer
    domain_index: int
    as_rows: bool = True

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any] | EncodedSequence:
        example = self.source[index]
        try:
            sequence = encode_example(
                example,
                self.spec,
                tokenizer=self.tokenizer,
                domain_index=self.domain_index,
                question_index=_question_index(self.source, example),
                example_index=index,
            )
        except UserError as error:
            raise UserError(f"{error} (example {index})") from error
        return padded(sequence, self.spec) if self.as_rows else sequence


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Of every `batch_size` examples those at `rows`; what Grain reads."""

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
    """The rows that one process makes of every batch."""
    require(batch_size >= 1, f"batch_size={batch_size} must be >= 1")
    if rows is None:
        return tuple(range(batch_size))
    in_order = len(rows) > 0 and list(rows) == sorted(set(rows)) and rows[0] >= 0 and rows[-1] < batch_size
    require(in_order, f"rows={list(rows)} must be in order and in [0, batch_size={batch_size})")
    return tuple(rows)


def _examples_at(examples: grain.MapDataset, batch_size: int, held: tuple[int, ...]) -> grain.MapDataset:
    """The examples of the rows `held` of every batch."""
    return examples if len(held) == batch_size else grain.MapDataset.source(_Rows(examples, batch_size, held))


def train_dataset(
    config: DataConfig, batch_size: int, rows: Sequence[int] | None = None, *, plugins: Sequence[str] = ()
) -> grain.IterDataset:
    """The endless training batches: all `batch_size` rows of each, or of each the `rows` that one process makes.

    After a pass over a domain its examples come again, in another order; before that none comes twice, in whatever
    process.

    Args:
      plugins: modules that register domains or sources; worker processes import them before they make an example.

    Raises:
      UserError: when a number is out of range, or a folder or tokenizer is missing or empty.
    """
    held, packs = _held(batch_size, rows), config.packing == "first_fit"
    parts, tokenizer = [], open_tokenizer(config.tokenizer)
    for index, name in enumerate(config.domains):
        source = open_source(config, name, "train")
        sequences = _Sequences(source, config.encoding, tokenizer, index, as_rows=not packs)
        parts.append(grain.MapDataset.source(sequences).shuffle(seed=config.seed).repeat())
    mixed = grain.MapDataset.mix(parts, config.shares())
    if not packs:
        batches = _examples_at(mixed, batch_size, held).batch(len(held), drop_remainder=True, batch_fn=stack)
        return _made_ahead(batches, config, config.prefetch, plugins)
    sequences = _made_ahead(mixed, config, config.prefetch * batch_size, plugins)  # a batch's, at least
    packed = PackedSequences(sequences, Size.of_row(config.encoding), config.packing_window)
    own_rows = lambda row_B: stack([padded(row_B[row], config.encoding) for row in held])  # noqa: E731
    return packed.batch(batch_size, drop_remainder=True, batch_fn=own_rows)


def _made_ahead(
    elements: grain.MapDataset, config: DataConfig, count: int, plugins: Sequence[str]
) -> grain.IterDataset:
    """The elements, up to `count` of them made before they are asked for: by threads, or by each worker process."""
    threads = 0 if config.workers else config.threads
    dataset = elements.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=count if threads else 0)
    )
    if config.workers == 0:
        return dataset
    if (
        not flags.FLAGS.is_parsed()
    ):  # Grain reads absl flags to start workers; outside of an absl app nobody parsed them
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=count)
    return dataset.mp_prefetch(options, functools.partial(_start_worker, tuple(plugins)))


def _start_worker(plugins: tuple[str, ...], index: int, count: int) -> None:
    """A fresh process knows nothing of what its parent registered."""
    load_plugins(plugins)


def train_iterator(
    config: DataConfig, batch_size: int, rows: Sequence[int] | None = None, *, plugins: Sequence[str] = ()
) -> grain.DatasetIterator:
    """An iterator over `train_dataset`: `next`, `get_state` (JSON, the same for all rows) and `set_state`."""
    return iter(train_dataset(config, batch_size, rows, plugins=plugins))


def eval_batches(
    config: DataConfig, domain: str, split: str, batch_size: int, num_examples: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Examples 0 to `num_examples` - 1 of a domain's split, in order. The last batch is filled up with invalid rows.

    Of each batch all `batch_size` rows, or the `rows` that one process makes.

    Raises:
      UserError: when a number is out of range, or a folder holds fewer examples.
    """
    require(num_examples >= 1, f"num_examples={num_examples} must be >= 1")
    source, tokenizer = open_source(config, domain, split, num_examples), open_tokenizer(config.tokenizer)
    sequences = grain.MapDataset.source(_Sequences(source, config.encoding, tokenizer, config.domain_index(domain)))
    ahead = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch if config.threads else 0)
    held = _held(batch_size, rows)
    examples, count = _examples_at(sequences[:num_examples], batch_size, held), len(held)
    for batch in examples.batch(count, batch_fn=stack).to_iter_dataset(ahead):
        yield pad_rows(batch, count, tokenizer)
    for _ in range(-(-len(examples) // count), -(-num_examples // batch_size)):  # whose last rows others hold
        yield empty_batch(config.encoding, count, tokenizer)


def _question_index(source: Source, example: Example) -> int:
    types = source.question_types
    known = example.question_type in types
    require(known, f"question type {example.question_type!r} of a {example.domain} example is not one of {types}")
    return types.index(example.question_type)
