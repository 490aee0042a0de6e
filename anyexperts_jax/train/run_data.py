"""What a run records about its data: the fingerprint of each source, which reveals changes, and the place reached."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import grain

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.data.config import DataConfig, named_places
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.data.row_source import RowSource
from anyexperts_jax.train.run_dir import RunDir, load_config


def with_fingerprints(sources: Sources, paths: RunDir, note: Callable[[str], None] = lambda line: None) -> DataConfig:
    """Adds the fingerprints of its sources to the mixture, after checking that they are those the run began with.

    Args:
      note: called with a line that describes each of the user's sources.

    Raises:
      UserError: if a source cannot be read, or has changed since the run began.
    """
    data, found = sources.config, dict[str, str]()
    for name in data.places():
        source = sources.open(name, "train")
        if isinstance(source, RowSource):
            found[name] = source.fingerprint
    begun = paths.config.exists() and bool(paths.checkpoint_steps())
    saved = load_config(paths.config).data if begun else data
    for name, was in named_places(saved.fingerprints, "data.fingerprints").items():
        now = found.get(name, was)
        require(
            now == was,
            f"the data of {name} at {data.places().get(name)} have changed since the run began (fingerprint {now}, was "
            f"{was}), so it cannot go on in the same order; put them back as they were, or begin another run from this "
            f"one's weights (train.start_from={paths.root})",
        )
    for name in data.places():
        note(sources.describe(name))
    return dataclasses.replace(data, fingerprints=tuple(f"{name}={value}" for name, value in found.items()))


def restore_iterator(iterator: grain.DatasetIterator, state: dict[str, Any], where: pathlib.Path) -> None:
    """Moves the data iterator to where it was at the time of the checkpoint.

    Raises:
      UserError: naming the file, if the state does not belong to this run's data.
    """
    try:
        iterator.set_state(state)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:  # Grain does not validate states
        line = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"the data state in {where} is not one of this run's data pipeline ({line})") from error
