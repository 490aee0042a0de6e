"""Counters, histograms and gauges of the server, in Prometheus's text format."""

from collections.abc import Callable

from anyexperts_jax.core.extras import require_package

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server, in their own registry so that several servers can run in a process."""

    def __init__(self) -> None:
        library = require_package("prometheus_client", "serve", "`anyexperts serve` needs")
        self._library, self._registry = library, library.CollectorRegistry()
        where = {"namespace": "anyexperts", "registry": self._registry}
        self._requests = library.Counter("requests", "Answers by path and status", ("path", "status"), **where)
        self._restarts = library.Counter("engine_restarts", "Steps that failed, with their requests", **where)
        self._gone = library.Counter("clients_gone", "Requests whose client went away", **where)
        self._amounts = {
            "prompt_tokens": library.Counter("prompt_tokens", "Tokens of prompts read", **where),
            "completion_tokens": library.Counter("completion_tokens", "Tokens written", **where),
            "real_experts": library.Counter("real_experts", "Real experts used, over all MoE layers", **where),
        }
        self._times = {
            "first_token_seconds": library.Histogram(
                "first_token_seconds", "From arrival to the first token", buckets=_SECONDS, **where
            ),
            "between_tokens_seconds": library.Histogram(
                "between_tokens_seconds", "From one token of an answer to the next", buckets=_SECONDS, **where
            ),
        }
        self._where = where

    def watch(self, name: str, amount: float) -> None:
        """Records an amount that the engine reports."""
        if name in self._times:
            self._times[name].observe(amount)
        else:
            self._amounts[name].inc(amount)

    def follow(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is read at each request of the page."""
        self._library.Gauge(name, text, **self._where).set_function(value)

    def answered(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def restarted(self) -> None:
        self._restarts.inc()

    def client_gone(self) -> None:
        self._gone.inc()

    def text(self) -> tuple[bytes, str]:
        """Returns the metrics page and its content type."""
        return self._library.generate_latest(self._registry), self._library.CONTENT_TYPE_LATEST
