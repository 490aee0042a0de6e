"""Traces of some steps, by configuration or on demand: `touch RUN/profile.request`, and look into RUN/profile."""

import contextlib

import jax

from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.runtime import RuntimeConfig


class Profiler:
    """Starts and stops JAX's profiler between steps. Every process of a run traces its own devices, at one step."""

    def __init__(self, config: RuntimeConfig, paths: RunDir, *, watches: bool) -> None:
        """`watches`: this process looks for the request and takes it away."""
        self._range, self._steps, self._paths, self._watches = config.profile, config.profile_steps, paths, watches
        self._last: int | None = None  # step of the trace under way
        self._requested = False

    def asked(self) -> bool:
        """Whether a trace is asked for that this process sees."""
        return self._watches and self._last is None and self._paths.profile_request.exists()

    def request(self) -> None:
        """The next step starts a trace, in every process."""
        self._requested = True

    def before(self, step: int) -> None:
        """Starts a trace if one begins with `step`."""
        if self._last is not None:
            return
        if self._requested:
            self._start(step, step + self._steps - 1)
        elif self._range is not None and self._range[0] <= step <= self._range[1]:
            self._start(step, self._range[1])

    def ends_with(self, step: int) -> bool:
        return step == self._last

    def close(self) -> None:
        """Writes the trace under way, if there is one; what it traces must be done."""
        if self._last is not None:
            jax.profiler.stop_trace()
            self._last = None

    def _start(self, step: int, last: int) -> None:
        if self._requested and self._watches:
            with contextlib.suppress(FileNotFoundError):
                self._paths.profile_request.unlink()
        self._requested = False
        jax.profiler.start_trace(self._paths.profile / f"step_{step:06d}")
        self._last = last
