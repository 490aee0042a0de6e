"""TPUs that are not attached, described by libtpu for compilation."""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, Mesh, NamedSharding, PartitionSpec

from anyexperts_jax.aot.libtpu import require_libtpu
from anyexperts_jax.core import hardware
from anyexperts_jax.core.errors import UserError, comma_list, require, require_one_of
from anyexperts_jax.core.hardware import Gpu, Tpu, gpus, tpus
from anyexperts_jax.sharding.mesh import traced_for

_DUMP_FLAG = "--xla_jf_dump_to="
_PASSES = ".*(pre-delay|packed-bundles-post-ra|post-bundle-packing-post-ra).*"  # the files `report` reads
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server which TPU this is
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def open_compiler(directory: pathlib.Path) -> None:
    """Makes libtpu dump its schedules into `directory`.

    This sets environment variables that libtpu reads on its first use, so it must be called before any other use of a
    TPU topology in the process.

    Raises:
      UserError: if libtpu is not installed or does not fit JAX, or the process has already set another directory.
    """
    require_libtpu()
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    flag = f"{_DUMP_FLAG}{directory}"
    require(
        _DUMP_FLAG not in flags or flag in flags.split(),
        f"LIBTPU_INIT_ARGS={flags!r} names another directory than {directory}; start a new process",
    )
    if flag not in flags.split():
        flags = f"{flags} {flag} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_PASSES}"
    os.environ.update(_ENVIRONMENT, LIBTPU_INIT_ARGS=flags.strip())


def use_no_device() -> None:
    """Keeps JAX from looking for accelerators, unless the user has chosen a platform. Call it before JAX's first use.

    Compiling for devices that are not attached needs none, and plugins complain, or fail to load, if they find none.
    """
    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")


def devices(chip: str) -> list[Any]:
    """The devices of one chip, to compile for."""
    require_one_of("chip", chip, tpus())
    require_libtpu()
    name = f"{chip}:{tpus()[chip].smallest}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def chip_of_topology(topology: str) -> Tpu | Gpu:
    """The chip of a topology such as "v5p:8x8x8".

    Raises:
      UserError: for an unknown chip.
    """
    return hardware.chip(topology.partition(":")[0])


def slice_devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of one or several equal slices such as "v5p:8x8x8", to compile for. "h100:2x8" is two nodes.

    Raises:
      UserError: for an unknown chip or shape, or if the chip's compiler is not installed or does not fit JAX.
    """
    require(slices >= 1, f"slices={slices} must be >= 1")
    chip, _, shape = topology.partition(":")
    lengths = [int(length) for length in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
    dimensions = {name: tpu.smallest.count("x") + 1 for name, tpu in tpus().items()} | dict.fromkeys(gpus(), 2)
    known = comma_list(dimensions)
    form = f"CHIP:SHAPE with CHIP of {known}, as v5e:4x4, v5p:8x8x8 or h100:2x8 (nodes x GPUs of a node)"
    require(len(lengths) == dimensions.get(chip, 0) > 0, f"topology {topology!r} is not of the form {form}")
    if chip in gpus():
        from anyexperts_jax.aot.gpu import gpu_devices

        return gpu_devices(gpus()[chip], slices, lengths[0], lengths[1])
    require_libtpu()
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"libtpu describes no slice {topology!r}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def mesh_of(chip: str) -> Iterator[NamedSharding]:
    """A context in which traced code sees one device of `chip`. Yields the sharding that places an abstract argument on
    that device."""
    device = devices(chip)[0]
    described = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    with traced_for(described):
        yield NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())


def compile_for(chip: str, function: Callable[..., Any], arguments: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """`function` jitted and compiled for one device of `chip`."""
    with mesh_of(chip) as sharding:
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
        return jax.jit(function).lower(*placed).compile()
