"""What the processes of a run do together: hold its lock, wait for each other with a timeout, describe its state."""

import contextlib
from collections.abc import Iterator

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.train import processes
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.run_dir import RunDir
from anyexperts_jax.train.run_lock import run_lock

AGAIN = "run the same command to resume"


@contextlib.contextmanager
def lock_run(config: RunConfig, paths: RunDir) -> Iterator[None]:
    """Holds the run's lock in the first process on behalf of all. If it is refused, every process raises the error.

    Raises:
      UserError: if another run is training in the directory, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if processes.is_first():
            try:
                stack.enter_context(run_lock(paths.root, "train"))
            except UserError as refused:
                error = refused
        with waiting(make_watch(config, paths), "the first process to lock the run"):
            processes.raise_together(error)
        yield


def make_watch(config: RunConfig, paths: RunDir) -> processes.Watch:
    """The watch that exits this process if another one dies or hangs. Its last line names the last checkpoint."""
    timeout = config.runtime.peer_timeout
    return processes.Watch(
        timeout,
        lambda what: (
            f"waited {timeout:g} s (runtime.peer_timeout) for {what}: another process died or hangs; "
            f"{describe_last_checkpoint(paths)}; {AGAIN}"
        ),
    )


def waiting(watch: processes.Watch, what: str) -> contextlib.AbstractContextManager[None]:
    """The context for anything that waits for other processes; does nothing if there are none."""
    return watch.waiting(what) if processes.several() else contextlib.nullcontext()


def describe_last_checkpoint(paths: RunDir) -> str:
    """The last checkpoint, for messages."""
    steps = paths.checkpoint_steps()
    return (
        f"the last good checkpoint is {paths.checkpoints / str(steps[-1])}" if steps else "there is no checkpoint yet"
    )
