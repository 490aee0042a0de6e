import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.batches import answers, questions
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.domain import domain
from anyexperts_jax.data.pipeline import eval_batches, train_iterator
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.specs import batch_rows

CONFIG = DataConfig(domains=("nlp", "general", "video"), weights=(2.0, 1.0, 1.0), threads=0)
NLP = DataConfig(domains=("nlp",), encoding=EncodingSpec(max_patches=0, max_frames=0), threads=0)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def identical(one, other):
    return all((getattr(one, f.name) == getattr(other, f.name)).all() for f in dataclasses.fields(Batch))


def test_a_batch_holds_the_examples_it_names():
    for batch in take(train_iterator(CONFIG, 8), 3):
        assert batch.tokens_BT.shape == (8, 128)
        rows = zip(batch.domain_B, batch.question_B, batch.level_B, batch.example_B, strict=True)
        for (d, q, level, index), question, answer in zip(rows, questions(batch), answers(batch), strict=True):
            source = domain(CONFIG.domains[d])
            example = source.example("train", int(index), CONFIG.seed)
            assert (example.question, example.answer, example.level) == (question, answer, level)
            assert example.question_type == source.question_types[q]


def test_the_same_config_gives_the_same_batches():
    first = take(train_iterator(CONFIG, 8), 4)
    again = take(train_iterator(CONFIG, 8), 4)
    assert all(map(identical, first, again))
    other = next(train_iterator(dataclasses.replace(CONFIG, seed=1), 8))
    assert questions(other) != questions(first[0])


def test_domains_are_mixed_by_their_shares():
    batches = take(train_iterator(CONFIG, 16), 10)
    counts = np.bincount(np.concatenate([batch.domain_B for batch in batches]), minlength=3)
    assert np.abs(counts - np.array([80, 40, 40])).max() <= 1
    for batch in batches:  # the shares are even over time
        assert np.abs(np.bincount(batch.domain_B, minlength=3) - np.array([8, 4, 4])).max() <= 1


def test_only_the_configured_levels_occur():
    batches = take(train_iterator(dataclasses.replace(CONFIG, levels=(1, 3)), 16), 3)
    assert set(np.concatenate([batch.level_B for batch in batches]).tolist()) == {1, 3}


@pytest.mark.parametrize("threads", [0, 2])
def test_an_iterator_resumes_at_its_state(threads):
    config = dataclasses.replace(CONFIG, threads=threads)
    iterator = train_iterator(config, 4)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    ahead = take(iterator, 4)
    resumed = train_iterator(config, 4)
    resumed.set_state(state)
    assert all(map(identical, ahead, take(resumed, 4)))
    iterator.set_state(state)  # rewinds
    assert identical(next(iterator), ahead[0])


def test_threads_do_not_change_the_batches():
    batches = take(train_iterator(CONFIG, 4), 5)
    threaded = take(train_iterator(dataclasses.replace(CONFIG, threads=2, prefetch=3), 4), 5)
    assert all(map(identical, batches, threaded))


def seen(config, batch_size, batches, rows=None):
    """Returns (domain, example) of each row."""
    made = take(train_iterator(config, batch_size, rows), batches)
    return [(int(d), int(i)) for batch in made for d, i in zip(batch.domain_B, batch.example_B, strict=True)]


def rows_of_processes(count, mesh_config):
    """Returns the rows of a batch of 8 that each of `count` processes makes when they share 8 devices evenly."""
    mesh = make_mesh(mesh_config)
    groups = np.array_split(np.asarray(jax.devices()), count)
    return [batch_rows(mesh, 8, list(group)) for group in groups]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_no_example_and_together_make_one_processs_batches(count):
    config = dataclasses.replace(CONFIG, train_examples=24)
    shares = rows_of_processes(count, MeshConfig(data=2, fsdp=2, expert=2))
    assert [len(rows) for rows in shares] == [8 // count] * count
    parts = [take(train_iterator(config, 8, rows), 6) for rows in shares]
    together = [jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches) for batches in zip(*parts, strict=True)]
    assert all(map(identical, together, take(train_iterator(config, 8), 6)))
    examples = [example for rows in shares for example in seen(config, 8, 6, rows)]
    assert len(examples) == len(set(examples)) == 48
    assert sorted(index for domain, index in examples if domain == 0) == list(range(24))


def test_processes_that_split_a_sequence_or_weights_make_the_same_rows():
    assert rows_of_processes(4, MeshConfig(data=2, tensor=4)) == [(0, 1, 2, 3)] * 2 + [(4, 5, 6, 7)] * 2
    assert rows_of_processes(2, MeshConfig(data=1, fsdp=4, sequence=2)) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_a_run_resumes_with_another_number_of_processes():
    """The iterators' states equal a single process's, and so do the batches after resuming."""
    alone, halves = train_iterator(NLP, 4), [train_iterator(NLP, 4, rows) for rows in ((0, 1), (2, 3))]
    for iterator in (alone, *halves):
        take(iterator, 3)
    state = alone.get_state()
    assert all(half.get_state() == state for half in halves)
    after = next(alone)
    quarter = train_iterator(NLP, 4, (1,))
    quarter.set_state(state)
    assert next(quarter).example_B.tolist() == [after.example_B[1]]
    assert next(halves[1]).example_B.tolist() == after.example_B[2:].tolist()


def test_processes_share_the_rows_of_an_evaluation():
    whole = list(eval_batches(NLP, "nlp", "validation", 4, 9))
    for rows in ((0, 1), (2, 3), (1, 3)):
        part = list(eval_batches(NLP, "nlp", "validation", 4, 9, rows))
        assert all(map(identical, part, [jax.tree.map(lambda a: a[list(rows)], batch) for batch in whole]))  # noqa: B023
        assert len(part) == 3
    (none,) = eval_batches(NLP, "nlp", "validation", 4, 1, (2, 3))
    assert not none.valid_BT.any()


def test_a_pass_sees_each_example_once_and_the_next_in_another_order():
    config = dataclasses.replace(NLP, train_examples=20)
    first, second = np.reshape([index for _, index in seen(config, 10, 4)], (2, 20))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()
    assert first.tolist() != sorted(first)


def test_evaluation_reads_the_first_examples_in_order():
    batches = list(eval_batches(NLP, "nlp", "validation", 4, 10))
    assert [batch.example_B.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert [batch.valid_BT.any(axis=1).sum() for batch in batches] == [4, 4, 2]
    assert all(batch.tokens_BT.shape == (4, 128) for batch in batches)
    expected = [domain("nlp").example("validation", i).answer for i in range(10)]
    assert [answer for batch in batches for answer in answers(batch)] == [*expected, "", ""]


def test_evaluation_fills_a_batch_that_is_larger_than_all_examples():
    (batch,) = eval_batches(NLP, "nlp", "test", 8, 3)
    assert batch.valid_BT.any(axis=1).tolist() == [True] * 3 + [False] * 5


def test_worker_processes_do_not_change_the_batches():
    batches = take(train_iterator(NLP, 4), 3)
    worked = train_iterator(dataclasses.replace(NLP, workers=1), 4)
    assert all(map(identical, batches, take(worked, 3)))
    state = worked.get_state()
    ahead = next(worked)
    worked.set_state(state)
    assert identical(next(worked), ahead)
    worked.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be >= 1"),
        ({"rows": (0, 2)}, r"rows=\[0, 2\] must be in order and in \[0, batch_size=2\)"),
        ({"rows": (1, 0)}, r"rows=\[1, 0\] must be in order"),
        ({"rows": ()}, r"rows=\[\] must be in order"),
    ],
)
def test_training_refuses_bad_numbers(arguments, message):
    with pytest.raises(UserError, match=message):
        train_iterator(**({"config": NLP, "batch_size": 2} | arguments))


def test_evaluation_refuses_bad_numbers():
    with pytest.raises(UserError, match="num_examples=0 must be >= 1"):
        next(eval_batches(NLP, "nlp", "test", 4, 0))
    with pytest.raises(UserError, match="domain='video' is unknown; valid: nlp"):
        next(eval_batches(NLP, "video", "test", 4, 1))
    with pytest.raises(UserError, match="split='dev' is unknown"):
        next(eval_batches(NLP, "nlp", "dev", 4, 1))


@pytest.mark.parametrize("threads", [0, 1])
def test_a_sequence_that_is_too_long_is_refused_in_one_line(threads):
    config = dataclasses.replace(NLP, encoding=EncodingSpec(max_length=20), threads=threads)
    with pytest.raises(UserError, match=r"nlp/\w+ example needs \d+ positions .* more than encoding.max_length=20"):
        next(train_iterator(config, 4))
