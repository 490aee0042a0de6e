"""Compiles the train step of a configuration for TPUs or GPUs that are not attached."""

import dataclasses
import math
import time
from typing import Any

import jax
from jax.sharding import Mesh

from anyexperts_jax.aot.bounds import Bounds, find_bounds, train_demand
from anyexperts_jax.aot.collectives import Collective, read_collectives
from anyexperts_jax.aot.fit import does_not_fit, temporaries_refused
from anyexperts_jax.aot.topology import chip_of_topology, slice_devices
from anyexperts_jax.aot.work import Work, count_work
from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.data.batches import abstract_batch
from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.models.init import abstract_params
from anyexperts_jax.sharding.mesh import make_mesh
from anyexperts_jax.sharding.placement import Placement
from anyexperts_jax.sharding.specs import batch_shardings, batch_shards
from anyexperts_jax.train.auto_dispatch import with_dispatch
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.fit import state_bytes
from anyexperts_jax.train.state import abstract_state
from anyexperts_jax.train.step import jit_train_step, model_apply
from anyexperts_jax.train.trainable import what_trains


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiler's figures for one train step, and the bounds that follow. Nothing was run."""

    topology: str
    slices: int
    devices: int
    mesh: dict[str, int]
    parameters: int
    memory: dict[str, int]  # bytes per device: "state and batch", "temporaries", "results not in place", "program"
    hbm: int  # bytes of a device's memory
    collectives: tuple[Collective, ...]
    work: Work
    bounds: Bounds
    seconds: float  # to trace and compile

    @property
    def free(self) -> float:
        """The free share of a device's memory; negative if the step does not fit."""
        return 1 - sum(self.memory.values()) / self.hbm


def compile_step(config: RunConfig, topology: str, slices: int = 1) -> CompiledStep:
    """Compiles the step that `train` would run, for one slice such as "v5e:4x4", several slices, or nodes of GPUs.

    Raises:
      UserError: if there is no compiler or no such slice, or the configuration does not fit the devices or their
      memory.
    """
    require(
        config.mesh.slices == slices,
        f"there are {slices} slices, but mesh.dcn_data x mesh.dcn_fsdp = {config.mesh.slices}; "
        f"set mesh.dcn_data={slices}",
    )
    devices = slice_devices(topology, slices)
    chip = chip_of_topology(topology)
    mesh = make_mesh(config.mesh, devices)
    check_batch(config, mesh)
    start = time.perf_counter()
    config = with_dispatch(config, dict(mesh.shape))
    lowered, state = lower_step(config, mesh), state_bytes(config, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = temporaries_refused(str(error))
        if wanted is None:
            raise
        raise does_not_fit(config, dict(mesh.shape), topology, hbm=chip.hbm, state=state, temporaries=wanted) from error
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    memory = {
        "state and batch": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "results not in place": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    return describe_step(config, topology, mesh, memory=memory, program=compiled.as_text(), seconds=seconds)


def describe_step(
    config: RunConfig, topology: str, mesh: Mesh, memory: dict[str, int], program: str, seconds: float
) -> CompiledStep:
    """Returns the figures of a step, from the compiler's output.

    Args:
      memory: see `CompiledStep`.
      program: the text of the optimised program.
    """
    chip, sizes = chip_of_topology(topology), dict(mesh.shape)
    inner = config.mesh.sizes_inside(mesh.size)
    devices = list(mesh.devices.flat)
    collectives = tuple(read_collectives(program, inner))
    work = count_work(config, sizes, devices[0].device_kind)
    return CompiledStep(
        topology=topology,
        slices=config.mesh.slices,
        devices=len(devices),
        mesh=sizes,
        parameters=sum(math.prod(p.shape) for p in jax.tree.leaves(abstract_params(config.model))),
        memory=memory,
        hbm=chip.hbm,
        collectives=collectives,
        work=work,
        bounds=find_bounds(train_demand(work, memory["state and batch"]), collectives, devices, inner, chip),
        seconds=seconds,
    )


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Raises `UserError` unless all devices get the same number of sequences."""
    shards = batch_shards(mesh)
    require(
        config.train.batch_size % (shards * config.train.accumulation) == 0,
        f"train.batch_size={config.train.batch_size} does not split over {shards} batch shards"
        + (f" and train.accumulation={config.train.accumulation}" if config.train.accumulation > 1 else ""),
    )


def lower_step(config: RunConfig, mesh: Mesh) -> Any:
    """Traces and lowers the train step for the devices of `mesh`, which need not be attached."""
    trained = what_trains(config)
    optimizer = trained.optimizer(config)
    step = jit_train_step(config, optimizer, model_apply(config.model, Placement(mesh)), mesh, trained.trainable)
    state = abstract_state(config.model, optimizer, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # implementations are chosen for the mesh's platform
        return step.lower(state, placed_batch(config.data.encoding, config.train.batch_size, mesh))


def placed_batch(spec: EncodingSpec, rows: int, mesh: Mesh) -> Batch:
    """Shape, dtype and sharding of every array of a batch."""
    shardings = batch_shardings(mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[path[0].name]),
        abstract_batch(spec, rows),
    )
