"""Compiles a decoding step, one token for each row of a filled cache, for TPUs or GPUs that are not attached."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from anyexperts_jax.aot.bounds import Bounds, Demand, find_bounds
from anyexperts_jax.aot.collectives import Collective, read_collectives
from anyexperts_jax.aot.fit import temporaries_refused
from anyexperts_jax.aot.topology import chip_of_topology, slice_devices
from anyexperts_jax.core.errors import UserError, require
from anyexperts_jax.core.quantities import bytes_text
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.generate import dropless
from anyexperts_jax.models.init import abstract_params, logical_axes, named_leaves
from anyexperts_jax.models.multimodal import TextPart
from anyexperts_jax.models.paths import is_a, is_matmul, tower_of
from anyexperts_jax.models.sample import GREEDY
from anyexperts_jax.nn.stack import empty_stack_cache
from anyexperts_jax.pretrained.budget import BudgetInForce
from anyexperts_jax.pretrained.decode import cache_sharding, extend_step
from anyexperts_jax.sharding.mesh import make_mesh
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import batch_shards, param_shardings, replicated
from anyexperts_jax.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class CompiledDecode:
    """The compiler's figures for one step of decoding, and the bounds that follow. Nothing was run."""

    topology: str
    devices: int
    mesh: dict[str, int]
    rows: int
    length: int  # positions of the cache
    parameters: int
    memory: dict[str, int]  # bytes per device: "parameters", "cache", "temporaries", "program"
    hbm: int  # bytes of a device's memory
    collectives: tuple[Collective, ...]
    bounds: Bounds
    seconds: float  # to trace and compile

    @property
    def free(self) -> float:
        """The free share of a device's memory."""
        return 1 - sum(self.memory.values()) / self.hbm


def compile_decode(run: RunConfig, model: ModelConfig, topology: str) -> CompiledDecode:
    """Compiles the step that `generate` runs after a prompt, for `train.batch_size` rows and a cache of
    `data.encoding.max_length` positions, on the mesh of the run.

    Raises:
      UserError: if there is no compiler or no such topology, or the step does not fit the devices or their memory.
    """
    rows, length = run.train.batch_size, run.data.encoding.max_length
    mesh, chip = make_mesh(run.mesh, slice_devices(topology)), chip_of_topology(topology)
    shards = batch_shards(mesh)
    require(rows % shards == 0, f"train.batch_size={rows} does not split over {shards} batch shards")
    start = time.perf_counter()
    params = _placed_params(model, mesh)
    held = {"parameters": _bytes(params), "cache": _bytes(_placed_cache(model, mesh, rows, length))}
    held_text = ", ".join(f"{name} {bytes_text(size, 2)}" for name, size in held.items())
    try:
        compiled = lower_decode(model, mesh, rows, length).compile()
    except jax.errors.JaxRuntimeError as error:
        if temporaries_refused(str(error)) is None:
            raise
        raise UserError(
            f"the step of decoding does not fit a device of {topology} with {bytes_text(chip.hbm, 0)} ({held_text}); "
            "take fewer rows or positions, or more devices"
        ) from error
    stats = compiled.memory_analysis()
    inner = run.mesh.sizes_inside(mesh.size)
    collectives = tuple(read_collectives(compiled.as_text(), inner))
    flops = _flops(model, rows, length)
    demand = Demand(flops, flops, read_bytes(model, mesh, rows, length))
    memory = {**held, "temporaries": stats.temp_size_in_bytes, "program": stats.generated_code_size_in_bytes}
    found = CompiledDecode(
        topology=topology,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        rows=rows,
        length=length,
        parameters=sum(math.prod(p.shape) for p in jax.tree.leaves(params)),
        memory=memory,
        hbm=chip.hbm,
        collectives=collectives,
        bounds=find_bounds(demand, collectives, list(mesh.devices.flat), inner, chip),
        seconds=time.perf_counter() - start,
    )
    over = -found.free * chip.hbm
    message = f"the step of decoding does not fit a device of {topology}: {bytes_text(over, 2)} more ({held_text})"
    require(found.free >= 0, message)
    return found


def read_bytes(model: ModelConfig, mesh: Mesh, rows: int, length: int) -> float:
    """Returns the bytes that a device reads in a step: its cache and its weights, of the experts only those hit.

    Rows are assumed to choose their experts at random and independently; routing that prefers some experts reads less.
    """
    share = 1 - (1 - model.moe.expected_real_slots / model.moe.num_experts) ** (rows / batch_shards(mesh))
    total = float(_bytes(_placed_cache(model, mesh, rows, length)))
    for name, array in named_leaves(_placed_params(model, mesh)).items():
        if is_a("expert", name):
            total += share * _bytes(array)
        elif is_matmul(name) and tower_of(name) not in ("vision", "audio"):
            total += _bytes(array)
    return total


def lower_decode(model: ModelConfig, mesh: Mesh, rows: int, length: int) -> Any:
    """The step that `compile_decode` compiles, lowered for the devices of `mesh`."""
    params, cache = _placed_params(model, mesh), _placed_cache(model, mesh, rows, length)

    def given(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    key = jax.eval_shape(lambda: jax.random.key(0))
    has_towers = model.vision_tower is not None or model.audio_tower is not None

    def one_token() -> TextPart:
        number_B = jnp.zeros((rows,), jnp.int32)
        lead_B = jnp.zeros((rows,), jnp.float32) if has_towers else None
        return TextPart(number_B[:, None], number_B, number_B, lead_B)

    part = jax.tree.map(lambda array: given(array.shape, array.dtype), jax.eval_shape(one_token))
    bias_LC = given(model.router_bias_shape, jnp.float32) if model.moe.expert_bias else None
    static = (dropless(model), Placement(mesh), GREEDY)
    arguments = (params, bias_LC, BudgetInForce(), (part, None))
    held = (cache, given((rows, model.vocab_size), jnp.bool_))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # implementations are chosen for the mesh's platform
        return extend_step.lower(static, *arguments, held, (given(key.shape, key.dtype), given((), jnp.int32)))


def _placed_params(model: ModelConfig, mesh: Mesh) -> Any:
    params = abstract_params(model)
    return jax.tree.map(_placed, params, param_shardings(mesh, logical_axes(model), params))


def _placed_cache(model: ModelConfig, mesh: Mesh, rows: int, length: int) -> Any:
    cache = jax.eval_shape(lambda: empty_stack_cache(model.stack, rows, length))
    return jax.tree.map(lambda array: _placed(array, cache_sharding(Placement(mesh), array.shape)), cache)


def _placed(array: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _bytes(tree: Any) -> int:
    """Returns the bytes of a tree on one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _flops(model: ModelConfig, rows: int, length: int) -> float:
    """Counts the FLOPs of a step's matmuls, over all devices, with attention over a full cache."""
    stack, moe = model.stack, model.moe
    dense = sum(
        math.prod(array.shape)
        for name, array in named_leaves(abstract_params(model)).items()
        if is_matmul(name) and tower_of(name) not in ("vision", "audio")
    )
    dense += model.vocab_size * stack.d_model if model.tie_embeddings else 0
    experts = moe.expected_real_slots * 3 * stack.d_model * stack.expert_d_ff * stack.num_moe_layers
    widths = stack.attention.head_dim + stack.attention.value_dim
    attention = length * stack.attention.num_heads * widths * stack.num_layers
    return 2 * rows * (dense + experts + attention)
