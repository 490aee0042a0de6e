"""Reads a source of tensors into parameters on their devices: plans first, then reads one parameter at a time."""

import collections
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from anyexperts_jax.core.errors import comma_list, require
from anyexperts_jax.core.quantities import bytes_text, count_text
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.init import logical_axes, named_leaves, params_of_leaves
from anyexperts_jax.nn.config import Dtype
from anyexperts_jax.pretrained.family import Family, expert_layout, without_ignored
from anyexperts_jax.pretrained.hub_config import HubConfig
from anyexperts_jax.pretrained.rules import (
    ROUTER_BIAS,
    Expected,
    Piece,
    check_tensors,
    expand,
    expected_tensors,
    parameter_shapes,
)
from anyexperts_jax.pretrained.sources import Reader, Source
from anyexperts_jax.sharding.specs import param_shardings, replicated

Sharding = jax.sharding.Sharding
HEAD = "lm_head.weight"
_ALIGNED = 64  # bytes, JAX's alignment on a CPU
_STRIP = 64  # elements per row that are copied at a time
_MOST_THREADS = 8  # more do not help: memory bandwidth is the limit


@dataclasses.dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """How a whole checkpoint is read; `--dry-run` prints it."""

    config: ModelConfig
    parameters: tuple[ParameterPlan, ...]
    tensors: Mapping[str, Expected]
    repeated_head: bool  # the embeddings are tied, but the files hold a head too
    left_out: tuple[str, ...] = ()  # tensors that the family ignores

    def table(self, source: Source) -> TextTable:
        """Returns a table with a row per parameter: its tensors, shape, type and sharding."""
        rows = []
        for plan in self.parameters:
            stored = sorted({source.tensors[piece.tensor].stored for piece in plan.pieces})
            first, count = plan.pieces[0].tensor, len(plan.pieces)
            tensors = first if count == 1 else f"{first} and {count - 1} more"
            spec = getattr(plan.sharding, "spec", None)
            split = "one device" if spec is None else str(tuple(spec))
            shape = " x ".join(map(str, plan.shape))
            rows.append((plan.name, tensors, "/".join(stored), plan.dtype.name, shape, split))
        columns = ("parameter", "tensor", "stored", "read as", "shape", "split over")
        return TextTable(f"{len(self.tensors)} tensors of {source.where}", columns, tuple(rows), names=6)


def plan_reading(family: Family, hub: HubConfig, source: Source, mesh: Mesh | None) -> ReadPlan:
    """Checks config.json against the files' headers and plans what to read, without reading any weight.

    Raises:
      UserError: if a tensor is missing, has another shape or is not used, or `mesh` does not divide the sizes.
    """
    found = without_ignored(family, hub, source.tensors)
    left_out = tuple(name for name in source.tensors if name not in found)
    config = family.config(hub)
    repeated_head = config.tie_embeddings and found.pop(HEAD, None) is not None
    shapes = {name: info.shape for name, info in found.items()}
    pieces = expand(family.rules(config, expert_layout(family, config, shapes, source.where)), config)
    expected = expected_tensors(pieces)
    check_tensors(expected, shapes, source.where)
    own: dict[str, list[Piece]] = {}
    for piece in pieces:
        own.setdefault(piece.parameter, []).append(piece)
    shardings = _shardings(config, mesh)
    parameters = [
        ParameterPlan(
            name,
            tuple(leaf.shape),
            _common_dtype([found[piece.tensor].dtype for piece in own[name]]),
            shardings[name],
            tuple(own[name]),
        )
        for name, leaf in parameter_shapes(config).items()
    ]
    return ReadPlan(_with_types(config, parameters), tuple(parameters), expected, repeated_head, left_out)


def summary(plan: ReadPlan, family: str) -> list[str]:
    """Describes a checkpoint in a few lines: family, layers, experts, size and type."""
    stack, moe = plan.config.stack, plan.config.moe
    elements = sum(math.prod(own.shape) for own in plan.parameters)
    size = sum(math.prod(own.shape) * own.dtype.itemsize for own in plan.parameters)
    experts = f", {stack.num_moe_layers} of them with {moe.num_experts} experts, {moe.k_max:g} a token"
    head = "tied" if plan.config.tie_embeddings else "of its own"
    towers = {"a vision": plan.config.vision_tower, "an audio": plan.config.audio_tower}
    tower_texts = [
        f"; {name} tower of {tower.num_layers} layers, width {tower.d_model}"
        for name, tower in towers.items()
        if tower is not None
    ]
    lines = [
        f"family {family}: {stack.num_layers} layers{experts if stack.num_moe_layers else ', dense'}, "
        f"width {stack.d_model}, {plan.config.vocab_size} ids, head {head}{''.join(tower_texts)}",
        f"{count_text(elements)} parameters, {bytes_text(size)}, computed in {stack.dtype}",
    ]
    counts = collections.Counter(name.partition(".")[0] for name in plan.left_out)
    if counts:
        parts = comma_list(f"{count} of {part}" for part, count in counts.items())
        lines.append(f"{len(plan.left_out)} tensors are left out, which this model does not use here: {parts}")
    return lines


def read_parameters(plan: ReadPlan, source: Source) -> tuple[dict[str, Any], jax.Array | None]:
    """Reads the tree of parameters, and the expert biases [L, C] if the model has them.

    Parameters are read one at a time, the largest first, and of a sharded one only what each device gets. Files are
    closed after each parameter, so that their pages do not stay in memory.
    """
    leaves: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as threads:
        for parameter in sorted(plan.parameters, key=lambda own: -math.prod(own.shape) * own.dtype.itemsize):
            leaves[parameter.name] = _read_parameter(parameter, plan.tensors, source, threads)
    if plan.repeated_head:
        _check_repeated_head(plan, source)
    return params_of_leaves(plan.config, leaves), leaves.get(ROUTER_BIAS)


def _read_parameter(
    plan: ParameterPlan, tensors: Mapping[str, Expected], source: Source, threads: ThreadPoolExecutor
) -> jax.Array:
    def part(where: tuple[slice, ...]) -> np.ndarray:
        return _read_part(plan, tensors, reader, threads, where)

    with source.opened() as reader:
        if plan.sharding.is_fully_addressable and len(plan.sharding.device_set) == 1:
            whole = part(tuple(slice(0, n) for n in plan.shape))
            return jax.block_until_ready(jax.device_put(whole, plan.sharding))
        return jax.make_array_from_callback(plan.shape, plan.sharding, lambda where: part(where or ()))


def _read_part(
    plan: ParameterPlan,
    tensors: Mapping[str, Expected],
    reader: Reader,
    threads: ThreadPoolExecutor,
    where: tuple[slice, ...],
) -> np.ndarray:
    depth = len(plan.pieces[0].index)
    by_index = {piece.index: piece for piece in plan.pieces}
    ranges = [range(*s.indices(n)) for s, n in zip(where, plan.shape, strict=True)]
    inside = tuple(slice(r.start, r.stop) for r in ranges[depth:])
    value = _aligned([len(r) for r in ranges], plan.dtype)

    def copy(place: tuple[int, ...]) -> None:
        piece = by_index[tuple(ranges[axis][i] for axis, i in enumerate(place))]
        _copy(_read_piece(piece, tensors[piece.tensor], reader)[inside], value[place])

    collections.deque(threads.map(copy, np.ndindex(*value.shape[:depth])), maxlen=0)
    return value


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array whose memory is aligned, so that JAX on a CPU takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNED, np.uint8)
    first = -room.ctypes.data % _ALIGNED
    return room[first : first + size].view(dtype).reshape(shape)


def _copy(own: np.ndarray, room: np.ndarray) -> None:
    """Assigns `room[...] = own`, as integers of the same size, since NumPy copies bfloat16 element by element.

    A transposed tensor is copied in strips, so that the cache lines read for one row are still in the CPU's cache for
    the next one.
    """
    if own.dtype == room.dtype:
        bits = np.dtype(f"u{own.dtype.itemsize}")
        own, room = own.view(bits), room.view(bits)
    if own.ndim < 2 or own.strides[-1] <= own.strides[-2]:
        room[...] = own
        return
    for first in range(0, own.shape[-1], _STRIP):
        room[..., first : first + _STRIP] = own[..., first : first + _STRIP]


def _read_piece(piece: Piece, tensor: Expected, reader: Reader) -> np.ndarray:
    where = dict(zip(tensor.pieces, tensor.slices(), strict=True))[piece]
    return piece.layout.to_ours(reader.read(piece.tensor)[where], piece.shape)


def _check_repeated_head(plan: ReadPlan, source: Source) -> None:
    table = next(
        p.tensor for parameter in plan.parameters if parameter.name == "tokens/table" for p in parameter.pieces
    )
    with source.opened() as reader:
        same = np.array_equal(reader.read(HEAD), reader.read(table))
    require(
        same,
        f"{source.where}: config.json ties the head to {table} (tie_word_embeddings), but {HEAD} holds other values; "
        "correct config.json",
    )


def _shardings(config: ModelConfig, mesh: Mesh | None) -> dict[str, Sharding]:
    shapes = parameter_shapes(config)
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return dict.fromkeys(shapes, one)
    axes = logical_axes(config)
    tree = params_of_leaves(config, shapes)
    found = dict(named_leaves(param_shardings(mesh, axes, tree)))
    return {**found, ROUTER_BIAS: replicated(mesh)}


def _common_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """Returns the narrowest type that holds all types of a parameter's tensors, which may differ within a file."""
    found = dtypes[0]
    with jax.numpy_dtype_promotion("standard"):  # `promote_types` raises under strict promotion
        for dtype in set(dtypes):
            found = np.dtype(jnp.promote_types(found, dtype))
    return found if found.itemsize <= 4 else np.dtype(np.float32)  # JAX has no float64 by default


def _with_types(config: ModelConfig, parameters: list[ParameterPlan]) -> ModelConfig:
    """Sets the compute type to that of most weights: bfloat16, or float32 for any other type."""
    sizes: dict[str, int] = {}
    for plan in parameters:
        sizes[plan.dtype.name] = sizes.get(plan.dtype.name, 0) + math.prod(plan.shape)
    most = max(sizes, key=lambda name: sizes[name])
    dtype: Dtype = "bfloat16" if most == "bfloat16" else "float32"
    return dataclasses.replace(config, stack=dataclasses.replace(config.stack, dtype=dtype, param_dtype=dtype))
