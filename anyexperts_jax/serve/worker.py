"""The thread that runs the engine: a bounded queue, a stop that finishes accepted jobs, a restart after an error."""

import collections
import sys
import threading
from collections.abc import Callable
from typing import Literal

from anyexperts_jax.core.errors import one_line
from anyexperts_jax.serve.engine import Engine, Failed, Ticket

State = Literal["ok", "stopping", "dead"]
MOST_DEATHS = 3  # of the thread, in a row, before it is left dead


class QueueFullError(Exception):
    """The queue has no room for the request."""


class StoppingError(Exception):
    """The server accepts no more requests."""


class Worker:
    """Calls `engine.step` while there is work. `submit` and `cancel` may be called from any thread.

    Args:
      queue: how many requests may wait for a slot.
      restarted: called with a one-line message after a step raised, or the thread died, and the engine was reset.
    """

    def __init__(self, engine: Engine, queue: int, restarted: Callable[[str], None]) -> None:
        self._engine, self._queue, self._restarted = engine, queue, restarted
        self._arrived = collections.deque[Ticket]()
        self._changed = threading.Condition()
        self._thread = self._new_thread()
        self._stops = self._dead = False
        self._deaths = 0  # since the last step that did not raise

    @property
    def state(self) -> State:
        return "dead" if self._dead else "stopping" if self._stops else "ok"

    @property
    def running(self) -> int:
        return self._engine.running

    @property
    def waiting(self) -> int:
        return self._engine.waiting + len(self._arrived)

    def start(self) -> None:
        self._thread.start()

    def submit(self, tickets: list[Ticket]) -> None:
        """Puts all jobs into the queue, or none of them.

        Raises:
          QueueFullError: if they do not all fit.
          StoppingError: if the server is stopping or the engine's thread has died.
        """
        with self._changed:
            if self.state != "ok":
                raise StoppingError(self.state)
            if self.waiting + len(tickets) > self._queue + self._engine.free:
                raise QueueFullError
            self._arrived.extend(tickets)
            self._changed.notify()

    def cancel(self, tickets: list[Ticket]) -> None:
        """Cancels jobs that nobody waits for any more."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self._changed.notify()

    def stop(self) -> None:
        """Accepts no more jobs, and returns when all accepted ones are finished."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        joined = None
        while joined is not self._thread:  # one that dies starts another
            joined = self._thread
            joined.join()

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="anyexperts-engine", daemon=True)

    def _run(self) -> None:
        try:
            while self._receive():
                self._step()
                self._deaths = 0
        finally:
            error = sys.exception()
            if error is not None:
                self._begin_anew(f"{type(error).__name__}: {one_line(error, 200)}")

    def _begin_anew(self, why: str) -> None:
        """Fails all requests of a thread that died and starts another; after several deaths in a row, none."""
        with self._changed:
            self._dead = True  # and remains so where there can be no new cache
            left = list(self._arrived)
            self._arrived.clear()
            self._deaths += 1
        again = self._deaths < MOST_DEATHS
        said = f"the engine's thread died: {why}; {'another one goes on' if again else 'restart the server'}"
        for ticket in left:
            ticket.job.tell(Failed("engine", said))
        self._engine.fail_all(said, waiting=True)
        self._restarted(said)
        if again:
            with self._changed:
                self._dead, self._thread = False, self._new_thread()
                self._thread.start()

    def _receive(self) -> bool:
        """Waits for work and submits new jobs to the engine; False if there is no work and the server is stopping."""
        with self._changed:
            while not self._arrived and not self._engine.busy:
                if self._stops:
                    return False
                self._changed.wait()
            arrived = list(self._arrived)
            for ticket in arrived:
                self._engine.submit(ticket)
            self._arrived.clear()
        return True

    def _step(self) -> None:
        try:
            self._engine.step()
        except (RuntimeError, MemoryError) as error:  # JAX raises RuntimeErrors for errors of the device
            message = f"a step failed and its requests with it: {one_line(error, 200)}"
            self._engine.fail_all(message)
            self._restarted(message)
