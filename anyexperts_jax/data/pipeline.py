"""The Grain pipeline: sources, shards, shuffle, mixture, encoding, batches.

Every batch is a pure function of the config, the batch size, the process and the batch's number, so an iterator's
state is a number and a run that goes on reads exactly what an unbroken one would.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.data.batches import pad_rows, stack
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.encode import encode
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.source import Source

__all__ = ["DataConfig", "eval_batches", "train_dataset", "train_iterator"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Sequences:
    """A source's examples as encoded sequences; what Grain reads."""

    source: Source
    spec: EncodingSpec
    domain_index: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        return encode(
            example,
            self.spec,
            domain_index=self.domain_index,
            question_index=_question_index(self.source, example),
            example_index=index,
        )


def train_dataset(
    config: DataConfig, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """The endless training batches of one process, `batch_size` rows each.

    Each domain is dealt out to the processes before it is shuffled and mixed, so that every process sees every domain
    in the same shares and no example twice in a pass. After a pass over a domain its examples come again, in another
    order.

    Raises:
      UserError: when a number is out of range, or a folder is missing, empty, or too small to deal out.
    """
    require(batch_size >= 1, f"batch_size={batch_size} must be >= 1")
    inside = 0 <= process_index < process_count
    require(inside, f"process_index={process_index} must be in [0, process_count={process_count})")
    parts = []
    for index, name in enumerate(config.domains):
        source = open_source(config, name, "train")
        enough = len(source) >= process_count
        require(enough, f"domain {name} has {len(source)} training examples for {process_count} processes")
        sequences = _Sequences(source, config.encoding, index)
        shard = grain.MapDataset.source(sequences)[process_index::process_count]
        parts.append(shard.shuffle(seed=config.seed).repeat())
    mixed = grain.MapDataset.mix(parts, config.shares())
    batches = mixed.batch(batch_size, drop_remainder=True, batch_fn=stack)
    threads = 0 if config.workers else config.threads
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch if threads else 0)
    dataset = batches.to_iter_dataset(ahead)
    if config.workers == 0:
        return dataset
    if (
        not flags.FLAGS.is_parsed()
    ):  # Grain reads absl flags to start workers; outside of an absl app nobody parsed them
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=config.prefetch)
    return dataset.mp_prefetch(options)


def train_iterator(
    config: DataConfig, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """An iterator over `train_dataset`: `next`, `get_state` (JSON) and `set_state`."""
    return iter(train_dataset(config, batch_size, process_index=process_index, process_count=process_count))


def eval_batches(config: DataConfig, domain: str, split: str, batch_size: int, num_examples: int) -> Iterator[Batch]:
    """Examples 0 to `num_examples` - 1 of a domain's split, in order. The last batch is filled up with invalid rows.

    Raises:
      UserError: when a number is out of range, or a folder holds fewer examples.
    """
    require(batch_size >= 1, f"batch_size={batch_size} must be >= 1")
    require(num_examples >= 1, f"num_examples={num_examples} must be >= 1")
    source = open_source(config, domain, split, num_examples)
    sequences = grain.MapDataset.source(_Sequences(source, config.encoding, config.domain_index(domain)))
    ahead = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch if config.threads else 0)
    for batch in sequences[:num_examples].batch(batch_size, batch_fn=stack).to_iter_dataset(ahead):
        yield pad_rows(batch, batch_size)


def _question_index(source: Source, example: Example) -> int:
    types = source.question_types
    known = example.question_type in types
    require(known, f"question type {example.question_type!r} of a {example.domain} example is not one of {types}")
    return types.index(example.question_type)
