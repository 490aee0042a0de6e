"""`anyexperts compile --search`: compiles meshes and remat policies, and ranks them by the bound on a step's time.

There are more combinations than one wants to compile, so those with the smallest bound, estimated from the
configuration, go first.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anyexperts_jax.aot.bounds import find_bounds, train_demand
from anyexperts_jax.aot.collectives import Collective
from anyexperts_jax.aot.fit import kept_bytes
from anyexperts_jax.aot.step import CompiledStep, check_batch, compile_step
from anyexperts_jax.aot.step_tables import mesh_text, to_json
from anyexperts_jax.aot.topology import chip_of_topology, slice_devices
from anyexperts_jax.aot.work import count_work, gathered_bytes
from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.hardware import Chip
from anyexperts_jax.core.remat import Remat
from anyexperts_jax.core.text_table import TextTable
from anyexperts_jax.sharding.mesh import MeshConfig, make_mesh
from anyexperts_jax.sharding.specs import token_shards
from anyexperts_jax.train.auto_dispatch import with_dispatch
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.fit import state_bytes

REMATS: tuple[Remat, ...] = ("full", "exchanged", "dots")
_MOST_TENSOR = 8


@dataclasses.dataclass(frozen=True)
class Tried:
    """One mesh and remat policy."""

    config: RunConfig
    estimate: float  # the bound in seconds, estimated before compiling
    step: CompiledStep | None  # None: it does not fit, or the compiler rejected it
    refusal: str = ""


def search(
    config: RunConfig, topology: str, slices: int, limit: int, note: Callable[[str], None] = lambda line: None
) -> list[Tried]:
    """Compiles the `limit` most promising candidates. Returns those that fit first, by their bound.

    Raises:
      UserError: if no mesh is possible, or `limit` < 1.
    """
    require(limit >= 1, f"limit={limit} must be >= 1")
    found = candidates(config, topology, slices)
    require(bool(found), f"no mesh of {topology} divides batch, experts, heads and widths; change train.batch_size")
    note(f"{len(found)} meshes and remat policies are possible; compiling {min(limit, len(found))}")
    tried = []
    for number, (estimate, candidate) in enumerate(found[:limit], 1):
        note(f"{number}/{min(limit, len(found))}: {describe(candidate)}")
        try:
            tried.append(Tried(candidate, estimate, compile_step(candidate, topology, slices)))
        except UserError as error:
            tried.append(Tried(candidate, estimate, None, str(error)))
    return sorted(tried, key=_rank)


def candidates(config: RunConfig, topology: str, slices: int) -> list[tuple[float, RunConfig]]:
    """(estimated bound in seconds, configuration) of every sensible mesh and remat policy, best first."""
    devices = slice_devices(topology, slices)
    chip, found = chip_of_topology(topology), []
    for sizes in meshes(config, len(devices) // slices):
        on_mesh = with_dispatch(dataclasses.replace(config, mesh=sizes), sizes.sizes(len(devices)))
        exchanges = on_mesh.model.stack.execution.dispatch == "exchange"
        for remat in (remat for remat in REMATS if exchanges or remat != "exchanged"):
            stack = dataclasses.replace(on_mesh.model.stack, remat=remat)
            candidate = dataclasses.replace(on_mesh, model=dataclasses.replace(on_mesh.model, stack=stack))
            try:
                mesh = make_mesh(sizes, devices)
                check_batch(candidate, mesh)
                state = state_bytes(candidate, mesh)
            except UserError:  # a size that the mesh does not divide
                continue
            if state + kept_bytes(candidate, dict(mesh.shape), remat) < chip.hbm:
                found.append((estimated_bound(candidate, chip, list(mesh.devices.flat), state), candidate))
    return sorted(found, key=lambda pair: pair[0])


def meshes(config: RunConfig, devices: int) -> Iterator[MeshConfig]:
    """The meshes of one slice whose axes divide experts, heads and width. `sequence` and slices stay as configured."""
    model, given = config.model, config.mesh
    heads = math.gcd(model.stack.attention.num_kv_heads, model.stack.attention.num_heads)
    splits = model.stack.execution.dispatch in ("auto", "exchange")
    experts = _divisors(model.moe.num_experts) if splits else [1]
    for expert in experts:
        for tensor in (size for size in _divisors(heads) if size <= _MOST_TENSOR):
            rest, left = divmod(devices, expert * tensor * given.sequence)
            for fsdp in _divisors(math.gcd(rest, model.stack.d_model)) if rest and not left else []:
                yield dataclasses.replace(given, data=rest // fsdp, fsdp=fsdp, expert=expert, tensor=tensor)


def estimated_bound(config: RunConfig, chip: Chip, devices: Sequence[Any], state: int) -> float:
    """The bound in seconds, from the collectives that the configuration implies.

    Args:
      devices: all devices, in the mesh's order.
      state: bytes of the train state on one of them.
    """
    sizes = config.mesh.sizes(len(devices))
    inner = config.mesh.sizes_inside(len(devices))
    demand = train_demand(count_work(config, sizes, devices[0].device_kind), state)
    return find_bounds(demand, _expected(config, sizes), devices, inner, chip).step


def _expected(config: RunConfig, mesh: dict[str, int]) -> list[Collective]:
    """The expected collectives: rows exchanged, weights gathered, gradients scattered, and sums of tensor
    parallelism."""
    stack, train = config.model.stack, config.train
    itemsize = 2 if stack.dtype == "bfloat16" else 4
    again = stack.remat != "none"
    shards = token_shards(mesh)
    sent = count_work(config, mesh).rows_sent / shards
    slot_bytes = sent * config.model.moe.slots_bound * 4  # a slot's expert, or its weight
    tokens = train.batch_size * config.data.encoding.max_length / shards
    weights = gathered_bytes(config.model, mesh) * train.accumulation
    sums = 2 * tokens * stack.d_model * itemsize * stack.num_layers
    # There and back, and so do the gradients. The way there is repeated, the way back is not: no gradient needs it.
    repeated = again and stack.remat != "exchanged"
    exchanged = (4 + repeated) * sent * stack.d_model * itemsize + (3 + 2 * repeated) * slot_bytes
    rows = {
        ("all-to-all", "expert"): exchanged,
        ("all-gather", "fsdp"): (2 + again) * weights,
        ("reduce-scatter", "fsdp"): weights,
        ("all-reduce", "data"): weights / mesh["fsdp"],
        ("all-reduce", "tensor"): (2 + again) * sums,
    }
    return [Collective(kind, (axis,), 1, round(size)) for (kind, axis), size in rows.items() if mesh[axis] > 1]


def describe(config: RunConfig) -> str:
    sizes = {field.name: getattr(config.mesh, field.name) for field in dataclasses.fields(config.mesh)}
    return f"{mesh_text(sizes)}; {config.model.stack.execution.dispatch}; remat {config.model.stack.remat}"


def search_table(tried: list[Tried], topology: str) -> TextTable:
    rows = []
    for one in tried:
        if one.step is None:
            rows.append((describe(one.config), "-", "-", "-", "does not fit"))
            continue
        bounds, free = one.step.bounds, one.step.free
        limits = {"arithmetic": bounds.arithmetic, "memory": bounds.hbm, "network": bounds.network}
        limits["slices"] = bounds.between_slices
        limit = max(limits, key=lambda name: limits[name])
        fits = limit if free >= 0 else "does not fit"
        rows.append((describe(one.config), f"{bounds.step * 1e3:.1f}", f"{bounds.mfu:.1%}", f"{free:.1%}", fits))
    columns = ("mesh and remat", "bound, ms", "MFU at most", "free", "limited by")
    return TextTable(f"Compiled for {topology}, by the bound on a step's time; nothing was run", columns, tuple(rows))


def search_json(tried: list[Tried]) -> list[dict[str, Any]]:
    return [
        {
            "mesh": dataclasses.asdict(one.config.mesh),
            "remat": one.config.model.stack.remat,
            "estimated_bound": one.estimate,
            "refusal": one.refusal,
            "step": None if one.step is None else to_json(one.step),
        }
        for one in tried
    ]


def _rank(one: Tried) -> tuple[bool, float]:
    fits = one.step is not None and one.step.free >= 0
    return not fits, one.step.bounds.step if one.step is not None else math.inf


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
