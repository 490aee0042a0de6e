"""Checks from shapes alone, before anything is allocated, that a run fits its mesh and its machine.

Byte counts are lower bounds: they count what certainly exists at the same time and nothing that a compiler may save. So
a run that fits is never refused, and one that is far too large is refused at once instead of after minutes of paging.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.host_memory import available_bytes
from anyexperts_jax.core.quantities import bytes_text
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.models.init import abstract_params, logical_axes
from anyexperts_jax.sharding.specs import batch_shards, param_shardings
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.frozen import select
from anyexperts_jax.train.state import abstract_state
from anyexperts_jax.train.trainable import what_trains

_NUMBER = 4  # bytes of a float32 or an int32


def require_fits(config: RunConfig, mesh: Mesh, *, trains_everything: bool = True) -> None:
    """Checks that a run's arrays split over the mesh and fit into memory.

    Args:
      trains_everything: False if a recipe decides what is trained; then gradients and optimiser state are not counted.

    Raises:
      UserError: naming the size and the mesh axis, or the bytes needed and available.
    """
    _require_splits(config, mesh)
    device, host = device_bytes(config, mesh, trains_everything), host_bytes(config, mesh)
    if platform_of(mesh) == "cpu":  # CPU devices share this process's memory with the data
        local = {name: size * len(mesh.local_devices) for name, size in device.items()}
        _require_room({**local, **host, **attention_bytes(config)}, available_bytes(), "this machine has available")
        return
    _require_room(host, available_bytes(), "this machine has available for the data")
    room = room_on_devices(mesh)
    if room is not None:
        _require_room(device, room, f"a {mesh.devices.flat[0].device_kind} has")


def require_room_for_examples(spec: EncodingSpec, examples: int, option: str) -> None:
    """Checks that this machine has memory for this number of examples of `spec` at once.

    Raises:
      UserError: naming `option`, as in "--examples=64", and the bytes needed and available.
    """
    _require_room({option: examples * sequence_bytes(spec)}, available_bytes(), "this machine has available")


def platform_of(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def room_on_devices(mesh: Mesh) -> int | None:
    """Bytes of memory of the smallest of this process's devices; None if no device reports it."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return min((limit for limit in limits if limit), default=None)


def state_bytes(config: RunConfig, mesh: Mesh) -> int:
    """Bytes of the train state that one device holds."""
    optimizer = what_trains(config).optimizer(config)
    arrays = jax.tree.leaves(abstract_state(config.model, optimizer, mesh))
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def sequence_bytes(spec: EncodingSpec) -> int:
    """Least bytes of one encoded sequence: two numbers per position, and the features of patches and frames."""
    features = spec.max_patches * spec.patch_features + spec.max_frames * spec.frame_features
    return _NUMBER * (2 * spec.max_length + features)


def host_bytes(config: RunConfig, mesh: Mesh) -> dict[str, int]:
    """Host memory of a process: a batch, and all validation examples, which are made once and kept."""
    train = config.train
    whole = len(mesh.local_devices) == mesh.size
    share = 1 if whole else batch_shards(mesh)
    validation = len(config.data.domains) * train.eval_examples
    one = sequence_bytes(config.data.encoding)
    return {
        f"a batch of train.batch_size={train.batch_size} sequences": train.batch_size // share * one,
        f"the validation examples of train.eval_examples={train.eval_examples}": validation // share * one,
    }


def device_bytes(config: RunConfig, mesh: Mesh, trains_everything: bool) -> dict[str, int]:
    """Memory of one device: the train state, all gradients (clipped together), and the logits of a micro-batch."""
    parameters = _parameter_bytes(config, mesh)
    tokens = config.train.batch_size // config.train.accumulation * config.data.encoding.max_length
    tokens_here = tokens // (batch_shards(mesh) * mesh.shape["sequence"])
    logits = {"the logits": tokens_here * (config.model.vocab_size // mesh.shape["tensor"]) * _NUMBER}
    if not trains_everything:
        return {"the parameters": parameters, **logits}
    gradients = _parameter_bytes(config, mesh, what_trains(config).trainable)
    return {"parameters, gradients and optimiser state": state_bytes(config, mesh) + gradients, **logits}


def attention_bytes(config: RunConfig) -> dict[str, int]:
    """The attention scores of one sequence, which a CPU computes one head at a time but for all positions at once."""
    length = config.data.encoding.max_length
    return {f"the attention of data.encoding.max_length={length} positions": length**2 * _NUMBER}


def _require_splits(config: RunConfig, mesh: Mesh) -> None:
    micro, shards = config.train.batch_size // config.train.accumulation, batch_shards(mesh)
    require(
        micro % shards == 0,
        f"train.batch_size / train.accumulation = {micro} does not split over the mesh's {shards} batch shards",
    )
    length, parts = config.data.encoding.max_length, mesh.shape["sequence"]
    require(length % parts == 0, f"data.encoding.max_length={length} does not split over mesh.sequence={parts}")


def _parameter_bytes(config: RunConfig, mesh: Mesh, trainable: Any = None) -> int:
    """Bytes of the parameters, or of those that train, on one device.

    Raises:
      UserError: if a parameter does not split over the mesh.
    """
    params = abstract_params(config.model)
    shardings = param_shardings(mesh, logical_axes(config.model), params)
    sizes = jax.tree.map(lambda p, s: math.prod(s.shard_shape(p.shape)) * p.dtype.itemsize, params, shardings)
    return sum(jax.tree.leaves(select(sizes, trainable)))


def _require_room(needed: Mapping[str, int], room: int, where: str) -> None:
    total = sum(needed.values())
    if total <= room:
        return
    parts = sorted(needed.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts if size > total / 100)
    raise UserError(
        f"this takes at least {bytes_text(total)} of memory ({shown}); {where} {bytes_text(room)}; make it smaller"
    )
