"""Puts the model, the engine and the HTTP shell together and serves requests until a signal."""

import contextlib
import dataclasses
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from anyexperts_jax.core.errors import UserError, one_line, require
from anyexperts_jax.core.extras import require_package
from anyexperts_jax.serve.engine import Engine, Failed, Finished, Job, Prompt, Ticket
from anyexperts_jax.serve.metrics import Metrics
from anyexperts_jax.serve.model import ServedModel
from anyexperts_jax.serve.slots import row_budget
from anyexperts_jax.serve.worker import Worker

if TYPE_CHECKING:
    from anyexperts_jax.serve.app import Limits, Service

API_KEY = "ANYEXPERTS_API_KEY"
DEFAULT_LENGTH = 2048
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = 8000


def make_service(
    model: ServedModel,
    *,
    slots: int = 8,
    length: int | None = None,
    limits: "Limits | None" = None,
    api_key: str | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> "Service":
    """Compiles every program, starts the engine's thread and returns the service.

    Args:
      slots: how many requests run at once.
      length: positions of a slot; None: those of the model, at most 2048.
      api_key: the key that clients must send; None: none is needed.
      note: called with one line at each stage and after each restart of the engine.

    Raises:
      UserError: if the extra `serve` is not installed, or the model has fewer positions than `length`.
    """
    require_serve()
    from anyexperts_jax.serve.app import Limits, Service

    limits = limits or Limits()
    length = min(model.longest, DEFAULT_LENGTH) if length is None else length
    require(length >= 2, f"length={length} must be >= 2")
    metrics, warm = Metrics(), threading.Event()

    def watch(name: str, amount: float) -> None:
        if warm.is_set():
            metrics.watch(name, amount)

    engine = Engine(
        model.weights,
        model.tokenizer,
        model.stop_ids,
        slots=slots,
        length=length,
        watch=watch,
        adapters=model.adapters,
    )
    note(f"compiling for {slots} slots of {length} positions")
    warm_up(engine, model)
    warm.set()

    def report_restart(message: str) -> None:
        metrics.restarted()
        note(message)

    worker = Worker(engine, limits.queue, report_restart)
    metrics.follow("running", "Requests that have a slot", lambda: worker.running)
    metrics.follow("waiting", "Requests that wait for one", lambda: worker.waiting)
    metrics.follow("slots", "Slots", lambda: slots)
    worker.start()
    return Service(model, engine, worker, metrics=metrics, limits=limits, api_key=api_key)


def require_serve() -> None:
    """Checks that the packages of the extra `serve` are installed.

    Raises:
      UserError: naming the missing package and how to install it.
    """
    for name in ("starlette", "uvicorn", "prometheus_client"):
        require_package(name, "serve", "`anyexperts serve` needs")


def warm_up(engine: Engine, model: ServedModel) -> None:
    """Compiles every program, so that no request waits for a compilation.

    Raises:
      UserError: with the reason, if the model cannot take a step.
    """
    budget, events = row_budget(model.base, model.weights.config, None), list[Any]()
    for adapter in (None, *model.adapters):
        for length in engine.piece_lengths():
            job = Job(Prompt((0,) * length), 2, budget, events.append, adapter=adapter)
            engine.submit(Ticket(job, 0.0))
    prompt = model.reader.typical()
    if prompt is not None:
        engine.submit(Ticket(Job(prompt, 1, budget, events.append), 0.0))
    while engine.step():
        continue
    failed = [event for event in events if isinstance(event, Failed)]
    require(not failed and any(isinstance(event, Finished) for event in events), f"the model does not run: {failed}")


def serve(service: "Service", listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Answers requests until SIGTERM or an interrupt, then finishes the ones it has accepted.

    Args:
      listening: the socket from `bind`; closed at the end.
      ready: called with the URL, which has the port that was chosen for port 0, just before requests are answered.
    """
    listening.listen(128)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    # After shutting down, uvicorn raises the signal again. These handlers ignore it, so that a requested stop exits
    # with 0.
    before = {number: signal.signal(number, _ignore_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ready(f"http://{shown}:{port}/v1")
        _make_server(service).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        service.worker.stop()
        listening.close()


@contextlib.contextmanager
def in_thread(service: "Service") -> Iterator[str]:
    """Serves on a free local port while the block runs; yields http://HOST:PORT.

    Raises:
      UserError: when no port is free.
    """
    found = bind(Address(port=0))
    found.listen(128)
    server = _make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [found]}, daemon=True)
    thread.start()
    try:
        host, port = found.getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
        service.worker.stop()
        found.close()


def _make_server(service: "Service") -> Any:
    """Returns a uvicorn server without its own logging: setting that up would close absl's handler, and our stderr."""
    import uvicorn

    from anyexperts_jax.serve.app import make_app

    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=5,
        server_header=False,
    )
    return uvicorn.Server(config)


def _ignore_signal(number: int, frame: Any) -> None:
    """Ignores a signal that uvicorn has already handled."""


def bind(address: Address) -> socket.socket:
    """Reserves the address, before the model is loaded; connections are refused until `serve` listens.

    Raises:
      UserError: if the address is taken or invalid.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((address.host, address.port))
    except (OSError, OverflowError) as error:
        found.close()
        raise UserError(
            f"cannot listen on {address.host}:{address.port}: {one_line(error)}; try another port"
        ) from error
    return found


def is_loopback(host: str) -> bool:
    """Whether the address can be reached from this machine only."""
    try:
        return host in LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def api_key_of(environment: Any = os.environ) -> str | None:
    """Returns the key in ANYEXPERTS_API_KEY; None if it is not set.

    Raises:
      UserError: if it is set but empty.
    """
    key = environment.get(API_KEY)
    require(key is None or bool(key.strip()), f"{API_KEY} is set but empty; unset it, or give a key")
    return None if key is None else str(key.strip())
