"""How a run reads a user's rows: order, splits, unusable rows, mixtures and the recorded state of a source."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.bad_rows import BadRows, describe_skipped
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.mixture import Sources, open_source
from anyexperts_jax.data.pipeline import epochs, eval_batches, source_lengths, train_iterator
from anyexperts_jax.data.row_source import hashed_splits
from anyexperts_jax.train.run_data import with_fingerprints
from anyexperts_jax.train.run_dir import RunDir

SPEC = EncodingSpec(max_length=32, max_patches=0, max_frames=0)


def question(number):
    return {"question": f"q{number}?", "answer": f"a{number}"}


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes rows as NAME.jsonl and returns a configuration that reads all files so far."""
    places = []

    def make(rows, name="mine", **options):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        places.append(f"{name}={path}")
        names = tuple(place.partition("=")[0] for place in places)
        return DataConfig(domains=names, folders=tuple(places), encoding=SPEC, threads=0, **options)

    return make


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def drawn(config, batches, batch_size=4, **options):
    """Returns (domain, example) of the rows in order."""
    made = take(train_iterator(config, batch_size, **options), batches)
    return [(int(d), int(i)) for batch in made for d, i in zip(batch.domain_B, batch.example_B, strict=True)]


def test_the_order_depends_on_seed_and_data(write):
    config = write([question(i) for i in range(60)])
    first = drawn(config, 5)
    assert first == drawn(config, 5)
    assert first != drawn(dataclasses.replace(config, seed=1), 5)
    assert first != drawn(write([question(i + 1) for i in range(60)], "other", weights=(1e-6, 1.0)), 5)
    together = [drawn(config, 5, rows=rows) for rows in ((0, 1), (2, 3))]
    halves = [[part[i : i + 2] for i in range(0, len(part), 2)] for part in together]
    assert [row for pair in zip(*halves, strict=True) for half in pair for row in half] == first


@pytest.mark.parametrize("packing", ["none", "first_fit"])
def test_an_iterator_resumes_after_skipped_rows(write, packing):
    rows = [question(i) if i % 5 else {"nothing": i} for i in range(60)]
    config = write(rows[1:], on_bad_row="skip", max_bad_share=0.5, packing=packing)
    iterator = train_iterator(config, 2)
    take(iterator, 4)
    state = json.loads(json.dumps(iterator.get_state()))
    ahead, resumed = take(iterator, 4), train_iterator(config, 2)
    resumed.set_state(state)
    for one, other in zip(ahead, take(resumed, 4), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


BAD = {
    "no column": ({"nothing": 1}, "no column '...'"),
    "too long": ({"question": "q" * 40, "answer": "a"}, "positions (media N, question N, answer N, BOS, SEP and EOS)"),
    "no answer": ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant, only user"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_stops_or_is_skipped_and_counted(write, row, reason):
    rows = [*(question(i) for i in range(40)), row]
    config = write(rows, held_out=0.01)
    at = open_source(config, "mine", "train").rows_N.tolist().index(40)
    with pytest.raises(UserError, match=r"mine.jsonl line 41: "):
        take(train_iterator(config, 4), 20)
    bad_rows = BadRows(0.1)
    skipping = dataclasses.replace(config, on_bad_row="skip", max_bad_share=0.1)
    seen = {i for _, i in drawn(skipping, 20, bad_rows=bad_rows)}
    assert at not in seen
    assert seen == set(range(len(open_source(config, "mine", "train")))) - {at}
    ((found, count),) = bad_rows.counts()["mine"].items()
    assert reason in found
    assert count == 1
    assert describe_skipped(bad_rows.counts())[0].startswith("mine: skipped 1 rows: 1 x ")
    bad_rows.close()


def test_too_many_bad_rows_stop_a_run_that_skips(write):
    rows = [question(i) if i % 4 else {"nothing": i} for i in range(1, 41)]
    config = write(rows, on_bad_row="skip")
    with pytest.raises(
        UserError, match=r"1 of the \d+ rows of mine cannot be used, more than data.max_bad_share=0.01; "
    ):
        take(train_iterator(config, 4), 10)


def test_a_bad_row_becomes_padding_in_an_evaluation(write):
    rows = [question(i) if i % 4 else {"nothing": i} for i in range(1, 41)]
    config = write(rows, on_bad_row="skip", max_bad_share=0.9, held_out=0.3)
    count = Sources(config).count("mine", "test", 99)
    bad = sum(int((row + 1) % 4 == 0) for row in open_source(config, "mine", "test").rows_N)
    rows = [row for batch in eval_batches(config, "mine", "test", 4, count) for row in batch.valid_BT.any(axis=1)]
    assert sum(rows) == count - bad


def test_domains_are_mixed_by_weight_or_temperature_and_epochs_are_counted(write):
    write([question(i) for i in range(100)], "large")
    config = write([question(i) for i in range(20)], "small", temperature=2.0, held_out=0.01)
    lengths = source_lengths(Sources(config))
    iterator = train_iterator(config, 8)
    batches = take(iterator, 20)
    share = np.mean(np.concatenate([batch.domain_B for batch in batches]))
    expected = lengths["small"] ** 0.5 / (lengths["small"] ** 0.5 + lengths["large"] ** 0.5)
    assert abs(share - expected) < 0.01
    passes = epochs(config, lengths, 8, iterator.get_state())
    assert passes["small"] == pytest.approx(160 * expected / lengths["small"])


def test_a_short_evaluation_samples_all_rows(write):
    """Files are often sorted by content, so the first rows would not represent them."""
    source = open_source(write([question(i) for i in range(400)], held_out=0.2), "mine", "test")
    first = [int(source[i].question[1:-1]) for i in range(20)]
    assert first != sorted(first)
    assert max(first) > 200 > min(first)
    assert len(set(source.rows_N.tolist())) == len(source)


def test_splits_by_hash_keep_equal_rows_together():
    keys = np.repeat(np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64), 3)
    splits = hashed_splits(keys, 0.1).reshape(1000, 3)
    assert (splits == splits[:, :1]).all()
    assert np.bincount(splits[:, 0]) / 1000 == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    more = hashed_splits(np.concatenate([keys, keys + np.uint64(1)]), 0.1)
    assert (more[: len(keys)] == splits.ravel()).all(), "added rows move no others"
    assert sorted(hashed_splits(keys[::3][:3], 0.01)) == [0, 1, 2]


def test_a_changed_source_is_reported(write, tmp_path):
    paths = RunDir(tmp_path / "run")
    config = with_fingerprints(Sources(write([question(i) for i in range(40)])), paths)
    (recorded,) = config.fingerprints
    assert recorded.startswith("mine=")
    assert with_fingerprints(Sources(config), paths).fingerprints == config.fingerprints
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(question(i)) + "\n" for i in range(41)))
    with pytest.raises(UserError, match=r"the data of mine at \S+ have changed since the run began"):
        with_fingerprints(Sources(config), paths)


def test_question_types_are_known_before_any_row_is_read(write):
    rows = [{**question(i), "question_type": "even" if i % 2 == 0 else "odd"} for i in range(40)]
    source = open_source(write(rows), "mine", "train")
    assert source.question_types == ("any", "even", "odd")
