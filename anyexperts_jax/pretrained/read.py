"""From a source of tensors to parameters on their devices: planned first, then read one parameter at a time."""

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
_ALIGNED = 64  # bytes
_STRIP = 64  # elements of a row
_MOST_THREADS = 8  # more add nothing where memory is the bound


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
    """How a whole checkpoint is read: what `--dry-run` shows."""

    config: ModelConfig
    parameters: tuple[ParameterPlan, ...]
    tensors: Mapping[str, Expected]
    repeated_head: bool  # a tied model's file holds the head all the same
    left_out: tuple[str, ...] = ()  # tensors on the family's ignore list

    def table(self, source: Source) -> TextTable:
        """A row a parameter: the tensors that make it, its shape, type and sharding."""
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
    """Checks config.json against the files' headers and says what is to be read, without reading a weight.

    Raises:
      UserError: a tensor that is missing, of another shape, or that nothing reads; sizes that do not split over `mesh`.
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
    """Lines that say what a checkpoint is: family, layers, experts, size and type."""
    stack, moe = plan.config.stack, plan.config.moe
    elements = sum(math.prod(own.shape) for own in plan.parameters)
    size = sum(math.prod(own.shape) * own.dtype.itemsize for own in plan.parameters)
    experts = f", {stack.num_moe_layers} of them with {moe.num_experts} experts, {moe.k_max:g} a token"
    head = "tied" if plan.config.tie_embeddings else "of its own"
    towers = {"a vision": plan.config.vision_tower, "an audio": plan.config.audio_tower}
    said = [
        f"; {name} tower of {tower.num_layers} layers, width {tower.d_model}"
        for name, tower in towers.items()
        if tower is not None
    ]
    lines = [
        f"family {family}: {stack.num_layers} layers{experts if stack.num_moe_layers else ', dense'}, "
        f"width {stack.d_model}, {plan.config.vocab_size} ids, head {head}{''.join(said)}",
        f"{elements / 1e6:.1f}M parameters, {size / 1e9:.2f} GB, computed in {stack.dtype}",
    ]
    counts = collections.Counter(name.partition(".")[0] for name in plan.left_out)
    if counts:
        parts = comma_list(f"{count} of {part}" for part, count in counts.items())
        lines.append(f"{len(plan.left_out)} tensors are left out, which this model does not use here: {parts}")
    return lines


def read_parameters(plan: ReadPlan, source: Source) -> tuple[dict[str, Any], jax.Array | None]:
    """The parameters' tree, and the expert biases [L, C], where the model has them.

    One parameter is read at a time, the largest first, and of it what each device gets; a file is closed before the
    next parameter, so that no more of it stays in memory.
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
    """Room for an array. On a CPU, JAX takes over memory that is aligned as this is, instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNED, np.uint8)
    first = -room.ctypes.data % _ALIGNED
    return room[first : first + size].view(dtype).reshape(shape)


def _copy(own: np.ndarray, room: np.ndarray) -> None:
    """`room[...] = own`. NumPy copies bfloat16 an element at a time, and the same bits as whole numbers in runs.

    A transposed tensor is copied in strips, so that what is read of it is still in the CPU's cache for the next row.
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
    """The narrowest that holds all of them: of one parameter, for the types belong to tensors and not to files."""
    found = dtypes[0]
    with jax.numpy_dtype_promotion("standard"):  # the rule is asked for, whatever arrays are held to
        for dtype in set(dtypes):
            found = np.dtype(jnp.promote_types(found, dtype))
    return found if found.itemsize <= 4 else np.dtype(np.float32)  # JAX has no float64 unless it is told to


def _with_types(config: ModelConfig, parameters: list[ParameterPlan]) -> ModelConfig:
    """The configuration that computes in the type that most weights have: bfloat16, or float32 for all others."""
    sizes: dict[str, int] = {}
    for plan in parameters:
        sizes[plan.dtype.name] = sizes.get(plan.dtype.name, 0) + math.prod(plan.shape)
    most = max(sizes, key=lambda name: sizes[name])
    dtype: Dtype = "bfloat16" if most == "bfloat16" else "float32"
    return dataclasses.replace(config, stack=dataclasses.replace(config.stack, dtype=dtype, param_dtype=dtype))
