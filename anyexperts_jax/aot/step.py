"""The train step of a configuration, compiled for a slice of TPUs that is not here."""

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from anyexperts_jax.aot.collectives import Collective, read_collectives
from anyexperts_jax.aot.topology import slice_devices
from anyexperts_jax.core.batch import Batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.data.encode import EncodingSpec, encode
from anyexperts_jax.data.example import Example
from anyexperts_jax.models.init import abstract_params, logical_axes
from anyexperts_jax.sharding.expert_parallel import Placement
from anyexperts_jax.sharding.mesh import make_mesh
from anyexperts_jax.sharding.specs import batch_shardings, batch_shards
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.optim import make_optimizer
from anyexperts_jax.train.state import abstract_state
from anyexperts_jax.train.step import jit_train_step, model_apply

# Per device as JAX counts them, in GiB: a v5p's two cores are one device, a tpu7x's are two.
HBM_GIB = {"v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of one train step. Static: nothing was run."""

    topology: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    memory: dict[str, int]  # bytes a device: "state and batch", "temporaries", "results not in place", "program"
    hbm: int  # bytes a device has
    collectives: tuple[Collective, ...]
    seconds: float  # to trace and compile

    @property
    def free(self) -> float:
        """The share of a device's memory that is left."""
        return 1 - sum(self.memory.values()) / self.hbm


def compile_step(config: RunConfig, topology: str) -> CompiledStep:
    """Compiles the step that `train` would run on a slice such as "v5e:4x4".

    Raises:
      UserError: no libtpu, no such slice, or a configuration that does not fit its devices.
    """
    devices = slice_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    shards = batch_shards(mesh)
    require(
        config.train.batch_size % (shards * config.train.accumulation) == 0,
        f"train.batch_size={config.train.batch_size} does not split over {shards} batch shards",
    )
    start = time.perf_counter()
    compiled = lower_step(config, mesh).compile()
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    memory = {
        "state and batch": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "results not in place": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    sizes = dict(mesh.shape)
    return CompiledStep(
        topology=topology,
        devices=len(devices),
        mesh=sizes,
        parameters=sum(math.prod(p.shape) for p in jax.tree.leaves(abstract_params(config.model))),
        memory=memory,
        hbm=HBM_GIB[topology.partition(":")[0]] << 30,
        collectives=tuple(read_collectives(compiled.as_text(), sizes)),
        seconds=seconds,
    )


def lower_step(config: RunConfig, mesh: Mesh) -> Any:
    """The train step traced for the devices of `mesh`, which need not be here."""
    optimizer = make_optimizer(config.optim, logical_axes(config.model))
    step = jit_train_step(config, optimizer, model_apply(config.model, Placement(mesh)), mesh)
    state = abstract_state(config.model, optimizer, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # what is chosen by platform is chosen for the mesh's
        return step.lower(state, abstract_batch(config.data.encoding, config.train.batch_size, mesh))


def abstract_batch(spec: EncodingSpec, batch_size: int, mesh: Mesh) -> Batch:
    """Shape, dtype and sharding of every array of a batch."""
    fields = encode(Example("nlp", "any", 1, "?", "!", "none"), spec)
    batch = Batch(**{name: np.broadcast_to(a, (batch_size, *a.shape)) for name, a in fields.items()})
    shardings = batch_shardings(mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[path[0].name]), batch
    )
