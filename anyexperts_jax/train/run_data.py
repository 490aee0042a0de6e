"""What a run remembers of a user's data: the fingerprint of each source, by which it is known when it has changed."""

import dataclasses

from anyexperts_jax.core.errors import require
from anyexperts_jax.data.config import DataConfig, named_places
from anyexperts_jax.data.mixture import open_source
from anyexperts_jax.data.row_source import RowSource
from anyexperts_jax.train.run_dir import RunDir, load_config


def with_fingerprints(data: DataConfig, paths: RunDir) -> DataConfig:
    """`data` with the fingerprints of its sources, once those are known to be the ones that the run began with.

    Raises:
      UserError: when a source cannot be read, or has changed since.
    """
    found: dict[str, str] = {}
    for name in data.places():
        source = open_source(data, name, "train")
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
    return dataclasses.replace(data, fingerprints=tuple(f"{name}={value}" for name, value in found.items()))
