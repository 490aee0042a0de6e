"""What the processes of one run do together: hold its lock, wait for each other with patience, say where it stands."""

import contextlib
from collections.abc import Iterator

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train import processes
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.run_lock import run_lock

AGAIN = "run the same command to go on"


@contextlib.contextmanager
def locked_together(config: RunConfig, paths: RunDir) -> Iterator[None]:
    """Holds the run's lock in the first process, for all of them: where it is refused, it is refused in every process.

    Raises:
      UserError: another run is under way in the directory, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if processes.is_first():
            try:
                stack.enter_context(run_lock(paths.root, "train"))
            except UserError as refused:
                error = refused
        with waiting(watch_of(config, paths), "the first process to lock the run"):
            processes.raise_together(error)
        yield


def watch_of(config: RunConfig, paths: RunDir) -> processes.Watch:
    """Ends this process when another one is gone or hangs, with a line that says where to go on from."""
    patience = config.runtime.peer_timeout
    return processes.Watch(
        patience,
        lambda what: (
            f"waited {patience:g} s (runtime.peer_timeout) for {what}: another process is gone or hangs; "
            f"{last_good(paths)}; {AGAIN}"
        ),
    )


def waiting(watch: processes.Watch, what: str) -> contextlib.AbstractContextManager[None]:
    """Around whatever waits for the other processes, where there are any."""
    return watch.waiting(what) if processes.several() else contextlib.nullcontext()


def last_good(paths: RunDir) -> str:
    """Where to go on from, for messages."""
    steps = paths.checkpoint_steps()
    return (
        f"the last good checkpoint is {paths.checkpoints / str(steps[-1])}" if steps else "there is no checkpoint yet"
    )
