"""The thread that runs the engine: a bounded queue, a stop that finishes accepted jobs, a restart after an error."""

import collections
import threading
from collections.abc import Callable
from typing import Literal

from anyexperts_jax.core.errors import one_line
from anyexperts_jax.serve.engine import Engine, Failed, Ticket

State = Literal["ok", "stopping", "dead"]


class QueueFullError(Exception):
    """The queue has no room for the request."""


class StoppingError(Exception):
    """The server accepts no more requests."""


class Worker:
    """Calls `engine.step` while there is work. `submit` and `cancel` may be called from any thread.

    Args:
      queue: how many requests may wait for a slot.
      restarted: called with a one-line message after a step has raised and the engine has been reset.
    """

    def __init__(self, engine: Engine, queue: int, restarted: Callable[[str], None]) -> None:
        self._engine, self._queue, self._restarted = engine, queue, restarted
        self._arrived = collections.deque[Ticket]()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="anyexperts-engine", daemon=True)
        self._state: State = "ok"

    @property
    def state(self) -> State:
        return self._state

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
            if self._state != "ok":
                raise StoppingError(self._state)
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
            if self._state == "ok":
                self._state = "stopping"
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._receive():
                self._step()
        finally:
            with self._changed:
                died = self._state == "ok"
                self._state = "dead" if died else "stopping"
                left = list(self._arrived)
            if died:
                self._engine.fail_all("the engine's thread died; restart the server", waiting=True)
                for ticket in left:
                    ticket.job.tell(Failed("engine", "the engine's thread died; restart the server"))

    def _receive(self) -> bool:
        """Waits for work and submits new jobs to the engine; False if there is no work and the server is stopping."""
        with self._changed:
            while not self._arrived and not self._engine.busy:
                if self._state != "ok":
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
