import dataclasses
import itertools
import json

import numpy as np
import pytest

from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.data.batches import answers, questions
from anyexperts_jax.data.config import DataConfig, EncodingSpec
from anyexperts_jax.data.domain import domain
from anyexperts_jax.data.pipeline import eval_batches, train_iterator

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


def test_domains_come_in_their_shares():
    batches = take(train_iterator(CONFIG, 16), 10)
    counts = np.bincount(np.concatenate([batch.domain_B for batch in batches]), minlength=3)
    assert np.abs(counts - np.array([80, 40, 40])).max() <= 1
    for batch in batches:  # and evenly over time
        assert np.abs(np.bincount(batch.domain_B, minlength=3) - np.array([8, 4, 4])).max() <= 1


def test_only_the_levels_asked_for():
    batches = take(train_iterator(dataclasses.replace(CONFIG, levels=(1, 3)), 16), 3)
    assert set(np.concatenate([batch.level_B for batch in batches]).tolist()) == {1, 3}


@pytest.mark.parametrize("threads", [0, 2])
def test_an_iterator_resumes_where_it_was(threads):
    config = dataclasses.replace(CONFIG, threads=threads)
    iterator = train_iterator(config, 4)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    ahead = take(iterator, 4)
    resumed = train_iterator(config, 4)
    resumed.set_state(state)
    assert all(map(identical, ahead, take(resumed, 4)))
    iterator.set_state(state)  # back in time
    assert identical(next(iterator), ahead[0])


def test_threads_do_not_change_the_batches():
    batches = take(train_iterator(CONFIG, 4), 5)
    threaded = take(train_iterator(dataclasses.replace(CONFIG, threads=2, prefetch=3), 4), 5)
    assert all(map(identical, batches, threaded))


def seen(config, batch_size, batches, **process):
    """(domain, example) of each row."""
    rows = take(train_iterator(config, batch_size, **process), batches)
    return [(int(d), int(i)) for batch in rows for d, i in zip(batch.domain_B, batch.example_B, strict=True)]


def test_processes_share_no_example_and_together_see_all():
    config = dataclasses.replace(NLP, train_examples=24)
    shards = [seen(config, 4, 2, process_index=p, process_count=3) for p in range(3)]
    assert sorted(itertools.chain.from_iterable(shards)) == [(0, i) for i in range(24)]


def test_every_process_sees_every_domain_in_its_share():
    for p in range(4):  # 4 processes and weights 2:1:1: dealing out the mixture itself would give each one domain
        domains = [d for d, _ in seen(CONFIG, 8, 2, process_index=p, process_count=4)]
        assert np.bincount(domains).tolist() == [8, 4, 4]


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
        ({"process_index": 2, "process_count": 2}, r"process_index=2 must be in \[0, process_count=2\)"),
        ({"config": dataclasses.replace(NLP, train_examples=3), "process_count": 4}, "has 3 training examples for 4"),
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
def test_a_sequence_that_is_too_long_is_one_clear_error(threads):
    config = dataclasses.replace(NLP, encoding=EncodingSpec(max_length=20), threads=threads)
    with pytest.raises(UserError, match=r"nlp/\w+ example needs \d+ positions .* more than encoding.max_length=20"):
        next(train_iterator(config, 4))
