"""The engine without HTTP: an answer does not depend on the requests that run beside it."""

import jax
import numpy as np
import pytest

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.models.sample import Sampling
from anyexperts_jax.pretrained.budget import with_budget
from anyexperts_jax.pretrained.decode import Request, decode
from anyexperts_jax.serve.engine import Failed, Finished, Progress, Prompt
from anyexperts_jax.serve.slots import row_budget
from serve.tiny import BUDGETS, LENGTHS, PROMPTS, job, text_of, tiny_engine, tokens_of

DRAWS = Sampling(temperature=1.5, top_p=0.9, top_k=40, min_p=0.01)


@pytest.fixture(scope="module")
def engine(served):
    return tiny_engine(served)


def run(engine):
    while engine.step():
        pass


def answer_all(served, engine, cases, **how):
    events = [[] for _ in cases]
    for own, (prompt, length, budget) in zip(events, cases, strict=True):
        engine.submit(job(served, Prompt(prompt), length, budget, own, **how))
    run(engine)
    return events


def decoded_alone(served, prompt, length, budget, **how):
    config, in_force = with_budget(served.base, budget)
    weights = served.weights.__class__(config, *list(vars(served.weights).values())[1:])
    request = Request(length, stop_ids=served.stop_ids, **how)
    return decode(weights, [prompt], request, in_force, lambda row, token: True)


CASES = list(zip(PROMPTS, LENGTHS, BUDGETS, strict=True))


def ids(served, tokens):
    return [token for token in tokens if token not in served.stop_ids]


@pytest.mark.parametrize("how", [{}, {"sampling": DRAWS, "seed": 7}], ids=["greedy", "drawn"])
def test_batched_answers_equal_those_of_single_requests(served, engine, how):
    together = answer_all(served, engine, CASES, **how)
    for case, events in zip(CASES, together, strict=True):
        (alone,) = answer_all(served, engine, [case], **how)
        assert tokens_of(events) == tokens_of(alone)
        assert events[-1] == alone[-1]


@pytest.mark.slow
def test_answers_equal_those_of_decode(served, engine):
    for how in ({}, {"sampling": DRAWS, "seed": 7}):
        (events,) = answer_all(served, engine, [CASES[1]], **how)
        (end,) = [event for event in events if isinstance(event, Finished)]
        other = decoded_alone(served, *CASES[1], **how)
        assert tokens_of(events) == ids(served, other.tokens[0])
        assert end.usage.completion_tokens == len(other.tokens[0])
        assert end.usage.real_experts == pytest.approx(other.real_experts)


def test_sampling_follows_the_seed(served, engine):
    drawn = [answer_all(served, engine, [CASES[2]], sampling=DRAWS, seed=seed)[0] for seed in (7, 8)]
    assert tokens_of(drawn[0]) != tokens_of(drawn[1])


def test_a_greedy_token_has_the_highest_of_the_reported_probabilities(served, engine):
    (events,) = answer_all(served, engine, [(PROMPTS[0], 3, None)], tells_logprobs=True)
    told = [event.token for event in events if isinstance(event, Progress)]
    for token in told:
        assert token.logprob == pytest.approx(token.top[0][1])
        assert token.top[0][0] == token.id
        assert sum(np.exp([logprob for _, logprob in token.top])) < 1 + 1e-6


def test_a_cancelled_request_frees_its_slot_and_changes_no_other_answer(served, engine):
    events = [[] for _ in range(3)]
    tickets = [job(served, Prompt((5, 3)), 40, None, own) for own in events]
    for ticket in tickets:
        engine.submit(ticket)
    for _ in range(6):
        engine.step()
    tickets[0].cancelled = True
    engine.step()
    assert engine.running == 2
    run(engine)
    assert not any(isinstance(event, Finished) for event in events[0])
    assert text_of(events[1]) == text_of(events[2])
    assert engine.running == engine.waiting == 0


def test_a_late_request_fails_with_a_timeout(served, engine):
    events = []
    engine.submit(job(served, Prompt((5, 3)), 4, None, events, waited=10, seconds=5.0))
    run(engine)
    assert events == [Failed("timeout", "the answer took more than 5 seconds")]


def test_after_a_failed_step_the_engine_answers_as_before(served, engine):
    (before,) = answer_all(served, engine, [CASES[0]])
    events = []
    engine.submit(job(served, Prompt((5, 3)), 20, None, events))
    for _ in range(3):
        engine.step()
    engine.fail_all("the device went away")
    assert events[-1] == Failed("engine", "the device went away")
    (later,) = answer_all(served, engine, [CASES[0]])
    assert later == before


@pytest.mark.parametrize(
    ("prompt", "length", "said"),
    [
        ((), 1, "the prompt is empty"),
        ((1,) * 90, 7, "together more than the 96 positions"),
        ((300,), 1, "holds the id 300; the model has ids 0 to 299"),
        ((-1,), 1, "holds the id -1"),
        ((1,), 0, "max_tokens=0 must be >= 1"),
    ],
)
def test_prompts_that_do_not_fit_a_slot_are_refused(served, engine, prompt, length, said):
    with pytest.raises(UserError, match=said):
        engine.submit(job(served, Prompt(prompt), length, None, []))


def test_a_budget_beyond_the_servers_room_is_refused(served):
    with pytest.raises(UserError, match="start it with --max-budget 5"):
        row_budget(served.base, served.weights.config, 5.0)
    with pytest.raises(UserError, match="budget=9 must be from 1 to 7"):
        row_budget(served.base, served.weights.config, 9.0)


def test_nothing_is_compiled_after_the_warm_up(served):
    from anyexperts_jax.serve.run import warm_up

    engine = tiny_engine(served)
    warm_up(engine, served)
    compiled = []
    listener = lambda event, seconds, **more: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        answer_all(served, engine, CASES[:5], sampling=DRAWS, seed=3, tells_logprobs=True)
        answer_all(served, engine, [(tuple(range(90)), 4, 2.25)])
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
