"""The engine's thread: what is told when a step fails or the thread dies, and who goes on."""

import threading

import pytest

from anyexperts_jax.models.sample import GREEDY
from anyexperts_jax.serve.engine import Engine, Failed, Finished, Job, Prompt, Ticket
from anyexperts_jax.serve.slots import RowBudget
from anyexperts_jax.serve.usage import Spent, Usage
from anyexperts_jax.serve.worker import MOST_DEATHS, StoppingError, Worker

DONE = Finished("", "stop", Usage(1, 1, Spent.nothing(0)))


@pytest.fixture(autouse=True)
def threads_die_quietly(monkeypatch):
    """No hook sees the threads of a test die, and none of them outlives it."""
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(10)


class StandIn(Engine):
    """An engine that answers a job a step, and fails as often as it is told to."""

    running, free = 0, 4

    def __init__(self, errors):
        self.errors, self.jobs = list(errors), []

    @property
    def waiting(self):
        return len(self.jobs)

    @property
    def busy(self):
        return bool(self.jobs)

    def submit(self, ticket):
        self.jobs.append(ticket)

    def step(self):
        if self.errors:
            raise self.errors.pop(0)
        self.jobs.pop(0).job.tell(DONE)
        return True

    def fail_all(self, message, waiting=False):
        jobs, self.jobs = self.jobs, []
        for ticket in jobs:
            ticket.job.tell(Failed("engine", message))


def ask(worker):
    """What is told of one request."""
    told, found = threading.Event(), []

    def tell(event):
        found.append(event)
        told.set()

    worker.submit([Ticket(Job(Prompt((1,)), 1, RowBudget(1, 1, 1.0), tell, sampling=GREEDY), 0.0)])
    assert told.wait(10)
    return found[0]


def started(*errors):
    lines = []
    worker = Worker(StandIn(errors), 4, lines.append)
    worker.start()
    return worker, lines


def until_alive(worker):
    deadline = threading.Event()
    for _ in range(200):
        if worker.state == "ok":
            return
        deadline.wait(0.01)
    raise AssertionError(worker.state)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("out of\nmemory"), "a step failed and its requests with it: out of memory"),
        (ValueError("a bug"), "the engine's thread died: ValueError: a bug; another one goes on"),
    ],
)
def test_a_fault_is_told_and_the_next_request_is_answered(error, said):
    worker, lines = started(error)
    assert ask(worker) == Failed("engine", said)
    until_alive(worker)
    assert ask(worker) == DONE
    worker.stop()
    assert lines == [said]


def test_a_thread_that_dies_again_and_again_is_left_dead():
    worker, lines = started(*[ValueError("a bug")] * MOST_DEATHS)
    for number in range(1, MOST_DEATHS + 1):
        failed = ask(worker)
        assert failed.message.endswith("restart the server" if number == MOST_DEATHS else "another one goes on")
        if number < MOST_DEATHS:
            until_alive(worker)
    worker.stop()
    assert len(lines) == MOST_DEATHS
    with pytest.raises(StoppingError, match="dead"):
        ask(worker)


def test_deaths_are_counted_in_a_row():
    worker, lines = started()
    for _ in range(MOST_DEATHS + 1):
        worker._engine.errors = [ValueError("a bug")]
        assert isinstance(ask(worker), Failed)
        until_alive(worker)
        assert ask(worker) == DONE
    worker.stop()
    assert len(lines) == MOST_DEATHS + 1


def test_a_thread_that_dies_while_the_server_stops_is_replaced_too():
    """What was taken is answered, and `stop` returns."""
    worker, _ = started(ValueError("a bug"))
    assert isinstance(ask(worker), Failed)
    worker.stop()
    with pytest.raises(StoppingError, match="stopping"):
        ask(worker)
