"""Options that do not affect results: compilation cache, profiles, timeouts."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from anyexperts_jax.core.checks import check_field_types
from anyexperts_jax.core.errors import require


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """Options that change no number of a run and may change when it is resumed.

    Raises:
      UserError: naming the value and the rule it breaks.
    """

    compile_cache: str | None = None  # directory of compiled programs, shared by runs and processes
    profile: tuple[int, ...] | None = None  # (first, last) steps of a trace under RUN/profile
    profile_steps: int = 3  # steps of a trace that is requested by the file RUN/profile.request
    peer_timeout: float = 300.0  # seconds to wait for other processes, at the start and in every step

    def __post_init__(self) -> None:
        check_field_types(self, "runtime.")
        require(self.compile_cache != "", "runtime.compile_cache='' must be a directory, or none")
        if self.profile is not None:
            in_order = len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]
            require(in_order, f"runtime.profile={list(self.profile)} must be [first, last] with 1 <= first <= last")
        require(self.profile_steps >= 1, f"runtime.profile_steps={self.profile_steps} must be >= 1")
        require(self.peer_timeout >= 1, f"runtime.peer_timeout={self.peer_timeout:g} must be >= 1 second")


@contextlib.contextmanager
def compile_cache(directory: str | None) -> Iterator[None]:
    """A context in which JAX caches compiled programs in `directory`; None leaves JAX's own setting."""
    if directory is None:
        yield
        return
    before = jax.config.values["jax_compilation_cache_dir"]
    _keep_in(directory)
    try:
        yield
    finally:
        _keep_in(before)


def _keep_in(directory: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()  # JAX opens the directory once and keeps it
