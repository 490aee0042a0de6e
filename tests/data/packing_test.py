import dataclasses
import itertools
import json

import grain
import jax
import numpy as np
import pytest

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.data.batches import pad_rows, stack
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.packing import PackedSequences, pack, padding_shares
from anyexperts_jax.data.pipeline import train_iterator
from anyexperts_jax.data.sequence import Size, TokenPart, assemble, concatenate, padded
from anyexperts_jax.tokenizers.bytes import EOS

SPEC = EncodingSpec(max_length=10, max_patches=0, max_frames=0)
ROOM = Size.of_row(SPEC)
PACKED = DataConfig(
    domains=("nlp", "general"),
    packing="first_fit",
    packing_window=3,
    levels=(1,),
    encoding=EncodingSpec(max_length=160, max_patches=128, max_frames=0),
    threads=0,
)


def text(length, name):
    return assemble([TokenPart([name] * length)], SPEC)


def names(rows):
    """Returns each row as the names of its sequences, read from the tokens."""
    return [[int(row.tokens_T[row.segment_T == s][0]) for s in range(row.segment_T.max() + 1)] for row in rows]


LENGTHS = (6, 5, 4, 5, 3, 10, 2)


def sequences():
    return [text(length, name) for name, length in enumerate(LENGTHS)]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [[0], [1, 2], [3, 4], [5], [6]]),
        (2, [[0, 2], [1, 3], [4, 6], [5]]),  # 4 fits in neither row: both are emitted, and 4 opens a new row
        (3, [[0, 2], [1, 3], [4], [5], [6]]),
        (64, [[0, 2], [1, 3], [4, 6], [5]]),
    ],
)
def test_each_sequence_goes_into_the_first_open_row_that_has_room(window, expected):
    found = list(pack(sequences(), ROOM, window))
    assert names(found) == expected
    assert all(len(row.tokens_T) <= 10 for row in found)


def test_rows_are_also_limited_by_patches_and_frames():
    room = Size(positions=10, patches=3, frames=2)
    assert (Size(4, 2, 1) + Size(6, 1, 1)).fits(room)
    for size in (Size(11, 0, 0), Size(0, 4, 0), Size(0, 0, 3)):
        assert not size.fits(room)


def test_packing_streams():
    """The sequences never end, yet rows are emitted."""
    endless = (text(4, i % 200) for i in itertools.count())
    first = list(itertools.islice(pack(endless, ROOM, 2), 3))
    assert names(first) == [[0, 1], [2, 3], [4, 5]]


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def identical(one, other):
    return all((getattr(one, f.name) == getattr(other, f.name)).all() for f in dataclasses.fields(Batch))


class Listed(PackedSequences):
    """Packs a list, so that the iterator ends."""

    def __init__(self, sequences, window):
        super().__init__(grain.MapDataset.source(sequences).to_iter_dataset(), ROOM, window)


@pytest.mark.parametrize("window", [1, 2, 3, 64])
def test_an_iterator_gives_the_rows_of_pack_and_resumes_at_any_row(window):
    expected = names(pack(sequences(), ROOM, window))
    iterator = iter(Listed(sequences(), window))
    states, found = [], []
    for _ in expected:
        states.append(json.loads(json.dumps(iterator.get_state())))
        found.append(next(iterator))
    assert names(found) == expected
    with pytest.raises(StopIteration):
        next(iterator)
    for row, state in enumerate(states):
        iterator.set_state(state)  # rewinds the same iterator, then sets a new one
        assert names(list(iterator)) == expected[row:]
        fresh = iter(Listed(sequences(), window))
        fresh.set_state(state)
        assert names(list(fresh)) == expected[row:]


def examples_of(batches):
    """Returns the tokens of every valid segment, in order."""
    found = []
    for batch in batches:
        for tokens_T, valid_T, segment_T in zip(batch.tokens_BT, batch.valid_BT, batch.segment_BT, strict=True):
            found += [tokens_T[valid_T & (segment_T == s)].tolist() for s in range(segment_T.max() + 1)]
    return found


def test_packed_batches_hold_the_same_examples_in_fewer_rows():
    packed = take(train_iterator(PACKED, 3), 4)
    assert {batch.tokens_BT.shape for batch in packed} == {(3, 160)}
    alone = take(train_iterator(dataclasses.replace(PACKED, packing="none"), 3), 14)
    first = examples_of(packed)
    assert 24 < len(first) <= 42
    assert all(tokens[-1] == EOS for tokens in first)
    everything = examples_of(alone)
    window = everything[: len(first) + 3]  # rows still open may hold up to three of the first examples
    assert all(tokens in window for tokens in first)
    before, after = padding_shares(packed[0])
    assert before == pytest.approx(1 - packed[0].valid_BT.sum() / (160 * len(examples_of(packed[:1]))))
    assert after == pytest.approx(1 - packed[0].valid_BT.mean())
    assert after < 0.3 < 0.5 < before


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_packed_iterator_resumes_at_its_state(workers):
    config = dataclasses.replace(PACKED, workers=workers, threads=0 if workers else 1)
    iterator = train_iterator(config, 2)
    assert all(map(identical, take(iterator, 2), take(train_iterator(PACKED, 2), 2)))
    state = json.loads(json.dumps(iterator.get_state()))
    ahead = take(iterator, 3)
    resumed = train_iterator(config, 2)
    resumed.set_state(state)
    assert all(map(identical, ahead, take(resumed, 3)))
    iterator.close()
    resumed.close()


def test_each_process_makes_its_rows_of_the_same_packed_batches():
    whole = train_iterator(PACKED, 4)
    parts = [train_iterator(PACKED, 4, rows) for rows in ((0, 2), (1,), (3,))]
    for _ in range(3):
        batch, own = next(whole), [next(part) for part in parts]
        for rows, part in zip(((0, 2), (1,), (3,)), own, strict=True):
            assert identical(part, jax.tree.map(lambda a, rows=rows: a[list(rows)], batch))
        assert all(part.get_state() == whole.get_state() for part in parts)


def test_padding_shares_count_examples_not_rows():
    row = concatenate([text(4, 1), text(5, 2)])
    spec = dataclasses.replace(SPEC, max_length=12)
    batch = stack([padded(row, spec), padded(text(3, 1), spec)])
    assert padding_shares(batch) == (1 - 12 / 36, 1 - 12 / 24)
    assert padding_shares(pad_rows(batch, 3)) == (1 - 12 / 36, 1 - 12 / 36), "an empty row is padding, not an example"
    assert np.asarray(batch.segment_BT).max() == 1
