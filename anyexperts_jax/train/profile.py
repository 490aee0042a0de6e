"""Profiler traces of some steps, by configuration or on demand: `touch RUN/profile.request` and see RUN/profile."""

import contextlib

import jax

from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.runtime import RuntimeConfig


class Profiler:
    """Starts and stops JAX's profiler between steps. All processes trace their own devices at the same steps."""

    def __init__(self, config: RuntimeConfig, paths: RunDir, *, watches: bool) -> None:
        """`watches`: whether this process looks for the request file and deletes it."""
        self._range, self._steps, self._paths, self._watches = config.profile, config.profile_steps, paths, watches
        self._last: int | None = None  # last step of the running trace
        self._requested = False

    def asked(self) -> bool:
        """Whether this process has found a request for a trace."""
        return self._watches and self._last is None and self._paths.profile_request.exists()

    def request(self) -> None:
        """Makes the next step start a trace; called in every process."""
        self._requested = True

    def before(self, step: int) -> None:
        """Starts a trace if one should begin with `step`."""
        if self._last is not None:
            return
        if self._requested:
            self._start(step, step + self._steps - 1)
        elif self._range is not None and self._range[0] <= step <= self._range[1]:
            self._start(step, self._range[1])

    def ends_with(self, step: int) -> bool:
        return step == self._last

    def close(self) -> None:
        """Writes the running trace, if any. The traced steps must be finished."""
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
